"""What a task gets: chunks that travelled, masked ones, ignored samples, sums of large numbers."""

import itertools
import math
import pickle

import dask
import dask.array as da
import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.backends import cpu
from mml_arrayapi.backends.dask import chunks
from mml_arrayapi.backends.dask.alignment import TaskOptions
from mml_arrayapi.kernel import Kernel, Unusable
from mml_arrayapi.registry import isolated, register_kernel
from tests.backends.dask.conftest import EXPRESSIONS

RNG = np.random.default_rng(0)
N, C = 60, 33
IN_CHUNKS = pytest.mark.usefixtures("chunks_of_classes")


@pytest.fixture(autouse=True)
def _synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def unaligned(array):
    """The same values, one byte further on: what comes over TCP lies anywhere, and is read-only."""
    memory = np.empty(array.nbytes + 1, np.uint8)[1:]
    moved = memory.view(array.dtype).reshape(array.shape[::-1] if _is_f(array) else array.shape)
    moved = moved.T if _is_f(array) else moved
    moved[...] = array
    moved.flags.writeable = False
    assert not moved.flags.aligned
    return moved


def _is_f(array):
    return array.flags.f_contiguous and not array.flags.c_contiguous


LAYOUTS = {
    "C": lambda x: x,
    "Fortran": np.asfortranarray,
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "every second class": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "part of the classes": lambda x: np.concatenate([x, x], axis=1)[:, : x.shape[1]],
    "rows of Fortran": lambda x: np.asfortranarray(np.concatenate([x, x]))[: len(x)],
    "backwards": lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
}


def journey(array):
    return {
        "sent": pickle.loads(pickle.dumps(array, protocol=5)),
        "sent unaligned": unaligned(pickle.loads(pickle.dumps(array, protocol=5))),
    }


def call(reduction="none", backend=None, **options):
    made = TaskOptions(1.0, 1.0, reduction, None, 1, "raise")._replace(**options)
    return chunks.Call(made, C, np.dtype("f4"), backend, (C,))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("dtype", ["f4", "f8", "f2"])
def test_bits_and_kernel_do_not_depend_on_a_journey(layout, backend, dtype):
    scores = LAYOUTS[layout](RNG.standard_normal((N, C)).astype(dtype))
    target, weight = RNG.integers(0, C, N), RNG.random(C)
    place = (slice(0, N), slice(0, C))
    how = call(backend=backend)._replace(dtype=scores.dtype)
    here = chunks.loss_and_grad_of_rows(scores, place, target, None, 1.0, weight, call=how)
    kernel = chunks._run([scores], target, weight, how)[0].ran
    for sent in journey(scores).values():
        there = chunks.loss_and_grad_of_rows(
            sent, place, unaligned(target), None, 1.0, unaligned(weight), call=how
        )
        for a, b in zip(here, there, strict=True):
            assert a.tobytes() == b.tobytes()
        assert chunks._run([sent], target, weight, how)[0].ran == kernel


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [None, "generic"])
def test_parts_of_the_classes_do_not_depend_on_a_journey(layout, backend):
    scores = LAYOUTS[layout](RNG.standard_normal((N, C)).astype(np.float32))
    target = RNG.integers(0, 3 * C, N)
    place = (slice(0, N), slice(C, 2 * C))
    how = call(backend=backend)._replace(n_classes=3 * C)

    def run(scores, target):
        own = chunks.own_scores(scores, place, target, call=how)
        part = chunks.part_of_rows(scores, place, target, [own, own * 0], call=how, slopes=True)
        rows = chunks.rows_of_parts([part, part], target, None, call=how)
        grad = chunks.grad_of_part(scores, place, target, [own], rows, None, 1.0, None, call=how)
        return own, part.sums, part.slopes, rows.losses, grad

    here = run(scores, target)
    for sent in journey(scores).values():
        for a, b in zip(here, run(sent, unaligned(target)), strict=True):
            assert a.tobytes() == b.tobytes()


def test_an_unaligned_chunk_keeps_the_kernel():
    scores, target = RNG.standard_normal((N, C)).astype(np.float32), RNG.integers(0, C, N)
    wanted = mml.explain(scores, target).kernel
    for backend in (None, wanted):
        rows, _ = chunks._run([unaligned(scores)], target, None, call(backend=backend))
        assert [report.kernel for report in rows.ran] == [wanted]


def test_a_kernel_that_refuses_unaligned_arrays_gets_a_copy():
    seen = []

    def refuses(problem):
        return None if problem.input.flags.aligned else "input is not aligned"

    def loss(problem):
        seen.append(problem.input)
        return np.zeros(problem.target.shape, np.float32)

    mml.register_kernel(mml.Kernel("choosy", "numpy", refuses, loss, loss, before="numpy-cpu"))
    try:
        scores, target = RNG.standard_normal((N, C)).astype(np.float32), RNG.integers(0, C, N)
        moved = unaligned(scores)
        rows, _ = chunks._run([moved], target, None, call(backend="choosy"))
    finally:
        mml.unregister_kernel("choosy")
    assert seen[0].flags.aligned
    assert seen[0].tobytes() == scores.tobytes()
    assert rows.losses.shape == (N,)


@IN_CHUNKS
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("cut", [(7, C), (7, 5)], ids=["rows", "both"])
@pytest.mark.parametrize("which", ["input", "target"])
def test_masked_chunks_are_refused(backend, cut, which):
    scores, target = RNG.standard_normal((N, C)), RNG.integers(0, C, N)
    x, y = da.from_array(scores, chunks=cut), da.from_array(target, chunks=7)
    plain = x if which == "input" else y
    masked = plain.map_blocks(np.ma.asarray, dtype=plain.dtype, meta=plain._meta)
    arrays = (masked, y) if which == "input" else (x, masked)
    with pytest.raises(TypeError, match=f"{which} must .*masked array"):
        mml.multi_margin_loss(*arrays, backend=backend).compute()


@pytest.mark.parametrize("which", ["input", "target", "weight"])
def test_arrays_that_say_they_are_masked_are_refused_at_once(which):
    arrays = {
        "input": RNG.standard_normal((N, C)),
        "target": RNG.integers(0, C, N),
        "weight": RNG.random(C),
    }
    arrays[which] = np.ma.asarray(arrays[which])
    lazy = {name: da.from_array(array, chunks=-1) for name, array in arrays.items()}
    with pytest.raises(TypeError, match=f"{which} must be .*masked"):
        mml.multi_margin_loss(lazy["input"], lazy["target"], weight=lazy["weight"])


@IN_CHUNKS
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("cut", [(7, C), (7, 5), (N, 5)], ids=["rows", "both", "classes"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("index", [3, -100])
def test_ignore_index(backend, cut, reduction, index):
    scores = RNG.standard_normal((N, C)).astype(np.float32)
    target = RNG.integers(0, C, N).astype(np.int16)
    target[::4] = index
    scores[::4] = np.nan
    weight = RNG.random(C)
    weight[3] = np.nan if index == 3 else 1
    keep = target != index
    losses = mml.multi_margin_loss(scores[keep], target[keep], weight=weight, reduction="none")
    wanted = {"none": np.zeros(N), "sum": losses.sum(), "mean": losses.mean()}
    wanted["none"][keep] = losses
    scale = 1 / keep.sum() if reduction == "mean" else 1
    gradient = np.zeros((N, C))
    gradient[keep] = mml.multi_margin_loss_and_grad(
        scores[keep], target[keep], weight=weight, reduction="sum"
    )[1]
    lazy = da.from_array(scores, chunks=cut)
    labels = target if reduction == "mean" else da.from_array(target, chunks=9)
    how = {"weight": weight, "ignore_index": index, "reduction": reduction, "backend": backend}
    with np.errstate(all="raise"):
        pair = mml.multi_margin_loss_and_grad(lazy, labels, **how)
        loss, grad, alone = dask.compute(*pair, mml.multi_margin_loss(lazy, labels, **how))
    np.testing.assert_allclose(alone, loss, rtol=1e-6)
    np.testing.assert_allclose(loss, wanted[reduction], rtol=1e-5)
    np.testing.assert_allclose(grad, gradient * scale, rtol=1e-5, atol=1e-8)


@IN_CHUNKS
@pytest.mark.parametrize("cut", [(7, C), (7, 5)], ids=["rows", "both"])
def test_all_samples_are_ignored(cut):
    lazy = da.from_array(RNG.standard_normal((N, C)), chunks=cut)
    target = np.full(N, -100)
    loss, grad = dask.compute(*mml.multi_margin_loss_and_grad(lazy, target, ignore_index=-100))
    assert math.isnan(loss)
    assert (grad == 0).all()
    assert mml.multi_margin_loss(lazy, target, ignore_index=-100, reduction="sum").compute() == 0


@IN_CHUNKS
def test_a_target_out_of_range_is_found_beside_ignored_ones():
    lazy = da.from_array(RNG.standard_normal((N, C)), chunks=(7, 5))
    target = np.full(N, -100)
    target[41] = C
    with pytest.raises(mml.InvalidTargetError, match=r"target\[41\] is 33"):
        mml.multi_margin_loss(lazy, target, ignore_index=-100).compute()


def test_a_value_that_the_targets_cannot_hold_ignores_nothing():
    lazy = da.from_array(RNG.standard_normal((N, C)), chunks=(7, C))
    target = RNG.integers(0, C, N).astype(np.uint8)
    for index in (256, -256 + int(target[0]), 2**70):
        ours = mml.multi_margin_loss(lazy, target, ignore_index=index)
        assert ours.compute() == mml.multi_margin_loss(lazy, target).compute()


@IN_CHUNKS
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize(("dtype", "large"), [("f4", 3e37), ("f8", 1.6e307)])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("cut", [(2, 40), (2, 20), (3, 7)], ids=["rows", "halves", "both"])
def test_large_scores_whose_mean_is_finite(backend, dtype, large, p, cut):
    """Forty of them together are more than the dtype holds."""
    large = large ** (1 / p)
    scores = np.full((5, 40), large, dtype)
    scores[:, 3] = 0
    target = np.full(5, 3)
    with np.errstate(all="raise"):
        loss, grad = dask.compute(
            *mml.multi_margin_loss_and_grad(
                da.from_array(scores, chunks=cut), target, p=p, backend=backend
            )
        )
    assert np.isclose(loss, float(scores[0, 0]) ** p * (39 / 40), rtol=1e-6)
    wanted = float(scores[0, 0]) ** (p - 1) * p / 40 / 5
    np.testing.assert_allclose(grad[:, 0], wanted, rtol=1e-5)
    np.testing.assert_allclose(grad[:, 3], -39 * wanted, rtol=1e-5)


@IN_CHUNKS
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize(("dtype", "large"), [("f4", 3e38), ("f8", 1.6e308)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("cut", [(2, 4), (2, 2), (4, 1)], ids=["rows", "halves", "columns"])
def test_weighted_losses_beyond_the_dtype(backend, dtype, large, reduction, cut):
    scores = np.asarray([[0, large, 0, 0], [large, 0, 0, 0], [0, large / 8, 0, 0], [0] * 4], dtype)
    target, weight = np.asarray([0, 1, 0, 3]), np.asarray([9, -9, np.nan, np.inf], dtype)
    how = {"reduction": reduction, "weight": weight, "ignore_index": 3, "margin": 0.0}
    chunks = da.from_array(scores, chunks=cut)
    with np.errstate(all="raise"):
        loss = mml.multi_margin_loss(chunks, target, backend=backend, **how)
        beside, grad = mml.multi_margin_loss_and_grad(chunks, target, backend=backend, **how)
        loss, beside, grad = dask.compute(loss, beside, grad)
    wanted = large / 32 * 9 / (3 if reduction == "mean" else 1)
    assert loss == beside
    assert loss.dtype == dtype
    assert np.isclose(loss, wanted, rtol=1e-6)
    alone = mml.multi_margin_loss_and_grad(scores, target, **how)[1]
    np.testing.assert_array_equal(grad, alone)


BOTH_CUTS = pytest.mark.parametrize("cut", [(7, C), (7, 5)], ids=["rows", "both"])


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("which", ["weight", "grad_output", "grad_output of each"])
def test_masked_weights_and_gradients_are_refused(cut, which):
    lazy = {
        "weight": da.ones(C, chunks=-1),
        "grad_output": da.ones((), chunks=()),
        "grad_output of each": da.ones(N, chunks=7),
    }[which]
    masked = lazy.map_blocks(np.ma.asarray, dtype=lazy.dtype, meta=lazy._meta)
    name = which.partition(" ")[0]
    options = {name: masked, "reduction": "none" if which.endswith("each") else "mean"}
    x = da.from_array(RNG.standard_normal((N, C)), chunks=cut)
    grad = mml.multi_margin_loss_and_grad(x, da.from_array(RNG.integers(0, C, N), 7), **options)[1]
    with pytest.raises(TypeError, match=f"{name} must have plain chunks"):
        grad.compute()


@IN_CHUNKS
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("margin", [1e39, -1e39], ids=["large", "small"])
def test_margins_beyond_the_dtype(margin, p, dtype, backend):
    scores, target = np.arange(24).reshape(4, 6).astype(dtype), np.asarray([4, 0, 4, 0])
    scores[2:, ::2], scores[2:, 1::2] = np.finfo(dtype).max, np.finfo(dtype).min
    scores[3] = -scores[3]
    options = {"margin": margin, "p": p, "reduction": "none"}
    whole = mml.multi_margin_loss_and_grad(scores, target, **options)
    parts = mml.multi_margin_loss_and_grad(
        da.from_array(scores, chunks=(3, 3)), target, backend=backend, **options
    )
    assert (whole[0] == (math.inf if margin > 0 else 0)).all()
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other.compute(), rtol=1e-6)


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize(
    ("scores", "options"),
    [
        ([[0.0] + [1.0] * 39999], {"p": 1000}),  # the slopes' sum overflows, their mean doesn't
        ([[0.0, -1, 2, 1, 1]], {"p": 2, "margin": 1e308}),
        ([[0.0, -1, 2, 1, 1]], {"p": 2, "margin": 1e308, "grad_output": 0.0}),
        ([[3.0, 0.5, 0]], {"grad_output": math.inf}),  # no class is active
        ([[-math.inf], [1.0], [math.nan]], {}),
        ([[-math.inf], [1.0], [math.nan]], {"p": 2}),
    ],
    ids=["slopes", "large", "large times 0", "infinite", "one class", "one class, squared"],
)
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_parts_give_what_whole_rows_give(scores, options, backend, dtype):
    if dtype == "f4" and {"p", "margin"} & options.keys() and len(scores) == 1:
        pytest.skip("beyond float32")
    x, n = np.asarray(scores, dtype), len(scores[0])
    target = np.zeros(len(x), int)
    if (upstream := options.get("grad_output")) is not None:
        options = options | {"grad_output": np.full(len(x), upstream, dtype)}
    with np.errstate(all="ignore"):
        whole = mml.multi_margin_loss_and_grad(x, target, reduction="none", **options)
    cut = (0, 1) if n == 1 else ((n + 1) // 2, n // 2)
    lazy = da.from_array(x, chunks=(2, cut))
    with dask.config.set({"array.chunk-size": "1B"}):
        parts = mml.multi_margin_loss_and_grad(
            lazy, target, reduction="none", backend=backend, **options
        )
    for one, other in zip(whole, dask.compute(*parts), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize(
    ("scores", "target"), [([0, 1, math.inf, 2], 0), ([5, -math.inf, 1, 9], 2)]
)
@pytest.mark.parametrize("dtype", ["f2", "f4"])
def test_infinite_scores_beside_a_margin_beyond_the_dtype(dtype, scores, target):
    x, y = np.asarray([scores], dtype), np.asarray([target])
    margin = 1e39 if target == 0 else -1e39
    whole = mml.multi_margin_loss_and_grad(x, y, margin=margin)
    with dask.config.set({"array.chunk-size": "1B"}):
        parts = mml.multi_margin_loss_and_grad(da.from_array(x, chunks=(1, 2)), y, margin=margin)
    for one, other in zip(whole, dask.compute(*parts), strict=True):
        np.testing.assert_array_equal(one, other)


@IN_CHUNKS
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("margin", [1e39, -1e39])
@pytest.mark.parametrize("ignore_index", [None, 2])
@pytest.mark.parametrize("backend", ["numpy-cpu", "generic"])
def test_every_infinite_score_beside_a_margin_beyond_the_dtype(backend, ignore_index, margin, p):
    if backend == "numpy-cpu" and cpu.native is None:
        pytest.skip("no CPU kernels")
    scores = np.asarray(list(itertools.product([0, 1, np.inf, -np.inf], repeat=4)), "f4")
    x, y = np.repeat(scores, 4, axis=0), np.tile(np.arange(4), len(scores))
    options = {"p": p, "margin": margin, "reduction": "none", "backend": backend}
    options["ignore_index"] = ignore_index
    whole = mml.multi_margin_loss_and_grad(x, y, **options)
    with dask.config.set({"array.chunk-size": "1B"}):
        lazy = da.from_array(x, chunks=(100, (0, 3, 1)))
        parts = mml.multi_margin_loss_and_grad(lazy, y, **options)
        alone = mml.multi_margin_loss(lazy, y, **options).compute()
    for one, other in zip((*whole, whole[0]), (*dask.compute(*parts), alone), strict=True):
        np.testing.assert_array_equal(one, other)


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("made", ["f2", "f8"])
def test_gradients_have_the_dtype_that_was_declared(cut, made):
    x = da.from_array(RNG.standard_normal((N, C)).astype(made), chunks=cut)
    x = x.map_blocks(lambda block: block, dtype="f4", meta=np.ones((0, 0), "f4"))
    results = mml.multi_margin_loss_and_grad(x, da.zeros(N, dtype=int, chunks=7))
    assert [one.dtype for one in dask.compute(*results)] == ["f4", "f4"]


@IN_CHUNKS
@BOTH_CUTS
def test_chunks_of_long_doubles_are_refused(cut):
    x = da.from_array(RNG.standard_normal((N, C)), chunks=cut)
    x = x.map_blocks(lambda block: block.astype(np.longdouble), dtype="f8", meta=x._meta)
    with pytest.raises(TypeError, match="real floating dtype, but a chunk of it has dtype float"):
        mml.multi_margin_loss(x, da.zeros(N, dtype=int, chunks=7)).compute()


@pytest.mark.xfail(
    EXPRESSIONS, raises=NotImplementedError, reason="Dask's query planner takes no masks yet"
)
@IN_CHUNKS
@BOTH_CUTS
def test_weights_of_an_unknown_number(cut):
    x, target = RNG.standard_normal((N, C)), RNG.integers(0, C, N)
    weight = da.from_array(np.arange(-2.0, C + 1), chunks=3)
    weight = weight[weight > 0]
    wanted = mml.multi_margin_loss_and_grad(x, target, weight=np.arange(1.0, C + 1))
    lazy = da.from_array(x, chunks=cut)
    made = dask.compute(*mml.multi_margin_loss_and_grad(lazy, target, weight=weight))
    for one, other in zip(wanted, made, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    with pytest.raises(ValueError, match=r"weight .* shape .*32"):
        mml.multi_margin_loss(lazy, target, weight=weight[weight > 1]).compute()


@IN_CHUNKS
@BOTH_CUTS
def test_chunks_with_fewer_classes_than_declared(cut):
    x = da.from_array(RNG.standard_normal((N, C)), chunks=cut)
    cropped = x.map_blocks(lambda block: block[:, :-1], dtype=x.dtype, meta=x._meta)
    with pytest.raises(ValueError, match=r"a chunk has shape \(4, \d+\) instead of"):
        mml.multi_margin_loss(cropped, da.zeros(N, dtype=int, chunks=7)).compute()


@pytest.mark.xfail(
    EXPRESSIONS, raises=NotImplementedError, reason="Dask's query planner takes no masks yet"
)
@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_targets_that_declare_the_sizes_of_unknown_scores(cut, reduction):
    scores, labels = RNG.standard_normal((N, C)), RNG.integers(0, C, N)
    labels[::5] = -1
    x, y = da.from_array(scores, chunks=cut), da.from_array(labels, chunks=cut[:1])
    kept, few = x[y >= 0], labels[labels >= 0]
    sizes = tuple(int((labels[i : i + cut[0]] >= 0).sum()) for i in range(0, N, cut[0]))
    wanted = mml.multi_margin_loss_and_grad(scores[labels >= 0], few, reduction=reduction)
    target = da.from_array(few, chunks=(sizes,))
    found = mml.multi_margin_loss_and_grad(kept, target, reduction=reduction)
    assert found[1].shape == (len(few), C)
    for one, other in zip(dask.compute(*found), wanted, strict=True):
        np.testing.assert_allclose(one, other)
    false = y.map_blocks(lambda block: block[block >= 0])  # declares as many as there were
    for result in mml.multi_margin_loss_and_grad(kept, false, reduction=reduction):
        with pytest.raises(ValueError, match=r"it, or target, declares, but a chunk has shape"):
            result.compute()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("rows", [((0, 0), (0,)), ((0,), (0, 0)), ((0, 0), (0, 0, 0))])
def test_empty_batches_in_any_chunks(rows, reduction):
    x = da.concatenate([da.zeros((0, 3), chunks=(0, 3)) for _ in rows[0]])
    y = da.concatenate([da.zeros(0, dtype=int, chunks=0) for _ in rows[1]])
    loss, grad = mml.multi_margin_loss_and_grad(x, y, reduction=reduction)
    assert grad.chunks == x.chunks
    assert grad.compute().shape == (0, 3)
    wanted = mml.multi_margin_loss(np.zeros((0, 3)), np.zeros(0, int), reduction=reduction)
    np.testing.assert_array_equal(loss.compute(), wanted)


class _Metres(np.ndarray):
    unit = "m"


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("kind", [_Metres, np.matrix])
@pytest.mark.parametrize("which", ["input", "target"])
def test_chunks_that_turn_out_to_mean_more_are_refused(which, kind, cut):
    if (which, kind) == ("target", np.matrix):
        pytest.skip("a matrix has two axes")
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    array = x if which == "input" else y
    made = array.map_blocks(lambda block: block.view(kind), dtype=array.dtype, meta=array._meta)
    x, y = (made, y) if which == "input" else (x, made)
    with pytest.raises(TypeError, match=f"{which} must have plain chunks, but a chunk is a "):
        mml.multi_margin_loss(x, y).compute()


def _unusable(*_):
    raise Unusable("no driver")


@pytest.fixture
def first():
    """Register a kernel that is asked before all others for NumPy's arrays."""

    def register(loss, loss_and_grad):
        register_kernel(Kernel("odd", "numpy", lambda _: None, loss, loss_and_grad, "numpy-cpu"))

    with isolated(built_in_kernels=True):
        yield register


@IN_CHUNKS
@BOTH_CUTS
def test_a_kernel_that_turns_out_to_be_unusable(cut, first):
    first(_unusable, _unusable)
    scores, labels = RNG.standard_normal((N, C)).astype("f4"), RNG.integers(0, C, N)
    x = da.from_array(scores, chunks=cut)
    wanted = mml.multi_margin_loss_and_grad(scores, labels, backend="generic")
    found = dask.compute(*mml.multi_margin_loss_and_grad(x, labels))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    asked = mml.multi_margin_loss(x, labels, backend="odd")
    with pytest.raises(ValueError, match="kernel 'odd' cannot run this call: no driver"):
        asked.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize(
    "made",
    [lambda n: np.zeros((1, *n), "f4"), np.zeros, lambda _: None, lambda n: [0.0] * n[0]],
    ids=["shape", "dtype", "nothing", "list"],
)
def test_what_a_kernel_returns_is_looked_at(made, cut, first):
    first(
        lambda problem: made(problem.target.shape),
        lambda problem, _: (made(problem.target.shape), np.zeros_like(problem.input)),
    )
    x = da.from_array(RNG.standard_normal((N, C)).astype("f4"), chunks=cut)
    for result in mml.multi_margin_loss_and_grad(x, np.zeros(N, int)):
        with pytest.raises(TypeError, match="kernel 'odd': the loss must be an array of numpy"):
            result.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("dtype", ["float64", "bool"])
def test_targets_of_another_dtype_than_declared(cut, dtype):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    y = y.map_blocks(lambda block: block.astype(dtype), dtype=int, meta=y._meta)
    with pytest.raises(TypeError, match=f"target must have an integer dtype, but .*{dtype}"):
        mml.multi_margin_loss(x, y).compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("change", [lambda b: b[:, 0], lambda b: b[:, None]], ids=["less", "more"])
def test_chunks_of_other_numbers_of_axes_than_declared(cut, change):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    x = x.map_blocks(change, dtype=x.dtype, meta=x._meta)
    for result in mml.multi_margin_loss(x, y), *mml.multi_margin_loss_and_grad(x, y):
        with pytest.raises(ValueError, match=r"input must have chunks of the sizes that it, or"):
            result.compute()


@IN_CHUNKS
@BOTH_CUTS
def test_chunks_with_fewer_rows_than_declared(cut):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    x = x.map_blocks(lambda block: block[:-1], dtype=x.dtype, meta=x._meta)
    y = y.map_blocks(lambda block: block[:-1], dtype=int, meta=y._meta)
    for result in mml.multi_margin_loss_and_grad(x, y):
        with pytest.raises(ValueError, match=r"a chunk has shape .* instead of"):
            result.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.astype(int), r"must have a real floating dtype"),
        (lambda b: b * 1j, r"must have a real floating dtype"),
        (lambda b: b[:1], r"weight must have .* shape"),
        (lambda b: np.concatenate([b, b]), r"weight must have .* shape"),
    ],
    ids=["int", "complex", "short", "long"],
)
def test_weights_other_than_declared(cut, change, message):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    weight = da.ones(C, chunks=11).map_blocks(change, dtype=float, meta=np.empty(0))
    for result in mml.multi_margin_loss_and_grad(x, y, weight=weight):
        with pytest.raises((TypeError, ValueError), match=message):
            result.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.astype(int), r"grad_output must have a real floating dtype"),
        (lambda b: b * 1j, r"grad_output must have a real floating dtype"),
        (lambda b: np.resize(b, (*b.shape, 2)), r"grad_output must have chunks that fit"),
        (lambda b: np.resize(b, b.shape and 1), r"grad_output must have chunks that fit"),
    ],
    ids=["int", "complex", "axis", "one"],
)
def test_grad_output_other_than_declared(cut, reduction, change, message):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    given = da.ones(N, chunks=7) if reduction == "none" else da.ones(())
    if reduction == "mean" and message.endswith("fit") and change(np.ones(())).shape == ():
        pytest.skip("one number is what is wanted")
    given = given.map_blocks(change, dtype=float, meta=np.empty((0,) * given.ndim))
    _, grad = mml.multi_margin_loss_and_grad(x, y, reduction=reduction, grad_output=given)
    with pytest.raises((TypeError, ValueError), match=message):
        grad.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("p", [1, 2])
def test_nothing_is_seen_on_ordinary_scores(cut, dtype, p):
    scores = RNG.standard_normal((N, 300)).astype(dtype)
    x = da.from_array(scores, chunks=(cut[0], 300 if cut[1] == C else 50))
    y, weight = da.zeros(N, dtype=int, chunks=7), da.full(300, 1e-4, dtype=dtype)
    for reduction in ("none", "mean"):
        options = {"p": p, "reduction": reduction, "weight": weight}
        with np.errstate(all="raise"):
            for result in mml.multi_margin_loss_and_grad(x, y, **options):
                result.compute(scheduler="synchronous")


def test_scalars_of_numpy_beside_dask():
    x, scores = da.zeros(3), RNG.standard_normal((4, 3))
    assert mml.multi_margin_loss(x, np.arange(3)[1]).compute() == pytest.approx(2 / 3)
    whole = mml.multi_margin_loss_and_grad(scores, np.arange(4) % 3, grad_output=np.float64(2))[1]
    parts = mml.multi_margin_loss_and_grad(
        da.from_array(scores), np.arange(4) % 3, grad_output=np.float64(2)
    )[1]
    np.testing.assert_array_equal(parts.compute(), whole)


@IN_CHUNKS
@BOTH_CUTS
def test_factors_of_bfloat16(cut):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    scores, target = RNG.standard_normal((N, C)).astype("f4"), RNG.integers(0, C, N)
    weight = RNG.uniform(0, 2, C).astype(ml_dtypes.bfloat16)
    for reduction, g in (("mean", np.asarray(0.5)), ("none", RNG.uniform(0, 2, N))):
        options = {"reduction": reduction, "grad_output": g.astype(ml_dtypes.bfloat16)}
        whole = mml.multi_margin_loss_and_grad(scores, target, weight=weight, **options)
        parts = mml.multi_margin_loss_and_grad(
            da.from_array(scores, chunks=cut), target, weight=weight, **options
        )
        for one, other in zip(whole, parts, strict=True):
            np.testing.assert_allclose(one, other.compute(), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("tile", [2**20, 50])
@pytest.mark.parametrize("p", [1, 1.5])
def test_rows_in_several_chunks_have_the_bits_of_whole_rows(
    axis, dtype, backend, tile, p, monkeypatch
):
    monkeypatch.setattr(chunks, "TILE", tile)
    scores = np.moveaxis(RNG.standard_normal((9, 5, C)).astype(dtype), -1, axis)
    target, upstream = RNG.integers(0, C, (9, 5)), RNG.standard_normal((9, 5))
    how = {"p": p, "axis": axis, "weight": RNG.random(C), "backend": backend}
    several, whole = (
        da.from_array(scores, chunks=tuple(of_classes if i == axis else 4 for i in range(3)))
        for of_classes in ((10, 0, 23), C)
    )
    for reduction, grad_output in (("mean", None), ("none", upstream)):
        how |= {"reduction": reduction}
        alone = [mml.multi_margin_loss(x, target, **how) for x in (several, whole)]
        pairs = [
            mml.multi_margin_loss_and_grad(x, target, grad_output=grad_output, **how)
            for x in (several, whole)
        ]
        assert pairs[0][1].chunks == several.chunks
        for ours, wanted in (alone, *zip(*pairs, strict=True)):
            assert ours.compute().tobytes() == wanted.compute().tobytes()


@pytest.mark.parametrize(("limit", "own"), [("48B", 0), ("47B", 6)], ids=["together", "apart"])
def test_dasks_size_of_a_chunk_limits_what_one_task_takes(limit, own):
    lazy = da.from_array(np.zeros((5, 6), np.float32), chunks=(2, 3))  # 2 x 6 scores: 48 bytes
    with dask.config.set({"array.chunk-size": limit}):
        loss = mml.multi_margin_loss(lazy, np.zeros(5, int))
        grad = mml.multi_margin_loss_and_grad(lazy, np.zeros(5, int))[1]
    for made in (loss, grad):
        names = [dask.utils.key_split(key) for key in dict(made.__dask_graph__())]
        assert names.count("multi_margin_loss-own") == own


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("dtype", ["int64", "complex64"])
def test_scores_of_another_dtype_than_declared(cut, dtype):
    x = da.from_array(RNG.standard_normal((N, C)), chunks=cut)
    other = x.map_blocks(lambda block: block.astype(dtype), dtype=x.dtype, meta=x._meta)
    for result in mml.multi_margin_loss_and_grad(other, da.zeros(N, dtype=int, chunks=7)):
        with pytest.raises(TypeError, match=f"input must have a real floating dtype, .* {dtype}"):
            result.compute()


@IN_CHUNKS
@BOTH_CUTS
@pytest.mark.parametrize("role", ["input", "target"])
def test_chunks_that_turn_out_to_be_of_another_library(cut, role):
    x, y = da.from_array(RNG.standard_normal((N, C)), chunks=cut), da.zeros(N, dtype=int, chunks=7)
    for kind, told in ((list, "builtins.list"), (str, "builtins.str")):
        given = {"input": x, "target": y}
        one = given[role]
        given[role] = one.map_blocks(
            lambda block, k=kind: k(block), dtype=one.dtype, meta=one._meta
        )
        message = f"{role} must have chunks of NumPy or CuPy, but a chunk is of type {told}"
        with pytest.raises(TypeError, match=message):
            mml.multi_margin_loss(given["input"], given["target"]).compute()
        with pytest.raises(TypeError, match=message):
            mml.multi_margin_loss_and_grad(given["input"], given["target"])[1].compute()
