"""Sums of many terms: none of their parts overflows, and the error doesn't grow with their number.

Terms are added in short runs in their own precision, and the runs in the widest precision of the
device. Where that is float32, runs are added in runs again. Libraries that add in a wider precision
as fast as in their own skip the runs: a float64 sum of float32 terms takes NumPy no longer, but
PyTorch 20 times as long.
"""

from __future__ import annotations

from typing import Any

from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import Library

Array = Any

RUN = 64  # terms added one after the other: in float32 an error of 4e-6 at the very worst
LEVELS = 4  # of runs of runs: RUN ** LEVELS = 1.7e7 terms
SMALL = 2.0**-40  # what float64 terms, which nothing wider can hold, are multiplied by


def divided_sum(
    library: Library, terms: Array, axis: int | None, divisor: Any, *, small: bool = False
) -> Array:
    """Divide a sum by a number; only the quotient need be finite.

    Parameters
    ----------
    library : Library
        That of ``terms``.
    terms : array of float32 or float64
        What is added.
    axis : int or None
        The axis to add along, which is kept; None adds all.
    divisor : int, or array
        The number.
    small : bool
        Whether the terms are known to be so small that no sum of them overflows.

    Returns
    -------
    array
        In the widest real dtype of the device.
    """
    xp, wide = library.namespace, library.widest(terms)[1]
    shrunk = 1.0
    if terms.dtype == xp.float64:
        if not small:
            shrunk, terms = SMALL, terms * SMALL
    elif wide == xp.float32 or library.runs(terms):
        if axis is None:
            terms = xp.reshape(terms, (-1,))
        for _ in range(LEVELS if wide == xp.float32 else 1):
            if not small:
                shrunk, terms = shrunk / RUN, library.shrunk(terms, 1 / RUN)
            terms = _sums_of_runs(library, terms, axis or 0)
            if terms.shape[axis or 0] == 1:
                break
    return library.sum(terms, axis, wide) / (shrunk * divisor)


def headroom(problem: Problem, wide: Any) -> float:
    """Return what losses are multiplied by before their weights, until they have been added.

    With these they may be beyond the widest dtype, where their sum or mean isn't.
    """
    if problem.weight is None or problem.reduction == "none":
        return 1.0
    if wide == problem.xp.float32:
        return 1 / RUN**2
    return SMALL if problem.input.dtype == wide else 1.0


def _sums_of_runs(library: Library, terms: Array, axis: int) -> Array:
    """Add up each run of terms along an axis; the last run may be shorter."""
    xp, n, shape = library.namespace, terms.shape[axis], terms.shape
    if n // RUN == 0:  # a symbolic size can't be compared
        return library.sum(terms, axis, terms.dtype)
    run = library.run_length(n, RUN)
    whole, rest, every = n // run, n % run, (slice(None),) * axis
    runs = terms if rest == 0 else terms[(*every, slice(whole * run), ...)]
    runs = xp.reshape(runs, (*shape[:axis], whole, run, *shape[axis + 1 :]))
    sums = xp.squeeze(library.sum(runs, axis + 1, terms.dtype), axis=axis + 1)
    if rest == 0:
        return sums
    last = library.sum(terms[(*every, slice(whole * run, None), ...)], axis, terms.dtype)
    return xp.concat([sums, last], axis=axis)
