"""CuPy: the kernels of margin_loss.cu, compiled and launched by CuPy itself."""

from __future__ import annotations

from functools import cache
from typing import Any

import cupy
import numpy as np

from mml_arrayapi.backends.cuda import plan as cuda_plan
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
    return cuda_plan.refusal(problem)


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
        _multiprocessors(cupy.cuda.runtime.getDevice()),
    )
    plan = cuda_plan.make_plan(call, operation)
    loss = cupy.empty(problem.target.shape if each else (), x.dtype)
    arrays = {"scores": x, "target": target, "weight": weight, "upstream": upstream, "grad": grad}
    arrays["loss" if each else "result"] = loss
    if plan.partials:
        arrays["partials"] = cupy.empty(plan.partials, np.float64)
    if problem.check_target == "raise":
        arrays["flag"] = cupy.full((), cuda_plan.FAR, np.int64)
    _launch(plan, tuple(_address(arrays.get(name)) for name in cuda_plan.ADDRESSES))
    if "flag" in arrays and int(arrays["flag"]) != cuda_plan.FAR:
        raise_invalid_target(cupy.asnumpy(problem.target), classes)
    return loss


def _readable(array: Array, dtype: Any, real: Any) -> Array:
    """Convert to the computing precision, unless it has that, or the scores' own."""
    return array if array.dtype in (dtype, real) else array.astype(real)


def _address(array: Array | None) -> int:
    return int(array.data.ptr) if array is not None and array.size else 0


def _launch(plan: cuda_plan.Plan, addresses: tuple[int, ...]) -> None:
    """Launch on CuPy's current stream; CuPy keeps what it compiled, on disk too."""
    module = _module(plan.scalar, plan.power, plan.kernels)
    real = np.float64 if plan.scalar == 64 else np.float32
    # CuPy passes Python's integers and floats with 8 bytes.
    numbers = (*map(int, plan.numbers[:-5]), *plan.numbers[-5:-3], *map(real, plan.numbers[-3:]))
    for step in plan.launches:
        kernel = module.get_function(step.name)
        kernel((step.grid,), (step.block,), (*addresses, *numbers), shared_mem=step.shared)


@cache
def _module(scalar: int, power: int, kernels: str) -> Any:
    options = ("--std=c++17", *cuda_plan.defines(scalar, power, kernels))
    return cupy.RawModule(code=cuda_plan.source(), options=options)


@cache
def _multiprocessors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


KERNEL = Kernel("cupy-cuda", "cupy", refuses, loss, loss_and_grad)
