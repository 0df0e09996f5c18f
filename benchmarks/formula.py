"""Time the generic implementation beside the same written by hand (`by_hand.py`).

    python benchmarks/formula.py [--only NAME ...]

Float32 scores, p = 1, mean. Writes results/formula.json and results/formula.md, in two minutes;
with `--only` it replaces those rows alone. Each pair runs turn by turn in one process, so that a
slow moment of the machine meets both; a ratio is the median of the rounds' ratios. `accuracy` and
`memory` are measured besides.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path

import by_hand

import mml_arrayapi as mml

SHAPES = ((32, 10), (128, 1000), (8192, 1000), (65536, 10))
BUDGET = 0.4  # seconds per pair
RESULTS = Path(__file__).parent / "results"


def generic(x, y):
    return mml.multi_margin_loss(x, y, backend="generic")


def generic_with_grad(x, y):
    return mml.multi_margin_loss_and_grad(x, y, backend="generic")


def batch(shape):
    import numpy as np

    rng = np.random.default_rng(0)
    return rng.normal(size=shape).astype("float32"), rng.integers(0, shape[1], shape[0])


def numpy_pairs(shape):
    x, y = batch(shape)
    loss, loss_and_grad = by_hand.numpy()
    yield "NumPy, loss", lambda: generic(x, y), lambda: loss(x, y)
    yield "NumPy, loss and gradient", lambda: generic_with_grad(x, y), lambda: loss_and_grad(x, y)


def torch_pairs(shape):
    import torch

    x, y = map(torch.from_numpy, batch(shape))
    loss = by_hand.torch()
    yield "PyTorch, loss", lambda: generic(x, y), lambda: loss(x, y)
    yield "PyTorch, forward + backward", backward(generic, x, y), backward(loss, x, y)


def backward(function, x, y):
    leaf = x.clone().requires_grad_()

    def call():
        leaf.grad = None
        function(leaf, y).backward()

    return call


def compiled_pairs(shape):
    import torch

    x, y = map(torch.from_numpy, batch(shape))
    torch.compiler.reset()
    ours = torch.compile(generic, fullgraph=True, dynamic=False)
    own = torch.compile(torch.nn.functional.multi_margin_loss, fullgraph=True, dynamic=False)
    yield "torch.compile, loss", lambda: ours(x, y), lambda: own(x, y)
    if shape[1] == 1000:  # PyTorch's own takes a tenth of a second and more
        yield "torch.compile, forward + backward", backward(ours, x, y), backward(own, x, y)


def jax_pairs(shape):
    import jax

    x, y = map(jax.numpy.asarray, batch(shape))
    loss = by_hand.jax()
    for name, transform in (
        ("loss", lambda f: f),
        ("value_and_grad", jax.value_and_grad),
        ("gradient", jax.grad),
    ):
        ours, hand = (jax.jit(transform(f)) for f in (mml.multi_margin_loss, loss))
        yield f"JAX, jitted {name}", ready(ours, x, y), ready(hand, x, y)
    hand = jax.jit(loss)
    yield "JAX, eager loss (by hand: jitted)", ready(mml.multi_margin_loss, x, y), ready(hand, x, y)
    ours, hand = jax.grad(mml.multi_margin_loss), jax.grad(hand)
    yield "JAX, eager gradient (by hand: of the jitted loss)", ready(ours, x, y), ready(hand, x, y)


def ready(function, x, y):
    import jax

    return lambda: jax.block_until_ready(function(x, y))


def dask_pairs(shape):
    import dask
    import dask.array as da

    if shape != (8192, 1000):
        return
    x, y = batch(shape)
    x, y = da.from_array(x, chunks=(1024, 1000)), da.from_array(y, chunks=1024)
    loss = by_hand.dask()

    def call(function):
        with dask.config.set(scheduler="synchronous"):
            return function(x, y).compute()

    yield "Dask, loss", lambda: call(generic), lambda: call(loss)


LIBRARIES = {
    "numpy": numpy_pairs,
    "torch": torch_pairs,
    "compile": compiled_pairs,
    "jax": jax_pairs,
    "dask": dask_pairs,
}


def accuracy(found):
    """Measure the errors for many classes and for many samples, over what they may grow with."""
    import numpy as np

    rng = np.random.default_rng(0)
    for n, c in ((1, 10**7), (10**6, 4)):
        scores = rng.normal(size=(n, c)).astype("float32")
        targets = rng.integers(0, c, n)
        rows = np.arange(n)
        own = scores[rows, targets][:, None].astype("float64")
        hinge = np.maximum(scores - own + 1, 0)
        hinge[rows, targets] = 0
        slope = (hinge > 0).sum(1) / (n * c)
        scale = (1 + np.abs(own) + np.abs(scores)).sum() / (n * c)
        for name in ("numpy", "torch", "jax", "dask", "array_api_strict"):
            loss, grad = mml.multi_margin_loss_and_grad(
                *in_library(name, scores, targets), backend="generic"
            )
            errors = (
                abs(float(loss) - hinge.sum() / (n * c)) / scale,
                np.max(np.abs(np.asarray(grad)[rows, targets] + slope) / slope.clip(1e-30)),
            )
            found.setdefault(name, {})[f"{n} x {c}"] = list(map(float, errors))
            print(f"{name:20} {n} x {c}: loss {errors[0]:.1e}, gradient {errors[1]:.1e}")


def in_library(name, *arrays):
    import importlib

    xp = importlib.import_module({"jax": "jax.numpy", "dask": "dask.array"}.get(name, name))
    return [xp.asarray(array) for array in arrays]


def memory(found):
    """Measure the largest memory of a call, as times of that of 8192 x 1000 scores."""
    scores, targets = batch((8192, 1000))
    for name in ("numpy", "array_api_strict"):
        x, y = in_library(name, scores, targets)
        for row, call in (("loss", generic), ("loss and gradient", generic_with_grad)):
            call(x, y)
            tracemalloc.start()
            call(x, y)
            peak = tracemalloc.get_traced_memory()[1] / scores.nbytes
            tracemalloc.stop()
            found.setdefault(name, {})[row] = peak
            print(f"{name:20} {row}: {peak:.3f} times the scores")


def measure(ours, hand):
    """Return the median seconds of each, and the median of the rounds' ratios."""
    rounds = []
    for call in (ours, hand):
        call()
        call()
    begin = time.perf_counter()
    hand()
    repeat = max(1, int(2e-4 / (time.perf_counter() - begin)))
    end = time.perf_counter() + BUDGET
    while len(rounds) < 5 or (time.perf_counter() < end and len(rounds) < 500):
        times = []
        for call in (ours, hand):
            begin = time.perf_counter()
            for _ in range(repeat):
                call()
            times.append((time.perf_counter() - begin) / repeat)
        rounds.append(times)
    ratio = statistics.median(a / b for a, b in rounds)
    return *map(statistics.median, zip(*rounds, strict=True)), ratio


def table(result):
    """Write the run as a Markdown table."""
    shapes = [f"{n} x {c}" for n, c in SHAPES]
    lines = [
        f"{result['machine']}. Float32, p = 1, mean: time of the generic implementation / time of "
        "the same by hand (or, compiled, of PyTorch's own function), and their ratio.",
        "",
        f"| | {' | '.join(shapes)} |",
        "|" + "---|" * (1 + len(shapes)),
    ]
    for name, cells in result["rows"].items():
        words = [
            f"{short(cells[s][0])} / {short(cells[s][1])}: {cells[s][2]:.2f}" if s in cells else ""
            for s in shapes
        ]
        lines.append(f"| {name} | {' | '.join(words)} |")
    if errors := result.get("accuracy"):
        sizes = list(next(iter(errors.values())))
        lines += [
            "",
            "Errors of the loss over its condition scale, and of the gradient at the target's "
            "class over its value (the largest of all samples):",
            "",
            f"| | {' | '.join(sizes)} |",
            "|" + "---|" * (1 + len(sizes)),
        ]
        for name, of in errors.items():
            words = [f"{of[s][0]:.1e}, {of[s][1]:.1e}" for s in sizes]
            lines.append(f"| {name} | {' | '.join(words)} |")
    if peaks := result.get("memory"):
        lines += [
            "",
            "The largest memory that a call takes, results included, as times that of 8192 x 1000 "
            "scores:",
            "",
            "| | loss | loss and gradient |",
            "|---|---|---|",
        ]
        for name, of in peaks.items():
            lines.append(f"| {name} | {of['loss']:.2f} | {of['loss and gradient']:.2f} |")
    return "\n".join(lines) + "\n"


def short(seconds):
    return f"{seconds * 1e6:.0f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2g} ms"


def machine():
    from importlib.metadata import version

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((x.split(":")[1].strip() for x in lines if "model name" in x), "?")
    names = ", ".join(f"{n} {version(n)}" for n in ("numpy", "torch", "jax", "dask"))
    cpus = sum("model name" in x for x in lines)
    when = datetime.now(UTC).isoformat(timespec="minutes")
    return f"{model}, {cpus} CPUs, Python {platform.python_version()}, {names}, {when}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*LIBRARIES, "accuracy", "memory"]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "formula.json"
    result = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    result["machine"] = machine()
    for name in options.only:
        for shape in SHAPES if name in LIBRARIES else ():
            for row, ours, hand in LIBRARIES[name](shape):
                cells = result["rows"].setdefault(row, {})
                seconds = measure(ours, hand)
                cells[f"{shape[0]} x {shape[1]}"] = seconds
                a, b, ratio = seconds
                print(f"{row:50} {shape!s:14} {short(a):>8} / {short(b):>8}: {ratio:.2f}")
                sys.stdout.flush()
    for name, part in (("accuracy", accuracy), ("memory", memory)):
        if name in options.only:
            part(result.setdefault(name, {}))
    path.write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "formula.md").write_text(table(result))


if __name__ == "__main__":
    main()
