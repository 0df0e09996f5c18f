"""One launch of each kind of GPU kernel, small: for compute-sanitizer, which slows all down."""

from __future__ import annotations

import torch

import mml_arrayapi as mml

for classes in (7, 100, 1001, 4099):
    for p in (1, 2):
        x = torch.randn(300, classes, device="cuda", requires_grad=True)
        target = torch.randint(0, classes, (300,), device="cuda")
        mml.multi_margin_loss(x, target, p=p, backend="torch-cuda").backward()
        odd = torch.randn(30, classes + 3, device="cuda")[:, 1:-2]
        mml.multi_margin_loss_and_grad(odd, target[:30], p=p, backend="torch-cuda")
torch.cuda.synchronize()
