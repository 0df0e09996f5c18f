"""The thread pool: order, failures, many callers, forks, Dask's threads, the number of threads."""

import ctypes
import multiprocessing
import os
import sys
import threading
import time

import numpy as np
import pytest

from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
from mml_arrayapi.backends import cpu_blocks, threads

SECONDS = float(os.environ.get("MML_TEST_SECONDS", "0.5"))  # 30 for the long run


def test_results_come_in_order_whoever_computes_them():
    names = set()

    def task(i):
        names.add(threading.current_thread().name)
        time.sleep(0.002)
        return i * i

    assert threads.run(task, 40, 4) == [i * i for i in range(40)]
    assert len(names) > 1
    assert threads.run(task, 0, 4) == []


def test_one_thread_works_in_the_callers():
    assert set(threads.run(lambda _: threading.get_ident(), 5, 1)) == {threading.get_ident()}


@pytest.mark.parametrize("bad", [0, 7, 19])
def test_a_failing_task_raises_in_the_caller_and_the_pool_goes_on(bad):
    def task(i):
        time.sleep(0.001)
        if i == bad:
            raise KeyError(i)
        return i

    with pytest.raises(KeyError):
        threads.run(task, 20, 3)
    assert threads.run(lambda i: i, 20, 3) == list(range(20))


def test_a_call_ends_while_all_workers_are_busy():
    release, released = threading.Event(), []
    task = lambda _: released.append(release.wait(20))  # noqa: E731
    blocker = threading.Thread(target=threads.run, args=(task, 2, 2))
    blocker.start()
    assert threads.run(lambda i: i, 10, 2) == list(range(10))
    release.set()
    blocker.join()
    assert released == [True, True]  # nobody waited until the tasks gave up


def test_calls_at_the_same_time_share_the_threads():
    begun, release = threading.Event(), threading.Event()

    def task(_):
        begun.set()
        release.wait(20)

    other = threading.Thread(target=threads.run, args=(task, 2, 2))
    other.start()
    begun.wait(20)
    assert set(threads.run(lambda _: threading.get_ident(), 20, 2)) == {threading.get_ident()}
    release.set()
    other.join()


def test_an_interrupted_call_stops_its_other_threads(monkeypatch):
    pytest.importorskip("numba")
    monkeypatch.setattr(cpu_blocks, "SERIAL", 0)
    monkeypatch.setattr(cpu_blocks, "BLOCK", 10)
    caller, count = threading.current_thread(), 100

    def run(blocks):
        if threading.current_thread() is caller:
            time.sleep(0.05)
            raise KeyboardInterrupt
        time.sleep(0.001)
        return ctypes.c_int64.from_address(blocks[3]).value < count

    with pytest.raises(KeyboardInterrupt):
        cpu_blocks._in_blocks(run, rows=10 * count, columns=1, form="rows", setting=2)


def test_number_of_threads(monkeypatch):
    monkeypatch.delenv(threads.ENVIRONMENT, raising=False)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert threads.number_of_threads() == allowed
    assert threads.number_of_threads(1) == 1
    assert threads.number_of_threads(10**6) == allowed
    monkeypatch.setenv(threads.ENVIRONMENT, "3")
    assert threads.number_of_threads(1) == 3
    for wrong in ("0", "-1", "two", "1.5"):
        monkeypatch.setenv(threads.ENVIRONMENT, wrong)
        with pytest.raises(ValueError, match=f"MML_ARRAYAPI_NUM_THREADS .* but is '{wrong}'"):
            threads.number_of_threads()


@pytest.fixture
def call(monkeypatch):
    """A call of many blocks on three threads, and what it returns."""
    pytest.importorskip("numba")
    monkeypatch.setenv(threads.ENVIRONMENT, "3")
    monkeypatch.setattr(cpu_blocks, "BLOCK", 2000)
    monkeypatch.setattr(cpu_blocks, "SERIAL", 0)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(500, 40)).astype(np.float32), rng.integers(0, 40, 500)

    def run():
        loss, grad = multi_margin_loss_and_grad(x, y, p=2, backend="numpy-cpu")
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
    def task(_):
        time.sleep(0.01)
        return threading.get_ident()

    queue.put(run() == expected and len(set(threads.run(task, 20, 3))) > 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork.*:RuntimeWarning")
def test_a_child_forked_after_use_works(call):
    run, expected = call
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        queue = context.SimpleQueue()
        child = context.Process(target=_in_child, args=(run, expected, queue))
        child.start()
        child.join(60)
        assert child.exitcode == 0
        assert queue.get()
    assert run() == expected


def test_under_dasks_threads(call):
    dask = pytest.importorskip("dask")
    run, expected = call
    jobs = [dask.delayed(run, pure=False)() for _ in range(60)]
    results = dask.compute(*jobs, scheduler="threads", num_workers=8)
    assert all(result == expected for result in results)


def test_torch_setting_limits_the_threads(monkeypatch):
    torch = pytest.importorskip("torch")
    pytest.importorskip("numba")
    monkeypatch.delenv(threads.ENVIRONMENT, raising=False)
    seen = []
    real = threads.run
    monkeypatch.setattr(
        threads, "run", lambda task, count, limit: seen.append(limit) or real(task, count, limit)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = torch.zeros(cpu_blocks.SERIAL // 8 + 1, 8)
        y = torch.zeros(len(x), dtype=torch.int64)
        multi_margin_loss(x, y, backend="torch-cpu")
    finally:
        torch.set_num_threads(before)
    assert seen == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="large pages are asked for on Linux only")
def test_a_large_gradient_of_pytorch_is_an_ordinary_tensor():
    torch = pytest.importorskip("torch")
    pytest.importorskip("numba")
    x = torch.zeros(2**11, 2**10, requires_grad=True)
    multi_margin_loss(x, torch.zeros(2**11, dtype=torch.int64), backend="torch-cpu").backward()
    assert x.grad.sum().abs() < 1e-3
    assert x.grad.resize_(4, 4).shape == (4, 4)
