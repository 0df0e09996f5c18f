"""Checks: what the loss is, at ordinary and at special values."""

from __future__ import annotations

from math import inf, nan

from mml_arrayapi.conformance.context import Context, Fail, rounded
from mml_arrayapi.conformance.golden import golden_vectors
from mml_arrayapi.conformance.reference import EPS, Reference, reference
from mml_arrayapi.conformance.suite import check

TOPIC = "values"


@check(TOPIC, every_dtype=True)
def golden_vectors_agree(ctx: Context) -> None:
    """Exact results, made with rational arithmetic."""
    for vector in golden_vectors():
        if ctx.dtype not in vector.dtypes:
            continue
        weight = None if vector.weight is None else ctx.array(vector.weight)
        ctx.agrees(
            ctx.array(vector.input),
            ctx.integers(vector.target),
            Reference(vector.losses, vector.loss_scales, vector.grad, vector.grad_scales),
            vector.name,
            p=vector.p,
            margin=vector.margin,
            weight=weight,
        )


@check(TOPIC, every_dtype=True)
def float64_reference_agrees(ctx: Context) -> None:
    """Random scores against the formula in Python floats."""
    for p, margin in ((1, 1.0), (2, 0.75), (3, 1.25), (1, -0.5), (2, 0.0)):
        rows, target = ctx.scores(), ctx.targets()
        wanted = reference(rows, target, p=p, margin=margin)
        ctx.agrees(ctx.array(rows), ctx.integers(target), wanted, f"p={p}", p=p, margin=margin)


@check(TOPIC, every_dtype=True)
def p_is_any_real_number_from_1(ctx: Context) -> None:
    """Powers that are no integer, near 1 and 2 too, and those that 16 bits can't hold."""
    for p in (1.0001, 1.0078125, 1.1, 1.5, 1.9995, 2.5, 5.25):
        rows, target = ctx.scores(span=1.0), ctx.targets()
        wanted = reference(rows, target, p=p)
        ctx.agrees(ctx.array(rows), ctx.integers(target), wanted, f"p={p}", p=p)


@check(TOPIC, every_dtype=True)
def margin_is_any_finite_number(ctx: Context) -> None:
    """Small ones beside equal scores, and large ones of either sign."""
    rows = [[0.0, 0.0, 0.0, 64.0, 8.0], [0.0] * 5]
    small = 2.0**-12
    cases = [(1.0, margin) for margin in (small, -small, 1000.0, -40.0)]
    cases += [(p, margin) for p in (2.0, 1.5) for margin in (6.0, -40.0)]
    for p, margin in cases:
        wanted = reference(rows, [0, 1], p=p, margin=margin)
        ctx.agrees(ctx.array(rows), ctx.integers([0, 1]), wanted, p=p, margin=margin)


@check(TOPIC, every_dtype=True)
def weight_multiplies_outside_the_power(ctx: Context) -> None:
    """One factor per class, of the target's class; negative and 0 are allowed."""
    weight = [0.5, -1.5, 0.0, 2.0, 1.25]
    for p in (1, 2, 1.5):
        rows = ctx.scores()
        wanted = reference(rows, [1, 0, 3, 2], p=p, weight=weight)
        target = ctx.integers([1, 0, 3, 2])
        ctx.agrees(ctx.array(rows), target, wanted, f"p={p}", p=p, weight=ctx.array(weight))


@check(TOPIC)
def target_class_is_left_out_by_masking(ctx: Context) -> None:
    """Not by subtracting ``margin ** p``, which is wrong for negative margins and infinities."""
    for p, margin in ((1, -1.0), (2, -2.0), (1, 1.0), (2, 2.0**20)):
        x, y = ctx.array([[5.0], [-3.0]]), ctx.integers([0, 0])
        ctx.same(ctx.loss(x, y, p=p, margin=margin), 0.0, 0.0, f"one class, margin={margin}")
    rows, target = [[inf, 1.0, 2.0], [0.0, -8.0, -8.0]], [0, 0]
    wanted = reference(rows, target, p=2, margin=-1.0)
    ctx.agrees(ctx.array(rows), ctx.integers(target), wanted, p=2, margin=-1.0)


@check(TOPIC, every_dtype=True)
def gradient_is_0_at_the_kink(ctx: Context) -> None:
    """Where ``z == 0``, for p = 1 too."""
    rows = [[0.0, -1.0, -1.0, -1.0, 2.0]] * 2 + [[1.5, 0.5, 0.5, -9.0, 0.5]] * 2
    for p in (1, 1.5, 2):
        _, grad = ctx.loss_and_grad(ctx.array(rows), ctx.integers([0] * 4), p=p, reduction="sum")
        at_kink = [*ctx.read(grad)[0][1:4], *ctx.read(grad)[2]]
        if any(at_kink):
            raise Fail(f"p={p}: the gradient where z == 0 is {at_kink}, expected 0")


@check(TOPIC, every_dtype=True)
def nan_score_makes_its_loss_and_gradient_row_nan(ctx: Context) -> None:
    """Wherever in the row it stands, and in no other row."""
    rows = ctx.scores()
    rows[0][0] = rows[1][1] = rows[2][4] = nan
    rows[2][0] = 99.0  # the NaN stands where a number would cost nothing
    for p in (1, 2, 1.5):
        target = [0, 0, 0, 2]
        wanted = reference(rows, target, p=p)
        ctx.agrees(ctx.array(rows), ctx.integers(target), wanted, f"p={p}", p=p)


@check(TOPIC)
def nan_weight_makes_its_class_nan(ctx: Context) -> None:
    """IEEE arithmetic on the formula: NaN times anything."""
    weight, rows = ctx.array([nan, 1.0, 1.0]), [[0.0, 1.0, 0.5]] * 2
    x, y = ctx.array(rows), ctx.integers([0, 1])
    loss = ctx.read(ctx.loss(x, y, weight=weight, reduction="none"))
    if loss[0] == loss[0] or loss[1] != loss[1]:
        raise Fail(f"losses are {loss}, expected NaN for the first sample only")


@check(TOPIC, every_dtype=True)
def infinities_follow_the_formula(ctx: Context) -> None:
    """Infinite scores of the target and of the others, one or two in a row."""
    one = [
        [inf, 0.0, 1.0, 2.0, 3.0],  # the target's: costs nothing
        [-inf, 0.0, 1.0, 2.0, 3.0],  # the target's: costs infinitely
        [0.0, inf, 1.0, -inf, 2.0],
        [0.0, 0.5, 1.0, 2.0, 3.0],
    ]
    two = [
        [inf, inf, 1.0, 2.0, 3.0],  # inf - inf
        [-inf] * 5,
        [-inf, inf, 0.0, 1.0, 2.0],
        [0.0, inf, inf, 1.0, 2.0],
    ]
    for p in (1, 2, 1.5):
        for rows in (one, two):
            wanted = reference(rows, [0] * 4, p=p)
            ctx.agrees(ctx.array(rows), ctx.integers([0] * 4), wanted, f"p={p}", p=p)
        wanted = reference(one, [0] * 4, p=p, weight=[-1.0] * 5)
        x, weight, told = ctx.array(one), ctx.array([-1.0] * 5), f"p={p}, weights of -1"
        ctx.agrees(x, ctx.integers([0] * 4), wanted, told, p=p, weight=weight)


@check(TOPIC)
def class_masked_with_minus_infinity_costs_nothing(ctx: Context) -> None:
    """The loss of the other classes, over the same C."""
    rows, target = ctx.scores(), [0, 1, 4, 0]
    rows[0][1:3] = [-inf] * 2
    rows[1][0] = rows[2][3] = -inf
    rows[3][1:] = [-inf] * 4
    for p in (1, 2, 1.5):
        wanted = reference(rows, target, p=p)
        ctx.agrees(ctx.array(rows), ctx.integers(target), wanted, f"p={p}", p=p)


@check(TOPIC, every_dtype=True)
def margin_survives_large_scores(ctx: Context) -> None:
    """Equal scores cost the margin: ``margin - x_y + x_j`` would lose it."""
    computing = "float32" if ctx.dtype.endswith("16") else ctx.dtype
    large = 2.0**15 if ctx.dtype == "float16" else 4 / EPS[computing]
    for score in (large, -large):
        loss = ctx.loss(ctx.array([[score] * 4]), ctx.integers([1]), margin=1.0)
        ctx.same(loss, 0.75, 1.0, f"scores of {score}")


@check(TOPIC, every_dtype=True)
def adding_a_number_to_all_scores_changes_nothing(ctx: Context) -> None:
    """Scores on a grid, so that the differences are exact."""
    rows = [[ctx.rng.randint(-32, 32) / 32 for _ in range(5)] for _ in range(4)]
    y = ctx.integers(ctx.targets())
    for p in (1, 2):
        before = ctx.read(ctx.loss(ctx.array(rows), y, p=p, margin=0.5, reduction="none"))
        shifted = ctx.array([[rounded(score + 3, ctx.dtype) for score in row] for row in rows])
        after = ctx.read(ctx.loss(shifted, y, p=p, margin=0.5, reduction="none"))
        if before != after:
            raise Fail(f"p={p}: losses are {after} after adding 3 to all scores, {before} before")


@check(TOPIC)
def empty_batches(ctx: Context) -> None:
    """``[]`` for none, 0 for sum, NaN for mean; an empty gradient. All of the input's dtype."""
    for shape in ((0, 3), (2, 0, 3)):
        x = ctx.full(shape, 0.0)
        y = ctx.full(shape[:-1], 0, ctx.integer())
        for reduction, wanted in (("sum", 0.0), ("mean", nan)):
            loss, grad = ctx.loss_and_grad(x, y, reduction=reduction)
            ctx.same(loss, wanted, 0.0, f"{reduction} of an empty batch")
            ctx.same(ctx.loss(x, y, reduction=reduction), wanted, 0.0, f"{reduction} alone")
            if tuple(grad.shape) != shape:
                raise Fail(f"the gradient's shape is {tuple(grad.shape)}, expected {shape}")
            if not grad.dtype == loss.dtype == x.dtype:
                raise Fail(f"dtypes are {loss.dtype}, {grad.dtype}, expected {x.dtype}")
        loss = ctx.loss(x, y, reduction="none")
        if tuple(loss.shape) != shape[:-1]:
            raise Fail(f"the losses' shape is {tuple(loss.shape)}, expected {shape[:-1]}")
