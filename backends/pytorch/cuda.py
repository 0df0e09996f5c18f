"""PyTorch on CUDA: the kernels of ``backends/cuda/margin_loss.cu`` on the tensors' own memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mml_arrayapi.backends.cuda import plan
from mml_arrayapi.backends.pytorch import state
from mml_arrayapi.backends.pytorch.autograd import Engine, make_kernel
from mml_arrayapi.backends.pytorch.state import readable
from mml_arrayapi.kernel import Options, Problem, Unusable
from mml_arrayapi.validation import raise_invalid_target

try:
    from mml_arrayapi.backends.cuda import driver

    MISSING = None
except Exception as error:  # noqa: BLE001 - and nothing that fails may be imported within a trace
    driver = None  # type: ignore[assignment]
    MISSING = f"cannot be imported: {error}"

DEVICE = "cuda"
SCALARS = {getattr(torch, name): scalar for name, scalar in plan.SCALARS.items()}
KINDS = {
    getattr(torch, name): getattr(torch, name).itemsize * (1 if name.startswith("int") else -1)
    for name in plan.INTEGERS
}
NUMBERS = (int, float)
REDUCTIONS = ("none", "mean", "sum")
CHECKS = ("auto", "nan", "raise")


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, the kernels are for CUDA"
    x = problem.input
    reason = MISSING or plan.refusal(problem)
    if reason or not state.ordinary() or type(x) not in state.PLAIN:
        return reason  # the sizes of tensors without values say nothing about real ones
    rows, classes = problem.target.numel(), x.shape[problem.axis]
    trouble: str | None = driver.trouble(x.device.index, SCALARS[x.dtype], problem.p, rows, classes)
    return trouble


def loss(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, keep_mask: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Compute the loss; see :class:`Engine`."""
    if not _served(input, target, weight, options):
        return None
    out = _new_loss(input, target, options)
    arrays = {"input": input, "target": target, "weight": weight, "loss": out}
    if keep_mask:
        shape = mask_shape(input.dtype, target.numel(), input.shape[-1])
        arrays["mask"] = input.new_empty(shape, dtype=torch.uint8)
    done = _launch("loss_mask" if keep_mask else "loss", arrays, options)
    return (out, arrays.get("mask")) if done else None


def grad(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> Tensor | None:
    """Compute the gradient; see :class:`Engine`."""
    if not _served(input, target, weight, options) or not _fits(grad_output, target, options):
        return None
    into = input.new_empty(input.shape, requires_grad=False)
    arrays = {
        "input": input, "target": target, "weight": weight, "upstream": grad_output, "grad": into,
    }  # fmt: skip
    operation = "grad"
    if mask is not None and mask.numel():
        shape = mask_shape(input.dtype, target.numel(), input.shape[-1])
        if not readable(mask) or mask.shape != shape:
            return None
        operation, arrays["mask"] = "grad_mask", mask
    return into if _launch(operation, arrays, options) else None


def loss_and_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_output: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """Compute both in one pass over the scores; see :class:`Engine`."""
    if not _served(input, target, weight, options) or not (
        grad_output is None or _fits(grad_output, target, options)
    ):
        return None
    out = _new_loss(input, target, options)
    into = input.new_empty(input.shape, requires_grad=False)
    arrays = {
        "input": input, "target": target, "weight": weight, "upstream": grad_output,
        "loss": out, "grad": into,
    }  # fmt: skip
    return (out, into) if _launch("loss_grad", arrays, options) else None


def keeps(input: Tensor, options: Options) -> bool:  # noqa: ARG001
    """Tell that a mask always pays."""
    return True


def mask_shape(dtype: torch.dtype, rows: int, n_classes: int) -> tuple[int, ...]:
    """Return the mask's shape: the bytes of each row."""
    return rows, plan.mask_bytes(SCALARS[dtype], n_classes)


def _served(input: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> bool:
    """Tell whether a call is plainly right: nobody may have checked its arguments."""
    p, margin, reduction, ignore_index, axis, check_target = options
    n_classes = input.shape[-1] if input.ndim else 0
    return (
        MISSING is None
        and readable(input)
        and readable(target)
        and input.dtype in SCALARS
        and target.dtype in KINDS
        and target.device == input.device
        and target.shape == input.shape[:-1]
        and 0 < n_classes <= plan.MAX_CLASSES
        and type(axis) is int
        and axis in (-1, input.ndim - 1)
        and type(p) in NUMBERS
        and 1 <= p < float("inf")
        and type(margin) in NUMBERS
        and abs(margin) < float("inf")
        and type(reduction) is str
        and reduction in REDUCTIONS
        and (ignore_index is None or type(ignore_index) is int)
        and type(check_target) is str
        and check_target in CHECKS
        and (weight is None or _is_weight(weight, input, n_classes))
    )


def _is_weight(weight: Tensor, input: Tensor, n_classes: int) -> bool:
    return (
        readable(weight)
        and weight.dtype in SCALARS
        and weight.shape == (n_classes,)
        and weight.device == input.device
    )


def _fits(grad_output: Tensor, target: Tensor, options: Options) -> bool:
    """Tell whether a gradient is one for the loss."""
    return (
        readable(grad_output)
        and grad_output.dtype in SCALARS
        and grad_output.device == target.device
        and grad_output.shape == (target.shape if options[2] == "none" else ())
    )


def _new_loss(input: Tensor, target: Tensor, options: Options) -> Tensor:
    return input.new_empty(target.shape if options[2] == "none" else (), requires_grad=False)


def _launch(operation: str, arrays: dict[str, Any], options: Options) -> bool:
    """Launch an operation on the device's current stream; tell whether the driver took it."""
    like, labels = arrays["input"], arrays["target"]
    index, check_target = like.device.index, options[5]
    try:
        made = plan.make_plan(_describe(arrays, options), operation)
        if made.scratch:
            arrays["scratch"] = like.new_empty(made.scratch, dtype=torch.float64)
        strict = check_target == "raise" and operation.startswith("loss")
        if strict:
            arrays["flag"] = like.new_full((), plan.FAR, dtype=torch.int64)
        addresses = (arrays.get(name) for name in plan.ADDRESSES)
        memory = tuple(0 if array is None else array.data_ptr() for array in addresses)
        driver.launch(made, memory, index, state.current_stream(index))
    except Unusable:  # refuses() tells why
        return False
    if strict and arrays["flag"].item() != plan.FAR:
        raise_invalid_target(state.on_host(labels), like.shape[-1], options[3])
    return True


def _describe(arrays: dict[str, Any], options: Options) -> plan.Call:
    """Describe a call in numbers; what can't be read as it lies is copied, in ``arrays``."""
    input, target, weight = arrays["input"], arrays["target"], arrays["weight"]
    upstream = arrays.get("upstream")
    p, margin, reduction, ignore_index, _, _ = options
    rows, classes = target.numel(), input.shape[-1]
    real = torch.float64 if input.dtype == torch.float64 else torch.float32
    if input.ndim != 2 or (classes > 1 and input.stride(1) != 1):
        input = input.reshape(rows, classes).contiguous()
    if target.ndim != 1:
        target = target.reshape(-1)
    if weight is not None:
        weight = _computable(weight, input.dtype, real).contiguous()
    if upstream is not None:
        upstream = _computable(upstream, input.dtype, real).reshape(-1)
    arrays |= {"scores": input, "target": target, "weight": weight, "upstream": upstream}
    return plan.Call(
        SCALARS[input.dtype],
        rows,
        classes,
        input.stride(0) if rows > 1 else classes,
        target.stride(0),
        KINDS[target.dtype],
        weight is not None and weight.dtype == real,
        0 if upstream is None or reduction != "none" else upstream.stride(0),
        upstream is not None and upstream.dtype == real,
        input.data_ptr() % 16 == 0,
        p,
        margin,
        reduction,
        ignore_index,
        driver.multiprocessors(input.device.index),
    )


def _computable(tensor: Tensor, dtype: torch.dtype, real: torch.dtype) -> Tensor:
    """Convert to the computing precision, unless it has that, or the scores' own."""
    return tensor if tensor.dtype in (dtype, real) else tensor.to(real)


KERNEL = make_kernel(
    "torch-cuda", Engine(DEVICE, refuses, loss, grad, loss_and_grad, mask_shape, keeps)
)
