"""CuPy's side of the GPU kernels: NumPy arrays stand in for CuPy's, the emulator for the device."""

import contextlib
import importlib
import sys
import types

import array_api_compat.numpy as xp
import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, formula, registry
from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.kernel import Kernel, Problem

emulator = pytest.importorskip(
    "tests.backends.cuda.emulator", reason="the emulator needs ml_dtypes"
)


class FakeArray(np.ndarray):
    """A NumPy array with what CuPy's arrays have besides."""

    device = contextlib.nullcontext()

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


def fake(array):
    return np.asarray(array).view(FakeArray)


class Cupy(types.ModuleType):
    """Stands for CuPy: NVRTC makes a text of its options, the emulator runs what is launched."""

    ndarray = FakeArray
    asnumpy = staticmethod(np.asarray)

    def __init__(self, builds):
        super().__init__("cupy")
        self.builds, self.capability, self.compiled, self.launched = builds, "90", [], []
        self.failing = None
        device = types.SimpleNamespace(
            attributes={"MultiProcessorCount": 2}, compute_capability=self.capability
        )
        self.runtime = types.SimpleNamespace(is_hip=False, getDevice=lambda: 0)
        self.cuda = types.SimpleNamespace(
            runtime=self.runtime, Device=lambda *_: device, Module=lambda: Module(self), nvrtc=self
        )

    def empty(self, *how):
        return fake(np.empty(*how))

    def full(self, *how):
        return fake(np.full(*how))

    def ascontiguousarray(self, array):
        return fake(np.ascontiguousarray(array))

    class NVRTCError(RuntimeError):
        pass

    def getSupportedArchs(self):
        return (75, 80, 90)

    def createProgram(self, source, name, headers, include_names):
        assert (source, headers, include_names) == (cuda_plan.source(), (), ())
        return "program"

    def compileProgram(self, program, options):
        if self.failing == "compile":
            raise self.NVRTCError("NVRTC_ERROR_COMPILATION (6)")
        assert "-ftz=false" in options
        assert f"--gpu-architecture=sm_{self.capability}" in options
        self.compiled.append(
            dict(o.removeprefix("-D").split("=") for o in options if o.startswith("-D"))
        )

    def getProgramLog(self, program):
        return "margin_loss.cu(3): error"

    def getCUBIN(self, program):
        return repr(self.compiled[-1]).encode()

    def destroyProgram(self, program):
        assert program == "program"


class OutOfMemory(RuntimeError):
    status = 2


class Module:
    def __init__(self, cupy):
        self.cupy = cupy

    def load(self, code):
        if self.cupy.failing == "load":
            raise RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU")
        self.defined = eval(code)

    def get_function(self, name):
        variant = int(self.defined["SCALAR"]), int(self.defined["POWER"])

        def run(grid, block, values, shared_mem):
            if self.cupy.failing == "launch":
                raise RuntimeError("CUDA_ERROR_INVALID_PTX")
            if self.cupy.failing == "memory":
                raise OutOfMemory("CUDA_ERROR_OUT_OF_MEMORY")
            (argument,) = values
            assert argument.size == 1  # or CuPy takes it for an array that should be on the device
            packed = argument.tobytes()
            addresses = cuda_plan.PACKED_ADDRESSES.unpack_from(packed)
            step = cuda_plan.Launch(name, grid[0], block[0], shared_mem)
            numbers = packed[cuda_plan.PACKED_ADDRESSES.size :]
            plan = cuda_plan.Plan(None, (step,), numbers, 0, (0, 0))
            self.cupy.launched.append(name)
            emulator.Machine(self.cupy.builds(variant)).launch(plan, addresses)

        return run


@pytest.fixture
def cupy_cuda(monkeypatch, builds):
    monkeypatch.setitem(sys.modules, "cupy", Cupy(builds))
    name = "mml_arrayapi.backends.cuda.cupy"
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module(name)
    sys.modules.pop(name)


@pytest.fixture
def cupy(cupy_cuda):
    return cupy_cuda.cupy


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
    assert {n.partition("_")[2] for n in cupy_cuda.cupy.launched} - {""} == {"loss_grad", "loss"}


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


def test_a_variant_is_compiled_once(cupy_cuda, cupy, problem):
    for p in (1.0, 2.0, 1.0, 2.0):
        cupy_cuda.KERNEL.loss(problem._replace(p=p))
    tile = problem._replace(input=problem.input[:, :10].copy(), weight=None)
    cupy_cuda.KERNEL.loss(tile._replace(target=tile.target % 10))
    made = [(m["POWER"], m["LAYOUT"], m.get("CLASSES")) for m in cupy.compiled]
    assert made == [("1", "2", None), ("2", "2", None), ("1", "1", "10")]


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("compile", "RuntimeError: NVRTC_ERROR_COMPILATION (6): margin_loss.cu(3): error"),
        ("load", "RuntimeError: CUDA_ERROR_NO_BINARY_FOR_GPU"),
    ],
)
def test_what_cannot_be_compiled_or_loaded_is_refused_with_the_reason(
    cupy_cuda, cupy, problem, failing, reason
):
    cupy.failing = failing
    refuses = cupy_cuda.KERNEL.refuses
    assert refuses(problem).endswith(reason)
    cupy.failing = None
    assert refuses(problem).endswith(reason)  # kept: nothing is tried twice
    assert refuses(problem._replace(p=2.0)) is None


@pytest.mark.parametrize("operation", ["loss", "loss_and_grad"])
@pytest.mark.parametrize("failing", ["launch", "memory"])
def test_a_launch_that_fails_is_nobodys_error(
    cupy_cuda, cupy, problem, monkeypatch, operation, failing
):
    """NumPy's rows are given to CuPy's kernel; what is expected comes from the formula."""
    arguments = () if operation == "loss" else (None,)
    wanted = getattr(formula, operation)(plain(problem), *arguments)
    monkeypatch.setattr(registry, "kernels_of", lambda library: (cupy_cuda.KERNEL,))
    generic = Kernel("generic", "*", lambda _: None, formula.loss, formula.loss_and_grad)
    monkeypatch.setattr(registry, "GENERIC", generic)
    cupy.failing = failing
    got = registry.run(problem, None, operation, *arguments)
    np.testing.assert_allclose(got[0] if arguments else got, wanted[0] if arguments else wanted)
    cupy.failing = None if failing == "launch" else failing
    reason = r"backend: kernel 'cupy-cuda' cannot run this call: .*CUDA_ERROR_"
    with pytest.raises(ValueError, match=reason):
        registry.run(problem, "cupy-cuda", operation, *arguments)
    cupy.failing = None
    kept = cupy_cuda.KERNEL.refuses(problem)
    assert kept is None if failing == "memory" else "CUDA_ERROR_INVALID_PTX" in kept
    assert registry.run(problem, None, operation, *arguments) is not None


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ignored_rows(cupy_cuda, problem, rng, reduction):
    target = problem.target.copy()
    target[[0, 4]] = -100
    scores = problem.input.copy()
    scores[4] = np.nan
    problem = problem._replace(input=scores, target=target, reduction=reduction, ignore_index=-100)
    kept = np.asarray([1, 2, 3, 5, 6, 7, 8])
    part = problem._replace(input=scores[kept], target=target[kept], ignore_index=None)
    wanted_loss, wanted_grad = formula.loss_and_grad(plain(part), None)
    loss, grad = cupy_cuda.KERNEL.loss_and_grad(problem, None)
    if reduction == "none":
        assert loss[0] == loss[4] == 0
        loss = loss[kept]
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-6)
    np.testing.assert_allclose(grad[kept], wanted_grad, rtol=1e-6, atol=1e-7)
    assert not np.asarray(grad[[0, 4]]).any()


def test_targets_out_of_range(cupy_cuda, problem):
    target = problem.target.copy()
    target[3] = -1
    bad = problem._replace(target=target, reduction="none")
    assert np.isnan(cupy_cuda.KERNEL.loss(bad)).nonzero()[0].tolist() == [3]
    with pytest.raises(InvalidTargetError, match=r"target\[3\] is -1, but input has 40 classes"):
        cupy_cuda.KERNEL.loss(bad._replace(check_target="raise"))
    assert cupy_cuda.KERNEL.loss(problem._replace(check_target="raise")) > -1e9
    ignored = bad._replace(check_target="raise", ignore_index=-1)
    assert cupy_cuda.KERNEL.loss(ignored)[3] == 0
    target[7] = 40  # the first bad one, but for the ignored
    with pytest.raises(InvalidTargetError, match=r"target\[7\] is 40, but input has 40 classes"):
        cupy_cuda.KERNEL.loss(ignored)


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
