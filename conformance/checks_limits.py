"""Checks: where kernels go wrong at the edges of numbers, memory and sizes."""

from __future__ import annotations

import sys
import warnings
from contextlib import nullcontext
from itertools import chain, permutations, product
from math import inf, isfinite, isnan, nan
from typing import Any

import mml_arrayapi as mml
from mml_arrayapi.conformance.context import Context, Fail, NotRun
from mml_arrayapi.conformance.reference import reference
from mml_arrayapi.conformance.suite import check

IGNORED = "ignored samples"
LIMITS = "limits of numbers"
LAYOUTS = "layouts and sizes"

_LARGEST = {"float16": 65504.0, "bfloat16": 3.3895e38, "float32": 3.4028234e38, "float64": 1.79e308}


@check(IGNORED, every_dtype=True)
def ignored_samples_cost_nothing(ctx: Context) -> None:
    """Loss 0, gradient 0, not counted by the mean, whatever scores and weight are; also a class."""
    rows = [*ctx.scores(6, 9), [nan] * 9, [inf] * 4 + [-inf] * 5]
    for ignored, target in ((-100, [1, -100, 8, 0, -100, 3]), (3, [1, 3, 8, 0, 3, 3])):
        y = ctx.integers([*target, ignored, ignored])
        of_ignored = nan if ignored == 3 else 3.0
        weight = [1.0, -2.0, 0.5, of_ignored, 1.0, 1.0, 0.0, 0.25, 2.0]
        for p, w in ((1, None), (2, weight), (1.5, None)):
            wanted = reference(
                rows, [*target, ignored, ignored], p=p, weight=w, ignore_index=ignored
            )
            keywords: dict[str, Any] = {"p": p, "ignore_index": ignored}
            keywords["weight"] = None if w is None else ctx.array(w)
            ctx.agrees(ctx.array(rows), y, wanted, f"p={p}, ignored {ignored}", **keywords)


@check(IGNORED)
def all_samples_ignored(ctx: Context) -> None:
    """The mean is NaN, the sum 0, the losses and every gradient are 0."""
    x, y = ctx.array([[0.0, nan, inf]] * 3), ctx.integers([-1] * 3)
    for reduction, wanted in (("mean", nan), ("sum", 0.0), ("none", [0.0] * 3)):
        loss, grad = ctx.loss_and_grad(x, y, reduction=reduction, ignore_index=-1)
        ctx.same(loss, wanted, wanted, reduction)
        ctx.same(ctx.loss(x, y, reduction=reduction, ignore_index=-1), wanted, wanted, reduction)
        ctx.same(grad, [[0.0] * 3] * 3, [[0.0] * 3] * 3, f"{reduction}: gradient")


@check(IGNORED)
def chunks_of_ignored_samples_cost_nothing(ctx: Context) -> None:
    """Some chunks are ignored whole, others in part: a mean of their means would be wrong."""
    rows, target = ctx.scores(8, 9), [1, -100, -100, -100, 8, 0, 3, -100]
    rows[2] = [nan] * 9
    x, y = ctx.array(rows), ctx.integers(target)
    if not hasattr(x, "rechunk"):
        raise NotRun(f"arrays of {ctx.library} have no chunks")
    chunked = ctx.note(y.rechunk((2,)), f"{ctx.source(y)}.rechunk((2,))")
    for p, chunks in product((1, 2), ((2, 9), (3, 4))):
        wanted = reference(rows, target, p=p, ignore_index=-100)
        cut = ctx.note(x.rechunk(chunks), f"{ctx.source(x)}.rechunk({chunks})")
        ctx.agrees(cut, chunked, wanted, f"p={p}, chunks {chunks}", p=p, ignore_index=-100)


@check(IGNORED)
def accumulators_leave_ignored_samples_out(ctx: Context) -> None:
    """The count, the mean and the sum of batches, one of which is ignored whole."""
    rows, target = ctx.scores(6, 9), [1, -100, 8, -100, -100, 3]
    rows[4] = [nan] * 9
    ctx.needs_values()
    for p in (1, 2):
        stream = mml.LossAccumulator(p=p, ignore_index=-100)
        with nullcontext() if ctx.backend is None else mml.use_backend(ctx.backend):
            for batch in (slice(0, 3), slice(3, 5), slice(5, 6)):
                stream.update(ctx.array(rows[batch]), ctx.integers(target[batch]))
        wanted = reference(rows, target, p=p, ignore_index=-100)
        if stream.count != wanted.count:
            raise Fail(f"p={p}: the accumulator counts {stream.count}, expected {wanted.count}")
        for reduction in ("mean", "sum"):
            total, scale = wanted.total(reduction)
            ctx.same([stream.compute(reduction)], [total], [scale], f"p={p}: {reduction}")


@check(IGNORED)
def ignore_index_is_compared_before_anything_is_narrowed(ctx: Context) -> None:
    """A value that the target's dtype can't hold matches nothing; others are still checked."""
    x = ctx.array([[0.0, 1.0, 0.5]] * 2)
    for dtype, ignored, target in (
        ("uint8", 256, [0, 1]),
        ("uint8", -256, [0, 1]),
        ("int8", 2**32, [0, 1]),
        ("int64", 2**64, [0, 1]),
        ("uint64", -(2**64), [0, 1]),
        ("uint32", -(2**32) + 1, [1, 1]),
    ):
        if ctx.has_dtype(dtype):
            losses = ctx.read(
                ctx.loss(x, ctx.integers(target, dtype), reduction="none", ignore_index=ignored)
            )
            if 0.0 in losses:
                raise Fail(f"{dtype} targets {target}, ignore_index={ignored}: losses {losses}")
    for dtype, ignored, value in (("uint8", -1, 255), ("uint64", -1, 2**64 - 1), ("int8", 251, -5)):
        if ctx.has_dtype(dtype):
            y = ctx.integers([0, value], dtype)
            options: dict[str, Any] = {"ignore_index": ignored, "check_target": "nan"}
            losses = ctx.read(ctx.loss(x, y, reduction="none", **options))
            if not isnan(losses[1]):
                raise Fail(f"{dtype} target {value}, ignore_index={ignored}: losses {losses}")
    if ctx.has_dtype("uint64"):
        y = ctx.integers([2**64 - 1, 2], "uint64")
        losses = ctx.read(ctx.loss(x, y, reduction="none", ignore_index=2**64 - 1))
        if losses[0] != 0.0:
            raise Fail(f"uint64 target 2**64 - 1, which is ignored: losses {losses}")


@check(LIMITS, every_dtype=True)
def finite_answers_stay_finite(ctx: Context) -> None:
    """Sums over classes and samples whose parts fit the dtype, though their sum does not."""
    computing = "float32" if ctx.dtype.endswith("16") else ctx.dtype
    large = 2.0 ** {"float16": 15, "bfloat16": 126, "float32": 126, "float64": 1022}[ctx.dtype]
    for p in (1, 2, 1.5):
        span = large if p == 1 else min(large, 2.0 ** {"float32": 62, "float64": 510}[computing])
        if ctx.dtype == "float16" and p != 1:
            span = 128.0
        for n_classes in (16, 300):
            # The sum over the classes is too large for float32 or float64, a mean over C is not.
            rows = [[-span] + [0.0] * (n_classes - 1)] * 64
            one = (span + 1.0) ** p * ((n_classes - 1) / n_classes)
            slope = p * (span + 1.0) ** (p - 1) / n_classes
            x, y = ctx.array(rows), ctx.integers([0] * 64)
            loss, grad = ctx.loss_and_grad(x, y, p=p)
            ctx.same(loss, one, one, f"p={p}, {n_classes} classes: mean")
            ctx.same(ctx.loss(x, y, p=p), one, one, f"p={p}, {n_classes} classes: mean alone")
            losses = ctx.loss(x, y, p=p, reduction="none")
            ctx.same(losses, [one] * 64, [one] * 64, f"p={p}, {n_classes} classes: losses")
            own = -slope * (n_classes - 1) / 64
            ctx.same(grad[5, 0], own, abs(own), f"p={p}, {n_classes} classes: target's gradient")
            ctx.same(grad[5, 1], slope / 64, slope / 64, f"p={p}: another class's gradient")
            weight = ctx.array([0.0] + [1.0] * (n_classes - 1))
            loss, grad = ctx.loss_and_grad(x, y, p=p, weight=weight)
            ctx.same(loss, 0.0, 0.0, f"p={p}, {n_classes} classes: weight of 0")
            ctx.same(grad[5, 0], 0.0, 0.0, f"p={p}: target's gradient with a weight of 0")


@check(LIMITS, every_dtype=True)
def weighted_losses_beyond_the_dtype_may_have_a_finite_sum(ctx: Context) -> None:
    """So that their mean is finite too."""
    large = 2.0 ** {"float16": 15, "bfloat16": 126, "float32": 126, "float64": 1022}[ctx.dtype]
    x = ctx.array([[-large, 0.0, 0.0, 0.0], [0.0, -large, 0.0, 0.0], [0.0] * 4])
    y, weight = ctx.integers([0, 1, 2]), ctx.array([16.0, -15.5, 0.5, 1.0])
    one = large * 0.375  # 12 times large, less 11.625 times; the third loss is far below
    for reduction, n in (("mean", 3), ("sum", 1)):
        loss, _ = ctx.loss_and_grad(x, y, weight=weight, reduction=reduction)
        ctx.same(loss, one / n, 4 * one / n, f"{reduction} beside a gradient")
        loss = ctx.loss(x, y, weight=weight, reduction=reduction)
        ctx.same(loss, one / n, 4 * one / n, reduction)


@check(LIMITS, every_dtype=True)
def margin_beyond_the_dtype_acts_as_infinity(ctx: Context) -> None:
    """Of its sign: the other classes cost infinitely or nothing; the target's is left out."""
    large = _LARGEST[ctx.dtype] if ctx.dtype != "float64" else 1.0
    rows = [[0.5, 2.0, -1.0, 0.0, 1.5], [large, 1.0, -large, large, 0.0]]
    rows.append([-large, 1.0, -large, -large, large])
    x, y, single = ctx.array(rows), ctx.integers([0, 2, 4]), ctx.array([[1.0], [2.0], [3.0]])
    margins = (1e39, -1e39, 1.7e308, -1.7e308)
    for margin in margins if ctx.dtype != "float64" else margins[2:]:
        # 1.7e308 fits float64 itself, where powers of it do not.
        beyond = margin if ctx.dtype == "float64" else (inf if margin > 0 else -inf)
        for p in (1, 2, 1.5):
            wanted = reference(rows, [0, 2, 4], p=p, margin=beyond)
            what = f"p={p}, margin={margin}"
            loss, grad = ctx.loss_and_grad(x, y, p=p, margin=margin, reduction="none")
            ctx.same(loss, wanted.losses, wanted.loss_scales, f"{what}: losses")
            if p == 1 or margin < 0:
                scale = [[abs(g) for g in row] for row in wanted.grad]
                ctx.same(grad, wanted.grad, scale, f"{what}: gradient")
            ctx.same(ctx.loss(single, ctx.integers([0] * 3), p=p, margin=margin), 0.0, 0.0, what)


@check(LIMITS, every_dtype=True)
def results_beyond_the_dtype_are_infinite(ctx: Context) -> None:
    """Where the loss itself is too large, its gradient may still be a number."""
    large = _LARGEST[ctx.dtype]
    x, y = ctx.array([[-large, large, 0.0]]), ctx.integers([0])
    loss, grad = ctx.loss_and_grad(x, y, margin=1.0 if ctx.dtype == "float64" else large)
    ctx.same(grad, [[-2 / 3, 1 / 3, 1 / 3]], [[1.0] * 3], "gradient")
    value = ctx.read(loss)
    if ctx.dtype != "float64" and value != inf:
        raise Fail(f"the loss is {value}, expected inf")


@check(LIMITS, every_dtype=True)
def weights_beyond_the_dtype_act_as_infinity(ctx: Context) -> None:
    """Infinite where the hinges cost something, else NaN (0 times infinity), with its row."""
    if ctx.dtype == "float64" or not ctx.has_dtype("float64"):
        raise NotRun("needs float64 weights beside narrower scores")
    rows, target = [[0.0, 1.0, 2.0], [9.0, 0.0, 0.0], [0.0, 1.0, 2.0]], [0, 0, 1]
    weight = ctx.array([1e300, 2.0, 1.0], "float64")
    wanted = reference(rows, target, weight=[inf, 2.0, 1.0])
    x, y = ctx.array(rows), ctx.integers(target)
    loss, grad = ctx.loss_and_grad(x, y, weight=weight, reduction="none")
    ctx.same(loss, wanted.losses, [1.0] * 3, "losses")
    rest = ctx.read(grad)
    if not all(map(isnan, rest[1])) or any(map(isnan, rest[2])):
        raise Fail(f"the gradient is {rest}, expected NaN in the second row, and not in the third")


@check(LIMITS, every_dtype=True)
def losses_that_are_nan_have_rows_of_nan(ctx: Context) -> None:
    """By a weight of NaN, 0 times infinity, infinity minus infinity; and no other row."""
    rows = [
        [0.0, 1.0, 0.5, -9.0, 2.0],  # its weight is NaN
        [0.0, -inf, 0.0, 0.0, 0.0],  # infinitely costly, and its weight is 0
        [inf, 1.0, inf, 0.0, 2.0],
        [0.0, 0.5, 1.0, 1.5, -8.0],
    ]
    target, weight = [0, 1, 2, 3], [nan, 0.0, 1.0, 1.0, 2.0]
    for p in (1, 2, 1.5):
        wanted = reference(rows, target, p=p, weight=weight)
        x, y = ctx.array(rows), ctx.integers(target)
        ctx.agrees(x, y, wanted, f"p={p}", p=p, weight=ctx.array(weight))
        wanted = reference(rows, target, p=p)
        ctx.agrees(x, y, wanted, f"p={p}, without weights", p=p)


@check(LIMITS, every_dtype=True)
def ordinary_scores_warn_of_nothing(ctx: Context) -> None:
    """Nor set off the library's traps: no NaN or infinity is made to be thrown away."""
    rows = [
        *ctx.scores(3, 9),
        [-inf, -inf, 0.0, 1.0, -inf, 2.0, 0.5, -inf, 0.0],
        [nan, inf] * 4 + [inf],
    ]
    x, y = ctx.array(rows), ctx.integers([8, 0, 4, 5, -7])
    numpy = sys.modules.get("numpy")
    for p in (1, 2, 1.5):
        trap: Any = nullcontext() if numpy is None else numpy.errstate(all="raise", under="ignore")
        with warnings.catch_warnings(), trap:
            warnings.simplefilter("error")
            loss, grad = ctx.loss_and_grad(x, y, p=p, ignore_index=-7)
            alone = ctx.loss(x, y, p=p, ignore_index=-7)
            values = [ctx.read(loss), ctx.read(alone), *chain.from_iterable(ctx.read(grad))]
        if not all(map(isfinite, values)):
            raise Fail(f"p={p}: loss and gradient are {values}, expected numbers")


@check(LIMITS, every_dtype=True)
def large_powers_are_accurate(ctx: Context) -> None:
    """The error of ``z ** p`` grows with p and no faster."""
    margin = 0.5 if ctx.dtype == "float16" else 1.0  # powers of 1.5 are beyond float16
    for p in (7, 20.5, 50):
        rows, target = ctx.scores(4, 17, span=0.25), ctx.targets(4, 17)
        wanted = reference(rows, target, p=p, margin=margin)
        x, y = ctx.array(rows), ctx.integers(target)
        ctx.agrees(x, y, wanted, f"p={p}", p=p, margin=margin)


@check(LAYOUTS, every_dtype=True)
def reversed_inputs_are_accepted(ctx: Context) -> None:
    """Scores, targets, weight and grad_output that are walked backwards."""
    rows, target, weight = ctx.scores(7, 19), ctx.targets(7, 19), [1 + i / 8 for i in range(19)]
    upstream = [0.5 * i - 1 for i in range(7)]
    x, y, w, up = ctx.array(rows), ctx.integers(target), ctx.array(weight), ctx.array(upstream)
    rows, target = [row[::-1] for row in rows[::-1]], target[::-1]
    wanted = reference(rows, target, p=2, weight=weight[::-1])
    try:
        x = ctx.note(x[::-1, ::-1], f"{ctx.source(x)}[::-1, ::-1]")
    except (ValueError, IndexError) as error:
        raise NotRun(f"arrays of {ctx.library} can't be sliced backwards: {error}") from None
    y, w, up = (ctx.note(a[::-1], f"{ctx.source(a)}[::-1]") for a in (y, w, up))
    ctx.agrees(x, y, wanted, p=2, weight=w)
    wanted = reference(rows, target).scaled(upstream[::-1])
    grad = ctx.loss_and_grad(x, y, reduction="none", grad_output=up)[1]
    ctx.same(grad, wanted.grad, wanted.grad_scales, "gradient with a reversed grad_output")


@check(LAYOUTS, every_dtype=True)
def grad_output_may_have_any_layout(ctx: Context) -> None:
    """Every third element, one element for all samples, and a transposed batch."""
    rows, target = ctx.scores(6, 5), ctx.targets(6)
    x, y = ctx.array(rows), ctx.integers(target)
    spread = [float(i % 7) - 2 for i in range(18)]
    every = ctx.array(spread)
    one = ctx.array([2.5])
    for up, factors in (
        (ctx.note(every[::3], f"{ctx.source(every)}[::3]"), spread[::3]),
        (ctx.note(ctx.xp.broadcast_to(one, (6,)), "xp.broadcast_to(...)"), [2.5] * 6),
    ):
        for p in (1, 2):
            wanted = reference(rows, target, p=p).scaled(factors)
            grad = ctx.loss_and_grad(x, y, p=p, reduction="none", grad_output=up)[1]
            ctx.same(grad, wanted.grad, wanted.grad_scales, f"p={p}: gradient")


@check(LAYOUTS, every_dtype=True)
def batch_axes_may_lie_in_any_order(ctx: Context) -> None:
    """Scores of three axes, permuted in every way, the classes at each of the axes."""
    values = [ctx.scores(4, 5) for _ in range(3)]
    whole = ctx.array(values)
    for order in permutations(range(3)):
        source = f"xp.permute_dims({ctx.source(whole)}, {order})"
        x = ctx.note(ctx.xp.permute_dims(whole, order), source)
        for axis in range(3):
            batch = [i for i in range(3) if i != axis]
            a, b, n_classes = (x.shape[i] for i in (*batch, axis))
            target = [ctx.targets(b, n_classes) for _ in range(a)]
            rows = [
                [_element(values, (i, j, k), (*batch, axis), order) for k in range(n_classes)]
                for i, j in product(range(a), range(b))
            ]
            wanted = reference(rows, [*chain.from_iterable(target)], p=2)
            y = ctx.integers(target)
            loss, grad = ctx.loss_and_grad(x, y, p=2, axis=axis, reduction="none")
            grad = ctx.xp.permute_dims(grad, (*batch, axis))
            what = f"axes {order}, classes at {axis}"
            ctx.same(
                [*chain.from_iterable(ctx.read(loss))],
                wanted.losses,
                wanted.loss_scales,
                f"{what}: losses",
            )
            found = [*chain.from_iterable(ctx.read(grad))]
            ctx.same(found, wanted.grad, wanted.grad_scales, f"{what}: gradient")


def _element(values: Any, place: Any, axes: Any, order: Any) -> float:
    """Return the element of ``values`` that stands at ``place`` along ``axes`` of the permuted."""
    at = [0, 0, 0]
    for index, axis in zip(place, axes, strict=True):
        at[order[axis]] = index
    return float(values[at[0]][at[1]][at[2]])


# Around vectors of 4 to 64 numbers and their multiples, blocks of rows and of classes.
_SIZES = (
    (1, 1),
    (33, 2),
    (70, 3),
    (4, 7),
    (3, 8),
    (40, 10),
    (3, 15),
    (2, 16),
    (3, 17),
    (2, 33),
    (2, 64),
    (2, 130),
    (2, 257),
    (1, 1030),
)


@check(LAYOUTS, every_dtype=True)
def sizes_at_which_kernels_change_their_way(ctx: Context) -> None:
    """Numbers of classes and samples around those of vectors and blocks."""
    for n, n_classes in _SIZES:
        rows, target = ctx.scores(n, n_classes), ctx.targets(n, n_classes)
        target[-1] = n_classes - 1
        if n > 1:
            target[0], rows[0][-1] = 0, 2.5  # the last class costs something
        wanted = reference(rows, target)
        loss, grad = ctx.loss_and_grad(ctx.array(rows), ctx.integers(target), reduction="none")
        ctx.same(loss, wanted.losses, wanted.loss_scales, f"{n} x {n_classes}: losses")
        ctx.same(grad, wanted.grad, wanted.grad_scales, f"{n} x {n_classes}: gradient")


@check(LAYOUTS, every_dtype=True)
def special_values_count_wherever_they_stand(ctx: Context) -> None:
    """NaN and infinities at every place of a row, one per sample."""
    n_classes = 37
    for value in (nan, inf, -inf):
        rows, target = ctx.scores(n_classes, n_classes), ctx.targets(n_classes, n_classes)
        for i in range(n_classes):
            rows[i][i] = value
        for p in (1, 2):
            wanted = reference(rows, target, p=p)
            x, y = ctx.array(rows), ctx.integers(target)
            loss, grad = ctx.loss_and_grad(x, y, p=p, reduction="none")
            ctx.same(loss, wanted.losses, wanted.loss_scales, f"p={p}, {value}: losses")
            ctx.same(grad, wanted.grad, wanted.grad_scales, f"p={p}, {value}: gradient")


@check(LAYOUTS, every_dtype=True)
def large_inputs_agree_with_small_ones(ctx: Context) -> None:
    """A few samples, repeated until kernels take several threads, blocks or tiles."""
    for n, n_classes, times in ((7, 33, 5003), (11, 3, 36007)):
        rows, target = ctx.scores(n, n_classes), ctx.targets(n, n_classes)
        shape = (times, n, n_classes)
        x = ctx.xp.reshape(ctx.xp.broadcast_to(ctx.array(rows), shape), (times * n, n_classes))
        y = ctx.xp.reshape(ctx.xp.broadcast_to(ctx.integers(target), (times, n)), (times * n,))
        for p in (1, 2):
            wanted, what = reference(rows, target, p=p), f"{times * n} x {n_classes}, p={p}"
            loss, grad = ctx.loss_and_grad(x, y, p=p)
            mean, scale = wanted.total("mean")
            if ctx.dtype == "float64":
                scale *= 2**7  # rounding errors of plain sums over so many samples
            ctx.same(loss, mean, scale, f"{what}: mean")
            ctx.same(ctx.loss(x, y, p=p), mean, scale, f"{what}: mean alone")
            part = wanted.scaled([1 / (n * times)] * n)
            losses = ctx.loss(x, y, p=p, reduction="none")
            for start in (0, n * (times // 2), n * (times - 1)):
                place = f"{what}, sample {start}"
                found = losses[start : start + n]
                ctx.same(found, wanted.losses, wanted.loss_scales, f"{place}: losses")
                found = grad[start : start + n, :]
                ctx.same(found, part.grad, part.grad_scales, f"{place}: gradient")


@check(LAYOUTS)
def the_same_call_gives_the_same_bits(ctx: Context) -> None:
    """The first time and the fiftieth, and whether or not somebody asks which kernel runs."""
    x, y = ctx.array(ctx.scores(9, 11)), ctx.integers(ctx.targets(9, 11))
    for p in (1, 1.5):
        seen = set()
        for i in range(50):
            if i == 10:
                ctx.kernel(x, y, p=p)
            loss, grad = ctx.loss_and_grad(x, y, p=p)
            alone = ctx.loss(x, y, p=p, reduction="none")
            seen.add(repr([ctx.read(array) for array in (loss, grad, alone)]))
        if len(seen) > 1:
            raise Fail(f"p={p}: {len(seen)} different results of 50 equal calls")
