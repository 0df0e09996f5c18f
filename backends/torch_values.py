"""PyTorch: whether a tensor's values can be read, and tensors made beside it."""

from __future__ import annotations

import numpy as np
import torch
from torch._C import _functorch
from torch._subclasses.fake_tensor import FakeTensor

from mml_arrayapi.libraries import DEVICE, HOST, TRACED


def sight(tensor: torch.Tensor) -> str:
    """Tell whether a tensor's values can be read: "host", "device" or "traced"."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return TRACED
    tensor = _within_grad(tensor)
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return TRACED
    if _functorch.is_functorch_wrapped_tensor(tensor):  # torch.func.vmap
        return TRACED
    return HOST if tensor.device.type == "cpu" else DEVICE


def unusable(tensor: torch.Tensor) -> str | None:
    """Tell what a tensor is that isn't dense; PyTorch has few operations for those."""
    layout = tensor.layout
    return None if layout is torch.strided else f"a tensor of layout {layout}"


def on_host(tensor: torch.Tensor) -> np.ndarray:
    """Return the values as a NumPy array: PyTorch can't compare its wide unsigned integers."""
    # Within torch.func.grad and the like, what an operation returns has no values to read.
    with torch._C._DisableFuncTorch():
        values: np.ndarray = _within_grad(tensor).detach().cpu().numpy()
    return values


def arange(n: int, dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
    """Return 0 to n - 1, a fake tensor beside a fake tensor."""
    if isinstance(like, FakeTensor):
        with like.fake_mode:
            return torch.arange(n, dtype=dtype, device=like.device)
    return torch.arange(n, dtype=dtype, device=like.device)


def _within_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that torch.func.grad and jvp have wrapped to track derivatives."""
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor
