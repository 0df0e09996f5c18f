"""NumPy: the Numba kernels for arrays in memory, memory maps and read-only arrays included."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

from mml_arrayapi.arguments import raise_invalid_target
from mml_arrayapi.backends import cpu_blocks, threads
from mml_arrayapi.kernel import Kernel, Problem

PLAIN = (np.ndarray, np.memmap)  # other subclasses (masked arrays, matrices) have their own meaning


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    x = problem.input
    for name, array in (("input", x), ("target", problem.target), ("weight", problem.weight)):
        if array is not None and type(array) not in PLAIN:
            return f"{name} is a {type(array).__name__}, a subclass of numpy.ndarray"
    if x.dtype not in cpu_blocks.KINDS:
        return f"input has dtype {x.dtype!r}, not native float16, float32 or float64"
    if not x.flags.aligned or any(stride % x.itemsize for stride in x.strides):
        return "input's elements are not aligned in memory"
    return cpu_blocks.missing()


def waits(problem: Problem) -> str | None:
    """Tell why compiling the kernel doesn't pay yet, or None."""
    return cpu_blocks.waits(problem.input.dtype.name, problem.p, problem.input.size)


def loss(problem: Problem) -> Any:
    """Compute the loss."""
    if problem.weight is None and problem.axis == 1 and problem.check_target == "raise":
        _ready_shortcut(problem)
        arguments = problem.p, problem.margin, None, problem.reduction, -1, "auto"
        result = shortcut(problem.input, problem.target, *arguments)
        if result is not None:
            return result
    scores = _scores(problem)
    losses = _losses(problem, scores)
    total, bad = cpu_blocks.loss(scores, threads.number_of_threads(), losses)
    return _finish(problem, scores, losses, total, bad)


def loss_and_grad(problem: Problem, grad_output: Any) -> tuple[Any, np.ndarray]:
    """Compute the loss and the gradient in one pass over the input."""
    x, rows = problem.input, problem.target.size
    scores = _scores(problem)
    losses = _losses(problem, scores)
    grad = np.empty_like(x, subok=False)
    scale, upstream = 1 / x.shape[problem.axis], None
    if problem.reduction == "mean":
        scale /= max(rows, 1)
    if grad_output is not None and problem.reduction == "none":
        upstream = np.ascontiguousarray(grad_output, dtype=np.float64).reshape(-1)
    elif grad_output is not None:
        scale *= float(grad_output)
    into = np.moveaxis(grad, problem.axis, -1)
    limit = threads.number_of_threads()
    total, bad = cpu_blocks.loss_and_grad(scores, limit, losses, into, scale, upstream)
    return _finish(problem, scores, losses, total, bad), grad


def _scores(problem: Problem) -> cpu_blocks.Scores:
    return cpu_blocks.scores(
        problem.input, problem.target, problem.weight, problem.axis, problem.p, problem.margin
    )


def _losses(problem: Problem, scores: cpu_blocks.Scores) -> np.ndarray | None:
    if problem.reduction != "none":
        return None
    return np.empty(scores.target.size, problem.input.dtype)


def _finish(
    problem: Problem, scores: cpu_blocks.Scores, losses: np.ndarray | None, total: float, bad: int
) -> Any:
    x = problem.input
    if bad >= 0 and problem.check_target == "raise":
        raise_invalid_target(problem.target, x.shape[problem.axis])
    if losses is not None:
        return losses.reshape(problem.target.shape)
    total /= x.shape[problem.axis]
    if problem.reduction == "mean":
        total = total / scores.target.size if scores.target.size else math.nan
    return x.dtype.type(total)


NUMBERS = (int, float)
LARGEST = sys.float_info.max
INT64 = np.dtype(np.int64)
_small: dict[tuple[np.dtype, float], tuple[Any, ...]] = {}  # dtype, p: kernel, kind, exponent


def _ready_shortcut(problem: Problem) -> None:
    """Compile the shortcut's kernel for a call that it could take."""
    x, p = problem.input, problem.p
    if problem.reduction == "mean" and p in (1, 2) and x.dtype.name in ("float32", "float64"):
        kernels = cpu_blocks.numba_kernels()
        kind = kernels.FLOAT32 if x.dtype == np.float32 else kernels.FLOAT64
        _small[x.dtype, p] = kernels.mean_of_arrays, kind, kernels.ONE if p == 1 else kernels.TWO


def shortcut(
    input: np.ndarray,
    target: Any,
    p: Any,
    margin: Any,
    weight: Any,
    reduction: Any,
    axis: Any,
    check_target: Any,
) -> Any:
    """Serve the mean of a small contiguous array of float32 or float64 without a weight."""
    if (
        type(input) is not np.ndarray
        or type(target) is not np.ndarray
        or weight is not None
        or reduction != "mean"
        or axis != -1
        or type(axis) is not int
        or check_target != "auto"
        or type(p) not in NUMBERS
        or type(margin) not in NUMBERS
    ):
        return None
    dtype = input.dtype
    small = _small.get((dtype, p))
    if (
        small is None
        or input.ndim != 2
        or target.ndim != 1
        or target.dtype != INT64
        # Contiguous, aligned, writeable: a read-only array is another type to Numba.
        or not input.flags.carray
        or not target.flags.carray
        or not -LARGEST <= margin <= LARGEST
    ):
        return None
    rows, n_classes = input.shape
    if target.size != rows or not 0 < rows * n_classes <= cpu_blocks.BLOCK:
        return None
    kernel, kind, exponent = small
    mean = kernel(kind, input, target, float(margin), exponent)
    return None if mean < 0 else dtype.type(mean)


KERNEL = Kernel("numpy-numba", "numpy", refuses, loss, loss_and_grad, waits, shortcut)
