"""JAX: jit, grad, vmap, hessian, with and without 64-bit types."""

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, multi_margin_loss, multi_margin_loss_and_grad
from tests.test_registry import run_python

jax = pytest.importorskip("jax")
jnp = jax.numpy
P = [1, 2, 1.5, 3]


@pytest.fixture
def batch(rng):
    scores = jnp.asarray(rng.normal(size=(6, 5)).astype(np.float32))
    return (
        scores,
        jnp.asarray(rng.integers(0, 5, 6).astype(np.int32)),
        jnp.asarray(rng.normal(size=5).astype(np.float32)),
    )


@pytest.mark.parametrize("p", P)
def test_transforms(batch, p):
    scores, target, weight = batch

    def loss(x, y):
        return multi_margin_loss(x, y, p=p, weight=weight)

    expected, expected_grad = multi_margin_loss_and_grad(scores, target, p=p, weight=weight)
    close = {"rtol": 1e-5, "atol": 1e-7}
    np.testing.assert_allclose(jax.jit(loss)(scores, target), expected, **close)
    np.testing.assert_allclose(jax.grad(loss)(scores, target), expected_grad, **close)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(scores, target), expected_grad, **close)
    per_sample = multi_margin_loss(scores, target, p=p, weight=weight, reduction="none")
    np.testing.assert_allclose(jax.vmap(loss)(scores, target), per_sample, **close)
    np.testing.assert_allclose(jax.vmap(jax.grad(loss))(scores, target), expected_grad * 6, **close)
    hessian = jax.hessian(loss)(scores[0], target[0])
    if p == 1:
        np.testing.assert_array_equal(hessian, 0)
    if p == 2:  # exact: differences of a quadratic's gradient
        eye = jnp.eye(5) * 1e-3
        numeric = [
            (jax.grad(loss)(scores[0] + e, target[0]) - jax.grad(loss)(scores[0] - e, target[0]))
            / 2e-3
            for e in eye
        ]
        np.testing.assert_allclose(hessian, np.stack(numeric), atol=2e-3)
    assert np.isfinite(hessian).all()


def test_gradient_at_the_kink_and_of_nan(batch):
    grad = jax.grad(lambda x, y: multi_margin_loss(x, y, reduction="sum"))
    np.testing.assert_array_equal(
        grad(jnp.asarray([[1.0, 2.0, 0.0]]), jnp.asarray([1])), [[0, 0, 0]]
    )
    bad = batch[0].at[1, 2].set(np.nan)
    rows = np.isnan(grad(bad, batch[1]))
    assert rows.all(axis=1).tolist() == rows.any(axis=1).tolist() == [i == 1 for i in range(6)]


def test_targets_out_of_range(batch):
    scores, target, _ = batch
    wrong = target.at[2].set(-1)
    with pytest.raises(InvalidTargetError, match=r"target\[2\] is -1"):
        multi_margin_loss(scores, wrong)
    with pytest.raises(InvalidTargetError, match=r"target\[2\] is -1"):
        jax.jit(lambda x: multi_margin_loss(x, wrong))(scores)  # a constant: it can be looked at
    losses = jax.jit(lambda x, y: multi_margin_loss(x, y, reduction="none"))(scores, wrong)
    assert np.isnan(losses).tolist() == [i == 2 for i in range(6)]
    rows = np.isnan(jax.jit(jax.grad(multi_margin_loss))(scores, wrong))
    assert rows.all(axis=1).tolist() == [i == 2 for i in range(6)]
    with pytest.raises(ValueError, match="check_target='raise' needs the values of target"):
        jax.jit(lambda x, y: multi_margin_loss(x, y, check_target="raise"))(scores, wrong)


def test_with_64_bit_types(batch):
    enable_x64 = getattr(jax, "enable_x64", None) or jax.experimental.enable_x64  # JAX before 0.8
    with enable_x64(True):
        scores = jnp.asarray(np.asarray(batch[0]), dtype=jnp.float64)
        target = jnp.asarray(np.asarray(batch[1]), dtype=jnp.int64)
        loss, grad = multi_margin_loss_and_grad(scores, target, p=2)
        assert loss.dtype == grad.dtype == jnp.float64
        expected, expected_grad = multi_margin_loss_and_grad(
            np.asarray(scores), np.asarray(target), p=2
        )
        np.testing.assert_allclose(loss, expected, rtol=1e-15)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-14)
        with pytest.raises(InvalidTargetError, match=rf"target\[0\] is {2**32}"):
            multi_margin_loss(scores, target.at[0].set(2**32))


def test_arrays_spread_over_devices():
    code = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as S
from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
one, two = jax.devices()
mesh = Mesh(np.array([one, two]), ("rows",))
x = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
t = np.array([0, 1, 2, 0], np.int32)
sharded = jax.device_put(x, NamedSharding(mesh, S("rows"))), jax.device_put(t, NamedSharding(mesh, S("rows")))
weight = jnp.ones(3)  # bound to no device
loss, grad = multi_margin_loss_and_grad(*sharded, weight=weight)
expected, expected_grad = multi_margin_loss_and_grad(x, t)
np.testing.assert_allclose(loss, expected, rtol=1e-6)
np.testing.assert_allclose(grad, expected_grad, rtol=1e-6)
try:
    multi_margin_loss(jax.device_put(x, one), jax.device_put(t, two))
except TypeError as error:
    print(error)
"""
    printed = run_python(code, XLA_FLAGS="--xla_force_host_platform_device_count=2")
    assert printed.startswith(
        "target must be on the same device as input, but target is on frozenset"
    )
