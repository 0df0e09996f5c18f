"""NumPy: what the formula needs of it in a faster form than the standard has."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

SHORT = 64  # elements of a row


def _places(index: np.ndarray, axis: int) -> tuple[np.ndarray, ...]:
    """Return indices of every axis; ``np.take_along_axis`` takes 10 microseconds for the same."""
    if index.ndim == 2:
        others = np.arange(index.shape[1 - axis])
        return (others[:, None], index) if axis == 1 else (index, others)
    places = list(np.ix_(*map(np.arange, index.shape)))
    places[axis] = index
    return tuple(places)


def take(x: Array, index: Array, axis: int) -> Array:
    """Return the elements at ``index`` along an axis."""
    if x.shape[:axis] + x.shape[axis + 1 :] != index.shape[:axis] + index.shape[axis + 1 :]:
        return x.reshape(-1)[index]  # one element per class
    return x[_places(index, axis)]


def put(x: np.ndarray, index: np.ndarray, values: Any, axis: int) -> np.ndarray:
    """Write ``values`` at ``index`` along an axis."""
    x[_places(index, axis)] = values
    return x


def relu(x: Array) -> Array:
    """Return the larger of ``x`` and 0; ``np.where`` takes ten times as long."""
    return np.maximum(x, 0, out=x)


def scaled(slope: Array, scale: Array) -> Array:
    """Return the product, 0 where the slope is 0; a selection takes ten times as long."""
    if np.isinf(scale).any():
        inactive = np.where(np.isnan(scale), scale, np.zeros_like(scale))
        return np.where(slope > 0, slope * scale, inactive)
    return np.multiply(slope, scale, out=slope)


def total(x: Array, axis: int | None, dtype: Any) -> Array:
    """Return the sum along an axis; reduce() takes twice as long as einsum() for short rows."""
    if axis is not None and axis == x.ndim - 1 and x.shape[axis] < SHORT:
        return np.einsum("...j->...", x.astype(dtype, copy=False))[..., None]
    return np.add.reduce(x, axis, dtype, None, axis is not None)


def in_range(target: Array, n_classes: int) -> bool:
    """Tell whether all targets are classes: as unsigned numbers, negative ones are too large."""
    kind, bits = target.dtype.kind, 8 * target.itemsize
    limit = n_classes if kind == "u" else min(n_classes, 2 ** (bits - 1))
    return bool(target.view(target.dtype.str.replace("i", "u")).max() < limit)


def unsupported_layout(array: np.ndarray) -> str | None:
    """Tell what an array is whose meaning would be lost, or None."""
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array, whose mask would be lost; call its filled() or compressed()"
    if isinstance(array, np.matrix):
        return "a numpy.matrix; call numpy.asarray() on it"
    if not isinstance(array, (np.ndarray, np.generic)):
        return f"of type numpy.{type(array).__name__}"
    return None


ROW: dict[str, Any] = {
    "unsupported_layout": unsupported_layout,
    "widest": lambda _: (np.int64, np.float64),
    "take": take,
    "put": put,
    "relu": relu,
    "scaled": scaled,
    "sum": total,
    "in_range": in_range,
}
