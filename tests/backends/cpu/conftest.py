"""Every build of the CPU kernels, called directly, and what they are compared with."""

import importlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from mml_arrayapi.backends import cpu, threads
from mml_arrayapi.conformance.reference import reference

BUILDS = tuple(
    name for name in cpu.BUILDS if importlib.util.find_spec(f"mml_arrayapi.backends.cpu._{name}")
)
PLAIN = (np.ndarray, np.memmap)


def _build(name):
    module = importlib.import_module(f"mml_arrayapi.backends.cpu._{name}")
    if module is not cpu.native:
        module.accept(PLAIN, None, np.empty, (np.float64, np.float32, np.float16))
        module.set_limit(threads.number_of_threads)
    return module


@pytest.fixture(params=cpu.BUILDS)
def native(request):
    """One build's functions."""
    if cpu.native is None:
        pytest.skip(f"no CPU kernels: {cpu.reason()}")
    if request.param not in BUILDS:
        pytest.skip(f"no build {request.param} for this architecture")
    baseline = _build("baseline")
    if not baseline.supports(request.param):
        pytest.skip(f"this processor cannot run the build {request.param}")
    from mml_arrayapi.backends.cpu import numpy  # noqa: F401  accepts arrays for cpu.native

    return _build(request.param)


def options(p=1, margin=1.0, reduction="mean", ignore_index=None, axis=-1, check_target="auto"):
    """The tuple that kernels take."""
    return p, margin, reduction, ignore_index, axis, check_target


def in_float64(x, y, p=1, margin=1.0, weight=None):
    """The conformance suite's reference for rows (N, C) and its scales, as arrays."""
    rows = np.asarray(x).astype(np.float64)
    weights = None if weight is None else np.asarray(weight).astype(np.float64).tolist()
    found = reference(rows.tolist(), y.tolist(), p=p, margin=margin, weight=weights)
    return SimpleNamespace(
        losses=np.array(found.losses),
        scale=np.array(found.loss_scales),
        grad=np.array(found.grad).reshape(rows.shape),
        grad_scale=np.array(found.grad_scales).reshape(rows.shape),
    )
