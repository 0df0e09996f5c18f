"""PyTorch on the CPU: ours and PyTorch's own loss, eager and under torch.compile(fullgraph=True).

    python benchmarks/compile.py [--shape 32x10] [--dtype float32] [--out benchmarks/results]

The grid of ``cpu_grid.py``. The calls of a row are measured in turns, in one process; a time is a
median. Rows are added to those that the results already have, or replace them, so that a run may
be made in parts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from cpu import machine
from cpu_grid import OPTIONS, SHAPES

from mml_arrayapi import explain, multi_margin_loss

NAMES = ("ours", "ours compiled", "PyTorch", "PyTorch compiled")
MOST = 2000  # rounds
KEY = ("shape", "dtype", "reduction", "weights", "p", "pass")


def timed(calls, seconds):
    """Median time of each call, in microseconds; the calls take turns."""
    for call in calls.values():
        for _ in range(3):
            call()
    times = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end and len(times[NAMES[0]]) < MOST:
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: round(1e6 * statistics.median(values), 1) for name, values in times.items()}


def calls_of(shape, dtype, options, backward):
    """The calls of one row, by name."""
    reduction, weighted, p = options
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=draw).to(dtype)
    y = torch.randint(0, shape[1], shape[:1], generator=draw)
    weight = torch.rand(shape[1], generator=draw).to(dtype) if weighted else None
    keywords = {"p": p, "weight": weight, "reduction": reduction}
    if explain(x, y, **keywords).kernel != "torch-cpu":
        raise SystemExit(str(explain(x, y, **keywords)))
    upstream = torch.ones(shape[0] if reduction == "none" else (), dtype=dtype)
    torch.compiler.reset()  # else it gives up compiling after eight rows
    leaf = x.requires_grad_(backward)  # one for all: a copy's pages may take half as long again

    def call(function):
        def run():
            leaf.grad = None
            loss = function(leaf, y, **keywords)
            if backward:
                loss.backward(upstream)

        return run

    theirs = torch.nn.functional.multi_margin_loss
    functions = (multi_margin_loss, theirs)
    compiled = [torch.compile(function, fullgraph=True) for function in functions]
    calls = dict(
        zip(NAMES, map(call, (functions[0], compiled[0], theirs, compiled[1])), strict=True)
    )
    if dtype in (torch.float16, torch.bfloat16):
        del calls["PyTorch"]  # it has no such kernel for the CPU
    return calls


def table(result):
    """The rows as a Markdown table."""
    about = result["machine"]
    lines = [
        f"{about['cpu']}, {about['cpus']} CPUs, PyTorch {about['versions']['torch']}, "
        f"{about['date']}, load {about['load']:.1f}.",
        "",
        "Medians in microseconds. `to PyTorch` is our time compiled to PyTorch's compiled, `to "
        "eager` what ours compiled takes more than 1.1 times ours eager.",
        "",
        "| " + " | ".join((*KEY, *NAMES, "to PyTorch", "to eager")) + " |",
        "|" + "---|" * (len(KEY) + len(NAMES) + 2),
    ]
    for row in result["rows"]:
        times = row["microseconds"]
        eager, ours, theirs = (times[NAMES[i]] for i in (0, 1, 3))
        cells = [row[key] for key in KEY] + [times.get(name, "") for name in NAMES]
        cells += [f"{ours / theirs:.2f}", f"{ours - 1.1 * eager:+.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--shape", nargs="+", default=[f"{n}x{c}" for n, c in SHAPES])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16", "float64"])
    parser.add_argument("--seconds", type=float, default=1.0, help="for each row")
    arguments = parser.parse_args()
    path = arguments.out / "compile.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else []
    rows = {tuple(row[key] for key in KEY): row for row in earlier}
    about = machine()
    for shape, dtype, options, backward in itertools.product(
        arguments.shape, arguments.dtype, OPTIONS, (False, True)
    ):
        reduction, weighted, p = options
        key = (shape, dtype, reduction, weighted, p, "with backward" if backward else "forward")
        calls = calls_of(
            tuple(map(int, shape.split("x"))), getattr(torch, dtype), options, backward
        )
        times = timed(calls, arguments.seconds)
        rows[key] = {**dict(zip(KEY, key, strict=True)), "microseconds": times}
        print(*key, times, flush=True)
    order = {f"{n}x{c}": i for i, (n, c) in enumerate(SHAPES)}
    kept = sorted(rows.values(), key=lambda row: order.get(row["shape"], len(order)))
    result = {"machine": about, "rows": kept}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "compile.md").write_text(table(result))


if __name__ == "__main__":
    main()
