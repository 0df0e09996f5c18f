"""Checks: what is not accepted, in which order, and that the message says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType, SimpleNamespace
from typing import Any

from mml_arrayapi import InvalidTargetError
from mml_arrayapi.conformance.context import Context, Fail
from mml_arrayapi.conformance.suite import check
from mml_arrayapi.libraries import TRACED

TOPIC = "arguments"


class Foreign:
    """An array of no library that there is, as far as argument checks look."""

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.shape, self.ndim, self.dtype = shape, len(shape), dtype

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        kinds = {"integral": "int", "real floating": "float"}
        xp: Any = ModuleType("another_library")
        xp.isdtype = lambda dtype, kind: dtype.startswith(kinds.get(kind, "?"))
        xp.finfo = lambda _: SimpleNamespace(bits=32)
        return xp


@dataclass(frozen=True, slots=True)
class _Fault:
    name: str
    kind: type[Exception]
    words: tuple[str, ...]  # what the message must hold: the argument first


# In the contract's order.
_FAULTS = (
    _Fault("reduction", ValueError, ("reduction", "'average'", "mean", "sum", "none")),
    _Fault("p", ValueError, ("p", "0.5", ">= 1")),
    _Fault("margin", ValueError, ("margin", "inf", "finite")),
    _Fault("weight rank", ValueError, ("weight", "shape", "(1, ")),
    _Fault("input shape", ValueError, ("input", "class", "(3, 0)")),
    _Fault("target shape", ValueError, ("target", "shape", "(4,)", "(3,)")),
    _Fault("weight size", ValueError, ("weight", "shape", "(7")),
    _Fault("input dtype", TypeError, ("input", "floating", "int")),
    _Fault("target dtype", TypeError, ("target", "integer", "float")),
    _Fault("weight dtype", TypeError, ("weight", "floating", "int")),
    _Fault("library", TypeError, ("target", "library", "another_library")),
    _Fault("target range", InvalidTargetError, ("target", "2", "0 to 1")),
)


def _call(ctx: Context, faults: set[str]) -> Any:
    """Call the loss with some faults, on 3 samples of 2 classes."""
    classes, n = (0 if "input shape" in faults else 2), (4 if "target shape" in faults else 3)
    integer = ctx.integer()
    size = 7 if "weight size" in faults else 2
    x = ctx.full((3, classes), 0, integer if "input dtype" in faults else ctx.dtype)
    kind = ctx.dtype if "target dtype" in faults else integer
    y = ctx.full((n,), 2 if "target range" in faults else 0, kind)
    if "library" in faults:
        y = Foreign((n,), "float32" if "target dtype" in faults else "int64")
    weight = ctx.full(
        (1, size) if "weight rank" in faults else (size,),
        1,
        integer if "weight dtype" in faults else ctx.dtype,
    )
    return ctx.loss(
        x,
        y,
        weight=weight,
        reduction="average" if "reduction" in faults else "mean",
        p=0.5 if "p" in faults else 1,
        margin=float("inf") if "margin" in faults else 1.0,
        check_target="auto" if ctx.value_access == TRACED else "raise",
    )


def _says(error: Exception, words: tuple[str, ...]) -> None:
    text = str(error)
    if not re.match(rf"{words[0]}\b", text) or not all(word in text for word in words):
        raise Fail(f"the message {text!r} does not start with {words[0]!r} and name {words[1:]}")


def _possible(ctx: Context) -> tuple[_Fault, ...]:
    return _FAULTS[:-1] if ctx.value_access == TRACED else _FAULTS


@check(TOPIC)
def faults_raise_and_name_what_is_accepted(ctx: Context) -> None:
    """Each by itself; the message names the argument, what was given and what is accepted."""
    for fault in _possible(ctx):
        late = fault.kind is InvalidTargetError
        raised = ctx.raised_when_read if late else ctx.raised
        error = raised(fault.kind, _call, ctx, {fault.name})
        _says(error, fault.words)


@check(TOPIC)
def faults_are_found_in_the_documented_order(ctx: Context) -> None:
    """Every pair of faults, and all that follow one: the earlier in the order is named."""
    faults = _possible(ctx)
    groups = [*combinations(faults, 2), *(faults[i:] for i in range(len(faults) - 2))]
    for group in groups:
        names = {fault.name for fault in group}
        if names == {"library", "target range"}:
            continue  # targets of another library aren't looked into
        error = ctx.raised(group[0].kind, _call, ctx, names)
        if not isinstance(error, TypeError) or group[0].kind is TypeError:
            try:
                _says(error, group[0].words[:2])
            except Fail:
                raise Fail(
                    f"with {sorted(names)} at fault, {group[0].name} comes first, but the "
                    f"message is {str(error)!r}"
                ) from None


@check(TOPIC)
def numbers_of_other_kinds_are_refused(ctx: Context) -> None:
    """``p``, ``margin``, ``axis``, ``reduction``, ``check_target``, ``backend``."""
    x, y = ctx.array([[0.0, 1.0]]), ctx.integers([0])
    nan, inf = float("nan"), float("inf")
    for name, value, kind in (
        ("p", 0.999, ValueError),
        ("p", -1, ValueError),
        ("p", nan, ValueError),
        ("p", inf, ValueError),
        ("p", "1", TypeError),
        ("p", True, TypeError),
        ("p", 1j, TypeError),
        ("p", None, TypeError),
        ("margin", nan, ValueError),
        ("margin", -inf, ValueError),
        ("margin", "1", TypeError),
        ("margin", False, TypeError),
        ("axis", 2, ValueError),
        ("axis", -3, ValueError),
        ("axis", 1.0, TypeError),
        ("axis", None, TypeError),
        ("reduction", "Mean", ValueError),
        ("reduction", None, TypeError),
        ("check_target", "ignore", ValueError),
        ("backend", "no-such-kernel", ValueError),
    ):
        for function in (ctx.loss, ctx.loss_and_grad):
            error = ctx.raised(kind, function, x, y, **{name: value})
            _says(error, (name,))


@check(TOPIC)
def scores_must_be_real_floating(ctx: Context) -> None:
    """Integers, bools and complex numbers are a TypeError that says so; for weight too."""
    y = ctx.integers([0])
    for dtype in ("int64", "int32", "int8", "uint8", "bool", "complex64", "complex128"):
        if not ctx.has_dtype(dtype):
            continue
        x, good = ctx.full((1, 2), 0, dtype), ctx.full((1, 2), 0)
        error = ctx.raised(TypeError, ctx.loss, x, y)
        _says(error, ("input", "floating", dtype))
        weight = ctx.full((2,), 1, dtype)
        error = ctx.raised(TypeError, ctx.loss, good, y, weight=weight)
        _says(error, ("weight", "floating", dtype))


@check(TOPIC)
def targets_must_be_integers(ctx: Context) -> None:
    """Bools and floats are a TypeError that says so."""
    x = ctx.full((1, 2), 0.0)
    for dtype in ("bool", *ctx.floating()):
        if ctx.has_dtype(dtype):
            y = ctx.full((1,), 0, dtype)
            error = ctx.raised(TypeError, ctx.loss, x, y)
            _says(error, ("target", "integer", dtype))


@check(TOPIC)
def libraries_are_not_mixed(ctx: Context) -> None:
    """A TypeError that names both; plain lists are no arrays either."""
    x, y = ctx.array([[0.0, 1.0]]), ctx.integers([0])
    foreign_y, foreign_w = Foreign((1,), "int64"), Foreign((2,), "float32")
    for error in (
        ctx.raised(TypeError, ctx.loss, x, foreign_y),
        ctx.raised(TypeError, ctx.loss, x, y, weight=foreign_w),
        ctx.raised(TypeError, ctx.loss_and_grad, x, y, grad_output=Foreign((), "float32")),
    ):
        if "another_library" not in str(error) or ctx.library not in str(error):
            raise Fail(f"the message {str(error)!r} does not name both libraries")
    for given, name in (
        (([[0.0, 1.0]], y, None), "input"),
        ((x, [0], None), "target"),
        ((x, y, [1.0, 1.0]), "weight"),
    ):
        scores, target, weight = given
        _says(ctx.raised(TypeError, ctx.loss, scores, target, weight=weight), (name,))


@check(TOPIC)
def grad_output_is_checked(ctx: Context) -> None:
    """Its shape is the loss's, its dtype real floating."""
    x, y = ctx.array([[0.0, 1.0]] * 3), ctx.integers([0, 1, 0])
    for reduction, shape in (("none", ()), ("none", (2,)), ("mean", (3,)), ("sum", (1,))):
        up = ctx.full(shape, 1.0)
        error = ctx.raised(ValueError, ctx.loss_and_grad, x, y, reduction=reduction, grad_output=up)
        _says(error, ("grad_output", "shape", str(shape)))
    up = ctx.full((), 1, ctx.integer())
    error = ctx.raised(TypeError, ctx.loss_and_grad, x, y, grad_output=up)
    _says(error, ("grad_output", "floating"))
