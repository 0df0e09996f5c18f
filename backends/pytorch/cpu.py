"""PyTorch on the CPU: the C++ kernels, which read tensors through DLPack's C exchange API."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, empty_like, get_num_threads

from mml_arrayapi.backends import cpu
from mml_arrayapi.backends.pytorch.autograd import Engine, make_kernel
from mml_arrayapi.backends.pytorch.state import PLAIN, address_of, is_compiling, readable
from mml_arrayapi.kernel import Options, Problem

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

native = cpu.native
_MARK = 0 if native is None else native.MARK
_exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)  # PyTorch 2.10
GRAPH_OPERATORS = False


def _capsule(tensor: Tensor) -> object:
    """Return a tensor's DLPack capsule, or None where its memory isn't its values."""
    return torch.utils.dlpack.to_dlpack(tensor) if readable(tensor) else None


if native is not None:
    # By the exchange a kernel looks at tensors itself: readable() takes 1.3 microseconds for each.
    native.accept(PLAIN, _exchange or _capsule)
    GRAPH_OPERATORS = native.connect_pytorch(address_of)  # from PyTorch 2.10 on


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    if native is None:
        return cpu.reason()
    if problem.input.dtype not in DTYPES:
        return f"input has dtype {problem.input.dtype}, not float16, bfloat16, float32 or float64"
    # While a compiler traces, sizes may be symbols, and a question would become a condition. The
    # operators look at the sizes when they run.
    return None if is_compiling() else cpu.too_large(problem.input.shape, problem.axis)


def loss(
    input: Tensor, target: Tensor, weight: Tensor | None, options: Options, keep_mask: bool
) -> tuple[Tensor, Tensor | None] | None:
    """Compute the loss; see :class:`Engine`."""
    if native is None:  # nobody may have asked refuses()
        return None
    # 0 where keeping the mask takes more time than to read the scores again.
    size = native.bits_size(input, options) if keep_mask else 0
    mask = _new_mask(input, options) if size else None
    bits = None if mask is None else mask[:size]
    out = None
    if not _exchange:
        if not (readable(input) and readable(target)):
            return None
        out = _new_loss(input, target, options)
    value = native.loss(input, target, weight, options, out, bits, get_num_threads)
    return None if value is None else (value, mask)


def grad(
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    mask: Tensor | None,
    options: Options,
) -> Tensor | None:
    """Compute the gradient; see :class:`Engine`."""
    if not readable(input):  # PyTorch's empty_like() crashes over tensors that escaped torch.func
        return None
    into = empty_like(input, requires_grad=False)
    bits = _written(mask, input, options)
    return native.grad(input, target, weight, options, into, grad_output, bits, get_num_threads)


def loss_and_grad(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad_output: Tensor | None,
    options: Options,
) -> tuple[Tensor, Tensor] | None:
    """Compute both in one pass over the scores; see :class:`Engine`."""
    if not (readable(input) and readable(target)):
        return None
    into = _empty_like(input)
    out = None if _exchange else _new_loss(input, target, options)
    value = native.loss_and_grad(
        input, target, weight, options, into, grad_output, out, get_num_threads
    )
    return None if value is None else (value, into)


def _empty_like(x: Tensor) -> Tensor:
    """Return a tensor whose axes lie as those of another; PyTorch does so if none is repeated."""
    if 0 not in x.stride():
        return empty_like(x, requires_grad=False)
    order = cpu.axes_in_memory(x.stride())
    made = x.new_empty([x.shape[i] for i in order], requires_grad=False)
    return made.permute([order.index(i) for i in range(x.ndim)])


def mask_shape(dtype: torch.dtype, rows: int, n_classes: int) -> tuple[int, ...]:
    """Return the mask's shape: room for the bits, and at the end a mark where they were written.

    The room is for the narrowest vectors, a byte for each, so that exported programs fit every
    machine; the mark tells which build wrote them.
    """
    lanes = 2 if dtype is torch.float64 else 4
    return (rows * ((n_classes + lanes - 1) // lanes) + 1,)


def keeps(input: Tensor, options: Options) -> bool:
    """Tell whether keeping the mask takes less time than to read the scores again."""
    return bool(native and native.bits_size(input, options))


def _written(mask: Tensor | None, input: Tensor, options: Options) -> Tensor | None:
    """Return the bits of a mask that has been written for such an input, or None."""
    if mask is None or mask.dtype is not torch.uint8 or not readable(mask):
        return None
    size = native.bits_size(input, options)  # 0 for few scores; to read the mark takes longer
    fits = size and mask.shape == _mask_of(input, options) and mask[-1] == _MARK
    return mask[:size] if fits else None


def _new_mask(input: Tensor, options: Options) -> Tensor:
    """Make room for the mask, and mark it as written."""
    mask = input.new_empty(_mask_of(input, options), dtype=torch.uint8)
    mask[-1] = _MARK
    return mask


def _mask_of(input: Tensor, options: Options) -> tuple[int, ...]:
    n_classes = input.shape[options[4]]
    return mask_shape(input.dtype, input.numel() // n_classes, n_classes)


def _new_loss(input: Tensor, target: Tensor, options: Options) -> Tensor:
    return input.new_empty(target.shape if options[2] == "none" else (), requires_grad=False)


KERNEL = make_kernel(
    "torch-cpu",
    Engine("cpu", refuses, loss, grad, loss_and_grad, mask_shape, keeps, GRAPH_OPERATORS),
)
if native is None:  # refuses() says so, and nothing may be tried before it is asked
    KERNEL = replace(KERNEL, direct={})
