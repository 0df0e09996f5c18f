"""The loss and its gradient in plain Python floats, and how large an error is fair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
    """

    losses: list[float]
    loss_scales: list[float]
    grad: list[list[float]]
    grad_scales: list[list[float]]

    def total(self, reduction: str) -> tuple[float, float]:
        """Return the sum or mean of the losses, and its scale."""
        count = len(self.losses) if reduction == "mean" else 1
        return _sum(self.losses) / count, _sum(self.loss_scales) / count

    def scaled(self, factors: Sequence[float]) -> Reference:
        """Return the same with each sample's gradient multiplied by a factor."""
        grad = [[g * f for g in row] for row, f in zip(self.grad, factors, strict=True)]
        scales = [
            [s * abs(f) for s in row] for row, f in zip(self.grad_scales, factors, strict=True)
        ]
        return Reference(self.losses, self.loss_scales, grad, scales)


def reference(
    rows: Sequence[Sequence[float]],
    target: Sequence[int],
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Sequence[float] | None = None,
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

    Returns
    -------
    Reference
    """
    found = Reference([], [], [], [])
    for x, y in zip(rows, target, strict=True):
        others = [j for j in range(len(x)) if j != y]
        z = [(score - x[y]) + margin for score in x] if 0 <= y < len(x) else [math.nan] * len(x)
        known = 0 <= y < len(x) and not any(math.isnan(z[j]) for j in others)
        if not known or math.isnan(x[y]):
            for short in (found.losses, found.loss_scales):
                short.append(math.nan)
            for long in (found.grad, found.grad_scales):
                long.append([math.nan] * len(x))
            continue
        factor = (1.0 if weight is None else weight[y]) / len(x)
        # An infinite score makes a result infinite, or costs nothing: no error is due to it.
        size = [sum(abs(v) for v in (score, x[y], margin) if math.isfinite(v)) for score in x]
        slope = [p * _power(v, p - 1) if v > 0 and j != y else 0.0 for j, v in enumerate(z)]
        bend = [p * (p - 1) * _power(v, p - 2) if v > 0 and p > 1 else 0.0 for v in z]
        grad = [factor * s for s in slope]
        scales = [abs(factor) * b * s + abs(g) for b, s, g in zip(bend, size, grad, strict=True)]
        scales[y] = 0.0
        grad[y], scales[y] = -_sum(grad), _sum(scales)
        loss = factor * _sum([_power(z[j], p) for j in others if z[j] > 0])
        rises = [(1.0 if p == 1 and z[j] >= 0 else slope[j]) * size[j] for j in others]
        found.losses.append(loss)
        found.loss_scales.append(abs(factor) * _sum(rises) + abs(loss))
        found.grad.append(grad)
        found.grad_scales.append(scales)
    return found


def _power(value: float, exponent: float) -> float:
    try:
        return math.pow(value, exponent)
    except OverflowError:
        return math.inf


def _sum(values: Sequence[float]) -> float:
    """Sum without rounding errors; infinities and NaN as IEEE has them."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)


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
