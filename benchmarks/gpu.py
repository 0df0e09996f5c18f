"""The loss on a GPU, side by side with PyTorch eager, torch.compile and a copy on the device.

    python benchmarks/gpu.py [--out FOLDER] [--seconds N] [--without-git NAME] [--dry-run]

What is timed is the call that users write: no backend is asked for, ``explain`` must say that the
GPU kernel runs, and nothing is timed before its second call. The contenders run in turn, many
times; times are medians of batches between two device events, ratios are medians of the ratios
within each turn. Results go to FOLDER (default benchmarks/results) as Markdown and JSON, with
device, driver, versions and date, after every line: what was measured before a time limit stays.

``--dry-run`` runs everything on the CPU on small shapes, to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import mml_arrayapi as mml

ROOT = Path(__file__).parent.parent
# The most important first: a time limit cuts off the end.
SHAPES = [
    (65536, 1000, "float32"),
    (4096, 128256, "bfloat16"),
    (10_000_000, 10, "float32"),
    (512, 512, "float32"),
    (8, 1_000_000, "float32"),
    (1, 10_000_000, "float32"),
]
DRY_SHAPES = [(64, 100, "float32"), (8, 2000, "float32"), (300, 10, "float32")]
PASSES = ("forward", "forward + backward")
TURNS = 9
BATCH = 0.01  # seconds

# (shape, p, pass) -> (contender, least ratio of its time to ours); "copy": share of the bandwidth
# of a large copy.
WANTED = {
    ((65536, 1000), 1, "forward"): (("copy", 0.85), ("eager", 2.0), ("compile", 1.0)),
    ((65536, 1000), 1, "forward + backward"): (("eager", 2.5),),
    ((4096, 128256), 1, "forward"): (("copy", 0.85), ("eager", 4.0)),
    ((4096, 128256), 1, "forward + backward"): (("eager", 2.5),),
    ((10_000_000, 10), 1, "forward"): (("eager", 30.0),),
    ((512, 512), 1, "forward"): (("eager", 1.0),),
    ((512, 512), 1, "forward + backward"): (("eager", 1.0),),
    ((8, 1_000_000), 1, "forward"): (("compile", 1 / 1.5),),
}


class DeviceClock:
    """Times by device events."""

    name = "cuda"

    def batch(self, run: Callable[[], Any], count: int) -> float:
        """Seconds per call, from one device event to another with `count` calls between."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / count


class HostClock:
    """Times by the host's clock, for the dry run."""

    name = "cpu"

    def batch(self, run: Callable[[], Any], count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - begin) / count


Clock = DeviceClock | HostClock


def compare(clock: Clock, contenders: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Time the contenders in turn; returns each one's seconds per call, one number per turn.

    A rival that fails is left out.
    """
    counts = {}
    for name, run in contenders.items():
        try:
            for _ in range(3):  # the first compiles
                run()
        except Exception as error:
            if name == "ours":
                raise
            print(f"{name} fails: {type(error).__name__}: {error}"[:300])
            continue
        counts[name] = max(2, min(500, round(BATCH / clock.batch(run, 2))))
    times: dict[str, list[float]] = {name: [] for name in counts}
    for _ in range(TURNS):
        for name, count in counts.items():
            times[name].append(clock.batch(contenders[name], count))
    return times


def copy_bandwidth(clock: Clock, size: int) -> float:
    """Bytes per second of a large copy on the device, read and written bytes both counted."""
    source = torch.empty(size, dtype=torch.uint8, device=clock.name)
    target = torch.empty_like(source)
    times = compare(clock, {"copy": lambda: target.copy_(source)})["copy"]
    return 2 * size / statistics.median(times)


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
    backend = "inductor" if x.is_cuda else "eager"  # for the dry run there is no time to compile
    compiled = torch.compile(F.multi_margin_loss, dynamic=False, backend=backend)
    losses = {
        "ours": lambda s: mml.multi_margin_loss(s, target, p=p),
        "eager": lambda s: F.multi_margin_loss(s, target, p=p),
        "compile": lambda s: compiled(s, target, p=p),
    }
    into = torch.empty_like(x)
    copy = {"device copy": lambda: into.copy_(x)}
    if what == "forward":
        return {name: partial(loss, x) for name, loss in losses.items()} | copy
    leaf = x.detach().requires_grad_()
    return {
        name: (lambda loss=loss: torch.autograd.grad(loss(leaf), leaf)[0])
        for name, loss in losses.items()
    } | copy


def check(x: torch.Tensor, target: torch.Tensor, p: int, kernel: str) -> None:
    """See that the kernel runs unasked; compare the first rows with the formula in float64."""
    found = mml.explain(x, target, p=p)
    if found.kernel != kernel:
        raise SystemExit(f"{kernel} doesn't run:\n{found}")
    rows = min(16, x.shape[0])
    wanted = mml.multi_margin_loss(
        x[:rows].double(), target[:rows], p=p, reduction="none", backend="generic"
    )
    rtol = 2**-8 if x.dtype == torch.bfloat16 else 1e-5
    for _ in range(2):
        got = mml.multi_margin_loss(x, target, p=p, reduction="none")[:rows]
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=1e-6)


def torch_lines(clock: Clock, bandwidth: float, shapes: Any, kernel: str) -> Iterator[Any]:
    for p, (rows, classes, name) in itertools.product((1, 2), shapes):
        dtype = getattr(torch, name)
        generator = torch.Generator(clock.name).manual_seed(0)
        x = torch.randn(rows, classes, dtype=dtype, device=clock.name, generator=generator)
        target = torch.randint(0, classes, (rows,), device=clock.name, generator=generator)
        check(x, target, p, kernel)
        for what in PASSES:
            times = compare(clock, contenders(x, target, p, what))
            floor = least_bytes(rows, classes, dtype.itemsize, p, what) / bandwidth
            yield describe((rows, classes), name, p, what, times, floor)


def cupy_lines(clock: Clock, bandwidth: float, shapes: Any) -> Iterator[Any]:
    """CuPy has no other implementation of the loss: its share of the copy bandwidth."""
    try:
        import cupy
    except ImportError as error:
        print(f"CuPy: {error}")
        return
    for rows, classes, name in shapes:
        if name == "bfloat16":
            continue
        x = cupy.random.default_rng(0).standard_normal((rows, classes), dtype=cupy.float32)
        target = cupy.random.randint(0, classes, rows)
        stream = cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream)
        for what, function in (
            ("forward", mml.multi_margin_loss),
            ("loss and gradient", mml.multi_margin_loss_and_grad),
        ):
            with stream:
                found = mml.explain(x, target).kernel
                if found != "cupy-cuda":
                    raise SystemExit(f"CuPy's kernel doesn't run, but {found}")
                times = compare(clock, {"ours": partial(function, x, target)})
            floor = least_bytes(rows, classes, 4, 1, what) / bandwidth
            yield describe((rows, classes), "float32 (CuPy)", 1, what, times, floor)
        cupy.get_default_memory_pool().free_all_blocks()


def describe(
    shape: tuple[int, int], dtype: str, p: int, what: str, times: Any, floor: float
) -> dict[str, Any]:
    ours = times["ours"]
    ratios = {
        name: statistics.median(t / o for t, o in zip(other, ours, strict=True))
        for name, other in times.items()
        if name != "ours"
    }
    return {
        "shape": shape,
        "dtype": dtype,
        "p": p,
        "what": what,
        "microseconds": {name: statistics.median(t) * 1e6 for name, t in times.items()},
        "spread": {name: (max(t) - min(t)) / statistics.median(t) for name, t in times.items()},
        "ratios": {**ratios, "copy": floor / statistics.median(ours)},
    }


HEADER = (
    "| scores | dtype | p | pass | ours, us | eager, us | compile, us | device copy, us "
    "| of copy bandwidth | eager / ours | compile / ours |\n" + "|---" * 11 + "|"
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
        *(shown(times, name, ".1f") for name in ("ours", "eager", "compile", "device copy")),
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
            got = line["ratios"].get(name, math.nan)
            said = "yes" if got >= least else "NO"
            found.append(
                f"- {line['shape'][0]} x {line['shape'][1]} p = {line['p']} {line['what']}: "
                f"{got:.2f} of {name}, wanted {least:.2f}: {said}"
            )
    return found


@dataclass
class Results:
    """What was measured so far; written after every line."""

    folder: Path
    about: dict[str, str]
    bandwidth: float
    lines: list[dict[str, Any]] = field(default_factory=list)

    def add(self, line: dict[str, Any]) -> None:
        print(row(line), flush=True)
        self.lines.append(line)
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        device = re.sub(r"\W+", "-", self.about["device"])
        path = self.folder / f"gpu-{device}-{self.about['date'][:10]}"
        facts = "\n".join(f"- {key}: {value}" for key, value in self.about.items())
        path.with_suffix(".md").write_text(
            f"# The loss on {self.about['device']}\n\n{facts}\n"
            f"- copy: {self.bandwidth / 1e12:.2f} TB/s, read and written bytes\n\n"
            f"Medians of {TURNS} turns, one run of benchmarks/gpu.py.\n\n{HEADER}\n"
            + "\n".join([*map(row, self.lines), "", *verdicts(self.lines), ""])
        )
        everything = {
            "machine": self.about,
            "copy_bytes_per_second": self.bandwidth,
            "lines": self.lines,
        }
        path.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")


def ask(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"not known: {error}"
    return done.stdout.strip()


def machine(dry: bool, commit: str | None) -> dict[str, str]:
    try:
        import cupy

        cupy_version = cupy.__version__
    except ImportError:
        cupy_version = "not installed"
    return {
        "device": "no GPU, dry run" if dry else torch.cuda.get_device_name(0),
        "driver": ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cupy": cupy_version,
        "python": platform.python_version(),
        "mml_arrayapi": mml.__version__,
        "commit": commit or ask("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no line after so long")
    parser.add_argument("--without-git", metavar="NAME", help="the commit's name, git isn't asked")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small shapes")
    options = parser.parse_args()
    started = time.monotonic()
    warnings.simplefilter("ignore")
    dry = options.dry_run
    clock: Clock = HostClock() if dry else DeviceClock()
    shapes = DRY_SHAPES if dry else SHAPES
    about = machine(dry, options.without_git)
    print(json.dumps(about, indent=1))
    bandwidth = copy_bandwidth(clock, 2**20 if dry else 2**31)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s\n{HEADER}", flush=True)
    results = Results(options.out, about, bandwidth)
    kernel = mml.explain(torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)).kernel
    sources = [torch_lines(clock, bandwidth, shapes, kernel if dry else "torch-cuda")]
    if not dry:
        sources.insert(0, cupy_lines(clock, bandwidth, shapes[:1]))
        sources.append(cupy_lines(clock, bandwidth, shapes[1:]))
    for line in itertools.chain(*sources):
        results.add(line)
        if time.monotonic() - started > options.seconds:
            print(f"the {options.seconds:.0f} s are over: what follows is left out")
            break
    print("\n".join(verdicts(results.lines)))


if __name__ == "__main__":
    main()
