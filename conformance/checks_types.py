"""Checks: dtypes, computing precision and the error of long sums."""

from __future__ import annotations

from math import isfinite, prod

from mml_arrayapi.conformance.context import INTEGERS, Context, Fail, rounded
from mml_arrayapi.conformance.reference import EPS, reference
from mml_arrayapi.conformance.suite import check
from mml_arrayapi.libraries import device_of

TOPIC = "types and precision"

LONG = 2**20
"""Terms in a long sum: one after the other in float32, 0.1 sums up to 1% too much."""


@check(TOPIC, every_dtype=True)
def results_have_the_dtype_of_input(ctx: Context) -> None:
    """Loss and gradient, whatever the dtypes of target, weight and grad_output."""
    x, y = ctx.array([[0.0, 1.0, 0.5]] * 2), ctx.integers([0, 2])
    for dtype in (None, *ctx.floating()):
        weight = None if dtype is None else ctx.array([1.0, 2.0, 3.0], dtype)
        for reduction in ("none", "mean", "sum"):
            upstream = [1.0, 1.0] if reduction == "none" else 1.0
            grad_output = None if dtype is None else ctx.array(upstream, dtype)
            loss, grad = ctx.loss_and_grad(
                x, y, weight=weight, reduction=reduction, grad_output=grad_output
            )
            alone = ctx.loss(x, y, weight=weight, reduction=reduction)
            for what, got in (("loss", loss), ("loss alone", alone), ("gradient", grad)):
                if got.dtype != x.dtype:
                    raise Fail(
                        f"the {what} ({reduction}, weight of {dtype}) has dtype {got.dtype}, "
                        f"expected {x.dtype}"
                    )


@check(TOPIC)
def results_are_on_the_device_of_input(ctx: Context) -> None:
    """Loss and gradient, with weight and grad_output too."""
    x, y = ctx.array([[0.0, 1.0, 0.5]] * 2), ctx.integers([0, 2])
    for reduction in ("none", "mean", "sum"):
        loss, grad = ctx.loss_and_grad(x, y, weight=ctx.array([1.0, 2.0, 3.0]), reduction=reduction)
        for what, got in (("loss", loss), ("gradient", grad)):
            if device_of(got) not in (None, device_of(x)):  # None: a scalar of NumPy 2.0
                raise Fail(f"the {what} is on {device_of(got)}, but input is on {device_of(x)}")


@check(TOPIC)
def target_may_have_any_integer_dtype(ctx: Context) -> None:
    """Signed or unsigned, of any width that the library has."""
    rows, target = ctx.scores(), [0, 4, 2, 3]
    wanted = reference(rows, target)
    for dtype in INTEGERS:
        if ctx.has_dtype(dtype):
            ctx.agrees(ctx.array(rows), ctx.integers(target, dtype), wanted, f"{dtype} target")


@check(TOPIC, every_dtype=True)
def weight_is_used_in_the_computing_precision(ctx: Context) -> None:
    """A wider weight is not rounded to the input's 16 bits first; a narrower one does no harm."""
    y = ctx.integers([1])
    for dtype in ctx.floating():
        weight = [1.0, 1.0 + 2 * EPS[dtype], 1.0]
        wanted = reference([[0.0, 1.0, 0.5]], [1], weight=weight)
        x = ctx.array([[0.0, 1.0, 0.5]])
        ctx.agrees(x, y, wanted, f"{dtype} weight", weight=ctx.array(weight, dtype))
    if ctx.dtype == "float16" and ctx.has_dtype("float32"):
        rows, weight = [[0.0, 0.0, 4096.0]], [1.0, 2.0**-26, 1.0]  # 0 in float16
        wanted = reference(rows, [1], p=2, weight=weight)
        small = ctx.array(weight, "float32")
        ctx.agrees(ctx.array(rows), y, wanted, "weight of 2**-26", p=2, weight=small)


@check(TOPIC)
def target_may_be_any_class_that_its_dtype_holds(ctx: Context) -> None:
    """The first, the middle and the last of as many classes as there can be, up to 2**17."""
    narrow = ("int8", 2**7), ("uint8", 2**8), ("int16", 2**15), ("uint16", 2**16)
    wide = ((dtype, 2**17) for dtype in ("int32", "uint32", "int64", "uint64"))
    for dtype, classes in (*narrow, *wide):
        if not ctx.has_dtype(dtype):
            continue
        target = [0, classes // 2, classes - 1]
        x, y = ctx.full((3, classes), 0.0), ctx.integers(target, dtype)
        loss, grad = ctx.loss_and_grad(x, y, reduction="none")
        _close(ctx, ctx.loss(x, y), 1 - 1 / classes, f"{dtype} targets: mean")
        for i, place in enumerate(target):
            _close(ctx, loss[i], 1 - 1 / classes, f"{dtype} target {place}: loss")
            _close(ctx, grad[i, place], 1 / classes - 1, f"{dtype} target {place}: its gradient")


@check(TOPIC, every_dtype=True)
def margin_is_used_in_the_computing_precision(ctx: Context) -> None:
    """It is not rounded to the input's 16 bits: a difference of scores nearly makes up for it."""
    rows = [[0.0, -rounded(0.1, ctx.dtype), -1.0]]
    for p in (1, 2, 1.5):
        wanted = reference(rows, [0], p=p, margin=0.1)
        ctx.agrees(ctx.array(rows), ctx.integers([0]), wanted, f"p={p}", p=p, margin=0.1)


@check(TOPIC, every_dtype=True)
def intermediate_results_do_not_overflow(ctx: Context) -> None:
    """float16 scores of 300 with p = 2: squares and the batch's sum are beyond float16."""
    rows = [[0.0, 300.0, 0.0, 0.0]] * 64
    wanted = reference(rows, [0] * 64, p=2)
    x, y = ctx.array(rows), ctx.integers([0] * 64)
    loss, grad = ctx.loss_and_grad(x, y, p=2)
    ctx.same(loss, *wanted.total("mean"), "mean")
    mean = wanted.scaled([1 / 64] * 64)
    ctx.same(grad, mean.grad, mean.grad_scales, "gradient of the mean")
    if not isfinite(ctx.read(ctx.loss(x, y, p=2))):
        raise Fail("the mean alone is not finite")


@check(TOPIC, every_dtype=True)
def small_gradients_keep_their_precision(ctx: Context) -> None:
    """``grad_output / (N * C)`` is formed in float32 or wider, and not rounded before it is used.

    In float16 1 / (65536 * 3) is a subnormal number, 0.4% off.
    """
    n, up = 2**16, 1024.0
    x, y = ctx.full((n, 3), 0.0), ctx.full((n,), 0, ctx.integer())
    for dtype in dict.fromkeys((ctx.dtype, "float32")):
        if ctx.has_dtype(dtype):
            grad_output = ctx.array(up, dtype)
            _, grad = ctx.loss_and_grad(x, y, grad_output=grad_output)
            row, one = ctx.read(grad[7, :]), up / (n * 3)
            for got, right in zip(row, (-2 * one, one, one), strict=True):
                if abs(got - right) > 0.51 * EPS[ctx.dtype] * abs(right) + 1e-6 * one:
                    raise Fail(f"a row of the gradient is {row}, expected {[-2 * one, one, one]}")


@check(TOPIC, every_dtype=True)
def sums_over_classes_are_accurate(ctx: Context) -> None:
    """Relative error at most 1e-6 over 2**20 classes, along either axis and with steps."""
    y = ctx.integers([5])
    wide = ctx.full((1, 2 * LONG), 0.0)
    step = ctx.note(wide[:, ::2], f"{ctx.source(wide)}[:, ::2]")
    for x, axis in ((ctx.full((1, LONG), 0.0), 1), (ctx.full((LONG, 1), 0.0), 0), (step, 1)):
        for p, margin in _TERMS:
            loss = ctx.loss(x, y, p=p, margin=margin, axis=axis)
            _close(ctx, loss, _loss(ctx, p, margin), f"p={p}: loss")


@check(TOPIC, every_dtype=True)
def gradient_at_the_target_class_is_accurate(ctx: Context) -> None:
    """Relative error at most 1e-6 over 2**20 classes."""
    x, y = ctx.full((1, LONG), 0.0), ctx.integers([5])
    for p, margin in _TERMS:
        loss, grad = ctx.loss_and_grad(x, y, p=p, margin=margin, reduction="sum")
        wanted = -(LONG - 1) / LONG * p * _margin(ctx, margin) ** (p - 1)
        _close(ctx, grad[0, 5], wanted, f"p={p}: gradient at the target")
        _close(ctx, loss, _loss(ctx, p, margin), f"p={p}: loss")


# Sums of equal terms drift most where their rounding errors are large and of one sign.
_TERMS = ((1, 0.1), (1, 1.11217), (2, 0.72651))


def _margin(ctx: Context, margin: float) -> float:
    """Return the margin as the computing precision holds it."""
    return margin if ctx.dtype == "float64" else rounded(margin, "float32")


def _loss(ctx: Context, p: int, margin: float) -> float:
    return float(_margin(ctx, margin) ** p * (LONG - 1) / LONG)


@check(TOPIC, every_dtype=True)
def sums_over_the_batch_are_accurate(ctx: Context) -> None:
    """Relative error at most 1e-6 over 2**20 samples, for sum and mean."""
    for batch in ((LONG,), (2**7, 2**9)):
        x, y = ctx.full((*batch, 2), 0.0), ctx.full(batch, 1, ctx.integer())
        _close(ctx, ctx.loss(x, y, margin=0.1), 0.05, "mean")
        total = ctx.loss(x, y, margin=0.1, reduction="sum")
        _close(ctx, total, 0.05 * prod(batch), "sum")


def _close(ctx: Context, got: object, wanted: float, what: str) -> None:
    value = ctx.read(got)
    narrow = ctx.dtype.endswith("16")
    bound = 1e-6 + (0.5001 * EPS[ctx.dtype] if narrow else 0.0)
    bound = 1e-9 if ctx.dtype == "float64" else bound
    error = abs(value - wanted) / abs(wanted)
    if not error <= bound:
        raise Fail(f"{what} is {value!r}, expected {wanted!r}: relative error {error:.2g}")
