"""A pool of threads for kernels that release the GIL: made when first needed, remade after a fork.

The caller's thread works too, and takes back what no worker has begun. So a call ends even where
all workers are busy with other callers' blocks, and calls from many threads at once, from Dask's
for instance, can't wait for each other.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

ENVIRONMENT = "MML_ARRAYAPI_NUM_THREADS"

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0
_callers = 0  # calls that now share the CPUs


def _forget() -> None:
    """Start afresh in a forked child: the threads stayed with the parent, the lock may be held."""
    global _lock, _pool, _size, _callers
    _lock, _pool, _size, _callers = threading.Lock(), None, 0, 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def number_of_threads(library_setting: int | None = None) -> int:
    """Tell how many threads a large call may use.

    Parameters
    ----------
    library_setting : int, optional
        What the array library was told to use.

    Returns
    -------
    int
        The environment variable ``MML_ARRAYAPI_NUM_THREADS`` if it is set. Else the number of CPUs
        that this process may run on, no more than its control group's quota of CPU time, and no
        more than the library's setting or, where there is none, ``OMP_NUM_THREADS``.

    Raises
    ------
    ValueError
        ``MML_ARRAYAPI_NUM_THREADS`` is no positive integer.

    Examples
    --------
    >>> from mml_arrayapi.backends.threads import number_of_threads
    >>> number_of_threads(1)
    1
    """
    text = os.environ.get(ENVIRONMENT)
    if text:
        if not text.strip().isdecimal() or int(text) < 1:
            raise ValueError(f"{ENVIRONMENT} must be a positive integer, but is {text!r}")
        return int(text)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = (cpus, cpu_quota(), library_setting or _openmp_setting())
    return max(1, min(limit for limit in limits if limit is not None))


def _openmp_setting() -> int | None:
    """Return the first number of ``OMP_NUM_THREADS``; anything else counts for nothing."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(text) if text.isdecimal() and int(text) else None


@cache
def cpu_quota(root: str = "/") -> int | None:
    """Tell how many CPUs' time Linux gives to this process's control group.

    Parameters
    ----------
    root : str, optional
        Where the file system begins; another directory for a test.

    Returns
    -------
    int or None
        The whole CPUs of the smallest quota among the group and those it is in, at least 1; None
        without a quota. Read once.
    """
    quotas = []
    for folder, inner in _control_groups(Path(root)):
        while True:
            quotas += _quota_in(folder / inner)
            if not inner.parts:
                break
            inner = inner.parent if inner.parent != inner else Path()
    return max(1, math.floor(min(quotas))) if quotas else None


def _control_groups(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield where control groups are mounted, and this process's path there, versions 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeError):
        return
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        # Seen from inside a container, the path may lead out of what is mounted.
        inner = Path(*(part for part in path.split("/") if part not in ("", "..")))
        if number == "0" and not controllers:
            yield root / "sys/fs/cgroup", inner
        elif "cpu" in controllers.split(","):
            yield root / "sys/fs/cgroup/cpu", inner


def _quota_in(folder: Path) -> list[float]:
    """Read a group's quota, in CPUs."""
    for name, period_name in (("cpu.max", None), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = (folder / name).read_text().split()
            if period_name:
                words += (folder / period_name).read_text().split()
            quota, period = (int(word) for word in words)
        except (OSError, ValueError):  # no such file; "max": no quota
            continue
        if quota > 0 and period > 0:  # version 1 says -1 for none
            return [quota / period]
    return []


def run(task: Callable[[int], Result], count: int, threads: int) -> list[Result]:
    """Run ``task(0)`` to ``task(count - 1)``, at most ``threads`` at a time.

    Parameters
    ----------
    task : callable
        Takes the task's number. It should release the GIL.
    count : int
        How many tasks there are.
    threads : int
        How many threads may work, the caller's among them. Calls that are made at the same time,
        by Dask's threads for instance, share them.

    Returns
    -------
    list
        The results, in the order of the numbers, whoever computed them.
    """
    threads = min(threads, count)
    if threads <= 1:
        return [task(i) for i in range(count)]
    left = deque(range(count))
    results: dict[int, Result] = {}

    def work() -> None:
        while True:
            try:
                i = left.popleft()  # atomic: no two workers get the same task
            except IndexError:
                return
            results[i] = task(i)

    with _sharing() as callers:
        futures = _submit(work, threads // callers - 1)
        try:
            work()
        finally:
            left.clear()
            waiting = [future for future in futures if not future.cancel()]
            failures = [future.exception() for future in waiting]
    for failure in failures:
        if failure is not None:
            raise failure
    return [results[i] for i in range(count)]


@contextmanager
def _sharing() -> Iterator[int]:
    """Count the calls that are being made, and tell how many there are."""
    global _callers
    with _lock:
        _callers += 1
        callers = _callers
    try:
        yield callers
    finally:
        with _lock:
            _callers -= 1


def _submit(work: Callable[[], None], size: int) -> list[Future[None]]:
    futures: list[Future[None]] = []
    with suppress(RuntimeError):  # at interpreter exit no thread may be started
        for _ in range(size):  # one by one: those begun are to be waited for
            futures.append(_pool_of(size).submit(work))  # noqa: PERF401
    return futures


def _pool_of(size: int) -> ThreadPoolExecutor:
    """Return the pool, made larger if need be."""
    global _pool, _size
    with _lock:
        if _pool is None or _size < size:
            if _pool is not None:
                _pool.shutdown(wait=False)
            _pool, _size = ThreadPoolExecutor(size, thread_name_prefix="mml_arrayapi"), size
        return _pool
