"""A real Dask cluster: several worker processes over TCP, killed, hanging, and gone."""

import asyncio
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation import cluster as cluster_module
from mml_arrayapi.evaluation.command import add_parser
from mml_arrayapi.evaluation.journal import NAME

distributed = pytest.importorskip("distributed")
da = pytest.importorskip("dask.array")

pytestmark = [
    # distributed warns of what it finds when workers are killed, at times that vary.
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs POSIX signals"),
]

N, C, PIECE = 2000, 5, 25


def local_cluster(n):
    return distributed.LocalCluster(
        n_workers=n,
        threads_per_worker=1,
        processes=True,
        protocol="tcp://",
        host="127.0.0.1",
        dashboard_address=None,
        silence_logs=50,
    )


@pytest.fixture(scope="module")
def cluster():
    with local_cluster(3) as made:
        yield made


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster, set_as_default=False) as made:
        made.wait_for_workers(3, timeout=60)
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cluster")
    rng = np.random.default_rng(0)
    np.save(made / "x.npy", rng.standard_normal((N, C)).astype(np.float32))
    np.save(made / "y.npy", rng.integers(0, C, N))
    return made


@pytest.fixture(scope="module")
def wanted(folder):
    return mml.evaluate(folder / "x.npy", folder / "y.npy")


def run(folder, address, **keywords):
    keywords = {"chunk_size": PIECE, "timeout": 60, **keywords}
    return mml.evaluate(folder / "x.npy", folder / "y.npy", scheduler=address, **keywords)


def at(pieces, act):
    """Do something when so many pieces are finished."""

    def progress(done, rows):
        if done == pieces * PIECE:
            act()

    return progress


def pids(client):
    return list(client.run(os.getpid).values())


def test_the_figures_are_the_same(folder, client, wanted):
    assert run(folder, client.scheduler.address) == wanted
    assert run(folder, client.scheduler.address, chunk_size=900, workers=3) == wanted
    lazy = [da.from_array(np.load(folder / name), chunks=300) for name in ("x.npy", "y.npy")]
    assert mml.evaluate(*lazy, scheduler=client.scheduler.address, chunk_size=500) == wanted


def test_the_kernel_gives_the_same_bits(folder, client, wanted):
    scores, target = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    for chunks in ((300, C), (300, 2)):
        loss, grad = mml.multi_margin_loss_and_grad(da.from_array(scores, chunks=chunks), target)
        ours = client.gather(client.compute([loss, grad]))
        local = [array.compute(scheduler="synchronous") for array in (loss, grad)]
        assert ours[0] == local[0]
        assert (ours[1] == local[1]).all()
    rows = mml.multi_margin_loss(da.from_array(scores, chunks=(300, C)), target)
    assert client.compute(rows).result() == np.float32(wanted.loss)


def slowly(block):
    time.sleep(0.05)
    return block


def test_the_kernel_survives_a_killed_worker(folder, client, wanted):
    scores, target = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    lazy = da.from_array(scores, chunks=(50, C)).map_blocks(slowly, dtype=np.float32)
    future = client.compute(mml.multi_margin_loss(lazy, target))
    time.sleep(0.4)
    os.kill(pids(client)[0], signal.SIGKILL)
    assert future.result(timeout=60) == np.float32(wanted.loss)


def test_a_target_out_of_range_is_found_by_a_worker(folder, client):
    scores, target = np.load(folder / "x.npy"), np.load(folder / "y.npy")
    target[1234] = C
    future = client.compute(mml.multi_margin_loss(da.from_array(scores, chunks=(300, C)), target))
    with pytest.raises(mml.InvalidTargetError, match=r"target\[1234\] is 5"):
        future.result(timeout=60)
    with pytest.raises(mml.InvalidTargetError, match=r"target\[1234\] is 5"):
        mml.evaluate(scores, target, scheduler=client.scheduler.address, chunk_size=300)
    with pytest.raises(
        mml.InputError, match=r"gone.npy: the file has changed since .*No such file"
    ):
        lose_a_file(folder, client.scheduler.address)


def lose_a_file(folder, address):
    """Remove a file after it has been looked at, before the workers read it."""
    from mml_arrayapi.evaluation.cluster import Work, run
    from mml_arrayapi.evaluation.formats import Rules
    from mml_arrayapi.evaluation.inputs import open_dataset
    from mml_arrayapi.evaluation.metrics import Loss, count_batch

    np.save(folder / "gone.npy", np.zeros((N, C)))
    data = open_dataset(folder / "gone.npy", folder / "y.npy", None, -1, None, Rules())
    os.remove(folder / "gone.npy")
    work = Work(count_batch, (data.axis, Loss(), C, 1), {0: data.batches[0]}, False, 0)
    list(run(work, address, None, 60))


def test_a_worker_killed_in_mid_run(folder, client, wanted):
    victims = pids(client)
    killed = []

    def kill():
        killed.append(victims[0])
        os.kill(victims[0], signal.SIGKILL)

    assert run(folder, client.scheduler.address, progress=at(5, kill)) == wanted
    assert killed


def test_a_worker_that_hangs(folder, client, wanted):
    victims = pids(client)
    stop = at(5, lambda: os.kill(victims[0], signal.SIGSTOP))
    try:
        assert run(folder, client.scheduler.address, timeout=2, progress=stop) == wanted
    finally:
        os.kill(victims[0], signal.SIGCONT)


def test_all_workers_hang(folder, client, wanted, tmp_path):
    victims = pids(client)

    def stop():
        for victim in victims:
            os.kill(victim, signal.SIGSTOP)

    address = client.scheduler.address
    try:
        with pytest.raises(mml.WorkerError, match="no batch has been finished for 3 s, and no wor"):
            run(folder, address, timeout=3, progress=at(5, stop), checkpoint=tmp_path)
    finally:
        for victim in victims:
            os.kill(victim, signal.SIGCONT)
    assert (tmp_path / NAME).read_bytes().count(b"\n") >= 6
    assert run(folder, address, checkpoint=tmp_path) == wanted


# What Python runs when it starts, if it is called sitecustomize.py
STRANGERS = {
    "no package": """
import sys

class Finder:
    def find_spec(name, *_):
        if name == "mml_arrayapi":
            raise ModuleNotFoundError("No module named 'mml_arrayapi'")

sys.meta_path.insert(0, Finder)
""",
    "other version": "import mml_arrayapi; mml_arrayapi.__version__ = '0.0.1'",
}
MESSAGES = {
    "no package": r"worker tcp://.*: mml_arrayapi cannot be imported there \(No module named "
    rf"'mml_arrayapi'\); install version {mml.__version__} there",
    "other version": rf"worker tcp://.*: has mml_arrayapi 0.0.1, but this is {mml.__version__}; "
    "install the same on all",
}


@pytest.fixture
def stranger(tmp_path):
    """Start a worker that has not this package, or another version of it."""
    started = []

    def start(kind, address):
        (tmp_path / "sitecustomize.py").write_text(STRANGERS[kind])
        command = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-dashboard", address]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        started.append(subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL))

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("kind", STRANGERS)
@pytest.mark.parametrize("others", [0, 1])
def test_workers_without_this_version(folder, stranger, kind, others):
    with local_cluster(others) as made:
        stranger(kind, made.scheduler_address)
        with pytest.raises(mml.WorkerError, match=MESSAGES[kind]):
            run(folder, made.scheduler_address, workers=others + 1)


def test_workers_of_another_version_do_not_take_over(folder, stranger):
    with local_cluster(1) as made, distributed.Client(made, set_as_default=False) as client:
        (victim,) = pids(client)

        def replace():
            os.kill(victim, signal.SIGSTOP)
            stranger("other version", made.scheduler_address)
            client.wait_for_workers(2, timeout=60)

        try:
            with pytest.raises(mml.WorkerError, match=MESSAGES["other version"]):
                run(folder, made.scheduler_address, timeout=3, progress=at(5, replace))
        finally:
            os.kill(victim, signal.SIGCONT)


def test_a_worker_that_hangs_from_the_start(folder, client, wanted):
    victims = pids(client)
    os.kill(victims[0], signal.SIGSTOP)
    try:
        assert run(folder, client.scheduler.address, timeout=2) == wanted
    finally:
        os.kill(victims[0], signal.SIGCONT)


CLIENT = """
import sys, time
import mml_arrayapi as mml
mml.evaluate("x.npy", "y.npy", chunk_size=25, checkpoint=sys.argv[2], scheduler=sys.argv[1],
             progress=lambda *_: time.sleep(0.02))
"""


def test_kill_9_of_the_client(folder, client, wanted, tmp_path):
    address, journal = client.scheduler.address, tmp_path / NAME
    process = subprocess.Popen([sys.executable, "-c", CLIENT, address, str(tmp_path)], cwd=folder)
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = journal.read_bytes().count(b"\n")
    assert before < 1 + N // PIECE
    assert run(folder, address, checkpoint=tmp_path) == wanted


def test_a_scheduler_that_goes_away_and_the_run_after(folder, wanted, tmp_path):
    with local_cluster(1) as lost:
        keywords = {"progress": at(5, lost.close), "checkpoint": tmp_path, "timeout": 10}
        with pytest.raises(
            mml.WorkerError, match=r"the connection to the scheduler tcp.* is lost; run"
        ):
            run(folder, lost.scheduler_address, **keywords)
    assert run(folder, "threads", checkpoint=tmp_path) == wanted


@pytest.mark.parametrize(
    ("address", "tries"),
    [("tcp://127.0.0.1:1", 1), ("thread", 0), ("", 0), ("tcp://127.0.0.1", 0), ("no://a:1", 0)],
)
def test_no_scheduler_at_that_address(folder, capsys, monkeypatch, address, tries):
    from argparse import ArgumentParser

    tried = []
    start = distributed.Client._start

    async def counted(*arguments, **keywords):
        tried.append(1)
        await start(*arguments, **keywords)

    monkeypatch.setattr(distributed.Client, "_start", counted)
    monkeypatch.setattr(cluster_module, "CONNECT", 0.3)
    parser = ArgumentParser()
    add_parser(parser.add_subparsers())
    files = [str(folder / name) for name in ("x.npy", "y.npy")]
    arguments = parser.parse_args(["evaluate", *files, "--scheduler", address])
    assert arguments.run(arguments) == 2
    error = capsys.readouterr().err
    assert f"error: scheduler {address}: no Dask scheduler answers there; accepted are" in error
    assert error.count("\n") == 1
    assert len(tried) == tries


def test_a_scheduler_without_workers(folder):
    with (
        local_cluster(0) as empty,
        pytest.raises(mml.WorkerError, match="has 0 workers, but 1 are waited for; start some"),
    ):
        run(folder, empty.scheduler_address, timeout=0.5)


def test_an_adaptive_cluster_starts_workers(folder, wanted):
    with local_cluster(0) as made:
        made.adapt(minimum=0, maximum=2)
        assert mml.evaluate(folder / "x.npy", folder / "y.npy", scheduler=made) == wanted


def test_more_workers_than_an_adaptive_cluster_starts(folder):
    with local_cluster(0) as made:
        made.adapt(minimum=0, maximum=2)
        message = r"but 2 are waited for; let its cluster have them, as by scale\(2\)"
        with pytest.raises(mml.WorkerError, match=message):
            run(folder, made, timeout=3, workers=2)


def test_asynchronous_clusters_are_refused(folder):
    async def evaluate():
        how = {"n_workers": 0, "processes": False, "dashboard_address": None}
        async with distributed.LocalCluster(asynchronous=True, **how) as made:
            run(folder, made)

    with pytest.raises(TypeError, match="must be a Client or Cluster that is not asynchronous"):
        asyncio.run(evaluate())


def test_persisted_arrays_need_their_client(folder, client, wanted):
    lazy = [da.from_array(np.load(folder / f"{name}.npy"), chunks=300) for name in "xy"]
    lazy = client.persist([lazy[0].rechunk({1: -1}), lazy[1]])
    assert mml.evaluate(*lazy, scheduler=client).loss == wanted.loss
    with pytest.raises(mml.InputError, match=r"chunks are on a cluster .* scheduler=client"):
        mml.evaluate(*lazy)


def test_a_closed_cluster(folder):
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as closed:
        pass
    with pytest.raises(mml.InputError, match="no Dask scheduler answers there"):
        mml.evaluate(folder / "x.npy", folder / "y.npy", scheduler=closed)


def test_a_closed_client(folder, cluster):
    with distributed.Client(cluster, set_as_default=False) as closed:
        pass
    with pytest.raises(mml.InputError, match="scheduler: the client or its cluster is closed"):
        mml.evaluate(folder / "x.npy", folder / "y.npy", scheduler=closed)


def test_workers_run_the_callers_kernel(tmp_path):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((1000, 200)).astype("f4"), rng.integers(0, 200, 1000)
    here, generic = mml.evaluate(x, y), mml.evaluate(x, y, backend="generic")
    with distributed.LocalCluster(
        n_workers=1,
        threads_per_worker=1,
        dashboard_address=None,
        silence_logs=50,
        env={"MML_ARRAYAPI_BACKEND": "generic"},
    ) as cluster:
        assert mml.evaluate(x, y, scheduler=cluster, chunk_size=100) == here
        with mml.use_backend("generic"):
            assert mml.evaluate(x, y, scheduler=cluster) == generic
