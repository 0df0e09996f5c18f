"""CuPy: the kernels of margin_loss.cu, compiled, loaded and launched by what CuPy brings itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.backends.cuda.loaded import Functions, Loaded, in_words
from mml_arrayapi.backends.cuda.plan import Plan, Variant
from mml_arrayapi.kernel import Array, Kernel, Problem
from mml_arrayapi.validation import raise_invalid_target


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    for name in ("input", "target", "weight"):
        array = getattr(problem, name)
        if array is not None and not isinstance(array, cupy.ndarray):
            return f"{name} is a {type(array).__name__}, not a cupy.ndarray"
    if cupy.cuda.runtime.is_hip:
        return "this CuPy is built for ROCm, the kernels are for CUDA"
    return cuda_plan.refusal(problem) or _trouble(problem)


def _trouble(problem: Problem) -> str | None:
    """Tell why the kernels can't run on the input's device; None if they can."""
    x = problem.input
    scalar, classes = cuda_plan.SCALARS[x.dtype.name], x.shape[-1]
    try:
        with x.device:
            device = cupy.cuda.runtime.getDevice()
            size = problem.target.size, classes, _multiprocessors(device)
            loaded.functions(device, cuda_plan.variant_for(scalar, problem.p, *size))
    except Exception as error:  # noqa: BLE001 - a device's failure must not end a user's call
        return f"not usable on {x.device}: {in_words(error)}"
    return None


def loss(problem: Problem) -> Array:
    """Compute the loss."""
    with problem.input.device:
        return _run(problem, "loss", None, None)


def loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    """Compute the loss and the gradient in one pass over the input."""
    with problem.input.device:
        grad = cupy.empty(problem.input.shape, problem.input.dtype)
        return _run(problem, "loss_grad", grad_output, grad), grad


def _run(problem: Problem, operation: str, upstream: Array | None, grad: Array | None) -> Array:
    target = problem.target.reshape(-1)
    rows, classes = target.size, problem.input.shape[-1]
    # A view where that is possible; the rows may lie anywhere, the classes side by side.
    x = problem.input.reshape(rows, classes)
    if classes > 1 and x.strides[1] != x.itemsize:
        x = cupy.ascontiguousarray(x)
    real = np.dtype(np.float64 if x.dtype == np.float64 else np.float32)
    weight, each = problem.weight, problem.reduction == "none"
    if weight is not None:
        weight = cupy.ascontiguousarray(_readable(weight, x.dtype, real))
    if upstream is not None:
        upstream = _readable(upstream, x.dtype, real).reshape(-1)
    device = cupy.cuda.runtime.getDevice()
    call = cuda_plan.Call(
        cuda_plan.SCALARS[x.dtype.name],
        rows,
        classes,
        x.strides[0] // x.itemsize if rows > 1 else classes,
        target.strides[0] // target.itemsize,
        target.itemsize * (1 if target.dtype.kind == "i" else -1),
        weight is not None and weight.dtype == real,
        upstream.strides[0] // upstream.itemsize if upstream is not None and each else 0,
        upstream is not None and upstream.dtype == real,
        _address(x) % 16 == 0,
        problem.p,
        problem.margin,
        problem.reduction,
        problem.ignore_index,
        _multiprocessors(device),
    )
    plan = cuda_plan.make_plan(call, operation)
    loss = cupy.empty(problem.target.shape if each else (), x.dtype)
    arrays = {
        "scores": x, "target": target, "weight": weight, "upstream": upstream, "grad": grad,
        "loss": loss,
    }  # fmt: skip
    if plan.scratch:
        arrays["scratch"] = cupy.empty(plan.scratch, np.float64)
    if problem.check_target == "raise":
        arrays["flag"] = cupy.full((), cuda_plan.FAR, np.int64)
    _launch(plan, tuple(_address(arrays.get(name)) for name in cuda_plan.ADDRESSES), device)
    if "flag" in arrays and int(arrays["flag"]) != cuda_plan.FAR:
        raise_invalid_target(cupy.asnumpy(problem.target), classes, problem.ignore_index)
    return loss


def _readable(array: Array, dtype: Any, real: Any) -> Array:
    """Convert to the computing precision, unless it has that, or the scores' own."""
    return array if array.dtype in (dtype, real) else array.astype(real)


def _address(array: Array | None) -> int:
    return int(array.data.ptr) if array is not None and array.size else 0


def _launch(plan: Plan, addresses: tuple[int, ...], device: int) -> None:
    """Launch on CuPy's current stream. CuPy passes a NumPy array of one element by value."""
    functions = loaded.functions(device, plan.variant)
    packed = cuda_plan.pack(addresses, plan)
    argument = np.frombuffer(packed, np.dtype((np.void, len(packed))))
    for step in plan.launches:
        function = functions[step.name]
        try:
            function((step.grid,), (step.block,), (argument,), shared_mem=step.shared)
        except Exception as error:  # of CUDA: the arguments are bytes
            raise loaded.refuse(device, plan.variant, error) from error


def _load(device: int, variant: Variant) -> Functions:  # noqa: ARG001 - it is the current one
    module = cupy.cuda.Module()
    module.load(_compile(variant))
    return {name: module.get_function(name) for name in variant.names()}


loaded = Loaded(_load)


def _compile(variant: Variant) -> bytes:
    """Compile for the current device: not by RawModule, which would add -ftz=true."""
    nvrtc = cupy.cuda.nvrtc
    capability = int(cupy.cuda.Device().compute_capability)
    target = cuda_plan.target_for(capability, nvrtc.getSupportedArchs())
    program = nvrtc.createProgram(cuda_plan.source(), "margin_loss.cu", (), ())
    try:
        options = (f"--gpu-architecture={target}", *cuda_plan.OPTIONS, *variant.defines())
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{error}: {nvrtc.getProgramLog(program)}") from error
        get = nvrtc.getCUBIN if target.startswith("sm_") else nvrtc.getPTX
        code: bytes = get(program)
        return code
    finally:
        nvrtc.destroyProgram(program)


@cache
def _multiprocessors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


KERNEL = Kernel(
    "cupy-cuda", "cupy", refuses, loss, loss_and_grad, supports=frozenset({"ignore_index"})
)
