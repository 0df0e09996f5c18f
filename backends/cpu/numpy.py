"""NumPy: the CPU kernels for arrays in memory, memory maps and read-only arrays included."""

from __future__ import annotations

from typing import Any

import numpy as np

from mml_arrayapi.backends import cpu
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.validation import raise_invalid_target

PLAIN = (np.ndarray, np.memmap)  # other subclasses (masked arrays, matrices) have their own meaning
DTYPES = ("float64", "float32", "float16", "bfloat16")


def refuses(problem: Problem) -> str | None:
    """Tell why the kernel can't run a problem, or None."""
    if cpu.native is None:
        return cpu.reason()
    for name in ("input", "target", "weight"):
        array = getattr(problem, name)
        if array is None:
            continue
        if type(array) not in PLAIN:
            return f"{name} is a {type(array).__name__}, a subclass of numpy.ndarray"
        if not array.dtype.isnative:
            return f"{name} is not in this machine's byte order"
        if name != "target" and array.dtype.name not in DTYPES:
            return f"{name} has dtype {array.dtype}, not {', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
    return cpu.too_large(problem.input.shape, problem.axis)


def loss(problem: Problem) -> Any:
    """Compute the loss."""
    arrays = problem.input, problem.target, problem.weight
    return _given(problem, cpu.native.loss(*arrays, problem.options()))


def loss_and_grad(problem: Problem, grad_output: Any) -> tuple[Any, np.ndarray]:
    """Compute the loss and the gradient in one pass over the input."""
    arrays = problem.input, problem.target, problem.weight
    grad = _empty_like(problem.input)
    if grad_output is not None and type(grad_output) not in PLAIN:
        grad_output = np.asarray(grad_output)  # a scalar of NumPy's
    loss = cpu.native.loss_and_grad(*arrays, problem.options(), grad, grad_output)
    return _given(problem, loss), grad


def _empty_like(x: np.ndarray) -> np.ndarray:
    """Return an array whose axes lie as those of another; NumPy does so if none is repeated."""
    if 0 not in x.strides:
        return np.empty_like(x, subok=False)
    order = cpu.axes_in_memory(x.strides)
    return np.empty([x.shape[i] for i in order], x.dtype).transpose(np.argsort(order))


def _given(problem: Problem, loss: Any) -> Any:
    """Return a loss; raise where the kernel gave none."""
    if loss is None:
        n_classes = problem.input.shape[problem.axis]
        raise_invalid_target(problem.target, n_classes, problem.ignore_index)
        raise AssertionError("the CPU kernel declined a call that it should serve")
    return loss


if cpu.native is not None:
    cpu.native.accept(PLAIN, None, np.empty, (np.float64, np.float32, np.float16))

KERNEL = Kernel(
    "numpy-cpu",
    "numpy",
    refuses,
    loss,
    loss_and_grad,
    supports=frozenset({"ignore_index"}),
    # One call from the public function into C, which validates what it reads.
    direct={} if cpu.native is None else dict.fromkeys(PLAIN, cpu.native.loss),
)
