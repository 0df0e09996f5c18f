"""Checks: targets that are no class. Never a plausible number."""

from __future__ import annotations

from collections.abc import Callable
from math import isnan
from typing import Any, cast

from mml_arrayapi import InvalidTargetError
from mml_arrayapi.conformance.context import C, Context, Fail, N
from mml_arrayapi.conformance.reference import reference
from mml_arrayapi.conformance.suite import check
from mml_arrayapi.libraries import HOST, LAZY, TRACED

TOPIC = "targets out of range"

_WRONG = (  # dtype, a value that is no class of 5, one that wraps to a class when narrowed
    ("int8", -1),
    ("int16", -3),
    ("int32", 5),
    ("int64", -1),
    ("int64", 5),
    ("int64", 2**32),
    ("int64", 2**32 + 1),
    ("int64", -(2**63)),
    ("uint8", 255),
    ("uint16", 65535),
    ("uint32", 2**32 - 1),
    ("uint64", 2**32),
    ("uint64", 2**63),
    ("uint64", 2**64 - 1),
)


SCORES = [0.0, 1.0, 0.5, 2.0, -1.0]


def _scores(ctx: Context) -> Any:
    return ctx.array([SCORES] * N)


@check(TOPIC)
def check_target_raise_raises(ctx: Context) -> None:
    """Negative and too large ones, of every integer dtype, before anything is narrowed."""
    ctx.needs_values()
    for dtype, value in _WRONG:
        if ctx.has_dtype(dtype):
            y = ctx.integers([0, value, 2, 4], dtype)
            for function in (ctx.loss, ctx.loss_and_grad):
                _invalid(ctx, function, _scores(ctx), y, check_target="raise")


def _invalid(
    ctx: Context, function: Callable[..., Any], *args: Any, **keywords: Any
) -> InvalidTargetError:
    error = ctx.raised_when_read(InvalidTargetError, function, *args, **keywords)
    return cast(InvalidTargetError, error)


@check(TOPIC)
def error_names_the_first_position_value_and_number_of_classes(ctx: Context) -> None:
    """Also as attributes; the position is the place in target."""
    ctx.needs_values()
    x = ctx.full((2, 3, 4), 0.0)
    for target, position, value in (
        ([[0, 1, 2], [3, 7, -1]], (1, 1), 7),
        ([[0, 1, -2], [3, 9, -1]], (0, 2), -2),
    ):
        y = ctx.integers(target)
        error = _invalid(ctx, ctx.loss, x, y, check_target="raise")
        found = (error.position, error.value, error.n_classes)
        if found != (position, value, 4):
            raise Fail(f"the error names {found}, expected {(position, value, 4)}")
        place = ", ".join(map(str, position))
        if not all(word in str(error) for word in (place, str(value), "4 classes")):
            raise Fail(f"the message {str(error)!r} does not name {place}, {value} and 4 classes")
    if not isinstance(error, IndexError) or not isinstance(error, ValueError):
        raise Fail("InvalidTargetError is not both an IndexError and a ValueError")


@check(TOPIC, every_dtype=True)
def check_target_nan_makes_nan_of_that_sample(ctx: Context) -> None:
    """Its loss and its gradient row, and no other."""
    for dtype, value in _WRONG:
        if not ctx.has_dtype(dtype):
            continue
        y = ctx.integers([0, value, 2, 4], dtype)
        losses, grad = ctx.loss_and_grad(_scores(ctx), y, check_target="nan", reduction="none")
        alone = ctx.loss(_scores(ctx), y, check_target="nan", reduction="none")
        for values in (ctx.read(losses), ctx.read(alone)):
            if [isnan(v) for v in values] != [False, True, False, False]:
                raise Fail(f"{dtype} target {value}: losses are {values}, expected NaN for it only")
        rows = ctx.read(grad)
        if [[isnan(v) for v in row] for row in rows] != [
            [False] * C,
            [True] * C,
            *[[False] * C] * 2,
        ]:
            raise Fail(f"{dtype} target {value}: gradient is {rows}, expected NaN in its row only")
        for reduction in ("sum", "mean"):
            total = ctx.read(ctx.loss(_scores(ctx), y, check_target="nan", reduction=reduction))
            if not isnan(total):
                raise Fail(f"{dtype} target {value}: the {reduction} is {total}, expected NaN")


@check(TOPIC)
def check_target_auto_raises_or_gives_nan(ctx: Context) -> None:
    """An error where values are at hand, else NaN."""
    for dtype, value in _WRONG:
        if not ctx.has_dtype(dtype):
            continue
        y = ctx.integers([0, value, 2, 4], dtype)
        if ctx.value_access in (HOST, LAZY):
            _invalid(ctx, ctx.loss, _scores(ctx), y)
        else:
            loss = ctx.read(ctx.loss(_scores(ctx), y))
            if not isnan(loss):
                raise Fail(f"{dtype} target {value}: the mean is {loss}, expected NaN")


@check(TOPIC)
def valid_targets_pass_in_every_mode(ctx: Context) -> None:
    """The first and the last class are accepted, and give one loss in all modes."""
    target = [0, 4, 1, 0]
    wanted = reference([SCORES] * N, target)
    modes = ["auto", "nan"] if ctx.value_access == TRACED else ["auto", "nan", "raise"]
    for mode in modes:
        ctx.agrees(_scores(ctx), ctx.integers(target), wanted, mode, check_target=mode)
