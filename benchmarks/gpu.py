"""The loss on a GPU, side by side with PyTorch eager, torch.compile and the copy bandwidth.

    python benchmarks/gpu.py [--out FOLDER] [--quick]

Every contender runs in turn, many times; times are medians of batches between two device events,
ratios are medians of the ratios within each turn. Results go to FOLDER (default
benchmarks/results) as Markdown and JSON, with device, driver, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mml_arrayapi as mml

SHAPES = [
    (65536, 1000, torch.float32),
    (4096, 128256, torch.bfloat16),
    (10_000_000, 10, torch.float32),
    (512, 512, torch.float32),
]
TURNS = 11
BATCH = 0.02  # seconds

# (shape, p, what) -> (contender, least ratio); "copy": share of the copy bandwidth.
WANTED = {
    ((65536, 1000), 1, "forward"): (("copy", 0.85), ("eager", 2.0), ("compile", 1.0)),
    ((65536, 1000), 1, "forward + backward"): (("eager", 2.5),),
    ((4096, 128256), 1, "forward"): (("eager", 4.0),),
    ((4096, 128256), 1, "forward + backward"): (("eager", 5.0),),
    ((10_000_000, 10), 1, "forward"): (("eager", 30.0),),
    ((512, 512), 1, "forward"): (("eager", 1.0),),
    ((512, 512), 1, "forward + backward"): (("eager", 1.0),),
}


def batch_time(run: Callable[[], Any], count: int) -> float:
    """Seconds per call, from one device event to another with `count` calls between."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / count


def compare(contenders: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Time the contenders in turn; returns each one's seconds per call, one number per turn."""
    counts = {}
    for name, run in contenders.items():
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        once = batch_time(run, 3)
        counts[name] = max(3, min(1000, round(BATCH / once)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(TURNS):
        for name, run in contenders.items():
            times[name].append(batch_time(run, counts[name]))
    return times


def copy_bandwidth() -> float:
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = compare({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() / statistics.median(times)


def least_bytes(rows: int, classes: int, size: int, p: int, what: str) -> float:
    """What must move: scores read (again for p = 2), mask written and read, gradient written."""
    scores, targets = rows * classes * size, rows * 8
    if what == "forward":
        return scores + targets
    if what == "loss and gradient":
        return 2 * scores + targets
    return 2 * scores + 2 * targets + (rows * classes / 4 if p == 1 else scores)


def contenders(
    x: torch.Tensor, target: torch.Tensor, p: int, what: str
) -> dict[str, Callable[[], Any]]:
    torch.compiler.reset()  # or else, after eight shapes, PyTorch gives up and runs eagerly
    compiled = torch.compile(F.multi_margin_loss, dynamic=False)
    losses = {
        "ours": lambda s: mml.multi_margin_loss(s, target, p=p, backend="torch-cuda"),
        "eager": lambda s: F.multi_margin_loss(s, target, p=p),
        "compile": lambda s: compiled(s, target, p=p),
    }
    if what == "forward":
        return {name: (lambda f=f: f(x)) for name, f in losses.items()}
    leaf = x.detach().requires_grad_()
    return {name: (lambda f=f: torch.autograd.grad(f(leaf), leaf)[0]) for name, f in losses.items()}


def check(x: torch.Tensor, target: torch.Tensor, p: int) -> None:
    """Compare the first rows with the generic implementation in float64."""
    rows = min(64, x.shape[0])
    got = mml.multi_margin_loss(x, target, p=p, reduction="none", backend="torch-cuda")[:rows]
    wanted = mml.multi_margin_loss(
        x[:rows].double(), target[:rows], p=p, reduction="none", backend="generic"
    )
    rtol = 2**-8 if x.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-6)


def measure(bandwidth: float, shapes: list[Any]) -> list[dict[str, Any]]:
    lines = []
    for rows, classes, dtype in shapes:
        generator = torch.Generator("cuda").manual_seed(0)
        x = torch.randn(rows, classes, dtype=dtype, device="cuda", generator=generator)
        target = torch.randint(0, classes, (rows,), device="cuda", generator=generator)
        for p in (1, 2):
            check(x, target, p)
            for what in ("forward", "forward + backward"):
                times = compare(contenders(x, target, p, what))
                floor = least_bytes(rows, classes, dtype.itemsize, p, what) / bandwidth
                line = describe(rows, classes, dtype, p, what, times, floor)
                print(row(line), flush=True)
                lines.append(line)
        del x
        torch.cuda.empty_cache()
    return lines


def describe(
    rows: int, classes: int, dtype: Any, p: int, what: str, times: Any, floor: float
) -> dict[str, Any]:
    ours = times["ours"]
    ratios = {
        name: statistics.median(t / o for t, o in zip(other, ours, strict=True))
        for name, other in times.items()
        if name != "ours"
    }
    return {
        "shape": (rows, classes),
        "dtype": str(dtype).removeprefix("torch."),
        "p": p,
        "what": what,
        "microseconds": {name: statistics.median(t) * 1e6 for name, t in times.items()},
        "spread": {name: (max(t) - min(t)) / statistics.median(t) for name, t in times.items()},
        "ratios": {**ratios, "copy": floor / statistics.median(ours)},
    }


def cupy_lines(bandwidth: float, shapes: list[Any]) -> list[dict[str, Any]]:
    """CuPy has no other implementation of the loss: its share of the copy bandwidth."""
    try:
        import cupy
    except ImportError:
        print("CuPy is not installed")
        return []
    lines = []
    for rows, classes, dtype in shapes:
        if dtype == torch.bfloat16:
            continue
        x = cupy.random.default_rng(0).standard_normal((rows, classes), dtype=cupy.float32)
        target = cupy.random.randint(0, classes, rows)
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        for p in (1, 2):
            for what, function in (
                ("forward", mml.multi_margin_loss),
                ("loss and gradient", mml.multi_margin_loss_and_grad),
            ):
                with stream:
                    times = compare(
                        {"ours": partial(function, x, target, p=p, backend="cupy-cuda")}
                    )
                floor = least_bytes(rows, classes, 4, p, what) / bandwidth
                line = describe(rows, classes, "float32 (CuPy)", p, what, times, floor)
                print(row(line), flush=True)
                lines.append(line)
        cupy.get_default_memory_pool().free_all_blocks()
    return lines


HEADER = (
    "| shape | dtype | p | what | ours, us | eager, us | compile, us | of copy bandwidth "
    "| vs eager | vs compile |\n|---|---|---|---|---|---|---|---|---|---|"
)


def row(line: dict[str, Any]) -> str:
    times, ratios = line["microseconds"], line["ratios"]

    def shown(values: dict[str, float], name: str, form: str) -> str:
        return format(values[name], form) if name in values else "-"

    cells = (
        " x ".join(map(str, line["shape"])),
        line["dtype"],
        line["p"],
        line["what"],
        *(shown(times, name, ".1f") for name in ("ours", "eager", "compile")),
        shown(ratios, "copy", ".2f"),
        *(shown(ratios, name, ".2f") for name in ("eager", "compile")),
    )
    return f"| {' | '.join(map(str, cells))} |"


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Say for each thing that must be shown whether it was."""
    found = []
    for line in lines:
        wanted = WANTED.get((tuple(line["shape"]), line["p"], line["what"]), ())
        for name, least in wanted if "CuPy" not in line["dtype"] else ():
            got = line["ratios"][name]
            said = "yes" if got >= least else "NO"
            found.append(
                f"- {line['shape'][0]} x {line['shape'][1]} p = {line['p']} {line['what']}: "
                f"{got:.2f} of {name}, wanted {least:.2f}: {said}"
            )
    return found


def machine() -> dict[str, str]:
    def ask(*command: str) -> str:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError) as error:
            return f"not known: {error}"

    try:
        import cupy

        cupy_version = cupy.__version__
    except ImportError:
        cupy_version = "not installed"
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cupy": cupy_version,
        "python": platform.python_version(),
        "mml_arrayapi": mml.__version__,
        "commit": ask("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--quick", action="store_true", help="the smallest shape only")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shapes = SHAPES[-1:] if options.quick else SHAPES
    about = machine()
    print(json.dumps(about, indent=1))
    bandwidth = copy_bandwidth()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s\n{HEADER}")
    lines = measure(bandwidth, shapes)
    lines += cupy_lines(bandwidth, shapes)
    said = verdicts(lines)
    print("\n".join(said))

    options.out.mkdir(parents=True, exist_ok=True)
    name = f"gpu-{about['device'].replace(' ', '-')}-{about['date'][:10]}"
    facts = "\n".join(f"- {key}: {value}" for key, value in about.items())
    (options.out / f"{name}.md").write_text(
        f"# The loss on {about['device']}\n\n{facts}\n- copy: {bandwidth / 1e12:.2f} TB/s, read "
        f"and written bytes\n\nMedians of {TURNS} turns, one run of the script.\n\n{HEADER}\n"
        + "\n".join(map(row, lines))
        + "\n\n"
        + "\n".join(said)
        + "\n"
    )
    everything = {"machine": about, "copy_bytes_per_second": bandwidth, "lines": lines}
    (options.out / f"{name}.json").write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
