"""The implementation: the loss and its gradient in the Python array API standard.

Whatever follows the standard runs it: eager and lazy arrays, and the transforms (automatic
differentiation, vectorisation, compilation) that libraries lay over theirs. Hence no boolean
indexing and no shape or branch that depends on data. What the standard lacks, or has only in a slow
form, comes from the library's row in :mod:`mml_arrayapi.libraries`.

For one sample with scores ``x``, target ``y``, ``C`` classes and ``z_j = (x_j - x_y) + margin``::

    loss        =   weight[y] / C * sum over j != y of max(0, z_j) ** p
    dloss/dx_j  =   weight[y] / C * p * z_j ** (p - 1)  where z_j > 0, else 0      (j != y)
    dloss/dx_y  = - sum of the others

after Weston and Watkins, "Multi-class support vector machines" (1998), as PyTorch scales it. The
order of ``(x_j - x_y) + margin`` matters: ``margin - x_y + x_j`` loses the margin for large scores.
"""

from __future__ import annotations

import math
from typing import Any

from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import Library, library_of
from mml_arrayapi.wide_sum import divided_sum, headroom

Array = Any


def loss(problem: Problem) -> Array:
    """Compute the loss of a checked problem.

    Parameters
    ----------
    problem : Problem
        Its targets have been found to be in range where ``check_target`` is ``"raise"``.

    Returns
    -------
    array
        Shape ``(*batch)`` for the reduction ``"none"``, else ``()``; ``input``'s dtype.
    """
    return reduce(problem, losses(problem))


def loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    """Compute the loss, and the gradient of ``sum(loss * grad_output)`` for ``input``.

    Parameters
    ----------
    problem : Problem
        As in :func:`loss`.
    grad_output : array or None
        Shape of the loss; None stands for 1.

    Returns
    -------
    loss : array
        As :func:`loss`.
    grad : array
        ``input``'s shape and dtype.
    """
    each, grad = losses_and_grad(problem, upstream(problem, grad_output))
    return reduce(problem, each), grad


def losses(problem: Problem) -> Array:
    """Compute one loss per sample, in the precision and unit of sums, with one class."""
    return _hinge(problem, library_of("input", problem.input))[3]


def losses_and_grad(problem: Problem, upstream: Array | float) -> tuple[Array, Array]:
    """Compute :func:`losses`, and the gradient of ``sum(losses * upstream)`` for ``input``."""
    xp, axis, p, n_classes = problem.xp, problem.axis, problem.p, problem.input.shape[problem.axis]
    library = library_of("input", problem.input)
    places, hinge, weight, losses = _hinge(problem, library)
    scale = upstream * (p / n_classes) * (xp.ones_like(losses) if weight is None else weight)
    if (ignored := ignored_samples(problem, library)) is not None:
        scale = xp.where(ignored[_along(axis, None)], xp.zeros_like(losses), scale)
    # A row whose loss is NaN has a gradient of NaN.
    scale = library.nan_rows(problem.input, scale, losses, axis)
    grad = library.scaled(_slope(xp, hinge, p), library.cast(scale, hinge.dtype))
    # All terms of a row have one sign: no part of their sum is larger than the whole.
    own = library.cast(divided_sum(library, grad, axis, -1, small=True), hinge.dtype)
    return losses, library.cast(library.put(grad, places, own, axis), problem.input.dtype)


def reduce(problem: Problem, losses: Array) -> Array:
    """Reduce :func:`losses` over the samples, and round to the input's dtype, once."""
    library, dtype = library_of("input", problem.input), problem.input.dtype
    if problem.reduction == "none":
        return library.cast(losses[_along(problem.axis, 0)], dtype)
    n = library.divisor(_count(problem, library)) if problem.reduction == "mean" else 1
    unit = headroom(problem, losses.dtype)
    small = losses.dtype == problem.xp.float64 and (losses.dtype != dtype or unit < 1)
    return library.cast(divided_sum(library, losses, None, n * unit, small=small), dtype)


def upstream(problem: Problem, grad_output: Array | None) -> Array | float:
    """Return what the gradient of each loss is multiplied by, in the precision of sums."""
    xp, library, upstream = problem.xp, library_of("input", problem.input), 1.0
    if grad_output is not None:
        upstream = library.cast(grad_output, library.widest(problem.input)[1])
        if problem.reduction == "none":
            upstream = upstream[_along(problem.axis, None)]
    if problem.reduction != "mean":
        return upstream
    count = _count(problem, library)
    if isinstance(count, int):  # a symbolic size is none
        count = max(count, 1)
    elif hasattr(count, "dtype"):
        count = xp.where(count > 0, count, xp.ones_like(count))
    return upstream / count


def _hinge(problem: Problem, library: Library) -> tuple[Array, Array, Array | None, Array]:
    """Compute what value and gradient share; weights and losses have one class.

    ``places`` says where the targets are, at class 0 for a sample that has none or is ignored;
    ``hinge`` is max(0, z), 0 at the target's class; ``weight`` is that class's, or None.
    """
    xp, axis, margin, p = problem.xp, problem.axis, problem.margin, problem.p
    integer, wide = library.widest(problem.input)
    x, n_classes = problem.input, problem.input.shape[axis]
    x = x if x.dtype == xp.float64 else library.cast(x, xp.float32)
    if infinite := abs(margin) > 3.4028234663852886e38 and x.dtype == xp.float32:  # the largest
        margin = math.copysign(math.inf, margin)
    # No narrowing: what is too large for int64 turns negative and stays out of range.
    index = library.cast(problem.target, integer)[_along(axis, None)]
    if (ignored := ignored_samples(problem, library)) is not None:
        # All scores and the margin are 0: nothing of an ignored sample is computed with.
        ignored = ignored[_along(axis, None)]
        zero = xp.zeros_like(index, dtype=x.dtype)
        x, index = xp.where(ignored, zero, x), xp.where(ignored, xp.zeros_like(index), index)
        margin = xp.where(ignored, zero, xp.full_like(zero, margin))
    if problem.check_target == "nan":
        known = (index >= 0) & (index < n_classes)
        index = xp.where(known, index, xp.zeros_like(index))
    places = library.places(x, index, axis)
    score = library.take(x, places, axis)
    if infinite:  # first: it outweighs differences of finite scores that are infinite themselves
        x, margin = x + margin, 0.0
    z = x - score
    z += margin
    # At the target's class 0; a single class keeps its NaN. (A symbolic size is no int.)
    several = isinstance(n_classes, int) and n_classes > 1
    own = 0.0 if several else xp.where(score == score, xp.zeros_like(score), score)
    hinge = library.relu(library.put(z, places, own, axis))
    terms = hinge if p == 1 else hinge * _slope(xp, hinge, p)
    losses = divided_sum(library, terms, axis, n_classes * (1 / headroom(problem, wide)))
    if (weight := problem.weight) is not None:
        weight = library.cast(library.look_up(library.cast(weight, x.dtype), index, axis), wide)
        if problem.check_target == "nan":  # what has no class has no class's weight
            weight = library.nan_unless(known, weight)
        losses = losses * weight
    if problem.check_target == "nan":
        losses = library.nan_unless(known, losses)
    if ignored is not None:
        losses = xp.where(ignored, xp.zeros_like(losses), losses)
    return places, hinge, weight, losses


def _slope(xp: Any, hinge: Array, p: float) -> Array:
    """Compute ``hinge ** (p - 1)``, 0 at 0; no power of 0, whose derivatives may be infinite."""
    if p == 2:
        return hinge
    active = hinge != 0  # NaN too, so that derivatives of a gradient of NaN are NaN
    if p == 1:
        return active
    return xp.astype(active, hinge.dtype) * xp.where(active, hinge, xp.ones_like(hinge)) ** (p - 1)


def _along(axis: int, item: int | None) -> tuple[Any, ...]:
    """Return the index that inserts (None) the classes' axis, or drops (0) one of length 1."""
    return (*(slice(None),) * axis, item, ...)


def ignored_samples(problem: Problem, library: Library) -> Array | None:
    """Return which samples are left out, shape ``(*batch)``; None if none can be."""
    xp, target, wanted = problem.xp, problem.target, problem.ignore_index
    if wanted is None or not xp.iinfo(target.dtype).min <= wanted <= xp.iinfo(target.dtype).max:
        return None
    integer, _ = library.widest(problem.input)
    half = 2 ** (xp.iinfo(integer).bits - 1)  # both are cast: a value keeps its bits
    return library.cast(target, integer) == (wanted + half) % (2 * half) - half


def _count(problem: Problem, library: Library) -> Any:
    """Return the number of samples that count: an integer, a symbolic size or an array."""
    xp, shape, ignored = problem.xp, problem.target.shape, ignored_samples(problem, library)
    if ignored is None and None not in shape and (n := math.prod(shape)) == n:  # Dask says NaN
        return n
    ones = xp.ones_like(problem.target, dtype=library.widest(problem.input)[1])
    kept = ones if ignored is None else xp.astype(~ignored, ones.dtype)
    return divided_sum(library, kept, None, 1)
