"""NumPy: what the formula needs of it in a faster form than the standard has."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any


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


def unsupported_layout(array: np.ndarray) -> str | None:
    """Tell what an array is whose meaning would be lost, or None."""
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
    "unsupported_layout": unsupported_layout,
    "widest": lambda _: (np.int64, np.float64),
    "take": take,
    "put": put,
    "relu": relu,
}
