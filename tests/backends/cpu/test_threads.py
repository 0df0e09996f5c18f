"""The pool: many callers, forks, interrupts, threads that don't start; the number of threads."""

import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mml_arrayapi.backends import cpu, threads

if cpu.native is None:
    pytest.skip(f"no CPU kernels: {cpu.reason()}", allow_module_level=True)

import mml_arrayapi.backends.cpu.numpy  # noqa: F401  accepts NumPy's arrays

SECONDS = float(os.environ.get("MML_TEST_SECONDS", "0.5"))  # 30 for the long run
OPTIONS = 2, 1.0, "mean", None, -1, "auto"


@pytest.fixture
def call(monkeypatch, rng):
    """A call of many blocks on three threads, and what it returns."""
    monkeypatch.setenv(threads.ENVIRONMENT, "3")
    x, y = rng.normal(size=(5000, 100)).astype(np.float32), rng.integers(0, 100, 5000)

    def run():
        grad = np.empty_like(x)
        loss = cpu.native.loss_and_grad(x, y, None, OPTIONS, grad)
        return loss.tobytes() + grad.tobytes()

    return run, run()


def test_eight_threads_at_once(call):
    run, expected = call
    end, wrong, done = time.monotonic() + SECONDS, [], []

    def work():
        while time.monotonic() < end:
            (done if run() == expected else wrong).append(1)

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS + 60)
    assert not any(worker.is_alive() for worker in workers)
    assert not wrong
    assert done


def _in_child(run, expected, queue):
    before = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0
    same = run() == expected
    after = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
    queue.put((same, after > before))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.*:RuntimeWarning")
def test_a_child_forked_after_use_has_a_pool_of_its_own(call):
    run, expected = call
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(run, expected, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get() == (True, True)
    assert run() == expected


INTERRUPT = """
import os, signal, sys, threading, time
import numpy as np
from mml_arrayapi.backends import cpu
import mml_arrayapi.backends.cpu.numpy
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
x = np.random.default_rng(0).normal(size=(60_000, 100)).astype("f4")
y, options, late = np.zeros(len(x), int), (1.37, 1.0, "mean", None, -1, "auto"), []
begin = time.perf_counter()
whole = cpu.native.loss(x, y, None, options)
takes = time.perf_counter() - begin
for k in range(12):
    sent = []
    def kill():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)
    timer = threading.Timer(takes * (k + 1) / 20, kill)
    try:
        timer.start()
        cpu.native.loss(x, y, None, options)
        timer.join()
    except KeyboardInterrupt:
        late.append(time.perf_counter() - sent[0])
    assert cpu.native.loss(x[:2000], y[:2000], None, options) > 0
assert cpu.native.loss(x, y, None, options) == whole
print(len(late), max(late, default=9))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("count", ["1", "3"])
def test_an_interrupt_ends_a_call_soon(count):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPT],
        env={**os.environ, threads.ENVIRONMENT: count},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    interrupted, latest = done.stdout.split()
    assert int(interrupted) >= 6
    assert float(latest) < (0.1 if os.getloadavg()[0] < os.cpu_count() else 2)


FORKING = """
import os, signal, sys
import numpy as np
from mml_arrayapi.backends import cpu
import mml_arrayapi.backends.cpu.numpy
x = np.random.default_rng(0).normal(size=(60_000, 100)).astype("f4")
y, options, children = np.zeros(len(x), int), (1.37, 1.0, "mean", None, -1, "auto"), []
def fork(*_):
    child = os.fork()
    if child:
        children.append(child)
signal.signal(signal.SIGALRM, fork)
expected = cpu.native.loss(x, y, None, options)
signal.setitimer(signal.ITIMER_REAL, 0.03)
me = os.getpid()
try:
    loss = cpu.native.loss(x, y, None, options)
except RuntimeError as error:
    assert os.getpid() != me and "forked" in str(error)
    os._exit(7)
assert os.getpid() == me and loss == expected
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(codes)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_signal_handler_that_forks_within_a_call():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKING],
        env={**os.environ, threads.ENVIRONMENT: "3"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "[7]", done.stderr


NO_THREADS = """
#include <errno.h>
#include <pthread.h>
int pthread_create(pthread_t *t, const pthread_attr_t *a, void *(*f)(void *), void *x) {
    (void)t, (void)a, (void)f, (void)x;
    return EAGAIN;
}
"""
ALONE = """
import os
import numpy as np
from mml_arrayapi.backends import cpu
import mml_arrayapi.backends.cpu.numpy
x = np.random.default_rng(0).normal(size=(5000, 100)).astype("f4")
y, options = np.zeros(len(x), int), (1, 1.0, "mean", None, -1, "auto")
print(cpu.native.loss(x, y, None, options) == cpu.native.loss(x, y, None, options, None, None, 1))
print(len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="LD_PRELOAD of Linux")
@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_threads_that_cannot_be_started_are_done_without(tmp_path):
    (tmp_path / "none.c").write_text(NO_THREADS)
    library = tmp_path / "none.so"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "none.c", "-o", library], check=True)
    done = subprocess.run(
        [sys.executable, "-c", ALONE],
        env={
            **os.environ,
            threads.ENVIRONMENT: "4",
            "LD_PRELOAD": str(library),
            "OPENBLAS_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.split() == ["True", "1"], done.stderr


def test_under_dasks_threads(call):
    dask = pytest.importorskip("dask")
    run, expected = call
    jobs = [dask.delayed(run, pure=False)() for _ in range(60)]
    results = dask.compute(*jobs, scheduler="threads", num_workers=8)
    assert all(result == expected for result in results)


def test_the_caller_limits_the_threads_of_a_large_call(rng, monkeypatch):
    monkeypatch.delenv(threads.ENVIRONMENT, raising=False)
    x, y, asked = rng.normal(size=(2000, 100)), np.zeros(2000, int), []
    cpu.native.set_limit(lambda setting: asked.append(setting) or 1)
    try:
        for setting in (None, 5, lambda: 7):
            cpu.native.loss(x, y, None, OPTIONS, None, None, setting)
            cpu.native.loss(x[:10], y[:10], None, OPTIONS, None, None, setting)  # doesn't ask
    finally:
        cpu.native.set_limit(threads.number_of_threads)
    assert asked == [None, 5, 7]
    with pytest.raises(ZeroDivisionError):
        cpu.native.loss(x, y, None, OPTIONS, None, None, lambda: 1 // 0)
    monkeypatch.setenv(threads.ENVIRONMENT, "none")
    with pytest.raises(ValueError, match="MML_ARRAYAPI_NUM_THREADS must be a positive integer"):
        cpu.native.loss(x, y, None, OPTIONS)


def test_settings_of_any_length(monkeypatch):
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    for text, number in (("0007", 7), ("9" * 5000, 1024), ("1023", 1023), ("1025", 1024)):
        monkeypatch.setenv(threads.ENVIRONMENT, text)
        assert threads.number_of_threads() == number
    monkeypatch.setenv(threads.ENVIRONMENT, "000")
    with pytest.raises(ValueError, match="must be a positive integer, but is '000'"):
        threads.number_of_threads()
    monkeypatch.delenv(threads.ENVIRONMENT)
    for text in ("0001", "1,9"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads.number_of_threads() == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    every = threads.number_of_threads()
    for text in ("9" * 5000, "0", "none"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads.number_of_threads() == every


def test_number_of_threads(monkeypatch):
    monkeypatch.delenv(threads.ENVIRONMENT, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.number_of_threads() == allowed
    assert threads.number_of_threads(1) == 1
    assert threads.number_of_threads(10**6) == allowed
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1)
    assert threads.number_of_threads() == 1
    monkeypatch.setattr(threads, "cpu_quota", lambda: 10**6)
    assert threads.number_of_threads() == allowed
    monkeypatch.setattr(threads, "cpu_quota", lambda: 1)
    with threads.one_of(3):
        assert threads.number_of_threads() == 1
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: range(7), raising=False)
    monkeypatch.setattr(threads, "cpu_quota", lambda: None)
    with threads.one_of(2):
        assert threads.number_of_threads() == 3
        assert threads.number_of_threads(5) == 2
        with threads.one_of(8):
            assert threads.number_of_threads() == 1
        assert threads.number_of_threads() == 3
        with ThreadPoolExecutor(1) as pool:  # another thread is not in the block
            assert pool.submit(threads.number_of_threads).result() == 7
    assert threads.number_of_threads() == 7
    monkeypatch.undo()
    monkeypatch.delenv(threads.ENVIRONMENT, raising=False)
    for text in ("1", "1,4", " 1 "):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads.number_of_threads() == 1
        assert threads.number_of_threads(10**6) == allowed  # the library's own word counts
    for text in ("", "0", "-1", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert threads.number_of_threads() == allowed
    monkeypatch.setenv(threads.ENVIRONMENT, "3")
    assert threads.number_of_threads(1) == 3
    monkeypatch.setenv(threads.ENVIRONMENT, "9" * 30)
    assert threads.number_of_threads(1) == 1024
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(threads.ENVIRONMENT, wrong)
        with pytest.raises(ValueError, match=f"MML_ARRAYAPI_NUM_THREADS .* but is '{wrong}'"):
            threads.number_of_threads()


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/a/b", {"a/cpu.max": "150000 100000", "a/b/cpu.max": "max 100000"}, 1),
        ("0::/a/b", {"cpu.max": "max 100000", "a/b/cpu.max": "399999 100000"}, 3),
        ("0::/../..", {"cpu.max": "10000 100000"}, 1),
        ("0::/a", {"a/cpu.max": "max 100000"}, None),
        ("0::/a", {"a/cpu.max": "nonsense"}, None),
        (
            "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x",
            {"cpu/docker/x/cpu.cfs_quota_us": "400000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
            4,
        ),
        ("4:cpu:/x", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("4:cpu:/x", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/x", {}, None),
        (None, {}, None),
    ],
    ids=str,
)
def test_quota_of_control_groups(tmp_path, groups, files, expected):
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(groups + "\n")
    for name, text in files.items():
        path = tmp_path / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    assert threads.cpu_quota(str(tmp_path)) == expected


@pytest.mark.parametrize("forced", [False, True])
def test_a_build_that_is_missing_leaves_its_place_to_the_next(monkeypatch, forced):
    *lesser, best = filter(cpu.native.supports, cpu.BUILDS)
    if not lesser:
        pytest.skip("this processor runs the baseline alone")
    missing = f"{cpu.__name__}._{best}"
    found = cpu.find_spec
    monkeypatch.setattr(cpu, "find_spec", lambda name: None if name == missing else found(name))
    monkeypatch.setattr(cpu, "import_module", _only_others(missing))
    monkeypatch.setenv(cpu.ENVIRONMENT, best if forced else "")
    module, reason = cpu._load()
    if forced:
        assert module is None
        assert missing in reason
    else:
        assert (module.__name__, reason) == (f"{cpu.__name__}._{lesser[-1]}", None)


def _only_others(missing):
    def load(name):
        if name == missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return importlib.import_module(name)

    return load


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only ELF files are looked at")
def test_a_library_that_was_cut_off_is_not_loaded(tmp_path, monkeypatch):
    """To load it would be a fatal signal."""
    whole = Path(cpu.native.__file__)
    assert not cpu._is_cut_off(whole)
    assert not cpu._is_cut_off(tmp_path / "none")
    cut = tmp_path / whole.name
    for size in (100, 5000, whole.stat().st_size - 1):
        cut.write_bytes(whole.read_bytes()[:size])
        assert cpu._is_cut_off(cut)
    spec = importlib.util.spec_from_file_location("cut", cut)
    monkeypatch.setattr(cpu, "find_spec", lambda _: spec)
    module, reason = cpu._load()
    assert module is None
    assert f"{cut} is not whole" in reason
    monkeypatch.setattr(cpu, "_HERE", tmp_path)  # an installation, which has no sources
    assert cpu._load() == (
        None,
        f"the compiled kernels cannot be loaded ({cut} is not whole): install mml_arrayapi again",
    )
