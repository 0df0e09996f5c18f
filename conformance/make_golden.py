"""Make ``golden.json``: run ``python -m mml_arrayapi.conformance.make_golden > golden.json``.

Values are exact: rational numbers for integer ``p``; for other ``p`` the powers are rounded to 60
decimal digits, everything around them is rational. Each is rounded to float64 once, at the end.
Standard library only, so that the same file comes out on every machine.

The format is described at the head of the file itself.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from fractions import Fraction
from typing import Any

FORMAT = {
    "format": "mml-golden-vectors",
    "version": 1,
    "numbers": "Scores, weights, margin and all results are C99 hexadecimal floats, exact in "
    "float64; targets and shapes are decimal integers. p is a hexadecimal float too.",
    "input": "N rows of C scores. dtypes: the types that hold every score exactly.",
    "losses": "One per row: weight[y] / C * sum over j != y of max(0, (x_j - x_y) + margin) ** p. "
    "sum and mean: of the losses. grad: of the sum, by input. All correctly rounded to float64.",
    "scales": "Next to a value v stands its condition scale s: |weight[y]| / C * sum over j != y "
    "of p * max(0, z_j) ** (p - 1) * (|x_j| + |x_y| + |margin|), for the gradient with one more "
    "derivative, plus |v|; rounded up to 8 bits. An implementation that computes with a unit "
    "roundoff u is right if its error is at most a few u * s. A plain bound on |error / v| would "
    "be unfair where x_j - x_y cancels.",
}

_CONTEXT = Context(prec=60)


def exact(
    rows: Sequence[Sequence[float]],
    target: Sequence[int],
    p: float,
    margin: float,
    weight: Sequence[float] | None,
) -> dict[str, Any]:
    """Compute losses, their sum and mean, the gradient, and all condition scales, exactly.

    Parameters
    ----------
    rows : N sequences of C floats
        The scores.
    target : sequence of N ints
        The classes.
    p, margin : float
        The exponent and the margin.
    weight : sequence of C floats, or None
        One weight per class.

    Returns
    -------
    dict
        Of fractions, under the names that the file uses.
    """
    exponent, gap = Fraction(p), Fraction(margin)
    losses, loss_scales, grad, grad_scales = [], [], [], []
    for row, y in zip(rows, target, strict=True):
        factor = Fraction(weight[y] if weight is not None else 1) / len(row)
        x = [Fraction(score) for score in row]
        loss = scale = Fraction(0)
        slopes, slope_scales = [Fraction(0)] * len(x), [Fraction(0)] * len(x)
        for j, score in enumerate(x):
            z = score - x[y] + gap
            if j == y or z < 0 or (z == 0 and p > 1):
                continue
            size = abs(score) + abs(x[y]) + abs(gap)
            slope = exponent * _power(z, exponent - 1)
            loss += factor * _power(z, exponent)
            scale += abs(factor) * slope * size
            if z > 0:
                slopes[j] = factor * slope
                bend = exponent * (exponent - 1)
                bend = bend * _power(z, exponent - 2) if bend else bend
                slope_scales[j] = abs(factor) * bend * size + abs(slopes[j])
        slopes[y], slope_scales[y] = -sum(slopes, Fraction(0)), sum(slope_scales, Fraction(0))
        losses.append(loss)
        loss_scales.append(scale + abs(loss))
        grad.append(slopes)
        grad_scales.append(slope_scales)
    return {
        "losses": losses,
        "loss_scales": loss_scales,
        "sum": sum(losses, Fraction(0)),
        "sum_scale": sum(loss_scales, Fraction(0)),
        "mean": sum(losses, Fraction(0)) / len(losses),
        "mean_scale": sum(loss_scales, Fraction(0)) / len(losses),
        "grad": grad,
        "grad_scales": grad_scales,
    }


def _power(z: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator == 1:
        return z ** int(exponent)
    ratio = _CONTEXT.divide(Decimal(z.numerator), Decimal(z.denominator))
    power = _CONTEXT.divide(Decimal(exponent.numerator), Decimal(exponent.denominator))
    return Fraction(_CONTEXT.power(ratio, power))


def cases() -> list[dict[str, Any]]:
    """List the inputs of the golden vectors.

    Returns
    -------
    list of dict
        Each with name, input, target, p, margin, weight.
    """
    found: list[dict[str, Any]] = []

    def case(
        name: str,
        rows: Sequence[Sequence[float]],
        target: Sequence[int],
        p: float = 1,
        margin: float = 1,
        weight: Sequence[float] | None = None,
    ) -> None:
        found.append(
            {"name": name, "input": rows, "target": target, "p": float(p),
             "margin": float(margin), "weight": weight}
        )  # fmt: skip

    case("one class costs nothing", [[3.5], [-2.0]], [0, 0])
    case("two classes", [[0.25, -0.5], [1.0, 4.0]], [0, 0])
    equal = [[2.0] * 5, [-7.0] * 5, [0.0] * 5, [0.25] * 5]
    case("all scores equal", equal, [1, 3, 0, 4], margin=0.75)
    kink = [[0.5, 1.5, -0.5, 0.5, 2.5], [2.0, 1.0, 2.0, 1.0, 0.0]]
    kink += [[1.0] * 5, [4.0, 3.0, 2.0, 1.0, 0.0]]
    case("kink, p = 1", kink, [1, 2, 0, 0])
    case("kink, p = 2", kink, [1, 2, 0, 0], p=2)
    case("kink, p = 1.5", kink, [1, 2, 0, 0], p=1.5)
    near = _grid(random.Random("near"), 4, 5, span=2, step=2**-6)
    case("grid, p = 1", near, [0, 4, 2, 2])
    case("grid, p = 2", near, [0, 4, 2, 2], p=2)
    case("grid, p = 3", near, [1, 3, 0, 2], p=3)
    case("grid, p = 1.25", near, [1, 3, 0, 2], p=1.25)
    case("grid, p = 2.5", near, [4, 0, 1, 1], p=2.5)
    case("margin 0", near, [3, 2, 1, 0], margin=0)
    case("margin negative", near, [3, 2, 1, 0], margin=-0.5)
    case("margin negative, p = 2", near, [3, 2, 1, 0], p=2, margin=-0.25)
    case("margin large", near, [3, 2, 1, 0], margin=40)
    weight = [0.5, 2.0, 0.0, -1.5, 3.25]
    case("weight, negative and 0 too, p = 1", near, [0, 3, 2, 4], weight=weight)
    case("weight, negative and 0 too, p = 2", near, [0, 3, 2, 1], p=2, weight=weight)
    case("weight, negative and 0 too, p = 1.5", near, [0, 3, 2, 1], p=1.5, weight=weight)
    case("33 classes", _grid(random.Random("wide"), 2, 33, span=3, step=2**-5), [32, 0])
    case("17 classes, p = 2", _grid(random.Random("odd"), 2, 17, span=3, step=2**-5), [16, 7], p=2)
    squares = [[0.0, 300.0, -300.0, 1.0, 2.0], *near[1:]]
    case("squares beyond float16", squares, [0, 3, 2, 1], p=2)
    for exponent in (25, 54):
        tie = float(2**exponent)
        case(f"tie at 2**{exponent}", [[tie] * 5, [-tie] * 5] * 2, [0, 2, 3, 4])
    for p in (1, 2, 1.5):
        rows = _random(random.Random(f"single {p}"), 4, 5, _single)
        case(f"random float32, p = {p}", rows, [4, 0, 2, 1], p, _single(0.7))
        rows = _random(random.Random(f"double {p}"), 4, 5, float)
        case(f"random float64, p = {p}", rows, [1, 3, 0, 4], p, 0.7)
    rows = [[_single(score + 4096) for score in row] for row in rows]
    case("cancellation", rows, [1, 3, 0, 4], 2, 0.5)
    sizes = [[math.ldexp(score, 7 * j - 20) for j, score in enumerate(row)] for row in near]
    case("scores of many sizes", sizes, [0, 1, 2, 4])
    return found


def _grid(rng: random.Random, n: int, classes: int, span: int, step: float) -> list[list[float]]:
    last = int(span / step)
    return [[rng.randint(-last, last) * step for _ in range(classes)] for _ in range(n)]


def _random(
    rng: random.Random, n: int, classes: int, kind: Callable[[float], float]
) -> list[list[float]]:
    return [[kind(rng.uniform(-2, 2)) for _ in range(classes)] for _ in range(n)]


def _single(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _holders(rows: Sequence[Sequence[float]]) -> list[str]:
    """Name the dtypes that hold every score exactly, as normal numbers."""
    bits, lowest, highest = 1, 0, 0
    for value in (score for row in rows for score in row if score):
        numerator, denominator = abs(value).as_integer_ratio()
        odd = numerator // (numerator & -numerator)
        bits = max(bits, odd.bit_length())
        exponent = numerator.bit_length() - denominator.bit_length()
        lowest, highest = min(lowest, exponent), max(highest, exponent)
    limits = {"float16": (11, -14, 15), "bfloat16": (8, -126, 127), "float32": (24, -126, 127)}
    fitting = [
        name
        for name, (most, low, high) in limits.items()
        if bits <= most and low <= lowest and highest <= high
    ]
    return [*fitting, "float64"]


def _rounded_up(scale: Fraction) -> str:
    """Round to 8 bits, upwards."""
    if not scale:
        return (0.0).hex()
    mantissa, exponent = math.frexp(float(scale))
    return math.ldexp(math.ceil(mantissa * 256) + 1, exponent - 8).hex()


def _hex(value: Any, convert: Callable[[Any], str]) -> Any:
    return [_hex(v, convert) for v in value] if isinstance(value, list) else convert(value)


def text() -> str:
    """Write the file.

    Returns
    -------
    str
        JSON, one golden vector a line.
    """
    lines = []
    for case in cases():
        results = exact(case["input"], case["target"], case["p"], case["margin"], case["weight"])
        weight = case["weight"]
        line = {
            "name": case["name"],
            "dtypes": _holders(case["input"]),
            "p": case["p"].hex(),
            "margin": case["margin"].hex(),
            "weight": None if weight is None else _hex(list(weight), float.hex),
            "target": case["target"],
            "input": _hex(case["input"], float.hex),
        }
        for name, value in results.items():
            line[name] = _hex(value, _rounded_up if "scale" in name else lambda v: float(v).hex())
        lines.append("  " + json.dumps(line))
    head = json.dumps(FORMAT, indent=1).removesuffix("\n}")
    return head + ',\n "vectors": [\n' + ",\n".join(lines) + "\n ]\n}\n"


if __name__ == "__main__":
    print(text(), end="")
