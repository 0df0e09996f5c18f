"""The libraries: how the namespace of each is found, and whether an array's values can be read.

One table, :data:`LIBRARIES`, holds one row per library that needs saying something about. A
library that has no row is served through the ``__array_namespace__`` of its arrays.

The table is keyed on the top-level module of the array's type, so that nothing is imported for a
library that the caller did not bring. Two facts shaped it: ``array_api_compat.array_namespace``
costs 2 microseconds, and under ``torch.compile`` its cached helpers raise a warning; a look-up by
type does neither.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mml_arrayapi.kernel import Problem

if TYPE_CHECKING:
    import numpy as np

Array = Any
Namespace = Any

HOST = "host"  # values are concrete, reading them costs nothing
DEVICE = "device"  # values are concrete, reading them would stall a device
TRACED = "traced"  # there are no values yet: jit, vmap, torch.compile, meta and fake tensors
LAZY = "lazy"  # values come when computed (Dask)


def device_of(array: Array) -> Any:
    """Return the array's device, or None where the library knows of none (Dask, old NumPy)."""
    return getattr(array, "device", None)


@dataclass(frozen=True, slots=True)
class Library:
    """What the package needs to know of one array library.

    Attributes
    ----------
    name : str
        The short name, as in kernels' ``library``: ``"numpy"``, ``"torch"`` ...
    namespace : module
        The array API namespace.
    value_access : callable
        ``value_access(array)``: :data:`HOST`, :data:`DEVICE`, :data:`TRACED` or :data:`LAZY`.
    on_host : callable
        ``on_host(array)``: the same values as an array that may be read inside a trace too.
    device_key : callable
        ``device_key(array)``: what must be equal for arrays to be used together; None fits any.
    unsupported_layout : callable
        What an array that isn't dense is, in words; None for one that is.
    kinds : mapping
        The kinds of the common dtypes, ``"real floating"`` or ``"integral"``; ``isdtype()`` takes
        microseconds to find them.
    widened : callable
        ``widened(target)``: the targets; as ``int8`` where the library's functions don't know their
        integers of less than 8 bits.
    device : callable
        ``device(array)``: the device to name when an array is made to be used with this one.
    compute : callable or None
        For a lazy library, ``compute(*arrays)``: their values, computed together.
    widest : callable
        ``widest(array)``: the widest signed integer and the widest real dtype of its device.
    cast : callable
        ``cast(x, dtype)``: ``x`` in a dtype; itself if it has that dtype.
    places : callable
        ``places(x, index, axis)``: what ``take`` and ``put`` need to find the elements at
        ``index``, which has length 1 along ``axis`` and ``x``'s other lengths. All are in range.
    take : callable
        ``take(x, places, axis)``: the elements of ``x`` in those places.
    put : callable
        ``put(x, places, values, axis)``: ``x`` with ``values`` (an array, or one float) in those
        places. It may write into ``x``.
    look_up : callable
        ``look_up(table, index, axis)``: the elements of a vector at ``index``, in its shape.
    relu : callable
        ``relu(x)``: the larger of ``x`` and 0, NaN where ``x`` is NaN. Where it is differentiated,
        its slope at 0 is 0. It may write into ``x``.
    scaled : callable
        ``scaled(slope, scale)``: the product; where ``slope`` is 0 it is 0, even if ``scale`` is
        infinite, but NaN if that is NaN. ``scale`` has length 1 along one axis. ``slope`` is real,
        or of booleans; it may be written into.
    shrunk : callable
        ``shrunk(terms, factor)``: the product with a number.
    nan_unless : callable
        ``nan_unless(condition, x)``: ``x``, but NaN where a condition does not hold.
    nan_rows : callable
        ``nan_rows(x, scale, losses, axis)``: ``scale``, but NaN where ``losses`` are; these have
        length 1 along ``axis``, ``x`` has all classes. Where it is differentiated, every derivative
        of such a row is NaN.
    divisor : callable
        ``divisor(count)``: what a sum, of nothing if that is 0, is divided by for the mean; NaN
        or 0 for 0. An array, an integer or a symbolic size.
    sum : callable
        ``sum(x, axis, dtype)``: the sum in a dtype; the axis is kept, None stands for all.
    in_range : callable
        ``in_range(target, n_classes)``: whether all targets, of which there are some, are at least
        0 and less than a number. Only of arrays whose values can be read.
    runs : callable
        ``runs(terms)``: whether a sum of them in the widest precision takes so long that short
        runs are added first.
    run_length : callable
        ``run_length(n, longest)``: how long the runs of ``n`` terms are, ``longest / 2`` at least.
    loss, loss_and_grad : callable, optional
        How the generic implementation is run, if there is more to it than the formula: derivatives
        for automatic differentiation, for instance. As :mod:`mml_arrayapi.formula` has them.
    under_autocast : callable or None
        ``under_autocast(input)``: the scores in the dtype that the library wants a loss to be
        computed from (PyTorch under autocast).
    """

    name: str
    namespace: Namespace
    value_access: Callable[[Array], str]
    on_host: Callable[[Array], Array]
    device_key: Callable[[Array], Any]
    widest: Callable[[Array], tuple[Any, Any]]
    cast: Callable[[Array, Any], Array]
    places: Callable[[Array, Array, int], Any]
    take: Callable[[Array, Any, int], Array]
    put: Callable[[Array, Any, Array | float, int], Array]
    look_up: Callable[[Array, Array, int], Array]
    relu: Callable[[Array], Array]
    scaled: Callable[[Array, Array], Array]
    nan_unless: Callable[[Array, Array], Array]
    nan_rows: Callable[[Array, Array, Array, int], Array]
    divisor: Callable[[Any], Any]
    sum: Callable[[Array, int | None, Any], Array]
    in_range: Callable[[Array, int], bool]
    kinds: Mapping[Any, str]
    shrunk: Callable[[Array, float], Array] = lambda terms, factor: terms * factor
    runs: Callable[[Array], bool] = lambda _: False
    run_length: Callable[[Any, int], int] = lambda _, longest: longest
    unsupported_layout: Callable[[Array], str | None] = lambda _: None
    widened: Callable[[Array], Array] = lambda target: target
    device: Callable[[Array], Any] = device_of
    compute: Callable[..., tuple[Array, ...]] | None = None
    loss: Callable[[Problem], Array] | None = None
    loss_and_grad: Callable[[Problem, Array | None], tuple[Array, Array]] | None = None
    under_autocast: Callable[[Array], Array] | None = None


def _itself(array: Array) -> Array:
    return array


def plain(
    name: str,
    xp: Namespace,
    value_access: Callable[[Array], str],
    on_host: Callable[[Array], Array] = _itself,
) -> Library:
    """Make the row of a library that follows the standard and needs nothing else."""

    def cast(x: Array, dtype: Any) -> Array:
        return x if x.dtype == dtype else xp.astype(x, dtype)  # cheaper than astype(copy=False)

    def relu(x: Array) -> Array:
        return xp.where(x <= 0, xp.zeros_like(x), x)  # maximum() and clip() have other slopes at 0

    def scaled(slope: Array, scale: Array) -> Array:
        inactive = xp.where(xp.isnan(scale), scale, xp.zeros_like(scale))
        if slope.dtype == xp.bool:
            return xp.where(slope, scale, inactive)
        return xp.where(slope != 0, slope * scale, inactive)

    def nan_rows(x: Array, scale: Array, losses: Array, axis: int) -> Array:  # noqa: ARG001
        return xp.where(xp.isnan(losses), losses, scale)

    def total(x: Array, axis: int | None, dtype: Any) -> Array:
        return xp.sum(x, axis=axis, keepdims=axis is not None, dtype=dtype)

    def in_range(target: Array, n_classes: int) -> bool:
        host = on_host(target)
        if host is not target:
            return library_of("target", host).in_range(host, n_classes)
        # As signed numbers: ndonnx finds that the largest of 0 and the largest uint64 is 0.
        signed = cast(target, widest(xp, target)[0])
        return int(xp.min(signed)) >= 0 and int(xp.max(signed)) < n_classes

    return Library(
        name,
        xp,
        value_access,
        on_host=on_host,
        device_key=device_of,
        widest=lambda array: widest(xp, array),
        cast=cast,
        relu=relu,
        scaled=scaled,
        nan_unless=partial(nan_unless, xp),
        nan_rows=nan_rows,
        divisor=partial(_divisor, xp),
        sum=total,
        in_range=in_range,
        kinds=_kinds(xp),
        **by_comparison(xp),
    )


def by_comparison(xp: Namespace) -> dict[str, Callable[..., Any]]:
    """Return what finds elements along an axis.

    The standard has no assignment by index, and its gather is eager or missing in several
    libraries: the classes are compared with the target instead.
    """

    def places(x: Array, index: Array, axis: int) -> tuple[Array, Array]:
        n = x.shape[axis]
        classes = xp.arange(n, dtype=index.dtype, device=device_of(index))
        classes = xp.reshape(classes, tuple(n if i == axis else 1 for i in range(index.ndim)))
        return classes == index, index

    def take(x: Array, places: tuple[Array, Array], axis: int) -> Array:
        mask, index = places
        found = xp.where(mask, x, xp.zeros_like(index, dtype=x.dtype))
        return xp.sum(found, axis=axis, keepdims=True, dtype=x.dtype)

    def put(x: Array, places: tuple[Array, Array], values: Array | float, axis: int) -> Array:  # noqa: ARG001
        mask, index = places
        if isinstance(values, float):
            values = xp.full_like(index, values, dtype=x.dtype)
        return xp.where(mask, values, x)

    def look_up(table: Array, index: Array, axis: int) -> Array:
        n = table.shape[0]
        row = xp.reshape(table, tuple(n if i == axis else 1 for i in range(index.ndim)))
        return take(row, places(row, index, axis), axis)

    return {"places": places, "take": take, "put": put, "look_up": look_up}


def nan_unless(xp: Namespace, condition: Array, x: Array) -> Array:
    """Put NaN where the condition doesn't hold."""
    return xp.where(condition, x, xp.full_like(x, math.nan))


def _divisor(xp: Namespace, count: Any) -> Any:
    return nan_unless(xp, count > 0, count) if hasattr(count, "dtype") else count or math.nan


def _kinds(xp: Namespace) -> dict[Any, str]:
    names = dict.fromkeys(("float16", "bfloat16", "float32", "float64"), "real floating")
    for bits in (8, 16, 32, 64):
        names |= {f"int{bits}": "integral", f"uint{bits}": "integral"}
    kinds = {}
    for name, kind in names.items():
        dtype = getattr(xp, name, None)
        if isinstance(dtype, type):  # of NumPy and JAX: the dtype of arrays is another object
            import numpy as np

            dtype = np.dtype(dtype)
        if isinstance(dtype, Hashable) and dtype is not None:
            kinds[dtype] = kind
    return kinds


def _numpy() -> Library:
    import array_api_compat.numpy as xp

    from mml_arrayapi.backends import eager, numpy_formula

    row = plain("numpy", xp, lambda _: HOST)
    return replace(row, **numpy_formula.ROW, **eager.ROW)


def _torch() -> Library:
    # Written as "from ... import LIBRARY" this takes three times as long, at each look-up.
    import mml_arrayapi.backends.pytorch.library as row

    return row.LIBRARY


def _cupy() -> Library:
    import array_api_compat.cupy as xp

    return plain("cupy", xp, lambda _: DEVICE, xp.asnumpy)


def _dask() -> Library:
    import array_api_compat.dask.array as xp
    from dask import compute

    from mml_arrayapi.backends.dask import alignment, graph

    row = plain("dask", xp, lambda _: LAZY)
    layout = alignment.unsupported_layout
    return replace(row, unsupported_layout=layout, compute=compute, **graph.ROW)


def _jax() -> Library:
    import jax.numpy as xp

    from mml_arrayapi.backends import jax as values

    # JAX moves arrays of no particular device beside any other.
    row = plain("jax", xp, values.value_access, values.on_host)
    return replace(row, device=lambda _: None, **values.ROW)


def _array_api_strict() -> Library:
    import array_api_strict as xp

    from mml_arrayapi.backends import eager

    def on_host(array: Array) -> Array:
        return array.to_device(xp.Device("CPU_DEVICE"))

    return replace(plain("array_api_strict", xp, lambda _: HOST, on_host), **eager.ROW)


LIBRARIES: dict[str, Callable[[], Library]] = {
    "numpy": _numpy,
    "torch": _torch,
    "cupy": _cupy,
    "dask": _dask,
    "jax": _jax,
    "jaxlib": _jax,
    "array_api_strict": _array_api_strict,
}

SUPPORTED = tuple(name for name in LIBRARIES if name != "jaxlib")  # where JAX's arrays come from
"""The libraries that are tested, shown and measured: the one list of them."""

_by_module: dict[str, Library] = {}
_by_namespace: dict[str, Library] = {}


def library_of(argument: str, array: Array) -> Library:
    """Find the library of an array.

    Parameters
    ----------
    argument : str
        The argument's name, for the message.
    array : array
        Any object.

    Returns
    -------
    Library

    Raises
    ------
    TypeError
        The object is no array of a library that follows the array API standard.
    """
    # str(): torch.compile follows no method of the module's name of a Parameter's type.
    module = str(type(array).__module__).partition(".")[0]
    library = _by_module.get(module)
    if library is None:
        load = LIBRARIES.get(module)
        if load is None:
            return _library_without_row(argument, array)
        library = load()
        if module != "torch":  # within torch.export keeping it would be a side effect: it warns
            _by_module[module] = library
    return library


def _library_without_row(argument: str, array: Array) -> Library:
    """Find the library through the array's own namespace: subclasses of arrays, and strangers."""
    from array_api_compat import array_namespace

    try:
        xp = array_namespace(array)
        name = xp.__name__.removeprefix("array_api_compat.").partition(".")[0]
    except Exception:  # noqa: BLE001 (an object's __array_namespace__ may do anything)
        module = type(array).__module__
        hint = "; call its to_numpy()" if hasattr(type(array), "to_numpy") else ""
        if module.startswith("xarray."):
            hint = "; pass its .data, or use xarray.apply_ufunc"
        raise TypeError(
            f"{argument} must be an array of a library that follows the Python array API standard "
            f"(NumPy, PyTorch, CuPy, Dask, JAX ...), but is of type "
            f"{module}.{type(array).__qualname__}{hint}"
        ) from None
    if name in LIBRARIES:
        return LIBRARIES[name]()
    library = _by_namespace.get(name)
    if library is None or library.namespace is not xp:  # namespaces need not be hashable
        row = plain(name, xp, _stranger_value_access)
        library = _by_namespace[name] = replace(row, unsupported_layout=_masked_elements)
    return library


def _masked_elements(array: Array) -> str | None:
    """Tell what a stranger's array is whose mask would be lost, or None."""
    from array_api_compat import array_namespace

    mask = getattr(array, "mask", None)
    if mask is None:
        return None
    try:
        masked = bool(array_namespace(mask).any(mask))
    except Exception:  # noqa: BLE001 (no array, or one that is traced)
        masked = True
    kind = type(array)
    return f"a {kind.__module__}.{kind.__qualname__} with masked elements" if masked else None


def _stranger_value_access(array: Array) -> str:
    """Read values only where that is plainly free: an eager array that says it is on the CPU."""
    from array_api_compat import is_lazy_array

    if hasattr(array, "compute"):  # is_lazy_array() would call bool(), which computes (Cubed)
        return DEVICE
    if "cpu" not in str(device_of(array)).lower():
        return DEVICE
    return TRACED if is_lazy_array(array) else HOST


def to_numpy(*arrays: Array) -> list[np.ndarray]:
    """Return the values of arrays of one library, read from their device, computed if lazy."""
    library = library_of("input", arrays[0])
    if library.compute is not None:
        return to_numpy(*library.compute(*arrays))
    return [_read(library.on_host(array)) for array in arrays]


def _read(array: Array) -> np.ndarray:
    """Read an array's values: by way of DLPack, as the standard has it, if NumPy knows no other."""
    import numpy as np

    values = np.asarray(array)
    return np.from_dlpack(array) if values.dtype == object else values


def like(values: np.ndarray, array: Array) -> Array:
    """Return real NumPy values as an array that can be used together with another."""
    import numpy as np

    library = library_of("input", array)
    if library.compute is not None:  # NumPy arrays may stand beside lazy ones
        return values
    xp = library.namespace
    if library.widest(array)[1] == xp.float32:
        with np.errstate(over="ignore", under="ignore"):
            values = values.astype(np.float32)
    return xp.asarray(values, device=library.device(array))


def widest(xp: Namespace, array: Array) -> tuple[Any, Any]:
    """Return the widest signed integer and the widest real dtype of the array's device."""
    try:
        # ndonnx wants the kind to be said, though the standard doesn't.
        dtypes = xp.__array_namespace_info__().dtypes(device=device_of(array), kind=None)
    except (AttributeError, RuntimeError):  # older than the standard's version 2023.12
        try:
            return xp.int64, xp.zeros((), dtype=xp.float64, device=device_of(array)).dtype
        except ValueError:  # the device has no float64
            return xp.int64, xp.float32
    return dtypes.get("int64", dtypes.get("int32")), dtypes.get("float64", xp.float32)
