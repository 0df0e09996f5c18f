"""The implementation: the loss and its gradient in the Python array API standard.

No library is named here. Whatever follows the standard runs it: eager and lazy arrays, and the
transforms (automatic differentiation, vectorisation, compilation) that libraries lay over theirs.
Hence no boolean indexing, no shape that depends on data, no gather (missing or eager in several
libraries): the target class is found by comparing every class with it. Every array made here is
made from the input or on its device.

For one sample with scores ``x``, target ``y``, ``C`` classes and ``z_j = (x_j - x_y) + margin``::

    loss        =   weight[y] / C * sum over j != y of max(0, z_j) ** p
    dloss/dx_j  =   weight[y] / C * p * z_j ** (p - 1)  where z_j > 0, else 0      (j != y)
    dloss/dx_y  = - sum of the others

after Weston and Watkins, "Multi-class support vector machines" (1998), as PyTorch scales it. The
order of ``(x_j - x_y) + margin`` matters: ``margin - x_y + x_j`` loses the margin for large scores.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import arange, widest

Array = Any

FEW = 8  # so many are left to the library's own sum where there is no float64


class _Hinge(NamedTuple):
    """The pieces that value and gradient share; ``k`` stands for an axis of length 1."""

    own: Array  # bool, input's shape: the target's own class
    z: Array  # input's shape, computing precision; NaN throughout a row that has no value
    active: Array  # bool, input's shape: the classes that cost something
    factor: Array  # (..., k, ...): weight[y] / C, NaN for a row that has no value
    wide: Any  # the dtype in which sums are kept


def loss(problem: Problem) -> Array:
    """Compute the loss of a checked problem.

    Parameters
    ----------
    problem : Problem
        See :class:`mml_arrayapi.registry.Problem`.

    Returns
    -------
    array
        Shape ``(*batch)`` for the reduction ``"none"``, else ``()``; ``input``'s dtype.
    """
    xp = problem.xp
    hinge = _hinge(problem)
    return _finish(problem, _losses(problem, hinge, _power(xp, hinge, problem.p)))


def loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    """Compute the loss, and the gradient of ``sum(loss * grad_output)`` for ``input``.

    Parameters
    ----------
    problem : Problem
        See :class:`mml_arrayapi.registry.Problem`.
    grad_output : array or None
        Shape of the loss; None stands for 1.

    Returns
    -------
    loss : array
        As :func:`loss`.
    grad : array
        ``input``'s shape and dtype.
    """
    xp, x, axis, p = problem.xp, problem.input, problem.axis, problem.p
    hinge = _hinge(problem)
    losses = _losses(problem, hinge, _power(xp, hinge, p))

    slope = _power(xp, hinge, p - 1)
    if p != 1:
        slope = slope * p
    total = _sum(xp, slope, axis, hinge.wide)

    scale = xp.astype(hinge.factor, hinge.wide)
    if problem.reduction == "mean":
        scale = scale / _count(xp, losses)
    if grad_output is not None:
        upstream = xp.astype(grad_output, hinge.wide)
        if problem.reduction == "none":
            upstream = xp.expand_dims(upstream, axis=axis)
        scale = scale * upstream
    others = slope * xp.astype(scale, slope.dtype)
    own = xp.astype(-total * scale, slope.dtype)
    return _finish(problem, losses), xp.astype(xp.where(hinge.own, own, others), x.dtype)


def _hinge(problem: Problem) -> _Hinge:
    xp, axis = problem.xp, problem.axis
    n_classes = problem.input.shape[axis]
    integer, wide = widest(xp, problem.input)
    x = problem.input
    if xp.finfo(x.dtype).bits == 16:
        x = xp.astype(x, xp.float32)

    # No narrowing: what is too large for int64 turns negative and stays out of range.
    target = xp.expand_dims(xp.astype(problem.target, integer), axis=axis)
    classes = arange(n_classes, integer, x)
    classes = xp.reshape(classes, tuple(n_classes if i == axis else 1 for i in range(x.ndim)))
    own = classes == target
    zero = xp.zeros_like(target, dtype=x.dtype)
    own_score = xp.sum(xp.where(own, x, zero), axis=axis, keepdims=True, dtype=x.dtype)

    # The target's own class gets a finite stand-in: infinity - infinity would raise a warning.
    z = (xp.where(own, zero, x) - own_score) + problem.margin
    no_value = (target < 0) | (target >= n_classes) | xp.any(xp.isnan(z), axis=axis, keepdims=True)
    one = xp.ones_like(own_score)
    trust = xp.where(no_value, one * math.nan, one)
    # Multiplied, not selected: this takes NaN into every element of the row's derivatives as well.
    z = z * trust
    # Selected by where(), whose slope at the kink is 0; those of maximum() and clip() differ
    # between libraries.
    active = (z > 0) & ~own

    factor = trust / n_classes
    if problem.weight is not None:
        weight = xp.astype(problem.weight, x.dtype)
        weight = xp.reshape(weight, classes.shape)
        weight = xp.sum(xp.where(own, weight, zero), axis=axis, keepdims=True, dtype=x.dtype)
        factor = factor * weight
    return _Hinge(own, z, active, factor, wide)


def _power(xp: Any, hinge: _Hinge, exponent: float) -> Array:
    """``z ** exponent`` where the class is active, else 0."""
    zero, one = xp.zeros_like(hinge.factor), xp.ones_like(hinge.factor)
    if exponent == 0:
        return xp.where(hinge.active, one, zero)
    if exponent == 1:
        return xp.where(hinge.active, hinge.z, zero)
    # The inner where keeps infinite derivatives of the power at 0 out of the second derivative.
    z = xp.where(hinge.active, hinge.z, one)
    return xp.where(hinge.active, z * z if exponent == 2 else z**exponent, zero)


def _losses(problem: Problem, hinge: _Hinge, terms: Array) -> Array:
    """One loss per sample, shape (*batch), in the wide dtype."""
    xp, axis = problem.xp, problem.axis
    factor = xp.astype(hinge.factor, hinge.wide)
    return xp.squeeze(_sum(xp, terms, axis, hinge.wide) * factor, axis=axis)


def _finish(problem: Problem, losses: Array) -> Array:
    """Reduce over the samples, and round to the input's dtype, once."""
    xp, dtype = problem.xp, problem.input.dtype
    if problem.reduction == "none":
        return xp.astype(losses, dtype)
    if losses.dtype == xp.float32 and losses.ndim:  # no float64 here: keep the sum accurate
        total = xp.squeeze(_sum(xp, xp.reshape(losses, (-1,)), 0, losses.dtype), axis=0)
    else:
        total = xp.sum(losses, dtype=losses.dtype)
    if problem.reduction == "mean":
        count = _count(xp, losses)
        total = total * math.nan if _is_zero(count) else total / count
    return xp.astype(total, dtype)


def _count(xp: Any, losses: Array) -> Any:
    """Return the number of samples; an array where the library doesn't know its shapes yet."""
    if all(n is not None and n == n for n in losses.shape):  # Dask says NaN
        return math.prod(losses.shape)
    return xp.sum(xp.ones_like(losses), dtype=losses.dtype)


def _is_zero(count: Any) -> bool:
    return isinstance(count, int) and count == 0


def _sum(xp: Any, x: Array, axis: int, wide: Any) -> Array:
    """Sum along an axis, which is kept, with an error that doesn't grow with its length."""
    if wide != xp.float32:
        return xp.sum(x, axis=axis, keepdims=True, dtype=wide)
    # Libraries without float64 need not sum pairwise (NumPy doesn't along its outer axes): add the
    # second half to the first until few are left. An odd one out is added at the end.
    n, before = x.shape[axis], (slice(None),) * axis
    after = (slice(None),) * (x.ndim - axis - 1)
    rest = []
    while n > FEW:
        half = n // 2
        if n % 2:
            rest.append(x[(*before, slice(n - 1, n), *after)])
        x = x[(*before, slice(half), *after)] + x[(*before, slice(half, 2 * half), *after)]
        n = half
    return sum(rest, xp.sum(x, axis=axis, keepdims=True, dtype=wide))
