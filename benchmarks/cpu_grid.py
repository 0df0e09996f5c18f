"""Ordinary calls, small and large, beside PyTorch eager and torch.compile.

    python benchmarks/cpu_grid.py [--quick] [--out benchmarks/results]

A grid of shapes, dtypes, reductions, weights, p and passes, on tensors and on NumPy arrays; for
NumPy, PyTorch runs on the same numbers. Candidates of a row are called in turn; a time is a median.
PyTorch's function takes no bfloat16 on the CPU: there only torch.compile of it is a rival.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
import torch
from cpu import _in_turn, machine

import mml_arrayapi as mml

SHAPES = ((32, 10), (128, 1000), (4096, 100), (65536, 10), (8192, 1000))
OPTIONS = (  # reduction, weights, p
    ("mean", False, 1),
    ("mean", True, 1),
    ("mean", False, 2),
    ("none", False, 1),
)
eager = torch.nn.functional.multi_margin_loss


def candidates(shape, dtype, options, backward):
    """The calls of one row, by name."""
    reduction, weighted, p = options
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    y = torch.randint(0, shape[1], shape[:1], generator=generator)
    weight = torch.rand(shape[1], generator=generator).to(x.dtype) if weighted else None
    keywords = {"p": p, "weight": weight, "reduction": reduction}
    torch.compiler.reset()
    functions = {"mml torch": mml.multi_margin_loss, "compile": torch.compile(eager)}
    if dtype != "bfloat16":
        functions["eager"] = eager

    def call(function):
        if not backward:
            return lambda: function(x, y, **keywords)
        leaf = x.clone().requires_grad_()
        upstream = torch.ones(shape[0] if reduction == "none" else (), dtype=x.dtype)

        def both():
            leaf.grad = None
            function(leaf, y, **keywords).backward(upstream)

        return both

    calls = {name: call(function) for name, function in functions.items()}
    if dtype != "bfloat16":
        arrays = {"p": p, "reduction": reduction}
        arrays["weight"] = None if weight is None else weight.numpy()
        ours = mml.multi_margin_loss_and_grad if backward else mml.multi_margin_loss
        xn, yn = x.numpy(), y.numpy()
        calls["mml numpy"] = lambda: ours(xn, yn, **arrays)
    return calls


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    arguments = parser.parse_args()
    about = machine()
    rounds = ", of a tenth of the rounds" if arguments.quick else ""
    names = ("mml torch", "mml numpy", "eager", "compile")
    lines = [
        f"{about['cpu']}, {about['cpus']} CPUs, {about['date']}, load {about['load']:.1f}.",
        "",
        f"Medians in microseconds{rounds}; `ratio` is our tensor call to PyTorch's faster one.",
        "",
        "| shape | dtype | reduction | weights | p | pass | " + " | ".join(names) + " | ratio |",
        "|" + "---|" * (7 + len(names)),
    ]
    dtypes = ("float32", "bfloat16", "float64")
    for shape, dtype, options, backward in itertools.product(
        SHAPES, dtypes, OPTIONS, (False, True)
    ):
        times = _in_turn(
            candidates(shape, dtype, options, backward), 0.05 if arguments.quick else 0.5
        )
        rivals = [times[name] for name in ("eager", "compile") if name in times]
        cells = [f"{times[name] * 1e6:.1f}" if name in times else "" for name in names]
        reduction, weighted, p = options
        kind = "backward" if backward else "forward"
        row = (f"{shape[0]} x {shape[1]}", dtype, reduction, "yes" if weighted else "no", p, kind)
        ratio = f"{times['mml torch'] / min(rivals):.2f}"
        lines.append("| " + " | ".join(map(str, (*row, *cells, ratio))) + " |")
        print(lines[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "cpu_grid.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    np.seterr(all="raise")
    main()
