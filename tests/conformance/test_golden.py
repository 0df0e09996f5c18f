"""The golden vectors: the file is what its script makes, and the script is right."""

import math
from fractions import Fraction
from importlib.resources import files

import pytest

from mml_arrayapi.conformance import make_golden
from mml_arrayapi.conformance.golden import golden_vectors
from mml_arrayapi.conformance.reference import difference, reference


def test_the_script_makes_the_same_file():
    stored = files("mml_arrayapi.conformance").joinpath("golden.json").read_bytes()
    assert make_golden.text().encode("ascii") == stored


def test_exact_values_by_hand():
    """One row, worked out on paper: z = 1/2 and 3/2 for the classes 1 and 2."""
    exact = make_golden.exact([[1.0, 0.5, 1.5]], [0], 2, 1.0, [3.0, 0.0, 0.0])
    assert exact["losses"] == [Fraction(1, 4) + Fraction(9, 4)]
    assert exact["grad"] == [[-4, 1, 3]]
    # 2 * z * (|x_j| + |x_y| + |margin|), and the value: 2.5 + 3 * 3.5 + 2.5
    assert exact["loss_scales"] == [Fraction(31, 2)]
    # per class 2 * size + its gradient: 2 * 2.5 + 1, 2 * 3.5 + 3, and their sum
    assert exact["grad_scales"] == [[16, 6, 10]]


def test_powers_that_are_not_rational_are_right_to_float64():
    exact = make_golden.exact([[0.0, 1.0]], [0], 1.5, 1.0, None)
    assert float(exact["losses"][0]) == 2.0**0.5  # 2 ** 1.5 / 2
    assert float(exact["grad"][0][1]) == pytest.approx(0.75 * 2.0**0.5, rel=1e-15)


def test_every_scale_bounds_its_value():
    for vector in golden_vectors():
        assert all(s >= abs(v) for s, v in zip(vector.loss_scales, vector.losses, strict=True))


def test_dtypes_named_hold_the_scores_exactly():
    np = pytest.importorskip("numpy")
    for vector in golden_vectors():
        scores = np.asarray(vector.input)
        for dtype in ("float16", "float32"):
            with np.errstate(over="ignore"):
                exact = bool((scores.astype(dtype).astype("float64") == scores).all())
            assert exact == (dtype in vector.dtypes), (vector.name, dtype)


def test_the_float64_reference_is_the_exact_one_rounded():
    """The two definitions share no line; each golden vector's numbers agree within their scales."""
    for vector in golden_vectors():
        got = reference(
            vector.input, vector.target, p=vector.p, margin=vector.margin, weight=vector.weight
        )
        for reduction in ("sum", "mean"):
            total = getattr(vector, reduction), getattr(vector, f"{reduction}_scale")
            assert difference(got.total(reduction)[0], *total, "float64") is None, vector.name
        assert difference(got.losses, vector.losses, vector.loss_scales, "float64") is None
        assert difference(got.grad, vector.grad, vector.grad_scales, "float64") is None


def test_the_float64_reference_ignores_samples():
    rows = [[1.0, 0.5, 1.5], [math.nan, 0.0, 0.0], [0.0, 0.0, 0.0]]
    got = reference(rows, [0, 7, 1], ignore_index=7)
    assert got.losses == [2 / 3, 0, 2 / 3]
    assert got.grad[1] == [0, 0, 0]
    assert got.total("mean")[0] == got.total("sum")[0] / 2
    assert math.isnan(reference(rows[:1], [0], ignore_index=0).total("mean")[0])
    assert reference([], []).losses == []


def test_the_float64_reference_gives_a_row_of_nan_for_every_loss_of_nan():
    for x, weight in (([0.0, math.inf], [0.0, 1.0]), ([0.0, 1.0], [math.nan, 1.0])):
        got = reference([x], [0], weight=weight)
        assert all(map(math.isnan, (*got.losses, *got.grad[0])))
