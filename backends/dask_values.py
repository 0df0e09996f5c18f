"""Dask: how targets are checked within the graph, and NumPy arrays taken into it."""

from __future__ import annotations

import math
from typing import Any

import dask.array as da
import numpy as np

from mml_arrayapi.arguments import InvalidTargetError, raise_invalid_target
from mml_arrayapi.kernel import Problem


def settle(problem: Problem) -> Problem:
    """Make Dask arrays of NumPy targets and weights, and let targets out of range raise.

    Parameters
    ----------
    problem : Problem
        The checked call; ``input`` is a Dask array.

    Returns
    -------
    Problem
        With Dask arrays only. Nothing is computed.
    """
    target, weight = problem.target, problem.weight
    rows = tuple(c for i, c in enumerate(problem.input.chunks) if i != problem.axis)
    if isinstance(target, np.ndarray):
        # In the scores' chunks: in one chunk, the generic mask would be as large as the scores.
        known = all(not math.isnan(n) for chunks in rows for n in chunks)
        target = da.from_array(target, chunks=rows if known else -1)
    if problem.check_target == "raise":
        target = checked(target, problem.input.shape[problem.axis])
    if isinstance(weight, np.ndarray):
        weight = da.from_array(weight, chunks=-1)
    return problem._replace(target=target, weight=weight)


def checked(target: da.Array, n_classes: int) -> da.Array:
    """Return the same targets; computing one that is out of range raises.

    Parameters
    ----------
    target : dask array of integers
        Class indices.
    n_classes : int
        The number of classes.

    Returns
    -------
    dask array
        Its tasks raise :class:`InvalidTargetError` with the position in the whole array (in the
        chunk, where the chunks before it have unknown sizes).
    """
    return target.map_blocks(_check_block, n_classes, dtype=target.dtype, meta=target._meta)


def _check_block(block: Any, n_classes: int, block_info: Any = None) -> Any:
    try:
        raise_invalid_target(block, n_classes)
    except InvalidTargetError as error:
        place = block_info[0]["array-location"] if block_info else [(0, 0)] * block.ndim
        start = (0 if math.isnan(low) else int(low) for low, _ in place)
        position = tuple(a + b for a, b in zip(start, error.position, strict=True))
        raise InvalidTargetError(position, error.value, n_classes) from None
    return block
