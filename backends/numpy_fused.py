"""NumPy: the Numba kernels for arrays in memory, memory maps and read-only arrays included."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mml_arrayapi.backends import cpu_blocks
from mml_arrayapi.backends.cpu_blocks import AUTO, LARGEST, LAST, MEAN
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.validation import raise_invalid_target

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
    kind = cpu_blocks.KINDS[problem.input.dtype]  # dtype.name takes 1.5 microseconds
    return cpu_blocks.waits(kind.lower(), problem.p, problem.input.size)


def loss(problem: Problem) -> Any:
    """Compute the loss."""
    if problem.axis == 1 and problem.check_target == "raise":
        _ready_shortcut(problem)
        arguments = problem.p, problem.margin, problem.weight, problem.reduction, -1, "auto"
        result = shortcut(problem.input, problem.target, *arguments)
        if result is not None:
            return result
    scores = _scores(problem)
    losses, out = _losses(problem)
    total, bad = cpu_blocks.loss(scores, None, out)
    return _finish(problem, losses, total, bad)


def loss_and_grad(problem: Problem, grad_output: Any) -> tuple[Any, np.ndarray]:
    """Compute the loss and the gradient in one pass over the input."""
    x, rows = problem.input, problem.target.size
    scores = _scores(problem)
    losses, out = _losses(problem)
    grad = np.empty_like(x, subok=False)
    scale, upstream = 1 / x.shape[problem.axis], None
    if problem.reduction == "mean":
        scale /= max(rows, 1)
    if grad_output is not None and problem.reduction == "none":
        upstream = np.ascontiguousarray(grad_output, dtype=np.float64).reshape(-1)
    elif grad_output is not None:
        scale *= float(grad_output)
    into = cpu_blocks.classes_last(grad, problem.axis)
    total, bad = cpu_blocks.loss_and_grad(scores, None, out, into, scale, upstream)
    return _finish(problem, losses, total, bad), grad


def _scores(problem: Problem) -> cpu_blocks.Scores:
    return cpu_blocks.scores(
        problem.input, problem.target, problem.weight, problem.axis, problem.p, problem.margin
    )


def _losses(problem: Problem) -> tuple[np.ndarray | None, int]:
    """Make room for each sample's loss where it is asked for; return it and its address."""
    if problem.reduction != "none":
        return None, 0
    losses = np.empty(problem.target.shape, problem.input.dtype)
    return losses, losses.ctypes.data


def _finish(problem: Problem, losses: np.ndarray | None, total: float, bad: int) -> Any:
    x, rows = problem.input, problem.target.size
    if bad >= 0 and problem.check_target == "raise":
        raise_invalid_target(problem.target, x.shape[problem.axis])
    if losses is not None:
        return losses
    total /= x.shape[problem.axis]
    if problem.reduction == "mean":
        total = total / rows if rows else math.nan
    return x.dtype.type(total)


NUMBERS = (int, float)
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
    """Serve the mean of a small contiguous array of float32 or float64."""
    if (
        type(input) is not np.ndarray
        or type(target) is not np.ndarray
        or reduction is not MEAN
        or axis is not LAST
        or check_target is not AUTO
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
    if weight is not None and not _plain_weight(weight, dtype, n_classes):
        return None
    kernel, kind, exponent = small
    weights = 0 if weight is None else weight.ctypes.data
    mean = kernel(kind, input, target, weights, float(margin), exponent)
    return None if mean is None else dtype.type(mean)


def _plain_weight(weight: Any, dtype: Any, n_classes: int) -> bool:
    return (
        type(weight) is np.ndarray
        and weight.dtype == dtype
        and weight.shape == (n_classes,)
        and weight.flags.carray
    )


KERNEL = Kernel("numpy-cpu", "numpy", refuses, loss, loss_and_grad)
