"""The generic implementation on every library: overflow, NaN rows, traps, ignored samples, sums."""

import math
import warnings

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, multi_margin_loss, multi_margin_loss_and_grad
from mml_arrayapi.backends import eager, numpy_formula
from mml_arrayapi.libraries import library_of
from mml_arrayapi.wide_sum import LEVELS, RUN, divided_sum
from tests.reference import loss_and_grad as reference

NAN, INF = math.nan, math.inf
POWERS = [1, 1.5, 2, 3]


def generic(lib, scores, targets, *, dtype="float32", weight=None, grad_output=None, **options):
    """Loss and gradient as NumPy arrays, by the generic implementation."""
    if weight is not None:
        options["weight"] = lib.array(np.asarray(weight, np.float32))
    if grad_output is not None:
        options["grad_output"] = lib.array(grad_output)
    x = lib.array(np.asarray(scores), dtype)
    results = multi_margin_loss_and_grad(x, lib.array(targets), backend="generic", **options)
    return tuple(map(lib.numpy, results))


@pytest.fixture
def threads_may_warn():
    """Let NumPy warn of infinities in Dask's threads, where the caller's errstate isn't seen."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(invalid value|overflow)", RuntimeWarning)
        yield


def rows(values):
    """Which rows are NaN throughout; fail where one is in part."""
    nan = np.isnan(values)
    assert nan.any(axis=1).tolist() == nan.all(axis=1).tolist()
    return nan.all(axis=1).tolist()


# Finite answers stay finite


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("p", "size"), [(1, 3e38), (1, 1e38), (2, 1.7e19), (3, 6e12), (1.5, 4e25)], ids=str
)
def test_sums_over_classes_do_not_overflow(lib, p, size, reduction):
    scores = np.zeros((1, 16), np.float32)
    scores[0, 0] = -size
    loss, grad = generic(lib, scores, [0], p=p, margin=0.0, reduction=reduction)
    size = float(np.float32(size))
    np.testing.assert_allclose(loss.ravel(), size**p * 15 / 16, rtol=2e-6)
    slope = p * size ** (p - 1) / 16
    np.testing.assert_allclose(grad, [[-15 * slope, *[slope] * 15]], rtol=2e-6)


def test_a_weight_of_zero_on_a_row_of_large_terms(lib):
    loss, grad = generic(
        lib, [[-3e37] + [0.0] * 9], [0], weight=[0.0] * 10, margin=0.0, reduction="none"
    )
    assert loss.tolist() == [0]
    assert not grad.any()


def test_sums_over_samples_do_not_overflow(lib):
    scores = np.array([[0.0, 3e38]] * 9, np.float32)
    loss, _ = generic(lib, scores, [0] * 9, margin=0.0)
    np.testing.assert_allclose(loss, 1.5e38, rtol=1e-6)
    weight = [1.0, -1.0]  # the sum of all is small, that of the first rows is not
    scores = np.array([[0.0, 3e38]] * 4 + [[3e38, 0.0]] * 4, np.float32)
    loss, _ = generic(lib, scores, [0] * 4 + [1] * 4, margin=0.0, weight=weight, reduction="sum")
    assert abs(loss) < 1e32  # where the compiler adds one before it has rounded the other


def test_float64_sums_do_not_overflow(lib):
    if not lib.has("float64"):
        pytest.skip(f"{lib.name} has no float64")
    scores = np.array([[0.0] + [1.7e308] * 9] * 5)
    loss, grad = generic(lib, scores, [0] * 5, margin=0.0, dtype="float64")
    np.testing.assert_allclose(loss, 1.7e308 * 0.9, rtol=1e-14)
    np.testing.assert_allclose(grad[0], [-0.18, *[0.02] * 9], rtol=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_losses_beyond_the_dtype_have_a_finite_sum(lib, dtype, reduction):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    size = {"float32": 1e38, "float64": 1e308}[dtype]
    scores = np.array([[0.0, size], [size, 0.0], [0.0, size / 64]])
    how = {"dtype": dtype, "margin": 0.0, "weight": [40.0, -40.0], "reduction": reduction}
    loss, _ = generic(lib, scores, [0, 1, 0], **how)
    n = 3 if reduction == "mean" else 1
    np.testing.assert_allclose(loss, size / 64 * 20 / n, rtol=1e-4 if dtype == "float32" else 1e-13)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_weights_keep_their_digits(lib, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    large, small = {"float32": (1e37, 1e-36), "float64": (1e300, 1e-310)}[dtype]
    how = {"dtype": dtype, "margin": 0.0, "reduction": "sum"}
    weight = lib.array(np.full(3, small), dtype)
    scores = np.array([[0, large, large / 4], [large, 0, 0]])
    loss = multi_margin_loss(
        lib.array(scores, dtype),
        lib.array([0, 1]),
        weight=weight,
        backend="generic",
        reduction="sum",
    )
    wanted = reference(scores, [0, 1], weight=lib.numpy(weight), reduction="sum")[0]
    np.testing.assert_allclose(lib.numpy(loss), wanted, rtol=1e-6)
    scores[0, 1] = np.inf
    assert generic(lib, scores, [0, 1], weight=[1e-36] * 3, **how)[0] == np.inf


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_16_bit_sums_are_finite_where_the_result_is(lib, dtype, reduction):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    scores = np.array([[0.0] + [60000.0] * 15] * 2 + [[60000.0] + [0.0] * 15] * 30)
    options = {"weight": [0.25] * 16} if reduction == "sum" else {}
    loss, _ = generic(
        lib, scores, [0] * 32, margin=0.0, dtype=dtype, reduction=reduction, **options
    )
    held = float(lib.numpy(lib.array(np.asarray([60000.0]), dtype))[0])
    wanted = held * 15 / 16 * (2 * 0.25 if reduction == "sum" else 2 / 32)
    np.testing.assert_allclose(loss, wanted, rtol=4e-3)


@pytest.mark.parametrize("p", POWERS)
def test_sums_on_a_device_without_float64(p):
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("no_float64")
    size = {1: 3e38, 1.5: 4e25, 2: 1.7e19, 3: 6e12}[p]
    scores = np.zeros((3, 200), np.float32)
    scores[:, 0] = -size
    x = xp.asarray(scores, device=device)
    t = xp.asarray(np.zeros(3, np.int32), device=device)
    w = xp.asarray(np.array([0.0] + [1.0] * 199, np.float32), device=device)
    for weight, factor in ((None, 1), (w, 0)):
        loss, grad = multi_margin_loss_and_grad(x, t, p=p, margin=0.0, weight=weight)
        assert loss.dtype == grad.dtype == xp.float32
        size = float(np.float32(size))
        assert float(loss) == pytest.approx(factor * size**p * 199 / 200, rel=2e-6)
        slope = factor * p * size ** (p - 1) / 200 / 3
        assert float(grad[0, 0]) == pytest.approx(-199 * slope, rel=2e-6)


# Parameters beyond the dtype


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_margin_beyond_the_dtype_is_an_infinity(lib, p, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    scores = [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    loss, grad = generic(lib, scores, [0, 2], p=p, margin=1e39, dtype=dtype, reduction="none")
    assert loss.tolist() == [INF, INF]
    assert not np.isnan(grad).any()
    loss, grad = generic(lib, scores, [0, 2], p=p, margin=-1e39, dtype=dtype, reduction="none")
    assert loss.tolist() == [0, 0]
    assert not grad.any()
    loss, grad = generic(lib, [[1.0], [2.0]], [0, 0], p=p, margin=1e39, dtype=dtype)
    assert loss == 0
    assert not grad.any()


@pytest.mark.usefixtures("threads_may_warn")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_margin_that_only_the_result_cannot_hold(lib, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    loss, grad = generic(lib, [[0.0, 0.0]], [0], margin=1e6, dtype=dtype, reduction="none")
    assert loss[0] == (INF if dtype == "float16" else pytest.approx(5e5, rel=4e-3))
    assert grad.tolist() == [[-0.5, 0.5]]


@pytest.mark.usefixtures("threads_may_warn")
@pytest.mark.parametrize("p", POWERS)
def test_a_weight_beyond_the_dtype_is_an_infinity(lib, p):
    if not lib.has("float64"):
        pytest.skip(f"{lib.name} has no float64")
    x, t = lib.array(np.array([[0.0, 2.0, -9.0], [5.0, 0.0, 0.0]], np.float32)), lib.array([0, 0])
    for value in (1e300, -1e300):
        loss, grad = multi_margin_loss_and_grad(
            x,
            t,
            p=p,
            weight=lib.array(np.array([value, 1, 1])),
            backend="generic",
            reduction="none",
        )
        sign = math.copysign(INF, value)
        assert lib.numpy(loss)[0] == sign
        assert lib.numpy(grad)[0].tolist() == [-sign, sign, 0]
        assert np.isnan(lib.numpy(loss)[1])  # infinity times a loss of 0
        assert rows(lib.numpy(grad)) == [False, True]


# Rows whose loss is NaN


@pytest.mark.usefixtures("threads_may_warn")
def test_the_first_target_out_of_range_names_no_class(lib):
    scores = np.asarray([[0.5, 1.0, 2.0]] * 3)
    loss, grad = generic(lib, scores, [3, -1, 2], check_target="nan", reduction="none")
    assert np.isnan(loss).tolist() == [True, True, False]
    assert rows(grad) == [True, True, False]


@pytest.mark.parametrize("p", [1, 2])
def test_a_single_class_costs_nothing_but_keeps_its_nan(lib, p):
    loss, grad = generic(lib, [[NAN], [2.0]], [0, 0], p=p, reduction="none")
    np.testing.assert_array_equal(loss, [NAN, 0])
    np.testing.assert_array_equal(grad, [[NAN], [0]])


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(
    ("row", "weight"),
    [
        ([0.0, NAN, 5.0], 1),
        ([NAN, 0.0, 5.0], 1),
        ([INF, INF, 0.0], 1),
        ([-INF, -INF, 0.0], 1),
        ([0.0, 0.0, -9.0], NAN),
        ([0.0, INF, -9.0], 0),
    ],
    ids=["score", "own score", "inf - inf", "-inf + inf", "weight", "0 * inf"],
)
def test_a_row_of_nan_whatever_the_cause(lib, p, row, weight):
    loss, grad = generic(
        lib, [row, [0.0, 1.0, 2.0]], [0, 1], p=p, weight=[weight, 1, 1], reduction="none"
    )
    assert np.isnan(loss).tolist() == [True, False]
    assert rows(grad) == [True, False]


# Traps of the host library


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", ["numpy", "array_api_strict"])
def test_traps_see_nothing_on_ordinary_scores(name, dtype, p, rng):
    xp = pytest.importorskip(name)
    if not hasattr(xp, dtype):
        pytest.skip(f"{name} has no {dtype}")
    scores = rng.normal(size=(40, 7))
    targets = rng.integers(0, 7, 40)
    scores[np.arange(40), (targets + 1) % 7] = -INF
    scores[3], targets[3] = NAN, -1
    scores[4], targets[4] = INF, -1
    x, t = xp.asarray(scores, dtype=getattr(xp, dtype)), xp.asarray(targets)
    for options in ({}, {"margin": -1e-3}, {"reduction": "sum"}, {"check_target": "nan"}):
        with np.errstate(all="raise"):
            loss, grad = multi_margin_loss_and_grad(
                x, t, p=p, ignore_index=-1, backend="generic", **options
            )
        assert np.isfinite(float(loss))
        assert np.isfinite(np.asarray(grad)).all()


# Ignored samples


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("ignore_index", [-100, 2])
@pytest.mark.parametrize("filler", [NAN, INF, -INF, 3e38])
def test_ignored_samples_count_for_nothing(lib, rng, p, reduction, ignore_index, filler):
    scores = rng.normal(size=(9, 5)).astype(np.float32)
    targets = rng.integers(3, 5, 9)
    out = np.array([1, 4, 8])
    scores[out], targets[out] = filler, ignore_index
    kept = np.setdiff1d(np.arange(9), out)
    expected, expected_grad = reference(scores[kept], targets[kept], p=p, reduction=reduction)
    upstream = rng.normal(size=9 if reduction == "none" else ()).astype(np.float32)
    loss, grad = generic(
        lib, scores, targets, p=p, reduction=reduction, ignore_index=ignore_index,
        grad_output=upstream, weight=[NAN, NAN, NAN, 1, 1],
    )  # fmt: skip
    np.testing.assert_allclose(loss[kept] if reduction == "none" else loss, expected, rtol=1e-5)
    factor = upstream[kept][:, None] if reduction == "none" else upstream
    np.testing.assert_allclose(grad[kept], expected_grad * factor, rtol=1e-5, atol=1e-7)
    assert not grad[out].any()
    if reduction == "none":
        assert not loss[out].any()


@pytest.mark.parametrize("margin", [1.0, 1e39])
def test_all_samples_ignored(lib, margin):
    scores = np.array([[NAN, 1.0], [INF, INF]], np.float32)
    for reduction, wanted in (("mean", NAN), ("sum", 0.0), ("none", [0, 0])):
        loss, grad = generic(
            lib, scores, [-1, -1], ignore_index=-1, reduction=reduction, margin=margin
        )
        np.testing.assert_array_equal(loss, wanted)
        assert grad.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("dtype", "ignore_index", "matches"),
    [
        ("uint8", -1, False),
        ("uint8", 255, True),
        ("int8", 255, False),
        ("int8", -1, True),
        ("uint64", -1, False),
        ("uint64", 2**64 - 1, True),
        ("int64", 2**64 - 1, False),
        ("uint32", 2**32 - 1, True),
        ("int64", 2**40, True),
        ("int64", -(2**70) - 1, False),
    ],
)
def test_ignore_index_is_compared_before_any_narrowing(lib, dtype, ignore_index, matches):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    info = np.iinfo(dtype)
    value = ignore_index if matches else (ignore_index - info.min) % 2**info.bits + info.min
    targets = lib.array(np.array([0, value], dtype=dtype), dtype)
    x = lib.array(np.array([[0.0, 1.0], [0.0, 1.0]], np.float32))
    loss = multi_margin_loss(
        x, targets, ignore_index=ignore_index, reduction="none", check_target="nan",
        backend="generic",
    )  # fmt: skip
    np.testing.assert_array_equal(lib.numpy(loss), [1, 0 if matches else NAN])


# Byte order


@pytest.mark.parametrize("dtype", [">f4", ">f8", ">f2"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_either_byte_order(rng, dtype, backend):
    scores = rng.normal(size=(6, 4)).astype(dtype)
    targets = rng.integers(0, 4, 6)
    weight = rng.normal(size=4).astype(dtype)
    native = dtype.replace(">", "=")
    expected = multi_margin_loss_and_grad(
        scores.astype(native), targets, weight=weight.astype(native), p=2, backend=backend
    )
    got = multi_margin_loss_and_grad(
        scores, targets.astype(">i4"), weight=weight, p=2, backend=backend
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    losses, grad = multi_margin_loss_and_grad(scores, targets, reduction="none", backend=backend)
    assert losses.dtype == grad.dtype == scores.dtype


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("classes", [3, 40])
def test_a_slope_that_underflows_is_none(backend, classes):
    scores = np.full((1, classes), -1.0)
    scores[0, :2] = 0, 1e-30  # the second class is active, its slope 1e-30 ** 49
    options = {"p": 50, "margin": 0, "backend": backend, "grad_output": np.float64(np.inf)}
    _, grad = multi_margin_loss_and_grad(scores, np.asarray([0]), **options)
    np.testing.assert_array_equal(grad, np.zeros((1, classes)))


# Sums


@pytest.mark.parametrize("n", [1, 2, RUN - 1, RUN, RUN + 1, 1000, RUN**2, RUN**2 + 1, 300_001])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("where", ["numpy", "torch", "jax", "no float64"])
def test_sums_in_runs_are_as_good_as_exact(n, axis, where, rng):
    values = rng.uniform(0.5, 1, size=(n, 2) if axis == 0 else (2, n)).astype(np.float32)
    if where == "no float64":
        xp = pytest.importorskip("array_api_strict")
        terms = xp.asarray(values, device=xp.Device("no_float64"))
    else:
        xp = pytest.importorskip({"jax": "jax.numpy"}.get(where, where))
        terms = xp.asarray(values)
    got = divided_sum(library_of("terms", terms), terms, axis, n)
    got = np.asarray(got.to_device(xp.Device("CPU_DEVICE")) if where == "no float64" else got)
    wanted = values.astype(np.float64).mean(axis=axis, keepdims=True)
    np.testing.assert_allclose(got, wanted, rtol=3e-7)


def test_equal_terms_whose_rounding_errors_add_up():
    # The worst that was found among 10,000 values; one float32 sum is off by 9%.
    xp = pytest.importorskip("array_api_strict")
    terms = xp.full((10_000_000, 1), 0.1, dtype=xp.float32, device=xp.Device("no_float64"))
    got = float(divided_sum(library_of("terms", terms), terms, 0, 10_000_000)[0, 0])
    assert got == pytest.approx(float(np.float32(0.1)), rel=1e-6)
    assert RUN**LEVELS > 10_000_000


@pytest.mark.parametrize("p", [1, 2])
def test_accuracy_for_ten_million_classes(lib, rng, p):
    c = 10_000_000
    scores = rng.uniform(0, 1, size=(1, c)).astype(np.float32)
    hinge = np.maximum(scores[0].astype(np.float64) - float(scores[0, 3]) + 1, 0)
    hinge[3] = 0
    loss, grad = generic(lib, scores, [3], p=p)
    assert float(loss) == pytest.approx(np.sum(hinge**p) / c, rel=1e-6)
    slope = p * hinge ** (p - 1) / c * (hinge > 0)
    assert float(grad[0, 3]) == pytest.approx(-np.sum(slope), rel=1e-6)


# Tiles


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ["numpy", "array_api_strict"])
def test_tiles_change_nothing(name, axis, reduction, rng, monkeypatch):
    xp = pytest.importorskip(name)
    scores = rng.normal(size=(11, 7, 5)).astype(np.float32)
    batch = scores.shape[:axis] + scores.shape[axis + 1 :]
    targets = rng.integers(-1, scores.shape[axis], batch)
    upstream = rng.normal(size=batch if reduction == "none" else ()).astype(np.float32)
    options = {"axis": axis, "reduction": reduction, "ignore_index": -1, "backend": "generic"}
    arrays = xp.asarray(scores), xp.asarray(targets)
    options["grad_output"] = xp.asarray(upstream)
    whole = multi_margin_loss_and_grad(*arrays, **options)
    for tile in (1, 60):
        monkeypatch.setattr(eager, "TILE", tile)
        for got, wanted in zip(multi_margin_loss_and_grad(*arrays, **options), whole, strict=True):
            np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), rtol=1e-6)
            assert got.dtype == wanted.dtype


def test_the_input_is_not_written_to(lib, rng):
    scores = rng.normal(size=(4, 3)).astype(np.float32)
    x, t = lib.array(scores), lib.array([0, 1, 2, -1])
    multi_margin_loss_and_grad(x, t, ignore_index=-1, backend="generic")
    np.testing.assert_array_equal(lib.numpy(x), scores)


# Pieces that a library has in a form of its own


@pytest.mark.parametrize("p", [1, 2])
def test_an_infinite_weight_costs_nothing_where_no_score_does(lib, p, threads_may_warn):
    scores, weight = [[0.0, 5.0, -5.0], [0.0, 5.0, -5.0]], [INF, 1.0, 1.0]
    loss, grad = generic(lib, scores, [0, 1], weight=weight, p=p, reduction="none")
    assert loss.tolist() == [INF, 0]
    assert grad.tolist() == [[-INF, INF, 0], [0, 0, 0]]


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i2", "uint64"])
def test_a_target_that_is_no_class_is_found_in_any_dtype(dtype):
    scores = np.zeros((2, 300), np.float32)
    for value in (-1, 255, 300):
        targets = np.array([0, value]).astype(dtype)
        if 0 <= int(targets[1]) < 300:
            multi_margin_loss(scores, targets, backend="generic")
        else:
            with pytest.raises(InvalidTargetError, match=rf"target\[1\] is {int(targets[1])}, "):
                multi_margin_loss(scores, targets, backend="generic")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("classes", [3, 63, 64, 300])
def test_a_row_has_the_same_bits_among_few_and_many(rng, dtype, classes):
    scores = rng.normal(size=(3000, classes)).astype(dtype)
    targets, weight = rng.integers(0, classes, 3000), rng.random(classes)
    options = {"weight": weight, "reduction": "none", "backend": "generic"}
    whole = multi_margin_loss(scores, targets, **options)
    for n in (1, 7, 500):
        part = multi_margin_loss(scores[:n], targets[:n], **options)
        np.testing.assert_array_equal(part, whole[:n])


def test_many_short_rows_are_added_as_a_few_are(rng):
    few = numpy_formula.FEW
    terms = rng.normal(size=(few, 3)).astype(np.float32)
    many = numpy_formula.total(terms, 1, np.float64)
    one = numpy_formula.total(terms[:10], 1, np.float64)
    np.testing.assert_allclose(many[:10], one, rtol=1e-14)
    assert many.shape == (few, 1)


# Large powers


@pytest.mark.parametrize("p", [5, 17, 50])
def test_large_powers_are_off_by_the_rounding_of_z_times_p(lib, rng, p):
    scores = rng.uniform(-1, 1, size=(20, 6)).astype(np.float32)
    targets = rng.integers(0, 6, 20)
    expected, expected_grad = reference(scores, targets, p=p, reduction="none")
    loss, grad = generic(lib, scores, targets, p=p, reduction="none")
    # |margin| + |x_y| + |x_j| is at most 3 and z at least 1 where it counts: p * 3 roundings.
    np.testing.assert_allclose(loss, expected, rtol=p * 3 * 2**-23)
    scale = np.abs(expected_grad).max()
    np.testing.assert_allclose(grad, expected_grad, atol=scale * p * 3 * 2**-23)


def test_a_subclass_for_the_weight_gives_no_subclass():
    class Other(np.ndarray):
        def __sub__(self, other):
            raise AssertionError("the formula is computed with plain arrays")

    x, y, weight = np.eye(3), np.arange(3), np.ones(3)
    for reduction in ("none", "mean"):
        plain = multi_margin_loss(x, y, weight=weight, reduction=reduction)
        other = multi_margin_loss(x, y, weight=weight.view(Other), reduction=reduction)
        assert type(other) is type(plain)
        np.testing.assert_allclose(other, plain)
