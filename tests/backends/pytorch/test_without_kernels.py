"""An installation without a C++ compiler: PyTorch's CPU tensors go to the generic code."""

import pytest

from tests.tree import run_python

pytest.importorskip("torch")

CODE = """
import sys
for build in ("_baseline", "_x86_64_v3", "_x86_64_v4"):
    sys.modules[f"mml_arrayapi.backends.cpu.{build}"] = None
import torch
import mml_arrayapi as mml
x, y = torch.zeros(2, 3, requires_grad=True), torch.tensor([0, 1])
assert not next(b for b in mml.list_backends() if b.name == "torch-cpu").available
for _ in range(3):  # the first loads the kernels
    loss = mml.multi_margin_loss(x, y)
    loss.backward()
assert mml.explain(x, y).kernel == "generic"
print(round(float(loss), 6))
"""


def test_every_call_works():
    assert run_python(CODE) == "0.666667"
