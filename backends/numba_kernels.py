"""The CPU kernels: one Numba source for NumPy arrays and PyTorch CPU tensors.

Every kernel works on one thread, without the GIL. Memory comes in as an address, strides (in
elements) and a *kind*, ``FLOAT64``, ``FLOAT32``, ``FLOAT16`` or ``BFLOAT16``: scalars told apart by
type, so that a kind is compiled once, whatever the layout, and nothing is copied. The exponent is
``ONE``, ``TWO`` or a float64 likewise, so that only the power asked for is compiled.

Within the kernels the bits of a float16 are an int16, those of a bfloat16 a uint16.

What keeps the numbers right:

- No function is compiled with fast-math: a callee inherits it, and with ``reassoc`` LLVM turns
  ``(x_j - x_y) + margin`` into ``x_j + (margin - x_y)``, which loses the margin of large scores.
  Only the additions of ``_plus`` may be reordered, which is what lets LLVM use vectors; NaN and
  infinities go through.
- float32 sums hold at most ``COLUMNS`` or ``APART`` terms, then go to float64.
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

COLUMNS = 256  # neighbouring classes summed in float32 (by 8 lanes) before the sum goes to float64
APART = (
    32  # the same where they are not neighbours: one lane. 512 for both was off by 1e-6 and 8e-6
)
TILE = 256  # rows walked together where the classes lie further apart than the rows
LONG = 4096  # classes from which on a row is read in quarters rather than beside three others
RUN = 32  # classes of a tile summed in float32 before the sums go to float64
SHORT = 16  # classes of rows that are turned into tiles; at most RUN
LOT = 64  # rows turned into a tile at once: 4 kB of float32

# Python's own scalars: Numba recognises their types faster than NumPy's (0.15 microseconds each).
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = 0.0, 0j, False, 0
ONE, TWO = True, 2
_ELEMENTS = {
    types.float64: types.float64,
    types.complex128: types.float32,
    types.boolean: types.int16,
    types.int64: types.uint16,
}

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


def _kernel(function: Any) -> Any:
    """Compile when first called, keep the result on disk; in memory where no directory will do."""
    try:
        return njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # no directory for the cache can be written
        return njit(nogil=True)(function)


def _computing(kind: Any) -> Any:
    """Return the Numba type in which a kind, or an element, is computed."""
    return kind if kind in (types.float64, types.int32) else types.float32


@intrinsic
def _pointer(typingctx, address, kind):  # type: ignore[no-untyped-def]
    """Make a pointer to elements of a kind from an address."""
    return _cast_address(types.CPointer(_ELEMENTS[kind]), address, kind)


@intrinsic
def _ints(typingctx, address):  # type: ignore[no-untyped-def]
    """Make a pointer to int32 from an address."""
    return _cast_address(types.CPointer(types.int32), address)


@intrinsic
def _integers(typingctx, address):  # type: ignore[no-untyped-def]
    """Make a pointer to int64 from an address."""
    return _cast_address(types.CPointer(types.int64), address)


@intrinsic
def _reals(typingctx, address, like):  # type: ignore[no-untyped-def]
    """Make a pointer to elements of a number's type from an address."""
    return _cast_address(types.CPointer(like), address, like)


def _cast_address(pointer: Any, *arguments: Any) -> Any:
    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.inttoptr(args[0], context.get_value_type(pointer))

    return pointer(*arguments), codegen


@intrinsic
def _like(typingctx, number, value):  # type: ignore[no-untyped-def]
    """Convert to the type in which a kind is computed."""
    result = _computing(number)

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return context.cast(builder, args[1], value, result)

    return result(number, value), codegen


@intrinsic
def _load(typingctx, pointer, index):  # type: ignore[no-untyped-def]
    """Load one element, 16-bit kinds widened to float32 by integer operations, exactly."""
    kind = pointer.dtype

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _widened(builder, kind, builder.load(builder.gep(args[0], [args[1]])))

    return _computing(kind)(pointer, index), codegen


@intrinsic
def _rounded(typingctx, pointer, value):  # type: ignore[no-untyped-def]
    """Round to the pointer's kind, to nearest even for 16-bit ones."""
    kind = pointer.dtype

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        number = context.cast(builder, args[1], value, _computing(kind))
        return _narrowed(builder, kind, number)

    return kind(pointer, value), codegen


# The functions below emit LLVM instructions for numbers and for vectors of eight alike.


def _as(element: Any, like: Any) -> Any:
    """Return a type of the shape of a value's."""
    return ir.VectorType(element, 8) if isinstance(like.type, ir.VectorType) else element


def _constant(value: Any, number: float) -> Any:
    """Return a constant of a value's type."""
    if isinstance(value.type, ir.VectorType):
        return ir.Constant(value.type, [ir.Constant(value.type.element, number)] * 8)
    return ir.Constant(value.type, number)


def _widened(builder: Any, kind: Any, raw: Any) -> Any:
    if kind not in (types.int16, types.uint16):
        return raw
    bits = builder.zext(raw, _as(_I32, raw))
    if kind == types.uint16:
        return builder.bitcast(builder.shl(bits, _constant(bits, 16)), _as(_F32, raw))
    # Exponent and mantissa move to their float32 places; times 2**112 mends the exponent's bias
    # and normalises subnormals; infinity and NaN get the full exponent.
    moved = builder.shl(builder.and_(bits, _constant(bits, 0x7FFF)), _constant(bits, 13))
    scaled = builder.bitcast(moved, _as(_F32, raw))
    finite = builder.bitcast(builder.fmul(scaled, _constant(scaled, 2.0**112)), bits.type)
    special = builder.icmp_unsigned(">=", moved, _constant(bits, 0x0F800000))
    full = builder.or_(finite, _constant(bits, 0x7F800000))
    whole = builder.select(special, full, finite)
    sign = builder.shl(builder.and_(bits, _constant(bits, 0x8000)), _constant(bits, 16))
    return builder.bitcast(builder.or_(whole, sign), _as(_F32, raw))


def _narrowed(builder: Any, kind: Any, number: Any) -> Any:
    if kind not in (types.int16, types.uint16):
        return number
    bits = builder.bitcast(number, _as(_I32, number))
    size = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
    nan = builder.icmp_unsigned(">", size, _constant(bits, 0x7F800000))
    if kind == types.uint16:
        nudged = builder.add(bits, _constant(bits, 0x7FFF))
        nudged = builder.add(nudged, _odd(builder, bits, 16))
        chosen = builder.select(nan, _constant(bits, 0x7FC00000), nudged)
        return builder.trunc(builder.lshr(chosen, _constant(bits, 16)), _as(_I16, number))
    # Normal results: the bias moves by 112, then round at bit 13.
    normal = builder.add(size, _constant(bits, 0xC8000FFF))
    normal = builder.lshr(builder.add(normal, _odd(builder, size, 13)), _constant(bits, 13))
    # Subnormal results: adding 0.5, whose last bit is float16's smallest number, rounds.
    small = builder.bitcast(size, _as(_F32, number))
    small = builder.bitcast(builder.fadd(small, _constant(small, 0.5)), bits.type)
    small = builder.sub(small, _constant(bits, 0x3F000000))
    large = builder.select(nan, _constant(bits, 0x7E00), _constant(bits, 0x7C00))
    is_small = builder.icmp_unsigned("<", size, _constant(bits, 0x38800000))
    is_large = builder.icmp_unsigned(">=", size, _constant(bits, 0x47800000))
    chosen = builder.select(is_large, large, builder.select(is_small, small, normal))
    sign = builder.lshr(builder.and_(bits, _constant(bits, 0x80000000)), _constant(bits, 16))
    return builder.trunc(builder.or_(chosen, sign), _as(_I16, number))


def _odd(builder: Any, bits: Any, place: int) -> Any:
    return builder.and_(builder.lshr(bits, _constant(bits, place)), _constant(bits, 1))


@intrinsic
def _store(typingctx, pointer, index, value):  # type: ignore[no-untyped-def]
    """Store one element, of the pointer's kind."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.store(args[2], builder.gep(args[0], [args[1]]))
        return context.get_dummy_value()

    return types.none(pointer, index, pointer.dtype), codegen


# In a loop that reads and writes four rows at once, LLVM must be told that they don't overlap: it
# checks fewer pairs at run time than these are. Only such loops may use the next two: LLVM may
# take what they touch to be apart from whatever else they touch, in any order.


@intrinsic
def _load_apart(typingctx, pointer, index, lane):  # type: ignore[no-untyped-def]
    """Do what _load does, from memory that only this lane writes; from the lane 9, none does."""
    kind = pointer.dtype
    if not isinstance(lane, types.IntegerLiteral):
        return None
    own = lane.literal_value

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        raw = builder.load(builder.gep(args[0], [args[1]]))
        if own in _LANES:
            raw.set_metadata("alias.scope", _scopes(builder, [own]))
        raw.set_metadata("noalias", _scopes(builder, [i for i in _LANES if i != own]))
        return _widened(builder, kind, raw)

    return _computing(kind)(pointer, index, lane), codegen


@intrinsic
def _store_apart(typingctx, pointer, index, value, lane):  # type: ignore[no-untyped-def]
    """Do what _store does; no two lanes (a literal 0 to 3) write the same memory."""
    if not isinstance(lane, types.IntegerLiteral):
        return None
    own = lane.literal_value

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        stored = builder.store(args[2], builder.gep(args[0], [args[1]]))
        stored.set_metadata("alias.scope", _scopes(builder, [own]))
        stored.set_metadata("noalias", _scopes(builder, [i for i in _LANES if i != own]))
        return context.get_dummy_value()

    return types.none(pointer, index, pointer.dtype, lane), codegen


_LANES = (0, 1, 2, 3)


def _scopes(builder: Any, lanes: Any) -> Any:
    """Name the memory that the lanes write, for LLVM's alias analysis."""
    module = builder.module
    domain = module.add_metadata(["mml gradient"])
    return module.add_metadata([module.add_metadata([f"lane {i}", domain]) for i in lanes])


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


@intrinsic
def _at(typingctx, pointer, index):  # type: ignore[no-untyped-def]
    """Move a pointer by a number of elements."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.gep(args[0], [args[1]])

    return pointer(pointer, index), codegen


def _term(h, p):  # type: ignore[no-untyped-def]
    """Return h ** p."""


def _slope(h, p):  # type: ignore[no-untyped-def]
    """Return h ** (p - 1), and 0 where h is 0."""


def _scaled(pointer, slope, scale, p):  # type: ignore[no-untyped-def]
    """Return slope * scale, rounded to the pointer's kind."""


@overload(_term)
def _term_of(h, p):  # type: ignore[no-untyped-def]
    if p == types.boolean:
        return lambda h, p: h
    if p == types.int64:
        return lambda h, p: h * h
    return lambda h, p: _power(h, p)


@overload(_slope)
def _slope_of(h, p):  # type: ignore[no-untyped-def]
    if p == types.boolean:
        return lambda h, p: _like(h, 1.0) if h > _like(h, 0.0) else _like(h, 0.0)
    if p == types.int64:
        return lambda h, p: h
    return lambda h, p: _power(h, p - 1.0)


@overload(_scaled)
def _scaled_of(pointer, slope, scale, p):  # type: ignore[no-untyped-def]
    if p == types.boolean:  # two values only: LLVM rounds them once, ahead of the loop

        def choose(pointer, slope, scale, p):  # type: ignore[no-untyped-def]
            on, off = _rounded(pointer, scale), _rounded(pointer, scale * _like(scale, 0.0))
            return on if slope > _like(scale, 0.0) else off

        return choose
    return lambda pointer, slope, scale, p: _rounded(pointer, slope * scale)


@njit(nogil=True)
def _power(h, exponent):
    # In float64: an exponent rounded to float32 costs 1e-6 of the power of a large h.
    zero = _like(h, 0.0)
    return zero if h == zero else _like(h, np.float64(h) ** exponent)


@njit(nogil=True)
def _hinge(score, same, x_y, margin):
    """Return max(0, z), 0 for the target's own class; NaN stays NaN."""
    zero = _like(x_y, 0.0)
    z = (score - x_y) + margin
    h = zero if z < zero else z
    return zero if same else h


@njit(nogil=True)
def _sums(x, y, x_y, n, step, margin, p):
    """Sum the terms of four rows of n classes at once."""
    total = (0.0, 0.0, 0.0, 0.0)
    columns = COLUMNS if step == 1 else APART
    for first in range(0, n, columns):
        zero = _like(margin, 0.0)
        s0, s1, s2, s3 = zero, zero, zero, zero
        shift = first * step
        x0, x1, x2, x3 = _at(x[0], shift), _at(x[1], shift), _at(x[2], shift), _at(x[3], shift)
        y0, y1, y2, y3 = y[0] - first, y[1] - first, y[2] - first, y[3] - first
        for j in range(min(columns, n - first)):
            k = j * step
            s0 = _plus(s0, _term(_hinge(_load(x0, k), _same(j, y0), x_y[0], margin), p))
            s1 = _plus(s1, _term(_hinge(_load(x1, k), _same(j, y1), x_y[1], margin), p))
            s2 = _plus(s2, _term(_hinge(_load(x2, k), _same(j, y2), x_y[2], margin), p))
            s3 = _plus(s3, _term(_hinge(_load(x3, k), _same(j, y3), x_y[3], margin), p))
        total = (total[0] + s0, total[1] + s1, total[2] + s2, total[3] + s3)
    return total


@njit(nogil=True)
def _slopes(x, y, x_y, n, step, margin, p, grad, grad_step, scale):
    """Sum the terms and the slopes of four rows of n classes at once, and write the gradient."""
    total = (0.0, 0.0, 0.0, 0.0)
    slope = (0.0, 0.0, 0.0, 0.0)
    columns = COLUMNS if step == 1 else APART
    for first in range(0, n, columns):
        zero = _like(margin, 0.0)
        s0, s1, s2, s3 = zero, zero, zero, zero
        d0, d1, d2, d3 = zero, zero, zero, zero
        shift, to = first * step, first * grad_step
        x0, x1, x2, x3 = _at(x[0], shift), _at(x[1], shift), _at(x[2], shift), _at(x[3], shift)
        g0, g1, g2, g3 = _at(grad[0], to), _at(grad[1], to), _at(grad[2], to), _at(grad[3], to)
        y0, y1, y2, y3 = y[0] - first, y[1] - first, y[2] - first, y[3] - first
        for j in range(min(columns, n - first)):
            k, m = j * step, j * grad_step
            h0 = _hinge(_load_apart(x0, k, 9), _same(j, y0), x_y[0], margin)
            h1 = _hinge(_load_apart(x1, k, 9), _same(j, y1), x_y[1], margin)
            h2 = _hinge(_load_apart(x2, k, 9), _same(j, y2), x_y[2], margin)
            h3 = _hinge(_load_apart(x3, k, 9), _same(j, y3), x_y[3], margin)
            s0, s1 = _plus(s0, _term(h0, p)), _plus(s1, _term(h1, p))
            s2, s3 = _plus(s2, _term(h2, p)), _plus(s3, _term(h3, p))
            e0, e1, e2, e3 = _slope(h0, p), _slope(h1, p), _slope(h2, p), _slope(h3, p)
            d0, d1, d2, d3 = _plus(d0, e0), _plus(d1, e1), _plus(d2, e2), _plus(d3, e3)
            _store_apart(g0, m, _scaled(g0, e0, scale[0], p), 0)
            _store_apart(g1, m, _scaled(g1, e1, scale[1], p), 1)
            _store_apart(g2, m, _scaled(g2, e2, scale[2], p), 2)
            _store_apart(g3, m, _scaled(g3, e3, scale[3], p), 3)
        total = (total[0] + s0, total[1] + s1, total[2] + s2, total[3] + s3)
        slope = (slope[0] + d0, slope[1] + d1, slope[2] + d2, slope[3] + d3)
    return total, slope


@njit(nogil=True)
def _row(kind, x, offsets, row_stride, i):
    """Return a pointer to row i."""
    if offsets == 0:
        return _at(_pointer(x, kind), i * row_stride)
    return _at(_pointer(x, kind), _integers(offsets)[i])


@njit(nogil=True)
def _target(y, n_classes, i):
    """Return row i's target, or -1 for one out of range."""
    value = _integers(y)[i]
    return value if 0 <= value < n_classes else -1


@njit(nogil=True)
def _own_score(x, y, step, margin):
    """Return the target's score; NaN for a target out of range, which makes the row's sum NaN."""
    return _load(x, y * step) if y >= 0 else _like(margin, np.nan)


@njit(nogil=True)
def _weight(margin, weight, y):
    if weight == 0 or y < 0:
        return 1.0
    return np.float64(_load(_reals(weight, margin), y))


@njit(nogil=True)
def _sum_start(x_y, n):
    """Return 0; NaN where the only class is NaN."""
    return np.nan if n == 1 and x_y != x_y else 0.0


@njit(nogil=True)
def _one_sum(x, y, x_y, n, step, margin, p):
    """Sum the terms of one row: its four quarters at once, then what is left."""
    q = n // 4
    quarters = (x, _at(x, q * step), _at(x, 2 * q * step), _at(x, 3 * q * step))
    targets = (y, y - q, y - 2 * q, y - 3 * q)
    s = _sums(quarters, targets, (x_y, x_y, x_y, x_y), q, step, margin, p)
    total = _sum_start(x_y, n) + ((s[0] + s[1]) + (s[2] + s[3]))
    for j in range(4 * q, n):
        total += np.float64(_term(_hinge(_load(x, j * step), j == y, x_y, margin), p))
    return total


@njit(nogil=True)
def _one_slope(x, y, x_y, n, step, margin, p, grad, grad_step, scale):
    """Sum the terms and the slopes of one row, and write its gradient, as _one_sum walks it."""
    q = n // 4
    quarters = (x, _at(x, q * step), _at(x, 2 * q * step), _at(x, 3 * q * step))
    targets = (y, y - q, y - 2 * q, y - 3 * q)
    to = q * grad_step
    grads = (grad, _at(grad, to), _at(grad, 2 * to), _at(grad, 3 * to))
    own, scales = (x_y, x_y, x_y, x_y), (scale, scale, scale, scale)
    s, d = _slopes(quarters, targets, own, q, step, margin, p, grads, grad_step, scales)
    total = _sum_start(x_y, n) + ((s[0] + s[1]) + (s[2] + s[3]))
    slope = (d[0] + d[1]) + (d[2] + d[3])
    for j in range(4 * q, n):
        h = _hinge(_load(x, j * step), j == y, x_y, margin)
        e = _slope(h, p)
        total += np.float64(_term(h, p))
        slope += np.float64(e)
        _store(grad, j * grad_step, _scaled(grad, e, scale, p))
    return total, slope


@njit(nogil=True)
def _end_loss(kind, losses, i, n_classes, loss):
    """Store a row's loss where losses are asked for; it is still to be divided by C."""
    if losses != 0:
        out = _pointer(losses, kind)
        _store(out, i, _rounded(out, loss / n_classes))
    return loss


@njit(nogil=True)
def _end_grad(grad, grad_step, y, n, total, slope, scale):
    """Write a row's gradient at its target; NaN all over the row where the loss is NaN."""
    if total != total:
        for j in range(n):
            _store(grad, j * grad_step, _rounded(grad, total))
    else:
        _store(grad, y * grad_step, _rounded(grad, -slope * scale))


@_kernel
def loss_rows(
    kind, x, offsets, row_stride, step, y, weight, n_classes, start, stop, margin, p, losses
):
    """Sum the losses, times C, of rows start <= i < stop; store them where losses isn't 0.

    Row i begins at offsets[i], or at i * row_stride where offsets is 0; its classes are step apart.
    Addresses: x, offsets (int64), y (int64), weight (computing type), losses (kind).

    Returns the sum, and the first row whose target is out of range, or stop.
    """
    m = _like(kind, margin)
    q = (stop - start) // 4 if n_classes < LONG else 0
    total, bad = 0.0, stop
    for i in range(start, start + q):
        i1, i2, i3 = i + q, i + 2 * q, i + 3 * q
        x0 = _row(kind, x, offsets, row_stride, i)
        x1 = _row(kind, x, offsets, row_stride, i1)
        x2 = _row(kind, x, offsets, row_stride, i2)
        x3 = _row(kind, x, offsets, row_stride, i3)
        y0, y1 = _target(y, n_classes, i), _target(y, n_classes, i1)
        y2, y3 = _target(y, n_classes, i2), _target(y, n_classes, i3)
        v0, v1 = _own_score(x0, y0, step, m), _own_score(x1, y1, step, m)
        v2, v3 = _own_score(x2, y2, step, m), _own_score(x3, y3, step, m)
        s = _sums((x0, x1, x2, x3), (y0, y1, y2, y3), (v0, v1, v2, v3), n_classes, step, m, p)
        start0, start1 = _sum_start(v0, n_classes), _sum_start(v1, n_classes)
        start2, start3 = _sum_start(v2, n_classes), _sum_start(v3, n_classes)
        s0 = _end_loss(kind, losses, i, n_classes, (start0 + s[0]) * _weight(m, weight, y0))
        s1 = _end_loss(kind, losses, i1, n_classes, (start1 + s[1]) * _weight(m, weight, y1))
        s2 = _end_loss(kind, losses, i2, n_classes, (start2 + s[2]) * _weight(m, weight, y2))
        s3 = _end_loss(kind, losses, i3, n_classes, (start3 + s[3]) * _weight(m, weight, y3))
        total += (s0 + s1) + (s2 + s3)
        if y0 < 0 or y1 < 0 or y2 < 0 or y3 < 0:
            bad = min(bad, i if y0 < 0 else i1 if y1 < 0 else i2 if y2 < 0 else i3)
    for i in range(start + 4 * q, stop):
        row = _row(kind, x, offsets, row_stride, i)
        y0 = _target(y, n_classes, i)
        v0 = _own_score(row, y0, step, m)
        if n_classes < LONG:  # as above, so that a loss doesn't depend on where its row stands
            s = _sums(
                (row, row, row, row), (y0, y0, y0, y0), (v0, v0, v0, v0), n_classes, step, m, p
            )
            s0 = _sum_start(v0, n_classes) + s[0]
        else:
            s0 = _one_sum(row, y0, v0, n_classes, step, m, p)
        total += _end_loss(kind, losses, i, n_classes, s0 * _weight(m, weight, y0))
        if y0 < 0:
            bad = min(bad, i)
    return total, bad


@_kernel
def loss_of_arrays(kind, x, y, margin, p):
    """Do what loss_rows does with all rows of two contiguous NumPy arrays, (N, C) and (N,).

    Numba takes an array apart faster than Python reads its address (1.3 microseconds).
    """
    n, c = x.shape
    return loss_rows(kind, x.ctypes.data, 0, c, 1, y.ctypes.data, 0, c, 0, n, margin, p, 0)


@_kernel
def loss_of_memory(kind, x, y, n, c, margin, p):
    """Do what loss_rows does with all rows of contiguous memory; fewer arguments take less time."""
    return loss_rows(kind, x, 0, c, 1, y, 0, c, 0, n, margin, p, 0)


@njit(nogil=True)
def _row_scale(upstream, scale, weight, i):
    if upstream == 0:
        return scale * weight
    return scale * weight * _reals(upstream, 0.0)[i]


@_kernel
def grad_rows(
    kind,
    x,
    offsets,
    row_stride,
    step,
    y,
    weight,
    n_classes,
    start,
    stop,
    margin,
    p,
    losses,
    grad,
    grad_offsets,
    grad_row_stride,
    grad_step,
    scale,
    upstream,
):
    """Do what loss_rows does, and write the gradient.

    A row's gradient is that of its loss, times C, times scale, times upstream[i] (an address of
    float64) where upstream isn't 0.
    """
    m = _like(kind, margin)
    q = (stop - start) // 4 if n_classes < LONG else 0
    total, bad = 0.0, stop
    for i in range(start, start + q):
        i1, i2, i3 = i + q, i + 2 * q, i + 3 * q
        x0 = _row(kind, x, offsets, row_stride, i)
        x1 = _row(kind, x, offsets, row_stride, i1)
        x2 = _row(kind, x, offsets, row_stride, i2)
        x3 = _row(kind, x, offsets, row_stride, i3)
        g0 = _row(kind, grad, grad_offsets, grad_row_stride, i)
        g1 = _row(kind, grad, grad_offsets, grad_row_stride, i1)
        g2 = _row(kind, grad, grad_offsets, grad_row_stride, i2)
        g3 = _row(kind, grad, grad_offsets, grad_row_stride, i3)
        y0, y1 = _target(y, n_classes, i), _target(y, n_classes, i1)
        y2, y3 = _target(y, n_classes, i2), _target(y, n_classes, i3)
        v0, v1 = _own_score(x0, y0, step, m), _own_score(x1, y1, step, m)
        v2, v3 = _own_score(x2, y2, step, m), _own_score(x3, y3, step, m)
        w0, w1 = _weight(m, weight, y0), _weight(m, weight, y1)
        w2, w3 = _weight(m, weight, y2), _weight(m, weight, y3)
        c0, c1 = _row_scale(upstream, scale, w0, i), _row_scale(upstream, scale, w1, i1)
        c2, c3 = _row_scale(upstream, scale, w2, i2), _row_scale(upstream, scale, w3, i3)
        s, d = _slopes(
            (x0, x1, x2, x3),
            (y0, y1, y2, y3),
            (v0, v1, v2, v3),
            n_classes,
            step,
            m,
            p,
            (g0, g1, g2, g3),
            grad_step,
            (_like(m, c0), _like(m, c1), _like(m, c2), _like(m, c3)),
        )
        s0, s1 = _sum_start(v0, n_classes) + s[0], _sum_start(v1, n_classes) + s[1]
        s2, s3 = _sum_start(v2, n_classes) + s[2], _sum_start(v3, n_classes) + s[3]
        _end_grad(g0, grad_step, y0, n_classes, s0, d[0], c0)
        _end_grad(g1, grad_step, y1, n_classes, s1, d[1], c1)
        _end_grad(g2, grad_step, y2, n_classes, s2, d[2], c2)
        _end_grad(g3, grad_step, y3, n_classes, s3, d[3], c3)
        s0 = _end_loss(kind, losses, i, n_classes, s0 * w0)
        s1 = _end_loss(kind, losses, i1, n_classes, s1 * w1)
        s2 = _end_loss(kind, losses, i2, n_classes, s2 * w2)
        s3 = _end_loss(kind, losses, i3, n_classes, s3 * w3)
        total += (s0 + s1) + (s2 + s3)
        if y0 < 0 or y1 < 0 or y2 < 0 or y3 < 0:
            bad = min(bad, i if y0 < 0 else i1 if y1 < 0 else i2 if y2 < 0 else i3)
    for i in range(start + 4 * q, stop):
        row = _row(kind, x, offsets, row_stride, i)
        g0 = _row(kind, grad, grad_offsets, grad_row_stride, i)
        y0 = _target(y, n_classes, i)
        w0 = _weight(m, weight, y0)
        c0 = _row_scale(upstream, scale, w0, i)
        v0 = _own_score(row, y0, step, m)
        scale0 = _like(m, c0)
        if n_classes < LONG:
            s, d = _slopes(
                (row, row, row, row),
                (y0, y0, y0, y0),
                (v0, v0, v0, v0),
                n_classes,
                step,
                m,
                p,
                (g0, g0, g0, g0),
                grad_step,
                (scale0, scale0, scale0, scale0),
            )
            s0, d0 = _sum_start(v0, n_classes) + s[0], d[0]
        else:
            s0, d0 = _one_slope(row, y0, v0, n_classes, step, m, p, g0, grad_step, scale0)
        _end_grad(g0, grad_step, y0, n_classes, s0, d0, c0)
        total += _end_loss(kind, losses, i, n_classes, s0 * w0)
        if y0 < 0:
            bad = min(bad, i)
    return total, bad


@njit(nogil=True)
def _tile_targets(tile, y, first, count, row_stride, step, n_classes, own, own_scores, total):
    """Prepare the rows of a tile; return the first one whose target is out of range, or count."""
    bad = count
    for t in range(count):
        target = _target(y, n_classes, first + t)
        own[t] = target
        own_scores[t] = _own_score(_at(tile, t * row_stride), target, step, own_scores[0])
        total[t] = _sum_start(own_scores[t], n_classes)
        if target < 0:
            bad = min(bad, t)
    return bad


@njit(nogil=True)
def _tile_sums(column, j, count, row_stride, own, own_scores, margin, p, part):
    """Add the terms of class j to each row's sum. The last arguments are pointers."""
    for t in range(count):
        same = _same(j, np.int64(_load_apart(own, t, 9)))
        score, own_score = _load_apart(column, t * row_stride, 9), _load_apart(own_scores, t, 9)
        term = _term(_hinge(score, same, own_score, margin), p)
        _store_apart(part, t, _load_apart(part, t, 0) + term, 0)


@njit(nogil=True)
def _tile_slopes(
    column,
    j,
    count,
    row_stride,
    own,
    own_scores,
    margin,
    p,
    part,
    slopes,
    grad,
    grad_stride,
    scales,
):
    """Add the terms and the slopes of class j to each row's sums, and write its gradient."""
    for t in range(count):
        same = _same(j, np.int64(_load_apart(own, t, 9)))
        score, own_score = _load_apart(column, t * row_stride, 9), _load_apart(own_scores, t, 9)
        h = _hinge(score, same, own_score, margin)
        e = _slope(h, p)
        _store_apart(part, t, _load_apart(part, t, 0) + _term(h, p), 0)
        _store_apart(slopes, t, _load_apart(slopes, t, 1) + e, 1)
        gradient = _rounded(grad, e * _load_apart(scales, t, 9))
        _store_apart(grad, t * grad_stride, gradient, 2)


@njit(nogil=True)
def _move(part, total, count):
    """Add the short sums to the long ones, and start the short ones again."""
    for t in range(count):
        total[t] += part[t]
        part[t] = 0


@_kernel
def loss_tiles(
    kind, x, offsets, row_stride, step, y, weight, n_classes, start, stop, margin, p, losses
):
    """Do what loss_rows does, where neighbours in memory are rows; offsets isn't looked at."""
    m = _like(kind, margin)
    own, own_scores, part = np.empty(TILE, np.int32), np.full(TILE, m), np.full(TILE, m - m)
    total, result, bad = np.empty(TILE, np.float64), 0.0, stop
    targets, own_at = _ints(own.ctypes.data), _reals(own_scores.ctypes.data, m)
    part_at = _reals(part.ctypes.data, m)
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        tile = _at(_pointer(x, kind), first * row_stride)
        wrong = _tile_targets(
            tile, y, first, count, row_stride, step, n_classes, own, own_scores, total
        )
        if wrong < count:
            bad = min(bad, first + wrong)
        for run in range(0, n_classes, RUN):
            for j in range(run, min(run + RUN, n_classes)):
                column = _at(tile, j * step)
                if row_stride == 1:
                    _tile_sums(column, j, count, 1, targets, own_at, m, p, part_at)
                else:
                    _tile_sums(column, j, count, row_stride, targets, own_at, m, p, part_at)
            _move(part, total, count)
        for t in range(count):
            w = _weight(m, weight, np.int64(own[t]))
            result += _end_loss(kind, losses, first + t, n_classes, total[t] * w)
    return result, bad


@_kernel
def grad_tiles(
    kind,
    x,
    offsets,
    row_stride,
    step,
    y,
    weight,
    n_classes,
    start,
    stop,
    margin,
    p,
    losses,
    grad,
    grad_offsets,
    grad_row_stride,
    grad_step,
    scale,
    upstream,
):
    """Do what grad_rows does, where neighbours in memory are rows; offsets aren't looked at."""
    m = _like(kind, margin)
    own, own_scores, part = np.empty(TILE, np.int32), np.full(TILE, m), np.full(TILE, m - m)
    slopes, scales = np.full(TILE, m - m), np.full(TILE, m)
    total, slope = np.empty(TILE, np.float64), np.empty(TILE, np.float64)
    wide, result, bad = np.empty(TILE, np.float64), 0.0, stop
    targets, own_at = _ints(own.ctypes.data), _reals(own_scores.ctypes.data, m)
    part_at = _reals(part.ctypes.data, m)
    slopes_at, scales_at = _reals(slopes.ctypes.data, m), _reals(scales.ctypes.data, m)
    for first in range(start, stop, TILE):
        count = min(TILE, stop - first)
        tile = _at(_pointer(x, kind), first * row_stride)
        out = _at(_pointer(grad, kind), first * grad_row_stride)
        wrong = _tile_targets(
            tile, y, first, count, row_stride, step, n_classes, own, own_scores, total
        )
        if wrong < count:
            bad = min(bad, first + wrong)
        for t in range(count):
            w = _weight(m, weight, np.int64(own[t]))
            wide[t] = _row_scale(upstream, scale, w, first + t)
            scales[t] = wide[t]
            slope[t] = 0.0
        for run in range(0, n_classes, RUN):
            for j in range(run, min(run + RUN, n_classes)):
                column, to = _at(tile, j * step), _at(out, j * grad_step)
                if row_stride == 1 and grad_row_stride == 1:
                    _tile_slopes(
                        column,
                        j,
                        count,
                        1,
                        targets,
                        own_at,
                        m,
                        p,
                        part_at,
                        slopes_at,
                        to,
                        1,
                        scales_at,
                    )
                else:
                    _tile_slopes(
                        column,
                        j,
                        count,
                        row_stride,
                        targets,
                        own_at,
                        m,
                        p,
                        part_at,
                        slopes_at,
                        to,
                        grad_row_stride,
                        scales_at,
                    )
            _move(part, total, count)
            _move(slopes, slope, count)
        for t in range(count):
            target = np.int64(own[t])
            to = _at(out, t * grad_row_stride)
            _end_grad(to, grad_step, target, n_classes, total[t], slope[t], wide[t])
            w = _weight(m, weight, target)
            result += _end_loss(kind, losses, first + t, n_classes, total[t] * w)
    return result, bad


@_kernel
def own_rows(kind, x, offsets, row_stride, step, y, first, n_classes, count, own):
    """Write the targets' scores where these are among the classes from ``first`` on, else 0.

    Addresses: y (int64), own (computing type).
    """
    zero = _like(kind, 0.0)
    targets, out = _integers(y), _reals(own, zero)
    for i in range(count):
        place = targets[i] - first
        row = _row(kind, x, offsets, row_stride, i)
        out[i] = _load(row, place * step) if 0 <= place < n_classes else zero


@_kernel
def part_rows(kind, x, offsets, row_stride, step, y, first, n_classes, count, own, margin, p, sums):
    """Sum the rows' terms over the classes from ``first`` on, the targets' scores given.

    Addresses: y (int64; may be out of range where own is NaN), own (computing type), sums
    (float64).
    """
    m = _like(kind, margin)
    targets, scores = _integers(y), _reals(own, m)
    out = _reals(sums, 0.0)
    q = count // 4
    for i in range(q):
        i1, i2, i3 = i + q, i + 2 * q, i + 3 * q
        x0 = _row(kind, x, offsets, row_stride, i)
        x1 = _row(kind, x, offsets, row_stride, i1)
        x2 = _row(kind, x, offsets, row_stride, i2)
        x3 = _row(kind, x, offsets, row_stride, i3)
        places = (targets[i] - first, targets[i1] - first, targets[i2] - first, targets[i3] - first)
        v = (scores[i], scores[i1], scores[i2], scores[i3])
        s = _sums((x0, x1, x2, x3), places, v, n_classes, step, m, p)
        out[i], out[i1], out[i2], out[i3] = s
    for i in range(4 * q, count):
        row = _row(kind, x, offsets, row_stride, i)
        y0, v0 = targets[i] - first, scores[i]
        s = _sums((row, row, row, row), (y0, y0, y0, y0), (v0, v0, v0, v0), n_classes, step, m, p)
        out[i] = s[0]


@_kernel
def grad_of_memory(kind, x, y, n, c, margin, p, grad, scale, upstream):
    """Write the gradient of all rows of contiguous memory.

    The upstream gradient is one number of the computing type, at an address.
    """
    factor = scale * np.float64(_reals(upstream, _like(kind, 0.0))[0])
    return grad_rows(kind, x, 0, c, 1, y, 0, c, 0, n, margin, p, 0, grad, 0, c, 1, factor, 0)


@intrinsic
def _square(typingctx, source, stride, to, to_stride):  # type: ignore[no-untyped-def]
    """Copy 8 rows of 8 neighbours to 8 columns of 8 neighbours, from one kind to another.

    The strides lie between the rows of the source and between the columns of the copy.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        rows = []
        for i in range(8):
            row = builder.load(_vector_at(builder, args[0], args[1], i), align=1)
            rows.append(_widened(builder, source.dtype, row))
        for low, high, apart in _EXCHANGES:
            rows = _exchange(builder, rows, low, high, apart)
        for i, column in enumerate(rows):
            number = _narrowed(builder, to.dtype, column)
            builder.store(number, _vector_at(builder, args[2], args[3], i), align=1)
        return context.get_dummy_value()

    return types.none(source, stride, to, to_stride), codegen


# Each step pairs vectors 1, 2, 4 apart, and says which elements of the pair make the new two.
_EXCHANGES = (
    ((0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15), 1),
    ((0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15), 2),
    ((0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15), 4),
)


def _exchange(builder: Any, rows: list[Any], low: Any, high: Any, apart: int) -> list[Any]:
    result = list(rows)
    for i in range(8):
        if not i & apart:
            for choice, place in ((low, i), (high, i + apart)):
                mask = ir.Constant(ir.VectorType(_I32, 8), [_I32(k) for k in choice])
                result[place] = builder.shuffle_vector(rows[i], rows[i + apart], mask)
    return result


def _vector_at(builder: Any, pointer: Any, stride: Any, i: int) -> Any:
    first = builder.gep(pointer, [builder.mul(stride, ir.Constant(stride.type, i))])
    return builder.bitcast(first, ir.VectorType(pointer.type.pointee, 8).as_pointer())


@njit(nogil=True)
def _turn(kind, x, offsets, row_stride, step, first, count, n, turned):
    """Copy rows into a tile, whose classes are LOT elements apart, in the computing precision."""
    tile = _reals(turned.ctypes.data, turned[0])
    if offsets != 0 or step != 1:
        for t in range(count):
            row = _row(kind, x, offsets, row_stride, first + t)
            for j in range(n):
                _store(tile, j * LOT + t, _load(row, j * step))
        return
    rows = _at(_pointer(x, kind), first * row_stride)
    done = count // 8 * 8 if n >= 8 else 0
    for t in range(0, done, 8):
        for j in range(0, n, 8):
            k = min(j, n - 8)
            _square(_at(rows, t * row_stride + k), row_stride, _at(tile, k * LOT + t), LOT)
    for j in range(n):
        for t in range(done, count):
            _store(tile, j * LOT + t, _load(rows, t * row_stride + j))


@njit(nogil=True)
def _turn_back(kind, grad, offsets, row_stride, step, first, count, n, turned):
    """Copy a tile of gradients into rows."""
    tile = _reals(turned.ctypes.data, turned[0])
    if offsets != 0 or step != 1:
        for t in range(count):
            row = _row(kind, grad, offsets, row_stride, first + t)
            for j in range(n):
                _store(row, j * step, _rounded(row, _load(tile, j * LOT + t)))
        return
    rows = _at(_pointer(grad, kind), first * row_stride)
    done = count // 8 * 8 if n >= 8 else 0
    for t in range(0, done, 8):
        for j in range(0, n, 8):
            k = min(j, n - 8)
            _square(_at(tile, k * LOT + t), LOT, _at(rows, t * row_stride + k), row_stride)
    for t in range(done, count):
        for j in range(n):
            _store(rows, t * row_stride + j, _rounded(rows, _load(tile, j * LOT + t)))


@njit(nogil=True)
def _lot_targets(y, first, count, n, tile, own, own_scores, part):
    """Prepare the rows of a tile; return the first one whose target is out of range, or count."""
    bad = count
    for t in range(count):
        target = _target(y, n, first + t)
        own[t] = target
        own_scores[t] = _own_score(_at(tile, t), target, LOT, own_scores[0])
        part[t] = _sum_start(own_scores[t], n)
        if target < 0:
            bad = min(bad, t)
    return bad


# A pointer doesn't keep its array alive: each array is used as such within the loop, too.


@_kernel
def loss_lots(
    kind, x, offsets, row_stride, step, y, weight, n_classes, start, stop, margin, p, losses
):
    """Do what loss_rows does, where rows are short (SHORT) and many."""
    m = _like(kind, margin)
    tile, own = np.full(SHORT * LOT, m), np.empty(LOT, np.int32)
    own_scores, part = np.full(LOT, m), np.full(LOT, m)
    columns, result, bad = _reals(tile.ctypes.data, m), 0.0, stop
    targets, own_at = _ints(own.ctypes.data), _reals(own_scores.ctypes.data, m)
    part_at = _reals(part.ctypes.data, m)
    for first in range(start, stop, LOT):
        count = min(LOT, stop - first)
        _turn(kind, x, offsets, row_stride, step, first, count, n_classes, tile)
        wrong = _lot_targets(y, first, count, n_classes, columns, own, own_scores, part)
        if wrong < count:
            bad = min(bad, first + wrong)
        for j in range(n_classes):
            _tile_sums(_at(columns, j * LOT), j, count, 1, targets, own_at, m, p, part_at)
        for t in range(count):
            w = _weight(m, weight, np.int64(own[t]))
            result += _end_loss(kind, losses, first + t, n_classes, np.float64(part[t]) * w)
    return result, bad


@_kernel
def grad_lots(
    kind,
    x,
    offsets,
    row_stride,
    step,
    y,
    weight,
    n_classes,
    start,
    stop,
    margin,
    p,
    losses,
    grad,
    grad_offsets,
    grad_row_stride,
    grad_step,
    scale,
    upstream,
):
    """Do what grad_rows does, where rows are short (SHORT) and many."""
    m = _like(kind, margin)
    tile, out, own = np.full(SHORT * LOT, m), np.full(SHORT * LOT, m), np.empty(LOT, np.int32)
    own_scores, part, slopes = np.full(LOT, m), np.full(LOT, m), np.full(LOT, m)
    scales, wide = np.full(LOT, m), np.empty(LOT, np.float64)
    columns, outs, result, bad = _reals(tile.ctypes.data, m), _reals(out.ctypes.data, m), 0.0, stop
    targets, own_at = _ints(own.ctypes.data), _reals(own_scores.ctypes.data, m)
    part_at = _reals(part.ctypes.data, m)
    slopes_at, scales_at = _reals(slopes.ctypes.data, m), _reals(scales.ctypes.data, m)
    for first in range(start, stop, LOT):
        count = min(LOT, stop - first)
        _turn(kind, x, offsets, row_stride, step, first, count, n_classes, tile)
        wrong = _lot_targets(y, first, count, n_classes, columns, own, own_scores, part)
        if wrong < count:
            bad = min(bad, first + wrong)
        for t in range(count):
            w = _weight(m, weight, np.int64(own[t]))
            wide[t] = _row_scale(upstream, scale, w, first + t)
            scales[t] = wide[t]
            slopes[t] = 0.0
        for j in range(n_classes):
            _tile_slopes(
                _at(columns, j * LOT),
                j,
                count,
                1,
                targets,
                own_at,
                m,
                p,
                part_at,
                slopes_at,
                _at(outs, j * LOT),
                1,
                scales_at,
            )
        for t in range(count):
            target, total = np.int64(own[t]), np.float64(part[t])
            _end_grad(_at(outs, t), LOT, target, n_classes, total, np.float64(slopes[t]), wide[t])
            w = _weight(m, weight, target)
            result += _end_loss(kind, losses, first + t, n_classes, total * w)
        _turn_back(
            kind, grad, grad_offsets, grad_row_stride, grad_step, first, count, n_classes, out
        )
    return result, bad
