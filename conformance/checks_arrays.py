"""Checks: how arrays are treated, whatever is in them; and that implementations agree."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from math import inf, nan
from typing import Any
from unittest import mock

from mml_arrayapi.conformance.context import Context, Fail, NotRun
from mml_arrayapi.conformance.reference import reference
from mml_arrayapi.conformance.suite import check
from mml_arrayapi.libraries import LAZY

TOPIC = "arrays"
AGREEMENT = "agreement"


@check(TOPIC)
def inputs_are_not_changed(ctx: Context) -> None:
    """Scores, targets, weight and grad_output keep their values."""
    given = {
        "input": ctx.array([[0.0, nan, 1.0], [0.5, 1.0, -inf], [1.0, 2.0, 3.0]]),
        "target": ctx.integers([0, 1, 2]),
        "weight": ctx.array([1.0, -2.0, 0.5]),
        "grad_output": ctx.array([1.0, 2.0, 3.0]),
    }
    before = {name: repr(ctx.read(array)) for name, array in given.items()}
    for p in (1, 2, 1.5):
        results = ctx.loss_and_grad(**given, p=p, reduction="none")
        alone = ctx.loss(given["input"], given["target"], weight=given["weight"], p=p)
        for result in (*results, alone):
            ctx.read(result)
        for name, array in given.items():
            after = repr(ctx.read(array))
            if after != before[name]:
                raise Fail(f"p={p}: {name} was {before[name]} and is {after} after the call")


@check(TOPIC)
def results_keep_their_values(ctx: Context) -> None:
    """Another call of the same shape, with other scores, doesn't write into earlier results."""
    rows, y = ctx.scores(4, 5), ctx.integers([0, 3, 1, 4])
    x, other = ctx.array(rows), ctx.array([[-score for score in row] for row in rows])
    for p in (1, 2, 1.5):
        for reduction in ("none", "sum"):
            first = [ctx.loss(x, y, p=p, reduction=reduction)]
            first += ctx.loss_and_grad(x, y, p=p, reduction=reduction)
            before = [repr(ctx.read(result)) for result in first]
            ctx.read(ctx.loss(other, y, p=p, reduction=reduction))
            for result in ctx.loss_and_grad(other, y, p=p, reduction=reduction):
                ctx.read(result)
            after = [repr(ctx.read(result)) for result in first]
            if after != before:
                raise Fail(f"p={p}, reduction={reduction}: a result was {before}, and is {after}")


@check(TOPIC)
def read_only_inputs_are_accepted(ctx: Context) -> None:
    """Arrays that can't be written to."""
    rows, target = ctx.scores(), [0, 3, 1, 4]
    arrays = ctx.array(rows), ctx.integers(target), ctx.array([1.0, 2.0, 0.5, 1.0, 3.0])
    for array in arrays:
        try:
            array.flags.writeable = False
        except (AttributeError, TypeError, ValueError):
            raise NotRun(f"{ctx.library} offers no read-only arrays to try") from None
    x, y, weight = arrays
    wanted = reference(rows, target, p=2, weight=[1.0, 2.0, 0.5, 1.0, 3.0])
    ctx.agrees(x, y, wanted, p=2, weight=weight)


@check(TOPIC, every_dtype=True)
def slices_with_steps_are_accepted(ctx: Context) -> None:
    """Every second row and third column of a larger array; every second target and weight."""
    wide, spread, heavy = ctx.scores(8, 15), ctx.targets(8, 5), [0.5, 9.0, 1.5, 9.0, 2.0] * 2
    rows, target, weight = [row[1::3] for row in wide[::2]], spread[::2], heavy[::2]
    whole = ctx.array(wide), ctx.integers(spread), ctx.array(heavy)
    x = ctx.note(whole[0][::2, 1::3], f"{ctx.source(whole[0])}[::2, 1::3]")
    y = ctx.note(whole[1][::2], f"{ctx.source(whole[1])}[::2]")
    w = ctx.note(whole[2][::2], f"{ctx.source(whole[2])}[::2]")
    ctx.agrees(x, y, reference(rows, target, p=2, weight=weight), p=2, weight=w)


@check(TOPIC, every_dtype=True)
def transposed_inputs_are_accepted(ctx: Context) -> None:
    """Scores laid out with the classes first."""
    rows, target = ctx.scores(), ctx.targets()
    columns = ctx.array([list(column) for column in zip(*rows, strict=True)])
    source = f"xp.permute_dims({ctx.source(columns)}, (1, 0))"
    x = ctx.note(ctx.xp.permute_dims(columns, (1, 0)), source)
    ctx.agrees(x, ctx.integers(target), reference(rows, target))
    y = ctx.integers(target)
    loss, grad = ctx.loss_and_grad(columns, y, axis=0, reduction="none")
    wanted = reference(rows, target)
    ctx.same(loss, wanted.losses, wanted.loss_scales, "axis=0: losses")
    turned = [list(column) for column in zip(*wanted.grad, strict=True)]
    scales = [list(column) for column in zip(*wanted.grad_scales, strict=True)]
    ctx.same(grad, turned, scales, "axis=0: gradient")


@check(TOPIC)
def broadcast_inputs_are_accepted(ctx: Context) -> None:
    """One row of scores that stands for all: strides of 0, memory that overlaps itself."""
    row, target = ctx.scores(1, 4), [0, 1, 2, 3]
    one = ctx.array(row)
    source = f"xp.broadcast_to({ctx.source(one)}, (4, 4))"
    x = ctx.note(ctx.xp.broadcast_to(one, (4, 4)), source)
    ctx.agrees(x, ctx.integers(target), reference(row * 4, target))


@check(TOPIC)
def threads_do_not_disturb_each_other(ctx: Context) -> None:
    """Eight threads, each with numbers of its own."""
    problems = []
    for i in range(8):
        rows, target, p = ctx.scores(8, 9), ctx.targets(8, 9), (1, 2, 1.5, 1)[i % 4]
        weight = ctx.array([1.0 + j * i / 8 for j in range(9)]) if i % 3 else None
        problems.append((ctx.array(rows), ctx.integers(target), {"p": p, "weight": weight}))

    def work(problem: tuple[Any, Any, dict[str, Any]]) -> list[Any]:
        x, y, options = problem
        results = list(ctx.loss_and_grad(x, y, reduction="none", **options))
        results += [ctx.loss(x, y, reduction=name, **options) for name in ("none", "mean", "sum")]
        return [ctx.read(result) for result in results]

    alone = [work(problem) for problem in problems]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, problems * 2))
    if repr(together) != repr(alone * 2):
        raise Fail("results of eight threads at once differ from those of one")


@check(TOPIC)
def nothing_is_computed_before_it_is_asked_for(ctx: Context) -> None:
    """A lazy library's values are not looked at by the call; wrong targets raise later."""
    if not ctx.lazy:
        raise NotRun(f"arrays of {ctx.library} are not lazy")
    x, weight = ctx.array([[0.0, 1.0], [0.5, 2.0]]), ctx.array([1.0, 2.0])
    modes = ["auto", "nan", "raise"] if ctx.value_access == LAZY else ["auto", "nan"]
    for target in ([0, 1], [0, 2]):
        y = ctx.integers(target)
        for mode in modes:
            for reduction in ("none", "mean"):
                with _watched(type(x)) as looks:
                    ctx.loss(x, y, weight=weight, check_target=mode, reduction=reduction)
                    ctx.loss_and_grad(x, y, p=1.5, check_target=mode, reduction=reduction)
                if looks:
                    raise Fail(f"check_target={mode!r}: the call itself used {', '.join(looks)}")


_LOOKS = ("__bool__", "__int__", "__float__", "__index__", "__complex__", "__array__", "compute",
          "persist", "item", "tolist")  # fmt: skip


@contextmanager
def _watched(kind: type) -> Iterator[list[str]]:
    """Note which of an array type's ways to its values are used."""
    used: list[str] = []

    def noting(name: str, original: Any) -> Any:
        def look(*args: Any, **keywords: Any) -> Any:
            value = original(*args, **keywords)
            used.append(name)  # one that raises has computed nothing
            return value

        return look

    with ExitStack() as stack:
        for name in _LOOKS:
            original = getattr(kind, name, None)
            if original is None:
                continue
            try:
                stack.enter_context(mock.patch.object(kind, name, noting(name, original)))
            except (TypeError, AttributeError):
                raise NotRun(f"{kind.__name__}.{name} can't be watched") from None
        if hasattr(kind, "__dask_graph__"):
            callback = sys.modules["dask.callbacks"].Callback
            stack.enter_context(callback(start=lambda _: used.append("a Dask scheduler")))
        yield used


@check(AGREEMENT, every_dtype=True)
def specialised_kernel_agrees_with_the_generic_code(ctx: Context) -> None:
    """Where one runs: ordinary and special values, all reductions."""
    rows = [*ctx.scores(30, 17), [nan] * 17, [0.0, inf] + [1.0] * 15, [-inf] * 8 + [1.0] * 9]
    target = ctx.targets(33, 17)
    x, y = ctx.array(rows), ctx.integers(target)
    chosen = ctx.kernel(x, y)
    if chosen.kernel == "generic":
        raise NotRun("this is the generic code")
    weight = [1.0 + i / 16 for i in range(17)]
    for p in (1, 2, 1.5):
        scale = reference(rows, target, p=p, weight=weight)
        keywords: dict[str, Any] = {"p": p, "weight": ctx.array(weight)}
        if ctx.kernel(x, y, **keywords).kernel == "generic":
            continue
        plain = ctx.loss_and_grad(x, y, reduction="none", **{**keywords, "backend": "generic"})
        loss, grad = ctx.loss_and_grad(x, y, reduction="none", **keywords)
        ctx.same(loss, ctx.read(plain[0]), scale.loss_scales, f"p={p}: losses")
        ctx.same(grad, ctx.read(plain[1]), scale.grad_scales, f"p={p}: gradient")


@check(AGREEMENT, every_dtype=True)
def libraries_agree_with_each_other(ctx: Context) -> None:
    """The first library that was named, and this one, on the same numbers."""
    other = ctx.other
    if other is None:
        raise NotRun("give a second --xp to compare with")
    if not other.has_dtype(ctx.dtype):
        raise NotRun(f"{other.library} has no {ctx.dtype}")
    for p in (1, 2, 1.5):
        rows, target = ctx.scores(), ctx.targets()
        scale = reference(rows, target, p=p)
        theirs = other.loss_and_grad(
            other.array(rows), other.integers(target), p=p, reduction="none"
        )
        ours = ctx.loss_and_grad(ctx.array(rows), ctx.integers(target), p=p, reduction="none")
        ctx.same(ours[0], other.read(theirs[0]), scale.loss_scales, f"p={p}: losses")
        ctx.same(ours[1], other.read(theirs[1]), scale.grad_scales, f"p={p}: gradient")
