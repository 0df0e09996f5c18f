"""A real cluster over TCP: the same bits as here, kernels that stay fast, and reports of them."""

import contextlib
import os
import signal
import time
import warnings

import dask
import dask.array as da
import numpy as np
import pytest

import mml_arrayapi as mml

distributed = pytest.importorskip("distributed")

# distributed warns of what it finds when workers are killed, at times that vary.
pytestmark = pytest.mark.filterwarnings("ignore")

RNG = np.random.default_rng(0)
N, C = 2000, 9


def cluster_of(*environments):
    """Make a cluster of one process per environment, that talk over TCP."""
    workers = {
        name: {
            "cls": distributed.Nanny,
            "options": {"nthreads": 1, "env": env, "host": "127.0.0.1", "dashboard": False},
        }
        for name, env in enumerate(environments)
    }
    scheduler = {
        "cls": distributed.Scheduler,
        "options": {"host": "127.0.0.1", "dashboard_address": None, "dashboard": False},
    }
    return distributed.SpecCluster(scheduler=scheduler, workers=workers, silence_logs=50)


@contextlib.contextmanager
def client_of(cluster, n):
    with distributed.Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(n, timeout=60)
        yield client


@pytest.fixture(scope="module")
def cluster():
    with distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=None,
        silence_logs=50,
    ) as made:
        yield made


@pytest.fixture
def client(cluster):
    with client_of(cluster, 2) as made:
        yield made


def data(dtype=np.float32):
    target = RNG.integers(0, C, N)
    target[::7] = -100
    return RNG.standard_normal((N, C)).astype(dtype), target


def scattered(client, array, chunks):
    """Send every chunk to a worker, as a client that has them in memory does."""
    blocks = da.from_array(array, chunks=chunks)
    keys = [key for row in blocks.__dask_keys__() for key in (row if array.ndim > 1 else [row])]
    values = [
        np.ascontiguousarray(array[place]) for place in da.core.slices_from_chunks(blocks.chunks)
    ]
    futures = client.scatter(values, hash=False)
    made = [da.from_delayed(f, v.shape, v.dtype) for f, v in zip(futures, values, strict=True)]
    assert len(keys) == len(made)
    columns = 1 if array.ndim == 1 else blocks.numblocks[1]
    grid = [made[at : at + columns] for at in range(0, len(made), columns)]
    return da.concatenate(made) if array.ndim == 1 else da.block(grid)


def is_aligned(block):
    return bool(block.flags.aligned)


def wanted_of(scores, target, chunks, **how):
    arrays = mml.multi_margin_loss_and_grad(da.from_array(scores, chunks=chunks), target, **how)
    with dask.config.set(scheduler="threads"):
        return dask.compute(*arrays)


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunks", [(150, C), (150, 4)], ids=["rows", "both"])
def test_scattered_chunks_give_the_same_bits(client, backend, reduction, chunks):
    scores, target = data()
    how = {"reduction": reduction, "ignore_index": -100, "weight": RNG.random(C)}
    wanted = wanted_of(scores, target, chunks, **how)
    x, y = scattered(client, scores, chunks), scattered(client, target, 150)
    ours = mml.multi_margin_loss_and_grad(x, y, **how)
    found = client.gather(client.compute([*ours, mml.multi_margin_loss(x, y, **how)]))
    for a, b in zip(found, (*wanted, wanted[0]), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_most_chunks_that_a_client_scatters_are_not_aligned(client):
    """What the tests above are about."""
    values = [RNG.standard_normal((50, C)).astype(np.float32) for _ in range(40)]
    aligned = client.gather(client.map(is_aligned, client.scatter(values)))
    assert not all(aligned)


def kernels_of(block, target, options):
    from mml_arrayapi.backends.dask import chunks

    call = chunks.Call(options, C, block.dtype, None, (C,))
    rows, _ = chunks._run([block], target, None, call)
    return is_aligned(block), {(report.worker, report.kernel) for report in rows.ran}


def test_chunks_that_travelled_keep_the_kernel(client):
    from mml_arrayapi.backends.dask.alignment import TaskOptions

    scores, target = data()
    target = np.where(target < 0, 0, target)
    kernel = mml.explain(scores, target).kernel
    blocks = client.scatter([scores[at : at + 50] for at in range(0, N, 50)])
    labels = client.scatter([target[at : at + 50] for at in range(0, N, 50)])
    options = TaskOptions(1.0, 1.0, "none", None, 1, "raise")
    found = client.gather(client.map(kernels_of, blocks, labels, options=options))
    assert not all(aligned for aligned, _ in found)
    workers = set(client.scheduler_info()["workers"])
    assert {report for _, reports in found for report in reports} <= {
        (worker, kernel) for worker in workers
    }


def test_processes_give_the_same_bits():
    scores, target = data()
    for chunks in ((300, C), (300, 4)):
        wanted = wanted_of(scores, target, chunks, ignore_index=-100)
        arrays = mml.multi_margin_loss_and_grad(
            da.from_array(scores, chunks=chunks), target, ignore_index=-100
        )
        found = dask.compute(*arrays, scheduler="processes", num_workers=2)
        for a, b in zip(found, wanted, strict=True):
            assert a.tobytes() == b.tobytes()


def slowly(block):
    time.sleep(0.03)
    return block


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
@pytest.mark.parametrize("chunks", [(50, C), (100, 5)], ids=["rows", "both"])
def test_a_killed_worker_changes_no_bit(client, chunks):
    scores, target = data()
    wanted = wanted_of(scores, target, chunks, ignore_index=-100)
    lazy = da.from_array(scores, chunks=chunks).map_blocks(slowly, dtype=np.float32)
    futures = client.compute(mml.multi_margin_loss_and_grad(lazy, target, ignore_index=-100))
    time.sleep(0.3)
    os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
    for future, value in zip(futures, wanted, strict=True):
        assert future.result(timeout=120).tobytes() == value.tobytes()


def warnings_of(client, array):
    """Compute on a cluster, and return the warnings that reach this process."""
    before = len(client.get_events("warn"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = client.compute(array).result(timeout=60)
        # The scheduler has a worker's warning before the result; it comes here when it comes.
        sent = len(client.get_events("warn")) > before
        deadline = time.monotonic() + 5
        while sent and time.monotonic() < deadline:
            if any("mml_arrayapi" in str(one.message) for one in caught):
                break
            time.sleep(0.05)
    return value, [str(one.message) for one in caught if "mml_arrayapi" in str(one.message)]


def slow_scores(scores, chunks):
    return da.from_array(scores, chunks=chunks).map_blocks(slowly, dtype=scores.dtype)


def test_a_mixed_cluster_is_told_to_the_user():
    scores, target = data()
    target = np.where(target < 0, 0, target)
    kernel = mml.explain(scores, target).kernel
    if kernel == "generic":
        pytest.skip("there is no other kernel here")
    environments = {}, {"MML_ARRAYAPI_BACKEND": "generic"}
    with cluster_of(*environments) as cluster, client_of(cluster, 2) as client:
        for chunks in ((50, C), (100, 5)):
            loss = mml.multi_margin_loss(slow_scores(scores, chunks), target)
            value, told = warnings_of(client, loss)
            assert abs(value - loss.compute(scheduler="threads")) < 1e-6
            assert len(told) == 1
            assert told[0].startswith("the workers of this cluster ran different kernels")
            for worker in client.scheduler_info()["workers"]:
                assert f"{worker} ran " in told[0]
            for name in (kernel, "generic"):
                assert f" ran {name} of mml_arrayapi {mml.__version__}" in told[0]
            named = mml.multi_margin_loss(slow_scores(scores, chunks), target, backend=kernel)
            assert warnings_of(client, named)[1] == []


def pretend(version):
    from mml_arrayapi.backends.dask import report

    report.__version__ = version


def test_another_version_is_told_to_the_user(client):
    scores, target = data()
    loss = mml.multi_margin_loss(slow_scores(scores, (50, C)), target, ignore_index=-100)
    assert warnings_of(client, loss)[1] == []
    worker = next(iter(client.scheduler_info()["workers"]))
    client.run(pretend, "0.0.1", workers=[worker])
    try:
        loss = mml.multi_margin_loss(slow_scores(scores, (40, C)), target, ignore_index=-100)
        told = warnings_of(client, loss)[1]
    finally:
        client.run(pretend, mml.__version__, workers=[worker])
    assert len(told) == 1
    assert f"{worker} ran " in told[0]
    assert "of mml_arrayapi 0.0.1" in told[0]
