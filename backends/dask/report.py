"""Dask: which worker ran which kernel, and a word to the user where they differ."""

from __future__ import annotations

import sys
from typing import NamedTuple

from mml_arrayapi._version import __version__


class Ran(NamedTuple):
    """Who computed something, and with what."""

    worker: str | None  # the address of a cluster's worker
    kernel: str
    version: str


def ran(kernel: str) -> frozenset[Ran]:
    """Return that this process ran a kernel."""
    return frozenset([Ran(_worker(), kernel, __version__)])


def _worker() -> str | None:
    """Return the address of the cluster's worker that this task runs on, or None."""
    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return str(distributed.get_worker().address)
    except ValueError:  # no worker
        return None


def warn_of_mixture(reports: frozenset[Ran]) -> None:
    """Warn, in the user's process too, if the workers of a cluster ran different kernels."""
    by_worker: dict[str, set[str]] = {}
    for worker, kernel, version in reports:
        if worker is not None:
            by_worker.setdefault(worker, set()).add(f"{kernel} of mml_arrayapi {version}")
    used = {worker: ", ".join(sorted(names)) for worker, names in sorted(by_worker.items())}
    if len(set(used.values())) < 2:
        return
    from distributed import warn

    listed = "; ".join(f"{worker} ran {names}" for worker, names in used.items())
    warn(
        "the workers of this cluster ran different kernels, which agree to rounding but not to "
        f"the last bit: {listed}. Install the same packages on every worker, or name one kernel "
        "with backend="
    )
