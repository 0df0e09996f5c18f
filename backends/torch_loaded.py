"""Loads the kernels for tensors when it is imported.

``torch.compile`` follows no lock, no ``importlib`` and no failing import, but it runs an import
statement as it is: so the first call of a process may be a compiled one.
"""

import torch

from mml_arrayapi import overrides, registry

registry.load("torch")
# It can't read a ContextVar either. The result may be taken as a constant: the caller reads
# overrides.open_names first, which compiled code is checked against.
torch.compiler.assume_constant_result(overrides.in_context)
