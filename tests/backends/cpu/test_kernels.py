"""The kernels: every type, exponent, layout and reduction, and what they promise beside."""

import functools
import itertools
import math
import struct
from fractions import Fraction

import numpy as np
import pytest

import mml_arrayapi as mml

from .conftest import in_float64, options

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPES = {
    "float64": (np.dtype("float64"), 1e-14, 0),
    "float32": (np.dtype("float32"), 1e-6, 0),
    "float16": (np.dtype("float16"), 6e-4, 6e-8),
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), 5e-3, 0),
}
LAYOUTS = {
    "rows": lambda x: x,
    "fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "strided": lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "fortran reversed": lambda x: np.asfortranarray(x[::-1])[::-1],
    "unaligned": lambda x: unaligned(x),
}
SHAPES = (1, 1), (3, 2), (40, 8), (133, 9), (70, 16), (30, 33), (2, 100), (90, 5), (3, 1103)


def unaligned(x):
    """Copy an array to an odd address."""
    memory = np.empty(x.nbytes + 1, np.uint8)[1:]
    copy = memory.view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.fixture(scope="module")
def problems():
    """A function: the problems of one dtype and exponent, with what comes out in float64."""

    @functools.cache
    def of(dtype, p):
        rng, found = np.random.default_rng(0), []
        for n, c in SHAPES:
            x = rng.normal(size=(n, c)).astype(DTYPES[dtype][0])
            y, upstream = rng.integers(0, c, n), rng.random(n)
            for weight in (None, rng.normal(size=c).astype(np.float16)):
                found.append((x, y, weight, upstream, in_float64(x, y, p, 0.7, weight)))
        return found

    return of


@pytest.mark.parametrize("p", [1, 2, 1.5, 3], ids="p={}".format)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_form_matches_float64(native, problems, dtype, layout, p):
    near, tiny = DTYPES[dtype][1:]
    for rows, y, weight, upstream, wanted in problems(dtype, p):
        x, n = LAYOUTS[layout](rows), len(rows)
        none, grad = options(p, 0.7, "none"), np.empty_like(x)
        losses = native.loss(x, y, weight, none)
        again = native.loss_and_grad(x, y, weight, none, grad, upstream)
        assert losses.dtype == grad.dtype == x.dtype
        for got in (losses, again):
            assert (abs(wide(got) - wanted.losses) <= near * wanted.scale + tiny).all()
        error = abs(wide(grad) - wanted.grad * upstream[:, None])
        assert (error <= near * wanted.grad_scale + tiny).all()
        for reduction, count in (("mean", n), ("sum", 1)):
            total, bound = wanted.losses.sum() / count, wanted.scale.sum() / count
            how = options(p, 0.7, reduction)
            for got in (
                native.loss(x, y, weight, how),
                native.loss_and_grad(x, y, weight, how, grad, 2.0),
            ):
                assert got.dtype == x.dtype
                assert abs(float(got) - total) <= near * bound + tiny
            error = abs(wide(grad) - wanted.grad * 2 / count)
            assert (error <= near * wanted.grad_scale * 2 / count + tiny).all()


def test_sums_of_fractions(native):
    x, y = np.asarray([[0.5, -1.25, 2.0], [8.0, 0.125, -3.0]]), np.asarray([1, 2])
    z = [[Fraction(11, 4), None, Fraction(17, 4)], [Fraction(12), Fraction(33, 8), None]]
    for p in (1, 2, 3):
        losses = [sum(h**p for h in row if h is not None) / 3 for row in z]
        got = native.loss(x, y, None, options(p))
        assert float(got) == pytest.approx(float(sum(losses) / 2), rel=1e-15)


@pytest.mark.parametrize("layout", ["rows", "fortran"])
@pytest.mark.parametrize("c", [5, 12, 700])
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_nan_infinity_and_targets_out_of_range(native, dtype, p, c, layout):
    inf, nan = math.inf, math.nan
    x, y = np.zeros((75, c), dtype), np.zeros(75, np.int64)
    x[:, 3] -= 1  # at the kink
    x[3, c - 1] = x[8, 0] = nan
    x[13, 0] = x[13, 2] = inf  # inf - inf
    y[20], y[41] = c, -1
    x[50, 1] = inf
    x[60, 1:] = -inf  # masked classes cost nothing
    x[61, 0] = inf
    x = LAYOUTS[layout](x)
    how, grad = options(p, reduction="none", check_target="nan"), np.empty_like(x)
    losses = native.loss_and_grad(x, y, None, how, grad)
    assert np.array_equal(losses, native.loss(x, y, None, how), equal_nan=True)
    lost = np.isnan(losses)
    assert np.flatnonzero(lost).tolist() == [3, 8, 13, 20, 41]
    assert np.isnan(grad[lost]).all()
    assert not np.isnan(grad[~lost]).any()
    assert losses[50] == inf
    assert losses[60] == losses[61] == 0
    assert (grad[~lost, 3] == 0).all()
    assert native.loss(x, y, None, options(p)) is None  # raised by whoever finds the words
    mean, again = options(p, check_target="nan"), np.empty_like(x)
    assert np.isnan(native.loss_and_grad(x, y, None, mean, again))
    assert np.array_equal(np.isnan(again), np.isnan(grad))


def test_one_class_costs_nothing_but_a_nan_stays(native):
    x = np.array([[0.0], [math.nan], [math.inf], [-math.inf]])
    losses = native.loss(x, np.zeros(4, int), None, options(reduction="none"))
    np.testing.assert_array_equal(losses, [0, math.nan, 0, 0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("c", [9, 16, 40, 700])
def test_finite_answers_stay_finite(native, dtype, c):
    large = 3e37 if dtype == "float32" else 1.7e308
    for x, y in (
        (np.full((64, c), 0, dtype), np.zeros(64, int)),
        (np.full((1, c), 0, dtype), np.zeros(1, int)),
    ):
        x[:, 0] = -large
        for layout, p in itertools.product(("rows", "fortran"), (1, 1.0)):
            z, grad = LAYOUTS[layout](x), np.empty_like(x)
            mean = native.loss_and_grad(z, y, None, options(p), grad)
            assert float(mean) == pytest.approx(large * ((c - 1) / c), rel=1e-6)
            assert float(native.loss(z, y, None, options(p))) == float(mean)
            assert np.isfinite(grad).all()
            weight = np.ones(c, dtype)
            weight[0] = 0
            assert native.loss(z, y, weight, options(p)) == 0
            assert native.loss_and_grad(z, y, weight, options(p), grad) == 0
            assert (grad == 0).all()
    x = np.zeros((2, c), dtype)
    x[:, 0] = -1e18 if dtype == "float32" else -1.2e154
    grad = np.empty_like(x)
    mean = native.loss_and_grad(x, np.zeros(2, int), None, options(2), grad)
    z = float(x.dtype.type(0) - x[0, 0])
    assert float(mean) == pytest.approx(z * (z * ((c - 1) / c)), rel=1e-6)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_margin_that_the_dtype_cannot_hold_is_infinite(native, dtype, rng):
    for c in (5, 10, 100):
        x, y = rng.normal(size=(20, c)).astype(dtype), rng.integers(0, c, 20)
        grad = np.empty_like(x)
        assert native.loss_and_grad(x, y, None, options(margin=-1e39), grad) == 0
        assert (grad == 0).all()
        assert native.loss_and_grad(x, y, None, options(margin=1e39), grad) == math.inf
        flat = np.zeros_like(x)  # in which each hinge is active: not 0 times infinity
        assert native.loss(flat, y, np.full(c, 1e300), options()) == math.inf


@pytest.mark.parametrize("p", [1, 2, 1.001, 3])
def test_a_difference_that_the_dtype_cannot_hold_is_infinite(native, p):
    """General powers too, which are taken in float64."""
    for c in (2, 5, 40):
        x = np.full((3, c), -2e38, np.float32)
        x[:, 0] = 2e38
        grad = np.empty_like(x)
        y = np.ones(3, int)
        assert native.loss_and_grad(x, y, None, options(p, -3e38), grad) == math.inf
        assert native.loss(x, np.zeros(3, int), None, options(p, 3e38)) == 0
        assert native.loss(x, y, None, options(p, -1e39)) == 0  # not infinity minus infinity
        assert native.loss(x, np.zeros(3, int), None, options(p, 1e39)) == math.inf


def test_parts_that_overflow_to_both_infinities(native):
    # In blocks of samples: one sums to infinity, another to minus infinity, together they are 0.
    n = 2**16
    x = np.zeros((n, 2))
    x[: n // 2, 1] = x[n // 2 :, 0] = 1e305
    y, weight = np.repeat([0, 1], n // 2), np.array([1.0, -1.0])
    grad = np.empty_like(x)
    for reduction in ("mean", "sum"):
        assert native.loss(x, y, weight, options(reduction=reduction)) == 0
        assert native.loss_and_grad(x, y, weight, options(reduction=reduction), grad) == 0
    x[5, 0] = np.nan
    assert math.isnan(native.loss(x, y, weight, options()))


def test_the_margin_survives_large_scores(native):
    # (x_j - x_y) + margin; reassociated, the margin of 1e-3 would vanish in scores of 1e5.
    x = np.full((64, 100), 1e5, np.float32)
    loss = native.loss(x, np.zeros(64, int), None, options(margin=1e-3))
    assert float(loss) == pytest.approx(99e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("shape", "p"), [((1, 10**7), 1), ((1, 10**6), 2), ((10**5, 10), 1), ((10**5, 10), 2)]
)
def test_sums_are_accurate_at_any_size(native, shape, p, rng):
    x, y = rng.random(shape, dtype=np.float32), rng.integers(0, shape[1], shape[0])
    grad = np.empty_like(x)
    loss = native.loss_and_grad(x, y, None, options(p, reduction="sum"), grad)
    z = x.astype(np.float64)  # scores from 0 to 1: every hinge but the target's own is active
    z += 1 - np.take_along_axis(z, y[:, None], 1)
    np.put_along_axis(z, y[:, None], 0, 1)
    assert float(loss) == pytest.approx((z**p).sum() / shape[1], rel=1e-6)
    own = -z.sum(1) * 2 / shape[1] if p == 2 else (1 - shape[1]) / shape[1]
    np.testing.assert_allclose(np.take_along_axis(grad, y[:, None], 1)[:, 0], own, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_and_rounded_exactly(native, dtype):
    kind = DTYPES[dtype][0]
    numbers = np.arange(2**16, dtype=np.uint16).view(kind)
    for c in (2, 9, 64):
        x = np.zeros((2**16, c), kind)
        x[:, -1] = numbers
        how = options(margin=0.0, reduction="none", check_target="nan")
        losses = native.loss(x, np.zeros(2**16, int), None, how)
        with np.errstate(all="ignore"):
            exact = np.maximum(numbers.astype(np.float64), 0) / c
            assert np.array_equal(losses, exact.astype(np.float32).astype(kind), equal_nan=True)


@pytest.mark.parametrize("dtype", [f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64)])
def test_targets_of_every_width(native, dtype, rng):
    x, y = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    expected = native.loss(x, y, None, options())
    z, limits = y.astype(dtype), np.iinfo(dtype)
    assert native.loss(x, z, None, options()) == expected
    assert native.loss(x, np.repeat(z, 3)[::3], None, options()) == expected
    for value in {7, limits.max, limits.min, limits.max - 1} - {0}:
        z[20] = value
        assert native.loss(x, z, None, options()) is None
        left = native.loss(x, z, None, options(ignore_index=int(value)))
        without = native.loss(np.delete(x, 20, 0), np.delete(y, 20), None, options())
        assert left == pytest.approx(without, rel=1e-14)
        assert native.loss(x, z, None, options(ignore_index=int(value) + 2**64)) is None
        assert np.isnan(native.loss(x, z, None, options(check_target="nan")))
    assert native.loss(x, y, None, options(ignore_index=-(10**30))) == expected


@pytest.mark.parametrize("c", [3, 9, 40])
@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_ignored_samples_count_for_nothing(native, rng, c, p):
    x, y = rng.normal(size=(90, c)).astype(np.float32), rng.integers(0, c, 90)
    ignored = rng.random(90) < 0.3
    y[ignored] = -100
    x[ignored] = math.nan
    wanted = in_float64(x[~ignored], y[~ignored], p)
    grad, how = np.empty_like(x), options(p, ignore_index=-100)
    loss = native.loss_and_grad(x, y, None, how, grad)
    assert float(loss) == pytest.approx(wanted.losses.mean(), rel=1e-5)
    assert (grad[ignored] == 0).all()
    np.testing.assert_allclose(grad[~ignored], wanted.grad / (~ignored).sum(), rtol=1e-4, atol=1e-7)
    losses = native.loss(x, y, None, options(p, reduction="none", ignore_index=-100))
    assert (losses[ignored] == 0).all()
    assert np.isfinite(losses).all()
    y[:] = -100
    assert np.isnan(native.loss_and_grad(x, y, None, how, grad))
    assert (grad == 0).all()
    assert native.loss(x, y, None, options(p, reduction="sum", ignore_index=-100)) == 0


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("c", [3, 9, 40])
@pytest.mark.parametrize("p", [1, 2])
def test_a_row_whose_loss_is_nan_has_a_gradient_of_nan(native, weight, c, p, rng):
    x, y = rng.normal(size=(40, c)).astype(np.float32), rng.integers(0, c, 40)
    x[:5] = 0
    x[:5, 0], y[:5] = 100, 0  # no hinge is active: 0 times infinity
    weights = np.ones(c)
    weights[0] = weight
    how, grad = options(p, reduction="none"), np.empty_like(x)
    losses = native.loss_and_grad(x, y, weights, how, grad)
    assert np.isnan(losses[:5]).all()
    assert np.array_equal(np.isnan(losses), np.isnan(grad).all(1))
    assert np.array_equal(np.isnan(losses), np.isnan(grad).any(1))
    assert np.array_equal(losses, native.loss(x, y, weights, how), equal_nan=True)
    again = np.empty_like(x)
    total = native.loss_and_grad(x, y, weights, options(p, reduction="sum"), again)
    assert np.isnan(total)
    assert np.array_equal(again, grad, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 7, 8, 9, 15, 16, 33, 1001])
def test_backward_by_bits_equals_the_one_pass_gradient(native, rng, dtype, c):
    kind = DTYPES[dtype][0]
    x, y = rng.normal(size=(61, c)).astype(kind), rng.integers(0, c, 61)
    x[5, -1] = x[7, 0] = math.nan
    y[9], y[10] = c, -100
    x[11] = x[11, 0]
    upstream, weights = rng.normal(size=61), rng.random(c)
    weights[y[20]] = math.inf
    for layout, weight, reduction in itertools.product(
        ("rows", "strided"), (None, weights), ("none", "mean", "sum")
    ):
        z = LAYOUTS[layout](x)
        how = options(1, 0.5, reduction, -100, -1, "nan")
        factor = upstream if reduction == "none" else -2.0
        grad, again = np.empty_like(z), np.empty_like(z)
        expected = native.loss_and_grad(z, y, weight, how, grad, factor)
        bits = np.zeros(native.row_bytes(z, how) * 61, np.uint8)
        loss = native.loss(z, y, weight, how, None, bits)
        assert np.array_equal(loss, expected, equal_nan=True)
        assert native.grad(z, y, weight, how, again, factor, bits) is again
        assert np.array_equal(again, grad, equal_nan=True)
        assert native.grad(z, y, weight, how, again, factor) is again
        assert np.array_equal(again, grad, equal_nan=True)


@pytest.mark.parametrize("name", ["float64", "float32", "float16"])
def test_bits_fit_in_the_room_that_exported_graphs_keep(native, name):
    torch = pytest.importorskip("torch")
    from mml_arrayapi.backends.pytorch.cpu import mask_shape

    rows = 2**20
    for c in range(1, 70):
        x = np.broadcast_to(np.zeros(c, name), (rows, c))
        (room,) = mask_shape(getattr(torch, name), rows, c)
        size = native.bits_size(x, options())
        assert size < room, c  # its last byte is the mark
        assert (size > 0) == (c > 1), c


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_classes_on_any_axis_and_batches_that_no_stride_walks(native, rng, axis):
    x = rng.normal(size=(4, 5, 6, 7)).astype(np.float32)[::2, :, 1:4]
    y = rng.integers(0, x.shape[axis], np.delete(x.shape, axis))
    grad = np.empty_like(x)
    losses = native.loss_and_grad(x, y, None, options(reduction="none", axis=axis), grad)
    flat = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    wanted = in_float64(flat, y.reshape(-1))
    assert losses.shape == y.shape
    assert (abs(losses.reshape(-1) - wanted.losses) <= 1e-6 * wanted.scale).all()
    moved = np.moveaxis(grad, axis, -1).reshape(flat.shape)
    assert (abs(moved - wanted.grad) <= 1e-6 * wanted.grad_scale).all()


def test_one_sample_spellings(native):
    x, one = np.asarray([0.5, 0.0, -2.0]), 1 / 6
    for z, y in (
        (x, np.asarray(0)),
        (x, np.asarray([0])),
        (x[None], np.asarray([0])),
        (x[None], np.asarray(0)),
    ):
        assert float(native.loss(z, y, None, options())) == pytest.approx(one)
        assert native.loss(z, y, None, options(reduction="none")).shape == y.shape
    assert native.loss(np.asarray(3.0), np.asarray(0), None, options()) == 0
    empty = np.empty((0, 3))
    assert np.isnan(native.loss(empty, np.empty(0, int), None, options()))
    assert native.loss(empty, np.empty(0, int), None, options(reduction="sum")) == 0
    assert native.loss(empty, np.empty(0, int), None, options(reduction="none")).shape == (0,)


@pytest.mark.parametrize("c", [5, 12, 1000])
def test_bits_depend_on_nothing_but_the_numbers(native, rng, monkeypatch, c):
    x, y = rng.normal(size=(400_000 // c, c)).astype(np.float32), rng.integers(0, c, 400_000 // c)
    grad, again = np.empty_like(x), np.empty_like(x)
    first = native.loss_and_grad(x, y, None, options(2), grad)
    for count in ("1", "2", "3", "7"):
        monkeypatch.setenv("MML_ARRAYAPI_NUM_THREADS", count)
        for z in (x, unaligned(x)):
            assert native.loss_and_grad(z, y, None, options(2), again).tobytes() == first.tobytes()
            assert again.tobytes() == grad.tobytes()
    few, some = x[:20], y[:20]
    before = native.loss(few, some, None, options())
    assert {float(native.loss(few, some, None, options())) for _ in range(2000)} == {float(before)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", range(2, 17))
def test_rows_of_few_classes_have_the_same_bits_wherever_they_lie(native, rng, dtype, c):
    kind = DTYPES[dtype][0]
    for n, p, weight in itertools.product((1, 3, 8, 64, 75), (1, 2), (None, rng.random(c))):
        x, y = rng.normal(size=(n, c)).astype(kind), rng.integers(0, c, n)
        y[n // 2] = -100
        for reduction in ("mean", "none"):
            how, grad = options(p, 0.5, reduction, -100), np.empty_like(x)
            expected = native.loss_and_grad(x, y, weight, how, grad)
            pieces = native.loss((x[:, :1], x[:, 1:]), y, weight, how)
            assert np.array_equal(pieces, expected, equal_nan=True)
            for layout in LAYOUTS.values():
                z = layout(x)
                again = np.empty_like(z)
                loss = native.loss_and_grad(z, y, weight, how, again)
                assert np.array_equal(loss, expected, equal_nan=True)
                assert np.array_equal(again, grad)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("c", [2, 3, 5, 16, 40])
def test_a_row_has_the_same_bits_beside_any_other(native, rng, dtype, p, c):
    x, y = rng.normal(size=(70, c)).astype(dtype), rng.integers(0, c, 70)
    how, rest = options(p, 1.0, "none", -1), np.delete(np.arange(70), [20, 33])
    alone = native.loss(x, y, None, how)
    for value in (np.nan, np.inf, -np.inf):
        other, target = x.copy(), y.copy()
        other[20], target[20] = value, -1
        other[33, y[33]] = value
        loss = native.loss_and_grad(other, target, None, how, np.empty_like(x))
        np.testing.assert_array_equal(loss[rest], alone[rest])
        np.testing.assert_array_equal(native.loss(other, target, None, how), loss)


@pytest.mark.parametrize("p", [1, 2])
def test_long_rows_whose_classes_lie_apart_have_the_same_bits(native, rng, p):
    x, y = rng.normal(size=(2, 40_000)).astype(np.float32), np.asarray([3, 39_999])
    apart, grad = np.repeat(x, 2, 1)[:, ::2], np.empty_like(x)
    again = np.empty((2, 80_000), np.float32)[:, ::2]
    loss = native.loss_and_grad(x, y, None, options(p), grad)
    assert native.loss_and_grad(apart, y, None, options(p), again) == loss
    assert np.array_equal(grad, again)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_repeated_rows_have_one_loss_with_the_gradient_and_without(native, rng, dtype, library):
    given = np.asarray if library == "numpy" else pytest.importorskip("torch").from_numpy
    for _ in range(30):
        weight = given(rng.normal(size=33).astype(dtype))
        for size, order, shape, axis in (
            ((33,), (0,), (130, 33), -1),
            ((5, 1, 33), (0, 1, 2), (5, 2, 33), -1),
            ((130, 33), (1, 0), (1, 33, 130), 1),
            ((130, 33), (1, 0), (9, 33, 130), 1),
            ((33, 1), (0, 1), (33, 130), 0),
            ((9, 1, 33), (2, 0, 1), (33, 9, 20), 0),
        ):
            x = rng.normal(size=size).astype(dtype).transpose(order)
            x = np.broadcast_to(x, shape) if library == "numpy" else given(x).expand(shape)
            y = given(rng.integers(0, 33, np.delete(shape, axis)))
            how = {"p": 2, "weight": weight, "reduction": "sum", "axis": axis}
            loss, _ = mml.multi_margin_loss_and_grad(x, y, **how)
            assert loss == mml.multi_margin_loss(x, y, **how)


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("large", [1e300, np.inf])
def test_small_weights_beside_large_scores(native, p, large):
    """In the units of sums that overflow, the slopes times such a weight would have no digits."""
    x, y, weight = np.asarray([[0.0, large ** (1 / p), 2.0]]), np.asarray([0]), np.full(3, 1e-305)
    how = {"p": p, "weight": weight, "reduction": "sum"}
    loss, grad = mml.multi_margin_loss_and_grad(x, y, **how)
    other, wanted = mml.multi_margin_loss_and_grad(x, y, **how, backend="generic")
    np.testing.assert_allclose(loss, other, rtol=1e-12)
    np.testing.assert_allclose(grad, wanted, rtol=1e-12)
    assert grad[0, 0] < 0


def test_read_only_and_memory_mapped_arrays(native, rng, tmp_path):
    x, y = rng.normal(size=(30, 9)), rng.integers(0, 9, 30)
    expected = native.loss(x, y, None, options())
    x.setflags(write=False)
    y.setflags(write=False)
    assert native.loss(x, y, None, options()) == expected
    np.save(tmp_path / "x.npy", x)
    assert native.loss(np.load(tmp_path / "x.npy", mmap_mode="r"), y, None, options()) == expected


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_classes_in_parts(native, rng, dtype, p):
    kind, near, tiny = DTYPES[dtype]
    computing = np.float64 if dtype == "float64" else np.float32
    x, y, upstream = rng.normal(size=(50, 90)).astype(kind), rng.integers(0, 90, 50), rng.random(50)
    y[7], y[8] = 90, -5
    how, edges = options(p, ignore_index=-5), ((0, 3), (3, 40), (40, 90))
    parts = [np.ascontiguousarray(x[:, a:b]) for a, b in edges]
    own = np.zeros(50, computing)
    for (a, _), part in zip(edges, parts, strict=True):
        own += native.own_scores(part, y, how, a, np.empty(50, computing))
    own[7] = math.nan
    sums, slopes = np.zeros(50), np.zeros(50)
    for (a, _), part in zip(edges, parts, strict=True):
        one, two = np.empty(50), np.empty(50)
        assert native.part_sums(part, y, how, a, own, one, two) is one
        sums, slopes = sums + one, slopes + two
    good = np.ones(50, bool)
    good[[7, 8]] = False
    wanted = in_float64(x[good], y[good], p)
    assert (abs(sums[good] / 90 - wanted.losses) <= 1e-6 * wanted.scale).all()
    assert np.isnan(sums[7])
    assert np.isnan(slopes[7])
    assert sums[8] == slopes[8] == 0
    scale, grads = upstream / 90, []
    for (a, _), part in zip(edges, parts, strict=True):
        grads.append(np.empty_like(part))
        got = native.part_grad(part, y, how, a, (own, slopes, scale), grads[-1])
        assert got is grads[-1]
    grad = wide(np.concatenate(grads, 1))
    error = abs(grad[good] - wanted.grad * upstream[good, None])
    assert (error <= near * wanted.grad_scale + tiny).all()
    assert np.isnan(grad[7]).all()
    assert (grad[8] == 0).all()


@pytest.mark.parametrize("sizes", [(25, 25, 25, 25), (3, 4), (1, 1, 1), (2, 0, 5), (100, 3), (9,)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["C", "F", "unaligned", "backwards", "classes first"])
def test_classes_in_several_arrays_have_the_bits_of_whole_rows(native, rng, dtype, sizes, layout):
    kind, n = DTYPES[dtype][0], 333
    pieces = [rng.normal(scale=3, size=(n, size)).astype(kind) for size in sizes]
    pieces[0][5, 0], pieces[-1][6, -1] = math.nan, math.inf
    x, y = np.concatenate(pieces, 1), rng.integers(-1, sum(sizes), n)
    y[5], y[9] = 0, sum(sizes)  # and some are ignored
    weight = rng.normal(size=sum(sizes))
    laid = {
        "C": lambda piece: piece,
        "F": np.asfortranarray,
        "unaligned": unaligned,
        "backwards": lambda piece: np.ascontiguousarray(piece[::-1, ::-1])[::-1, ::-1],
        "classes first": lambda piece: np.ascontiguousarray(piece.T),
    }[layout]
    axis = int(layout != "classes first")
    for p in (1, 2):
        how = options(p, reduction="none", ignore_index=-1, check_target="nan")
        wanted = native.loss(x, y, weight, how)
        got = native.loss(tuple(map(laid, pieces)), y, weight, (*how[:4], axis, how[5]))
        assert got.tobytes() == wanted.tobytes()
        assert np.isnan(wanted[5])
    finite = np.isfinite(wide(wanted))
    some, few = [laid(piece[finite]) for piece in pieces], y[finite]
    tolerance = {"float64": 1e-14, "float32": 1e-6}.get(dtype, 1e-2)
    for p, reduction in ((1, "mean"), (2, "sum")):  # which are added in other groups
        how = options(p, reduction=reduction, ignore_index=-1, check_target="nan")
        wanted = native.loss(x[finite], few, weight, how)
        got = native.loss(tuple(some), few, weight, (*how[:4], axis, how[5]))
        assert float(got) == pytest.approx(float(wanted), rel=tolerance)
        assert type(got) is type(wanted)


def test_classes_in_several_arrays_are_declined(native, rng):
    x, y = rng.normal(size=(4, 3)), np.zeros(4, int)
    none = options(reduction="none")
    assert native.loss((x, x), y, None, none) is not None
    for pieces in (
        (),
        [x, x],
        (x, x[:3]),
        (x, x[None]),
        (x, x.astype(np.float32)),
        (x, x.astype(">f8")),
        (x, x.view(Sub)),
        (x, None),
        (x[:, :0], x),
        (x[:, :0], x[:, :0]),
        (np.asarray(1.0), np.asarray(1.0)),
        (np.zeros((4, 5000)), x),  # more than the room in which rows are put together
    ):
        assert native.loss(pieces, y, None, none) is None, pieces
    for weight in (np.ones(3), np.ones(7)):
        assert native.loss((x, x), y, weight, none) is None
    for how in (options(1.5, reduction="none"), options(axis=2), options(axis=0)):
        assert native.loss((x, x), y, None, how) is None
    assert native.loss((x, x), np.full(4, 6), None, options()) is None
    assert native.loss((x, x), y, None, options(), None, np.empty(8, np.uint8)) is None
    assert native.loss_and_grad((x, x), y, None, options(), np.empty_like(x)) is None
    assert native.bits_size((x, x), options()) == 0


def in_order(row, wanted):
    """The classes of the highest scores: NaN first, then by score, then by class."""
    return sorted(range(len(row)), key=lambda j: (row[j] == row[j], -row[j], j))[:wanted]


def stands(n, wanted):
    """Arrays for what ``standings`` writes."""
    rows = (np.full(n, 77, kind) for kind in ("u1", "i4", "i8"))
    return (np.full((n, wanted), -1, np.int64), *rows)


def told(x, y, margin, unit, best):
    """What ``standings`` should say of a row: kind, bin, confusion; in the computing precision."""
    kind = x.dtype.type
    if len(x) == 1:
        own = x[0]
        lead, inside, rival = (kind(np.inf), False, 0) if own == own else (own, True, 0)
    else:
        rival = best[1] if best[0] == y else best[0]
        lead = x[y] - x[rival]
        inside = not ((x[rival] - x[y]) + kind(margin) <= 0)
    bits = struct.unpack("<q", struct.pack("<d", float(lead) / unit))[0]
    size = (bits & (2**63 - 1)) * (1 if bits >= 0 else -1)
    return inside + 2 * (lead > 0), size >> 47, y * len(x) + rival if lead <= 0 else -1


@pytest.mark.parametrize("wanted", [1, 2, 3, 8])
@pytest.mark.parametrize("c", [1, 2, 8, 9, 33, 63, 64, 100, 257, 1031])
@pytest.mark.parametrize("dtype", DTYPES)
def test_standings(native, rng, dtype, c, wanted):
    n, wanted = 37, min(max(wanted, 2), c)
    x = rng.normal(size=(n, c))
    x[::3] = np.round(x[::3])  # ties, and zeros of both signs
    x[::4][rng.random(x[::4].shape) < 0.3] = -np.inf
    x[::5][rng.random(x[::5].shape) < 0.1] = np.nan
    x[7] = -np.inf
    x[8] = np.sort(x[8])  # each score is higher than all before
    x = x.astype(DTYPES[dtype][0])
    y = rng.integers(0, c, n)
    y[9:20] = np.asarray(wide(x))[9:20].argmax(1)
    want = [in_order(row, wanted) for row in wide(x).tolist()]
    computed = np.asarray(x, np.float64 if dtype == "float64" else np.float32)
    for made, labels, p in (
        (x, y, 1),
        (np.repeat(x, 2, 0)[::2], y.astype("i2"), 2),
        (x[::-1].copy()[::-1], y.astype("u8"), 1.5),
        (unaligned(x), y, 1),
    ):
        how = (p, 0.25, "none", None, -1, "nan")
        weight, losses, found = rng.random(c), np.empty_like(x), stands(n, wanted)
        losses = np.empty(n, x.dtype)
        assert native.standings(made, labels, weight, how, losses, found, 0.5) is found
        assert found[0].tolist() == want
        with np.errstate(all="ignore"):
            rows = zip(computed, y.tolist(), want, strict=True)
            expected = [told(row, k, 0.25, 0.5, best) for row, k, best in rows]
        assert list(zip(*(a.tolist() for a in found[1:]), strict=True)) == expected
        assert np.array_equal(losses, native.loss(made, labels, weight, how), equal_nan=True)
        again = stands(n, wanted)
        assert native.standings(made, labels, None, how, None, again, 0.5) is again
        assert all(map(np.array_equal, found, again))


def test_standings_are_the_same_on_threads(native, rng):
    x, y = rng.normal(size=(70_000, 10)).astype(np.float32), rng.integers(0, 10, 70_000)
    made = []
    for threads in (1, 2):
        losses, found = np.empty(len(x), np.float32), stands(len(x), 3)
        how = (1, 1.0, "none", None, -1, "nan")
        assert native.standings(x, y, None, how, losses, found, 1.0, threads) is found
        made.append((losses, *found))
    assert all(map(np.array_equal, *made))
    assert np.array_equal(made[0][1], np.argsort(-x, axis=1, kind="stable")[:, :3])


def test_standings_are_declined(native):
    x, y, how = np.zeros((4, 3)), np.zeros(4, int), (1, 1.0, "none", None, -1, "nan")
    losses, good = np.empty(4), stands(4, 2)

    def call(x=x, y=y, how=how, losses=losses, written=good, unit=1.0):
        return native.standings(x, y, None, how, losses, written, unit)

    assert call() is good
    for other in (x.view(Sub), x.astype(">f8"), x.astype(int), x[0], x[:, ::-1], x[:3], x.tolist()):
        assert call(x=other) is None, other
    for other in (y - 1, y + 3, y[:3], y.astype(float), y.tolist()):
        assert call(y=other) is None, other
    for other in (
        (1, 1.0, "none", 0, -1, "nan"),
        (1, 1.0, "none", None, 0, "nan"),
        (0.5, *how[1:]),
    ):
        assert call(how=other) is None, other
    for other in (losses[:3], losses.astype("f4"), losses.tolist()):
        assert call(losses=other) is None, other
    assert call(unit=np.float32(1)) is None
    for k, array in enumerate(good):
        fixed = array.copy()
        fixed.setflags(write=False)
        wrong = [array[:3], array[None], array.astype("f4"), fixed, array.tolist()]
        wrong += [np.repeat(array, 2, 0)[::2]]
        wrong += [unaligned(array)] if array.itemsize > 1 else []
        if k == 0:
            wrong += [array.T.copy().T, array[:, :0], array[:, :1].copy(), np.zeros((4, 4), int)]
        for other in wrong:
            assert call(written=(*good[:k], other, *good[k + 1 :])) is None, other
    assert call(written=good[:3]) is None
    assert call(np.zeros((4, 9)), written=stands(4, 9)) is None
    with pytest.raises(TypeError, match="takes 7 to 8 positional arguments, but got 1"):
        native.standings(x)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_sums(native, rng, dtype):
    info = np.finfo(dtype)
    values = np.exp(rng.uniform(-80, 80, 3000)) * rng.choice([-1, 1], 3000)
    values[:6] = info.max, info.max, -info.max, info.tiny, info.smallest_subnormal, -0.0
    values[6:500] = info.smallest_subnormal * rng.integers(-99, 99, 494)
    if dtype == np.float64:
        values[500:1000] = np.ldexp(rng.normal(size=500), rng.integers(-1074, 1022, 500))
    values, groups = values.astype(dtype), rng.integers(0, 6, 3000)
    groups[groups == 3] = 4  # none is empty but this
    for made, whose in (
        (values, groups),
        (values[::-1], groups[::-1]),
        (unaligned(values), groups),
    ):
        digits = np.full((6, 70), 99, np.uint32)
        assert native.exact_sums(made, whose, digits) is digits
        got = [int.from_bytes(row.astype("<u4").tobytes(), "little", signed=True) for row in digits]
        exact = [sum(map(Fraction, values[groups == k].tolist())) for k in range(6)]
        assert got == [value * 2**1130 for value in exact]


def test_exact_sums_are_declined(native):
    values, groups, digits = np.ones(3), np.arange(3), np.zeros((3, 70), np.uint32)
    assert native.exact_sums(values, groups, digits) is digits
    for wrong in (
        (values.astype("f2"), groups, digits),
        (values.astype(">f8"), groups, digits),
        (values[:2], groups, digits),
        (values[None], groups, digits),
        (np.asarray([1, np.nan, 1]), groups, digits),
        (np.asarray([1, 1, -np.inf]), groups, digits),
        (values, groups - 1, digits),
        (values, groups + 1, digits),
        (values, groups.astype("i4"), digits),
        (values, groups, digits.astype("i4")),
        (values, groups, digits[:, :69].copy()),
        (values, groups, digits[:, ::-1]),
        (values.tolist(), groups, digits),
    ):
        assert native.exact_sums(*wrong) is None, wrong
    with pytest.raises(TypeError, match="takes 3 to 3 positional arguments, but got 1"):
        native.exact_sums(values)


class Sub(np.ndarray):
    """A subclass, which may mean something else."""


def test_what_is_declined(native):
    x, y, w = np.zeros((4, 3)), np.zeros(4, int), np.ones(3)
    assert native.loss(x, y, w, options()) is not None
    for other in (
        x.view(Sub),
        np.ma.masked_array(x),
        x.astype(">f8"),
        x.astype(int),
        x.astype(bool),
        x.astype(complex),
        x.astype("g"),
        x.tolist(),
        None,
        x[:, :0],
        x[None],
    ):
        assert native.loss(other, y, w, options()) is None, type(other)
    for other in (y.astype(float), y.astype(bool), y.astype(">i8"), y[:3], y[:, None], [0] * 4):
        assert native.loss(x, other, w, options()) is None, other
    for other in (w[:2], w[None], w.astype(int), w.astype(">f4"), [1.0] * 3):
        assert native.loss(x, y, other, options()) is None, other
    for other in (
        options(p=0.5),
        options(p=math.nan),
        options(p=math.inf),
        options(p=True),
        options(p="1"),
        options(p=10**400),
        options(margin=math.inf),
        options(margin=None),
        options(reduction="max"),
        options(reduction=1),
        options(ignore_index=1.0),
        options(ignore_index=True),
        options(axis=2),
        options(axis=-3),
        options(axis=1.0),
        options(axis=2**70),
        options(check_target=True),
        options(check_target="yes"),
        options()[:5],
        list(options()),
    ):
        assert native.loss(x, y, w, other) is None, other
    none = options(reduction="none")
    for grad in (x[:2].copy(), x.astype(np.float32), x.T.copy(), x.tolist(), None):
        assert native.loss_and_grad(x, y, w, options(), grad) is None
    fixed = x.copy()
    fixed.setflags(write=False)
    assert native.loss_and_grad(x, y, w, options(), fixed) is None
    for upstream in (np.ones(3), np.ones((4, 1)), 1.0, "1", np.ones(4, int)):
        assert native.loss_and_grad(x, y, w, none, x.copy(), upstream) is None, upstream
    for upstream in (np.ones(4), "1", 10**400):
        assert native.loss_and_grad(x, y, w, options(), x.copy(), upstream) is None, upstream
    for bits in (np.empty(3, np.uint8), np.empty(4, np.int8), b"1234"):
        assert native.loss(x, y, w, options(), None, bits) is None
    with pytest.raises(TypeError, match="positional arguments"):
        native.loss(x, y)


def test_bfloat16_in_the_other_byte_order():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    swapped = np.dtype(ml_dtypes.bfloat16).newbyteorder()
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 5)).astype(ml_dtypes.bfloat16), np.arange(4)
    w, g = np.arange(1, 6).astype(x.dtype), np.asarray(2, x.dtype)
    for words, others in (({}, {}), ({"weight": w}, {"weight": w.astype(swapped)})):
        for backend in (None, "generic"):
            want = mml.multi_margin_loss(x, y, backend=backend, **words)
            assert mml.multi_margin_loss(x.astype(swapped), y, backend=backend, **others) == want
    want = mml.multi_margin_loss_and_grad(x, y, grad_output=g)
    for one in (x, x.astype(swapped)):
        got = mml.multi_margin_loss_and_grad(one, y, grad_output=g.astype(swapped))
        assert got[0] == want[0]
        assert (got[1] == want[1]).all()
    accumulators = mml.LossAccumulator(), mml.LossAccumulator()
    for made, one in zip(accumulators, (x, x.astype(swapped)), strict=True):
        made.update(one, y)
    assert accumulators[0].compute() == accumulators[1].compute()


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((1,) * 16 + (3,), "input has 17 axes, the kernel takes 16"),
        ((0, 2**31), "input has 2147483648 classes, the kernel takes 2147483583"),
    ],
    ids=["axes", "classes"],
)
def test_what_is_too_large_is_left_to_the_formula(shape, reason):
    x, y = np.broadcast_to(np.float32(0), shape), np.zeros(shape[:-1], int)
    assert mml.explain(x, y).considered[0] == ("numpy-cpu", reason)
    assert mml.multi_margin_loss(x, y, reduction="sum") == pytest.approx(2 / 3 if x.size else 0)
    with pytest.raises(ValueError, match=reason):
        mml.multi_margin_loss(x, y, backend="numpy-cpu")
