"""Checks: all options together, in a few hundred cases. Each by itself has checks elsewhere.

An infinite ``grad_output`` is no value here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, prod
from typing import Any, NamedTuple

from mml_arrayapi.conformance.context import Context, Fail, NotRun, rounded
from mml_arrayapi.conformance.covering import covering
from mml_arrayapi.conformance.reference import Reference, reference
from mml_arrayapi.conformance.suite import check
from mml_arrayapi.libraries import TRACED

TOPIC = "combinations of options"

_VALUES = {
    "axes": (1, 2, 3, 4),
    "place": ("first", "middle", "last"),
    "size": ("few", "few", "few", "many samples", "many classes", "one class"),
    "rows": ("numbers", "with NaN"),
    "scores": ("in order", "transposed", "every second"),  # so lie weight and grad_output, too
    "integers": ("int64", "int32", "int8", "uint8", "uint16"),
    "targets": ("in order", "transposed", "every second", "one for all"),
    "reduction": ("none", "mean", "sum"),
    "p": (1, 1.5, 2),
    "margin": (0.7, 0.0, -0.5),
    "weight": (None, "own", "float64"),
    "ignored": (None, "class 0", "-100", "all"),
    "checked": ("auto", "raise", "nan", "nan for some"),
    "grad_output": (None, "numbers", "NaN", "0"),
}

# Beside these, what the other options do is hard to see: much is 0 or NaN.
_HIDING = {
    ("size", "one class"),
    ("rows", "with NaN"),
    ("ignored", "all"),
    ("checked", "nan for some"),
    ("grad_output", "NaN"),
    ("grad_output", "0"),
}

_FIRST, _PATIENCE = 12, 30.0  # so many cases tell how long all take, which may be so many seconds


@dataclass(frozen=True, slots=True)
class Case:
    """A value of every option in :data:`_VALUES`."""

    axes: int
    place: str
    size: str
    rows: str
    scores: str
    integers: str
    targets: str
    reduction: str
    p: float
    margin: float
    weight: str | None
    ignored: str | None
    checked: str
    grad_output: str | None

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in _VALUES)

    @property
    def axis(self) -> int:
        """Where the classes are, counted from the end for the last axis."""
        return {"first": 0, "middle": self.axes // 2, "last": -1}[self.place]

    @property
    def n_classes(self) -> int:
        """Their number."""
        return {"few": 4, "many samples": 2, "many classes": 200, "one class": 1}[self.size]

    @property
    def batch(self) -> tuple[int, ...]:
        """The targets' shape."""
        few = (), (5,), (2, 3), (3, 2, 3)
        many = (), (2100,), (30, 70), (3, 10, 70)  # 70 samples, 30 times
        return (many if self.size == "many samples" else few)[self.axes - 1]

    @property
    def times(self) -> int:
        """How often the same samples come."""
        return 30 if self.size == "many samples" and self.axes > 1 else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The scores' shape."""
        at = self.axis % self.axes
        return (*self.batch[:at], self.n_classes, *self.batch[at:])

    @property
    def ignore_index(self) -> int | None:
        """The target of ignored samples."""
        return None if self.ignored is None else -100 if self.ignored == "-100" else 0


@check(TOPIC, every_dtype=True)
def any_two_options_work_together(ctx: Context) -> None:
    """Loss and gradient have the right values, dtypes and shapes, for all values of any two."""
    _walk(ctx, covering(_VALUES, _HIDING, 2, ctx.rng), inf)


@check(TOPIC)
def any_three_options_work_together(ctx: Context) -> None:
    """The same for all values of any three; not run where that would take long."""
    _walk(ctx, covering(_VALUES, _HIDING, 3, ctx.rng), _PATIENCE)


def _walk(ctx: Context, cases: Sequence[Mapping[str, Any]], patience: float) -> None:
    """Compare all cases but those that the kernel refuses."""
    refusals, start = [], time.perf_counter()
    for done, values in enumerate(cases):
        if done == _FIRST:
            seconds = (time.perf_counter() - start) / done * len(cases)
            if seconds > patience:
                raise NotRun(f"{len(cases)} cases would take {seconds:.0f} seconds")
        try:
            _compare(ctx, _possible(ctx, Case(**values)))
        except Exception as error:
            refusals.append(ctx.refusal(error))
            if refusals[-1] is None:
                raise
    if len(refusals) == len(cases):
        raise NotRun(refusals[0])


def _possible(ctx: Context, case: Case) -> Case:
    """Replace what the library doesn't have."""
    traced = ctx.value_access == TRACED and case.checked == "raise"
    return replace(
        case,
        integers=case.integers if ctx.has_dtype(case.integers) else ctx.integer(),
        weight=case.weight if case.weight is None or ctx.has_dtype(case.weight) else ctx.dtype,
        checked="auto" if traced else case.checked,
    )


def _compare(ctx: Context, case: Case) -> None:
    """Compare the loss alone, then loss and gradient, with the reference."""
    rows, target, weight = _rows(ctx, case), _target(ctx, case), _weight(ctx, case)
    options: dict[str, Any] = {
        "p": case.p,
        "margin": case.margin,
        "ignore_index": case.ignore_index,
    }
    few = len(rows) // case.times
    wanted = reference(rows[:few], target[:few], weight=weight, **options).repeated(case.times)
    if ctx.dtype == "float64" and "many" in case.size:
        wanted = wanted.loosened(2.0**7)  # rounding errors of plain sums of so many terms
    layout = case.scores
    options |= {
        "weight": None if weight is None else _laid_out(ctx, weight, layout, str(case.weight)),
        "reduction": case.reduction,
        "axis": case.axis,
        "check_target": case.checked.split()[0],
    }
    x = _laid_out(ctx, _at_axis(rows, case), layout, ctx.dtype)
    y = _laid_out(ctx, _nested(target, case.batch), case.targets, case.integers)
    loss = _wanted_loss(case, wanted)
    _is(ctx, case, ctx.loss(x, y, **options), loss)
    if ctx.kernel(x, y, backend=None, **options).kernel == ctx.backend:
        # A kernel that isn't asked for by name may have a shorter way (`Kernel.direct`).
        _is(ctx, case, ctx.loss(x, y, backend=None, **options), loss)
    upstream, grad_output = _upstream(ctx, case), None
    if case.grad_output is not None:
        values = _nested(upstream, case.batch if case.reduction == "none" else ())
        grad_output = _laid_out(ctx, values, layout, ctx.dtype)
    got = ctx.loss_and_grad(x, y, grad_output=grad_output, **options)
    _is(ctx, case, got[0], loss)
    _is(ctx, case, got[1], _wanted_grad(case, wanted, target, upstream))


# What is computed with


def _rows(ctx: Context, case: Case) -> list[list[float]]:
    """Draw scores on a grid, so that some differences lie at a kink."""
    grid = [i / 8 for i in range(-8, 9)]
    n = prod(case.batch) // case.times
    rows = [ctx.rng.choices(grid, k=case.n_classes) for _ in range(n)]
    if case.rows == "with NaN":
        for row in rows[:2]:  # of which one may be ignored
            row[ctx.rng.randrange(case.n_classes)] = nan
    return rows * case.times


def _target(ctx: Context, case: Case) -> list[int]:
    """Draw classes that the dtype holds; then some that are none, and some that are ignored."""
    signed, bits = case.integers.startswith("i"), int(case.integers.lstrip("uint"))
    n, index = prod(case.batch) // case.times, case.ignore_index
    target = [ctx.rng.randrange(min(case.n_classes, 2 ** (bits - signed))) for _ in range(n)]
    if case.checked == "nan for some":
        target[2::5] = [-1 if signed else 2**bits - 1] * len(target[2::5])
    if index is not None and (signed or index >= 0):
        ignored = slice(None) if case.ignored == "all" else slice(1, None, 3)
        target[ignored] = [index] * len(target[ignored])
    target *= case.times
    if case.targets == "one for all" and case.batch:
        target = target[: len(target) // case.batch[0]] * case.batch[0]
    return target


def _weight(ctx: Context, case: Case) -> list[float] | None:
    """Draw positive and negative numbers, and some 0."""
    if case.weight is None:
        return None
    signs = (1, -1, 0, 1) * case.n_classes
    sizes = [rounded(ctx.rng.uniform(0.5, 2.0), case.weight) for _ in range(case.n_classes)]
    return [sign * size for sign, size in zip(signs, sizes, strict=False)]


def _upstream(ctx: Context, case: Case) -> list[float]:
    """Draw what each sample's loss is multiplied by; that is one number if they are reduced."""
    n = prod(case.batch)
    number = {None: 1.0, "numbers": 2.5, "NaN": nan, "0": 0.0}[case.grad_output]
    if case.grad_output is None or case.reduction != "none":
        return [number] * n
    return [number, *ctx.rng.choices((number, -0.5), k=n - 1)]


# Arrays, and nested lists of what is in them


def _nested(values: list[Any], shape: tuple[int, ...]) -> Any:
    """Nest a list; of the shape () it is its only element."""
    if len(shape) < 2:
        return values if shape else values[0]
    step = len(values) // shape[0]
    return [_nested(values[i : i + step], shape[1:]) for i in range(0, len(values), step)]


def _at_axis(rows: list[list[float]], case: Case) -> Any:
    """Nest rows, one per sample, as an array of the scores' shape."""
    axis = case.axis % case.axes
    inner = case.batch[axis:]
    if not inner:
        return _nested(rows, case.batch)
    blocks = [rows[i : i + prod(inner)] for i in range(0, len(rows), prod(inner))]
    columns = [[list(column) for column in zip(*block, strict=True)] for block in blocks]
    return _nested([_nested(c, inner) for block in columns for c in block], case.shape[: axis + 1])


def _laid_out(ctx: Context, values: Any, layout: str, dtype: str) -> Any:
    """Make an array that lies in memory as a layout says, where a library has such layouts."""
    plain = ctx.array(values, dtype)
    xp, shape = ctx.xp, tuple(plain.shape)
    if layout == "in order" or not shape:
        return plain
    if layout == "transposed":
        order = tuple(range(len(shape)))[::-1]
        turned = ctx.array(ctx.read(xp.permute_dims(plain, order)), dtype)
        source = f"xp.permute_dims({ctx.source(turned)}, {order})"
        return ctx.note(xp.permute_dims(turned, order), source)
    if layout == "every second":
        wide = ctx.array(_spread(values), dtype)
        return ctx.note(wide[..., ::2], f"{ctx.source(wide)}[..., ::2]")
    one = ctx.array(values[:1], dtype)
    source = f"xp.broadcast_to({ctx.source(one)}, {shape})"
    return ctx.note(xp.broadcast_to(one, shape), source)


def _spread(values: Any) -> Any:
    """Put another number behind each."""
    if isinstance(values[0], list):
        return [_spread(part) for part in values]
    return [number for value in values for number in (value, 1)]


# What must come out


class _Wanted(NamedTuple):
    what: str
    shape: tuple[int, ...]
    values: Any
    scales: Any


def _wanted_loss(case: Case, wanted: Reference) -> _Wanted:
    if case.reduction == "none":
        losses, scales = (_nested(v, case.batch) for v in (wanted.losses, wanted.loss_scales))
        return _Wanted("losses", case.batch, losses, scales)
    return _Wanted("loss", (), *wanted.total(case.reduction))


def _wanted_grad(
    case: Case, wanted: Reference, target: list[int], upstream: list[float]
) -> _Wanted:
    count = max(wanted.count, 1) if case.reduction == "mean" else 1
    # What is ignored has a gradient of 0, whatever it is multiplied by.
    factors = [
        0.0 if y == case.ignore_index else factor / count
        for y, factor in zip(target, upstream, strict=True)
    ]
    scaled = wanted.scaled(factors)
    grad, scales = (_at_axis(rows, case) for rows in (scaled.grad, scaled.grad_scales))
    return _Wanted("gradient", case.shape, grad, scales)


def _is(ctx: Context, case: Case, got: Any, wanted: _Wanted) -> None:
    """Fail unless a result has the shape, the dtype and the values that it should have."""
    what, shape, values, scales = wanted
    if tuple(got.shape) != shape or got.dtype != getattr(ctx.xp, ctx.dtype):
        found = f"has shape {tuple(got.shape)} and dtype {got.dtype}"
        raise Fail(f"{case}: {what} {found}, expected {shape} and {ctx.dtype}")
    ctx.same(got, values, scales, f"{case}: {what}")
