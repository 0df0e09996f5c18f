"""NumPy: what the formula needs of it in a faster form than the standard has."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

SHORT = 64  # elements of a row
FEW = 4096  # elements
SMALL_INTEGERS = ("int1", "int2", "int4", "uint1", "uint2", "uint4")  # ml_dtypes adds them to NumPy
add: Any = np.add.reduce  # np.sum() takes two microseconds more
UNSIGNED = {
    np.dtype(f"{kind}{size}"): (np.dtype(f"u{size}"), 2 ** (8 * size - (kind == "i")))
    for kind in "iu"
    for size in (1, 2, 4, 8)
}


def cast(x: Array, dtype: np.dtype) -> Array:
    """Return an array in a dtype; a number, such as a sum of all, takes astype() twice as long."""
    if x.dtype == dtype:
        return x
    return x.astype(dtype) if x.ndim else np.dtype(dtype).type(x)


def places(x: np.ndarray, index: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:  # noqa: ARG001
    """Return indices of every axis; ``np.take_along_axis`` takes 10 microseconds for the same."""
    if index.ndim == 2:
        others = np.arange(index.shape[1 - axis])
        return (others[:, None], index) if axis == 1 else (index, others)
    every = list(np.ix_(*map(np.arange, index.shape)))
    every[axis] = index
    return tuple(every)


def take(x: Array, places: tuple[np.ndarray, ...], axis: int) -> Array:  # noqa: ARG001
    """Return the elements in some places."""
    return x[places]


def put(x: Array, places: tuple[np.ndarray, ...], values: Any, axis: int) -> Array:  # noqa: ARG001
    """Write ``values`` in some places."""
    x[places] = values
    return x


def look_up(table: Array, index: Array, axis: int) -> Array:  # noqa: ARG001
    """Return the elements of a vector, of no subclass that the losses would be of too."""
    return np.asarray(table)[index]


def relu(x: Array) -> Array:
    """Return the larger of ``x`` and 0; ``np.where`` takes ten times as long."""
    return np.maximum(x, 0, out=x)


def scaled(slope: Array, scale: Array) -> Array:
    """Return the product, 0 where the slope is 0; a selection takes ten times as long."""
    if np.count_nonzero(np.isinf(scale)):
        scale = np.where((slope != 0) | np.isnan(scale), scale, np.zeros_like(scale))
    return np.multiply(slope, scale, out=None if slope.dtype == bool else slope)


def total(x: Array, axis: int | None, dtype: Any) -> Array:
    """Return the sum along an axis; of many short rows einsum() takes half as long as reduce().

    Of few it takes longer, but float64 terms, whose sums are not rounded any more, must add up to
    the same bits however many rows there are.
    """
    short = axis == x.ndim - 1 and x.shape[axis] < SHORT
    if short and (x.size > FEW or x.dtype == dtype):
        return np.einsum("...j->...", x.astype(dtype, copy=False))[..., None]
    return add(x, axis, dtype, None, axis is not None)


def in_range(target: Array, n_classes: int) -> bool:
    """Tell whether all targets are classes: as unsigned numbers, negative ones are too large."""
    if not target.dtype.isnative:
        target = target.astype(target.dtype.newbyteorder("="))
    unsigned, limit = UNSIGNED[target.dtype]
    values = target.view(unsigned)
    largest: int = values.item(values.argmax())  # of few, max() takes three times as long
    return bool(largest < min(n_classes, limit))


def widened(target: Array) -> Array:
    """Return targets with 8 bits for those of 1, 2 and 4, which NumPy's functions lack."""
    dtype = target.dtype
    # NumPy takes microseconds to make up a name; those of the dtypes that are added are of kind V.
    if dtype.kind != "V" or dtype.name not in SMALL_INTEGERS:
        return target
    return target.astype(np.int8, casting="safe")  # chunks of Dask may have another dtype than said


def unsupported_layout(array: np.ndarray) -> str | None:
    """Tell what an array is whose meaning would be lost, or None."""
    if type(array) is np.ndarray:
        return None
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array, whose mask would be lost; call its filled() or compressed()"
    if isinstance(array, np.matrix):
        return "a numpy.matrix; call numpy.asarray() on it"
    for meaning in ("mask", "unit", "units"):  # of Astropy's arrays, and of unyt's
        if hasattr(array, meaning):
            kind = type(array)
            return (
                f"a {kind.__module__}.{kind.__qualname__}, whose {meaning} would be lost; call "
                f"numpy.asarray() on it"
            )
    if not isinstance(array, (np.ndarray, np.generic)):
        return f"of type numpy.{type(array).__name__}"
    return None


ROW: dict[str, Any] = {
    "on_host": widened,
    "device_key": lambda _: None,
    "unsupported_layout": unsupported_layout,
    "widened": widened,
    "widest": lambda _: (np.int64, np.float64),
    "cast": cast,
    "places": places,
    "take": take,
    "put": put,
    "look_up": look_up,
    "relu": relu,
    "scaled": scaled,
    "sum": total,
    "in_range": in_range,
}
