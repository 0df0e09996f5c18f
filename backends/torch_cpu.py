"""PyTorch on the CPU: the Numba kernels on the tensors' own memory, with autograd."""

from __future__ import annotations

import ctypes
import math
import sys
from typing import Any

import array_api_compat.torch as xp
import numpy as np
import torch
from numpy import array
from torch import Tensor, empty_like, float32, from_numpy, get_num_threads, int64, strided
from torch.autograd import forward_ad

from mml_arrayapi import formula
from mml_arrayapi.backends import cpu_blocks
from mml_arrayapi.backends.cpu_blocks import AUTO, LARGEST, LAST, MEAN
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.validation import raise_invalid_target, settle_targets

is_compiling = torch.compiler.is_dynamo_compiling  # half the time of is_compiling()
is_grad_enabled = torch.is_grad_enabled
functorch_active = torch._C._are_functorch_transforms_active
dispatch_modes = torch._C._len_torch_dispatch_stack
function_modes = torch._C._len_torch_function_stack
is_batched = torch._C._functorch.is_legacy_batchedtensor
is_tracing = torch._C._is_tracing

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
SINGLE = np.dtype(np.float32)


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile compiles the generic formula into its own graph"
    x, weight = problem.input, problem.weight
    for name, tensor in (("input", x), ("target", problem.target), ("weight", weight)):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN:
            return f"{name} is a {type(tensor).__name__}, a subclass of torch.Tensor"
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return f"{name} is a {tensor.layout} tensor on {tensor.device}, not strided on the CPU"
        if tensor.is_neg():
            return f"{name} is a view that negates another tensor's memory"
    if x.dtype not in DTYPES:
        return f"input has dtype {x.dtype}, not float16, bfloat16, float32 or float64"
    if weight is not None and weight.requires_grad and torch.is_grad_enabled():
        return "weight requires a gradient, which the generic implementation gives"
    return _transformed() or cpu_blocks.missing()


def _transformed() -> str | None:
    """Tell which transform of PyTorch is active; kernels can't see through one."""
    if functorch_active():
        return "a torch.func transform is active, which the generic implementation follows"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which the generic implementation follows"
    if dispatch_modes() or function_modes():
        return "a mode that intercepts PyTorch's operations is active (fake tensors, make_fx ...)"
    if is_tracing():
        return "torch.jit.trace is active, which records the generic implementation"
    return None


def waits(problem: Problem) -> str | None:
    """Tell why compiling the kernel doesn't pay yet, or None."""
    x = problem.input
    return cpu_blocks.waits(str(x.dtype).removeprefix("torch."), problem.p, x.numel())


def loss(problem: Problem) -> torch.Tensor:
    """Compute the loss, followed by autograd where the input requires a gradient."""
    if problem.axis == problem.input.ndim - 1 and problem.check_target == "raise":
        _ready_shortcut(problem)
        arguments = problem.p, problem.margin, problem.weight, problem.reduction, -1, "auto"
        result = shortcut(problem.input, problem.target, *arguments)
        if result is not None:
            return result
    if problem.input.requires_grad and is_grad_enabled():
        return _apply(problem.input, problem.target, problem.weight, problem)  # type: ignore[no-any-return]
    return _loss(problem)


def loss_and_grad(
    problem: Problem, grad_output: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and the gradient in one pass over the input.

    Where autograd follows the arguments, both results must be differentiable in turn: then this is
    the generic implementation's work.
    """
    followed = problem.input.requires_grad or (
        grad_output is not None and grad_output.requires_grad
    )
    if followed and torch.is_grad_enabled():
        return formula.loss_and_grad(settle_targets(problem), grad_output)
    return _loss_and_grad(problem, grad_output)


class _Loss(torch.autograd.Function):
    """Keeps references to its arguments for the backward pass; for p = 1, a bit per score, too."""

    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, weight: Any, problem: Problem) -> torch.Tensor:
        scores = cpu_blocks.classes_last(_array(input), problem.axis)
        bits = cpu_blocks.room_for_bits(scores, problem.p)
        kept = None if bits is None else from_numpy(bits)
        ctx.save_for_backward(input, target, weight, kept)
        ctx.problem = problem._replace(input=None, target=None, weight=None, check_target="nan")
        return _loss(problem, bits)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        input, target, weight, bits = ctx.saved_tensors
        problem = ctx.problem._replace(input=input, target=target, weight=weight)
        if _must_be_followed(grad_output):
            grad = formula.loss_and_grad(problem, grad_output)[1]
        elif bits is None:
            grad = _loss_and_grad(problem, grad_output)[1]
        else:
            grad = _grad_of_bits(problem, grad_output, bits.numpy())
        return grad, None, None, None


def _must_be_followed(grad_output: torch.Tensor) -> bool:
    """Tell whether a gradient must be derived again, or is mapped over (is_grads_batched=True)."""
    return (
        is_grad_enabled()
        or functorch_active()
        or is_batched(grad_output)
        or type(grad_output) is not torch.Tensor
    )


def _loss(problem: Problem, bits: np.ndarray | None = None) -> torch.Tensor:
    scores = _scores(problem)
    losses, out = _losses(problem)
    total, bad = cpu_blocks.loss(scores, get_num_threads(), out, bits)
    return _finish(problem, losses, total, bad)


def _loss_and_grad(
    problem: Problem, grad_output: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    losses, out = _losses(problem)
    grad, into, scale, upstream = _gradient(problem, grad_output)
    total, bad = cpu_blocks.loss_and_grad(
        _scores(problem), get_num_threads(), out, into, scale, upstream
    )
    return _finish(problem, losses, total, bad), grad


def _grad_of_bits(problem: Problem, grad_output: torch.Tensor, bits: np.ndarray) -> torch.Tensor:
    grad, into, scale, upstream = _gradient(problem, grad_output)
    cpu_blocks.grad_of_bits(_scores(problem), get_num_threads(), bits, into, scale, upstream)
    return grad


def _gradient(
    problem: Problem, grad_output: torch.Tensor | None
) -> tuple[torch.Tensor, np.ndarray, float, np.ndarray | None]:
    """Make room for a gradient; return it, its view, and its rows' common and own factors."""
    x = problem.input
    grad = torch.empty_like(x, requires_grad=False)
    _use_large_pages(grad)
    scale, upstream = 1 / x.shape[problem.axis], None
    if problem.reduction == "mean":
        scale /= max(problem.target.numel(), 1)
    if grad_output is not None and problem.reduction == "none":
        upstream = grad_output.detach().to(torch.float64).contiguous().reshape(-1).numpy()
    elif grad_output is not None:
        scale *= grad_output.item()
    return grad, cpu_blocks.classes_last(_array(grad), problem.axis), scale, upstream


def _array(tensor: torch.Tensor) -> np.ndarray:
    """View a tensor's memory; NumPy knows no bfloat16."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    array: np.ndarray = tensor.numpy()
    return array


def _scores(problem: Problem) -> cpu_blocks.Scores:
    weight = problem.weight
    if weight is not None:
        weight = weight.detach().to(torch.promote_types(problem.input.dtype, torch.float32)).numpy()
    return cpu_blocks.scores(
        _array(problem.input),
        problem.target.numpy(),
        weight,
        problem.axis,
        problem.p,
        problem.margin,
    )


def _losses(problem: Problem) -> tuple[torch.Tensor | None, int]:
    """Make room for each sample's loss where it is asked for; return it and its address."""
    if problem.reduction != "none":
        return None, 0
    losses = problem.input.new_empty(problem.target.shape)
    return losses, losses.data_ptr()


def _finish(problem: Problem, losses: torch.Tensor | None, total: float, bad: int) -> torch.Tensor:
    n_classes, rows = problem.input.shape[problem.axis], problem.target.numel()
    if bad >= 0 and problem.check_target == "raise":
        raise_invalid_target(problem.target.numpy(), n_classes)
    if losses is not None:
        return losses
    total /= n_classes
    if problem.reduction == "mean":
        total = total / rows if rows else math.nan
    if problem.input.dtype == torch.float32:
        return from_numpy(array(total, SINGLE))  # a third of the time of torch.tensor()
    return torch.tensor(total, dtype=problem.input.dtype)


LARGE = 2**22  # bytes from which NumPy asks for large pages too


def _madvise() -> Any:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_advise = _madvise()


def _use_large_pages(tensor: torch.Tensor) -> None:
    """Ask Linux to back fresh memory by large pages, as NumPy does for its arrays.

    Filling 262 MB of fresh memory took 95 ms with small pages, 15 ms with large ones.
    """
    size = tensor.numel() * tensor.element_size()
    if size < LARGE or _advise is None:
        return
    address = tensor.data_ptr()
    first = -(-address // 4096) * 4096
    _advise(first, address + size - first, 14)  # MADV_HUGEPAGE; a refusal changes nothing


MOST = cpu_blocks.BLOCK  # elements that the shortcut serves
FLOAT32 = 0j  # numba_kernels.FLOAT32; Numba is imported when it is wanted
_small: dict[float, tuple[Any, Any, Any]] = {}  # p: the exponent, the kernels of both passes
small_kernels = _small.get


def _ready_shortcut(problem: Problem) -> None:
    """Compile the shortcut's kernels for a call that it could take."""
    p = problem.p
    if problem.input.dtype == torch.float32 and p in (1, 2) and p not in _small:
        kernels = cpu_blocks.numba_kernels()
        exponent = kernels.ONE if p == 1 else kernels.TWO
        memory = FLOAT32, 0, 0, 0, 0, 0, 0.0, exponent
        forward = kernels.compiled(kernels.mean_of_memory, *memory)
        backward = kernels.compiled(kernels.grad_of_memory, *memory, 0, 0.0, 0)
        _small[p] = exponent, forward, backward


def shortcut(
    input: torch.Tensor,
    target: Any,
    p: Any,
    margin: Any,
    weight: Any,
    reduction: Any,
    axis: Any,
    check_target: Any,
) -> torch.Tensor | None:
    """Serve the mean of a small contiguous float32 tensor."""
    # Each look at a tensor costs 0.06 microseconds, each dot in a name half of that: of 3.
    if (
        is_compiling()
        or type(input) is not Tensor
        or type(target) is not Tensor
        or reduction is not MEAN
        or axis is not LAST
        or check_target is not AUTO
        or (type(p) is not int and type(p) is not float)
        or (type(margin) is not float and type(margin) is not int)
        or not -LARGEST <= margin <= LARGEST
        or (small := small_kernels(p)) is None
        or input.dtype is not float32
        or target.dtype is not int64
        or target.ndim != 1
        or not input.is_cpu
        or not target.is_cpu
        or input.layout is not strided
        or not input.is_contiguous()
        or not target.is_contiguous()
        or functorch_active()
        or forward_ad._current_level >= 0
        or dispatch_modes()
        or function_modes()
        or is_tracing()
    ):
        return None
    try:
        rows, n_classes = input.shape
    except ValueError:  # not two axes
        return None
    if target.numel() != rows or not 0 < rows * n_classes <= MOST:
        return None
    weights = 0
    if weight is not None:
        if not _plain_weight(weight, n_classes):
            return None
        weights = weight.data_ptr()
    if input.requires_grad and is_grad_enabled():
        return _apply_small(input, target, weight, (rows, n_classes, margin, small))  # type: ignore[no-any-return]
    exponent, kernel, _ = small
    x, y = input.data_ptr(), target.data_ptr()
    mean = kernel(FLOAT32, x, y, weights, rows, n_classes, margin, exponent)
    return None if mean is None else from_numpy(array(mean, SINGLE))


def _plain_weight(weight: Any, n_classes: int) -> bool:
    return (
        type(weight) is Tensor
        and weight.dtype is float32
        and weight.shape == (n_classes,)
        and weight.is_cpu
        and weight.layout is strided
        and weight.is_contiguous()
        and not (weight.requires_grad and is_grad_enabled())
    )


class _SmallLoss(torch.autograd.Function):
    """What :class:`_Loss` is to the kernel, for the shortcut."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any, weight: Any, numbers: tuple[Any, ...]) -> Tensor | None:
        ctx.save_for_backward(x, y, weight)
        ctx.numbers = numbers
        rows, n_classes, margin, (exponent, kernel, _) = numbers
        weights = 0 if weight is None else weight.data_ptr()
        x, y = x.data_ptr(), y.data_ptr()
        mean = kernel(FLOAT32, x, y, weights, rows, n_classes, margin, exponent)
        return None if mean is None else from_numpy(array(mean, SINGLE))

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        x, y, weight = ctx.saved_tensors
        rows, n_classes, margin, (exponent, _, kernel) = ctx.numbers
        p = float(exponent)  # of 1 and 2 the exponents are equal to what they stand for
        if _must_be_followed(grad_output):
            problem = Problem(xp, "torch", x, y, weight, p, float(margin), "mean", 1, "nan")
            return formula.loss_and_grad(problem, grad_output)[1], None, None, None
        grad = empty_like(x)
        kernel(
            FLOAT32,
            x.data_ptr(),
            y.data_ptr(),
            0 if weight is None else weight.data_ptr(),
            rows,
            n_classes,
            margin,
            exponent,
            grad.data_ptr(),
            p / n_classes / rows,
            grad_output.data_ptr(),
        )
        return grad, None, None, None


# What apply() of these two comes to where no transform is active, as has been made sure when they
# are called: 2.4 microseconds less.
_apply = super(torch.autograd.Function, _Loss).apply
_apply_small = super(torch.autograd.Function, _SmallLoss).apply

KERNEL = Kernel("torch-cpu", "torch", refuses, loss, loss_and_grad)
