"""NumPy: the Numba kernels for arrays in memory, memory maps and read-only arrays included."""

from __future__ import annotations

import math
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
    if not x.dtype.isnative or x.dtype.name not in cpu_blocks.KINDS:
        return f"input has dtype {x.dtype!r}, not native float16, float32 or float64"
    if not x.flags.aligned or any(stride % x.itemsize for stride in x.strides):
        return "input's elements are not aligned in memory"
    return None


def loss(problem: Problem) -> Any:
    """Compute the loss."""
    x = problem.input
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


KERNEL = Kernel("numpy-numba", "numpy", refuses, loss, loss_and_grad)
