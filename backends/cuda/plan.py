"""What CuPy and PyTorch share on the GPU: which kernel runs, its geometry, its packed arguments.

No library is named here and nothing is launched: a caller describes its arrays in a :class:`Call`
and gets a :class:`Plan` back, which its library carries out.
The kernels are those of ``margin_loss.cu``.
"""

from __future__ import annotations

import struct
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

from mml_arrayapi.kernel import Problem

SCALARS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 17}
ITEMSIZE = {64: 8, 32: 4, 16: 2, 17: 2}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

LAYOUTS = {"tiles": 1, "rows": 2, "wide": 3}

MAX_CLASSES = 2**31 - 1  # positions within a row have 32 bits in the kernels
TILE_CLASSES = 31  # a tile's mask keeps a row in one word, and one of its bits says "no value"
WIDE_VECTORS = 1024  # from here on a whole block works on each row: 16 KiB of scores
TINY = 16384  # up to so many scores one block does everything, which saves the second launch
BLOCKS_PER_MULTIPROCESSOR = 32

BLOCK, TILE_BLOCK = 256, 128
SCRATCH = 256  # bytes of shared memory for the sums over a block
FAR = 2**63 - 1  # a flag's value while no target was found out of range

# The fields of the kernels' arguments, in order; each begins a new 8 bytes. First the addresses,
ADDRESSES = (
    *("scores", "target", "weight", "upstream", "loss", "partials", "result", "flag"),
    *("mask", "counts", "grad"),
)
# then numbers, of which the last three are of the computing precision.
NUMBERS = (
    *("rows", "classes", "row_stride", "target_stride", "target_kind"),
    *("upstream_stride", "upstream_wide", "weight_wide", "lanes", "vector", "mask_row", "blocks"),
    *("loss_factor", "divisor", "margin", "exponent", "grad_factor"),
)
FIELDS = len(ADDRESSES) + len(NUMBERS)
PACKED_ADDRESSES = struct.Struct("<11q")
PACKED_NUMBERS = {
    scalar: struct.Struct("<12q2d3d" if scalar == 64 else "<12q2df4xf4xf4x") for scalar in ITEMSIZE
}


class Call(NamedTuple):
    """One problem in numbers, without its addresses: what a plan depends on. Strides in elements.

    Attributes
    ----------
    scalar : int
        The element type of scores, loss and gradient: a value of :data:`SCALARS`.
    rows, classes, row_stride, target_stride : int
        The scores are ``(rows, classes)`` with the classes contiguous.
    target_kind : int
        Bytes of a target, negative if it is unsigned.
    weight_wide : bool
        Whether the weight is of the computing precision, rather than of the scores' type.
    upstream_stride : int
        Of the gradient for the loss, 0 where it is one number.
    upstream_wide : bool
        As ``weight_wide``.
    aligned : bool
        Whether the scores begin at a 16-byte boundary.
    p, margin : float
        As in the problem.
    reduction : {"none", "mean", "sum"}
        As in the problem.
    multiprocessors : int
        How many the device has.
    """

    scalar: int
    rows: int
    classes: int
    row_stride: int
    target_stride: int
    target_kind: int
    weight_wide: bool
    upstream_stride: int
    upstream_wide: bool
    aligned: bool
    p: float
    margin: float
    reduction: str
    multiprocessors: int


class Geometry(NamedTuple):
    """How the rows are laid over the device. It depends on shapes and types, never on addresses."""

    kernels: str  # "tiles", "rows" or "wide"
    lanes: int  # threads that share a row
    grid: int
    block: int
    shared: int  # bytes per block
    mask_row: int  # bytes of the mask for one row
    counts: int  # elements of counts, 4 bytes each


class Launch(NamedTuple):
    """One kernel launch: entry point, blocks, threads, bytes of shared memory."""

    name: str
    grid: int
    block: int
    shared: int


class Plan(NamedTuple):
    """What to launch for a call, and with what."""

    scalar: int
    power: int
    kernels: str
    launches: tuple[Launch, ...]  # in order, on one stream
    numbers: tuple[float, ...]  # as in NUMBERS
    packed: bytes  # the same, packed
    partials: int  # float64 that the sums over the blocks need
    mask: tuple[int, int]  # shape of the mask, bytes
    counts: int  # elements of counts, 4 bytes each


def power_kind(p: float) -> int:
    """Return the POWER to compile for: 1 and 2 have code of their own, 0 is any other."""
    return int(p) if p in (1, 2) else 0


def defines(scalar: int, power: int, kernels: str) -> tuple[str, ...]:
    """Return the compiler options that select a variant of the source.

    A variant is a third to a fifth of the whole, and so is the time to compile it (0.5 s or so).
    """
    return (f"-DSCALAR={scalar}", f"-DPOWER={power}", f"-DLAYOUT={LAYOUTS[kernels]}")


def operations(power: int) -> tuple[str, ...]:
    """Return the operations there are for a power: a mask suffices for p = 1 only."""
    return ("loss", "loss_grad", "loss_mask", "grad_mask") if power == 1 else ("loss", "loss_grad")


@cache
def source() -> str:
    """Return the kernels' source text."""
    return files(__package__).joinpath("margin_loss.cu").read_text(encoding="utf-8")


def refusal(problem: Problem) -> str | None:
    """Tell why no GPU kernel can run a problem, as far as both libraries agree; None if one can.

    Parameters
    ----------
    problem : Problem
        The checked call.

    Returns
    -------
    str or None
    """
    dtype = str(problem.input.dtype).rpartition(".")[2]
    if dtype not in SCALARS:
        return f"input has dtype {dtype}, the GPU kernels take {', '.join(SCALARS)}"
    integer = str(problem.target.dtype).rpartition(".")[2]
    if integer not in INTEGERS:
        return f"target has dtype {integer}, the GPU kernels take {', '.join(INTEGERS)}"
    if problem.axis != problem.input.ndim - 1:
        return f"the classes are at axis {problem.axis}, the GPU kernels take the last axis only"
    if problem.input.shape[-1] > MAX_CLASSES:
        return f"input has {problem.input.shape[-1]} classes, the GPU kernels take {MAX_CLASSES}"
    return None


@cache
def share(scalar: int, classes: int) -> tuple[str, int, int]:
    """Say how rows of so many classes are shared among threads, and the size of their mask.

    Rows of up to 31 classes travel in tiles through shared memory, a thread to a row. Longer ones
    are shared by 4 to 32 lanes, as many as keep each at about eight 16-byte loads, and from
    16 KiB on by a block.

    Parameters
    ----------
    scalar : int
        A value of :data:`SCALARS`.
    classes : int
        As in :class:`Call`.

    Returns
    -------
    kernels : {"tiles", "rows", "wide"}
        The family of kernels.
    lanes : int
        Threads to a row.
    mask_row : int
        Bytes of the mask for a row. Nothing here depends on addresses: a later launch can read a
        mask knowing shape and type alone.
    """
    if classes <= TILE_CLASSES:
        return "tiles", 1, 4
    itemsize = ITEMSIZE[scalar]
    vectors = classes * itemsize // 16
    in_flight = 4 if itemsize == 2 else 8
    lanes = 4
    while lanes < 32 and lanes * in_flight < vectors:
        lanes *= 2
    if vectors >= WIDE_VECTORS:
        lanes = BLOCK
    unit = lanes * 8 * itemsize // 16  # vectors whose bits make one byte per lane
    ragged = classes * itemsize % 16 != 0
    return "wide" if lanes == BLOCK else "rows", lanes, lanes * (-(-vectors // unit) + ragged)


def geometry(scalar: int, rows: int, classes: int, multiprocessors: int) -> Geometry:
    """Lay a problem over the device.

    Parameters
    ----------
    scalar, classes
        As for :func:`share`.
    rows, multiprocessors : int
        As in :class:`Call`.

    Returns
    -------
    Geometry
    """
    kernels, lanes, mask_row = share(scalar, classes)
    if kernels == "tiles":
        real = max(ITEMSIZE[scalar], 4)
        elements = 32 * classes
        shared = SCRATCH + TILE_BLOCK // 32 * (elements + elements * real // 128 + 1) * real
        grid = _grid(rows, TILE_BLOCK, rows * classes, multiprocessors)
        return Geometry(kernels, lanes, grid, TILE_BLOCK, shared, mask_row, 0)
    grid = _grid(rows, BLOCK // lanes, rows * classes, multiprocessors)
    return Geometry(kernels, lanes, grid, BLOCK, SCRATCH, mask_row, rows)


def _grid(rows: int, per_block: int, elements: int, multiprocessors: int) -> int:
    if elements <= TINY:
        return min(rows, 1)
    return min(-(-rows // per_block), multiprocessors * BLOCKS_PER_MULTIPROCESSOR)


@lru_cache(1024)
def make_plan(call: Call, operation: str, shape: Geometry | None = None) -> Plan:
    """Say what to launch. Kept for calls that come again: it takes longer than a small loss.

    Parameters
    ----------
    call : Call
        The problem.
    operation : {"loss", "loss_mask", "loss_grad", "grad", "grad_mask"}
        The loss; the loss and the mask (p = 1); the loss and the gradient; the gradient; the
        gradient from the mask (p = 1).
    shape : Geometry, optional
        Instead of what :func:`geometry` says.

    Returns
    -------
    Plan
        The launches take the addresses of the arrays: ``loss`` for the reduction ``"none"``, else
        ``result`` and ``partials``; ``mask`` and ``counts``; ``grad``; ``upstream`` or 0 for 1;
        ``flag`` or 0.
    """
    shape = shape or geometry(call.scalar, call.rows, call.classes, call.multiprocessors)
    summed = call.reduction != "none" and operation.startswith("loss")
    mean = call.reduction == "mean"
    numbers = {
        **call._asdict(),
        "lanes": shape.lanes,
        "vector": _vector(call),
        "mask_row": shape.mask_row,
        "blocks": shape.grid,
        "loss_factor": 1.0 / call.classes,
        "divisor": float(call.rows) if mean else 1.0,
        "exponent": call.p - 1,
        "grad_factor": call.p / (call.classes * max(call.rows, 1) if mean else call.classes),
    }
    values = tuple(numbers[name] for name in NUMBERS)
    steps = []
    if shape.grid > 0:
        name = f"{shape.kernels}_{'loss_grad' if operation == 'grad' else operation}"
        steps.append(Launch(name, shape.grid, shape.block, shape.shared))
    if summed and shape.grid != 1:
        steps.append(Launch("finish", 1, BLOCK, SCRATCH))
    return Plan(
        call.scalar,
        power_kind(call.p),
        shape.kernels,
        tuple(steps),
        values,
        PACKED_NUMBERS[call.scalar].pack(*values),
        shape.grid if summed and shape.grid > 1 else 0,
        (call.rows, shape.mask_row),
        shape.counts,
    )


def _vector(call: Call) -> bool:
    """Tell whether the scores lie at 16-byte boundaries as the contiguous gradient does."""
    if call.classes <= TILE_CLASSES and call.row_stride != call.classes:
        return False
    shift = (call.row_stride - call.classes) * ITEMSIZE[call.scalar]
    return call.aligned and shift % 16 == 0


def pack(addresses: tuple[int, ...], plan: Plan) -> bytes:
    """Return the arguments as the kernels read them; the addresses as in :data:`ADDRESSES`."""
    return PACKED_ADDRESSES.pack(*addresses) + plan.packed


def pack_into(memory: memoryview, addresses: tuple[int, ...], plan: Plan) -> None:
    """Write what :func:`pack` returns into memory of that size."""
    PACKED_ADDRESSES.pack_into(memory, 0, *addresses)
    memory[PACKED_ADDRESSES.size :] = plan.packed
