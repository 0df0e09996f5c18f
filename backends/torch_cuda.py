"""PyTorch on CUDA: the kernels of margin_loss.cu, with autograd and torch.compile.

The operators of ``torch.ops.mml_arrayapi`` are what torch.compile puts into its graphs. Eager calls
run their implementations directly, since the way through PyTorch's dispatcher and back into
Python takes longer than a small loss.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from mml_arrayapi import formula
from mml_arrayapi.backends import cuda_driver, cuda_launch, torch_values
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.validation import raise_invalid_target

is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled

DEVICE = "cuda"
PLAIN = (torch.Tensor, torch.nn.Parameter)
SCALARS = {getattr(torch, name): scalar for name, scalar in cuda_launch.SCALARS.items()}
KINDS = {
    getattr(torch, name): getattr(torch, name).itemsize * (1 if name.startswith("int") else -1)
    for name in cuda_launch.INTEGERS
}


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    for name in ("input", "target", "weight"):
        tensor = getattr(problem, name)
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            return f"{name} is on {tensor.device}, not on a CUDA device"
        if torch.compiler.is_compiling():
            continue  # these tensors are fake, and what follows says nothing about real ones
        if type(tensor) not in PLAIN:
            return f"{name} is a {type(tensor).__name__}, a subclass of torch.Tensor"
        if tensor.layout != torch.strided or tensor.is_neg():
            return f"{name} is no plain strided tensor"
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm, the kernels are for CUDA"
    if problem.weight is not None and problem.weight.requires_grad and torch.is_grad_enabled():
        return "weight requires a gradient, which the generic implementation gives"
    return cuda_launch.refusal(problem) or _transformed()


def _transformed() -> str | None:
    """Tell which transform of PyTorch is active; kernels can't see through one."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "a torch.func transform is active, which the generic implementation follows"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which the generic implementation follows"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode that intercepts PyTorch's operations is active (fake tensors, make_fx ...)"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is active, which records the generic implementation"
    return None


def loss(problem: Problem) -> torch.Tensor:
    """Compute the loss, followed by autograd where the input requires a gradient."""
    x, target, weight = problem.input, problem.target, problem.weight
    options = (problem.p, problem.margin, problem.reduction, problem.check_target == "raise")
    if not is_compiling():
        _remember(problem)
    if x.requires_grad and torch.is_grad_enabled():
        return _Loss.apply(x, target, weight, *options)  # type: ignore[no-any-return]
    return _run("loss", x, target, weight, *options)


def loss_and_grad(
    problem: Problem, grad_output: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss and the gradient in one pass over the input.

    Where autograd follows the arguments, both results must be differentiable in turn: then this is
    the generic implementation's work.
    """
    x, target, weight = problem.input, problem.target, problem.weight
    strict = problem.check_target == "raise"
    followed = x.requires_grad or (grad_output is not None and grad_output.requires_grad)
    if followed and torch.is_grad_enabled():
        if strict:
            raise_invalid_target(torch_values.on_host(target), x.shape[-1])
        return formula.loss_and_grad(problem._replace(check_target="nan"), grad_output)
    options = (problem.p, problem.margin, problem.reduction, strict)
    return _run("loss_grad", x, target, weight, grad_output, *options)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    """For p = 1 the forward pass keeps a bit per score, and the backward pass reads no scores."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        target: torch.Tensor,
        weight: torch.Tensor | None,
        p: float,
        margin: float,
        reduction: str,
        strict: bool,
    ) -> torch.Tensor:
        mask = counts = None
        if p == 1:
            loss, mask, counts = _run(
                "loss_mask", input, target, weight, p, margin, reduction, strict
            )
        else:
            loss = _run("loss", input, target, weight, p, margin, reduction, strict)
        ctx.save_for_backward(input, target, weight, mask, counts)
        ctx.options = (p, margin, reduction)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        input, target, weight, mask, counts = ctx.saved_tensors
        p, margin, reduction = ctx.options
        if not torch.compiler.is_compiling() and (
            torch.is_grad_enabled() or type(grad_output) is not torch.Tensor or _transformed()
        ):
            # create_graph=True: the gradient must be differentiable itself.
            grad = _generic_gradient(input, target, weight, grad_output, p, margin, reduction)
        elif mask is not None:
            grad = _run(
                "grad_mask", grad_output, target, weight, mask, counts, input.shape, reduction
            )
        else:
            grad = _run("grad", grad_output, input, target, weight, p, margin, reduction)
        return grad, None, None, None, None, None, None


def _generic_gradient(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    grad_output: torch.Tensor,
    p: float,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    import array_api_compat.torch as xp

    problem = Problem(
        xp, "torch", input, target, weight, p, margin, reduction, input.ndim - 1, "nan"
    )
    return formula.loss_and_grad(problem, grad_output)[1]


# --------------------------------------------------------------------------------------------------
# The operators: their implementations, and what they return in shape and type alone.


def _loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: float,
    margin: float,
    reduction: str,
    strict: bool,
) -> torch.Tensor:
    return _launch("loss", input, target, weight, None, p, margin, reduction, strict)["loss"]


def _loss_mask(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: float,
    margin: float,
    reduction: str,
    strict: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    made = _launch("loss_mask", input, target, weight, None, p, margin, reduction, strict)
    return made["loss"], made["mask"], made["counts"]


def _grad_mask(
    grad_output: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    mask: torch.Tensor,
    counts: torch.Tensor,
    size: list[int],
    reduction: str,
) -> torch.Tensor:
    grad = torch.empty(size, dtype=grad_output.dtype, device=grad_output.device)
    # The scores aren't read, and the margin is in the mask.
    _launch(
        "grad_mask", grad, target, weight, grad_output, 1.0, 0.0, reduction, False,
        grad=grad, mask=mask, counts=counts,
    )  # fmt: skip
    return grad


def _grad(
    grad_output: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    p: float,
    margin: float,
    reduction: str,
) -> torch.Tensor:
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    _launch("grad", input, target, weight, grad_output, p, margin, reduction, False, grad=grad)
    return grad


def _loss_grad(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    grad_output: torch.Tensor | None,
    p: float,
    margin: float,
    reduction: str,
    strict: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    grad = torch.empty(input.shape, dtype=input.dtype, device=input.device)
    made = _launch(
        "loss_grad", input, target, weight, grad_output, p, margin, reduction, strict, grad=grad
    )
    return made["loss"], grad


def _fake_loss(input, target, weight, p, margin, reduction, strict):  # type: ignore[no-untyped-def] # noqa: ARG001
    return input.new_empty(target.shape if reduction == "none" else ())


def _fake_loss_mask(input, target, weight, p, margin, reduction, strict):  # type: ignore[no-untyped-def]
    rows, classes = target.numel(), input.shape[-1]
    kernels, _, mask_row = cuda_launch.share(SCALARS[input.dtype], int(classes))
    mask = input.new_empty((rows, mask_row), dtype=torch.uint8)
    counts = input.new_empty((0 if kernels == "tiles" else rows,), dtype=torch.int32)
    return _fake_loss(input, target, weight, p, margin, reduction, strict), mask, counts


def _fake_grad_mask(grad_output, target, weight, mask, counts, size, reduction):  # type: ignore[no-untyped-def] # noqa: ARG001
    return grad_output.new_empty(size)


def _fake_grad(grad_output, input, target, weight, p, margin, reduction):  # type: ignore[no-untyped-def] # noqa: ARG001
    return input.new_empty(input.shape)


def _fake_loss_grad(input, target, weight, grad_output, p, margin, reduction, strict):  # type: ignore[no-untyped-def] # noqa: ARG001
    loss = _fake_loss(input, target, weight, p, margin, reduction, strict)
    return loss, input.new_empty(input.shape)


_SCORES = "Tensor input, Tensor target, Tensor? weight"
_OPTIONS = "float p, float margin, str reduction"
OPERATORS: dict[str, tuple[str, Any, Any]] = {
    "loss": (f"({_SCORES}, {_OPTIONS}, bool strict) -> Tensor", _loss, _fake_loss),
    "loss_mask": (
        f"({_SCORES}, {_OPTIONS}, bool strict) -> (Tensor, Tensor, Tensor)",
        _loss_mask,
        _fake_loss_mask,
    ),
    "grad_mask": (
        "(Tensor grad_output, Tensor target, Tensor? weight, Tensor mask, Tensor counts, "
        "SymInt[] size, str reduction) -> Tensor",
        _grad_mask,
        _fake_grad_mask,
    ),
    "grad": (f"(Tensor grad_output, {_SCORES}, {_OPTIONS}) -> Tensor", _grad, _fake_grad),
    "loss_grad": (
        f"({_SCORES}, Tensor? grad_output, {_OPTIONS}, bool strict) -> (Tensor, Tensor)",
        _loss_grad,
        _fake_loss_grad,
    ),
}
_library = torch.library.Library("mml_arrayapi", "DEF")
for _name, (_schema, _implementation, _fake) in OPERATORS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, _implementation, "CUDA")
    torch.library.register_fake(f"mml_arrayapi::{_name}", _fake, lib=_library)


def _run(name: str, *arguments: Any) -> Any:
    if torch.compiler.is_compiling():
        return getattr(torch.ops.mml_arrayapi, name)(*arguments)
    return OPERATORS[name][1](*arguments)


# --------------------------------------------------------------------------------------------------
# Calls that come again. At 512 x 512 the checks and the planning take longer than the device does.

NUMBERS = (int, float)
MOST = 1024  # calls remembered


class _Known(NamedTuple):
    """What to launch for a plain call that has come before."""

    device: int  # its number
    loss: cuda_launch.Plan
    train: cuda_launch.Plan  # the loss, and what the backward pass reads
    backward: cuda_launch.Plan
    counts: int  # where in its scratch memory these begin, in bytes
    mask: int
    scratch: int  # bytes for training; the loss alone needs the first ``counts`` bytes
    p: float
    margin: float
    reduction: str


_known: dict[tuple[Any, ...], _Known] = {}


def _remember(problem: Problem) -> None:
    """Let the shortcut take calls like this one, if it is plain: contiguous, without a weight."""
    x, target, p, margin = problem.input, problem.target, problem.p, problem.margin
    if (
        problem.weight is not None
        or problem.reduction == "none"
        or problem.check_target != "nan"
        or x.ndim != 2
        or x.numel() == 0
        or not _plainly_laid(x, target)
    ):
        return
    key = (x.dtype, x.shape, x.device, target.dtype, target.shape, p, margin, problem.reduction)
    if key in _known:
        return
    rows, classes = x.shape
    scalar, index = SCALARS[x.dtype], x.device.index
    kind, processors = KINDS[target.dtype], _properties(index)[0]
    # Autograd's gradient for the loss is one number of the loss's own dtype.
    call = cuda_launch.Call(
        scalar, rows, classes, classes, 1, kind, False, 0, False, True, p, margin,
        problem.reduction, processors,
    )  # fmt: skip
    forward, backward = ("loss_mask", "grad_mask") if p == 1 else ("loss", "grad")
    train = cuda_launch.plan(call, forward)
    counts = 8 * train.partials
    mask = counts + (4 * train.counts if p == 1 else 0)
    if len(_known) >= MOST:
        _known.clear()
    _known[key] = _Known(
        index,
        cuda_launch.plan(call, "loss"),
        train,
        cuda_launch.plan(call, backward),
        counts,
        mask,
        mask + (math.prod(train.mask) if p == 1 else 0),
        p,
        margin,
        problem.reduction,
    )


def _plainly_laid(input: torch.Tensor, target: torch.Tensor) -> bool:
    return (
        input.layout is torch.strided
        and input.is_contiguous()
        and target.is_contiguous()
        and not input.is_neg()
        and input.data_ptr() % 16 == 0
    )


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
    """Repeat a plain call that has come before, with other values and addresses."""
    if is_compiling():
        return None
    if (
        type(input) not in PLAIN
        or type(target) is not torch.Tensor
        or weight is not None
        or type(p) not in NUMBERS
        or type(margin) not in NUMBERS
        or type(reduction) is not str
        or axis != -1
        or (check_target != "auto" and check_target != "nan")
    ):
        return None
    device = input.device
    key = (input.dtype, input.shape, device, target.dtype, target.shape, p, margin, reduction)
    known = _known.get(key)
    if (
        known is None
        or target.device != device
        or target.layout is not torch.strided
        or _transformed()
        or not _plainly_laid(input, target)
    ):
        return None
    if input.requires_grad and is_grad_enabled():
        return _KnownLoss.apply(input, target, known)  # type: ignore[no-any-return]
    loss = input.new_empty(())
    partials = _scratch(known.counts, device)
    first = 0 if partials is None else partials.data_ptr()
    # fmt: off
    addresses = (
        input.data_ptr(), target.data_ptr(), 0, 0, 0, first, loss.data_ptr(), 0, 0, 0, 0,
    )
    # fmt: on
    _on_device(known.loss, addresses, known.device)
    return loss


def _scratch(size: int, device: torch.device) -> torch.Tensor | None:
    return torch.empty(size, dtype=torch.uint8, device=device) if size else None


class _KnownLoss(torch.autograd.Function):
    """What :class:`_Loss` is to a call in general. One piece of memory holds all it keeps."""

    @staticmethod
    def forward(ctx: Any, input: Any, target: Any, known: _Known) -> torch.Tensor:
        loss = input.new_empty(())
        scratch = _scratch(known.scratch, input.device)
        ctx.save_for_backward(input, target, scratch)
        ctx.known = known
        first = 0 if scratch is None else scratch.data_ptr()
        # fmt: off
        addresses = (
            input.data_ptr(), target.data_ptr(), 0, 0, 0, first, loss.data_ptr(), 0,
            first + known.mask, first + known.counts, 0,
        )
        # fmt: on
        _on_device(known.train, addresses, known.device)
        return loss  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:  # type: ignore[override]
        input, target, scratch = ctx.saved_tensors
        known = ctx.known
        if is_grad_enabled() or type(grad_output) is not torch.Tensor or _transformed():
            options = known.p, known.margin, known.reduction
            return _generic_gradient(input, target, None, grad_output, *options), None, None
        grad_output = grad_output.resolve_neg()
        grad = torch.empty_like(input)
        first = 0 if scratch is None else scratch.data_ptr()
        # fmt: off
        addresses = (
            input.data_ptr(), target.data_ptr(), 0, grad_output.data_ptr(), 0, 0, 0, 0,
            first + known.mask, first + known.counts, grad.data_ptr(),
        )
        # fmt: on
        _on_device(known.backward, addresses, known.device)
        return grad, None, None


# --------------------------------------------------------------------------------------------------


def _launch(
    operation: str,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    upstream: torch.Tensor | None,
    p: float,
    margin: float,
    reduction: str,
    strict: bool,
    **arrays: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Launch an operation; return its arrays: those given, and the loss and mask made here."""
    rows, classes = target.numel(), input.shape[-1]
    dtype, device = input.dtype, input.device
    real = torch.float64 if dtype == torch.float64 else torch.float32
    if input.ndim != 2 or (classes > 1 and input.stride(1) != 1):
        input = input.reshape(rows, classes).contiguous()
    flat = target if target.ndim == 1 else target.reshape(-1)
    scores = input.data_ptr()
    addresses = {"scores": scores, "target": flat.data_ptr()}
    if weight is not None:
        weight = _readable(weight, dtype, real).contiguous()
        addresses["weight"] = weight.data_ptr()
    if upstream is not None:
        upstream = _readable(upstream, dtype, real).resolve_neg().reshape(-1)
        addresses["upstream"] = upstream.data_ptr()
    call = cuda_launch.Call(
        SCALARS[dtype],
        rows,
        classes,
        input.stride(0) if rows > 1 else classes,
        flat.stride(0),
        KINDS[target.dtype],
        weight is not None and weight.dtype == real,
        0 if upstream is None or reduction != "none" else upstream.stride(0),
        upstream is not None and upstream.dtype == real,
        scores % 16 == 0,
        p,
        margin,
        reduction,
        _properties(device.index)[0],
    )
    plan = cuda_launch.plan(call, operation)
    if operation.startswith("loss"):
        shape = target.shape if reduction == "none" else ()
        arrays["loss"] = torch.empty(shape, dtype=dtype, device=device)
    if operation == "loss_mask":
        arrays["mask"] = torch.empty(plan.mask, dtype=torch.uint8, device=device)
        arrays["counts"] = torch.empty(plan.counts, dtype=torch.int32, device=device)
    for name, array in arrays.items():
        addresses[name] = array.data_ptr()
    if reduction != "none" and "loss" in addresses:
        addresses["result"] = addresses.pop("loss")
    if plan.partials:
        partials = torch.empty(plan.partials, dtype=torch.float64, device=device)
        addresses["partials"] = partials.data_ptr()
    if strict:
        flag = torch.full((), cuda_launch.FAR, dtype=torch.int64, device=device)
        addresses["flag"] = flag.data_ptr()
    _on_device(plan, tuple(addresses.get(name, 0) for name in cuda_launch.ADDRESSES), device.index)
    if strict and flag.item() != cuda_launch.FAR:
        raise_invalid_target(torch_values.on_host(target), classes)
    return arrays


def _readable(tensor: torch.Tensor, dtype: torch.dtype, real: torch.dtype) -> torch.Tensor:
    """Convert to the computing precision, unless it has that, or the scores' own."""
    return tensor if tensor.dtype in (dtype, real) else tensor.to(real)


def _on_device(plan: cuda_launch.Plan, addresses: tuple[int, ...], index: int) -> None:
    """Launch on the device's current stream."""
    if index != _current_device():
        with torch.cuda.device(index):
            return _on_device(plan, addresses, index)
    stream = torch._C._cuda_getCurrentRawStream(index)
    return cuda_driver.launch(plan, addresses, index, stream, _architecture)


def _current_device() -> int:
    return torch.cuda.current_device()  # type: ignore[no-any-return]


@cache
def _properties(index: int) -> tuple[int, str]:
    """Return a device's number of multiprocessors and its architecture."""
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, f"sm_{properties.major}{properties.minor}"


def _architecture(index: int) -> str:
    return _properties(index)[1]


KERNEL = Kernel("torch-cuda", "torch", refuses, loss, loss_and_grad)
