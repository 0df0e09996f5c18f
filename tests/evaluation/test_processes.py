"""Dask's clients and clusters as schedulers; processes that are killed or interrupted."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation import cluster as module
from mml_arrayapi.evaluation.errors import WorkerError
from mml_arrayapi.evaluation.journal import NAME

distributed = pytest.importorskip("distributed")
psutil = pytest.importorskip("psutil")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of distributed, when workers are killed
    pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs POSIX signals"),
]

PROGRAM = """
import time
import mml_arrayapi as mml
if __name__ == "__main__":
    mml.evaluate("x.npy", "y.npy", chunk_size=10, checkpoint="ck", scheduler="processes",
                 workers=2, progress=lambda *_: time.sleep(0.05))
"""


def await_batches(process, folder, count):
    """Wait until a program's journal has so many batches."""
    journal = folder / "ck" / NAME
    deadline = time.monotonic() + 120
    while not journal.exists() or journal.read_bytes().count(b"\n") < 1 + count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def running(files):
    """A program in a session of its own, with a few batches finished; its children too."""
    (files / "program.py").write_text(PROGRAM)
    command = [sys.executable, "program.py"]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    await_batches(process, files, 4)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 2
    yield process, children
    _, left = psutil.wait_procs(children, timeout=0)
    for orphan in left:
        orphan.kill()


def test_no_orphans_and_the_same_bits_after_resuming(files, wanted, running):
    process, children = running
    max(children, key=lambda child: child.create_time()).kill()
    await_batches(process, files, 12)
    children += psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(timeout=60)
    assert process.returncode == -9
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []
    steps = []
    options = {"chunk_size": 10, "checkpoint": "ck", "progress": lambda *_: steps.append(1)}
    assert mml.evaluate("x.npy", "y.npy", **options) == wanted
    assert steps


@pytest.mark.parametrize("batches", [0, 4, 70], ids=["starting", "counting", "closing"])
def test_ctrl_c_ends_the_command(files, batches):
    arguments = "evaluate x.npy y.npy --chunk-size 10 --checkpoint ck --scheduler processes"
    command = [sys.executable, "-m", "mml_arrayapi", *arguments.split(), "--workers", "2"]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children = []
    while len(children) < 3:  # two workers, and what multiprocessing starts for itself
        children = psutil.Process(process.pid).children(recursive=True)
        time.sleep(0.02)
    if batches:
        await_batches(process, files, batches)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "interrupted\n")
    assert process.returncode == 130
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []


class Callback:
    def __del__(self):  # Python ignores what is raised here
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)


def test_ctrl_c_within_a_callback_is_not_lost(files):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []

    def progress(*_):
        done.append(1)
        Callback()

    options = {"n_workers": 1, "processes": False, "dashboard_address": None}
    try:
        with distributed.LocalCluster(**options) as cluster, pytest.raises(KeyboardInterrupt):
            mml.evaluate("x.npy", "y.npy", scheduler=cluster, chunk_size=10, progress=progress)
        assert len(done) == 1
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def noted(block):
    with open("calls", "a") as file:  # a worker may have a copy of any list
        file.write("x")
    return block


def test_clients_and_clusters(arrays, files, wanted):
    da = pytest.importorskip("dask.array")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": "127.0.0.1:0"}
    with (
        distributed.LocalCluster(processes=False, **options) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        for scheduler in (client, cluster, cluster.scheduler_address):
            options = {"chunk_size": 100, "timeout": float("inf")}
            assert mml.evaluate("x.npy", "y.npy", scheduler=scheduler, **options) == wanted
        lazy = [da.from_array(a, chunks=100) for a in arrays]
        assert mml.evaluate(*lazy, scheduler=client) == wanted
        made = lazy[0].map_blocks(noted, dtype=np.float32, meta=np.empty((0, 0), np.float32))
        assert mml.evaluate(made, lazy[1], scheduler=client, chunk_size=10) == wanted
        assert (files / "calls").read_text() == "x" * 7
        assert client.status == "running"  # the caller's own
    with pytest.raises(
        TypeError, match="scheduler must be 'threads', 'processes', an address, or a"
    ):
        mml.evaluate(*arrays, scheduler=3)


def test_a_program_without_a_guard(files):
    (files / "program.py").write_text(
        "import mml_arrayapi as mml\n"
        "print(mml.evaluate('x.npy', 'y.npy', scheduler='processes', workers=1).loss)\n"
    )
    made = subprocess.run([sys.executable, "program.py"], capture_output=True, text=True)
    assert made.returncode == 1
    assert "WorkerError: the worker processes do not start (" in made.stderr.splitlines()[-1]
    assert 'call evaluate() below `if __name__ == "__main__":`' in made.stderr.splitlines()[-1]


def test_a_program_from_standard_input(files):
    program = (
        "import mml_arrayapi as mml\n"
        "if __name__ == '__main__':\n"
        "    print(mml.evaluate('x.npy', 'y.npy', scheduler='processes', workers=1).loss)\n"
    )
    made = subprocess.run([sys.executable, "-"], input=program, capture_output=True, text=True)
    assert made.returncode == 1
    last = made.stderr.splitlines()[-1]
    assert "WorkerError: the worker processes do not start (" in last
    assert last.endswith("; each of them imports the program, which must be a file")


def test_a_process_that_may_have_no_children(files):
    """Such as the workers of multiprocessing's pools."""
    words = (
        r"processes are not allowed to have children\); use threads here, as in the workers of a"
    )
    with get_context("spawn").Pool(1) as pool, pytest.raises(WorkerError, match=words):
        pool.apply(mml.evaluate, ("x.npy", "y.npy"), {"scheduler": "processes"})


def test_memory_limits_the_workers(monkeypatch):
    monkeypatch.setattr(module, "_allowed_memory", lambda: 2**30)
    assert module._affordable(64, 2**24) == 6
    assert module._affordable(64, 2**24, module.PER_PROCESS) == 1
    assert module._affordable(64, 2**34) == 1
    monkeypatch.setattr(module, "_allowed_memory", lambda: 2**40)
    assert module._affordable(64, 2**24) == 64


def test_the_memory_of_a_control_group_counts(monkeypatch, tmp_path):
    import builtins

    real = open
    told = {
        "/proc/self/cgroup": "0::/box/inner\n4:memory:/job\n",
        "/sys/fs/cgroup/box/memory.max": "123456789\n",
        "/sys/fs/cgroup/box/inner/memory.max": "max\n",
        "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "999999999\n",
    }

    def fake(path, *arguments, **keywords):
        if str(path).startswith(("/proc/self", "/sys/fs")):
            if path not in told:
                raise FileNotFoundError(path)
            place = tmp_path / "told"
            place.write_text(told[path])
            return real(place, *arguments, **keywords)
        return real(path, *arguments, **keywords)

    monkeypatch.setattr(builtins, "open", fake)
    assert module._allowed_memory() == 123456789
    del told["/sys/fs/cgroup/box/memory.max"]
    assert module._allowed_memory() == 999999999
