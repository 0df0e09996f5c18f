"""Dask: what runs in the tasks of a call, on chunks that may have come over a network.

Arguments: blocks of arrays, or a list of them along an axis that the result doesn't have;
``place`` is a block's place in the whole array, one slice for each axis. Tasks don't change what
they are given.

The same chunk gives the same bits wherever it is computed. A chunk that travelled may lie at any
address (two thirds of those a client scatters do) and in another order of memory, so neither may
decide which kernel runs or how it adds.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import numpy as np

from mml_arrayapi._version import __version__
from mml_arrayapi.backends.dask.alignment import check_length, check_targets
from mml_arrayapi.exact_sum import ExactSum
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.registry import GENERIC, choose_for_job
from mml_arrayapi.validation import check

Array = Any

# Scores per tile: 4 MB of float32. The generic implementation is as fast from 2**17 to 2**21 and
# needs about six tiles of memory.
TILE = 2**20


class Call(NamedTuple):
    """What the tasks of a call need to know besides their blocks."""

    p: float
    margin: float
    axis: int
    n_classes: int
    reduction: str
    check_target: str
    dtype: Any  # the scores'
    backend: str | None  # the kernel that the chunks must take
    scale: float = 1.0  # what the gradient is multiplied with


class Ran(NamedTuple):
    """Who computed something, and with what."""

    worker: str | None  # the address of a cluster's worker
    kernel: str
    version: str


class Part(NamedTuple):
    """What a part of the classes adds to the losses of its rows."""

    sums: Array  # float64, one per row: a part of its loss, without the weight
    ran: frozenset[Ran]
    slopes: Array | None = None  # float64: the derivative by the target's score
    grad: Array | None = None  # of the block


class Rows(NamedTuple):
    """The losses of a block of rows, in the computing precision."""

    losses: Array
    ran: frozenset[Ran]
    slopes: Array | None = None


class Sum(NamedTuple):
    """The losses of some samples, added up."""

    total: ExactSum
    ran: frozenset[Ran]


# Whole rows in a chunk.


def loss_of_rows(
    block: Array, place: Any, target: Array, weight: Array | None, *, call: Call
) -> Array | Sum:
    """Return the losses of a block, or their sum."""
    target = _checked(block, target, place, call)
    return close(_run(block, target, weight, call)[0], call=call)


def loss_and_grad_of_rows(
    block: Array, place: Any, target: Array, upstream: Any, weight: Array | None, *, call: Call
) -> tuple[Array | Sum, Array]:
    """Return what :func:`loss_of_rows` does, and the gradient."""
    target = _checked(block, target, place, call)
    rows, grad = _run(block, target, weight, call, _scale(block, target, upstream, call))
    return close(rows, call=call), grad


def first(pair: Any, *, call: Call) -> Any:  # noqa: ARG001
    """Return the first of two."""
    return pair[0]


def second(pair: Any, *, call: Call) -> Array:  # noqa: ARG001
    """Return the second of two."""
    return pair[1]


def only(blocks: list[Array], *, call: Call) -> Array:  # noqa: ARG001
    """Return the only block of a list."""
    return blocks[0]


# Classes in several chunks.


def own_scores(block: Array, place: Any, target: Array, *, call: Call) -> Array:
    """Return the targets' scores where this block holds them, else 0.

    The blocks of the first classes look after the targets out of range: NaN, or an error.
    """
    first_classes = place[call.axis].start == 0
    target = _checked(
        block, target, place, call if first_classes else call._replace(check_target="nan")
    )
    xp = library_of("input", block).namespace
    own = _own_scores(xp, block, place, target, call)
    if first_classes and call.check_target == "nan":
        wide = xp.astype(target, xp.int64)
        own = xp.where((wide >= 0) & (wide < call.n_classes), own, math.nan)
    return own


def _own_scores(xp: Any, block: Array, place: Any, target: Array, call: Call) -> Array:
    dtype = _computing(xp, block)
    if not block.shape[call.axis]:
        return xp.zeros(target.shape, dtype=dtype)
    inside, column = _column(xp, block, place, target, call)
    column = xp.expand_dims(xp.where(inside, column, 0), axis=call.axis)
    own = xp.squeeze(xp.take_along_axis(block, column, axis=call.axis), axis=call.axis)
    return xp.astype(xp.where(inside, own, 0), dtype)


def sums_of_part(block: Array, place: Any, target: Array, found: list[Array], *, call: Call) -> Part:
    """Return what the classes of this block, but the target's, add to each row's loss."""
    xp, target = _namespace(block, target)
    own: Array = reduce(add, found)
    inside, column = _column(xp, block, place, target, call)
    sums = xp.empty(target.shape, dtype=xp.float64)
    ran: set[Ran] = set()
    for where, rows in _tiles(block.shape, call.axis):
        tile = _with_target(xp, block[where], own[rows], inside[rows], call.axis)
        problem, kernel = _chosen(tile, column[rows], None, call)
        sums[rows] = kernel.loss(problem)
        ran.add(_ran(kernel))
    # The kernel divides by the number of its classes, so that nothing overflows.
    return Part(sums * ((block.shape[call.axis] + 1) / call.n_classes), frozenset(ran))


def sums_and_grad_of_part(
    block: Array,
    place: Any,
    target: Array,
    found: list[Array],
    upstream: Any,
    weight: Array | None,
    *,
    call: Call,
) -> Part:
    """Return what :func:`sums_of_part` does, with its slopes and the block's gradient."""
    xp, target = _namespace(block, target)
    n, axis = block.shape[call.axis], call.axis
    head = (slice(None),) * axis
    sums, slopes = (xp.empty(target.shape, dtype=xp.float64) for _ in range(2))
    grad = xp.empty_like(block)
    own: Array = reduce(add, found)
    inside, column = _column(xp, block, place, target, call)
    share = (n + 1) / call.n_classes
    scale = _scale(block, target, upstream, call) * _weights(xp, target, weight, call) * share
    ran: set[Ran] = set()
    for where, rows in _tiles(block.shape, axis):
        tile = _with_target(xp, block[where], own[rows], inside[rows], axis)
        problem, kernel = _chosen(tile, column[rows], None, call)
        sums[rows], slope = kernel.loss_and_grad(problem, scale[rows])
        at = xp.expand_dims(column[rows], axis=axis)
        by_own = xp.squeeze(xp.take_along_axis(slope, at, axis=axis), axis=axis)
        # What stands beside a target's score of minus infinity costs something, and isn't there.
        extra = slope[(*head, n)]
        slopes[rows] = by_own + xp.where(inside[rows] & xp.isfinite(extra), extra, 0)
        grad[where] = slope[(*head, slice(n))]
        ran.add(_ran(kernel))
    return Part(sums * share, frozenset(ran), slopes, grad)


def rows_of_parts(parts: list[Part], target: Array, weight: Any, *, call: Call) -> Rows:
    """Add up the parts of the rows."""
    sums = reduce(add, (part.sums for part in parts))
    xp, target = _namespace(sums, target)
    losses = sums * _weights(xp, target, weight and weight[0], call)
    with np.errstate(over="ignore"):
        losses = xp.astype(losses, xp.float64 if call.dtype == xp.float64 else xp.float32)
    slopes = None if parts[0].slopes is None else reduce(add, (part.slopes for part in parts))
    return Rows(losses, frozenset().union(*(part.ran for part in parts)), slopes)


def complete_grad(
    part: Part, rows: Rows, place: Any, target: Array, *, call: Call
) -> Array:
    """Put the derivatives by the targets' scores into a block's gradient, and NaN into NaN rows."""
    axis, grad = call.axis, part.grad
    xp, target = _namespace(grad, target)
    inside, column = _column(xp, grad, place, target, call)
    column = xp.where(inside, column, -1)
    n = grad.shape[axis]
    classes = xp.reshape(xp.arange(n), tuple(n if i == axis else 1 for i in range(grad.ndim)))
    made = xp.empty_like(grad)
    for where, few in _tiles(grad.shape, axis):
        own = classes == xp.expand_dims(column[few], axis=axis)
        slope = xp.astype(xp.expand_dims(rows.slopes[few], axis=axis), grad.dtype)
        lost = xp.expand_dims(xp.isnan(rows.losses[few]), axis=axis)
        made[where] = xp.where(lost, math.nan, xp.where(own, slope, grad[where]))
    return made


def _with_target(xp: Any, tile: Array, own: Array, inside: Array, axis: int) -> Array:
    """Append a column: the target's score, or where the tile has that already, what costs nothing.

    That is minus infinity, but for a target's score of minus infinity, from which it would be
    no distance: any finite score then gives the infinite loss that the sample has anyway.
    """
    nothing = xp.where(own == -math.inf, 0.0, -math.inf)
    column = xp.astype(xp.where(inside, nothing, own), own.dtype)
    tile = xp.astype(tile, own.dtype, copy=False)
    return xp.concat([tile, xp.expand_dims(column, axis=axis)], axis=axis)


def _column(xp: Any, block: Array, place: Any, target: Array, call: Call) -> tuple[Array, Array]:
    """Tell which targets are in this block, and where; those that aren't are one past its end."""
    n, start = block.shape[call.axis], place[call.axis].start
    target = xp.astype(target, xp.int64)  # what is too large turns negative, and is in no block
    inside = (target >= start) & (target < start + n)
    return inside, xp.where(inside, target - start, n)


def _weights(xp: Any, target: Array, weight: Array | None, call: Call) -> Any:
    """Return each target's weight, in float64; any number for targets out of range."""
    if weight is None:
        return 1.0
    known = xp.clip(xp.astype(target, xp.int64), 0, call.n_classes - 1)
    taken = xp.take(xp.asarray(weight), xp.reshape(known, (-1,)))
    with np.errstate(over="ignore"):
        taken = xp.astype(taken, xp.float64 if call.dtype == xp.float64 else xp.float32)
    return xp.astype(xp.reshape(taken, target.shape), xp.float64)


# Kernels on a block of whole rows.


def _run(
    block: Array, target: Array, weight: Array | None, call: Call, scale: Array | None = None
) -> tuple[Rows, Array | None]:
    """Run the kernel that is chosen for a call on this block; with a scale, for the gradient too.

    A kernel takes the block as it is. What makes temporaries (the generic implementation, and
    16-bit scores, whose losses must not be rounded one by one) goes through it in tiles.
    """
    xp = library_of("input", block).namespace
    dtype = _computing(xp, block)
    weight = None if weight is None else xp.asarray(weight)
    problem, kernel = _chosen(_in_order(block), target, weight, call)
    if kernel is not GENERIC and block.dtype == dtype:
        if scale is None:
            return Rows(kernel.loss(problem), frozenset([_ran(kernel)])), None
        losses, grad = kernel.loss_and_grad(problem, scale)
        return Rows(losses, frozenset([_ran(kernel)])), grad
    losses = xp.empty(target.shape, dtype=dtype)
    grad = None if scale is None else xp.empty_like(block)
    for where, rows in _tiles(block.shape, call.axis):
        tile = xp.astype(_in_order(block[where]), dtype, copy=False)
        problem, kernel = _chosen(tile, target[rows], weight, call)
        if grad is None:
            losses[rows] = kernel.loss(problem)
        else:
            losses[rows], grad[where] = kernel.loss_and_grad(problem, scale[rows])
    return Rows(losses, frozenset([_ran(kernel)])), grad


def _chosen(
    block: Array, target: Array, weight: Array | None, call: Call
) -> tuple[Problem, Kernel]:
    problem = check(
        block,
        target,
        p=call.p,
        margin=call.margin,
        weight=weight,
        reduction="none",
        axis=call.axis,
        check_target="nan",  # they have been looked at
    )
    return problem, choose_for_job(problem, call.backend, math.inf)


def _in_order(block: Array) -> Array:
    """Return a block as every kernel takes it, in an order of memory that survives a journey.

    Pickling, and Dask's serialization, keep the order of memory of contiguous arrays, and make
    others C-contiguous.
    """
    if not isinstance(block, np.ndarray):
        return block
    if not block.flags.aligned or not (block.flags.f_contiguous or _rows_in_c_order(block)):
        return np.array(block, order="F" if block.flags.f_contiguous else "C")
    return block


def _rows_in_c_order(block: np.ndarray) -> bool:
    """Tell whether an array is C-contiguous, or a slice of one that took all of its last axis."""
    extent = block.itemsize
    for n, stride in zip(reversed(block.shape), reversed(block.strides), strict=True):
        if n > 1 and stride < extent:
            return False
        extent = stride * n
    return block.shape[-1] < 2 or block.strides[-1] == block.itemsize


# What all have in common.


def _namespace(block: Array, target: Array) -> tuple[Any, Array]:
    """Return the block's namespace, and the targets in it (NumPy's, beside chunks on a GPU)."""
    xp = library_of("input", block).namespace
    return xp, xp.asarray(target)


def _checked(block: Array, target: Array, place: Any, call: Call) -> Array:
    check_length(_without(block.shape, call.axis), target)
    _, target = _namespace(block, target)
    check_targets(target, _without(place, call.axis), call.n_classes, call.check_target)
    return target


def _without(values: Any, axis: int) -> tuple[Any, ...]:
    return (*values[:axis], *values[axis + 1 :])


def _computing(xp: Any, block: Array) -> Any:
    return xp.float64 if block.dtype == xp.float64 else xp.float32


def _tiles(shape: tuple[int, ...], axis: int) -> Iterator[tuple[Any, Any]]:
    """Yield the indices of tiles: into the scores, and into what has one element per sample."""
    batch = [i for i in range(len(shape)) if i != axis]
    if not batch:
        yield ..., ...  # an empty tuple would turn 0-d arrays into scalars
        return
    longest = max(batch, key=lambda i: shape[i])
    per_row = max(1, math.prod(shape) // max(1, shape[longest]))
    step = max(1, TILE // per_row)
    for at in range(0, max(1, shape[longest]), step):
        part = slice(at, at + step)
        where = (*(slice(None),) * longest, part)
        yield where, where if longest < axis else where[1:]


def _scale(block: Array, target: Array, upstream: Any, call: Call) -> Array:
    """Return what each sample's gradient is multiplied with."""
    xp = library_of("input", block).namespace
    scale = xp.asarray(1.0 if upstream is None else upstream, dtype=xp.float64) * call.scale
    return xp.broadcast_to(scale, target.shape)


def close(rows: Rows, *, call: Call) -> Array | Sum:
    """Return the losses of a block in the scores' dtype, or their exact sum."""
    library = library_of("input", rows.losses)
    if call.reduction != "none":
        total = ExactSum()
        total.add(np.asarray(library.on_host(rows.losses)))
        return Sum(total, rows.ran)
    with np.errstate(over="ignore"):
        return library.namespace.astype(rows.losses, call.dtype)


def merged(sums: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:  # noqa: ARG001
    """Merge nested lists of sums into a new one."""
    if computing_meta:
        return sums
    total, ran, pending = ExactSum(), frozenset[Ran](), [sums]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending += one
        else:
            total.merge(one.total)
            ran |= one.ran
    return Sum(total, ran)


def rounded(
    sums: Any, axis: Any, keepdims: bool, computing_meta: bool = False, *, call: Call, like: Array
) -> Array:
    """Return the sum or the mean of all samples as an array of the scores' dtype."""
    if computing_meta:
        return like
    total, ran = merged(sums, axis, keepdims)
    _warn_of_mixture(ran)
    xp = library_of("input", like).namespace
    with np.errstate(over="ignore"):
        value = np.float64(total.over(total.count if call.reduction == "mean" else 1))
        return xp.asarray(value.astype(call.dtype))


def _ran(kernel: Kernel) -> Ran:
    return Ran(_worker(), kernel.name, __version__)


def _worker() -> str | None:
    """Return the address of the cluster's worker that this task runs on, or None."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return str(distributed.get_worker().address)
    except ValueError:
        return None


def _warn_of_mixture(ran: frozenset[Ran]) -> None:
    """Tell the user, who may be at another machine, that workers ran different kernels."""
    by_worker: dict[str, set[str]] = {}
    for worker, kernel, version in ran:
        if worker is not None:
            by_worker.setdefault(worker, set()).add(f"{kernel} of mml_arrayapi {version}")
    used = {worker: ", ".join(sorted(names)) for worker, names in by_worker.items()}
    if len(set(used.values())) < 2:
        return
    from distributed import warn

    listed = "; ".join(f"{worker}: {names}" for worker, names in sorted(used.items()))
    warn(
        "the workers of this cluster ran different kernels, which agree to rounding but not to "
        f"the last bit ({listed}); install the same packages on all of them, or name one kernel "
        "with backend="
    )
