"""The Dask kernel: each chunk takes the best kernel of its own library, and sums are exact.

With whole rows in a chunk there is one task per chunk, and a tree that merges sums. Where the
classes are chunked too, a target's score is first found in whichever chunk holds it and sent to
the other chunks of its rows; then each chunk sums its own classes. Within a chunk the scores are
walked in tiles, so that temporaries stay small whichever kernel runs.

The losses of the samples are added without rounding (see :mod:`mml_arrayapi.accumulator`): the
total does not depend on the chunks of the rows, nor on the order in which workers finish.

Arguments of the functions that run in tasks: blocks of arrays; a list of them along an axis that
the result doesn't have. ``start`` is where a block begins in the whole array.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from mml_arrayapi.backends.dask_values import (
    aligned,
    check_length,
    check_targets,
    rows_of,
    starts,
    unknown,
    whole,
)
from mml_arrayapi.exact_sum import ExactSum
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.loss import sample_losses
from mml_arrayapi.registry import GENERIC, choose
from mml_arrayapi.validation import Options, check_arrays

Array = Any

# Scores per tile: 4 MB of float32. The generic implementation is as fast from 2**17 to 2**21 and
# needs about six tiles of memory.
TILE = 2**20
CHUNKS_OF = ("numpy", "cupy")  # libraries whose arrays can be filled tile by tile


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


def loss(problem: Problem, backend: str | None = None) -> da.Array:
    """Build the graph of the loss.

    Parameters
    ----------
    problem : Problem
        The checked call; ``input`` is a Dask array.
    backend : str, optional
        The kernel that the chunks must take.

    Returns
    -------
    dask array
        Shape ``(*batch)`` in the chunks of the scores' rows, or ``()``.
    """
    return _Graph(problem, backend).loss()


def loss_and_grad(
    problem: Problem, grad_output: Array | None, backend: str | None = None
) -> tuple[da.Array, da.Array]:
    """Build the graph of the loss and its gradient.

    Parameters
    ----------
    problem : Problem
        The checked call; ``input`` is a Dask array.
    grad_output : dask array, numpy array or None
        Of the loss's shape; None stands for 1.
    backend : str, optional
        The kernel that the chunks must take.

    Returns
    -------
    loss, grad : dask array
        The gradient has the scores' chunks. Computed together, each chunk is visited once.
    """
    return _Graph(problem, backend).loss_and_grad(problem, grad_output)


class _Graph:
    """The arrays of a call in matching chunks, and the steps that lead to the result."""

    def __init__(self, problem: Problem, backend: str | None) -> None:
        x, axis = problem.input, problem.axis
        self.x, self.rows, self.all = x, rows_of(problem), tuple(range(x.ndim))
        self.target = aligned(problem, problem.target)
        weight = () if problem.weight is None else (whole(problem.weight), (x.ndim,))
        self.labels = (self.target, self.rows, *weight)
        self.start, self.first = starts(self.target), starts(x)
        self.call = Call(
            problem.p,
            problem.margin,
            axis,
            x.shape[axis],
            problem.reduction if self.rows else "none",
            problem.check_target,
            x.dtype,
            backend,
        )

    def loss(self) -> da.Array:
        if self.x.numblocks[self.call.axis] == 1:
            scores = (self.x, self.all, self.start, self.rows)
            return self._reduced(self._over(_rows_loss, self.rows, *scores, *self.labels))
        parts = self._over(_part, self.all, *self._with_own())
        return self._reduced(self._over(_parts_loss, self.rows, parts, self.all, *self.labels))

    def loss_and_grad(
        self, problem: Problem, grad_output: Array | None
    ) -> tuple[da.Array, da.Array]:
        upstream = self._upstream(problem, grad_output)
        if self.x.numblocks[self.call.axis] == 1:
            scores = (self.x, self.all, self.first, self.all)
            pair = self._over(_rows_pair, self.all, *scores, *upstream, *self.labels)
            losses = self._over(_first_of_pair, self.rows, pair, self.all)
            return self._reduced(losses), self._over(_second_of_pair, self.all, pair, self.all)
        parts = self._over(_part_pair, self.all, *self._with_own(), *upstream, *self.labels[2:])
        sums = self._over(_sums_of_parts, self.rows, parts, self.all)
        losses = self._over(_parts_loss, self.rows, sums, self.rows, *self.labels)
        grad = self._over(
            _complete_grad,
            self.all,
            *(parts, self.all, sums, self.rows),
            *(self.target, self.rows, self.first, self.all),
        )
        return self._reduced(losses), grad

    def _with_own(self) -> tuple[Any, ...]:
        """Arguments of a second pass: scores, their place, targets, and the targets' scores."""
        scores = (self.x, self.all, self.first, self.all, self.target, self.rows)
        found = self._over(_own_part, self.all, *scores)
        # All blocks of the row, as a list: their axis of classes is none of the result's.
        anywhere = tuple(-1 if i == self.call.axis else i for i in self.all)
        return (*scores, found, anywhere)

    def _upstream(self, problem: Problem, grad_output: Array | None) -> tuple[Any, ...]:
        """Arguments that hold what the gradient is multiplied with, besides ``call.scale``."""
        upstream = None if grad_output is None else da.asarray(grad_output)
        if grad_output is not None and self.call.reduction == "none":
            return aligned(problem, grad_output), self.rows
        if self.call.reduction == "mean":
            if unknown(self.target):
                count = (self.target == self.target).sum()
                upstream = (1.0 if upstream is None else upstream.astype(np.float64)) / count
            else:
                self.call = self.call._replace(scale=1 / (self.target.size or 1))
        return (None, None) if upstream is None else (upstream, ())

    def _over(self, function: Any, out: tuple[int, ...], *args: Any) -> da.Array:
        """Run a function of this file over matching blocks."""
        chunks = {i: self.x.chunks[i] for i in out}
        if not unknown(self.target):
            chunks |= dict(zip(self.rows, self.target.chunks, strict=True))
        return da.blockwise(
            partial(function, call=self.call),
            out,
            *args,
            adjust_chunks=chunks,
            concatenate=False,
            align_arrays=False,
            dtype=self.x.dtype,
            meta=da.utils.meta_from_array(self.x._meta, ndim=len(out), dtype=self.x.dtype),
        )

    def _reduced(self, losses: da.Array) -> da.Array:
        """Merge the sums that the blocks of ``losses`` are; or leave the losses as they are."""
        if self.call.reduction == "none":
            return losses
        return da.reduction(
            losses,
            chunk=_same,
            combine=_merged,
            aggregate=partial(_rounded, call=self.call, like=self.x._meta),
            concatenate=False,
            dtype=self.x.dtype,
            meta=da.utils.meta_from_array(self.x._meta, ndim=0, dtype=self.x.dtype),
        )


# Whole rows in a chunk.


def _rows_loss(scores: Any, start: Any, target: Array, weight: Any = None, *, call: Call) -> Any:
    block = scores[0] if isinstance(scores, list) else scores
    xp, target = _checked(block, target, start, call)
    how = _how(xp, weight, call)
    if _at_once(block, target, how):
        return _closed(sample_losses(block, target, **how), call)
    losses = xp.empty(target.shape, dtype=_computing(xp, block))
    for where, rows in _tiles(block.shape, call.axis):
        tile = xp.astype(block[where], losses.dtype, copy=False)
        losses[rows] = sample_losses(tile, target[rows], **how)
    return _closed(losses, call)


def _rows_pair(
    block: Array, start: Any, upstream: Any, target: Array, weight: Any = None, *, call: Call
) -> tuple[Any, Array]:
    xp, target = _checked(block, target, _without(start, call.axis), call)
    scale, how = _scale(xp, upstream, target, call), _how(xp, weight, call)
    if _at_once(block, target, how):
        losses, grad = _loss_and_grad(block, target, scale, how)
        return _closed(losses, call), grad
    losses, grad = xp.empty(target.shape, dtype=_computing(xp, block)), xp.empty_like(block)
    for where, rows in _tiles(block.shape, call.axis):
        tile = xp.astype(block[where], losses.dtype, copy=False)
        losses[rows], grad[where] = _loss_and_grad(tile, target[rows], scale[rows], how)
    return _closed(losses, call), grad


def _first_of_pair(pair: Any, *, call: Call) -> Any:  # noqa: ARG001
    return (pair[0] if isinstance(pair, list) else pair)[0]


def _second_of_pair(pair: Any, *, call: Call) -> Array:  # noqa: ARG001
    return pair[1]


# Classes in several chunks.


def _own_part(block: Array, start: Any, target: Array, *, call: Call) -> Array:
    """Return the targets' scores where this block holds them, else 0.

    The blocks of the first classes look after the targets out of range: NaN, or an error.
    """
    first = start[call.axis] == 0
    check_target = call.check_target if first else "nan"
    place = _without(start, call.axis)
    xp, target = _checked(block, target, place, call._replace(check_target=check_target))
    own = _own_scores(xp, block, start, target, call)
    if first and call.check_target == "nan":
        wide = xp.astype(target, xp.int64)
        own = xp.where((wide >= 0) & (wide < call.n_classes), own, math.nan)
    return own


def _own_scores(xp: Any, block: Array, start: Any, target: Array, call: Call) -> Array:
    dtype = _computing(xp, block)
    if not block.shape[call.axis]:
        return xp.zeros(target.shape, dtype=dtype)
    numba = _numba_scores(block, target, call)
    if numba is not None:
        from mml_arrayapi.backends import cpu_blocks

        return cpu_blocks.own_scores(numba, start[call.axis]).reshape(target.shape)
    inside, place = _place(xp, block, start, target, call)
    place = xp.expand_dims(xp.where(inside, place, 0), axis=call.axis)
    own = xp.squeeze(xp.take_along_axis(block, place, axis=call.axis), axis=call.axis)
    return xp.astype(xp.where(inside, own, 0), dtype)


def _part(block: Array, start: Any, target: Array, found: list[Array], *, call: Call) -> Array:
    """Return each row's sum over the classes of this block, but the target's."""
    xp, target = _namespace(block, target)
    own: Array = reduce(add, found)
    numba = _numba_scores(block, target, call)
    if numba is not None:
        from mml_arrayapi.backends import cpu_blocks

        own = np.ascontiguousarray(own)
        sums = cpu_blocks.part_sums(numba, start[call.axis], own.reshape(-1))
        return sums.reshape(target.shape)
    inside, place = _place(xp, block, start, target, call)
    how = _how(xp, None, call)
    sums = xp.empty(target.shape, dtype=xp.float64)
    for where, rows in _tiles(block.shape, call.axis):
        tile = _with_target(xp, block[where], own[rows], inside[rows], call.axis)
        sums[rows] = sample_losses(tile, place[rows], **how)
    return sums * (block.shape[call.axis] + 1)


def _numba_scores(block: Array, target: Array, call: Call) -> Any:
    """Return what the Numba kernels take, where they are chosen for this block; else None.

    They sum a part of the classes without a column for the target's score, whose appending took
    two thirds of the time.
    """
    how = _how(np, None, call)
    if not block.size or _kernel(block, target, how).name != "numpy-cpu":
        return None
    from mml_arrayapi.backends import cpu_blocks

    return cpu_blocks.scores(block, target, None, call.axis, call.p, call.margin)


def _part_pair(
    block: Array,
    start: Any,
    target: Array,
    found: list[Array],
    upstream: Any,
    weight: Any = None,
    *,
    call: Call,
) -> tuple[Array, Array, Array]:
    """Return each row's sum, its derivative by the target's score, and the block's gradient."""
    xp, target = _namespace(block, target)
    n, axis = block.shape[call.axis], call.axis
    sums, slopes = (xp.empty(target.shape, dtype=xp.float64) for _ in range(2))
    grad = xp.empty_like(block)
    own: Array = reduce(add, found)
    inside, place = _place(xp, block, start, target, call)
    scale = _scale(xp, upstream, target, call) * _factor(xp, target, weight, call) * (n + 1)
    how = _how(xp, None, call)
    for where, rows in _tiles(block.shape, axis):
        tile = _with_target(xp, block[where], own[rows], inside[rows], axis)
        sums[rows], slope = _loss_and_grad(tile, place[rows], scale[rows], how)
        column = xp.expand_dims(place[rows], axis=axis)
        by_own = xp.squeeze(xp.take_along_axis(slope, column, axis=axis), axis=axis)
        head = (slice(None),) * axis
        # What stands beside a target's score of minus infinity costs something, and isn't there.
        extra = slope[(*head, n)]
        slopes[rows] = by_own + xp.where(inside[rows] & xp.isfinite(extra), extra, 0)
        grad[where] = slope[(*head, slice(n))]
    return sums * (n + 1), slopes, grad


def _sums_of_parts(parts: list[Any], *, call: Call) -> tuple[Array, Array]:  # noqa: ARG001
    """Return each row's sum over all classes, and its derivative by the target's score."""
    return sum(p[0] for p in parts), sum(p[1] for p in parts)


def _complete_grad(part: Any, totals: Any, target: Array, start: Any, *, call: Call) -> Array:
    """Put the derivatives by the targets' scores into a block's gradient, and NaN into NaN rows."""
    (sums, slopes), grad = totals, part[2]
    xp, target = _namespace(grad, target)
    inside, place = _place(xp, grad, start, target, call)
    place = xp.where(inside, place, -1)
    n, axis = grad.shape[call.axis], call.axis
    classes = xp.reshape(xp.arange(n), tuple(n if i == axis else 1 for i in range(grad.ndim)))
    made = xp.empty_like(grad)
    for where, rows in _tiles(grad.shape, axis):
        own = classes == xp.expand_dims(place[rows], axis=axis)
        slope = xp.astype(xp.expand_dims(slopes[rows], axis=axis), grad.dtype)
        lost = xp.expand_dims(xp.isnan(sums[rows]), axis=axis)
        made[where] = xp.where(lost, math.nan, xp.where(own, slope, grad[where]))
    return made


def _parts_loss(parts: Any, target: Array, weight: Any = None, *, call: Call) -> Any:
    """Return the losses from each row's sums: blocks of them, or a pair that begins with them."""
    sums = parts[0] if isinstance(parts, tuple) else reduce(add, parts)
    xp, target = _namespace(sums, target)
    losses = sums * _factor(xp, target, weight, call)
    return _closed(xp.astype(losses, xp.float64 if call.dtype == xp.float64 else xp.float32), call)


def _with_target(xp: Any, tile: Array, own: Array, inside: Array, axis: int) -> Array:
    """Append a column: the target's score, or where the tile has that already, what costs nothing.

    That is minus infinity, but for a target's score of minus infinity, from which it would be
    no distance: any finite score then gives the infinite loss that the sample has anyway.
    """
    nothing = xp.where(own == -math.inf, 0.0, -math.inf)
    column = xp.astype(xp.where(inside, nothing, own), own.dtype)
    tile = xp.astype(tile, own.dtype, copy=False)
    return xp.concat([tile, xp.expand_dims(column, axis=axis)], axis=axis)


def _place(xp: Any, block: Array, start: Any, target: Array, call: Call) -> tuple[Array, Array]:
    """Tell which targets are in this block, and where; those that aren't are one past its end."""
    n, first = block.shape[call.axis], start[call.axis]
    target = xp.astype(target, xp.int64)  # what is too large turns negative, and is in no block
    inside = (target >= first) & (target < first + n)
    return inside, xp.where(inside, target - first, n)


def _factor(xp: Any, target: Array, weight: Any, call: Call) -> Any:
    """Return weight[y] / C."""
    if weight is None:
        return 1 / call.n_classes
    weight = xp.astype(xp.asarray(weight[0]), xp.float64)
    known = xp.clip(xp.astype(target, xp.int64), 0, call.n_classes - 1)
    return xp.reshape(xp.take(weight, xp.reshape(known, (-1,))), target.shape) / call.n_classes


# What both have in common.


def _namespace(block: Array, target: Array) -> tuple[Any, Array]:
    """Return the block's namespace, and the targets in it (NumPy's, beside chunks on a GPU)."""
    xp = library_of("input", block).namespace
    return xp, xp.asarray(target)


def _checked(block: Array, target: Array, start: Any, call: Call) -> tuple[Any, Array]:
    check_length(_without(block.shape, call.axis), target)
    xp, target = _namespace(block, target)
    check_targets(target, start, call.n_classes, call.check_target)
    return xp, target


def _without(values: Any, axis: int) -> tuple[Any, ...]:
    return (*values[:axis], *values[axis + 1 :])


def _computing(xp: Any, block: Array) -> Any:
    return xp.float64 if block.dtype == xp.float64 else xp.float32


def _how(xp: Any, weight: Any, call: Call) -> dict[str, Any]:
    """Return the keywords of a tile's call. The targets have been checked by then."""
    return {
        "p": call.p,
        "margin": call.margin,
        "weight": None if weight is None else xp.asarray(weight[0]),
        "axis": call.axis,
        "check_target": "nan",
        "backend": call.backend,
    }


def _kernel(tile: Array, target: Array, how: dict[str, Any]) -> Kernel:
    return choose(_problem(tile, target, how), how["backend"])


def _problem(tile: Array, target: Array, how: dict[str, Any]) -> Problem:
    options = Options(how["p"], how["margin"], "none", None, how["axis"], how["check_target"])
    return check_arrays(tile, target, how["weight"], options)


def _loss_and_grad(
    tile: Array, target: Array, scale: Array, how: dict[str, Any]
) -> tuple[Array, Array]:
    kernel = _kernel(tile, target, how)
    return kernel.loss_and_grad(_problem(tile, target, how), scale)


def _at_once(block: Array, target: Array, how: dict[str, Any]) -> bool:
    """Tell whether a chunk needs no tiles: neither kernel nor widening make temporaries."""
    if block.dtype.itemsize < 4 or not block.size:
        return False
    return _kernel(block, target, how) is not GENERIC


def _tiles(shape: tuple[int, ...], axis: int) -> Iterator[tuple[Any, Any]]:
    """Yield the indices of tiles: into the scores, and into what has one element per sample."""
    batch = [i for i in range(len(shape)) if i != axis]
    if not batch:
        yield ..., ...  # an empty tuple would turn 0-d arrays into scalars
        return
    longest = max(batch, key=lambda i: shape[i])
    per_row = max(1, math.prod(shape) // max(1, shape[longest]))
    step = max(1, TILE // per_row)
    for at in range(0, shape[longest], step):
        part = slice(at, at + step)
        where = (*(slice(None),) * longest, part)
        yield where, where if longest < axis else where[1:]


def _scale(xp: Any, upstream: Any, target: Array, call: Call) -> Array:
    """Return what each sample's gradient is multiplied with."""
    scale = xp.asarray(1.0 if upstream is None else upstream, dtype=xp.float64) * call.scale
    return xp.broadcast_to(scale, target.shape)


def _closed(losses: Array, call: Call) -> Any:
    """Return the losses of a chunk in the scores' dtype, or their exact sum."""
    library = library_of("input", losses)
    if call.reduction != "none":
        total = ExactSum()
        total.add(np.asarray(library.on_host(losses)))
        return total
    with np.errstate(over="ignore"):
        return library.namespace.astype(losses, call.dtype)


def _same(total: ExactSum, axis: Any, keepdims: bool) -> ExactSum:  # noqa: ARG001
    return total


def _merged(totals: Any, axis: Any, keepdims: bool) -> ExactSum:  # noqa: ARG001
    """Merge nested lists of sums into a new one: tasks don't change what they are given."""
    made = ExactSum()
    pending = [totals]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending += one
        else:
            made.merge(one)
    return made


def _rounded(totals: Any, axis: Any, keepdims: bool, *, call: Call, like: Array) -> Array:
    total = _merged(totals, axis, keepdims)
    xp = library_of("input", like).namespace
    with np.errstate(over="ignore"):
        value = np.float64(total.over(total.count if call.reduction == "mean" else 1))
        return xp.asarray(value.astype(call.dtype))


def _refuses(problem: Problem) -> str | None:
    library = library_of("input", problem.input._meta).name
    if library in CHUNKS_OF:
        return None
    return f"chunks are of {library}, and only chunks of {' and '.join(CHUNKS_OF)} are taken"


def _on_chunks(problem: Problem, name: str, library: str) -> Kernel | None:
    """Return this kernel, made to take the named one on every chunk; None if that can't be."""
    if library_of("input", problem.input._meta).name != library:
        return None
    return replace(
        KERNEL, loss=partial(loss, backend=name), loss_and_grad=partial(loss_and_grad, backend=name)
    )


KERNEL = Kernel(
    name="dask-blocks",
    library="dask",
    refuses=_refuses,
    loss=loss,
    loss_and_grad=loss_and_grad,
    on_chunks=_on_chunks,
)
