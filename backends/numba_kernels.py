"""The CPU kernels: one Numba source for NumPy arrays and PyTorch CPU tensors.

Every kernel works on one thread, without the GIL. Memory comes in as an address, strides (in
elements) and a *kind*, a scalar whose type says what lies there: ``float64``, ``float32``,
``int16`` for the bits of float16, ``uint16`` for the bits of bfloat16. So a kind is compiled once,
whatever the layout, and nothing is copied. The exponent is a kind too: ``ONE``, ``TWO`` or a
float64, so that only the power asked for is compiled.

What keeps the numbers right:

- No function is compiled with fast-math: a callee inherits it, and with ``reassoc`` LLVM turns
  ``(x_j - x_y) + margin`` into ``x_j + (margin - x_y)``, which loses the margin of large scores.
  Only the additions of ``_plus`` may be reordered, which is what lets LLVM use vectors; NaN and
  infinities go through.
- float32 sums hold at most ``COLUMNS`` terms, then go to float64.
- A block of rows is always the same rows summed in the same order, so results do not depend on
  who runs it.

What makes it fast: four rows (or the four quarters of one long row) are read at once, far apart
from each other. One stream of loads reached 19 GB/s on one core of an EPYC 7003, four 27 GB/s. The
target is left out by comparing 32-bit indices, which costs a vector two instructions and no
branch.

Everything is in this one file, as Numba's cache on disk sees no change in a callee elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

COLUMNS = 512  # classes summed in float32 before the sum goes to float64
TILE = 256  # rows walked together where the classes lie further apart than the rows
RUN = 32  # classes of a tile summed in float32 before the sums go to float64

FLOAT64, FLOAT32 = np.float64(0), np.float32(0)
FLOAT16, BFLOAT16 = np.int16(0), np.uint16(0)
ONE, TWO = np.int8(1), np.int16(2)

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def _computing(kind: Any) -> Any:
    """Return the Numba type in which a kind is computed."""
    return types.float64 if kind == types.float64 else types.float32


@intrinsic
def _pointer(typingctx, address, kind):  # type: ignore[no-untyped-def]
    """Make a pointer to elements of a kind from an address."""
    result = types.CPointer(kind)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, kind), codegen


@intrinsic
def _like(typingctx, number, value):  # type: ignore[no-untyped-def]
    """Convert a number to the type of another one; integers stand for the kinds and exponents."""
    result = _computing(number)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.cast(builder, args[1], value, result)

    return result(number, value), codegen


@intrinsic
def _load(typingctx, pointer, index):  # type: ignore[no-untyped-def]
    """Load one element, 16-bit kinds widened to float32 by integer operations, exactly."""
    kind = pointer.dtype
    result = _computing(kind)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        raw = builder.load(builder.gep(args[0], [args[1]]))
        if kind == types.uint16:
            return builder.bitcast(builder.shl(builder.zext(raw, _I32), _I32(16)), _F32)
        if kind == types.int16:
            return _widen_float16(builder, builder.zext(raw, _I32))
        return raw

    return result(pointer, index), codegen


def _widen_float16(builder: Any, bits: Any) -> Any:
    # Exponent and mantissa move to their float32 places; times 2**112 mends the exponent's bias
    # and normalises subnormals; infinity and NaN get the full exponent.
    moved = builder.shl(builder.and_(bits, _I32(0x7FFF)), _I32(13))
    scaled = builder.fmul(builder.bitcast(moved, _F32), _F32(2.0**112))
    finite = builder.bitcast(scaled, _I32)
    special = builder.icmp_unsigned(">=", moved, _I32(0x0F800000))
    whole = builder.select(special, builder.or_(finite, _I32(0x7F800000)), finite)
    sign = builder.shl(builder.and_(bits, _I32(0x8000)), _I32(16))
    return builder.bitcast(builder.or_(whole, sign), _F32)


@intrinsic
def _store(typingctx, pointer, index, value):  # type: ignore[no-untyped-def]
    """Store one element, rounded to nearest even for 16-bit kinds."""
    kind = pointer.dtype

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number = context.cast(builder, args[2], value, _computing(kind))
        if kind == types.uint16:
            number = _round_bfloat16(builder, builder.bitcast(number, _I32))
        elif kind == types.int16:
            number = _round_float16(builder, builder.bitcast(number, _I32))
        builder.store(number, builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.none(pointer, index, value), codegen


def _odd(builder: Any, bits: Any, place: int) -> Any:
    return builder.and_(builder.lshr(bits, _I32(place)), _I32(1))


def _round_bfloat16(builder: Any, bits: Any) -> Any:
    nudged = builder.add(builder.add(bits, _I32(0x7FFF)), _odd(builder, bits, 16))
    size = builder.and_(bits, _I32(0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", size, _I32(0x7F800000))
    chosen = builder.select(nan, _I32(0x7FC00000), nudged)
    return builder.trunc(builder.lshr(chosen, _I32(16)), _I16)


def _round_float16(builder: Any, bits: Any) -> Any:
    size = builder.and_(bits, _I32(0x7FFFFFFF))
    # Normal results: the bias moves by 112, then round at bit 13.
    normal = builder.add(builder.add(size, _I32(0xC8000FFF)), _odd(builder, size, 13))
    normal = builder.lshr(normal, _I32(13))
    # Subnormal results: adding 0.5, whose last bit is float16's smallest number, rounds.
    small = builder.fadd(builder.bitcast(size, _F32), _F32(0.5))
    small = builder.sub(builder.bitcast(small, _I32), _I32(0x3F000000))
    nan = builder.icmp_unsigned(">", size, _I32(0x7F800000))
    large = builder.select(nan, _I32(0x7E00), _I32(0x7C00))
    chosen = builder.select(builder.icmp_unsigned("<", size, _I32(0x38800000)), small, normal)
    chosen = builder.select(builder.icmp_unsigned(">=", size, _I32(0x47800000)), large, chosen)
    sign = builder.lshr(builder.and_(bits, _I32(0x80000000)), _I32(16))
    return builder.trunc(builder.or_(chosen, sign), _I16)


@intrinsic
def _plus(typingctx, total, term):  # type: ignore[no-untyped-def]
    """Add a term to a sum, in whatever order suits."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fadd(*args, flags=("reassoc", "nsz"))

    return total(total, term), codegen


@intrinsic
def _same(typingctx, j, y):  # type: ignore[no-untyped-def]
    """Compare two indices below 2**31 as 32-bit integers: eight fit in a vector, not four."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.icmp_signed("==", *(builder.trunc(a, _I32) for a in args))

    return types.boolean(j, y), codegen


def _term(h, p):  # type: ignore[no-untyped-def]
    """Return h ** p."""


def _slope(h, p):  # type: ignore[no-untyped-def]
    """Return h ** (p - 1), and 0 where h is 0."""


@overload(_term)
def _term_of(h, p):  # type: ignore[no-untyped-def]
    if p == types.int8:
        return lambda h, p: h
    if p == types.int16:
        return lambda h, p: h * h
    return lambda h, p: h**p


@overload(_slope)
def _slope_of(h, p):  # type: ignore[no-untyped-def]
    if p == types.int8:
        return lambda h, p: _unit(h)
    if p == types.int16:
        return lambda h, p: h
    return lambda h, p: h ** (p - _like(p, 1.0))


@njit(nogil=True)
def _unit(h):
    return _like(h, 1.0) if h > _like(h, 0.0) else _like(h, 0.0)


@njit(nogil=True)
def _hinge(x, j, y, x_y, margin):
    """Return max(0, z) of class j, 0 at the target y; NaN stays NaN."""
    zero = _like(x_y, 0.0)
    z = (_load(x, j) - x_y) + margin
    return zero if (z < zero or _same(j, y)) else z
