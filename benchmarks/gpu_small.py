"""Each kind of GPU kernel, small, as users call it: for compute-sanitizer, which slows all down.

    compute-sanitizer python benchmarks/gpu_small.py

With ``--large`` two kernels at full size instead, for ncu: rows (65536 x 1000), tiles (1e7 x 10).
"""

from __future__ import annotations

import sys

import torch

import mml_arrayapi as mml


def run(rows: int, classes: int, p: int) -> None:
    """Call the loss, its backward pass and the gradient function twice: the first call compiles."""
    x = torch.randn(rows, classes, device="cuda", requires_grad=True)
    target = torch.randint(0, classes, (rows,), device="cuda")
    found = mml.explain(x, target, p=p)
    if found.kernel != "torch-cuda":
        raise SystemExit(f"torch-cuda doesn't run:\n{found}")
    for _ in range(2):
        mml.multi_margin_loss(x, target, p=p).backward()
    odd = torch.randn(rows, classes + 3, device="cuda")[:, 1:-2]
    target[::3] = -100
    mml.multi_margin_loss_and_grad(odd, target, p=p, ignore_index=-100)


if "--large" in sys.argv:
    run(65536, 1000, 1)
    run(10_000_000, 10, 1)
else:
    for classes in (7, 100, 1001, 4099):
        for p in (1, 2):
            run(300, classes, p)
    for p in (1, 2):
        run(3, 100_003, p)  # rows that several blocks share
torch.cuda.synchronize()
