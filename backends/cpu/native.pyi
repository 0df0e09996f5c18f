"""The extension modules ``_baseline``, ``_x86_64_v3`` and ``_x86_64_v4``: one API, three builds.

Arguments are positional only. Arrays are read anew in every call, in C: exact types that ``accept``
knows, any strides (negative, zero, unaligned), native byte order. A function returns None where it
declines: a call that isn't plainly right, or whose targets are out of range while
``check_target`` isn't ``"nan"``; what it was to write may then be written in part. The caller finds
the words for the error, or another kernel. ``options`` is ``(p, margin, reduction, ignore_index,
axis, check_target)`` as the user gave it, unchecked.

``threads`` limits the threads of a large call: None, an integer, or a function without arguments
(``torch.get_num_threads``) that only a large call asks.
"""

from collections.abc import Callable
from typing import Any

Array = Any
Options = tuple[Any, Any, Any, Any, Any, Any]
Threads = int | Callable[[], int] | None

MARK: int  #: At the end of a mask whose bits this build has written.

def accept(
    types: tuple[type, ...],
    source: Any,
    empty: Callable[..., Array] | None = None,
    scalars: tuple[type, type, type] | None = None,
    /,
) -> None:
    """Make arrays of exactly these types known; the arrays of one call come from one ``accept``.

    ``source``: None reads them by the buffer protocol; a capsule is the type's
    ``__dlpack_c_exchange_api__``; a function gives an array's DLPack capsule (``"dltensor"``).
    ``empty(shape, dtype)`` makes a result, ``scalars`` are the types of a float64, float32 and
    float16 result without axes. The exchange API makes its own; with a function the caller passes
    ``out``.
    """

def loss(
    input: Array | tuple[Array, ...],
    target: Array,
    weight: Array | None,
    options: Options,
    out: Array | None = None,
    bits: Array | None = None,
    threads: Threads = None,
    /,
) -> Any:
    """Compute the loss.

    Returns ``out`` (target's shape for the reduction "none", else 0-d; input's dtype) or a new
    result. ``bits``: uint8, 1-d, contiguous, as many as ``bits_size`` says; written for ``grad``.
    ``input`` may be a tuple of arrays of one dtype, whose classes follow one another: at most 32 KB
    in a row, p 1 or 2, no ``bits``. A sample's loss has the bits that it has in whole rows.
    """

def loss_and_grad(
    input: Array,
    target: Array,
    weight: Array | None,
    options: Options,
    grad: Array,
    grad_output: Any = None,
    out: Array | None = None,
    threads: Threads = None,
    /,
) -> Any:
    """Compute the loss as ``loss`` does, and write the gradient into ``grad``.

    ``grad``: input's shape and dtype, any strides, no overlap with anything. ``grad_output``: None,
    a number or a 0-d array for the mean and sum, an array of target's shape for "none"; any float
    dtype and strides.
    """

def grad(
    input: Array,
    target: Array,
    weight: Array | None,
    options: Options,
    grad: Array,
    grad_output: Any = None,
    bits: Array | None = None,
    threads: Threads = None,
    /,
) -> Array | None:
    """Write the gradient alone; return ``grad``. With ``bits`` (p = 1) no score is read."""

def bits_size(input: Array, options: Options, /) -> int:
    """Return how many bytes of bits pay for ``loss`` and ``grad``; 0: none."""

def row_bytes(input: Array, options: Options, /) -> int:
    """Return how many bytes of ``bits`` a row takes."""

def own_scores(
    input: Array,
    target: Array,
    options: Options,
    first: int,
    own: Array,
    threads: Threads = None,
    /,
) -> Array | None:
    """Write each row's target score where it is among input's classes, else 0; return ``own``.

    Here and below ``input`` holds the classes from ``first`` on; ``reduction``, ``check_target``
    of the options count for nothing. ``own``: one number per row in the computing precision
    (float64 for float64, else float32), target's shape, any strides.
    """

def part_sums(
    input: Array,
    target: Array,
    options: Options,
    first: int,
    own: Array,
    sums: Array,
    slopes: Array | None,
    threads: Threads = None,
    /,
) -> Array | None:
    """Write each row's sum of terms over input's classes, and of their slopes; return ``sums``.

    ``own``: the targets' scores, NaN for a row without a value (its target is out of range).
    ``sums`` (of max(0, z) ** p) and ``slopes`` (of p * max(0, z) ** (p - 1)): float64, target's
    shape; both NaN where either is; 0 for ignored rows. Add the parts, then
    ``weight[y] / C * sums`` is the loss.
    """

def part_grad(
    input: Array,
    target: Array,
    options: Options,
    first: int,
    rows: tuple[Array, Array, Array],
    grad: Array,
    threads: Threads = None,
    /,
) -> Array | None:
    """Write the gradient for input's classes; return ``grad``.

    ``rows`` is ``(own, slopes, scale)``, one number per row each: ``own`` as for ``part_sums``;
    ``slopes`` float64, the sum over all parts, NaN where the row's loss is NaN (its gradient row
    then is); ``scale`` float64, what the row's gradient is multiplied with (``weight[y] / C *
    grad_output``, for the mean divided by the number of rows). The target's class gets
    ``-slopes * scale``.
    """

def standings(
    input: Array,
    target: Array,
    weight: Array | None,
    options: Options,
    losses: Array | None,
    written: tuple[Array, Array, Array, Array],
    unit: float,
    threads: Threads = None,
    /,
) -> tuple[Array, Array, Array, Array] | None:
    """Write where each row's target stands, and the losses if asked for; return ``written``.

    ``input``: ``(N, C)``, any float dtype, the classes side by side in memory. ``written``: arrays
    without gaps. First the classes of each row's highest scores, int64, ``(N, k)``, k from 2 (or C)
    to 8: NaN comes first, then the highest score; of equal ones the lower class. The others are
    ``(N,)``: uint8, 1 where another class is within the margin or a score is NaN, plus 2 where the
    target leads; int32, the lead's bin; int64, ``target * C + class`` where the target doesn't lead
    that class, the highest other one, and -1 elsewhere. A lead is the target's score less the
    highest other one, infinite where there is no other; its bin is the sign and the leading 17 bits
    of the float64 that it is in units of ``unit``.
    """

def exact_sums(values: Array, groups: Array, sums: Array, /) -> Array | None:
    """Sum finite floats by group without rounding; write and return ``sums``.

    ``values``: float32 or float64, ``(N,)``. ``groups``: int64, ``(N,)``, each value's row of
    ``sums``. ``sums``: uint32, ``(n_groups, 70)``, without gaps: integers in units of
    ``2 ** -1130``, as two's complement, the lowest digit first.
    """

def set_limit(limit: Callable[[int | None], int], /) -> None:
    """Name the function that a large call asks for its number of threads.

    It gets the library's setting, or None; what it raises the call raises.
    """

def connect_pytorch(address_of: Callable[[str], int | None], /) -> bool:
    """Register the operators of compiled graphs.

    ``address_of`` tells where a function of PyTorch's stable C interface is. False where one is
    missing: PyTorch before 2.10.
    """

def supports(build: str, /) -> bool:
    """Tell whether this processor can run a build."""

def source_hash() -> str:
    """Return the hash of the sources it was built from."""
