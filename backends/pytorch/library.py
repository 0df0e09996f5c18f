"""PyTorch's row in the table of libraries; importing it loads the kernels for tensors.

``torch.compile`` follows no lock, no ``importlib`` and no failing import, and can't keep a record
of functions that is made within a trace; but it runs an import statement as it is. So the first
call of a process may be a compiled one.
"""

from __future__ import annotations

from dataclasses import replace

import array_api_compat.torch as xp

from mml_arrayapi import registry
from mml_arrayapi.backends.pytorch import generic, state
from mml_arrayapi.libraries import plain

LIBRARY = replace(
    plain("torch", xp, state.value_access),
    device_key=state.device_key,
    unsupported_layout=state.unsupported_layout,
    **generic.ROW,
    under_autocast=state.under_autocast,
)

registry.load("torch")
