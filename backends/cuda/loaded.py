"""Which kernels are compiled and loaded, by device; and why the others are not."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from mml_arrayapi.backends.cuda.plan import Variant
from mml_arrayapi.kernel import Unusable

Functions = dict[str, Any]  # a variant's kernels by name

# Statuses of CUDA that say nothing of the next call: no memory is free; a graph is captured.
MOMENTARY = frozenset({2, *range(900, 910)})


class Loaded:
    """The kernels that a library has loaded.

    Parameters
    ----------
    load : callable
        ``load(device, variant)`` compiles and loads: it returns the kernels by name, or raises.
    """

    def __init__(self, load: Callable[[int, Variant], Functions]) -> None:
        self._load = load
        self._functions: dict[tuple[int, Variant], Functions] = {}
        self._reasons: dict[tuple[int, Variant], str] = {}
        self._lock = threading.Lock()

    def functions(self, device: int, variant: Variant) -> Functions:
        """Return a variant's kernels on a device, loaded when they are first asked for.

        Raises
        ------
        Unusable
            They can't be compiled or loaded, or :meth:`refuse` was called. Nothing is tried twice.
        """
        key = device, variant
        functions = self._functions.get(key)
        if functions is not None:
            return functions
        with self._lock:
            if key in self._reasons:
                raise Unusable(self._reasons[key])
            if key not in self._functions:
                try:
                    self._functions[key] = self._load(device, variant)
                except Exception as error:
                    raise self.refuse(device, variant, error) from error
            return self._functions[key]

    def refuse(self, device: int, variant: Variant, error: Exception) -> Unusable:
        """Return an error as :class:`Unusable`; keep it as the reason, unless it may soon be over.

        Parameters
        ----------
        device, variant
            What can't be loaded or launched.
        error : Exception
            What CUDA reports; its ``status``, where it has one, is looked up in ``MOMENTARY``.

        Returns
        -------
        Unusable
        """
        reason = in_words(error)
        if getattr(error, "status", None) not in MOMENTARY:
            self._reasons[device, variant] = reason
            self._functions.pop((device, variant), None)
        return Unusable(reason)


def in_words(error: Exception) -> str:
    """Return an error's kind and text."""
    return str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
