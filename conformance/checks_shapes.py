"""Checks: shapes of the arguments and of the results."""

from __future__ import annotations

from typing import Any

from mml_arrayapi.conformance.context import Context, Fail
from mml_arrayapi.conformance.reference import Reference, reference
from mml_arrayapi.conformance.suite import check

TOPIC = "shapes"


def _shape(array: Any, wanted: tuple[int, ...], what: str) -> None:
    if tuple(array.shape) != wanted:
        raise Fail(f"{what} has shape {tuple(array.shape)}, expected {wanted}")


@check(TOPIC)
def batch_has_any_number_of_axes(ctx: Context) -> None:
    """``(C,)``, ``(N, C)``, ``(M, N, C)`` and ``(K, M, N, C)``."""
    for batch in ((), (2,), (3, 2), (2, 1, 3)):
        x, y = ctx.full((*batch, 4), 0.0), ctx.full(batch, 1, ctx.integer())
        for reduction in ("none", "mean", "sum"):
            loss, grad = ctx.loss_and_grad(x, y, reduction=reduction)
            wanted = batch if reduction == "none" else ()
            _shape(loss, wanted, f"the loss ({reduction}) of input of shape {(*batch, 4)}")
            _shape(ctx.loss(x, y, reduction=reduction), wanted, f"the loss alone ({reduction})")
            _shape(grad, (*batch, 4), "the gradient")


@check(TOPIC)
def axis_says_where_the_classes_are(ctx: Context) -> None:
    """Every axis of a 3-d input, counted from either end."""
    n, m, classes = 2, 3, 4
    rows, target = ctx.scores(n * m, classes), ctx.targets(n * m, classes)
    wanted = reference(rows, target, p=2)
    weight = ctx.array([1.0] * classes)
    y = ctx.integers([target[i * m : (i + 1) * m] for i in range(n)])
    losses = [wanted.losses[i * m : (i + 1) * m] for i in range(n)]
    scales = [wanted.loss_scales[i * m : (i + 1) * m] for i in range(n)]
    for axis in range(-3, 3):
        x = ctx.array(_with_classes_at(axis, rows, n, m))
        grads = _with_classes_at(axis, wanted.grad, n, m)
        grad_scales = _with_classes_at(axis, wanted.grad_scales, n, m)
        loss, grad = ctx.loss_and_grad(x, y, axis=axis, p=2, weight=weight, reduction="none")
        ctx.same(loss, losses, scales, f"axis={axis}: losses")
        ctx.same(grad, grads, grad_scales, f"axis={axis}: gradient")


@check(TOPIC)
def a_batch_as_long_as_it_is_wide_keeps_its_order(ctx: Context) -> None:
    """Nothing is transposed where no shape would tell."""
    rows, target = ctx.scores(9, 3), ctx.targets(9, 3)
    wanted = reference(rows, target)
    x = ctx.array(_with_classes_at(2, rows, 3, 3))
    y = ctx.integers([target[i : i + 3] for i in (0, 3, 6)])
    loss, grad = ctx.loss_and_grad(x, y, reduction="none")
    values, scales = wanted.losses, wanted.loss_scales
    losses, loss_scales = ([row[i : i + 3] for i in (0, 3, 6)] for row in (values, scales))
    ctx.same(loss, losses, loss_scales, "losses")
    rows, scales = (_with_classes_at(2, row, 3, 3) for row in (wanted.grad, wanted.grad_scales))
    ctx.same(grad, rows, scales, "gradient")


def _with_classes_at(axis: int, rows: list[list[float]], n: int, m: int) -> Any:
    """Arrange n * m rows as a 3-d nested list."""
    c = len(rows[0])
    if axis % 3 == 0:
        return [[[rows[i * m + j][k] for j in range(m)] for i in range(n)] for k in range(c)]
    if axis % 3 == 1:
        return [[[rows[i * m + j][k] for j in range(m)] for k in range(c)] for i in range(n)]
    return [[rows[i * m + j] for j in range(m)] for i in range(n)]


@check(TOPIC)
def one_sample_may_be_spelled_in_several_ways(ctx: Context) -> None:
    """``(C,)`` with ``()`` or ``(1,)``, ``(1, C)`` with ``()``; none has the target's shape."""
    row = ctx.scores(1, 5)
    one = reference(row, [3])
    for x, given in ((row[0], 3), (row[0], [3]), (row, 3), (row, [3])):
        _spelled(ctx, x, given, one)


@check(TOPIC)
def input_without_axes_is_one_class(ctx: Context) -> None:
    """A 0-d input costs nothing, and has a 0-d gradient."""
    for given in (0, [0]):
        _spelled(ctx, 2.5, given, reference([[2.5]], [0]))


def _spelled(ctx: Context, scores: Any, target: Any, one: Reference) -> None:
    x, y = ctx.array(scores), ctx.integers(target)
    what = f"input of shape {tuple(x.shape)} with target of shape {tuple(y.shape)}"
    for reduction in ("none", "mean", "sum"):
        loss, grad = ctx.loss_and_grad(x, y, reduction=reduction)
        _shape(loss, tuple(y.shape) if reduction == "none" else (), f"{what}: the loss")
        _shape(grad, tuple(x.shape), f"{what}: the gradient")
        flat = ctx.read(ctx.xp.reshape(loss, (1,)))
        wanted, scale = one.losses[0], one.loss_scales[0]
        ctx.same(loss, wanted if tuple(loss.shape) == () else [wanted], _like(scale, loss), what)
        if tuple(ctx.loss(x, y, reduction=reduction).shape) != tuple(loss.shape):
            raise Fail(f"{what}: the loss alone has another shape; value {flat}")
        values = ctx.read(ctx.xp.reshape(grad, (-1,)))
        for got, right in zip(values, one.grad[0], strict=True):
            if abs(got - right) > 1e-2 + 1e-2 * abs(right):
                raise Fail(f"{what}: the gradient is {values}, expected {one.grad[0]}")


def _like(scale: float, loss: Any) -> Any:
    return scale if tuple(loss.shape) == () else [scale]


@check(TOPIC)
def no_classes_is_an_error(ctx: Context) -> None:
    """``C == 0``."""
    x, y = ctx.full((2, 0), 0.0), ctx.integers([0, 0])
    ctx.raised(ValueError, ctx.loss, x, y)


@check(TOPIC)
def lengths_that_differ_are_an_error(ctx: Context) -> None:
    """They are never broadcast: 3 samples against 1 target, or 2, or a whole row of them."""
    x = ctx.full((3, 3), 0.0)
    for target in ([0], [0, 1], [[0], [1], [2]], [[0, 1, 2]], 0):
        ctx.raised(ValueError, ctx.loss, x, ctx.integers(target))
