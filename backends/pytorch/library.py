"""PyTorch's row in the table of libraries; importing it loads the kernels for tensors.

``torch.compile`` follows no lock, no ``importlib`` and no failing import, and can't keep a record
of functions that is made within a trace; but it runs an import statement as it is. So the first
call of a process may be a compiled one.
"""

from __future__ import annotations

import array_api_compat.torch as xp
import torch

from mml_arrayapi import overrides, registry
from mml_arrayapi.backends.pytorch import state
from mml_arrayapi.libraries import Library, device_of

LIBRARY = Library(
    "torch",
    xp,
    state.value_access,
    state.on_host,
    state.arange,
    device_of,
    unusable=state.unsupported_layout,
)

registry.load("torch")
# It can't read a ContextVar either. The result may be taken as a constant: the caller reads
# overrides.open_names first, which compiled code is checked against.
torch.compiler.assume_constant_result(overrides.in_context)
