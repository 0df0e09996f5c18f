"""The CPU kernels beside PyTorch eager, torch.compile, jax.jit, NumPy, and the machine's bandwidth.

    python benchmarks/cpu.py [--quick] [--dtype float32] [--p 1] [--out benchmarks/results]
    python benchmarks/cpu.py --rows 32 512 --add    # a part of it, added to what is there

One run, or a few in a row, make one table. All candidates of a row are called in turn, each five
times in a row, round after round, so that what else the machine does hits them alike; a time is the
median of all its calls, a ratio is one of medians of the same rows. (Called once each, a call that
needs fresh memory took up to twice as long: freed memory goes back to a virtual machine's host
within seconds.) Scores are normal: with uniform scores every hinge is active, PyTorch's eager loop,
which branches on each, is predicted without a miss and takes a third of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

SHAPES = ((32, 10), (512, 512), (65536, 1000), (1_000_000, 10), (4096, 32000))
BUDGET = 1.0  # seconds of rounds for one row of the table


def measure(calls, budget):
    """Median seconds of each call, all called in turn; JAX by itself, after the others.

    Its threads go on for tens of milliseconds after a call has returned: the call that followed
    it, our gradient of 65536 x 1000 bfloat16 scores, took 90 ms instead of 29.
    """
    others = {name: call for name, call in calls.items() if name != "jax.jit"}
    alone = {name: call for name, call in calls.items() if name == "jax.jit"}
    return {**_in_turn(others, budget), **(_in_turn(alone, budget / 4) if alone else {})}


def touch_memory():
    """Write to most of the free memory once, before anything is measured.

    The host of a virtual machine hands memory out when it is first touched: 17 GB took 39 s, again
    1 s; a gradient of 262 MB in such memory took twice as long as later.
    """
    import psutil

    free = psutil.virtual_memory().available
    parts = [bytearray(2**28) for _ in range(int(free * 0.75) // 2**28)]
    del parts


def _in_turn(calls, budget):
    repeat = {}
    for name, call in calls.items():
        call()  # compiles
        # Large calls find their memory again.
        warm = time.perf_counter() + min(budget, 0.5)
        while time.perf_counter() < warm:
            call()
        begin = time.perf_counter()
        call()
        repeat[name] = max(1, int(1e-3 / max(time.perf_counter() - begin, 1e-9)))
    times = {name: [] for name in calls}
    end = time.perf_counter() + budget
    while time.perf_counter() < end or len(next(iter(times.values()))) < 10:
        for name, call in calls.items():
            call()  # meanwhile the threads of the one before, which look for more work, fall asleep
            for _ in range(5):
                begin = time.perf_counter()
                for _ in range(repeat[name]):
                    call()
                times[name].append((time.perf_counter() - begin) / repeat[name])
    return {name: statistics.median(values) for name, values in times.items()}


def candidates(shape, dtype, p, gradient):
    """The calls of one row, by name."""
    import numpy as np
    import torch

    import mml_arrayapi as mml

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(getattr(torch, dtype))
    y = torch.randint(0, shape[1], shape[:1], generator=generator)
    eager = torch.nn.functional.multi_margin_loss
    floats = dtype == "float32"
    xn, yn = (x.numpy(), y.numpy()) if floats else (None, None)

    def followed(function):
        leaf = x.clone().requires_grad_()

        def call():
            leaf.grad = None
            function(leaf, y, p=p).backward()

        return call

    def formula(x, y, p):
        wide = x.float()
        z = wide - wide.gather(1, y[:, None]) + 1
        z = torch.where((z > 0) & (torch.arange(x.shape[1]) != y[:, None]), z, 0)
        return (z**p).mean().to(x.dtype)

    torch.compiler.reset()  # else it gives up compiling after eight rows of the table
    compiled = torch.compile(formula, dynamic=False)
    calls = {}
    if gradient:
        calls["mml torch"] = followed(mml.multi_margin_loss)
        calls["mml torch, loss_and_grad"] = lambda: mml.multi_margin_loss_and_grad(x, y, p=p)
        if floats:
            calls["mml numpy"] = lambda: mml.multi_margin_loss_and_grad(xn, yn, p=p)
            calls["torch eager"] = followed(eager)
        calls["torch.compile"] = followed(compiled)
        calls["machine"] = x.clone  # a copy into fresh memory
    else:
        calls["mml torch"] = lambda: mml.multi_margin_loss(x, y, p=p)
        if floats:
            calls["mml numpy"] = lambda: mml.multi_margin_loss(xn, yn, p=p)
            calls["torch eager"] = lambda: eager(x, y, p=p)
        calls["torch.compile"] = lambda: compiled(x, y, p=p)
        calls["machine"] = x.sum if floats else x.view(torch.int16).sum  # every byte is read once
    add_jax(calls, x, y, p, gradient)
    if floats:
        add_numpy(calls, np, xn, yn, p, gradient)
    return calls


def add_jax(calls, x, y, p, gradient):
    try:
        import jax
        import jax.numpy as jnp
    except ImportError:
        return
    dtype = jnp.bfloat16 if x.element_size() == 2 else jnp.float32
    xj, yj = jnp.asarray(x.float().numpy()).astype(dtype), jnp.asarray(y.numpy().astype("int32"))

    def formula(x, y):
        wide = x.astype(jnp.float32)
        z = wide - jnp.take_along_axis(wide, y[:, None], 1) + 1
        z = jnp.where((z > 0) & (jnp.arange(x.shape[1]) != y[:, None]), z, 0)
        return jnp.mean(z**p).astype(x.dtype)

    function = jax.jit(jax.value_and_grad(formula) if gradient else formula)
    calls["jax.jit"] = lambda: jax.block_until_ready(function(xj, yj))


def add_numpy(calls, np, x, y, p, gradient):
    """The formula as one would write it in NumPy."""
    rows = np.arange(len(x))

    def forward():
        z = x - x[rows, y][:, None] + np.float32(1)
        np.maximum(z, 0, out=z)
        z[rows, y] = 0
        return (z**p).mean(), z

    def both():
        loss, z = forward()
        grad = (z > 0).astype(np.float32) if p == 1 else z * np.float32(2)
        grad[rows, y] = -grad.sum(1)
        return loss, grad * np.float32(1 / x.size)

    calls["plain numpy"] = both if gradient else forward


MEMORY = """
import sys, resource, torch, mml_arrayapi as mml
torch.set_num_threads({threads})
x = torch.randn({n}, {c}).to(torch.{dtype}); y = torch.randint(0, {c}, ({n},))
if {gradient}: x.requires_grad_()
small = x[: 2**20 // {c} + 8].detach().clone().requires_grad_({gradient})  # compiles
def run(x, y):
    loss = mml.multi_margin_loss(x, y, p={p}, backend="torch-cpu")
    if {gradient}: loss.backward()
run(small, y[: len(small)])
del small; x.grad = None
open("/proc/self/clear_refs", "w").write("5")
def peak():
    return int([l for l in open("/proc/self/status") if l.startswith("VmHWM")][0].split()[1]) * 1024
before = peak()
run(x, y)
print((peak() - before) / (x.numel() * x.element_size()))
"""


def peak_memory(shape, dtype, p, gradient):
    """Memory above the input that a call takes, in inputs' sizes, by Linux's own account."""
    program = MEMORY.format(
        n=shape[0], c=shape[1], dtype=dtype, p=p, gradient=gradient, threads=os.cpu_count()
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return float(done.stdout) if done.returncode == 0 else None


def machine():
    import numpy
    import torch

    versions = {m.__name__: m.__version__ for m in (numpy, torch)}
    try:
        import jax

        versions["jax"] = jax.__version__
    except ImportError:
        pass
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu = f"{fields.get('model name')} (family {fields.get('cpu family')})"
    large = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu,
        "cpus": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
        "large pages": large.read_text().strip() if large.exists() else None,
        "load": os.getloadavg()[0],
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
    }


COLUMNS = ("mml numpy", "torch eager", "torch.compile", "jax.jit", "plain numpy", "machine")


def table(result):
    """The run as a Markdown table: our time, and how many times as long each other one took."""
    about = result["machine"]
    lines = [
        f"{about['cpu']}, {about['cpus']} CPUs, Python {about['python']}, "
        + ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        + f", {about['date']}, load {about['load']:.1f} at the start.",
        "",
        "Times are medians in microseconds; the other columns are ratios to `mml torch`: 2.0 took "
        "twice as long. `machine` is a sum (forward) or a copy into fresh memory (with gradient). "
        "`memory` is what the call took above its input, in units of the input.",
        "",
        "| shape | dtype | p | pass | mml torch | loss_and_grad | "
        + " | ".join(COLUMNS)
        + " | memory |",
        "|" + "---|" * (7 + len(COLUMNS)),
    ]
    for row in result["rows"]:
        times = row["seconds"]
        own = times["mml torch"]
        ratios = [f"{times[name] / own:.2f}" if name in times else "" for name in COLUMNS]
        both = times.get("mml torch, loss_and_grad")
        memory = row.get("memory")
        lines.append(
            f"| {row['shape'][0]} x {row['shape'][1]} | {row['dtype']} | {row['p']} | "
            f"{'forward + gradient' if row['gradient'] else 'forward'} | {own * 1e6:.1f} | "
            f"{f'{both / own:.2f}' if both else ''} | {' | '.join(ratios)} | "
            f"{'' if memory is None else f'{memory:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


def plot(result, path):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in result["rows"] if row["dtype"] == "float32" and row["p"] == 1]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    for axis, gradient in zip(axes, (False, True), strict=True):
        chosen = [row for row in rows if row["gradient"] == gradient]
        for k, name in enumerate(COLUMNS):
            ratios = [r["seconds"].get(name, 0) / r["seconds"]["mml torch"] for r in chosen]
            axis.bar([i + k * 0.13 for i in range(len(chosen))], ratios, 0.13, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_yscale("log")
        axis.set_xticks([i + 0.33 for i in range(len(chosen))])
        axis.set_xticklabels([f"{r['shape'][0]} x {r['shape'][1]}" for r in chosen], fontsize=8)
        axis.set_title("forward + gradient" if gradient else "forward")
        axis.set_ylabel("time, in units of mml torch (float32, p = 1)")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _key(row):
    """Where a row stands in the table."""
    shape = tuple(row["shape"])
    return row["dtype"] != "float32", SHAPES.index(shape), row["p"], row["gradient"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--p", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", help="numbers of samples; else all SHAPES")
    parser.add_argument("--add", action="store_true", help="keep the results that are there")
    parser.add_argument("--from-json", type=Path, help="only write the table and plot of a run")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "cpu.json"
    if options.from_json:
        result = json.loads(options.from_json.read_text())
    else:
        touch_memory()
        rows = {}
        if options.add and path.exists():
            rows = {_key(row): row for row in json.loads(path.read_text())["rows"]}
        result = {"machine": machine()}
        budget = BUDGET / 10 if options.quick else BUDGET
        for dtype in options.dtype:
            for shape in (s for s in SHAPES if s[0] in (options.rows or s)):
                for p in options.p:
                    for gradient in (False, True):
                        calls = candidates(shape, dtype, p, gradient)
                        row = {"shape": shape, "dtype": dtype, "p": p, "gradient": gradient}
                        row["seconds"] = measure(calls, budget)
                        del calls
                        if shape[0] * shape[1] > 10**6 and sys.platform == "linux":
                            row["memory"] = peak_memory(shape, dtype, p, gradient)
                        rows[_key(row)] = row
                        print(table({**result, "rows": [row]}).splitlines()[-1], flush=True)
        result["rows"] = [rows[key] for key in sorted(rows)]
        path.write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "cpu.md").write_text(table(result))
    plot(result, options.out / "cpu.png")


if __name__ == "__main__":
    main()
