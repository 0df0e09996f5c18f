"""The Dask kernel: any chunks, the same result; and the traps that others fell into."""

import math
import pickle
from fractions import Fraction

import dask
import dask.array as da
import numpy as np
import pytest
from dask.callbacks import Callback

import mml_arrayapi as mml
from mml_arrayapi.backends.dask import chunks as tasks
from mml_arrayapi.backends.dask import graph
from tests.backends.dask.conftest import EXPRESSIONS

RNG = np.random.default_rng(0)
C = 12


pytestmark = pytest.mark.usefixtures("chunks_of_classes")


@pytest.fixture(autouse=True)
def _synchronous():
    with dask.config.set(scheduler="synchronous"):
        yield


def data(shape=(40, C), axis=-1, dtype=np.float32):
    scores = RNG.standard_normal(shape).astype(dtype)
    batch = tuple(n for i, n in enumerate(shape) if i != axis % len(shape))
    return scores, RNG.integers(0, C, batch)


def rows(array, n):
    """Cut the first axis."""
    return da.from_array(array, chunks=(n, *array.shape[1:]))


def same(block):
    return block


def lost(array):
    """Forget the sizes of the chunks."""
    sizes = (tuple(math.nan for _ in array.chunks[0]), *array.chunks[1:])
    return array.map_blocks(same, chunks=sizes, dtype=array.dtype, meta=array._meta)


def n_tasks(array):
    # dask.optimize() of the query planner's arrays fails where anything is rechunked.
    return len(dict((array if EXPRESSIONS else dask.optimize(array)[0]).__dask_graph__()))


def close(actual, wanted, dtype):
    np.testing.assert_allclose(
        actual, wanted, rtol=2e-3 if dtype == np.float16 else 1e-6, atol=1e-7
    )


SHAPES = [((40, C), -1), ((C, 40), 0), ((6, C, 7), 1), ((3, 4, C), 2), ((C,), 0)]
# Dtypes and reductions do not interact with shapes.
CASES = [
    *((np.float32, reduction, shape) for shape in SHAPES for reduction in ("none", "mean")),
    *((np.float64, reduction, SHAPES[0]) for reduction in ("none", "sum")),
    *((np.float16, reduction, SHAPES[2]) for reduction in ("none", "mean")),
]


def named(value):
    return value.__name__ if isinstance(value, type) else None


@pytest.mark.parametrize(
    ("dtype", "reduction", "shape", "axis"),
    [(dtype, reduction, *shape) for dtype, reduction, shape in CASES],
    ids=named,
)
@pytest.mark.parametrize("chunks", ["one", "rows", "classes", "both"])
def test_every_chunking_gives_the_loss_and_the_gradient(dtype, reduction, shape, axis, chunks):
    scores, target = data(shape, axis, dtype)
    weight = 0.5 + RNG.random(C)
    cut = {"one": (-1, -1), "rows": (-1, 3), "classes": (5, -1), "both": (5, 3)}[chunks]
    sizes = tuple(cut[0] if i == axis % len(shape) else cut[1] for i in range(len(shape)))
    keywords = {"axis": axis, "reduction": reduction, "p": 2, "margin": 0.5}
    loss, grad = mml.multi_margin_loss_and_grad(scores, target, weight=weight, **keywords)
    lazy = da.from_array(scores, chunks=sizes)
    for w in (weight, da.from_array(weight, chunks=5)):
        alone = mml.multi_margin_loss(lazy, target, weight=w, **keywords)
        pair = mml.multi_margin_loss_and_grad(lazy, target, weight=w, **keywords)
        for array, like in zip((alone, *pair), (loss, loss, grad), strict=True):
            assert array.shape == like.shape
            assert array.dtype == array._meta.dtype == dtype
        assert pair[1].chunks == lazy.chunks
        if reduction == "none":
            rest = tuple(c for i, c in enumerate(lazy.chunks) if i != axis % len(shape))
            assert alone.chunks == pair[0].chunks == rest
        a, b, g = dask.compute(alone, *pair)
        close(a, loss, dtype)
        close(b, loss, dtype)
        close(g, grad, dtype)


@pytest.mark.parametrize("backend", [None, "numpy-cpu"])  # None: generic for so few scores
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("chunks", [(7, -1), (-1, 5), (7, 5), ((1, 0, 39), (0, 5, 0, 7))])
def test_chunk_kernels_agree_in_any_chunks(backend, p, chunks):
    if backend == "numpy-cpu":
        pytest.importorskip("mml_arrayapi.backends.cpu._baseline")
    scores, target = data()
    loss, grad = mml.multi_margin_loss_and_grad(scores, target, p=p, backend="generic")
    lazy = da.from_array(scores, chunks=chunks)
    assert mml.explain(lazy, target, backend=backend).kernel == "dask-blocks"
    ours = mml.multi_margin_loss_and_grad(lazy, target, p=p, backend=backend)
    alone = mml.multi_margin_loss(lazy, target, p=p, backend=backend)
    close(ours[0].compute(), loss, np.float32)
    close(alone.compute(), loss, np.float32)
    close(ours[1].compute(), grad, np.float32)


@pytest.mark.parametrize("chunks", [(7, -1), (7, 5)])
@pytest.mark.parametrize("lazily", [False, True])
def test_grad_output(chunks, lazily):
    scores, target = data()
    lazy = da.from_array(scores, chunks=chunks)
    for reduction, upstream in (("none", RNG.standard_normal(40)), ("mean", np.asarray(3.0))):
        wanted = mml.multi_margin_loss_and_grad(
            scores, target, reduction=reduction, grad_output=upstream
        )[1]
        given = da.asarray(upstream, chunks=9) if lazily else upstream
        ours = mml.multi_margin_loss_and_grad(lazy, target, reduction=reduction, grad_output=given)
        close(ours[1].compute(), wanted, np.float32)


def test_nothing_is_computed_before_it_is_asked_for():
    def refuse(block):
        raise AssertionError("computed")

    scores = da.ones((10, C), chunks=(3, 4)).map_blocks(refuse, meta=np.ones((0, 0)))
    target = da.ones(10, chunks=3, dtype=int).map_blocks(refuse, meta=np.ones(0, int))
    mml.multi_margin_loss(scores, target)
    mml.multi_margin_loss_and_grad(scores, target)
    mml.explain(scores, target)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_bits_do_not_depend_on_the_chunks_of_the_rows(reduction, dtype):
    scores, target = data((997, 33), dtype=dtype)
    results = set()
    for chunks in (997, 1, 10, 250, (990, 7), (0, 3, 994)):
        lazy = da.from_array(scores, chunks=(chunks, 33))
        results.add(mml.multi_margin_loss(lazy, target, reduction=reduction).compute().item())
    losses = mml.multi_margin_loss(scores, target, reduction="none")
    # A quotient of fsum() would be rounded twice.
    exact = sum(map(Fraction, losses.tolist())) / (997 if reduction == "mean" else 1)
    assert results == {dtype(float(exact)).item()}


def test_the_bits_do_not_depend_on_the_workers():
    scores, target = data((997, 33))
    loss = mml.multi_margin_loss(da.from_array(scores, chunks=(50, 11)), target)
    with dask.config.set(scheduler="threads", num_workers=4):
        assert len({loss.compute().item() for _ in range(5)}) == 1


# Traps that others fell into.


def test_scores_and_targets_are_not_matched_from_the_last_axis():
    """map_blocks made 16,000 rows of (2000, 10) and (2000,)."""
    scores, target = data((2000, C))
    losses = mml.multi_margin_loss(rows(scores, 250), rows(target, 250), reduction="none")
    assert losses.shape == losses.compute().shape == (2000,)


def test_the_mean_is_no_mean_of_means():
    scores, target = data((1000, C))
    scores[900:, 0] += 50
    wanted = mml.multi_margin_loss(scores, target)
    for classes in (C, (5, 7)):
        lazy = da.from_array(scores, chunks=((900, 100), classes))
        close(mml.multi_margin_loss(lazy, target).compute(), wanted, np.float32)


def test_numpy_targets_are_cut_like_the_scores():
    scores, target = data((1000, C))
    largest = 0

    class Watch(Callback):
        def _posttask(self, key, result, *_):
            nonlocal largest
            if isinstance(result, np.ndarray) and result.ndim == 2:
                largest = max(largest, result.nbytes)

    for backend in (None, "generic"):
        with Watch():
            mml.multi_margin_loss(rows(scores, 10), target, backend=backend).compute()
        assert largest <= 10 * C * 8


def test_weights_come_whole_and_make_no_more_tasks():
    """Taking them by the targets made 10,000 tasks of 1,000 chunks."""
    scores, target = data((1000, C))
    weight = da.from_array(RNG.random(C), chunks=1)
    lazy, labels = rows(scores, 10), rows(target, 10)
    with_weight = n_tasks(mml.multi_margin_loss(lazy, labels, weight=weight))
    assert with_weight - n_tasks(mml.multi_margin_loss(lazy, labels)) <= 2 * C + 3
    assert n_tasks(mml.multi_margin_loss(lazy, labels)) <= 5 * 100


def test_the_scores_are_never_rechunked():
    scores, target = data((60, C))
    labels = rows(target, 11).map_blocks(same, dtype=target.dtype)
    for chunks in ((7, -1), (7, 5)):
        lazy = da.from_array(scores, chunks=chunks)
        for made in mml.multi_margin_loss_and_grad(lazy, labels):
            rechunked = [key for key in dict(made.__dask_graph__()) if "rechunk" in str(key)]
            assert rechunked  # the targets
            assert all(len(key) == 2 for key in rechunked if isinstance(key, tuple))


def test_what_tasks_run_is_pickled_by_reference():
    """A kernel pickled by value was compiled again in every task."""
    scores, target = data((1000, C))
    loss = mml.multi_margin_loss(rows(scores, 100), target)
    for function in (tasks.loss_of_rows, tasks.part_of_rows, tasks.merged):
        assert len(pickle.dumps(function)) < 100
    made = {k: v for k, v in dict(loss.__dask_graph__()).items() if k[0].startswith(graph.NAME)}
    assert len(made) > 10
    assert all(len(pickle.dumps(task)) < 5000 for task in made.values())


def test_one_target_for_three_rows_is_not_broadcast():
    scores, _ = data((3, C))
    for chunks in ((3, C), (3, 5)):
        lazy = lost(da.from_array(scores, chunks=chunks))
        target = lost(da.from_array(np.asarray([1]), chunks=1))
        loss = mml.multi_margin_loss(lazy, target)
        with pytest.raises(ValueError, match=r"chunk of target has shape \(1,\) beside"):
            loss.compute()


@pytest.mark.parametrize("backend", [None, "numpy-cpu", "generic"])
@pytest.mark.parametrize("chunks", [(7, C), (7, 5)])
def test_unknown_sizes_of_chunks(backend, chunks):
    scores, target = data()
    loss, grad = mml.multi_margin_loss_and_grad(scores, target)
    losses = mml.multi_margin_loss(scores, target, reduction="none")
    lazy, labels = da.from_array(scores, chunks=chunks), da.from_array(target, chunks=7)
    for x, y in ((lost(lazy), lost(labels)), (lazy, lost(labels)), (lost(lazy), labels)):
        ours = mml.multi_margin_loss_and_grad(x, y, backend=backend)
        none = mml.multi_margin_loss(x, y, reduction="none", backend=backend)
        close(ours[0].compute(), loss, np.float32)
        if EXPRESSIONS:  # no array of unknown sizes can be computed by the query planner, sums can
            close(ours[1].sum(axis=0).compute(), grad.sum(axis=0), np.float32)
            close(none.sum().compute(), losses.sum(), np.float32)
        else:
            close(ours[1].compute(), grad, np.float32)
            close(none.compute(), losses, np.float32)


@pytest.mark.xfail(
    EXPRESSIONS, raises=NotImplementedError, reason="Dask's query planner takes no masks yet"
)
def test_filtered_scores_have_unknown_sizes():
    scores, target = data()
    lazy, labels = rows(scores, 7), rows(target, 7)
    keep = labels != 3
    ours = mml.multi_margin_loss(lazy[keep], labels[keep])
    close(
        ours.compute(), mml.multi_margin_loss(scores[target != 3], target[target != 3]), np.float32
    )


def test_unknown_sizes_that_cannot_be_matched():
    scores, target = data()
    lazy = lost(rows(scores, 7))
    with pytest.raises(
        ValueError, match="target must be a Dask array where input has chunks of unk"
    ):
        mml.multi_margin_loss(lazy, target)
    with pytest.raises(ValueError, match="target must have as many chunks as input where sizes of"):
        mml.multi_margin_loss(lazy, rows(target, 8))


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("chunks", [(7, C), (7, 5)])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_target_out_of_range_is_found_in_the_whole_array(backend, chunks, reduction):
    scores, target = data()
    target[33], target[34] = C, -1
    lazy = da.from_array(scores, chunks=chunks)
    for labels in (target, rows(target, 9)):
        loss = mml.multi_margin_loss(lazy, labels, reduction=reduction, backend=backend)
        with pytest.raises(mml.InvalidTargetError, match=r"target\[33\] is 12, but input has 12"):
            loss.compute()
        loss, grad = mml.multi_margin_loss_and_grad(
            lazy, labels, reduction="none", check_target="nan", backend=backend
        )
        bad = [33, 34]
        assert np.isnan(loss.compute()[bad]).all()
        assert np.isnan(grad.compute()[bad]).all()
        assert np.isfinite(np.delete(loss.compute(), bad)).all()
        assert np.isfinite(np.delete(grad.compute(), bad, axis=0)).all()


def test_the_position_has_all_axes():
    scores, target = data((6, C, 7), 1)
    target[5, 4] = 99
    loss = mml.multi_margin_loss(da.from_array(scores, chunks=(2, 5, 3)), target, axis=1)
    with pytest.raises(mml.InvalidTargetError, match=r"target\[5, 4\] is 99"):
        loss.compute()


def test_targets_of_unsigned_64_bits_beyond_int64():
    scores, target = data()
    target = target.astype(np.uint64)
    target[2] = 2**64 - 1
    loss = mml.multi_margin_loss(da.from_array(scores, chunks=(7, 5)), target, check_target="nan")
    assert math.isnan(loss.compute())


@pytest.mark.parametrize("chunks", [(7, C), (7, 5)])
def test_nan_and_infinities(chunks):
    scores, target = data()
    scores[0, (target[0] + 1) % C] = np.nan
    scores[1, target[1]] = np.nan
    scores[2, (target[2] + 1) % C] = -np.inf
    scores[3, target[3]] = -np.inf
    scores[4, (target[4] + 1) % C] = np.inf
    scores[5] = -np.inf
    scores[5, target[5]] = 0
    scores[6] = -np.inf
    lazy = da.from_array(scores, chunks=chunks)
    with np.errstate(invalid="ignore"):
        keywords = {"reduction": "none", "backend": "generic"}
        loss, grad = mml.multi_margin_loss_and_grad(scores, target, **keywords)
        for backend in (None, "numpy-cpu"):
            ours = mml.multi_margin_loss_and_grad(lazy, target, reduction="none", backend=backend)
            np.testing.assert_allclose(ours[0].compute(), loss, rtol=1e-6)
            np.testing.assert_allclose(ours[1].compute(), grad, rtol=1e-6, atol=1e-7)
            alone = mml.multi_margin_loss(lazy, target, reduction="none", backend=backend)
            np.testing.assert_allclose(alone.compute(), loss, rtol=1e-6)


def test_float16_does_not_overflow_on_the_way():
    scores = np.zeros((8, 4), np.float16)
    scores[:, 0] = 300
    lazy = da.from_array(scores, chunks=(3, 2))
    target = np.asarray([1] + [0] * 7)
    for p, reduction in ((2, "mean"), (1, "sum")):
        wanted = mml.multi_margin_loss(scores.astype(np.float64), target, p=p, reduction=reduction)
        for chunks in ((3, 4), (3, 2)):
            lazy = da.from_array(scores, chunks=chunks)
            ours = mml.multi_margin_loss(lazy, target, p=p, reduction=reduction)
            close(ours.compute(), wanted, np.float16)


@pytest.mark.parametrize("chunks", [((0,), (C,)), ((0, 0), (C,)), ((0,), (5, 7))])
def test_no_samples(chunks):
    lazy = da.from_array(np.zeros((0, C), np.float32), chunks=chunks)
    target = np.zeros(0, int)
    assert mml.multi_margin_loss(lazy, target, reduction="none").compute().shape == (0,)
    assert mml.multi_margin_loss(lazy, target, reduction="sum").compute() == 0
    assert math.isnan(mml.multi_margin_loss(lazy, target).compute())
    assert mml.multi_margin_loss_and_grad(lazy, target)[1].compute().shape == (0, C)


def test_use_backend_is_kept_for_the_chunks():
    """The chunks are computed in other threads, after the with block."""
    from mml_arrayapi import formula

    scores, target = data()
    seen = []

    def loss(problem):
        seen.append(problem.input.shape)
        return formula.loss(problem)

    spy = mml.Kernel("numpy-spy", "numpy", lambda _: None, loss, formula.loss_and_grad)
    mml.register_kernel(spy)
    try:
        with mml.use_backend("numpy-spy"):
            lazy = mml.multi_margin_loss(rows(scores, 10), target)
            assert mml.explain(rows(scores, 10), target).kernel == "dask-blocks"
        with dask.config.set(scheduler="threads"):
            lazy.compute()
        mml.multi_margin_loss(rows(scores, 20), target, backend="numpy-spy").compute()
        assert sorted(seen) == [(10, C)] * 4 + [(20, C)] * 2
    finally:
        mml.unregister_kernel("numpy-spy")


def test_a_kernel_for_other_chunks_is_refused():
    scores, target = data()
    with pytest.raises(ValueError, match="'torch-cpu' takes arrays of torch, but input is of"):
        mml.multi_margin_loss(rows(scores, 10), target, backend="torch-cpu")


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("which", ["input", "target"])
def test_chunks_of_other_libraries_are_refused(backend, which):
    jnp = pytest.importorskip("jax.numpy")
    scores, target = data()
    arrays = {"input": rows(scores, 10), "target": rows(target, 10)}
    kind = jnp.float32 if which == "input" else jnp.int32
    meta = jnp.zeros((0,) * arrays[which].ndim, dtype=kind)
    arrays[which] = arrays[which].map_blocks(jnp.asarray, dtype=meta.dtype, meta=meta)
    with pytest.raises(
        TypeError,
        match=f"{which} must be a dense array, but is a Dask array whose chunks are of jax",
    ):
        mml.multi_margin_loss(**arrays, backend=backend)


@pytest.mark.parametrize("which", ["input", "target", "weight"])
def test_tables_of_dask_are_named(which):
    frames, pd = pytest.importorskip("dask.dataframe"), pytest.importorskip("pandas")
    scores, target = data()
    arrays = {"input": scores, "target": target, "weight": np.ones(C, np.float32)}
    kind = pd.DataFrame if which == "input" else pd.Series
    arrays[which] = frames.from_pandas(kind(arrays[which]), npartitions=2)
    told = f"{which} must .*, but is a {kind.__name__} of Dask; pass its to_dask_array"
    with pytest.raises(TypeError, match=told):
        mml.multi_margin_loss(**arrays)


def test_chunks_that_are_no_arrays_are_named():
    sparse = pytest.importorskip("scipy.sparse")
    scores, target = data()
    lazy = rows(scores, 10).map_blocks(sparse.csr_matrix)
    told = "input must .* a Dask array whose chunks are of type scipy.sparse.*csr_matrix, not numpy"
    with pytest.raises(TypeError, match=told):
        mml.multi_margin_loss(lazy, target)


def test_each_chunk_is_visited_once_for_loss_and_gradient():
    scores, target = data()
    visits = []
    lazy = da.from_array(scores, chunks=(10, C)).map_blocks(
        lambda block: visits.append(1) or block, meta=np.ones((0, 0), np.float32)
    )
    dask.compute(*mml.multi_margin_loss_and_grad(lazy, target, reduction="none"))
    assert len(visits) == 4


def test_temporaries_stay_small():
    import tracemalloc

    scores, target = data((200_000, C))
    lazy, labels = da.from_array(scores, chunks=-1), da.from_array(target, chunks=-1)
    assert scores.size > tasks.TILE * 2
    loss = mml.multi_margin_loss(lazy, labels)
    loss.compute()
    tracemalloc.start()
    loss.compute()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * tasks.TILE * 4


def test_the_accumulator_adds_up_the_same():
    scores, target = data((997, 33))
    stream = mml.LossAccumulator()
    for start in range(0, 997, 100):
        part = slice(start, start + 100)
        stream.update(rows(scores[part], 30), rows(target[part], 30))
    again = mml.LossAccumulator()
    again.update(da.from_array(scores, chunks=(50, -1)), target)
    assert stream.state() == again.state()


@pytest.mark.xfail(
    EXPRESSIONS, raises=ValueError, reason="Dask's query planner rechunks what has no known sizes"
)
def test_a_gradient_for_each_of_an_unknown_number_of_rows():
    scores, target = data()
    x, y = lost(rows(scores, 7)), lost(rows(target, 7))
    options = {"reduction": "none"}
    upstream = mml.multi_margin_loss(x, y, **options)
    grad = mml.multi_margin_loss_and_grad(x, y, grad_output=upstream, **options)[1].compute()
    upstream = mml.multi_margin_loss(scores, target, **options)
    wanted = mml.multi_margin_loss_and_grad(scores, target, grad_output=upstream, **options)[1]
    np.testing.assert_array_equal(grad, wanted)
    with pytest.raises(ValueError, match="grad_output must be a Dask array where input has chunks"):
        mml.multi_margin_loss_and_grad(x, y, grad_output=upstream, **options)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize(
    ("shape", "of_target"), [((3,), (1,)), ((3,), ()), ((1, 3), ()), ((1, 3), (1,)), ((), (1,))]
)
def test_one_sample_in_every_spelling(shape, of_target, reduction):
    """By indexing, since the query planner has no reshape."""
    scores = np.resize([0.5, 0.0, -2.0], shape)
    lazy, target = da.from_array(scores), da.zeros(of_target, dtype=int)
    of_loss = of_target if reduction == "none" else ()
    upstream = da.full(of_loss, 2.0)
    loss, grad = mml.multi_margin_loss_and_grad(
        lazy, target, reduction=reduction, grad_output=upstream
    )
    assert (loss.shape, grad.shape) == (of_loss, shape)
    row = np.asarray([-1.0, 1.0, 0.0]) / 3 if shape else np.zeros(())
    assert loss.compute() == (1 / 6 if shape else 0)
    assert np.array_equal(grad.compute(), np.resize(2 * row, shape))
