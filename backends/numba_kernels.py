"""The CPU kernels: one Numba source for NumPy arrays and PyTorch CPU tensors.

Every kernel works on one thread, without the GIL. Memory comes in as an address, strides (in
elements) and a *kind*, ``FLOAT64``, ``FLOAT32``, ``FLOAT16`` or ``BFLOAT16``: scalars told apart by
type, so that a kind is compiled once, whatever the layout, and nothing is copied. The exponent is
``ONE``, ``TWO`` or a float64 likewise, so that only the power asked for is compiled.

Within the kernels the bits of a float16 are an int16, those of a bfloat16 a uint16.

What keeps the numbers right:

- No function is compiled with fast-math: a callee inherits it, and with ``reassoc`` LLVM turns
  ``(x_j - x_y) + margin`` into ``x_j + (margin - x_y)``, which loses the margin of large scores.
- A lane adds at most 32 numbers in float32, then the sum goes to float64.
- A block of rows is always the same rows summed in the same order, so results do not depend on
  who runs it.

What makes it fast: rows are walked in explicit vectors (``Eight``), whose last one overlaps the one
before it, so that no row ends in single steps. The target is left out by comparing 32-bit indices,
which costs a vector two instructions and no branch.

Everything is in this one file, as Numba's cache on disk sees no change in a callee elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, typeof, types
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

COLUMNS = 1024  # neighbouring classes summed by 32 lanes before the sum goes to float64
TILE = 256  # rows walked together where the classes lie further apart than the rows
TURNS = 64  # blocks (4 ms) after which Python gets to see a Ctrl-C
RUN = 32  # terms (of a tile, of short rows) summed in one lane before the sum goes to float64

# Python's own scalars: Numba recognises their types faster than NumPy's (0.15 microseconds each).
FLOAT64, FLOAT32, FLOAT16, BFLOAT16 = 0.0, 0j, False, 0
ONE, TWO = True, 2
NONE = False  # no bits are to be kept
UNIT = True  # the step between classes that are neighbours; needs 8 of them
_ELEMENTS = {
    types.float64: types.float64,
    types.complex128: types.float32,
    types.boolean: types.int16,
    types.int64: types.uint16,
}

_I16, _I32 = ir.IntType(16), ir.IntType(32)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_LLVM = {types.float64: _F64, types.float32: _F32, types.int16: _I16, types.uint16: _I16}


class Eight(types.Type):  # type: ignore[misc]
    """A vector of eight numbers, or of their 16 bits."""

    def __init__(self, dtype: Any) -> None:
        super().__init__(f"Eight({dtype})")
        self.dtype = dtype


@register_model(Eight)
class _EightModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(_LLVM[kind.dtype], 8))


def _kernel(function: Any) -> Any:
    """Compile when first called, keep the result on disk; in memory where no directory will do."""
    try:
        return njit(nogil=True, cache=True)(function)
    except (RuntimeError, OSError):  # no directory for the cache can be written
        return njit(nogil=True)(function)


def compiled(kernel: Any, *arguments: Any) -> Any:
    """Compile a kernel for scalars of these types; what comes takes them without looking at them.

    A look at seven arguments takes 0.16 microseconds, a third of the time of a small batch.
    """
    return kernel.compile(tuple(typeof(argument) for argument in arguments))


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


# In the loops of tiles, LLVM must be told that what they read and write doesn't overlap: it checks
# fewer pairs at run time than these are. Only such loops may use the next two: LLVM may take what
# they touch to be apart from whatever else they touch, in any order.


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
def _take(typingctx, counter):  # type: ignore[no-untyped-def]
    """Add 1 to the int64 at an address, and return what it was; no two threads get the same."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.IntType(64)(1), "monotonic")

    return types.int64(counter), codegen


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


# The next three do for one number what they do for eight.


@intrinsic
def _term(typingctx, h, p):  # type: ignore[no-untyped-def]
    """Return h ** p."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, exponent = args
        if isinstance(p, types.Boolean):
            return value
        if isinstance(p, types.Integer):
            return builder.fmul(value, value)
        return _power(builder, value, exponent)

    return h(h, p), codegen


@intrinsic
def _slope(typingctx, h, p):  # type: ignore[no-untyped-def]
    """Return h ** (p - 1), and 0 where h is 0."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        value, exponent = args
        if isinstance(p, types.Integer):
            return value
        if isinstance(p, types.Boolean):
            on = builder.fcmp_ordered(">", value, _constant(value, 0.0))
            return builder.select(on, _constant(value, 1.0), _constant(value, 0.0))
        return _power(builder, value, builder.fsub(exponent, _F64(1.0)))

    return h(h, p), codegen


def _on_or_off(builder: Any, kind: Any, on: Any, factor: Any) -> Any:
    """Return factor * 1 or factor * 0: two values only, which LLVM rounds ahead of the loop."""
    nothing = builder.fmul(factor, _constant(factor, 0.0))
    return builder.select(on, *(_narrowed(builder, kind, x) for x in (factor, nothing)))


@intrinsic
def _hinge(typingctx, score, same, x_y, margin):  # type: ignore[no-untyped-def]
    """Return max(0, z), 0 for the target's own class; NaN stays NaN."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _hinge_of(builder, *args)

    return score(score, same, x_y, margin), codegen


def _hinge_of(builder: Any, score: Any, same: Any, x_y: Any, margin: Any) -> Any:
    z = builder.fadd(builder.fsub(score, x_y), margin)
    zero = _constant(z, 0.0)
    counts = builder.and_(builder.fcmp_unordered(">=", z, zero), builder.not_(same))
    return builder.select(counts, z, zero)


def _power(builder: Any, h: Any, exponent: Any) -> Any:
    # In float64: an exponent rounded to float32 costs 1e-6 of the power of a large h.
    wide = _as(_F64, h)
    base = h if h.type == wide else builder.fpext(h, wide)
    name = "llvm.pow.f64"
    if isinstance(wide, ir.VectorType):
        name, exponent = "llvm.pow.v8f64", _all_eight(builder, exponent)
    signature = ir.FunctionType(wide, [wide, wide])
    power = builder.module.declare_intrinsic(name, fnty=signature)
    result = builder.call(power, [base, exponent])
    if h.type != wide:
        result = builder.fptrunc(result, h.type)
    zero = _constant(h, 0.0)
    return builder.select(builder.fcmp_ordered("==", h, zero), zero, result)


def _all_eight(builder: Any, number: Any) -> Any:
    empty = ir.Constant(ir.VectorType(number.type, 8), ir.Undefined)
    first = builder.insert_element(empty, number, _I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_I32, 8), [_I32(0)] * 8))


def _places(first: int) -> Any:
    return ir.Constant(ir.VectorType(_I32, 8), [_I32(first + i) for i in range(8)])


@intrinsic
def _eight(typingctx, number):  # type: ignore[no-untyped-def]
    """Return a vector of one number."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return _all_eight(builder, args[0])

    return Eight(number)(number), codegen


@intrinsic
def _both(typingctx, a, b):  # type: ignore[no-untyped-def]
    """Add two vectors."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.fadd(*args)

    return a(a, b), codegen


@intrinsic
def _total(typingctx, vector):  # type: ignore[no-untyped-def]
    """Add the eight numbers of a vector."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        (numbers,) = args
        for half in (4, 2, 1):
            low, high = (
                ir.Constant(ir.VectorType(_I32, half), [_I32(first + i) for i in range(half)])
                for first in (0, half)
            )
            numbers = builder.fadd(
                builder.shuffle_vector(numbers, numbers, low),
                builder.shuffle_vector(numbers, numbers, high),
            )
        total = builder.extract_element(numbers, _I32(0))
        return context.cast(builder, total, vector.dtype, types.float64)

    return types.float64(vector), codegen


@intrinsic
def _hinges(typingctx, row, j, more, n, step, y, x_y, margin):  # type: ignore[no-untyped-def]
    """Return the hinges of the eight classes from j + more on, ``more`` a literal.

    Beyond the row's end, the last class comes again.
    """
    kind = row.dtype
    if not isinstance(more, types.IntegerLiteral):
        return None
    shift = more.literal_value

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        row, j, _, n, apart, y, own, m = args
        own_place = _all_eight(builder, builder.trunc(builder.sub(y, j), _I32))
        same = builder.icmp_signed("==", own_place, _places(shift))
        j = builder.add(j, j.type(shift))
        if isinstance(step, types.Boolean):
            raw = builder.load(_vector_at(builder, row, j), align=1)
        else:
            raw = ir.Constant(ir.VectorType(_LLVM[kind], 8), ir.Undefined)
            for i, place in enumerate(_elements(builder, row, j, n, apart)):
                raw = builder.insert_element(raw, builder.load(place), _I32(i))
        return _hinge_of(builder, _widened(builder, kind, raw), same, own, m)

    return Eight(_computing(kind))(row, j, more, n, step, y, x_y, margin), codegen


@intrinsic
def _put(typingctx, row, j, n, step, eight):  # type: ignore[no-untyped-def]
    """Store what belongs to the eight classes that _hinges gave."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        row, j, n, apart, numbers = args
        if isinstance(step, types.Boolean):
            builder.store(numbers, _vector_at(builder, row, j), align=1)
        else:
            for i, place in enumerate(_elements(builder, row, j, n, apart)):
                builder.store(builder.extract_element(numbers, _I32(i)), place)
        return context.get_dummy_value()

    return types.none(row, j, n, step, eight), codegen


def _vector_at(builder: Any, row: Any, j: Any) -> Any:
    pointer = builder.gep(row, [j])
    return builder.bitcast(pointer, ir.VectorType(row.type.pointee, 8).as_pointer())


def _elements(builder: Any, row: Any, j: Any, n: Any, step: Any) -> Any:
    last = builder.sub(n, n.type(1))
    for i in range(8):
        place = builder.add(j, j.type(i))
        place = builder.select(builder.icmp_signed("<", place, last), place, last)
        yield builder.gep(row, [builder.mul(place, step)])


@intrinsic
def _among(typingctx, vector, first, stop):  # type: ignore[no-untyped-def]
    """Return a vector with 0 in all places but first <= i < stop."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        numbers, *ends = args
        low, high = (_all_eight(builder, builder.trunc(end, _I32)) for end in ends)
        places = _places(0)
        inside = builder.and_(
            builder.icmp_signed(">=", places, low), builder.icmp_signed("<", places, high)
        )
        return builder.select(inside, numbers, _constant(numbers, 0.0))

    return vector(vector, first, stop), codegen


@intrinsic
def _keep(typingctx, bits, k, h):  # type: ignore[no-untyped-def]
    """Store which of eight hinges are positive in byte k at an address; nothing where NONE."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        address, k, numbers = args
        if not isinstance(bits, types.Boolean):
            positive = builder.fcmp_ordered(">", numbers, _constant(numbers, 0.0))
            place = builder.inttoptr(builder.add(address, k), ir.IntType(8).as_pointer())
            builder.store(builder.bitcast(positive, ir.IntType(8)), place)
        return context.get_dummy_value()

    return types.none(bits, k, h), codegen


@intrinsic
def _byte(typingctx, address, k):  # type: ignore[no-untyped-def]
    """Load byte k at an address."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(builder.add(*args), ir.IntType(8).as_pointer())
        return builder.zext(builder.load(place), ir.IntType(64))

    return types.int64(address, k), codegen


@intrinsic
def _ones(typingctx, byte):  # type: ignore[no-untyped-def]
    """Count the bits that are set."""

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        return builder.ctpop(args[0])

    return types.int64(byte), codegen


@intrinsic
def _scaled(typingctx, pointer, slope, scale, p):  # type: ignore[no-untyped-def]
    """Return eight times slope * scale, rounded to the pointer's kind."""
    kind = pointer.dtype

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, value, factor, _ = args
        if not isinstance(p, types.Boolean):
            return _narrowed(builder, kind, builder.fmul(value, factor))
        positive = builder.fcmp_ordered(">", value, _constant(value, 0.0))
        return _on_or_off(builder, kind, positive, factor)

    return Eight(kind)(pointer, slope, scale, p), codegen


@intrinsic
def _chosen(typingctx, pointer, byte, scale):  # type: ignore[no-untyped-def]
    """Return, in the pointer's kind, the scale where a bit is set, and 0 elsewhere."""
    kind = pointer.dtype

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        _, byte, factor = args
        set_ = builder.bitcast(builder.trunc(byte, ir.IntType(8)), ir.VectorType(ir.IntType(1), 8))
        return _on_or_off(builder, kind, set_, factor)

    return Eight(kind)(pointer, byte, scale), codegen


@njit(nogil=True, forceinline=True)
def _row_sum(x, y, x_y, n, step, margin, p, bits):
    """Sum the terms of a row of n classes; keep a bit per class where bits isn't NONE."""
    own, m, zero = _eight(x_y), _eight(margin), _eight(margin - margin)
    whole, last, end = n // 8 * 8, max(n - 8, 0), (n - 1) // 8
    if n < 16:  # the loops below would take twice as long
        h = _hinges(x, last, 0, n, step, y, own, m)
        _keep(bits, end, h)
        if n == 1:
            return _sum_start(x_y, n)
        h = _among(h, whole - last, n - last)
        if n < 8:
            return _total(_term(h, p))
        g = _hinges(x, 0, 0, n, step, y, own, m)
        _keep(bits, 0, g)
        return _total(_both(_term(g, p), _term(h, p)))
    total, fours = 0.0, n // 32 * 32
    for first in range(0, fours, COLUMNS):
        s0, s1, s2, s3 = zero, zero, zero, zero
        for j in range(first, min(fours, first + COLUMNS), 32):
            h0 = _hinges(x, j, 0, n, step, y, own, m)
            h1 = _hinges(x, j, 8, n, step, y, own, m)
            h2 = _hinges(x, j, 16, n, step, y, own, m)
            h3 = _hinges(x, j, 24, n, step, y, own, m)
            s0, s1 = _both(s0, _term(h0, p)), _both(s1, _term(h1, p))
            s2, s3 = _both(s2, _term(h2, p)), _both(s3, _term(h3, p))
            k = j // 8
            _keep(bits, k, h0)
            _keep(bits, k + 1, h1)
            _keep(bits, k + 2, h2)
            _keep(bits, k + 3, h3)
        total += _total(_both(_both(s0, s1), _both(s2, s3)))
    s = zero
    for j in range(fours, whole, 8):
        h = _hinges(x, j, 0, n, step, y, own, m)
        _keep(bits, j // 8, h)
        s = _both(s, _term(h, p))
    h = _hinges(x, last, 0, n, step, y, own, m)
    _keep(bits, end, h)
    h = _among(h, whole - last, n - last)
    return total + _total(_both(s, _term(h, p)))


@njit(nogil=True, forceinline=True)
def _row_of_bits(bits, n, grad, grad_step, scale):
    """Write a row's gradient from the bits that _row_sum kept; return how many slopes were 1."""
    c, whole, last = _eight(scale), n // 8 * 8, max(n - 8, 0)
    byte = _byte(bits, (n - 1) // 8)
    _put(grad, last, n, grad_step, _chosen(grad, byte, c))
    slope = _ones((byte & (1 << (n - last)) - 1) >> (whole - last)) if whole < n else 0
    if 8 <= n < 16:  # the loop would take longer
        byte = _byte(bits, 0)
        _put(grad, 0, n, grad_step, _chosen(grad, byte, c))
        return slope + _ones(byte)
    for k in range(n // 8):
        byte = _byte(bits, k)
        slope += _ones(byte)
        _put(grad, k * 8, n, grad_step, _chosen(grad, byte, c))
    return slope


@njit(nogil=True, forceinline=True)
def _row_slope(x, y, x_y, n, step, margin, p, grad, grad_step, scale):
    """Sum the terms and the slopes of a row of n classes, and write its gradient."""
    own, m, zero, c = _eight(x_y), _eight(margin), _eight(margin - margin), _eight(scale)
    total, slope, whole, last = _sum_start(x_y, n), 0.0, n // 8 * 8, max(n - 8, 0)
    s, d = zero, zero
    if n < 16:
        if n >= 8:
            h = _hinges(x, 0, 0, n, step, y, own, m)
            s, d = _term(h, p), _slope(h, p)
            _put(grad, 0, n, grad_step, _scaled(grad, d, c, p))
    else:
        for first in range(0, whole, COLUMNS // 4):
            s, d = zero, zero
            for j in range(first, min(whole, first + COLUMNS // 4), 8):
                h = _hinges(x, j, 0, n, step, y, own, m)
                e = _slope(h, p)
                s, d = _both(s, _term(h, p)), _both(d, e)
                _put(grad, j, n, grad_step, _scaled(grad, e, c, p))
            total += _total(s)
            slope += _total(d)
        s, d = zero, zero
    h = _hinges(x, last, 0, n, step, y, own, m)
    _put(grad, last, n, grad_step, _scaled(grad, _slope(h, p), c, p))
    h = _among(h, whole - last, n - last)
    return total + _total(_both(s, _term(h, p))), slope + _total(_both(d, _slope(h, p)))


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


def _row_bits(bits, n_classes, i):
    """Return the address of row i's bits."""


@overload(_row_bits)
def _row_bits_of(bits, n_classes, i):  # type: ignore[no-untyped-def]
    if isinstance(bits, types.Boolean):
        return lambda bits, n_classes, i: bits
    return lambda bits, n_classes, i: bits + i * ((n_classes + 7) // 8)


@njit(nogil=True)
def _set_lost(bits, n_classes, loss):
    """Set all of a row's bits where its loss is NaN and bits isn't NONE."""
    if bits and loss != loss:
        for k in range((n_classes + 7) // 8):
            _keep(bits, k, _eight(1.0))


@njit(nogil=True)
def _first_bad(y, n_classes, start, stop, wrong):
    """Return the first row whose target is out of range if ``wrong`` is negative, else stop."""
    if wrong >= 0:
        return stop
    i = start
    while _target(y, n_classes, i) >= 0:
        i += 1
    return i


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


@njit(nogil=True)
def _short_rows(kind, x, offsets, row_stride, step, y, n, start, stop, margin, p, bits):
    """Sum the losses of rows of n < 16 classes, lane by lane: a row's own sum isn't asked for."""
    scalar, result, wrong = _like(kind, margin), 0.0, 0
    m, zero, last, end = _eight(scalar), _eight(scalar - scalar), max(n - 8, 0), (n - 1) // 8
    for first in range(start, stop, RUN):
        s, t = zero, zero
        for i in range(first, min(first + RUN, stop)):
            row, target = _row(kind, x, offsets, row_stride, i), _target(y, n, i)
            own, kept = _eight(_own_score(row, target, step, scalar)), _row_bits(bits, n, i)
            if n >= 8:
                h = _hinges(row, 0, 0, n, step, target, own, m)
                _keep(kept, 0, h)
                s = _both(s, _term(h, p))
            h = _hinges(row, last, 0, n, step, target, own, m)
            _keep(kept, end, h)
            t = _both(t, _term(h, p))
            wrong |= target
        total = _total(_both(s, _among(t, n // 8 * 8 - last, n - last)))
        if bits and total != total:  # which rows?
            for i in range(first, min(first + RUN, stop)):
                row, target = _row(kind, x, offsets, row_stride, i), _target(y, n, i)
                own = _own_score(row, target, step, scalar)
                loss = _row_sum(row, target, own, n, step, scalar, p, NONE)
                _set_lost(_row_bits(bits, n, i), n, loss)
        result += total
    return result, _first_bad(y, n, start, stop, wrong)


@njit(nogil=True)
def _loss_rows(
    kind, x, offsets, row_stride, step, y, weight, n_classes, start, stop, margin, p, losses, bits
):
    """Sum the losses, times C, of rows start <= i < stop; store them where losses isn't 0.

    Row i begins at offsets[i], or at i * row_stride where offsets is 0; its classes are step apart.
    Addresses: x, offsets (int64), y (int64), weight (computing type), losses (kind), bits. Where
    bits isn't NONE, ceil(n_classes / 8) bytes per row are written there: which of eight hinges are
    positive, the last eight classes in the last byte; all bits where the loss is NaN.

    Returns the sum, and the first row whose target is out of range, or stop.
    """
    if weight == 0 and losses == 0 and 1 < n_classes < 16:
        return _short_rows(
            kind, x, offsets, row_stride, step, y, n_classes, start, stop, margin, p, bits
        )
    m, total, wrong = _like(kind, margin), 0.0, 0
    for i in range(start, stop):
        row, target = _row(kind, x, offsets, row_stride, i), _target(y, n_classes, i)
        own = _own_score(row, target, step, m)
        kept = _row_bits(bits, n_classes, i)
        loss = _row_sum(row, target, own, n_classes, step, m, p, kept)
        _set_lost(kept, n_classes, loss)
        loss *= _weight(m, weight, target)
        total += _end_loss(kind, losses, i, n_classes, loss)
        wrong |= target
    return total, _first_bad(y, n_classes, start, stop, wrong)


@_kernel
def mean_of_memory(kind, x, y, weight, n, c, margin, p):
    """Compute the mean loss of contiguous memory; None where a target is out of range."""
    if c < 8:
        total, bad = _loss_rows(kind, x, 0, c, 1, y, weight, c, 0, n, margin, p, 0, NONE)
    else:
        total, bad = _loss_rows(kind, x, 0, c, UNIT, y, weight, c, 0, n, margin, p, 0, NONE)
    return None if bad < n else total / c / n


@_kernel
def mean_of_arrays(kind, x, y, weight, margin, p):
    """Do what mean_of_memory does with two contiguous NumPy arrays, (N, C) and (N,).

    Numba takes an array apart faster than Python reads its address (1.3 microseconds).
    """
    n, c = x.shape
    return mean_of_memory(kind, x.ctypes.data, y.ctypes.data, weight, n, c, margin, p)


@njit(nogil=True)
def _bits_rows(
    kind,
    bits,
    y,
    weight,
    n_classes,
    start,
    stop,
    grad,
    grad_offsets,
    grad_row_stride,
    grad_step,
    scale,
    upstream,
):
    """Write the gradient that _grad_rows writes for p = 1, from the bits that _loss_rows kept."""
    one = _like(kind, 1.0)
    for i in range(start, stop):
        to, target = _row(kind, grad, grad_offsets, grad_row_stride, i), _target(y, n_classes, i)
        c = _row_scale(upstream, scale, _weight(one, weight, target), i)
        at = _row_bits(bits, n_classes, i)
        slope = _row_of_bits(at, n_classes, to, grad_step, _like(one, c))
        # The target's own bit is set only where all of them are.
        total = np.nan if target < 0 or slope == n_classes else 0.0
        _end_grad(to, grad_step, target, n_classes, total, np.float64(slope), c)
    return 0.0, stop


@njit(nogil=True)
def _row_scale(upstream, scale, weight, i):
    if upstream == 0:
        return scale * weight
    return scale * weight * _reals(upstream, 0.0)[i]


@njit(nogil=True)
def _grad_rows(
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
    """Do what _loss_rows does, and write the gradient.

    A row's gradient is that of its loss, times C, times scale, times upstream[i] (an address of
    float64) where upstream isn't 0.
    """
    m, total, wrong = _like(kind, margin), 0.0, 0
    for i in range(start, stop):
        row, target = _row(kind, x, offsets, row_stride, i), _target(y, n_classes, i)
        to = _row(kind, grad, grad_offsets, grad_row_stride, i)
        own, w = _own_score(row, target, step, m), _weight(m, weight, target)
        c = _row_scale(upstream, scale, w, i)
        loss, slope = _row_slope(
            row, target, own, n_classes, step, m, p, to, grad_step, _like(m, c)
        )
        _end_grad(to, grad_step, target, n_classes, loss, slope, c)
        total += _end_loss(kind, losses, i, n_classes, loss * w)
        wrong |= target
    return total, _first_bad(y, n_classes, start, stop, wrong)


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


@njit(nogil=True)
def _loss_tiles(
    kind, x, offsets, row_stride, step, y, weight, n_classes, start, stop, margin, p, losses, bits
):
    """Do what _loss_rows does, where neighbours in memory are rows; keep no bits.

    Offsets aren't looked at.
    """
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


@njit(nogil=True)
def _grad_tiles(
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
    """Do what _grad_rows does, where neighbours in memory are rows; offsets aren't looked at."""
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
    for i in range(count):
        row = _row(kind, x, offsets, row_stride, i)
        out[i] = _row_sum(row, targets[i] - first, scores[i], n_classes, step, m, p, NONE)


@_kernel
def grad_of_memory(kind, x, y, weight, n, c, margin, p, grad, scale, upstream):
    """Write the gradient of all rows of contiguous memory.

    The upstream gradient is one number of the computing type, at an address.
    """
    k = scale * np.float64(_reals(upstream, _like(kind, 0.0))[0])
    if c < 8:
        _grad_rows(kind, x, 0, c, 1, y, weight, c, 0, n, margin, p, 0, grad, 0, c, 1, k, 0)
    else:
        _grad_rows(kind, x, 0, c, UNIT, y, weight, c, 0, n, margin, p, 0, grad, 0, c, UNIT, k, 0)


# One call of the last five kernels works on a call's blocks until none is left, or for TURNS
# blocks. All threads take their turns from one counter: had Python handed the blocks out, each
# would have cost 5 microseconds under the GIL. Turns go round the workers' parts of the memory:
# threads next to each other wait for the same fresh page of 2 MB.
#
# ``head`` and ``tail`` are the arguments of the function that does a block, before and after
# ``start, stop``; ``blocks`` are the number of rows, the rows of a block, the number of workers,
# and the address of the counter, followed by each block's sum and each block's first row whose
# target is out of range, or -1.
#
# The loop stands in each: Numba doesn't keep on disk what takes the function as an argument.


@njit(nogil=True)
def _next_block(blocks):
    """Take a block: its number, or -1 where none is left, and its rows."""
    rows, size, workers, counter = blocks[0], blocks[1], blocks[2], blocks[3]
    count = (rows + size - 1) // size
    each = (count + workers - 1) // workers
    while True:
        turn = _take(counter)
        if turn >= each * workers:
            return -1, 0, 0
        block = turn % workers * each + turn // workers
        if block < count:
            return block, block * size, min(rows, (block + 1) * size)


@njit(nogil=True)
def _end_block(blocks, block, stop, total, bad):
    rows, size, results = blocks[0], blocks[1], blocks[3] + 8
    count = (rows + size - 1) // size
    _store(_reals(results, 0.0), block, total)
    _store(_integers(results), count + block, bad if bad < stop else -1)


@_kernel
def loss_rows(head, tail, blocks):
    """Sum the losses of blocks of rows; return whether there may be more."""
    for _ in range(TURNS):
        block, start, stop = _next_block(blocks)
        if block < 0:
            return False
        total, bad = _loss_rows(*head, start, stop, *tail)
        _end_block(blocks, block, stop, total, bad)
    return True


@_kernel
def grad_rows(head, tail, blocks):
    """Sum losses and write gradients of blocks of rows; return whether there may be more."""
    for _ in range(TURNS):
        block, start, stop = _next_block(blocks)
        if block < 0:
            return False
        total, bad = _grad_rows(*head, start, stop, *tail)
        _end_block(blocks, block, stop, total, bad)
    return True


@_kernel
def loss_tiles(head, tail, blocks):
    """Do what loss_rows does, where rows are neighbours in memory."""
    for _ in range(TURNS):
        block, start, stop = _next_block(blocks)
        if block < 0:
            return False
        total, bad = _loss_tiles(*head, start, stop, *tail)
        _end_block(blocks, block, stop, total, bad)
    return True


@_kernel
def grad_tiles(head, tail, blocks):
    """Do what grad_rows does, where rows are neighbours in memory."""
    for _ in range(TURNS):
        block, start, stop = _next_block(blocks)
        if block < 0:
            return False
        total, bad = _grad_tiles(*head, start, stop, *tail)
        _end_block(blocks, block, stop, total, bad)
    return True


@_kernel
def bits_rows(head, tail, blocks):
    """Write gradients of blocks of rows from bits; return whether there may be more."""
    for _ in range(TURNS):
        block, start, stop = _next_block(blocks)
        if block < 0:
            return False
        total, bad = _bits_rows(*head, start, stop, *tail)
        _end_block(blocks, block, stop, total, bad)
    return True
