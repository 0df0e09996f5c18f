"""How many tasks there are, what they are called, and what is computed once."""

import math

import dask
import dask.array as da
import numpy as np
import pytest

import mml_arrayapi as mml
from tests.backends.dask.conftest import EXPRESSIONS

RNG = np.random.default_rng(0)
C = 6

pytestmark = pytest.mark.filterwarnings("ignore:The 'array.query-planning':RuntimeWarning")


def graph_of(*arrays):
    made = {}
    # dask.optimize() of the query planner's arrays fails where anything is rechunked.
    for array in arrays if EXPRESSIONS else dask.optimize(*arrays):
        made |= dict(array.__dask_graph__())
    return made


def lazy(n, made=True):
    """Scores and targets in n chunks of 4 rows, by a function or from memory."""
    if made:
        return da.zeros((4 * n, C), chunks=(4, C), dtype="f4"), da.zeros(4 * n, dtype=int, chunks=4)
    scores = da.from_array(np.zeros((4 * n, C), np.float32), chunks=(4, C))
    return scores, da.from_array(np.zeros(4 * n, np.int64), chunks=4)


@pytest.mark.parametrize("made", [True, False], ids=["made", "from_memory"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tasks_of_the_loss_are_those_of_a_sum(made, reduction):
    n = 300
    scores, target = lazy(n, made)
    bare = len(graph_of(scores.sum()))
    loss = len(graph_of(mml.multi_margin_loss(scores, target, reduction=reduction)))
    extra = 3 * n if EXPRESSIONS and reduction == "none" else 0  # layers are not fused there
    assert loss <= 1.1 * bare + n + extra


@pytest.mark.parametrize("made", [True, False], ids=["made", "from_memory"])
def test_tasks_of_the_gradient(made):
    n = 300
    scores, target = lazy(n, made)
    loss, grad = mml.multi_margin_loss_and_grad(scores, target)
    given = 0 if made else 2 * n  # the chunks themselves
    if EXPRESSIONS:  # the chunks, and their places
        given = 3 * n
    assert len(graph_of(grad)) <= 2 * n + given
    assert len(graph_of(loss, grad)) <= 3 * n + given + n // 10


@pytest.mark.parametrize("chunks", [(4, C), (4, 2)], ids=["rows", "both"])
def test_every_task_says_what_it_is(chunks):
    """Dashboards group tasks by the beginnings of their names."""
    scores = RNG.standard_normal((12, C))
    for x, y, w in (
        (da.from_array(scores, chunks=chunks), RNG.integers(0, C, 12), RNG.random(C)),
        (da.zeros((12, C), chunks=chunks), da.zeros(12, dtype=int, chunks=4), da.ones(C, chunks=C)),
    ):
        loss = mml.multi_margin_loss(x, y, weight=w)
        pair = mml.multi_margin_loss_and_grad(x, y, weight=w, ignore_index=0)
        given = ("array", "fromarray", "zeros", "ones", "full_like", "Array")
        for name in {dask.utils.key_split(key) for key in graph_of(loss, *pair)}:
            assert name.startswith(("multi_margin_loss", *given)), name
        assert dask.utils.key_split(loss.name).startswith("multi_margin_loss")
        assert dask.utils.key_split(pair[1].name) == "multi_margin_loss_grad"


def counted(visits, array, name):
    def visit(block):
        visits.append(name)
        return block

    return array.map_blocks(visit, dtype=array.dtype, meta=np.empty((0,) * array.ndim, array.dtype))


@pytest.mark.parametrize("chunks", [(4, C), (4, 2)], ids=["rows", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_producers_run_once_for_loss_gradient_and_accuracy(chunks, reduction):
    visits = []
    scores = counted(visits, da.from_array(RNG.standard_normal((12, C)), chunks=chunks), "scores")
    target = counted(visits, da.from_array(RNG.integers(0, C, 12), chunks=4), "target")
    weight = counted(visits, da.from_array(RNG.random(C), chunks=C), "weight")
    alone = mml.multi_margin_loss(scores, target, weight=weight, reduction=reduction)
    pair = mml.multi_margin_loss_and_grad(scores, target, weight=weight, reduction=reduction)
    best = (scores.max(axis=1) > target).mean()
    for wanted in ((alone,), (pair[1],), pair, (alone, *pair, best)):
        visits.clear()
        dask.compute(*wanted, scheduler="synchronous")
        found = {name: visits.count(name) for name in ("scores", "target", "weight")}
        assert found == {"scores": math.prod(scores.numblocks), "target": 3, "weight": 1}


@pytest.mark.parametrize("upstream", [(), (12,)], ids=["mean", "none"])
def test_what_the_gradient_is_multiplied_with_is_computed_once(upstream):
    visits = []
    given = da.from_array(RNG.standard_normal(upstream), chunks=4 if upstream else ())
    given = counted(visits, given, "upstream")
    scores = da.from_array(RNG.standard_normal((12, C)), chunks=(4, C))
    grad = mml.multi_margin_loss_and_grad(
        scores,
        RNG.integers(0, C, 12),
        reduction="none" if upstream else "mean",
        grad_output=given,
    )[1]
    grad.compute(scheduler="synchronous")
    assert len(visits) == (3 if upstream else 1)


def test_the_tree_of_sums_has_dasks_signature():
    """The one private function of Dask that is used; ``da.reduction`` adds a task per chunk."""
    import inspect

    from dask.array.reductions import _tree_reduce

    assert list(inspect.signature(_tree_reduce).parameters) == [
        *("x", "aggregate", "axis", "keepdims", "dtype", "split_every"),
        *("combine", "name", "concatenate", "reduced_meta"),
    ]
