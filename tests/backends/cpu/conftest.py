"""Both builds of the CPU kernels, called directly, and a reference in float64 and fractions."""

import importlib
import importlib.util

import numpy as np
import pytest

from mml_arrayapi.backends import cpu, threads

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


class Reference:
    """Losses and gradient of rows (N, C) in float64, with the scale of what rounding may do."""

    def __init__(self, x, y, p=1, margin=1.0, weight=None):
        x, rows = np.asarray(x).astype(np.float64), np.arange(len(x))
        n_classes = x.shape[1]
        z = (x - x[rows, y][:, None]) + margin
        own = np.arange(n_classes) == np.asarray(y)[:, None]
        z = np.where((z > 0) & ~own, z, 0)
        slope = np.where(z > 0, p * np.where(z > 0, z, 1) ** (p - 1), 0)
        slope = np.where(own, -slope.sum(1, keepdims=True), slope)
        factor = np.ones(len(x)) if weight is None else np.asarray(weight).astype(np.float64)[y]
        factor = factor / n_classes
        self.losses, self.grad = factor * (z**p).sum(1), factor[:, None] * slope
        size = np.where(own, 0, abs(x) + abs(x[rows, y])[:, None] + abs(margin))
        self.scale = abs(factor) * (size * p * np.maximum(size, 1e-300) ** (p - 1)).sum(1)
        steep = p * max(p - 1, 0) * np.maximum(size, 1e-300) ** max(p - 2, 0) * size
        steep = steep + np.where(own, 0, p * np.maximum(size, 1e-300) ** (p - 1))
        steep = np.where(own, steep.sum(1, keepdims=True), steep)
        self.grad_scale = abs(factor)[:, None] * steep


@pytest.fixture
def reference():
    """The class :class:`Reference`."""
    return Reference
