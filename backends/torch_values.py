"""PyTorch: whether a tensor's values can be read now, without stalling or breaking a trace."""

from __future__ import annotations

import torch
from torch._subclasses.fake_tensor import FakeTensor

from mml_arrayapi.namespaces import DEVICE, HOST, TRACED


def sight(tensor: torch.Tensor) -> str:
    """Tell whether a tensor's values can be read: "host", "device" or "traced"."""
    if torch.compiler.is_compiling():
        return TRACED
    if tensor.device.type == "meta" or isinstance(tensor, FakeTensor):
        return TRACED
    if torch.jit.is_tracing() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return TRACED
    return HOST if tensor.device.type == "cpu" else DEVICE
