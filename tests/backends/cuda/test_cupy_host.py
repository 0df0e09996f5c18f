"""CuPy's side of the GPU kernels: NumPy arrays stand in for CuPy's, the emulator for the device."""

import contextlib
import importlib
import sys
import types

import array_api_compat.numpy as xp
import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, formula
from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.kernel import Problem


class FakeArray(np.ndarray):
    """A NumPy array with what CuPy's arrays have besides."""

    device = contextlib.nullcontext()

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


def fake(array):
    return np.asarray(array).view(FakeArray)


class FakeModule:
    """Stands for cupy.RawModule: launches go to the emulator."""

    def __init__(self, code, options):
        assert code == cuda_plan.source()
        self.defined = dict(o.removeprefix("-D").split("=") for o in options if o.startswith("-D"))
        FakeModule.made.append(self.defined)

    def get_function(self, name):
        scalar, power = int(self.defined["SCALAR"]), int(self.defined["POWER"])
        real = np.float64 if scalar == 64 else np.float32

        def run(grid, block, values, shared_mem):
            # CuPy passes Python's numbers with 8 bytes, NumPy's with their own size.
            assert {type(v) for v in values[:-5]} <= {int}
            assert [type(v) for v in values[-5:]] == [float, float, real, real, real]
            addresses, numbers = (
                values[: len(cuda_plan.ADDRESSES)],
                values[len(cuda_plan.ADDRESSES) :],
            )
            step = cuda_plan.Launch(name, grid[0], block[0], shared_mem)
            packed = cuda_plan.PACKED_NUMBERS[scalar].pack(*numbers)
            plan = cuda_plan.Plan(scalar, power, "", (step,), numbers, packed, 0, (0, 0), 0)
            FakeModule.launched.append(name)
            FakeModule.machine(scalar, power).launch(plan, addresses)

        return run


@pytest.fixture
def cupy_cuda(monkeypatch, builds):
    from tests.backends.cuda import emulator

    cupy = types.ModuleType("cupy")
    cupy.ndarray = FakeArray
    cupy.empty = lambda *a: fake(np.empty(*a))
    cupy.full = lambda *a: fake(np.full(*a))
    cupy.ascontiguousarray = lambda a: fake(np.ascontiguousarray(a))
    cupy.asnumpy = np.asarray
    cupy.RawModule = FakeModule
    runtime = types.SimpleNamespace(is_hip=False, getDevice=lambda: 0)
    device = types.SimpleNamespace(attributes={"MultiProcessorCount": 2})
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda _: device)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    name = "mml_arrayapi.backends.cuda.cupy"
    monkeypatch.delitem(sys.modules, name, raising=False)
    FakeModule.made, FakeModule.launched = [], []
    FakeModule.machine = staticmethod(lambda *variant: emulator.Machine(builds(variant)))
    module = importlib.import_module(name)
    yield module
    sys.modules.pop(name)


@pytest.fixture
def problem(rng):
    return Problem(
        xp, "cupy", fake(rng.normal(size=(9, 40)).astype(np.float32)),
        fake(rng.integers(0, 40, 9)), fake(rng.normal(size=40)), 1.0, 0.75, "mean", 1, "nan",
    )  # fmt: skip


def plain(problem):
    arrays = (problem.input, problem.target, problem.weight)
    x, y, w = (None if a is None else np.asarray(a) for a in arrays)
    return problem._replace(input=x, target=y, weight=w)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("dtype", "p"), [("float32", 1.0), ("float32", 2.0), ("float16", 1.0),
                                          ("float64", 1.5)])  # fmt: skip
def test_value_and_gradient_equal_the_generic_ones(cupy_cuda, problem, rng, dtype, p, reduction):
    problem = problem._replace(input=problem.input.astype(dtype), p=p, reduction=reduction)
    shape = (9,) if reduction == "none" else ()
    rtol = 1e-3 if dtype == "float16" else 1e-6
    for upstream in (None, fake(rng.normal(size=shape)), fake(np.ones(shape, dtype))):
        given = None if upstream is None else np.asarray(upstream)
        expected, expected_grad = formula.loss_and_grad(plain(problem), given)
        value, grad = cupy_cuda.KERNEL.loss_and_grad(problem, upstream)
        np.testing.assert_allclose(value, expected, rtol=rtol)
        np.testing.assert_allclose(grad, expected_grad, rtol=rtol, atol=1e-7)
        assert value.dtype == grad.dtype == dtype
        assert value.shape == shape
    np.testing.assert_allclose(cupy_cuda.KERNEL.loss(problem), expected, rtol=rtol)
    assert {n.partition("_")[2] for n in FakeModule.launched} - {""} == {"loss_grad", "loss"}


@pytest.mark.parametrize(
    "spell",
    [lambda x: x[:, ::2], lambda x: x[:, 1:37], lambda x: x[::-1], lambda x: x[:0],
     lambda x: x.reshape(3, 3, 40), lambda x: x.T.copy().T, lambda x: x[0], lambda x: x[:, :1]],
)  # fmt: skip
def test_layouts(cupy_cuda, problem, rng, spell):
    x = spell(problem.input)
    target = fake(rng.integers(0, x.shape[-1], x.shape[:-1]).astype(np.uint16))
    problem = problem._replace(
        input=x, target=target, weight=None, axis=x.ndim - 1, reduction="none"
    )
    expected = formula.loss_and_grad(plain(problem), None)
    for got, wanted in zip(cupy_cuda.KERNEL.loss_and_grad(problem, None), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
        assert got.shape == wanted.shape


def test_a_module_is_made_once_per_variant(cupy_cuda, problem):
    for p in (1.0, 2.0, 1.0, 2.0):
        cupy_cuda.KERNEL.loss(problem._replace(p=p))
    tile = problem._replace(input=problem.input[:, :10].copy(), weight=None)
    cupy_cuda.KERNEL.loss(tile._replace(target=tile.target % 10))
    assert [(m["POWER"], m["LAYOUT"]) for m in FakeModule.made] == [
        ("1", "2"),
        ("2", "2"),
        ("1", "1"),
    ]


def test_targets_out_of_range(cupy_cuda, problem):
    target = problem.target.copy()
    target[3] = -1
    bad = problem._replace(target=target, reduction="none")
    assert np.isnan(cupy_cuda.KERNEL.loss(bad)).nonzero()[0].tolist() == [3]
    with pytest.raises(InvalidTargetError, match=r"target\[3\] is -1, but input has 40 classes"):
        cupy_cuda.KERNEL.loss(bad._replace(check_target="raise"))
    assert cupy_cuda.KERNEL.loss(problem._replace(check_target="raise")) > -1e9


def test_refusals(cupy_cuda, problem):
    refuses = cupy_cuda.KERNEL.refuses
    assert refuses(problem) is None
    wrong = problem._replace(weight=np.ones(40))
    assert refuses(wrong) == "weight is a ndarray, not a cupy.ndarray"
    assert "the classes are at axis 0" in refuses(problem._replace(axis=0))
    sys.modules["cupy"].cuda.runtime.is_hip = True
    assert "built for ROCm" in refuses(problem)


def test_the_file_imports_with_cupy_itself():
    pytest.importorskip("cupy", reason="CuPy is not installed")
    kernel = importlib.import_module("mml_arrayapi.backends.cuda.cupy").KERNEL
    assert (kernel.name, kernel.library) == ("cupy-cuda", "cupy")
