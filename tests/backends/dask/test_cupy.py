"""Chunks on a GPU, as far as that goes without one: arrays that don't mix with NumPy's."""

from dataclasses import replace

import array_api_compat.numpy
import dask
import dask.array as da
import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi import libraries

RNG = np.random.default_rng(0)
N, C = 40, 9


class GpuArray(np.ndarray):
    """Stands for CuPy's arrays: mixed with NumPy's, it raises."""

    device = "cpu"  # the only one that the namespace knows

    def __getitem__(self, key):
        return on_gpu(super().__getitem__(key))  # NumPy would give a number of its own

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **keywords):
        arrays = [a for a in (*inputs, *out) if isinstance(a, np.ndarray)]
        if not all(isinstance(array, GpuArray) for array in arrays):
            raise TypeError("NumPy arrays and those of a GPU don't mix")
        plain = [np.asarray(a) if isinstance(a, GpuArray) else a for a in inputs]
        into = {"out": tuple(np.asarray(a) for a in out)} if out else {}
        return on_gpu(getattr(ufunc, method)(*plain, **into, **keywords))


GpuArray.__module__ = "gpu_arrays"  # at "cupy" Dask would import CuPy


def on_gpu(value):
    return np.asarray(value).view(GpuArray)


class Namespace:
    """NumPy's namespace, whose functions return arrays of the GPU."""

    __name__ = "cupy"

    def __getattr__(self, name):
        found = getattr(array_api_compat.numpy, name)
        if isinstance(found, type) or not callable(found):
            return found

        def run(*args, **keywords):
            for value in args:
                if name != "asarray" and type(value) is np.ndarray:
                    raise TypeError(f"{name}() got an array of NumPy's")
            value = found(*[plain(a) for a in args], **{k: plain(v) for k, v in keywords.items()})
            return on_gpu(value) if isinstance(value, (np.ndarray, np.generic)) else value

        return run


def plain(value):
    if isinstance(value, list):
        return [plain(one) for one in value]
    return np.asarray(value) if isinstance(value, GpuArray) else value


@pytest.fixture(autouse=True)
def _cupy(monkeypatch):
    row = libraries.plain("cupy", Namespace(), lambda _: libraries.DEVICE)
    row = replace(row, on_host=np.asarray, device=lambda _: None)
    monkeypatch.setitem(libraries._by_module, "gpu_arrays", row)


def gpu(array, cut):
    array = da.from_array(array, chunks=cut)
    return array.map_blocks(on_gpu, dtype=array.dtype, meta=on_gpu(array._meta))


@pytest.mark.parametrize("cut", [(7, C), (7, 4)], ids=["rows", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("where", ["targets here", "targets there"])
def test_chunks_of_cupy(cut, reduction, where):
    scores, target = RNG.standard_normal((N, C)).astype(np.float32), RNG.integers(0, C, N)
    weight = RNG.random(C).astype(np.float32)
    target[::5] = -100
    how = {"reduction": reduction, "ignore_index": -100}
    wanted = mml.multi_margin_loss_and_grad(scores, target, weight=weight, **how)
    x = gpu(scores, cut)
    y = target if where == "targets here" else gpu(target, 7)
    ours = mml.multi_margin_loss_and_grad(x, y, weight=gpu(weight, 4), **how)
    alone = mml.multi_margin_loss(x, y, weight=gpu(weight, 4), **how)
    assert mml.explain(x, y).kernel == "dask-blocks"
    with dask.config.set(scheduler="synchronous"):
        made = [array.map_blocks(lambda b: b, meta=array._meta) for array in (*ours, alone)]
        found = dask.compute(*[array.to_delayed().reshape(-1)[0] for array in made])
    for array, block in zip(made, found, strict=True):
        assert type(array._meta) is GpuArray
        assert type(block) is GpuArray
        assert block.dtype == np.float32
    with dask.config.set(scheduler="synchronous"):
        for array, value in zip((*ours, alone), (*wanted, wanted[0]), strict=True):
            np.testing.assert_allclose(np.asarray(array.compute()), value, rtol=1e-5, atol=1e-8)
