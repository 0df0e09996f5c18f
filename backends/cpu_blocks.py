"""One call on NumPy arrays, taken apart into blocks of rows for the Numba kernels.

NumPy arrays come as they are; PyTorch CPU tensors come as NumPy views of their memory, bfloat16 as
the uint16 that holds its bits. The blocks depend on the array's shape and strides only, and their
sums are added in order, so a result has the same bits for any number of threads.
"""

from __future__ import annotations

import array as arrays
import sys
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np

from mml_arrayapi.backends import threads

BLOCK = 2**18  # elements: 60 microseconds of work
SERIAL = 2**19  # elements: below, waking a thread costs more than it saves
MANY = 2**20  # elements: below, kernels for a layout, compiled by themselves, aren't worth it
WAIT = 2**22  # elements that the generic implementation serves before a kernel is compiled
CALL = 2**12  # what a call counts on top of its elements

# What the shortcuts for small calls look at. Python keeps one object of each of the first three;
# another with the same value goes through the checks.
MEAN, LAST, AUTO = "mean", -1, "auto"
LARGEST = sys.float_info.max

KINDS = {
    np.dtype("float64"): "FLOAT64",
    np.dtype("float32"): "FLOAT32",
    np.dtype("float16"): "FLOAT16",
    np.dtype("uint16"): "BFLOAT16",
}


@cache
def missing() -> str | None:
    """Tell that Numba isn't there, without importing it (0.3 s)."""
    return None if find_spec("numba") else "cannot be imported: No module named 'numba'"


_work: dict[tuple[str, float], int] = {}


def waits(dtype: str, p: float, elements: int) -> str | None:
    """Count a call, and tell why it isn't worth compiling a kernel for it yet.

    Parameters
    ----------
    dtype : str
        The input's dtype.
    p : float
        The exponent.
    elements : int
        The input's size.

    Returns
    -------
    str or None
        None once the calls of this dtype and exponent add up.
    """
    key = dtype, p if p in (1, 2) else 0.0
    work = _work.get(key, 0)
    if work >= WAIT:
        return None
    _work[key] = work = work + elements + CALL
    if work >= WAIT:
        return None
    return (
        f"Numba's compiler (seconds) doesn't pay yet: until calls for {dtype} and "
        f"{f'p={key[1]:g}' if key[1] else 'other p'} add up to {WAIT:,} in this process, the "
        f"generic implementation serves; a call counts its elements plus {CALL:,}, so far {work:,}"
    )


class Scores(NamedTuple):
    """The input of a call, as the kernels see it."""

    array: np.ndarray  # (*batch, C), the classes last; any strides
    target: np.ndarray  # int64, contiguous, one per row
    weight: np.ndarray | None  # computing precision, contiguous
    p: float
    margin: float


def scores(
    array: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray | None,
    axis: int,
    p: float,
    margin: float,
) -> Scores:
    """Gather a call's arrays; copies nothing of the input's size."""
    computing = np.float64 if array.dtype == np.float64 else np.float32
    return Scores(
        classes_last(array, axis),
        # What is too large for int64 turns negative and stays out of range.
        np.ascontiguousarray(target, dtype=np.int64).reshape(-1),
        None if weight is None else np.ascontiguousarray(weight, dtype=computing),
        p,
        margin,
    )


def classes_last(array: np.ndarray, axis: int) -> np.ndarray:
    """View an array with its classes at the last axis."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)  # 2 microseconds


def loss(
    scores: Scores,
    setting: int | None,
    losses: int = 0,
    bits: np.ndarray | None = None,
) -> tuple[float, int]:
    """Sum the rows' losses.

    Parameters
    ----------
    scores : Scores
        The call.
    setting : int or None
        How many threads the array library was told to use.
    losses : int, optional
        Address of contiguous memory for each row's loss in the dtype of ``scores.array``.
    bits : array of uint8, contiguous, optional
        What :func:`room_for_bits` gave; filled for :func:`grad_of_bits`.

    Returns
    -------
    sum : float
        The losses' sum, times C.
    bad : int
        The first row whose target is out of range, or -1.
    """
    kernels = numba_kernels()
    columns = scores.array.shape[-1]
    layout = _layout(scores.array)
    form = _form(layout, scores.array)
    head = (*_arguments(kernels, scores, layout, form), columns)
    tail = (
        *_last(kernels, scores),
        losses,
        kernels.NONE if bits is None else bits.ctypes.data,
    )
    run = getattr(kernels, f"loss_{form}")
    return _in_blocks(partial(run, head, tail), scores.target.size, columns, form, setting)


def loss_and_grad(
    scores: Scores,
    setting: int | None,
    losses: int,
    grad: np.ndarray,
    scale: float,
    upstream: np.ndarray | None,
) -> tuple[float, int]:
    """Do what :func:`loss` does, and write the gradient.

    Parameters
    ----------
    scores, setting, losses
        As in :func:`loss`.
    grad : array, shape and dtype of ``scores.array``
        Where to put the gradient; any strides, but it may not overlap the input.
    scale : float
        What every row's gradient is multiplied by; its loss times C is what is derived.
    upstream : array of float64, shape (N,), contiguous, or None
        Another factor per row.

    Returns
    -------
    sum, bad
        As in :func:`loss`.
    """
    kernels = numba_kernels()
    columns = scores.array.shape[-1]
    layout, to = _layout(scores.array), _layout(grad)
    form = "rows" if to.offsets is not None else _form(layout, scores.array)
    head = (*_arguments(kernels, scores, layout, form), columns)
    tail = (
        *_last(kernels, scores),
        losses,
        *_destination(kernels, grad, to, form, scale * scores.p, upstream),
    )
    run = getattr(kernels, f"grad_{form}")
    return _in_blocks(partial(run, head, tail), scores.target.size, columns, form, setting)


def room_for_bits(array: np.ndarray, p: float) -> np.ndarray | None:
    """Make room for what the gradient of p = 1 needs of the scores: one bit each.

    Reading them again takes less time where they are few, and where rows are neighbours in memory.

    Parameters
    ----------
    array : array, shape (*batch, C)
        The scores.
    p : float
        The exponent.

    Returns
    -------
    array of uint8 or None
        Whole bytes for each row.
    """
    if p != 1 or array.size < MANY or _form(_layout(array), array) != "rows":
        return None
    columns = array.shape[-1]
    return np.empty(array.size // columns * -(-columns // 8), np.uint8)


def grad_of_bits(
    scores: Scores,
    setting: int | None,
    bits: np.ndarray,
    grad: np.ndarray,
    scale: float,
    upstream: np.ndarray | None,
) -> None:
    """Write the gradient that :func:`loss_and_grad` writes, without reading the scores.

    Parameters
    ----------
    scores, setting, grad, scale, upstream
        As in :func:`loss_and_grad`.
    bits : array
        What :func:`loss` kept.
    """
    kernels = numba_kernels()
    columns = scores.array.shape[-1]
    to = _layout(grad)
    kind, *_, target, weight = _arguments(kernels, scores, to, "rows")
    run = partial(
        kernels.bits_rows,
        (kind, bits.ctypes.data, target, weight, columns),
        _destination(kernels, grad, to, "rows", scale, upstream),
    )
    _in_blocks(run, scores.target.size, columns, "rows", setting)


def own_scores(scores: Scores, first: int) -> np.ndarray:
    """Look up the targets' scores in a part of the classes, on this thread.

    Parameters
    ----------
    scores : Scores
        The call; its array holds the classes from ``first`` on.
    first : int
        Which class comes first.

    Returns
    -------
    array of the computing precision, shape (N,)
        0 for targets that are not among these classes.
    """
    kernels, array = numba_kernels(), scores.array
    own = np.empty(scores.target.size, np.float64 if array.dtype == np.float64 else np.float32)
    layout = _layout(array)  # a name of its own keeps the offsets while the kernel reads them
    arguments = _arguments(kernels, scores, layout, "rows")[:-1]
    kernels.own_rows(*arguments, first, array.shape[-1], own.size, own.ctypes.data)
    return own


def part_sums(scores: Scores, first: int, own: np.ndarray) -> np.ndarray:
    """Sum the rows' terms over a part of the classes, on this thread.

    Parameters
    ----------
    scores, first
        As in :func:`own_scores`.
    own : array, shape (N,), contiguous
        The targets' scores, in the computing precision; NaN for a target out of range.

    Returns
    -------
    array of float64, shape (N,)
        Without the factor of 1/C.
    """
    kernels, array = numba_kernels(), scores.array
    sums = np.empty(own.size)
    layout = _layout(array)
    arguments = _arguments(kernels, scores, layout, "rows")[:-1]
    kernels.part_rows(
        *arguments,
        first,
        array.shape[-1],
        own.size,
        own.ctypes.data,
        *_last(kernels, scores),
        sums.ctypes.data,
    )
    return sums


class _Layout(NamedTuple):
    """Where the rows of an array (batch, C) begin, in elements."""

    offsets: np.ndarray | None  # int64, where one stride doesn't lead from each row to the next
    row_stride: int
    step: int  # from one class to the next


def _layout(array: np.ndarray) -> _Layout:
    size = array.itemsize
    if array.ndim == 2 and array.shape[0] > 1:  # the usual case, in a third of the time
        row_stride, step = array.strides
        return _Layout(None, row_stride // size, step // size)
    *strides, step = (stride // size for stride in array.strides)
    merged: list[tuple[int, int]] = []
    for n, stride in zip(array.shape[:-1], strides, strict=True):
        if n == 1:
            continue
        if merged and merged[-1][1] == n * stride:
            merged[-1] = (merged[-1][0] * n, stride)
        else:
            merged.append((n, stride))
    if len(merged) < 2:
        return _Layout(None, merged[0][1] if merged else 0, step)
    offsets = np.zeros((), np.int64)
    for n, stride in merged:
        offsets = offsets[..., None] + np.arange(n) * stride
    return _Layout(offsets.reshape(-1), 0, step)


def _form(layout: _Layout, array: np.ndarray) -> str:
    """Choose between the kernels for rows and for rows that are neighbours in memory."""
    apart = layout.offsets is not None or not 0 < abs(layout.row_stride) < abs(layout.step)
    return "rows" if apart or array.size < MANY else "tiles"


def _step(kernels: Any, layout: _Layout, columns: int, form: str) -> Any:
    """Tell how far classes lie apart, as the kernels want it."""
    whole_vectors = form == "rows" and layout.step == 1 and columns >= 8
    return kernels.UNIT if whole_vectors else layout.step


def _arguments(kernels: Any, scores: Scores, layout: _Layout, form: str) -> tuple[Any, ...]:
    array, weight = scores.array, scores.weight
    return (
        getattr(kernels, KINDS[array.dtype]),
        array.ctypes.data,
        0 if layout.offsets is None else layout.offsets.ctypes.data,
        layout.row_stride,
        _step(kernels, layout, array.shape[-1], form),
        scores.target.ctypes.data,
        0 if weight is None else weight.ctypes.data,
    )


def _destination(
    kernels: Any,
    grad: np.ndarray,
    layout: _Layout,
    form: str,
    scale: float,
    upstream: np.ndarray | None,
) -> tuple[Any, ...]:
    return (
        grad.ctypes.data,
        0 if layout.offsets is None else layout.offsets.ctypes.data,
        layout.row_stride,
        _step(kernels, layout, grad.shape[-1], form),
        scale,
        0 if upstream is None else upstream.ctypes.data,
    )


def _last(kernels: Any, scores: Scores) -> tuple[float, Any]:
    p = scores.p
    return scores.margin, kernels.ONE if p == 1 else kernels.TWO if p == 2 else p


def _in_blocks(
    run: Callable[[tuple[int, ...]], bool],
    rows: int,
    columns: int,
    form: str,
    setting: int | None,
) -> tuple[float, int]:
    """Run the blocks of rows, and add up what they return."""
    size = max(1, BLOCK // columns)
    if form == "tiles":
        size = max(size, 256)
    count = -(-rows // size)
    workers = 1
    if rows * columns > SERIAL:
        workers = min(threads.number_of_threads(setting), count)
    results = arrays.array("q", bytes(8 + 16 * count))  # a third of the time of an array of NumPy's
    blocks = rows, size, workers, results.buffer_info()[0]

    def work(_: int) -> None:
        try:
            while run(blocks):
                pass
        except BaseException:
            results[0] = 2 * count  # the other threads need not go on
            raise

    threads.run(work, workers, workers)
    sums = memoryview(results).cast("B").cast("d")[1 : 1 + count].tolist()
    bads = results[1 + count :].tolist()
    return sum(sums), next((bad for bad in bads if bad >= 0), -1)


def numba_kernels() -> Any:
    """Import Numba (0.3 s) when a kernel is to run, not before."""
    from mml_arrayapi.backends import numba_kernels as kernels

    return kernels
