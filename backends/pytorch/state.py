"""What PyTorch is doing, and what a tensor is: every private name of PyTorch that we use.

Each name has a test in ``tests/backends/pytorch/test_state.py`` that fails when PyTorch removes it
or gives it another meaning.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache

import numpy as np
import torch
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import _reduction as _Reduction
from torch.utils._device import DeviceContext

from mml_arrayapi.libraries import DEVICE, HOST, TRACED

PLAIN = (torch.Tensor, torch.nn.Parameter)  # of exactly these types; what holds memory of its own
_AUTOCAST = ("cpu", "cuda", "xpu", "mps", "hpu")
_BITS = (f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8))
_PACKED = frozenset(getattr(torch, name) for name in _BITS if hasattr(torch, name))
_RECORDED = (*PLAIN, FakeTensor, FunctionalTensor)  # what compilers trace with

# A call of a name with dots costs half as much again as one without: of 3 microseconds.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
is_grad_enabled = torch.is_grad_enabled
_functorch_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
is_tracing = torch._C._is_tracing
_tracing_context = TracingContext.try_get

#: Within it, a :class:`SingleLevelFunction` derives one level of torch.func, as an operator's
#: Autograd kernel is asked to do.
single_level: Callable[[], AbstractContextManager[None]] = enable_single_level_autograd_function
#: Within it, operators go to their implementations past autograd.
below_autograd: Callable[[], AbstractContextManager[None]] = torch._C._AutoDispatchBelowAutograd


class SingleLevelFunction(torch.autograd.function._SingleLevelFunction):
    """A Function whose ``apply`` knows nothing of torch.func, which saves 2 microseconds."""

    _compiled_autograd_key = staticmethod(torch.autograd.Function._compiled_autograd_key)


def ordinary() -> bool:
    """Tell whether operations simply run: no compiler, transform or mode looks on."""
    return not (
        is_dynamo_compiling()
        or _functorch_active()
        or forward_ad._current_level >= 0
        or _dispatch_modes()
        or (_function_modes() and not _only_device_contexts())
        or is_tracing()
    )


def _only_device_contexts() -> bool:
    """Tell whether all function modes are those of ``torch.device(...)``, which set a default."""
    modes = map(torch._C._get_function_stack_at, range(_function_modes()))
    return all(type(mode) is DeviceContext for mode in modes)


def is_compiling() -> bool:
    """Tell whether this thread compiles or exports; PyTorch's flag is the whole process's."""
    return torch.compiler.is_compiling() and _in_this_thread()


def is_exporting() -> bool:
    """Tell whether this thread exports."""
    return torch.compiler.is_exporting() and _in_this_thread()


def _in_this_thread() -> bool:
    return is_dynamo_compiling() or _tracing_context() is not None


def is_recording() -> bool:
    """Tell whether torch.compile records a graph, of which it has taken all derivatives."""
    return _tracing_context() is not None and not is_exporting()


def forward_levels() -> int:
    """Count the levels of forward-mode differentiation that are active."""
    levels = forward_ad._current_level + 1
    if is_dynamo_compiling():
        return levels
    # A graph that Dynamo made raises the levels of torch.func alone.
    stack = _functorch.get_interpreter_stack() or ()
    return max(levels, sum(one.key() == _functorch.TransformType.Jvp for one in stack))


def is_transformed() -> bool:
    """Tell whether torch.func or forward-mode differentiation is at work."""
    return bool(_functorch_active()) or forward_ad._current_level >= 0


def readable(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's address and strides say all about its values.

    They don't for views that negate, for zeros that have no memory (autograd makes both), for
    storage that was freed or shrunk, for nested tensors, for subclasses, and for integers of less
    than 8 bits, of which PyTorch doesn't say how it packs them.
    """
    return (
        type(tensor) in PLAIN
        and tensor.layout is torch.strided
        and tensor.dtype not in _PACKED
        and not tensor.is_nested
        and not tensor.is_neg()
        and not tensor._is_zerotensor()
        and not _functorch.is_legacy_batchedtensor(tensor)
        and tensor.untyped_storage().nbytes() >= _end(tensor)
    )


def _end(tensor: torch.Tensor) -> int:
    """Return the byte of its storage before which a tensor ends."""
    if not tensor.numel():  # a view may begin behind a storage of no bytes
        return 0
    begin = tensor.storage_offset() * tensor.itemsize
    if tensor.is_contiguous():
        return begin + tensor.nbytes
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return begin + (last + 1) * tensor.itemsize


def why_not_kernel(name: str, tensor: torch.Tensor, device: str) -> str | None:
    """Tell why a fused kernel for a type of device can't take a tensor, or None."""
    if type(tensor) not in _RECORDED:
        return f"{name} is a {type(tensor).__name__}, a subclass of torch.Tensor"
    if tensor.device.type != device:
        return f"{name} is on {tensor.device}, not on a {device.upper()} device"
    if tensor.layout is not torch.strided:
        return f"{name} is a tensor of layout {tensor.layout}"
    return None


def why_generic() -> str | None:
    """Tell what is active that only the generic implementation can follow, or None."""
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active, which the generic implementation follows"
    if not is_dynamo_compiling() and is_tracing():
        return "torch.jit.trace is active, which records the generic implementation"
    return None


def is_mapped(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor stands for many: ``torch.autograd.grad(is_grads_batched=True)``."""
    return not is_dynamo_compiling() and bool(_functorch.is_legacy_batchedtensor(tensor))


def value_access(tensor: torch.Tensor) -> str:
    """Tell whether a tensor's values can be read: "host", "device" or "traced"."""
    if is_compiling() or is_tracing():
        return TRACED
    tensor = _within_grad(tensor)
    if tensor.is_meta or _holds_others(tensor):
        return TRACED
    if _functorch.is_functorch_wrapped_tensor(tensor):  # torch.func.vmap
        return TRACED
    return HOST if tensor.is_cpu else DEVICE


def _holds_others(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has no memory of its own: fake and distributed tensors, for example."""
    return type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def under_autocast(input: torch.Tensor) -> torch.Tensor:
    """Widen 16-bit scores where autocast is on, as it does for PyTorch's own loss."""
    if input.itemsize == 2:
        kind = input.device.type  # PyTorch raises for types that have no autocast, such as meta
        if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
            return input.float()
    return input


def unsupported_layout(tensor: torch.Tensor) -> str | None:
    """Tell what a tensor is that isn't dense; PyTorch has few operations for those."""
    layout = tensor.layout
    if layout is not torch.strided:
        return f"a tensor of layout {layout}"
    if type(tensor) not in _RECORDED and isinstance(tensor, torch.masked.MaskedTensor):
        return "a MaskedTensor, whose mask would be lost; call its to_tensor() or get_data()"
    if not is_compiling() and _is_freed(tensor):
        return "a tensor whose storage was freed or shrunk"
    return None


def device_key(tensor: torch.Tensor) -> object:
    """Return what must be equal for tensors to be used together: the device, and a mesh of them."""
    if type(tensor) in PLAIN:
        return tensor.device
    mesh = getattr(tensor, "device_mesh", None)
    return tensor.device if mesh is None else f"{mesh} (a {type(tensor).__name__})"


def _is_freed(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in PLAIN
        and not tensor._is_zerotensor()
        and not _functorch.is_functorch_wrapped_tensor(tensor)
        and not _functorch.is_legacy_batchedtensor(tensor)
        and tensor.untyped_storage().nbytes() < _end(tensor)
    )


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """Return the values as a NumPy array: PyTorch can't compare its wide unsigned integers."""
    # Within torch.func.grad and the like, what an operation returns has no values to read.
    with torch._C._DisableFuncTorch():
        values: np.ndarray = _within_grad(tensor).numpy(force=True)
    return values


def arange(n: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return 0 to n - 1, of the kind of another tensor: fake or distributed, for example."""
    if isinstance(like, FakeTensor):
        with like.fake_mode:
            return torch.arange(n, dtype=dtype, device=like.device)
    if type(like) not in _RECORDED and _holds_others(like):
        return like.new_ones(n, dtype=dtype).cumsum(0) - 1
    return torch.arange(n, dtype=dtype, device=like.device)


def _within_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that torch.func.grad and jvp have wrapped to track derivatives."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


@cache
def _torch_library() -> ctypes.CDLL:
    return ctypes.CDLL(torch._C.__spec__.origin)


def address_of(name: str) -> int | None:
    """Return where a function of PyTorch's stable C interface is, or None."""
    function = getattr(_torch_library(), name, None)
    return None if function is None else ctypes.cast(function, ctypes.c_void_p).value


def current_stream(device: int) -> int:
    """Return the handle of a CUDA device's current stream."""
    stream: int = torch._C._cuda_getCurrentRawStream(device)
    return stream


def reduction_name(size_average: bool | None, reduce: bool | None, reduction: str) -> str:
    """Return the reduction that PyTorch's deprecated arguments ask for, with its own warning."""
    warns = not is_compiling()  # which can't follow the functions that warn
    if size_average is None and reduce is None:
        if reduction != "elementwise_mean":
            return reduction
        if warns:
            _Reduction.get_enum(reduction)
        return "mean"
    if warns:
        _Reduction.legacy_get_string(size_average, reduce)
    if reduce is not None and not reduce:
        return "none"
    return "mean" if size_average is None or size_average else "sum"
