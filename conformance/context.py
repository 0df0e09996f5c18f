"""The library under test, as checks see it: making arrays, calling the loss, reading results.

Needs no NumPy: arrays are made from Python lists and read back as Python numbers. Whatever is made
or called is remembered as a line of source, so that a failure can be shown again.
"""

from __future__ import annotations

import importlib
import random
import shlex
import struct
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import mml_arrayapi as mml
from mml_arrayapi.conformance.reference import Reference, difference
from mml_arrayapi.libraries import HOST, LAZY, LIBRARIES, TRACED, library_of

Array = Any

DTYPES = ("float32", "float64", "float16", "bfloat16")
INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8")

N, C = 4, 5
"""The usual number of samples and classes: some libraries compile for every new shape."""


class Fail(AssertionError):
    """The library does not do what the contract says."""


class NotRun(Exception):
    """A check can't be made here, for the reason given."""


class Missing(Exception):
    """The library lacks a function."""


class Context:
    """One library, device and dtype under test.

    Parameters
    ----------
    xp : str or namespace
        The array API namespace, or its name: a module's, or ``numpy``, ``torch``, ``cupy``,
        ``dask``, ``jax``, ``array_api_strict``.
    device : str or device, optional
        Where arrays are made; as the library's ``__array_namespace_info__().devices()`` prints it.
    dtype : {"float32", "float64", "float16", "bfloat16"}
        The dtype of the scores.
    seed : int
        Random numbers follow from it, the check's name and the dtype.
    backend : str, optional
        The kernel that must run.
    other : Context, optional
        A second library, to agree with.

    Raises
    ------
    ImportError
        There is no such module.
    ValueError
        It is no array API namespace, or has no such device; or no such dtype is checked.

    Examples
    --------
    >>> from mml_arrayapi.conformance import Context
    >>> context = Context("numpy")
    >>> context.read(context.loss(context.array([[0.0, 1.0]]), context.integers([0])))
    1.0
    """

    def __init__(
        self,
        xp: Any,
        *,
        device: Any = None,
        dtype: str = "float32",
        seed: int = 0,
        backend: str | None = None,
        other: Context | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, but is {dtype!r}")
        self.name = xp if isinstance(xp, str) else xp.__name__
        self.xp = namespace(xp)
        self.device = _device(self.xp, device)
        self.dtype = dtype
        self.seed = seed
        self.backend = backend
        self.other = other
        sample = self.xp.zeros((1,), **self._where())
        library = library_of("input", sample)
        self.library = library.name
        try:
            self.value_access = library.value_access(sample)
        except AttributeError:  # a function is missing: the checks will name it
            self.value_access = HOST
        self.lazy = self.value_access in (LAZY, TRACED) or hasattr(sample, "compute")
        self._type = type(sample)
        self.begin("")

    def begin(self, check: str) -> None:
        """Forget the calls made so far, and start the random numbers of a check."""
        self.rng = random.Random(f"{self.seed} {check} {self.dtype}")
        self._sources: dict[int, tuple[Array, str]] = {}
        self._call: tuple[str, tuple[Array, ...], dict[str, Any]] | None = None

    def needs_values(self) -> None:
        """Leave a check for which arrays must have values."""
        if self.value_access == TRACED:
            raise NotRun(f"arrays of {self.library} have no values to look at")

    # Making arrays

    def has_dtype(self, name: str) -> bool:
        """Tell whether the library has a dtype on this device."""
        dtype = getattr(self.xp, name, None)
        if dtype is None:
            return False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # JAX warns where it gives float32 for float64
                return bool(self.xp.zeros((1,), dtype=dtype, **self._where()).dtype == dtype)
        except Exception:  # noqa: BLE001 (each library says so in its own way)
            return False

    def array(self, values: Any, dtype: str | None = None) -> Array:
        """Make an array of numbers of the dtype under test, or of another."""
        dtype = dtype or self.dtype
        made = self.xp.asarray(values, dtype=getattr(self.xp, dtype), **self._where())
        return self.note(made, f"xp.asarray({values!r}, dtype=xp.{dtype}{self._where_source()})")

    def integers(self, values: Any, dtype: str | None = None) -> Array:
        """Make an array of integers, of the widest dtype there is or of another."""
        return self.array(values, dtype or self.integer())

    def full(self, shape: tuple[int, ...], value: float, dtype: str | None = None) -> Array:
        """Make an array of equal numbers; its shape may hold a 0."""
        dtype = dtype or self.dtype
        made = self.xp.full(shape, value, dtype=getattr(self.xp, dtype), **self._where())
        source = f"xp.full({shape}, {value!r}, dtype=xp.{dtype}{self._where_source()})"
        return self.note(made, source)

    def integer(self) -> str:
        """Name the first integer dtype that the library has here."""
        for name in INTEGERS:
            if self.has_dtype(name):
                return name
        raise NotRun(f"{self.library} has no integer dtype here")

    def floating(self) -> list[str]:
        """Name the real floating dtypes that the library has here."""
        return [name for name in DTYPES if self.has_dtype(name)]

    def note(self, array: Array, source: str) -> Array:
        """Remember how an array was made, for the lines that show a failure."""
        self._sources[id(array)] = (array, source)
        return array

    def source(self, array: Array) -> str:
        """Return the expression that makes an array."""
        return self._sources.get(id(array), (None, "..."))[1]

    def scores(self, n: int = N, classes: int = C, span: float = 3.0) -> list[list[float]]:
        """Draw random scores that the dtype under test holds exactly."""
        return [
            [rounded(self.rng.uniform(-span, span), self.dtype) for _ in range(classes)]
            for _ in range(n)
        ]

    def targets(self, n: int = N, classes: int = C) -> list[int]:
        """Draw random classes."""
        return [self.rng.randrange(classes) for _ in range(n)]

    # Calling the functions under test

    def loss(self, input: Array, target: Array, **keywords: Any) -> Array:
        """Call :func:`mml_arrayapi.multi_margin_loss`."""
        return self._called(mml.multi_margin_loss, input, target, keywords)

    def loss_and_grad(self, input: Array, target: Array, **keywords: Any) -> tuple[Array, Array]:
        """Call :func:`mml_arrayapi.multi_margin_loss_and_grad`."""
        loss, grad = self._called(mml.multi_margin_loss_and_grad, input, target, keywords)
        return loss, grad

    def kernel(self, input: Array, target: Array, **keywords: Any) -> Any:
        """Call :func:`mml_arrayapi.explain`."""
        return self._called(mml.explain, input, target, keywords)

    def _called(
        self, function: Callable[..., Any], input: Array, target: Array, keywords: dict[str, Any]
    ) -> Any:
        if self.backend is not None:
            keywords = {"backend": self.backend, **keywords}
        self._call = (function.__name__, (input, target), keywords)
        return function(input, target, **keywords)

    # Looking at what comes back

    def read(self, array: Array) -> Any:
        """Return an array's values as a Python number or nested lists; a lazy one is computed."""
        if hasattr(array, "compute"):
            array = array.compute()
        if isinstance(array, float | int):
            return array
        convert = float if self.xp.isdtype(array.dtype, "real floating") else int
        return _numbers(_listed(array), convert)

    def same(self, got: Array, wanted: Any, scale: Any, what: str) -> None:
        """Fail unless values agree with what they should be, as closely as is fair.

        Parameters
        ----------
        got : array, or nested lists
            What the library gave, read already or not.
        wanted, scale : float or nested lists
            What it should be, and the condition scale (see ``golden.json``).
        what : str
            What it is called in the message.
        """
        values = got if isinstance(got, list) else self.read(got)
        found = difference(values, wanted, scale, self.dtype)
        if found is not None:
            raise Fail(f"{what}: {found}")

    def agrees(
        self, input: Array, target: Array, wanted: Reference, what: str = "", **keywords: Any
    ) -> None:
        """Fail unless losses, mean, sum and gradients are what a reference says."""
        ahead = f"{what}, " if what else ""
        loss, grad = self.loss_and_grad(input, target, reduction="none", **keywords)
        self.same(loss, wanted.losses, wanted.loss_scales, f"{ahead}losses")
        self.same(grad, wanted.grad, wanted.grad_scales, f"{ahead}gradient of the losses' sum")
        mean = wanted.scaled([1 / wanted.count] * len(wanted.losses))
        loss, grad = self.loss_and_grad(input, target, reduction="mean", **keywords)
        self.same(loss, *wanted.total("mean"), f"{ahead}mean")
        self.same(grad, mean.grad, mean.grad_scales, f"{ahead}gradient of the mean")
        loss = self.loss(input, target, reduction="sum", **keywords)
        self.same(loss, *wanted.total("sum"), f"{ahead}sum")

    def raised(
        self, kind: type[Exception], function: Callable[..., Any], *args: Any, **keywords: Any
    ) -> Exception:
        """Return the error that a call raises; fail if it raises none, or another."""
        try:
            result = function(*args, **keywords)
        except Exception as error:
            refusal = self.refusal(error)
            if refusal:
                raise NotRun(refusal) from None
            if isinstance(error, kind):
                return error
            if isinstance(error, AttributeError) and self.lacking(error):
                raise
            found = f"raised {type(error).__name__} ({error}), expected {kind.__name__}"
            raise Fail(found) from error
        raise Fail(f"gave {str(result)[:200]}, expected {kind.__name__}")

    def raised_when_read(
        self, kind: type[Exception], function: Callable[..., Any], *args: Any, **keywords: Any
    ) -> Exception:
        """Return the error that a call raises, or that reading its first result does."""

        def call_and_read() -> Any:
            result = function(*args, **keywords)
            return self.read(result[0] if isinstance(result, tuple) else result)

        return self.raised(kind, call_and_read)

    def refusal(self, error: Exception) -> str | None:
        """Return the reason, if an error says that the kernel asked for can't run this."""
        asked, _, text = str(error).partition(": ")
        if self.backend is None or asked not in ("backend", "use_backend"):
            return None
        return text.partition(";")[0] if text.startswith("kernel ") else None

    def lacking(self, error: AttributeError) -> str | None:
        """Name what an error says that the library lacks, if it is the library's lack."""
        if error.obj is self.xp:
            return f"function {error.name}"
        if isinstance(error.obj, self._type):
            return f"array attribute {error.name}"
        return None

    # Showing a failure again

    def snippet(self) -> str:
        """Return lines of Python that repeat the last call."""
        if self._call is None:
            return ""
        function, (scores, target), keywords = self._call
        lines = ["from math import inf, nan"] if self._has_specials() else []
        # A name that isn't ours is the module's own; what it holds may be named otherwise.
        module = self.xp.__name__ if self.name in LIBRARIES else self.name
        lines += ["import mml_arrayapi as mml", f"import {module} as xp"]
        if self.device is not None and not isinstance(self.device, str):
            devices = "xp.__array_namespace_info__().devices()"
            lines.append(f"device = next(d for d in {devices} if str(d) == {str(self.device)!r})")
        lines += [f"x = {self.source(scores)}", f"y = {self.source(target)}"]
        words = []
        for name, value in keywords.items():
            if id(value) in self._sources:
                lines.append(f"{name} = {self.source(value)}")
                words.append(f"{name}={name}")
            else:
                words.append(f"{name}={value!r}")
        lines.append(f"print(mml.{function}({', '.join(['x', 'y', *words])}))")
        return "\n".join(lines)

    def _has_specials(self) -> bool:
        return any("nan" in source or "inf" in source for _, source in self._sources.values())

    def command(self, check: str) -> str:
        """Return the command that runs one check as it is run here."""
        words = ["mml-arrayapi", "conformance", "--xp", self.name]
        if self.other is not None:
            words += ["--xp", self.other.name]
        if self.device is not None:
            words += ["--device", str(self.device)]
        if self.backend is not None:
            words += ["--backend", self.backend]
        words += ["--dtype", self.dtype, "--seed", str(self.seed), "--check", check]
        return shlex.join(words)

    def version(self) -> str:
        """Return the library's version; empty if it doesn't say."""
        module = self._type.__module__.partition(".")[0]
        for name in (module, self.library, self.name.partition(".")[0]):
            try:
                return metadata.version(name)
            except metadata.PackageNotFoundError:
                continue
        return str(getattr(sys.modules.get(module), "__version__", ""))

    def _where(self) -> dict[str, Any]:
        return {} if self.device is None else {"device": self.device}

    def _where_source(self) -> str:
        if self.device is None:
            return ""
        return f", device={self.device!r}" if isinstance(self.device, str) else ", device=device"


def namespace(xp: Any) -> Any:
    """Find the namespace in which the functions under test will compute.

    Parameters
    ----------
    xp : str or namespace
        As in :class:`Context`.

    Returns
    -------
    namespace

    Raises
    ------
    ImportError, ValueError
        There is none.
    """
    if isinstance(xp, str) and xp in LIBRARIES:
        return LIBRARIES[xp]().namespace
    module = importlib.import_module(xp) if isinstance(xp, str) else xp
    try:
        return library_of("input", module.asarray([0.0])).namespace
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{module.__name__} is no array API namespace: {error}") from None


def _device(xp: Any, device: Any) -> Any:
    """Find a device by the name that the library prints for it; other words are left to it."""
    if not isinstance(device, str):
        return device
    try:
        devices = list(xp.__array_namespace_info__().devices())
    except (AttributeError, RuntimeError):
        return device
    for found in devices:
        if device == found or device == str(found) or f"({device!r})" in str(found):
            return found
    if devices and not any(isinstance(found, str) for found in devices):
        known = ", ".join(map(str, devices))
        try:
            xp.zeros((1,), device=device)
        except Exception:  # noqa: BLE001 (each library says so in its own way)
            raise ValueError(f"no device {device!r}; there are: {known}") from None
    return device


def rounded(value: float, dtype: str) -> float:
    """Round a Python float to a dtype (bfloat16: towards 0).

    Parameters
    ----------
    value : float
        Within the dtype's range.
    dtype : str
        Its name.

    Returns
    -------
    float
    """
    if dtype == "float64":
        return value
    code = "<e" if dtype == "float16" else "<f"
    packed = struct.pack(code, value)
    if dtype == "bfloat16":
        packed = b"\0\0" + packed[2:]
    return float(struct.unpack(code, packed)[0])


def _listed(array: Array) -> Any:
    """Return an array's values as nested lists, by the quickest way that it offers."""
    if hasattr(array, "tolist"):
        return array.tolist()
    numpy = sys.modules.get("numpy")
    if numpy is not None and hasattr(array, "__array__"):
        try:
            return numpy.asarray(array).tolist()
        except (TypeError, ValueError, RuntimeError):  # not on the CPU
            pass
    return _elements(array, ())


def _elements(array: Array, place: tuple[int, ...]) -> Any:
    if len(place) < array.ndim:
        return [_elements(array, (*place, i)) for i in range(array.shape[len(place)])]
    return array[place] if place else array


def _numbers(values: Any, convert: Callable[[Any], float]) -> Any:
    if isinstance(values, Sequence):
        return [_numbers(v, convert) for v in values]
    return convert(values)
