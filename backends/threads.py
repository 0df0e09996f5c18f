"""The number of threads that a large call on the CPU may use."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

ENVIRONMENT = "MML_ARRAYAPI_NUM_THREADS"
MOST = 1024

_workers: ContextVar[int] = ContextVar("mml_arrayapi_workers", default=1)


@contextmanager
def one_of(workers: int) -> Iterator[None]:
    """Let this thread's calls take their share, where so many threads make calls side by side."""
    token = _workers.set(workers)
    try:
        yield
    finally:
        _workers.reset(token)


def number_of_threads(library_setting: int | None = None) -> int:
    """Tell how many threads a large call may use.

    Parameters
    ----------
    library_setting : int, optional
        What the array library was told to use.

    Returns
    -------
    int
        The environment variable ``MML_ARRAYAPI_NUM_THREADS`` if it is set, 1024 at most. Else the
        number of CPUs that this process may run on, no more than its control group's quota of CPU
        time, and no more than the library's setting or, where there is none, ``OMP_NUM_THREADS``;
        in a block of ``one_of`` a share of that.

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
        digits = text.strip()
        if not digits.isdecimal() or not digits.strip("0"):
            raise ValueError(f"{ENVIRONMENT} must be a positive integer, but is {text!r}")
        return _count(digits)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limits = (cpus, cpu_quota(), library_setting or _openmp_setting())
    return max(1, min(limit for limit in limits if limit is not None) // _workers.get())


def _openmp_setting() -> int | None:
    """Return the first number of ``OMP_NUM_THREADS``; anything else counts for nothing."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return _count(text) if text.isdecimal() and text.strip("0") else None


def _count(digits: str) -> int:
    """Read a number, at most the highest: of thousands of digits Python reads none."""
    digits = digits.lstrip("0")
    return min(int(digits), MOST) if len(digits) <= len(str(MOST)) else MOST


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
