"""The loss and its gradient in plain Python floats, and how large an error is fair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

EPS = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23, "float64": 2.0**-52}
TINY = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126, "float64": 2.0**-1022}

SLACK = 8
"""How many eps of the condition scale an error may have; sums of a few terms need two or three."""


@dataclass(frozen=True, slots=True)
class Reference:
    """Losses and gradient of the sum, each with its condition scale (see ``golden.json``).

    Attributes
    ----------
    losses, loss_scales : list of N floats
        One per sample.
    grad, grad_scales : N lists of C floats
        The gradient of the sum of the losses.
    ignored : int
        How many of the samples are ignored.
    """

    losses: list[float]
    loss_scales: list[float]
    grad: list[list[float]]
    grad_scales: list[list[float]]
    ignored: int = 0

    @property
    def count(self) -> int:
        """How many samples a mean is over."""
        return len(self.losses) - self.ignored

    def total(self, reduction: str) -> tuple[float, float]:
        """Return the sum or mean of the losses, and its scale."""
        if reduction == "mean" and self.count == 0:
            return math.nan, math.nan
        count = self.count if reduction == "mean" else 1
        return _sum(self.losses, 1 / count), _sum(self.loss_scales, 1 / count)

    def scaled(self, factors: Sequence[float]) -> Reference:
        """Return the same with each sample's gradient multiplied by a factor."""
        grad = [[g * f for g in row] for row, f in zip(self.grad, factors, strict=True)]
        scales = [
            [s * abs(f) for s in row] for row, f in zip(self.grad_scales, factors, strict=True)
        ]
        return replace(self, grad=grad, grad_scales=scales)

    def repeated(self, times: int) -> Reference:
        """Return that of the same samples, several times one after the other."""
        return Reference(
            losses=self.losses * times,
            loss_scales=self.loss_scales * times,
            grad=self.grad * times,
            grad_scales=self.grad_scales * times,
            ignored=self.ignored * times,
        )

    def loosened(self, factor: float) -> Reference:
        """Return the same with all scales multiplied by a factor."""
        return replace(
            self,
            loss_scales=[scale * factor for scale in self.loss_scales],
            grad_scales=[[scale * factor for scale in row] for row in self.grad_scales],
        )


def reference(
    rows: Sequence[Sequence[float]],
    target: Sequence[int],
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Sequence[float] | None = None,
    ignore_index: int | None = None,
) -> Reference:
    """Compute the losses and the gradient of their sum in float64, by the formula.

    Parameters
    ----------
    rows : N sequences of C floats
        The scores; NaN and infinities follow IEEE arithmetic.
    target : sequence of N ints
        The classes; one out of range makes NaN of its sample.
    p, margin : float
        The exponent and the margin.
    weight : sequence of C floats, optional
        One per class.
    ignore_index : int, optional
        Samples of this class have loss 0 and gradient 0, and a mean doesn't count them.

    Returns
    -------
    Reference
    """
    samples = [
        _plain(x, 0.0) if y == ignore_index else _sample(x, y, p, margin, weight)
        for x, y in zip(rows, target, strict=True)
    ]
    return Reference(
        losses=[loss for loss, _, _, _ in samples],
        loss_scales=[scale for _, scale, _, _ in samples],
        grad=[row for _, _, row, _ in samples],
        grad_scales=[row for _, _, _, row in samples],
        ignored=sum(y == ignore_index for y in target),
    )


_Sample = tuple[float, float, list[float], list[float]]


def _plain(x: Sequence[float], value: float) -> _Sample:
    """Return one value for a sample's loss, each part of its gradient, and all scales."""
    return value, value, [value] * len(x), [value] * len(x)


def _sample(
    x: Sequence[float], y: int, p: float, margin: float, weight: Sequence[float] | None
) -> _Sample:
    """Return one sample's loss, its scale, its gradient, and that one's scales."""
    nan = _plain(x, math.nan)
    if not 0 <= y < len(x) or math.isnan(x[y]):
        return nan
    others = [j for j in range(len(x)) if j != y]
    z = [(score - x[y]) + margin for score in x]
    if any(math.isnan(z[j]) for j in others):
        return nan
    factor = (1.0 if weight is None else weight[y]) / len(x)
    loss = _sum([_power(z[j], p) for j in others if z[j] > 0], factor)
    if math.isnan(loss):  # a weight of NaN, or of 0 with an infinite score
        return nan
    # An infinite score makes a result infinite, or costs nothing: no error is due to it.
    size = [sum(abs(v) for v in (score, x[y], margin) if math.isfinite(v)) for score in x]
    slope = [p * _power(v, p - 1) if v > 0 and j != y else 0.0 for j, v in enumerate(z)]
    bend = [p * (p - 1) * _power(v, p - 2) if v > 0 and p > 1 else 0.0 for v in z]
    grad = [factor * s if s else 0.0 for s in slope]  # an infinite weight times 0 would be NaN
    scales = [
        abs(factor) * b * s + abs(g) if g else 0.0 for b, s, g in zip(bend, size, grad, strict=True)
    ]
    scales[y] = 0.0
    grad[y], scales[y] = -_sum(grad), _sum(scales)
    rises = [(1.0 if p == 1 and z[j] >= 0 else slope[j]) * size[j] for j in others]
    return loss, abs(factor) * _sum(rises) + abs(loss), grad, scales


def _power(value: float, exponent: float) -> float:
    try:
        return math.pow(value, exponent)
    except OverflowError:
        return math.inf


def _sum(values: Sequence[float], factor: float = 1.0) -> float:
    """Sum without rounding errors, times a factor; infinities and NaN as IEEE has them."""
    if not all(map(math.isfinite, values)):
        return factor * sum(values)
    try:
        return factor * math.fsum(values)
    except OverflowError:  # the sum is too large, its product with the factor need not be
        return factor * math.fsum(v * 2.0**-64 for v in values) * 2.0**64


def difference(got: Any, wanted: Any, scale: Any, dtype: str) -> str | None:
    """Tell where numbers differ by more than is fair for a dtype.

    Parameters
    ----------
    got, wanted, scale : float, or nested lists of floats of one shape
        The numbers, what they should be, and the condition scales. NaN equals NaN, and an
        infinity itself.
    dtype : str
        The result's dtype; for 16-bit types the computing precision is float32.

    Returns
    -------
    str or None
        The first difference in words; None where there is none.
    """
    if isinstance(wanted, list):
        if not isinstance(got, list) or len(got) != len(wanted):
            return f"got {_short(got)}, expected {_short(wanted)}"
        for i, (g, w, s) in enumerate(zip(got, wanted, scale, strict=True)):
            found = difference(g, w, s, dtype)
            if found is not None:
                return f"[{i}]{found}" if found.startswith("[") else f"[{i}] {found}"
        return None
    if isinstance(got, list):
        return f"got {_short(got)}, expected {wanted!r}"
    if got == wanted or (math.isnan(got) and math.isnan(wanted)):
        return None
    unit = EPS["float32" if dtype.endswith("16") else dtype]
    bound = SLACK * unit * scale
    if dtype.endswith("16"):
        bound += 0.5001 * max(EPS[dtype] * abs(wanted), TINY[dtype])
    error = abs(got - wanted)
    if math.isfinite(wanted) and error <= bound + TINY[dtype]:
        return None
    return f"got {got!r}, expected {wanted!r} (error {error:.3g}, allowed {bound:.3g})"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
