"""What a library offers, apart from passing or failing: functions, dtypes, kernels, values."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any

from mml_arrayapi import formula, libraries, validation, wide_sum
from mml_arrayapi.conformance.context import DTYPES, INTEGERS, Context
from mml_arrayapi.libraries import DEVICE, HOST, LAZY, TRACED

_VALUE_ACCESS = {
    HOST: "at hand: a target out of range raises",
    DEVICE: "on a device: a target out of range gives NaN",
    TRACED: "not known while computing: a target out of range gives NaN",
    LAZY: "known when computed: a target out of range raises then",
}

# What the row of a library without special treatment consists of.
_PLAIN = (libraries.plain, libraries.by_comparison, libraries.nan_unless, libraries.widest)


@cache
def functions_needed() -> tuple[str, ...]:
    """Name the array API functions that the generic code uses, read off its source.

    Returns
    -------
    tuple of str

    Examples
    --------
    >>> from mml_arrayapi.conformance.capabilities import functions_needed
    >>> "where" in functions_needed(), "take" in functions_needed()
    (True, False)
    """
    names = {
        node.attr
        for code in (formula, validation, wide_sum, *_PLAIN)
        for node in ast.walk(ast.parse(inspect.getsource(code)))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "xp"
    }
    return tuple(sorted(names.difference(DTYPES, INTEGERS)))


def capabilities(contexts: Sequence[Context]) -> dict[str, Any]:
    """Describe what a library offers.

    Parameters
    ----------
    contexts : sequence of Context
        One per dtype under test.

    Returns
    -------
    dict
        Of plain values, as it stands in the JSON report.
    """
    first = contexts[0]
    xp = first.xp
    return {
        "namespace": xp.__name__,
        "array_api_version": str(getattr(xp, "__array_api_version__", "not said")),
        "functions_missing": [name for name in functions_needed() if not hasattr(xp, name)],
        "dtypes": [name for name in (*DTYPES, *INTEGERS) if first.has_dtype(name)],
        "dtypes_missing": [name for name in (*DTYPES, *INTEGERS) if not first.has_dtype(name)],
        "values": _VALUE_ACCESS[first.value_access],
        "kernels": {c.dtype: _kernel(c) for c in contexts if c.has_dtype(c.dtype)},
        "instead": _instead(first),
    }


def _kernel(context: Context) -> dict[str, Any]:
    """Tell which kernel runs, and why not the others."""
    try:
        x, y = context.array(context.scores()), context.integers(context.targets())
        chosen = context.kernel(x, y)
    except Exception as error:  # noqa: BLE001 (the checks report what a library can't do)
        return {"runs": None, "why_not": {"": f"{type(error).__name__}: {error}"}}
    return {"runs": chosen.kernel, "why_not": {n: why for n, why in chosen.considered if why}}


def _instead(context: Context) -> list[str]:
    """Say what is done where the library lacks something."""
    found = []
    if not context.has_dtype("float64"):
        found.append("no float64: sums are kept accurate by adding blocks in float32")
    if not context.has_dtype("int64"):
        found.append("no int64: classes are compared in int32")
    return found
