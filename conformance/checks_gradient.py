"""Checks: the gradient, by itself and beside the loss."""

from __future__ import annotations

from math import inf

from mml_arrayapi.conformance.context import Context, Fail, rounded
from mml_arrayapi.conformance.reference import EPS, reference
from mml_arrayapi.conformance.suite import check

TOPIC = "gradient"


@check(TOPIC)
def finite_differences_agree(ctx: Context) -> None:
    """Central differences, exact for p = 1 and 2 on a grid that no kink lies on."""
    dtype = next(name for name in ("float64", "float32", ctx.dtype) if ctx.has_dtype(name))
    step, rows = 2.0**-6, [[ctx.rng.randint(-32, 32) / 16 for _ in range(5)] for _ in range(4)]
    y, margin = ctx.integers([0, 3, 1, 2]), 1 + 2 * step
    for p in (1, 2):
        x = ctx.array(rows, dtype)
        found = ctx.read(ctx.loss_and_grad(x, y, p=p, margin=margin, reduction="sum")[1])
        for i in range(4):
            for j in range(5):
                up, down = [[list(row) for row in rows] for _ in range(2)]
                up[i][j] += step
                down[i][j] -= step
                high, low = (
                    ctx.loss(ctx.array(moved, dtype), y, p=p, margin=margin, reduction="sum")
                    for moved in (up, down)
                )
                slope = (ctx.read(high) - ctx.read(low)) / (2 * step)
                if abs(found[i][j] - slope) > EPS[dtype] * 2**11 * max(1.0, abs(slope)):
                    raise Fail(f"p={p}: gradient[{i}][{j}] is {found[i][j]}, differences {slope}")


@check(TOPIC, every_dtype=True)
def gradient_rows_sum_to_0(ctx: Context) -> None:
    """The target's gradient is minus the sum of the others."""
    for p in (1, 2, 1.5):
        x, y = ctx.array(ctx.scores()), ctx.integers(ctx.targets())
        for row in ctx.read(ctx.loss_and_grad(x, y, p=p, reduction="sum")[1]):
            size = sum(map(abs, row))
            if abs(sum(row)) > 4 * EPS[ctx.dtype] * size:
                raise Fail(f"p={p}: the gradient row {row} sums to {sum(row):.3g}")


@check(TOPIC, every_dtype=True)
def grad_output_multiplies_the_gradient(ctx: Context) -> None:
    """One number for sum and mean, one per sample for none; negative and 0 too."""
    upstream = [2.0, -0.5, 0.0, rounded(0.3, ctx.dtype)]
    rows, target = ctx.scores(), ctx.targets()
    x, y = ctx.array(rows), ctx.integers(target)
    for p in (1, 2):
        base = reference(rows, target, p=p)
        grad_output = ctx.array(upstream)
        _, grad = ctx.loss_and_grad(x, y, p=p, reduction="none", grad_output=grad_output)
        wanted = base.scaled(upstream)
        ctx.same(grad, wanted.grad, wanted.grad_scales, f"p={p}, none")
        for reduction, factor in (("sum", -1.5), ("mean", -1.5 / 4)):
            _, grad = ctx.loss_and_grad(x, y, p=p, reduction=reduction, grad_output=ctx.array(-1.5))
            wanted = base.scaled([factor] * 4)
            ctx.same(grad, wanted.grad, wanted.grad_scales, f"p={p}, {reduction}")
    if ctx.dtype == "float16" and ctx.has_dtype("float32"):
        rows, small = [[0.0, 4096.0, 0.0]], 2.0**-26  # 0 in float16
        wanted = reference(rows, [0], p=2).scaled([small])
        grad_output = ctx.array([small], "float32")
        options = {"p": 2, "reduction": "none", "grad_output": grad_output}
        _, grad = ctx.loss_and_grad(ctx.array(rows), ctx.integers([0]), **options)
        ctx.same(grad, wanted.grad, wanted.grad_scales, "grad_output of 2**-26")


@check(TOPIC, every_dtype=True)
def an_infinite_grad_output_reaches_active_classes_only(ctx: Context) -> None:
    """Classes without a share in the loss get 0, and so does a target without any."""
    x, y = ctx.array([[5.0, 0.0, 0.0], [0.0, 1.0, -3.0]]), ctx.integers([0, 0])
    grad_output = ctx.array([inf, -inf])
    wanted = [[0.0] * 3, [inf, -inf, 0.0]]
    for p in (1, 2, 1.5):
        _, grad = ctx.loss_and_grad(x, y, p=p, reduction="none", grad_output=grad_output)
        ctx.same(grad, wanted, wanted, f"p={p}")


@check(TOPIC)
def loss_with_and_without_gradient_is_the_same(ctx: Context) -> None:
    """Both functions give one loss."""
    for p in (1, 2, 1.5):
        rows, target = ctx.scores(), ctx.targets()
        x, y = ctx.array(rows), ctx.integers(target)
        for reduction in ("none", "mean", "sum"):
            alone = ctx.read(ctx.loss(x, y, p=p, reduction=reduction))
            scales = reference(rows, target, p=p)
            scale = scales.loss_scales if reduction == "none" else scales.total(reduction)[1]
            loss, _ = ctx.loss_and_grad(x, y, p=p, reduction=reduction)
            ctx.same(loss, alone, scale, f"p={p}, {reduction}")
