"""PyTorch on the CPU: ours and PyTorch's own loss, eager and compiled.

``python benchmarks/compile.py`` prints a table of medians in microseconds; the calls of a row are
measured in turns, in one process.
"""

import platform
import statistics
import time

import torch

from mml_arrayapi import explain, multi_margin_loss

SHAPES = ((32, 10), (128, 1000), (4096, 100), (8192, 1000), (65536, 10))
SECONDS = 0.4  # for each call of a row, at least
MOST = 2000


def timed(calls):
    """Median time of each call, in microseconds; the calls take turns."""
    for call in calls:
        for _ in range(3):
            call()
    times = [[] for _ in calls]
    end = time.perf_counter() + SECONDS * len(calls)
    while time.perf_counter() < end and len(times[0]) < MOST:
        for call, mine in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            mine.append(time.perf_counter() - start)
    return [1e6 * statistics.median(mine) for mine in times]


def forward(function, x, target):
    return lambda: function(x, target)


def backward(function, x, target):
    scores = x.clone().requires_grad_()

    def call():
        scores.grad = None
        function(scores, target).backward()

    return call


def main():
    theirs = torch.nn.functional.multi_margin_loss
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"PyTorch {torch.__version__}, float32, mean, microseconds")  # fmt: skip
    print("| shape | pass | ours | ours compiled | PyTorch | PyTorch compiled |\n|" + " --- |" * 6)
    for rows, classes in SHAPES:
        x, target = torch.randn(rows, classes), torch.randint(classes, (rows,))
        if explain(x, target).kernel != "torch-cpu":
            raise SystemExit(str(explain(x, target)))
        for name, make in (("forward", forward), ("with backward", backward)):
            torch.compiler.reset()
            compiled = [torch.compile(f, fullgraph=True) for f in (multi_margin_loss, theirs)]
            functions = (multi_margin_loss, compiled[0], theirs, compiled[1])
            times = timed([make(function, x, target) for function in functions])
            row = " | ".join(f"{t:.1f}" for t in times)
            print(f"| {rows} x {classes} | {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
