"""What CuPy and PyTorch share on the GPU: which kernel runs, its geometry, its packed arguments.

No library is named here and nothing is launched: a caller describes its arrays in a :class:`Call`
and gets a :class:`Plan` back, which its library carries out.
The kernels are those of ``margin_loss.cu``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from mml_arrayapi.kernel import Problem

SCALARS = {"float64": 64, "float32": 32, "float16": 16, "bfloat16": 17}
ITEMSIZE = {64: 8, 32: 4, 16: 2, 17: 2}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")

LAYOUTS = {"tiles": 1, "rows": 2, "wide": 3, "split": 4}

MAX_CLASSES = 2**31 - 1  # positions within a row have 32 bits in the kernels
TILE_CLASSES = 31  # a tile's mask keeps a row in one word, and one of its bits says "no value"
WIDE_VECTORS = 1024  # from here on a whole block works on each row: 16 KiB of scores
TINY = 2048  # up to so many scores one block does everything, which saves the second launch
# Twice as many as are resident at once, by the kernels' budget of registers: the device stays
# busy to the end, and few sums of blocks are left to be added.
BLOCKS_PER_MULTIPROCESSOR = {"tiles": 16, "rows": 6, "wide": 6, "split": 3}
COUNTING_BLOCKS = 128  # at most; every block of the next launch adds their counts

BLOCK, TILE_BLOCK, SUM_BLOCK = 256, 128, 1024
SCRATCH = 256  # bytes of shared memory for the sums over a block
FAR = 2**63 - 1  # a flag's value while no target was found out of range
DOWN = 2.0**-32  # the kernels keep the sum over a row multiplied by this

# The fields of the kernels' arguments, in order; each begins a new 8 bytes. First the addresses,
ADDRESSES = ("scores", "target", "weight", "upstream", "loss", "scratch", "flag", "mask", "grad")
# then numbers, of which the last two are of the computing precision.
INTEGER_FIELDS = (
    *("rows", "classes", "row_stride", "target_stride", "target_kind"),
    *("upstream_stride", "upstream_wide", "weight_wide", "lanes", "vector", "mask_row"),
    *("summed", "ignoring", "ignore_index", "counted", "blocks", "splits", "span"),
)
DOUBLE_FIELDS = ("loss_factor", "divisor", "grad_factor")
REAL_FIELDS = ("margin", "exponent")
NUMBERS = (*INTEGER_FIELDS, *DOUBLE_FIELDS, *REAL_FIELDS)
FIELDS = len(ADDRESSES) + len(NUMBERS)
PACKED_ADDRESSES = struct.Struct("<9q")
PACKED_NUMBERS = {
    scalar: struct.Struct("<18q3d2d" if scalar == 64 else "<18q3df4xf4x") for scalar in ITEMSIZE
}
# The same for CuPy and PyTorch. CuPy's own compilation would add -ftz=true, and subnormal numbers
# would become 0 there alone.
OPTIONS = ("--std=c++17", "-ftz=false")
FLOAT32_MAX = float.fromhex("0x1.fffffep+127")


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
    ignore_index : int or None
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
    ignore_index: int | None
    multiprocessors: int


class Geometry(NamedTuple):
    """How the rows are laid over the device. It depends on shapes and types, never on addresses."""

    kernels: str  # a key of LAYOUTS
    lanes: int  # threads that share a row
    mask_row: int  # bytes of bits of the mask for a row
    grid: int
    block: int
    shared: int  # bytes per block
    splits: int = 1  # blocks that share a row
    span: int = 0  # 16-byte vectors of a row for each of them


class Variant(NamedTuple):
    """What the source is compiled for."""

    scalar: int
    power: int
    kernels: str
    classes: int  # 0: any number

    def defines(self) -> tuple[str, ...]:
        """Return the compiler options. A variant takes half a second or so to compile."""
        options = (
            f"-DSCALAR={self.scalar}",
            f"-DPOWER={self.power}",
            f"-DLAYOUT={LAYOUTS[self.kernels]}",
        )
        return (*options, f"-DCLASSES={self.classes}") if self.classes else options

    def names(self) -> tuple[str, ...]:
        """Return the names of its kernels. A mask suffices for p = 1 only."""
        made = ("loss", "loss_grad", "loss_mask", "grad_mask")[: 4 if self.power == 1 else 2]
        names = [f"{self.kernels}_{operation}" for operation in made]
        if self.kernels == "split":
            names += [f"{name}_end" for name in names if name != "split_grad_mask"]
        return (*names, "count", "finish")


class Launch(NamedTuple):
    """One kernel launch: entry point, blocks, threads, bytes of shared memory."""

    name: str
    grid: int
    block: int
    shared: int


class Plan(NamedTuple):
    """What to launch for a call, and with what."""

    variant: Variant
    launches: tuple[Launch, ...]  # in order, on one stream
    packed: bytes  # the numbers, as in NUMBERS
    scratch: int  # how many float64 the launches need to pass sums on
    mask: tuple[int, int]  # shape of the mask, bytes


@cache
def source() -> str:
    """Return the kernels' source text."""
    return files(__package__).joinpath("margin_loss.cu").read_text(encoding="utf-8")


def target_for(device: int, known: Iterable[int]) -> str:
    """Say what to compile for a device.

    Parameters
    ----------
    device : int
        Its compute capability, such as 90 for 9.0.
    known : iterable of int
        The capabilities that the compiler knows.

    Returns
    -------
    str
        Such as ``"sm_90"`` (machine code); ``"compute_90"`` (PTX, which the driver translates)
        where the device is newer than the compiler.

    Raises
    ------
    RuntimeError
        The device is older than all that the compiler knows.
    """
    older = [architecture for architecture in known if architecture <= device]
    if not older:
        lowest = min(known, default="nothing")
        raise RuntimeError(f"NVRTC compiles for sm_{lowest} and newer, the device is sm_{device}")
    return f"sm_{device}" if device in older else f"compute_{max(older)}"


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
        The family of kernels; few wide rows are then split.
    lanes : int
        Threads to a row.
    mask_row : int
        Bytes of bits of the mask for a row. Nothing here depends on addresses or on the number of
        rows: a later launch can read a mask knowing dtype and classes alone.
    """
    if classes <= TILE_CLASSES:
        return "tiles", 1, 4
    itemsize = ITEMSIZE[scalar]
    vectors = classes * itemsize // 16
    in_flight = 4 if itemsize == 2 else 8
    groups = -(-vectors // in_flight)
    lanes = min(max(1 << (groups - 1).bit_length(), 4), 32) if vectors < WIDE_VECTORS else BLOCK
    unit = lanes * 8 * itemsize // 16  # vectors whose bits make one byte per lane
    return "wide" if lanes == BLOCK else "rows", lanes, lanes * -(-vectors // unit)


def mask_bytes(scalar: int, classes: int) -> int:
    """Return the bytes of a mask for a row: its bits, and but in tiles a count and the edges' bits.

    Parameters
    ----------
    scalar, classes
        As for :func:`share`.

    Returns
    -------
    int
    """
    kernels, _, mask_row = share(scalar, classes)
    return _mask_bytes(kernels, mask_row)


def _mask_bytes(kernels: str, mask_row: int) -> int:
    return mask_row if kernels == "tiles" else 8 + mask_row


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
    if kernels == "wide" and 0 < rows < multiprocessors:
        split = _split(scalar, rows, classes, multiprocessors)._replace(mask_row=mask_row)
        if split.splits > 1:
            return split
    tiles = kernels == "tiles"
    block = TILE_BLOCK if tiles else BLOCK
    grid = -(-rows // (block // lanes))
    grid = min(grid, multiprocessors * BLOCKS_PER_MULTIPROCESSOR[kernels])
    if rows * classes <= TINY:
        grid = min(grid, 1)
    shared = SCRATCH + TILE_BLOCK * classes * max(ITEMSIZE[scalar], 4) if tiles else SCRATCH
    return Geometry(kernels, lanes, mask_row, grid, block, shared)


def _split(scalar: int, rows: int, classes: int, multiprocessors: int) -> Geometry:
    """Give each of few long rows to several blocks, in spans that their loops take whole turns on.

    Each row has as many blocks as all together are resident at once.
    """
    itemsize = ITEMSIZE[scalar]
    turn = BLOCK * (4 if itemsize == 2 else 8)  # vectors that a block takes at a time
    turns = -(-(classes * itemsize // 16) // turn)
    most = multiprocessors * BLOCKS_PER_MULTIPROCESSOR["split"] // rows
    per_block = -(-turns // max(most, 1))
    splits = -(-turns // per_block)
    grid, span = rows * splits, per_block * turn
    return Geometry("split", BLOCK, 0, grid, BLOCK, SCRATCH, splits, span)


def variant_for(scalar: int, p: float, rows: int, classes: int, multiprocessors: int) -> Variant:
    """Return what is compiled for a problem.

    Parameters
    ----------
    scalar, p, rows, classes, multiprocessors
        As in :class:`Call`.

    Returns
    -------
    Variant
    """
    return _variant(scalar, p, geometry(scalar, rows, classes, multiprocessors), classes)


def _variant(scalar: int, p: float, shape: Geometry, classes: int) -> Variant:
    power = int(p) if p in (1, 2) else 0
    return Variant(scalar, power, shape.kernels, classes if shape.kernels == "tiles" else 0)


def make_plan(call: Call, operation: str, shape: Geometry | None = None) -> Plan:
    """Say what to launch.

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
        The launches take the addresses of the arrays: ``loss``, ``mask``, ``grad``, ``scratch``;
        ``upstream`` or 0 for 1; ``flag`` or 0.
    """
    shape = shape or geometry(call.scalar, call.rows, call.classes, call.multiprocessors)
    summed = call.reduction != "none" and operation.startswith("loss")
    ignore_index = _held_by(call.target_kind, call.ignore_index)
    counting = _counting_blocks(call) if ignore_index is not None else 0
    launches = [Launch("count", counting, BLOCK, SCRATCH)] if counting else []
    sums = 0
    if shape.grid > 0:
        name = f"{shape.kernels}_{'loss_grad' if operation == 'grad' else operation}"
        launches.append(Launch(name, shape.grid, shape.block, shape.shared))
        if shape.kernels == "split":
            if operation != "grad_mask":
                launches.append(Launch(f"{name}_end", 1, SUM_BLOCK, SCRATCH))
                sums = 2 * call.rows * shape.splits
        elif summed and shape.grid > 1:
            sums = shape.grid
    if summed and (shape.grid == 0 or (sums and shape.kernels != "split")):
        launches.append(Launch("finish", 1, SUM_BLOCK, SCRATCH))
    return Plan(
        _variant(call.scalar, call.p, shape, call.classes),
        tuple(launches),
        _pack_numbers(call, shape, summed, ignore_index, counting),
        counting + sums,
        (call.rows, _mask_bytes(shape.kernels, shape.mask_row)),
    )


def _held_by(target_kind: int, ignore_index: int | None) -> int | None:
    """Return the index as the kernels compare it; None if no target of that type can equal it."""
    if ignore_index is None:
        return None
    bits = 8 * abs(target_kind)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if target_kind > 0 else (0, 2**bits)
    if not low <= ignore_index < high:
        return None
    return ignore_index - 2**64 if ignore_index >= 2**63 else ignore_index


def _counting_blocks(call: Call) -> int:
    """Return how many blocks count the rows that are not ignored: those of a mean."""
    return min(-(-call.rows // (4 * BLOCK)), COUNTING_BLOCKS) if call.reduction == "mean" else 0


def _pack_numbers(
    call: Call, shape: Geometry, summed: bool, ignore_index: int | None, counting: int
) -> bytes:
    classes, rows = call.classes, max(call.rows, 1)
    counted_here = call.reduction == "mean" and not counting  # the kernels divide by their count
    row_scale = math.ldexp(DOWN, -(rows - 1).bit_length()) if summed else 1.0
    grad_factor = call.p / classes / (rows if counted_here else 1)
    margin, exponent = call.margin, call.p - 1
    if call.scalar != 64:
        margin, exponent = _float32(margin), _float32(exponent)
        grad_factor = min(grad_factor, FLOAT32_MAX)  # infinity times a slope of 0 would be NaN
    # In the order of NUMBERS.
    return PACKED_NUMBERS[call.scalar].pack(
        call.rows, classes, call.row_stride, call.target_stride, call.target_kind,
        call.upstream_stride, call.upstream_wide, call.weight_wide, shape.lanes, _vector(call),
        shape.mask_row, summed, ignore_index is not None, ignore_index or 0,
        counting, shape.grid, shape.splits, shape.span, row_scale / DOWN / classes,
        row_scale * (call.rows if counted_here else 1), grad_factor, margin, exponent,
    )  # fmt: skip


def _float32(value: float) -> float:
    """Return a number that fits float32: what doesn't is the infinity of its sign."""
    try:
        struct.pack("<f", value)
    except OverflowError:
        return math.copysign(math.inf, value)
    return value


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
