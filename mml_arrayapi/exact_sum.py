"""Exact sums of floats: streaming, mergeable in any order, the same on every library.

A sum of floats is kept as one Python integer that counts units of ``2 ** -UNIT``, in which every
float64 is whole. Adding is exact, so neither the order nor the cut into batches, chunks or
workers can change a bit; the result is rounded once, when it is asked for.
"""

from __future__ import annotations

import math
from operator import index
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

UNIT = 1130  # 1074 for the smallest float64, and the 53 bits below the exponent of frexp
DIGITS = 70  # of 32 bits: those of the compiled kernels' sums
BLOCK = 2**16  # values looked at together: their temporaries stay in the cache
LARGEST = 4096  # exponent of a sum: a product of two float64 has 2048
HUGE = 1100  # bits by which products beyond float64 are shifted down
TINY = -56  # and those that float64 holds with fewer digits, up: as far as the unit goes
NORMAL = 2.0**-1022  # the smallest float64 with all digits
EXACT = 2**25  # so many 27-bit integers can be added in a float64 without rounding


def exact_sums(
    values: np.ndarray, groups: np.ndarray | None = None, n_groups: int = 1
) -> list[int]:
    """Sum finite floats exactly, by group.

    Parameters
    ----------
    values : numpy array, shape (N,), float32 or float64
        Finite values.
    groups : numpy array of integers, shape (N,), optional
        The group of each, 0 to ``n_groups - 1``; all are in group 0 if left out.
    n_groups : int
        The number of groups.

    Returns
    -------
    list of int
        Each group's sum in units of ``2 ** -UNIT``.

    Notes
    -----
    The compiled kernels do it if they can. Elsewhere, the mantissas of equal exponent are added as
    integers within a float64, by ``bincount``: 6 ns a value for float32 and 18 for float64 on one
    core of an AMD EPYC (Milan) at 2.4 GHz. Without groups, most float32 values are added as 64-bit
    integers: 2 ns.
    """
    import numpy as np

    from mml_arrayapi.backends import cpu

    if groups is None:
        total, values = _sum_of_near(values)
        groups = np.zeros(len(values), np.int64)
        return [total + exact_sums(values, groups)[0]]
    digits = np.empty((n_groups, DIGITS), np.uint32)
    if cpu.native and cpu.native.exact_sums(values, groups, digits) is not None:
        rows = digits.astype("<u4", copy=False).view(f"V{4 * DIGITS}")[:, 0].tolist()
        return [int.from_bytes(row, "little", signed=True) for row in rows]
    totals = [0] * n_groups
    # Many groups make many bins, most of them empty if the blocks are small.
    block = max(BLOCK, 8 * n_groups)
    for start in range(0, len(values), EXACT):
        bins: dict[int, np.ndarray] = {}
        stop = min(start + EXACT, len(values))
        for at in range(start, stop, block):
            part = slice(at, min(at + block, stop))
            _add_mantissas(bins, values[part], groups[part], n_groups)
        for unit, sums in bins.items():
            for group in np.flatnonzero(sums):
                totals[group] += int(sums[group]) << unit
    return totals


def weighted(
    losses: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray, int]]]:
    """Multiply losses by weights, to float64's precision also beyond its range and below.

    Parameters
    ----------
    losses, weights : numpy array, shape (N,), float32 or float64
        The factors; the weights are finite.

    Returns
    -------
    products : numpy array of float64, shape (N,)
        Rounded; 0 where float64 doesn't hold them, or only with fewer digits.
    others : list of (numpy array of int64, numpy array of float64, int)
        The places of those, these products in units of ``2 ** shift``, and ``shift``.
    """
    import numpy as np

    with np.errstate(all="ignore"):  # infinite losses, and those beyond float64
        products = losses.astype(np.float64) * weights
    huge = np.flatnonzero(np.isinf(products) & np.isfinite(losses))
    tiny = np.flatnonzero((np.abs(products) < NORMAL) & (losses != 0) & (weights != 0))
    with np.errstate(under="ignore"):
        (x, w), (y, v) = ((losses[i].astype(np.float64), weights[i]) for i in (huge, tiny))
        large = (x * 2.0**-1000) * (w * 2.0 ** (1000 - HUGE))
        small = (y * 2.0**500) * (v * 2.0**500) * 2.0 ** (-1000 - TINY)
    products[huge] = products[tiny] = 0
    return products, [(huge, large, HUGE), (tiny, small, TINY)]


def shifted(total: int, shift: int) -> int:
    """Return a sum in units of ``2 ** shift`` as one in units of 1."""
    return total << shift if shift > 0 else total >> -shift


def _sum_of_near(values: np.ndarray) -> tuple[int, np.ndarray]:
    """Sum float32 values that are whole in units of ``2 ** -45`` of the largest; return the others.

    In a block they fit into 64 bits. Float64 values, of more bits, are all returned.
    """
    import numpy as np

    total, others = 0, [values[:0]]
    if values.dtype != np.float32:
        return 0, values
    for at in range(0, len(values), BLOCK):
        block = values[at : at + BLOCK]
        shift = 45 - math.frexp(max(float(block.max()), -float(block.min())))[1]
        scaled = block.astype(np.float64)
        scaled *= 2.0**shift
        whole = scaled.astype(np.int64)
        far = whole != scaled
        if far.any():
            others.append(block[far])
            whole[far] = 0
        total += int(whole.sum()) << (UNIT - shift)
    return total, np.concatenate(others)


def _add_mantissas(bins: Any, values: np.ndarray, groups: np.ndarray, n_groups: int) -> None:
    """Add to ``bins[unit][group]`` the integers that the values are, in units of ``2 ** unit``."""
    import numpy as np

    mantissas, exponents = np.frexp(values)
    lowest = int(exponents.min())
    width = int(exponents.max()) - lowest + 1
    keys = (exponents - lowest) * n_groups + groups.astype(np.int64)
    halves = [(27, mantissas)]
    if values.dtype != np.float32:
        high = np.ldexp(np.trunc(np.ldexp(mantissas, 27)), -27)
        halves = [(27, high), (53, mantissas - high)]
    for bits, half in halves:
        sums = np.bincount(keys, weights=half, minlength=width * n_groups)
        rows = np.ldexp(sums, bits).reshape(width, n_groups)
        for exponent, row in enumerate(rows, start=lowest):
            unit = exponent - bits + UNIT
            if unit in bins:
                bins[unit] += row
            elif row.any():
                bins[unit] = row


class ExactSum:
    """A sum of floats without rounding, with the count of what was added.

    Attributes
    ----------
    total : int
        The sum of the finite values in units of ``2 ** -UNIT``.
    count : int
        How many values were added, NaN and infinities included.
    nan, plus, minus : int
        How many of them were NaN, infinite, minus infinite.
    """

    __slots__ = ("count", "minus", "nan", "plus", "total")

    def __init__(
        self, total: int = 0, count: int = 0, nan: int = 0, plus: int = 0, minus: int = 0
    ) -> None:
        self.total, self.count, self.nan, self.plus, self.minus = total, count, nan, plus, minus

    def __reduce__(self) -> tuple[Any, ...]:
        return ExactSum, (self.total, self.count, self.nan, self.plus, self.minus)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ExactSum) and self.__reduce__() == other.__reduce__()

    __hash__ = None  # type: ignore[assignment]

    def add(self, values: np.ndarray) -> None:
        """Add the elements of a NumPy array of float32 or float64."""
        import numpy as np

        values = values.reshape(-1)
        finite = np.isfinite(values)
        if not finite.all():
            self.nan += int(np.isnan(values).sum())
            self.plus += int((values == math.inf).sum())
            self.minus += int((values == -math.inf).sum())
        self.count += len(values)
        self.total += exact_sums(values if finite.all() else values[finite])[0]

    def add_weighted(self, losses: np.ndarray, weights: np.ndarray) -> None:
        """Add each loss times its weight, rounded to float64's precision."""
        products, others = weighted(losses.reshape(-1), weights.reshape(-1))
        self.add(products)
        for _, values, shift in others:
            self.total += shifted(exact_sums(values)[0], shift)

    def add_ones(self, count: int) -> None:
        """Add the number 1 so many times."""
        self.total += count << UNIT
        self.count += count

    def merge(self, other: ExactSum) -> None:
        """Add what another sum holds."""
        self.total += other.total
        self.count += other.count
        self.nan += other.nan
        self.plus += other.plus
        self.minus += other.minus

    def over(self, divisor: int) -> float:
        """Return the sum divided by an integer, correctly rounded; NaN for a divisor of 0."""
        return self.over_units(divisor << UNIT)

    def over_sum(self, divisor: ExactSum) -> float:
        """Return the sum divided by another, correctly rounded; NaN for a divisor of 0."""
        return self.over_units(divisor.total)

    def over_units(self, divisor: int) -> float:
        """Return the sum divided by so many units, correctly rounded; NaN for 0 of them."""
        if self.nan or (self.plus and self.minus) or not divisor:
            return math.nan
        if self.plus or self.minus:
            return math.inf if self.plus else -math.inf
        try:
            return self.total / divisor
        except OverflowError:
            return math.inf if self.total > 0 else -math.inf

    def state(self) -> list[Any]:
        """Return the state as plain JSON, the integer as ``"0x<hex digits>p<exponent>"``."""
        zeros = (self.total & -self.total).bit_length() - 1 if self.total else UNIT
        total = f"{self.total >> zeros:#x}p{zeros - UNIT}"
        return [total, self.count, self.nan, self.plus, self.minus]

    @classmethod
    def from_state(cls, state: list[Any]) -> ExactSum:
        """Make the sum that :meth:`state` described; raise an error for what is none."""
        total, *counts = state
        digits, _, exponent = total.partition("p")
        count, nan, plus, minus = map(index, counts)
        if min(count, nan, plus, minus) < 0:
            raise ValueError(f"counts can't be negative: {counts}")
        if max(nan, plus, minus) > count:
            raise ValueError(f"of {count} values, {max(nan, plus, minus)} can't be NaN or infinite")
        if not -UNIT <= int(exponent) <= LARGEST:
            raise ValueError(f"no sum has the exponent {exponent}")
        return cls(int(digits, 16) << (int(exponent) + UNIT), count, nan, plus, minus)
