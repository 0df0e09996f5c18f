"""Dask: arguments brought into matching chunks, and checks that run when a chunk is there.

The scores are never rechunked. The targets follow the scores' chunks; the weights come whole to
every task (taking them by the targets made 10,000 tasks of 1,000 chunks).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.validation import InvalidTargetError, raise_invalid_target, same_shape

Array = Any


class TaskOptions(NamedTuple):
    """The arguments of a call that are no arrays, as its tasks need them."""

    p: float
    margin: float
    reduction: str
    ignore_index: int | None  # one that the targets can hold
    axis: int  # counted from the front
    check_target: str


def options_of(problem: Problem) -> TaskOptions:
    """Return the options of a call as its tasks need them.

    An ``ignore_index`` that the targets' dtype can't hold matches nothing: it becomes None.
    """
    index = problem.ignore_index
    if index is not None:
        limits = np.iinfo(problem.target.dtype)
        index = index if limits.min <= index <= limits.max else None
    return TaskOptions(
        problem.p, problem.margin, problem.reduction, index, problem.axis, problem.check_target
    )


def ignored(target: Array, ignore_index: int | None) -> Array | None:
    """Tell which targets are ignored; None stands for none of them."""
    return None if ignore_index is None else target == ignore_index


def without(values: Any, axis: int) -> tuple[Any, ...]:
    """Return a tuple without one of its elements."""
    return (*values[:axis], *values[axis + 1 :])


def batch_axes(problem: Problem) -> tuple[int, ...]:
    """Return the axes of ``input`` that are the batch's, as indices for blockwise."""
    return tuple(i for i in range(problem.input.ndim) if i != problem.axis)


CHUNKS_OF = ("numpy", "cupy")  # libraries whose arrays can be filled tile by tile


def unsupported_layout(array: da.Array) -> str | None:
    """Tell what a Dask array is whose chunks are not taken; None for one whose chunks are."""
    meta = array._meta
    if isinstance(meta, np.ma.MaskedArray):
        return "a Dask array of masked chunks"
    if type(array).__module__.startswith("dask.dataframe"):
        return f"a {type(array).__name__} of Dask; pass its to_dask_array(lengths=True)"
    try:
        library = library_of("input", meta)
        kind = library.name
    except TypeError:
        kind = f"type {type(meta).__module__}.{type(meta).__qualname__}"
    if kind not in CHUNKS_OF:
        return f"a Dask array whose chunks are of {kind}, not {' or '.join(CHUNKS_OF)}"
    form = library.unsupported_layout(meta)
    return None if form is None else f"a Dask array whose chunks are {form}"


def unknown(array: da.Array) -> bool:
    """Tell whether the size of a chunk is not known yet."""
    return any(math.isnan(n) for n in array.shape)


def match_rows(problem: Problem, array: Any, name: str = "target") -> da.Array:
    """Bring an array of the batch's shape into the chunks of the scores' rows.

    Parameters
    ----------
    problem : Problem
        The checked call.
    array : dask array or numpy array
        Targets, or something else with one element per sample.
    name : str
        The argument's name, for messages.

    Returns
    -------
    dask array

    Raises
    ------
    ValueError
        Sizes of chunks are unknown, so that the chunks can't be matched.
    """
    rows = tuple(problem.input.chunks[i] for i in batch_axes(problem))
    known = not any(math.isnan(n) for chunks in rows for n in chunks)
    if isinstance(array, (np.ndarray, np.generic)):
        if not known and math.prod(map(len, rows)) > 1:
            raise ValueError(
                f"{name} must be a Dask array where input has chunks of unknown size, but is a "
                "NumPy array; call input.compute_chunk_sizes() first"
            )
        # Never in one chunk beside many: the generic mask would be as large as all scores.
        return da.from_array(np.asarray(array), chunks=rows if known else -1)
    if array.chunks == rows:
        return array
    if known and not unknown(array):
        made = array.rechunk(rows)
        # What has no elements Dask leaves in the chunks it has.
        return made if made.chunks == rows else da.zeros_like(array, chunks=rows)
    if array.numblocks != tuple(map(len, rows)):
        raise ValueError(
            f"{name} must have as many chunks as input where sizes of chunks are unknown, but "
            f"it has {array.numblocks} and input has {tuple(map(len, rows))} without the "
            "classes' axis; call compute_chunk_sizes() on both first"
        )
    return array


def in_one_chunk(array: Any) -> da.Array:
    """Return weights, or one grad_output, as a Dask array of one chunk, which is computed once.

    Dask would fuse what makes the chunk with every task that takes it. It fuses nothing with what
    is summed over (here one block), nor with slices.
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return da.from_array(np.asarray(array), chunks=-1)
    ndim = array.ndim
    return da.blockwise(
        _only if ndim else _only_number,
        tuple(range(1, 1 + ndim)),
        # What has chunks of unknown sizes can't be rechunked.
        (array if unknown(array) else array.rechunk(-1)) if ndim else array[None],
        (0,),
        token="multi_margin_loss-once",
        new_axes=dict(enumerate(array.shape, start=1)),
        align_arrays=False,
        dtype=array.dtype,
        meta=array._meta,
    )


def _only(blocks: list[Array]) -> Array:
    for block in blocks:
        check_kind("weight", block)
    xp = library_of("weight", blocks[0]).namespace
    return blocks[0] if len(blocks) == 1 else xp.concat(blocks)


def _only_number(blocks: list[Array]) -> Array:
    check_kind("grad_output", blocks[0])
    return blocks[0][0]


def chunks_of(problem: Problem, target: da.Array) -> tuple[tuple[Any, ...], ...]:
    """Return the chunks of the scores; what is unknown of the rows' sizes, the targets' may tell.

    Parameters
    ----------
    problem : Problem
        The checked call.
    target : dask array
        The targets, in matching chunks.
    """
    chunks = list(problem.input.chunks)
    for i, sizes in zip(batch_axes(problem), target.chunks, strict=True):
        if any(map(math.isnan, chunks[i])):
            chunks[i] = sizes
    return tuple(chunks)


def check_length(batch: tuple[int, ...], target: Any) -> None:
    """Check that a chunk has one target per sample: others would be broadcast silently.

    Parameters
    ----------
    batch : tuple of int
        The shape of the chunk of scores without the classes' axis.
    target : array
        The chunk of targets.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if tuple(target.shape) != tuple(batch):
        raise ValueError(
            "target must have input's shape without the classes' axis, but a chunk of target has "
            f"shape {tuple(target.shape)} beside a chunk of input with {tuple(batch)}"
        )


def check_sizes(block: Array, place: tuple[slice, ...]) -> None:
    """Check that a chunk has the size that Dask was told, by which the loss is divided.

    Parameters
    ----------
    block : array
        The chunk of scores, which fits that of the targets.
    place : tuple of slice
        Where it lies in the whole array, as the chunks of both say; NaN where that is unknown.

    Raises
    ------
    ValueError
        It has another.
    """
    declared = tuple(part.stop - part.start for part in place)
    if not same_shape(tuple(block.shape), declared):
        raise ValueError(
            "input must have chunks of the sizes that it, or target, declares, but a chunk has "
            f"shape {tuple(block.shape)} instead of {declared}; give map_blocks() its chunks"
        )


def check_factors(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Check a chunk of weights, or of grad_output: others would be broadcast silently.

    Parameters
    ----------
    name : str
        The argument's name, for messages.
    array : array
        The chunk.
    shape : tuple of int
        The shape that it must have.

    Raises
    ------
    TypeError, ValueError
        It has another, or no real floating dtype.
    """
    check_kind(name, array)
    if tuple(array.shape) != shape:
        raise ValueError(
            f"{name} must have chunks that fit those of input, but one has shape "
            f"{tuple(array.shape)} instead of {shape}"
        )
    check_float(name, array)


def check_float(name: str, array: Array) -> None:
    """Check that a chunk has a real floating dtype, whatever Dask was told.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    array : array
        The chunk.

    Raises
    ------
    TypeError
        It has another.
    """
    is_float = np.dtype(array.dtype).kind == "f" and array.dtype.itemsize <= 8
    if not is_float and array.dtype.name != "bfloat16":
        raise TypeError(
            f"{name} must have a real floating dtype, but a chunk of it has dtype {array.dtype}"
        )


def check_targets(
    target: Any, place: tuple[slice, ...], n_classes: int, options: TaskOptions
) -> None:
    """Check the targets of a chunk, if that is asked for.

    Parameters
    ----------
    target : array
        The chunk of targets.
    place : tuple of slice
        Where it lies in the whole array; NaN where that is unknown.
    n_classes : int
        The number of classes.
    options : TaskOptions
        As :func:`options_of` returns them.

    Raises
    ------
    InvalidTargetError
        With the position in the whole array (along an axis whose chunks have unknown sizes, in
        the chunk).
    TypeError
        The chunk has no integer dtype, whatever Dask was told.
    """
    if np.dtype(target.dtype).kind not in "iu":
        raise TypeError(
            f"target must have an integer dtype, but a chunk of it has dtype {target.dtype}"
        )
    if options.check_target != "raise":
        return
    lost = ignored(target, options.ignore_index)
    if lost is not None:
        xp = library_of("target", target).namespace
        target = xp.where(lost, xp.zeros_like(target), target)
    try:
        raise_invalid_target(target, n_classes)
    except InvalidTargetError as error:
        starts = (0 if math.isnan(part.start) else int(part.start) for part in place)
        position = tuple(a + b for a, b in zip(starts, error.position, strict=True))
        raise InvalidTargetError(position, error.value, n_classes) from None


def check_kind(name: str, block: Array) -> None:
    """Refuse a chunk of another library, and one whose mask or unit a kernel would not see.

    Raises
    ------
    TypeError
        With the argument's name.
    """
    if isinstance(block, np.ma.MaskedArray):  # with a word on ignore_index
        raise TypeError(
            f"{name} must have plain chunks, but a chunk is a masked array; fill it first, or mark "
            "the samples to leave out with ignore_index"
        )
    kind = type(block)
    if not isinstance(block, (np.ndarray, np.generic)) and kind.__module__.split(".")[0] != "cupy":
        raise TypeError(
            f"{name} must have chunks of NumPy or CuPy, but a chunk is of type "
            f"{kind.__module__}.{kind.__qualname__}"
        )
    if (form := library_of(name, block).unsupported_layout(block)) is not None:
        raise TypeError(f"{name} must have plain chunks, but a chunk is {form}")
