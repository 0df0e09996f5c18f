"""Dask: what runs in the tasks of a call, on chunks that may have come over a network.

Arguments: blocks of arrays, or a list of them along an axis that the result doesn't have;
``place`` is a block's place in the whole array, one slice for each axis. Tasks don't change what
they are given.

The same chunk gives the same bits wherever it is computed. A chunk that travelled may lie at any
address (two thirds of those a client scatters do) and in another order of memory, so neither may
decide which kernel runs or how it adds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mml_arrayapi.backends.dask.alignment import (
    TaskOptions,
    check_factors,
    check_float,
    check_kind,
    check_length,
    check_sizes,
    check_targets,
    ignored,
    without,
)
from mml_arrayapi.backends.dask.report import Ran, ran, warn_of_mixture
from mml_arrayapi.exact_sum import ExactSum
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.registry import GENERIC, choose, run_on
from mml_arrayapi.validation import check_arrays

Array = Any

# Scores per tile: 4 MB of float32. The generic implementation is as fast from 2**17 to 2**21 and
# needs about six tiles of memory.
TILE = 2**20
LARGEST = float(np.finfo(np.float32).max)
TINY = 2.0**-100
# For every task: what overflows or underflows in a dtype is as it should be.
QUIETLY = np.errstate(all="ignore")


class Call(NamedTuple):
    """What the tasks of a call need to know besides their blocks."""

    options: TaskOptions
    n_classes: int
    dtype: Any  # the scores'
    backend: str | None  # the kernel that the chunks must take
    sizes: tuple[int, ...]  # how many classes each chunk has

    @property
    def axis(self) -> int:
        """Where the classes are."""
        return self.options.axis

    @property
    def unit(self) -> float:
        """What keeps a sum over the classes finite if their mean is: a power of 2, so exact."""
        return 2.0 ** -math.frexp(self.n_classes)[1]

    @property
    def parts(self) -> list[slice]:
        """Which classes each chunk has."""
        stops = itertools.accumulate(self.sizes)
        return [slice(stop - n, stop) for n, stop in zip(self.sizes, stops, strict=True)]

    @property
    def indices(self) -> list[tuple[slice, ...]]:
        """Where the classes of each chunk are in a block of whole rows."""
        return [(*(slice(None),) * self.axis, part) for part in self.parts]


class Rows(NamedTuple):
    """The losses of a block of rows, in the computing precision."""

    losses: Array  # 0 for ignored rows
    n_ignored: int
    ran: frozenset[Ran]
    slopes: Array | None = None  # as in Part, of all classes; NaN where the loss is
    beyond: int = 0  # the exact sum of weighted losses beyond their dtype, in ExactSum's units


class Part(NamedTuple):
    """What a part of the classes adds to its rows, in float64."""

    sums: Array  # of max(0, z) ** p, divided by the number of all classes
    slopes: Array | None  # of p * max(0, z) ** (p - 1), times Call.unit
    ran: frozenset[Ran]


class Sum(NamedTuple):
    """The losses of some samples, added up."""

    total: ExactSum
    ran: frozenset[Ran]


# Whole rows in a chunk, or in several that one task takes together.


@QUIETLY
def loss_of_rows(
    block: Array, place: Any, target: Array, weight: Array | None, *, call: Call
) -> Array | Sum:
    """Return the losses of a block, or their sum."""
    target = _checked(block, target, place, call)
    return close(_run([block], target, weight, call)[0], call=call)


@QUIETLY
def loss_of_joined_rows(
    blocks: list[Array], rows: Any, target: Array, weight: Any, *, call: Call
) -> Array | Sum:
    """Return the losses of the rows that these blocks hold together, or their sum.

    ``rows`` is their place without the classes' axis.
    """
    target = _checked_together(blocks, target, rows, call)
    return close(_run(blocks, target, weight and weight[0], call)[0], call=call)


@QUIETLY
def loss_and_grad_of_rows(
    block: Array,
    place: Any,
    target: Array,
    upstream: Any,
    share: Any,
    weight: Array | None,
    *,
    call: Call,
) -> tuple[Array | Sum, Array]:
    """Return what :func:`loss_of_rows` does, and the gradient."""
    target = _checked(block, target, place, call)
    scale = _scale(block, target, upstream, share, call)
    rows, (grad,) = _run([block], target, weight, call, scale)
    return close(rows, call=call), _as_declared(grad, call)


@QUIETLY
def loss_and_grad_of_joined_rows(
    blocks: list[Array],
    rows: Any,
    target: Array,
    upstream: Any,
    share: Any,
    weight: Any,
    *,
    call: Call,
) -> tuple[Array | Sum, list[Array]]:
    """Return what :func:`loss_of_joined_rows` does, and each block's gradient."""
    target = _checked_together(blocks, target, rows, call)
    scale = _scale(blocks[0], target, upstream, share, call)
    losses, grads = _run(blocks, target, weight and weight[0], call, scale)
    return close(losses, call=call), [_as_declared(grad, call) for grad in grads]


def of_part(pair: list[Any], place: Any, *, call: Call) -> Array:
    """Return a block's gradient of those of the whole rows."""
    return pair[0][1][call.parts.index(place[call.axis])]


def first(pair: Any, *, call: Call) -> Any:  # noqa: ARG001
    """Return the first of two."""
    return pair[0]


def second(pair: Any, *, call: Call) -> Array:  # noqa: ARG001
    """Return the second of two."""
    return pair[1]


def only(blocks: list[Array], *, call: Call) -> Array:  # noqa: ARG001
    """Return the only block of a list."""
    return blocks[0]


def _run(
    blocks: list[Array],
    target: Array,
    weight: Array | None,
    call: Call,
    scale: Array | None = None,
) -> tuple[Rows, list[Array]]:
    """Return the losses of rows; with a scale, their gradients too."""
    rows, grads = _run_kernel(blocks, target, weight, call, scale)
    xp = library_of("input", blocks[0]).namespace
    if weight is not None and call.options.reduction != "none" and xp.isinf(rows.losses).any():
        plain = _run_kernel(blocks, target, None, call)[0].losses
        rows = _without_large(rows, plain, _weights(xp, xp.asarray(target), weight, call))
    return rows, grads


def _without_large(rows: Rows, plain: Array, weights: Array) -> Rows:
    """Add up exactly what only the weight makes infinite: the sum of all may be finite."""
    library = library_of("input", plain)
    xp = library.namespace
    large = xp.isinf(rows.losses) & xp.isfinite(plain) & xp.isfinite(weights)
    if not large.any():
        return rows
    total = ExactSum()
    total.add_weighted(*(np.asarray(library.on_host(one[large])) for one in (plain, weights)))
    return rows._replace(losses=xp.where(large, 0, rows.losses), beyond=total.total)


def _run_kernel(
    blocks: list[Array],
    target: Array,
    weight: Array | None,
    call: Call,
    scale: Array | None = None,
) -> tuple[Rows, list[Array]]:
    """Run the kernel that is chosen for a call on rows; with a scale, for their gradients too.

    A kernel takes a block of whole rows as it is. Of blocks of some classes each, the CPU kernel
    puts rows together itself for the loss alone. All else goes through the kernel in tiles, and so
    does what makes temporaries: the generic implementation, and 16-bit scores, whose losses must
    not be rounded one by one.
    """
    xp = library_of("input", blocks[0]).namespace
    dtype = max((_computing(xp, block) for block in blocks), key=lambda one: xp.finfo(one).bits)
    n_ignored = _count(ignored(target, call.options.ignore_index))
    weight = None if weight is None else xp.asarray(weight)
    if len(blocks) == 1 and blocks[0].dtype == dtype:
        problem, kernel = _chosen(blocks[0], target, weight, call)
        if kernel is not GENERIC:
            made, name = _by(kernel, problem, call, scale)
            losses, grads = (made, []) if scale is None else (made[0], [made[1]])
            return Rows(losses, n_ignored, ran(name)), grads
    if scale is None and (found := _losses_of_pieces(blocks, target, weight, call)) is not None:
        return Rows(found, n_ignored, ran(NATIVE)), []
    losses, parts = xp.empty(target.shape, dtype=dtype), call.indices
    grads = [] if scale is None else [xp.empty_like(block) for block in blocks]
    name = GENERIC.name
    for where, rows, tile in _joined_tiles(xp, blocks, dtype, call):
        problem, kernel = _chosen(tile, target[rows], weight, call)
        if scale is None:
            losses[rows], name = _by(kernel, problem, call)
            continue
        (losses[rows], made), name = _by(kernel, problem, call, scale[rows])
        for grad, part in zip(grads, parts, strict=True):
            grad[where] = made[part]
    return Rows(losses, n_ignored, ran(name)), grads


def _losses_of_pieces(
    blocks: list[Array], target: Array, weight: Array | None, call: Call
) -> Array | None:
    """Have the CPU kernel read rows from blocks of some classes each; None where it can't.

    From four blocks it takes 1.6 times as long as from one; tiles that are copied take 2.7 times.
    """
    dtypes = {np.dtype(np.float32), np.dtype(np.float64)}
    if len(blocks) == 1 or not all(_is_numpy(one) and one.dtype in dtypes for one in blocks):
        return None
    whole = np.empty(_of_whole_rows(blocks[0], call), blocks[0].dtype)
    problem, kernel = _chosen(whole, target, weight, call)
    if kernel.name != NATIVE:
        return None
    from mml_arrayapi.backends import cpu

    losses = np.empty(target.shape, whole.dtype)
    arrays = tuple(blocks), problem.target, problem.weight
    found: Array | None = cpu.native.loss(*arrays, problem.options(), losses)
    return found


def _joined_tiles(
    xp: Any, blocks: list[Array], dtype: Any, call: Call
) -> Iterator[tuple[Any, Any, Array]]:
    """Yield what :func:`_tiles` does, and the scores there, of all classes."""
    room, parts = None, call.indices
    for where, rows in _tiles(_of_whole_rows(blocks[0], call), call.axis):
        pieces = [block[where] for block in blocks]
        if len(pieces) == 1:
            yield where, rows, xp.astype(pieces[0], dtype, copy=False)
            continue
        shape = _of_whole_rows(pieces[0], call)
        if room is None:  # the first tile is the largest; fresh memory for each takes longer
            room = xp.empty(shape, dtype=dtype)
        tile = room[tuple(map(slice, shape))]
        for piece, part in zip(pieces, parts, strict=True):
            tile[part] = piece
        yield where, rows, tile


def _of_whole_rows(block: Array, call: Call) -> tuple[int, ...]:
    """Return the shape of a block with all classes."""
    return (*block.shape[: call.axis], call.n_classes, *block.shape[call.axis + 1 :])


def _chosen(
    block: Array, target: Array, weight: Array | None, call: Call
) -> tuple[Problem, Kernel]:
    """Return the call on a block, and the kernel that is chosen for it."""
    # The targets have been looked at.
    options = call.options._replace(reduction="none", check_target="nan")
    problem = check_arrays(block, target, weight, options)
    block = _in_order(block)
    if not _is_numpy(block) or block.flags.aligned:
        problem = problem._replace(input=block)
        return problem, choose(problem, call.backend)
    # The kernel is chosen for an aligned block; it gets this one if it takes it, else a copy.
    kernel = choose(problem._replace(input=np.empty_like(block)), call.backend)
    problem = problem._replace(input=block)
    if kernel is GENERIC or kernel.refuses(problem) is not None:
        problem = problem._replace(input=block.copy(order="K"))
    return problem, kernel


def _by(
    kernel: Kernel, problem: Problem, call: Call, scale: Array | None = None
) -> tuple[Any, str]:
    """Run a problem on a kernel; return the result, and the name of the kernel that ran.

    With a scale, the result is the losses and the gradient.
    """
    operation = "loss" if scale is None else "loss_and_grad"
    return run_on(kernel, problem, call.backend, operation, *(() if scale is None else (scale,)))


def _in_order(block: Array) -> Array:
    """Return a block in an order of memory that survives a journey.

    Pickling, and Dask's serialization, keep the order of contiguous arrays and make others
    C-contiguous. Left as they are: rows that follow one another at any distance.
    """
    if not _is_numpy(block) or block.flags.f_contiguous or _in_c_order(block):
        return block
    return block.copy(order="C")


def _in_c_order(block: np.ndarray) -> bool:
    extent = block.itemsize
    for i in reversed([i for i, n in enumerate(block.shape) if n > 1]):
        stride = block.strides[i]
        if stride < extent or (i == block.ndim - 1 and stride != extent):
            return False
        extent = stride * block.shape[i]
    return True


# Classes in several chunks. The CPU kernels have functions for that. Any other kernel can add up
# a part of the classes if the target's score is appended to it as one class more.


@QUIETLY
def own_scores(block: Array, place: Any, target: Array, *, call: Call) -> Array:
    """Return the targets' scores where this block holds them, else 0.

    The blocks of the first classes look after the targets out of range: NaN, or an error.
    """
    at = place[call.axis].start
    target = _checked(block, target, place, call, raises=at == 0)
    xp = library_of("input", block).namespace
    own = _own_scores(xp, block, at, target, call)
    if at == 0 and call.options.check_target == "nan":
        wide = xp.astype(target, xp.int64)
        own = xp.where((wide >= 0) & (wide < call.n_classes), own, math.nan)
    return own


def _own_scores(xp: Any, block: Array, at: int, target: Array, call: Call) -> Array:
    dtype = _computing(xp, block)
    if not block.shape[call.axis]:
        return xp.zeros(target.shape, dtype=dtype)
    native, options = _native(block, target, call)
    if native is not None:
        own = native.own_scores(block, target, options, at, np.empty(target.shape, dtype))
        if own is not None:
            return own
    inside, column = _column(xp, block.shape[call.axis], at, target)
    column = xp.expand_dims(xp.where(inside, column, 0), axis=call.axis)
    own = xp.squeeze(xp.take_along_axis(block, column, axis=call.axis), axis=call.axis)
    return xp.astype(xp.where(inside, own, 0), dtype)


@QUIETLY
def part_of_rows(
    block: Array, place: Any, target: Array, found: list[Array], *, call: Call, slopes: bool
) -> Part:
    """Return what the classes of this block, but the target's, add to each row."""
    xp, target = _namespace(block, target)
    own, at = _added(found), place[call.axis].start
    native, options = _native(block, target, call)
    if native is not None:
        sums, of_slopes = np.empty(target.shape), np.empty(target.shape) if slopes else None
        if native.part_sums(block, target, options, at, own, sums, of_slopes) is not None:
            of_slopes = None if of_slopes is None else of_slopes * call.unit
            part = Part(sums / call.n_classes, of_slopes, ran(NATIVE))
            return _redone(part, block, at, target, own, call)
    return _part_of_rows(xp, block, at, target, own, call, slopes)


def _redone(part: Part, block: Array, at: int, target: Array, own: Array, call: Call) -> Part:
    """Add up in another way what was too large to be divided afterwards."""
    large = np.isinf(part.sums)
    if part.slopes is not None:
        large = large | np.isinf(part.slopes)
    if large.any():
        rows = np.moveaxis(block, call.axis, -1)[large]
        call = call._replace(options=call.options._replace(axis=1))
        slopes = part.slopes is not None
        again = _part_of_rows(np, rows, at, target[large], own[large], call, slopes)
        part.sums[large] = again.sums
        if part.slopes is not None:
            part.slopes[large] = again.slopes
    return part


def _part_of_rows(
    xp: Any, block: Array, at: int, target: Array, own: Array, call: Call, slopes: bool
) -> Part:
    """Do it with any kernel. It divides by the number of its classes, so nothing overflows."""
    if _margin_is_infinite(call):
        part = _part_beside_infinity(xp, block, at, target, own, call)
        return part if slopes else part._replace(slopes=None)
    n, axis = block.shape[call.axis] + 1, call.axis
    inside, column = _column(xp, block.shape[call.axis], at, target)
    sums = xp.empty(target.shape, dtype=xp.float64)
    of_slopes = xp.empty(target.shape, dtype=xp.float64) if slopes else None
    name = GENERIC.name
    for where, rows in _tiles(block.shape, axis):
        few = block[where], target[rows], column[rows], own[rows], inside[rows]
        problem, kernel = _with_own_class(xp, *few, call)
        if of_slopes is None:
            sums[rows], name = _by(kernel, problem, call)
            continue
        (sums[rows], grad), name = _by(kernel, problem, call, xp.ones_like(sums[rows]))
        place = xp.expand_dims(column[rows], axis=axis)
        by_own = xp.squeeze(xp.take_along_axis(grad, place, axis=axis), axis=axis)
        # What stands beside a target's score of minus infinity costs something, and isn't there.
        extra = grad[(*(slice(None),) * axis, n - 1)]
        by_own = by_own + xp.where(inside[rows] & xp.isfinite(extra), extra, 0)
        of_slopes[rows] = xp.astype(-by_own, xp.float64) * (n * call.unit)
    return Part(sums * (n / call.n_classes), of_slopes, ran(name))


def _part_beside_infinity(
    xp: Any, block: Array, at: int, target: Array, own: Array, call: Call
) -> Part:
    costs = _costs_beside_infinity(xp, block, at, target, own, call)
    count = xp.sum(xp.astype(costs > 0, xp.float64), axis=call.axis)
    slopes = count * (call.unit if call.options.p == 1 else math.inf)
    slopes = xp.where(count == 0, 0.0, slopes)
    return Part(xp.sum(xp.astype(costs, xp.float64), axis=call.axis), slopes, ran(GENERIC.name))


def _costs_beside_infinity(
    xp: Any, block: Array, at: int, target: Array, own: Array, call: Call
) -> Array:
    """Return what each class costs where the margin is infinite in the scores' dtype.

    That is infinity or 0, and NaN beside a distance of the other infinity. It needs no kernel: what
    :func:`_with_own_class` appends would cost something. Finite scores are at no infinite distance,
    even if it is more than the dtype can hold.
    """
    axis, margin = call.axis, call.options.margin
    _, column = _column(xp, block.shape[axis], at, target)
    tile = xp.astype(block, own.dtype, copy=False) * TINY
    z = (tile - xp.expand_dims(own, axis=axis) * TINY) + math.copysign(math.inf, margin)
    z = xp.where(_is_own(xp, block, column, axis) & ~xp.isnan(tile), 0.0, z)
    return xp.where(z <= 0, 0.0, z)


@QUIETLY
def rows_of_parts(parts: list[Part], target: Array, weight: Any, *, call: Call) -> Rows:
    """Add up the parts of the rows."""
    sums = _added([part.sums for part in parts])
    xp, target = _namespace(sums, target)
    lost = ignored(target, call.options.ignore_index)
    weights = _weights(xp, target, weight and weight[0], call)
    losses = sums * weights
    if lost is not None:
        losses = xp.where(lost, 0.0, losses)
    losses = xp.astype(losses, xp.float64 if call.dtype == xp.float64 else xp.float32)
    slopes = None
    if parts[0].slopes is not None:
        slopes = _added([part.slopes for part in parts])
        slopes = xp.where(xp.isnan(losses), math.nan, slopes)
    everyone = frozenset[Ran]().union(*(part.ran for part in parts))
    rows = Rows(losses, _count(lost), everyone, slopes)
    if weight is not None and call.options.reduction != "none":
        rows = _without_large(rows, sums, weights)
    return rows


@QUIETLY
def grad_of_part(
    block: Array,
    place: Any,
    target: Array,
    found: list[Array],
    rows: Rows,
    upstream: Any,
    share: Any,
    weight: Array | None,
    *,
    call: Call,
) -> Array:
    """Return the gradient by the scores of this block."""
    xp, target = _namespace(block, target)
    own, at = _added(found), place[call.axis].start
    scale = _scale(block, target, upstream, share, call) * _weights(xp, target, weight, call)
    of_rows = own, rows.slopes, scale / call.n_classes
    grad = _native_grad_of_part(block, at, target, of_rows, call)
    if grad is None:
        grad = _grad_of_part(xp, block, at, target, of_rows, call)
    return _as_declared(grad, call)


def _native_grad_of_part(
    block: Array, at: int, target: Array, of_rows: tuple[Array, Any, Array], call: Call
) -> Array | None:
    """Do it with the CPU kernels, where these are chosen; they want slopes in units of 1."""
    native, options = _native(block, target, call)
    if native is None:
        return None
    own, scaled, scale = of_rows
    slopes = scaled / call.unit
    if (np.isinf(slopes) & np.isfinite(scaled)).any():
        return None
    of_rows = own, slopes, scale
    grad: Array | None
    grad = native.part_grad(block, target, options, at, of_rows, np.empty_like(block))
    return grad


def _grad_of_part(
    xp: Any, block: Array, at: int, target: Array, of_rows: tuple[Array, Any, Array], call: Call
) -> Array:
    """Do it with any kernel, which sees one class more, by whose number it divides."""
    n, axis, (own, slopes, scale) = block.shape[call.axis], call.axis, of_rows
    lost = ignored(target, call.options.ignore_index)
    inside, column = _column(xp, block.shape[call.axis], at, target)
    grad = xp.empty_like(block)
    for where, rows in _tiles(block.shape, axis):
        few = block[where], target[rows], column[rows], own[rows], inside[rows]
        if _margin_is_infinite(call):
            costs = _costs_beside_infinity(xp, few[0], at, few[1], few[3], call)
            factor = xp.expand_dims(scale[rows], axis=axis)
            factor = xp.astype(factor * (1 if call.options.p == 1 else math.inf), own.dtype)
            made = xp.where(costs > 0, factor, 0.0)
        else:
            problem, kernel = _with_own_class(xp, *few, call)
            (_, made), _ = _by(kernel, problem, call, scale[rows] * (n + 1))
            made = made[(*(slice(None),) * axis, slice(n))]
        is_own = _is_own(xp, few[0], few[2], axis)
        by_own = -slopes[rows] * (scale[rows] / call.unit)
        # No class is active: 0, even where the factor is infinite.
        by_own = xp.where((slopes[rows] == 0) & ~xp.isnan(scale[rows]), 0.0, by_own)
        by_own = xp.expand_dims(xp.astype(by_own, made.dtype), axis=axis)
        # A row of NaN slopes is one of NaN.
        made = xp.where(is_own | xp.isnan(by_own), by_own, made)
        if lost is not None:  # slopes and factors of ignored rows may be infinite, and 0 times that
            made = xp.where(xp.expand_dims(lost[rows], axis=axis), 0.0, made)
        grad[where] = made
    return grad


NATIVE = "numpy-cpu"


def _native(block: Array, target: Array, call: Call) -> tuple[Any, tuple[Any, ...]]:
    """Return the CPU kernels where they are chosen for a block and one class more, else None."""
    options = tuple(call.options._replace(check_target="nan"))
    if not _is_numpy(block) or not block.size:
        return None, options
    shape = tuple(n + (i == call.axis) for i, n in enumerate(block.shape))
    if _chosen(np.empty(shape, block.dtype), target, None, call)[1].name != NATIVE:
        return None, options
    from mml_arrayapi.backends import cpu

    return cpu.native, options


def _with_own_class(
    xp: Any, tile: Array, target: Array, column: Array, own: Array, inside: Array, call: Call
) -> tuple[Problem, Kernel]:
    """Append the target's score; where the tile has it already, what costs nothing.

    That is minus infinity, but for a target's score of minus infinity, from which it would be
    no distance: any finite score then gives the infinite loss that the sample has anyway.
    """
    options, tile = call.options, xp.astype(tile, own.dtype, copy=False)
    if call.n_classes == 1:  # minus infinity is as good a score as any, and so is infinity
        tile, own = (xp.where(xp.isnan(x), x, xp.zeros_like(x)) for x in (tile, own))
    nothing = xp.where(own == -math.inf, 0.0, -math.inf)
    last = xp.expand_dims(xp.astype(xp.where(inside, nothing, own), own.dtype), axis=call.axis)
    tile = xp.concat([tile, last], axis=call.axis)
    lost = ignored(target, call.options.ignore_index)
    if lost is not None:
        column = xp.where(lost, -1, column)
        options = options._replace(ignore_index=-1)
    return _chosen(tile, column, None, call._replace(options=options))


def _margin_is_infinite(call: Call) -> bool:
    return bool(call.dtype != np.float64 and abs(call.options.margin) > LARGEST)


def _column(xp: Any, n: int, at: int, target: Array) -> tuple[Array, Array]:
    """Tell which targets are in a block of n classes, and where; others are one past its end."""
    target = xp.astype(target, xp.int64)  # what is too large turns negative, and is in no block
    inside = (target >= at) & (target < at + n)
    return inside, xp.where(inside, target - at, n)


def _is_own(xp: Any, block: Array, column: Array, axis: int) -> Array:
    """Tell which scores of a block are those of the targets' classes."""
    n = block.shape[axis]
    classes = xp.reshape(xp.arange(n), tuple(n if i == axis else 1 for i in range(block.ndim)))
    return classes == xp.expand_dims(column, axis=axis)


def _weights(xp: Any, target: Array, weight: Array | None, call: Call) -> Any:
    """Return each target's weight, in float64; any number for targets out of range."""
    if weight is None:
        return 1.0
    check_factors("weight", weight, (call.n_classes,))
    known = xp.clip(xp.astype(target, xp.int64), 0, call.n_classes - 1)
    taken = xp.take(xp.asarray(weight), xp.reshape(known, (-1,)))
    taken = xp.astype(taken, xp.float64 if call.dtype == xp.float64 else xp.float32)
    return xp.astype(xp.reshape(taken, target.shape), xp.float64)


# What all have in common.


def _is_numpy(block: Array) -> bool:
    return library_of("input", block).name == "numpy"


def _added(arrays: list[Array]) -> Array:
    """Add up arrays, in a new one."""
    total = arrays[0] + 0
    for array in arrays[1:]:
        total += array
    return total


def _namespace(block: Array, target: Array) -> tuple[Any, Array]:
    """Return the block's namespace, and the targets in it (NumPy's, beside chunks on a GPU)."""
    xp = library_of("input", block).namespace
    return xp, xp.asarray(target)


def _checked(block: Array, target: Array, place: Any, call: Call, raises: bool = True) -> Array:
    """Return the targets of a block in its library, once they have been looked at."""
    for name, array in (("input", block), ("target", target)):
        check_kind(name, array)
    check_sizes(block, place)
    check_length(without(block.shape, call.axis), target)
    check_float("input", block)
    _, target = _namespace(block, target)
    if raises:
        check_targets(target, without(place, call.axis), call.n_classes, call.options)
    return target


def _checked_together(blocks: list[Array], target: Array, rows: Any, call: Call) -> Array:
    """Do what :func:`_checked` does, for blocks that hold rows together."""
    axis = call.axis
    for block, part in zip(blocks, call.parts, strict=True):
        place = (*rows[:axis], part, *rows[axis:])
        target = _checked(block, target, place, call, raises=not part.start)
    return target


def _as_declared(grad: Array, call: Call) -> Array:
    """Return a gradient in the dtype that Dask was told, which chunks of scores need not have."""
    return library_of("input", grad).namespace.astype(grad, call.dtype, copy=False)


def _computing(xp: Any, block: Array) -> Any:
    return xp.float64 if block.dtype == xp.float64 else xp.float32


def _count(where: Array | None) -> int:
    return 0 if where is None else int(where.sum())


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


def _scale(block: Array, target: Array, upstream: Any, share: Any, call: Call) -> Array:
    """Return what each sample's gradient is multiplied with."""
    if upstream is not None:
        whole = call.options.reduction != "none"
        check_factors("grad_output", upstream, () if whole else tuple(target.shape))
    xp = library_of("input", block).namespace
    scale = xp.asarray(1.0 if upstream is None else upstream, dtype=xp.float64) * float(share)
    return xp.broadcast_to(scale, target.shape)


def number_of_rows(target: Array, *, call: Call) -> int:
    """Return how many samples of a block are not ignored."""
    return int(math.prod(target.shape) - _count(ignored(target, call.options.ignore_index)))


def added(counts: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
    """Add nested lists of counts."""
    if computing_meta or not isinstance(counts, list):
        return counts
    return sum(added(count, axis, keepdims) for count in counts)


def share(counts: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:
    """Return each sample's share in the mean; of none, no gradient counts."""
    if computing_meta:
        return np.empty(())
    return np.float64(1 / max(1, added(counts, axis, keepdims)))


@QUIETLY
def close(rows: Rows, *, call: Call) -> Array | Sum:
    """Return the losses of a block in the scores' dtype, or their exact sum."""
    library = library_of("input", rows.losses)
    if call.options.reduction != "none":
        total = ExactSum()
        total.add(np.asarray(library.on_host(rows.losses)))
        total.count -= rows.n_ignored
        total.total += rows.beyond
        return Sum(total, rows.ran)
    return library.namespace.astype(rows.losses, call.dtype)


def merged(sums: Any, axis: Any, keepdims: bool, computing_meta: bool = False) -> Any:  # noqa: ARG001
    """Merge nested lists of sums into a new one."""
    if computing_meta:
        return sums
    total, everyone, pending = ExactSum(), frozenset[Ran](), [sums]
    while pending:
        one = pending.pop()
        if isinstance(one, list):
            pending += one
        else:
            total.merge(one.total)
            everyone |= one.ran
    return Sum(total, everyone)


@QUIETLY
def rounded(
    sums: Any, axis: Any, keepdims: bool, computing_meta: bool = False, *, call: Call, like: Array
) -> Array:
    """Return the sum or the mean of all samples as an array of the scores' dtype."""
    if computing_meta:
        return like
    total, everyone = merged(sums, axis, keepdims)
    warn_of_mixture(everyone)
    xp = library_of("input", like).namespace
    mean = call.options.reduction == "mean"
    value = np.float64(total.over(total.count if mean else 1))
    return xp.asarray(value.astype(call.dtype))
