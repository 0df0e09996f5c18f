"""Values, gradients, shapes and dtypes on every library, against the exact reference."""

import math

import numpy as np
import pytest

from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
from tests.reference import loss_and_grad as reference

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
FLOATS = ("float16", "bfloat16", "float32", "float64")


def problem(rng, n=13, c=7, weighted=False):
    scores = rng.normal(size=(n, c)).astype(np.float32)
    targets = rng.integers(0, c, n)
    return scores, targets, rng.normal(size=c).astype(np.float32) if weighted else None


def optional(lib, weight):
    return None if weight is None else lib.array(weight)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", [1, 2, 3, 1.5, 2.25])
@pytest.mark.parametrize(
    ("weighted", "margin"), [(False, 1.0), (True, 0.7), (True, -0.5), (False, 0.0)]
)
def test_value_and_gradient(lib, rng, p, margin, weighted, reduction):
    scores, targets, weight = problem(rng, weighted=weighted)
    options = {"p": p, "margin": margin, "reduction": reduction}
    expected, expected_grad = reference(scores, targets, weight=weight, **options)
    arguments = lib.array(scores), lib.array(targets)
    options["weight"] = optional(lib, weight)
    loss, grad = multi_margin_loss_and_grad(*arguments, **options)
    np.testing.assert_allclose(lib.numpy(loss), expected, rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(lib.numpy(grad), expected_grad, rtol=3e-6, atol=1e-6)
    assert lib.dtype_name(loss) == lib.dtype_name(grad) == "float32"
    assert grad.shape == (13, 7)
    assert loss.shape == ((13,) if reduction == "none" else ())
    alone = lib.numpy(multi_margin_loss(*arguments, **options))
    # XLA compiles two programs, which may add up in different orders on a GPU.
    rtol = 3e-7 if lib.name == "jax" and lib.on_gpu else 0
    np.testing.assert_allclose(alone, lib.numpy(loss), rtol=rtol)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_of_the_result_and_precision(lib, rng, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    scores, targets, weight = problem(rng, weighted=True)
    x = lib.array(scores, dtype)
    options = {"p": 2, "margin": 0.25}
    expected, expected_grad = reference(lib.numpy(x), targets, weight=weight, **options)
    loss, grad = multi_margin_loss_and_grad(
        x, lib.array(targets), weight=lib.array(weight), **options
    )
    assert lib.dtype_name(loss) == lib.dtype_name(grad) == dtype
    tolerance = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(lib.numpy(loss), expected, rtol=tolerance)
    np.testing.assert_allclose(lib.numpy(grad), expected_grad, rtol=tolerance, atol=tolerance / 1e3)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_targets_of_any_integer_dtype(lib, rng, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    scores, targets, _ = problem(rng, c=300)
    targets %= 100
    loss = multi_margin_loss(lib.array(scores), lib.array(targets, dtype))
    np.testing.assert_allclose(lib.numpy(loss), reference(scores, targets)[0], rtol=1e-6)


@pytest.mark.parametrize("weight_dtype", ["float16", "float32", "float64"])
def test_weight_of_another_precision(lib, rng, weight_dtype):
    if not lib.has(weight_dtype):
        pytest.skip(f"{lib.name} has no {weight_dtype}")
    scores, targets, weight = problem(rng, weighted=True)
    w = lib.array(weight, weight_dtype)
    loss = multi_margin_loss(lib.array(scores), lib.array(targets), weight=w)
    assert lib.dtype_name(loss) == "float32"
    expected = reference(scores, targets, weight=lib.numpy(w))[0]
    np.testing.assert_allclose(lib.numpy(loss), expected, rtol=1e-5)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3])
def test_axis_and_batches_of_any_rank(lib, rng, axis):
    scores = rng.normal(size=(3, 4, 5)).astype(np.float32)
    n_classes = scores.shape[axis]
    last = np.moveaxis(scores, axis, -1)
    targets = rng.integers(0, n_classes, last.shape[:-1])
    expected, expected_grad = reference(
        last.reshape(-1, n_classes), targets.ravel(), reduction="none"
    )
    loss, grad = multi_margin_loss_and_grad(
        lib.array(scores), lib.array(targets), axis=axis, reduction="none"
    )
    np.testing.assert_allclose(lib.numpy(loss).ravel(), expected, rtol=2e-6)
    assert loss.shape == targets.shape
    grad = np.moveaxis(lib.numpy(grad), axis, -1).reshape(expected_grad.shape)
    np.testing.assert_allclose(grad, expected_grad, rtol=2e-6)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("input_shape", "target_shape"),
    [((4,), ()), ((4,), (1,)), ((1, 4), ()), ((1, 4), (1,)), ((), ()), ((), (1,))],
)
def test_one_sample_in_every_spelling(lib, rng, input_shape, target_shape, reduction):
    scores = rng.normal(size=input_shape).astype(np.float32)
    target = np.zeros(target_shape, dtype=np.int64)
    loss, grad = multi_margin_loss_and_grad(
        lib.array(scores), lib.array(target), reduction=reduction
    )
    assert loss.shape == (target_shape if reduction == "none" else ())
    assert grad.shape == input_shape
    expected, expected_grad = reference(scores.reshape(1, -1), [0])
    np.testing.assert_allclose(lib.numpy(loss).ravel(), [expected], rtol=1e-6)
    np.testing.assert_allclose(lib.numpy(grad).reshape(1, -1), expected_grad, rtol=1e-6)
    only = multi_margin_loss(lib.array(scores), lib.array(target), reduction=reduction)
    assert only.shape == loss.shape


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3), (0, 1)])
def test_empty_batch(lib, shape):
    x, t = lib.array(np.zeros(shape, np.float32)), lib.array(np.zeros(shape[:-1], np.int64))
    assert multi_margin_loss(x, t, reduction="none").shape == shape[:-1]
    assert float(multi_margin_loss(x, t, reduction="sum")) == 0
    assert math.isnan(float(multi_margin_loss(x, t)))
    for reduction in ("none", "sum", "mean"):
        loss, grad = multi_margin_loss_and_grad(x, t, reduction=reduction)
        assert grad.shape == shape
        assert lib.numpy(grad).shape == shape
        assert loss.shape == (shape[:-1] if reduction == "none" else ())


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_gradient_is_zero_at_a_kink(lib, p):
    # z = (1 - 2) + 1 = 0 for the first class, exactly.
    x, t = lib.array(np.array([[1.0, 2.0, 5.0]], np.float32)), lib.array([1])
    loss, grad = multi_margin_loss_and_grad(x, t, p=p)
    slope = p * 4 ** (p - 1) / 3
    np.testing.assert_allclose(lib.numpy(grad), [[0, -slope, slope]], rtol=1e-6)
    np.testing.assert_allclose(lib.numpy(loss), 4**p / 3, rtol=1e-6)


@pytest.mark.parametrize("p", [1, 1.5, 2])
@pytest.mark.parametrize("where", ["target", "other", "only class"])
def test_nan_score_makes_the_sample_nan(lib, p, where):
    scores = np.array([[5.0, 0.0, 1.0], [0.0, 9.0, 9.0]], np.float32)
    if where == "only class":
        scores = scores[:, :1]
    scores[0, 0 if where != "other" else 1] = np.nan
    x, t = lib.array(scores), lib.array([0, 0])
    loss, grad = multi_margin_loss_and_grad(x, t, p=p, reduction="none")
    assert np.isnan(lib.numpy(loss)).tolist() == [True, False]
    assert np.isnan(lib.numpy(grad)).all(axis=1).tolist() == [True, False]
    assert np.isnan(lib.numpy(grad)).any(axis=1).tolist() == [True, False]
    assert math.isnan(float(multi_margin_loss(x, t, p=p)))


def test_infinite_scores(lib):
    inf = np.inf
    scores = np.array([[0, -inf, 1], [inf, 0, -inf], [-inf, 0, 1], [0, inf, 1]], np.float32)
    loss, grad = multi_margin_loss_and_grad(
        lib.array(scores), lib.array([0, 0, 0, 0]), p=1, reduction="none"
    )
    np.testing.assert_allclose(lib.numpy(loss), [2 / 3, 0, inf, inf], rtol=1e-6)
    third = np.float32(1 / 3)
    expected = [
        [-third, 0, third],
        [0, 0, 0],
        [-2 * third, third, third],
        [-2 * third, third, third],
    ]
    np.testing.assert_allclose(lib.numpy(grad), expected, rtol=1e-6)


def test_infinity_minus_infinity_is_nan(lib):
    x = lib.array(np.array([[np.inf, np.inf, 0.0]], np.float32))
    with np.errstate(invalid="ignore"):
        loss, grad = multi_margin_loss_and_grad(x, lib.array([0]), reduction="none")
        assert np.isnan(lib.numpy(loss)).all()
        assert np.isnan(lib.numpy(grad)).all()


def test_a_large_score_does_not_swallow_the_margin(lib):
    x = lib.array(np.array([[2.0**25, 2.0**25]], np.float32))
    assert float(multi_margin_loss(x, lib.array([0]))) == 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_scores_do_not_overflow_on_the_way(lib, dtype):
    if not lib.has(dtype):
        pytest.skip(f"{lib.name} has no {dtype}")
    # One sample's loss, 300 ** 2 = 90000, is beyond float16; the mean over three samples isn't.
    x = lib.array(np.array([[0.0, 300.0]] + [[300.0, 0.0]] * 2), dtype)
    loss = multi_margin_loss(x, lib.array([0, 0, 0]), p=2, margin=0.0)
    assert float(lib.numpy(loss)) == pytest.approx(300**2 / 2 / 3, rel=4e-3)


def test_float16_gradient_survives_with_a_loss_scale(lib):
    if not lib.has("float16"):
        pytest.skip(f"{lib.name} has no float16")
    n, c, scale = 2**10, 2**4, 2.0**15
    x, t = lib.array(np.zeros((n, c)), "float16"), lib.array(np.zeros(n, np.int64))
    weight = lib.array(np.full(c, 2.0**-12, np.float32))
    upstream = lib.array(np.float32(scale))
    _, grad = multi_margin_loss_and_grad(x, t, weight=weight, grad_output=upstream)
    # Formed in float16, weight / (N * C) = 2 ** -26 would be 0 before the loss scale reached it.
    assert float(lib.numpy(grad)[0, 1]) == scale * 2.0**-26


@pytest.mark.parametrize("p", [1, 2])
def test_accuracy_for_many_classes(lib, rng, p):
    c = 1_000_000
    scores = rng.uniform(0, 1, size=(1, c)).astype(np.float32)
    hinge = np.maximum(scores[0].astype(np.float64) - float(scores[0, 3]) + 1, 0)
    hinge[3] = 0
    loss, grad = multi_margin_loss_and_grad(lib.array(scores), lib.array([3]), p=p)
    assert float(lib.numpy(loss)) == pytest.approx(np.sum(hinge**p) / c, rel=1e-6)
    slope = p * hinge ** (p - 1) / c * (hinge > 0)
    assert float(lib.numpy(grad)[0, 3]) == pytest.approx(-np.sum(slope), rel=1e-6)


def test_accuracy_for_many_classes_along_the_first_axis(lib):
    # Equal terms: NumPy's own float32 sum is off by 9% along this axis.
    scores = np.full((1_000_000, 2), 0.1, np.float32)
    scores[0] = 1.0
    expected = ((float(np.float32(0.1)) - 1.0) + 1) * 999_999 / 1_000_000
    loss = multi_margin_loss(lib.array(scores), lib.array([0, 0]), axis=0)
    assert float(lib.numpy(loss)) == pytest.approx(expected, rel=1e-6)


def test_accuracy_on_a_device_without_float64():
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("no_float64")
    scores = np.full((100_001, 2), 0.1, np.float32)
    scores[0] = 1.0
    x = xp.asarray(scores, device=device)
    t = xp.asarray(np.array([0, 0], np.int32), device=device)
    expected = ((float(np.float32(0.1)) - 1.0) + 1) * 100_000 / 100_001
    loss, grad = multi_margin_loss_and_grad(x, t, axis=0)
    assert loss.dtype == grad.dtype == xp.float32
    assert loss.device == grad.device == device
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(grad[0, 0]) == pytest.approx(-100_000 / 100_001 / 2, rel=1e-6)
    rows = xp.asarray(np.full((100_001, 2), 0.1, np.float32), device=device)
    labels = xp.asarray(np.zeros(100_001, np.int32), device=device)
    assert float(multi_margin_loss(rows, labels, reduction="sum")) == pytest.approx(
        100_001 / 2, rel=1e-6
    )


def test_accuracy_for_many_samples(lib, rng):
    n = 1_000_000
    scores = rng.normal(size=(n, 2)).astype(np.float32)
    hinge = np.maximum(scores[:, 1].astype(np.float64) - scores[:, 0] + 1, 0)
    x, t = lib.array(scores), lib.array(np.zeros(n, np.int32))
    assert float(multi_margin_loss(x, t)) == pytest.approx(hinge.mean() / 2, rel=1e-6)
    assert float(multi_margin_loss(x, t, reduction="sum")) == pytest.approx(
        hinge.sum() / 2, rel=1e-6
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", [1, 2])
def test_grad_output(lib, rng, p, reduction):
    scores, targets, _ = problem(rng)
    upstream = rng.normal(size=13 if reduction == "none" else ()).astype(np.float32)
    _, grad = multi_margin_loss_and_grad(
        lib.array(scores),
        lib.array(targets),
        p=p,
        reduction=reduction,
        grad_output=lib.array(upstream),
    )
    _, plain = reference(scores, targets, p=p, reduction=reduction)
    expected = plain * (upstream[:, None] if reduction == "none" else upstream)
    np.testing.assert_allclose(lib.numpy(grad), expected, rtol=2e-6, atol=1e-8)


def test_inputs_are_left_alone(lib, rng):
    scores, targets, weight = problem(rng, weighted=True)
    arrays = [lib.array(scores), lib.array(targets), lib.array(weight)]
    multi_margin_loss_and_grad(arrays[0], arrays[1], weight=arrays[2])
    for array, before in zip(arrays, (scores, targets, weight), strict=True):
        np.testing.assert_array_equal(lib.numpy(array), before)


def test_gradient_where_the_target_costs_infinity(lib):
    # p = 2: the slope grows with z, so it is infinite too, and IEEE arithmetic takes it on.
    x = lib.array(np.array([[0.0, np.inf, -5.0]], np.float32))
    loss, grad = multi_margin_loss_and_grad(x, lib.array([0]), p=2)
    assert float(lib.numpy(loss)) == math.inf
    np.testing.assert_array_equal(lib.numpy(grad), [[-np.inf, np.inf, 0]])


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("classes", [2, 40])
def test_large_weights_beside_small_upstream_gradients(lib, backend, classes):
    """What the factors of a gradient make together fits, though not the weight times p."""
    scores = np.zeros((100, classes))
    scores[:, 1] = 0.5
    if not lib.has("float64"):
        pytest.skip(f"{lib.name} has no float64 here")
    arrays = lib.array(scores), lib.array(np.zeros(100, np.int64))
    weight = lib.array(np.full(classes, 1e307))
    options = {"weight": weight, "margin": 0.5, "backend": backend}
    for reduction, upstream in (("mean", None), ("none", 1e-3), ("none", 0.0), ("sum", 1e-3)):
        given = None if upstream is None else np.full((100,) * (reduction == "none"), upstream)
        _, grad = multi_margin_loss_and_grad(
            *arrays, p=50, reduction=reduction, **options,
            grad_output=None if given is None else lib.array(given),
        )  # fmt: skip
        factor = 0.01 if upstream is None else upstream  # 1 / N of the mean
        expected = np.zeros((100, classes))
        rest = classes - 2  # whose hinge is 0.5
        expected[:, 1] = factor * 50 / classes * 1e307
        expected[:, 2:] = expected[:, [1]] * 0.5**49
        expected[:, 0] = -expected[:, 1] * (1 + rest * 0.5**49)
        np.testing.assert_allclose(lib.numpy(grad), expected, rtol=1e-12, atol=1e-300)
