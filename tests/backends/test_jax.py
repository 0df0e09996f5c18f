"""JAX: jit, grad, vmap, hessian, with and without 64-bit types."""

import math
import os
import socket
import subprocess
import sys
from functools import partial

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, explain, multi_margin_loss, multi_margin_loss_and_grad
from tests.reference import UNDEFINED
from tests.tree import run_python

jax = pytest.importorskip("jax")
jnp = jax.numpy
checkify = pytest.importorskip("jax.experimental.checkify")
pytest.importorskip("jax.export")
jax_backend = pytest.importorskip("mml_arrayapi.backends.jax")
# The second is that of JAX before 0.8.
enable_x64 = jax.enable_x64 if hasattr(jax, "enable_x64") else jax.experimental.enable_x64
P = [1, 2, 1.5, 3]


def host_devices(count):
    """The environment in which the CPU stands for so many devices."""
    return {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
    }


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
    printed = run_python(code, **host_devices(2))
    assert printed.startswith(
        "target must be on the same device as input, but target is on frozenset"
    )


# The kernel


def jitted():
    """The loss under jit, written by hand."""

    def loss(x, y):
        z = x - jnp.take_along_axis(x, y[:, None], 1) + 1
        return jnp.where((z > 0) & (jnp.arange(x.shape[1]) != y[:, None]), z, 0).mean()

    return jax.jit(loss)


def test_the_kernel_runs_by_default(batch):
    assert explain(batch[0], batch[1]).kernel == "jax-jit"
    loss = multi_margin_loss(batch[0], batch[1])
    np.testing.assert_allclose(loss, jitted()(batch[0], batch[1]), rtol=1e-6)


def test_nothing_is_compiled_again_for_the_same_parameters(batch):
    compiled = jax_backend._compiled_loss
    multi_margin_loss(*batch[:2], p=2, margin=0.125)
    before = compiled._cache_size()
    for _ in range(3):
        multi_margin_loss(*batch[:2], p=2, margin=0.125)
    assert compiled._cache_size() == before
    multi_margin_loss(*batch[:2], p=2, margin=0.375)
    assert compiled._cache_size() == before + 1


def test_ordinary_calls_run_without_the_checks(batch):
    scores, target, weight = batch
    direct = jax_backend.KERNEL.direct[type(scores)]
    names = ("p", "margin", "reduction", "ignore_index", "axis", "check_target")
    plain = (2, 0.75, "mean", None, -1, "auto")
    for changes, given in (
        ({}, None),
        ({"p": 1.5, "reduction": "none"}, None),
        ({"margin": -1, "check_target": "nan", "axis": 1}, None),
        ({"check_target": "raise", "reduction": "sum"}, weight),
    ):
        options = dict(zip(names, plain, strict=True)) | changes
        loss = direct(scores, target, given, tuple(options.values()))
        compiled = jax_backend._compiled_loss._cache_size()
        wanted = multi_margin_loss(scores, target, weight=given, backend="jax-jit", **options)
        assert jax_backend._compiled_loss._cache_size() == compiled  # it is the same call
        np.testing.assert_array_equal(loss, wanted)
    values = {
        0: (True, 0.5, math.nan, 10**400),
        1: (math.inf, "1"),
        2: ("men", None),
        3: (2,),
        4: (0, True),
        5: ("no", None),
    }
    wrong = [(*plain[:i], v, *plain[i + 1 :]) for i, given in values.items() for v in given]
    for call in (
        (scores, target + 4, None, plain),
        (scores, target.astype(jnp.float32), None, plain),
        (scores.astype(jnp.int32), target, None, plain),
        (scores, target[:3], None, plain),
        (scores[:0], target[:0], None, plain),
        (scores[0, 0], target[0], None, plain),
        (scores, np.asarray(target), None, plain),
        (scores, target, weight[:3], plain),
        (scores, target, np.asarray(weight), plain),
        (jax.device_put(scores, jax.devices()[0]), target, None, plain),
        *((scores, target, None, options) for options in wrong),
    ):
        assert direct(*call) is None


def test_shapes_alone_start_no_devices():
    code = """
import jax, mml_arrayapi
scores, target = (jax.ShapeDtypeStruct((3, 4)[:n], t) for n, t in ((2, "float32"), (1, "int32")))
print(jax.eval_shape(mml_arrayapi.multi_margin_loss, scores, target).shape)
"""
    assert run_python(code, JAX_PLATFORMS="nonsense") == "()"


def test_disabled_jit(batch):
    expected = multi_margin_loss_and_grad(*batch[:2], p=2)
    with jax.disable_jit():
        got = multi_margin_loss_and_grad(*batch[:2], p=2)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def refuses_traced(scores, target, argument, value, message):
    """Neither a number that is traced nor one in an array is taken for a plain one."""
    with pytest.raises(TypeError, match=message):
        jax.jit(lambda v: multi_margin_loss(scores, target, **{argument: v}))(value)
    with pytest.raises(TypeError, match=message):
        multi_margin_loss(scores, target, **{argument: jnp.asarray(value)})


@pytest.mark.parametrize("argument", ["p", "margin"])
def test_traced_parameters_name_static_argnames(batch, argument):
    scores, target, _ = batch
    message = rf"{argument} must be a real number, .* name it in static_argnames=\('{argument}',\)"
    refuses_traced(scores, target, argument, 2.0, message)
    compiled = jax.jit(multi_margin_loss, static_argnames=(argument,))
    np.testing.assert_allclose(
        compiled(scores, target, **{argument: 2.0}),
        multi_margin_loss(scores, target, **{argument: 2.0}),
        rtol=1e-6,
    )


@pytest.mark.parametrize("argument", ["axis", "ignore_index"])
def test_traced_integers_name_static_argnames(batch, argument):
    message = rf"{argument} must be .*integer, .*=\('{argument}',\), else call int\(\)"
    refuses_traced(*batch[:2], argument, 1, message)


def test_numpy_labels_beside_jax_scores_say_how_to_convert(batch):
    with pytest.raises(
        TypeError, match=r"input is of jax; convert it by jax.numpy.asarray\(target"
    ):
        multi_margin_loss(batch[0], np.asarray(batch[1]))


# Derivatives


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("transform", ["grad", "vmap", "jacfwd", "jit"])
@pytest.mark.parametrize("cause", ["score", "own score", "weight", "target"])
def test_a_row_whose_loss_is_nan_has_a_gradient_of_nan(batch, p, transform, cause):
    scores, target, weight = batch
    target = target.at[1].set(2)
    if cause == "weight":
        weight, target = weight.at[0].set(np.nan), jnp.where(target == 0, 1, target).at[1].set(0)
    elif cause == "target":
        target = target.at[1].set(7)
    else:
        scores = scores.at[1, 2 if cause == "own score" else 3].set(np.nan)

    def loss(x, y, reduction="sum"):
        options = {"p": p, "weight": weight, "check_target": "nan", "reduction": reduction}
        return multi_margin_loss(x, y, **options)

    if transform == "grad":
        grad = jax.grad(loss)(scores, target)
    elif transform == "vmap":
        grad = jax.vmap(jax.grad(loss))(scores, target)
    elif transform == "jacfwd":
        grad = jax.vmap(jax.jacfwd(loss))(scores, target)
    else:
        grad = jax.jit(jax.grad(loss))(scores, target)
    assert np.isnan(grad).all(axis=1).tolist() == [i == 1 for i in range(6)]
    assert np.isnan(grad).any(axis=1).tolist() == [i == 1 for i in range(6)]


@pytest.mark.parametrize("p", [1.5, 2, 3])
@pytest.mark.parametrize("place", [0, 2], ids=["own score", "score"])
@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd])
def test_second_derivatives_of_a_row_of_nan_are_nan(p, place, transform):
    x = jnp.asarray([[0.5, 1, 2, 0], [0, 1, 2, 3]]).at[0, place].set(np.nan)
    grad = jax.grad(lambda x: multi_margin_loss(x, jnp.asarray([0, 1]), p=p))
    second = transform(grad)(x)
    assert np.isnan(second[0, :, 0]).all()
    assert not np.isnan(second[1, :, 1]).any()


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("cause", UNDEFINED)
@pytest.mark.parametrize("inner", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize("outer", [jax.jacrev, jax.jacfwd])
def test_every_second_derivative_of_a_nan_is_nan(p, cause, inner, outer):
    scores, target, factor = UNDEFINED[cause]
    x, target = jnp.asarray([scores, [0.0, 1, -math.inf, 3]]), jnp.asarray([target, 3])
    weight = jnp.asarray([1.0, factor, 1, 1])

    @jax.jit
    def loss(x):
        return multi_margin_loss(x, target, p=p, weight=weight, check_target="nan")

    second = outer(inner(loss))(x)
    assert np.isnan(second[0, :, 0]).all()
    if jax.jacrev in (inner, outer):  # the other mode multiplies all that is NaN with tangents of 0
        assert not np.isnan(second[1, :, 1]).any()


@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd])
def test_the_derivative_of_a_gradient_of_nan_by_the_upstream_gradient(transform):
    x, target = jnp.asarray([[0.0, 1, math.nan], [0, 1, 2]]), jnp.asarray([0, 0])

    def grad(upstream):
        how = {"p": 2, "reduction": "none", "grad_output": upstream}
        return multi_margin_loss_and_grad(x, target, **how)[1]

    made = transform(grad)(jnp.ones(2))
    assert np.isnan(made[0, :, 0]).all()
    assert not np.isnan(made[1, :, 1]).any()


@pytest.mark.parametrize("transform", [jax.jacrev, jax.jacfwd])
@pytest.mark.parametrize("scores", [[0.5, math.nan, 0.2], [0.5, 0.1, 0.2]], ids=["NaN", "finite"])
def test_no_weight_is_charged_with_a_target_out_of_range(transform, scores):
    x, target = jnp.asarray([scores, [0.0, 1, 2]]), jnp.asarray([7, 1])

    def loss(weight):
        return multi_margin_loss(x, target, weight=weight, check_target="nan")

    assert transform(loss)(jnp.ones(3)).tolist() == pytest.approx([0, 1 / 3, 0])


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("x64", [False, True])
def test_the_gradient_of_the_weights_of_many_samples(x64, reduction):
    n = 2**20
    with enable_x64(x64):
        x, y = jnp.tile(jnp.asarray([[0.0, 0.1, 0.2]], jnp.float32), (n, 1)), jnp.zeros(n, int)

        def loss(weight):
            losses = multi_margin_loss(x, y, weight=weight, reduction=reduction)
            return losses.sum() / np.float32(1 if reduction == "mean" else n)

        grad = np.asarray(jax.grad(loss)(jnp.ones(3, jnp.float32)), np.float64)
    one = float(np.float32(0.1)) + float(np.float32(0.2)) + 2
    np.testing.assert_allclose(grad, [one / 3, 0, 0], rtol=3e-6)


@pytest.mark.parametrize("p", P)
def test_gradient_of_the_weights_and_forward_mode(batch, p):
    scores, target, weight = batch

    def loss(x, w):
        return multi_margin_loss(x, target, p=p, weight=w)

    one_hot = np.eye(5, dtype=np.float32)
    expected = [loss(scores, jnp.asarray(row)) for row in one_hot]  # it is linear in them
    np.testing.assert_allclose(jax.grad(loss, 1)(scores, weight), expected, rtol=1e-5)
    tangents = jnp.ones_like(scores) * 0.5, jnp.arange(5.0)
    grads = jax.grad(loss, (0, 1))(scores, weight)
    wanted = sum(jnp.vdot(a, b) for a, b in zip(grads, tangents, strict=True))
    _, tangent = jax.jvp(loss, (scores, weight), tangents)
    np.testing.assert_allclose(tangent, wanted, rtol=1e-4, atol=1e-6)
    mixed = jax.jacfwd(jax.grad(loss, 1), 0)(scores, weight)
    np.testing.assert_allclose(
        mixed, np.moveaxis(jax.jacrev(jax.grad(loss, 0), 1)(scores, weight), -1, 0), atol=1e-6
    )


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode_leaves_tangents_of_ignored_samples_out(reduction):
    scores = jnp.asarray([[0.5, 0.0, 1.0], [math.nan, 0.0, 1.0]])
    tangent = jnp.asarray([[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]])

    def loss(x):
        return multi_margin_loss(x, jnp.asarray([0, -100]), ignore_index=-100, reduction=reduction)

    # Both other classes are within the margin: ((2 - 1) + (3 - 1)) / 3
    _, found = jax.jvp(loss, (scores,), (tangent,))
    np.testing.assert_allclose(found, [1.0, 0.0] if reduction == "none" else 1.0, rtol=1e-6)


def test_the_gradient_of_a_float16_mean_survives_a_loss_scale():
    weight = jnp.full(2**4, 2.0**-16)

    def scaled(x):
        loss = multi_margin_loss(x.astype(jnp.float16), jnp.zeros(2**5, int), weight=weight)
        return loss * jnp.float16(2.0**15)

    grad = jax.grad(scaled)(jnp.zeros((2**5, 2**4), jnp.float16))
    assert float(grad[0, 1]) == 2.0**-10  # weight / (N * C), formed in float16, would be 0


@pytest.mark.parametrize("p", P)
def test_no_nan_is_made_to_be_thrown_away(batch, p):
    scores, target, weight = batch
    scores = scores.at[jnp.arange(6), (target + 1) % 5].set(-np.inf)
    ignored = scores.at[2].set(np.nan), target.at[2].set(-100)

    def loss(x, y, **options):
        return multi_margin_loss(x, y, p=p, weight=weight, **options)

    with jax.debug_nans(True):
        for options in ({}, {"check_target": "nan"}, {"backend": "generic"}, {"margin": 0.0}):
            assert np.isfinite(loss(scores, target, **options))
            for disabled in (True, False):  # operations of their own, and compiled ones
                with jax.disable_jit(disabled):
                    eager = {**options, "backend": "generic"}
                    assert np.isfinite(loss(scores, target, **eager))
                    assert np.isfinite(loss(scores, target, ignore_index=2, **eager))
                    assert np.isfinite(jax.vmap(partial(loss, **eager))(scores, target)).all()
            grad = jax.grad(lambda x, options=options: loss(x, target, **options))(scores)
            assert np.isfinite(grad).all()
        assert np.isfinite(loss(*ignored, ignore_index=-100))
        assert np.isfinite(jax.jit(jax.grad(loss))(scores, target)).all()
    for function in (loss, jax.grad(loss)):
        checked = checkify.checkify(function, checkify.float_checks | checkify.index_checks)
        assert checked(scores, target)[0].get() is None


# Compilation


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("options", [{}, {"p": 1.5, "ignore_index": -1}])
def test_export_with_symbolic_sizes(rng, x64, options):
    def gradient(x, y):
        return jax.grad(lambda x: multi_margin_loss(x, y, **options).sum())(x)

    with enable_x64(x64):
        n, c = jax.export.symbolic_shape("n, c")
        shapes = jax.ShapeDtypeStruct((n, c), "float32"), jax.ShapeDtypeStruct((n,), "int32")
        for function in (partial(multi_margin_loss, **options), gradient):
            exported = jax.export.export(jax.jit(function))(*shapes)
            for size in ((70, 200), (1, 1)):
                x = jnp.asarray(rng.normal(size=size).astype(np.float32))
                y = jnp.asarray(rng.integers(0, size[1], size[0]).astype(np.int32))
                np.testing.assert_allclose(
                    exported.call(x, y), function(x, y), rtol=1e-5, atol=1e-7
                )


@pytest.mark.parametrize("name", ["p", "margin", "ignore_index"])
def test_exported_sizes_are_no_parameters(name):
    def loss(x, y):
        return multi_margin_loss(x, y, **{name: x.shape[1] - 1})

    n, c = jax.export.symbolic_shape("n, c")
    shapes = jax.ShapeDtypeStruct((n, c), "float32"), jax.ShapeDtypeStruct((n,), "int32")
    message = f"{name} must be .* c - 1 of type _DimExpr; a size that is exported as a symbol has"
    with pytest.raises(TypeError, match=message):
        jax.export.export(jax.jit(loss))(*shapes)


def test_eight_devices_keep_their_shards():
    code = """
import jax, numpy as np
import os
import socket
import subprocess
import sys
from functools import partial
from jax.sharding import Mesh, NamedSharding, PartitionSpec as S
from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
mesh = Mesh(np.array(jax.devices()), ("rows",))
rng = np.random.default_rng(0)
x, t = rng.normal(size=(16, 24)).astype(np.float32), rng.integers(0, 24, 16).astype(np.int32)
expected, expected_grad = multi_margin_loss_and_grad(x, t, reduction="none")
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
sum_of = lambda x, t: multi_margin_loss(x, t, reduction="sum")
for spec in (S("rows"), S(None, "rows")):
    sharding = NamedSharding(mesh, spec)
    rows = NamedSharding(mesh, S(spec[0]))
    a, b = jax.device_put(x, sharding), jax.device_put(t, rows)
    loss, grad = multi_margin_loss_and_grad(a, b, reduction="none")
    assert grad.sharding.is_equivalent_to(sharding, 2), grad.sharding
    close(loss, expected)
    close(grad, expected_grad)
    grad = jax.grad(sum_of)(a, b)
    assert grad.sharding.is_equivalent_to(sharding, 2), grad.sharding
    close(grad, expected_grad)
rows = S("rows")
a, b = (jax.device_put(v, NamedSharding(mesh, rows)) for v in (x, t))
try:
    from jax import shard_map
except ImportError:
    from jax.experimental.shard_map import shard_map
mapped = partial(shard_map, mesh=mesh, in_specs=(rows, rows), out_specs=rows)
close(mapped(partial(multi_margin_loss, reduction="none"))(a, b), expected)
close(mapped(jax.grad(sum_of))(a, b), expected_grad)
print("good")
"""
    printed = run_python(code, **host_devices(8))
    assert printed.strip() == "good"


@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4"])
def test_small_integers_as_targets(dtype):
    scores, target = jnp.zeros((2, 3)), jnp.asarray([0, 1], dtype)
    for backend in (None, "generic"):
        for ignore_index in (None, 1, -100):
            options = {"ignore_index": ignore_index, "backend": backend}
            assert float(multi_margin_loss(scores, target, **options)) == pytest.approx(2 / 3)
        with pytest.raises(InvalidTargetError, match=r"target\[1\] is 1"):
            multi_margin_loss(scores[:, :1], target, backend=backend)


@pytest.mark.parametrize("dtype", ["int4", "uint2"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_small_integers_that_a_compiled_function_captures(dtype, backend):
    """Labels that are concrete stay so: nothing is done to them within the trace."""
    scores, target = jnp.zeros((2, 3)), jnp.asarray([0, 1], dtype)

    @jax.jit
    def loss_and_grad(x):
        options = {"backend": backend, "check_target": "raise"}
        return multi_margin_loss(x, target, **options), *multi_margin_loss_and_grad(
            x, target, **options
        )

    loss, again, grad = loss_and_grad(scores)
    assert float(loss) == float(again) == pytest.approx(2 / 3)
    np.testing.assert_allclose(grad, np.asarray([[-2, 1, 1], [1, -2, 1]]) / 6, rtol=1e-6)
    with pytest.raises(InvalidTargetError, match=r"target\[1\] is 1"):
        loss_and_grad(scores[:, :1])


EXPLICIT = """
import itertools, jax, numpy as np
from functools import partial
from jax.sharding import AxisType, NamedSharding, PartitionSpec as S
from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
mesh = jax.make_mesh((2, 2), ("rows", "classes"), axis_types=(AxisType.Explicit,) * 2)
within = jax.set_mesh if hasattr(jax, "set_mesh") else jax.sharding.use_mesh  # JAX before 0.8
rng = np.random.default_rng(0)
put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, S(*spec)))
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
sharding = lambda array: jax.typeof(array).sharding
def case(*shape):
    x, t = rng.normal(size=shape), rng.integers(0, shape[-1], shape[:-1])
    return x.astype("f4"), t.astype("i4"), rng.random(shape[-1]).astype("f4")
"""


def run_explicit(code):
    printed = run_python(EXPLICIT + code + "print('good')", **host_devices(4))
    assert printed == "good"


def test_shardings_that_are_part_of_the_types():
    """What ``jax.make_mesh`` gives: arrays that are sharded in different ways hardly meet there."""
    run_explicit("""
x, t, w = case(268, 268)  # no run of a sum has a length that divides it
options = {"ignore_index": int(t[1]), "p": 2}
expected, expected_grad = multi_margin_loss_and_grad(x, t, weight=w, **options)
of_scores = ("rows", "classes"), ("rows", None), (None, "classes"), (("rows", "classes"), None)
of_labels, of_weights = (("rows",), (), ("classes",), ("rows",)), ((), ("rows",), (), ("classes",))
for spec, of_t, of_w in zip(of_scores, of_labels, of_weights):
    a, b, c = put(x, *spec), put(t, *of_t), put(w, *of_w)
    loss = lambda a, b, c: multi_margin_loss(a, b, weight=c, **options)
    close(loss(a, b, c), expected)
    with within(mesh):
        grad = jax.jit(jax.grad(loss))(a, b, c)
        both = multi_margin_loss_and_grad(a, b, weight=c, **options)
    for made in (grad, both[1]):
        assert sharding(made) == sharding(a)
        close(made, expected_grad)
""")


def test_options_where_shardings_are_part_of_the_types():
    run_explicit("""
x, t, w = case(4, 8)
a, b, c = put(x, "rows", "classes"), put(t), put(w)
for reduction, p in itertools.product(("none", "sum"), (1, 3)):
    options = {"p": p, "reduction": reduction, "check_target": "nan"}
    g = np.arange(1, 5, dtype="f4") if reduction == "none" else np.float32(2)
    expected = multi_margin_loss_and_grad(x, t, weight=w, grad_output=g, **options)
    loss = lambda a, b, c: multi_margin_loss(a, b, weight=c, **options)
    with within(mesh):
        for d in (put(g), put(g, *["rows"][:g.ndim])):
            made = multi_margin_loss_and_grad(a, b, weight=c, grad_output=d, **options)
            assert sharding(made[0]).spec == S(*["rows"][:g.ndim])
            close(made[0], expected[0])
            close(made[1], expected[1])
        by_rows = jax.vmap(partial(loss, c=c))(put(x, "rows", "classes"), put(t, "rows"))
        by_weight = jax.grad(lambda c: loss(a, b, c).sum())(put(w, "classes"))
    none = multi_margin_loss(x, t, weight=w, **{**options, "reduction": "none"})
    close(by_rows, none)
    close(by_weight @ w, none.sum())
    assert sharding(by_weight).spec == S("classes")
""")


def test_batches_where_shardings_are_part_of_the_types():
    run_explicit("""
for shape, spec in ((8,), ["classes"]), ((2, 4, 8), [None, "rows"]), ((2, 4, 8), ["classes", "rows"]):
    x, t, w = case(*shape)
    a, b, options = put(x, *spec), put(t), {"ignore_index": 8}
    expected = multi_margin_loss_and_grad(x, t, weight=w, **options)
    for options["backend"] in (None, "generic"):
        with within(mesh):
            made = multi_margin_loss_and_grad(a, b, weight=put(w), **options)
        close(made[0], expected[0])
        close(made[1], expected[1])
""")


SEVERAL = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, int(sys.argv[2]))
from jax.sharding import NamedSharding, PartitionSpec
import mml_arrayapi as mml
sharding = NamedSharding(jax.sharding.Mesh(jax.devices(), ("n",)), PartitionSpec("n"))
part = lambda array: jax.make_array_from_process_local_data(sharding, array)
x, y = part(np.zeros((2, 3), np.float32)), part(np.zeros(2, np.int32))
print(float(mml.multi_margin_loss(x, y)), jax.grad(mml.multi_margin_loss)(x, y).shape)
try:
    mml.multi_margin_loss(x, y, check_target="raise")
except ValueError as error:
    print("needs the values of target" in str(error))
"""


def test_arrays_spread_over_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEVERAL, str(port), str(i)],
            env={
                **os.environ,
                "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
                "JAX_PLATFORMS": "cpu",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        printed = process.communicate(timeout=300)[0].splitlines()  # Gloo's words come first
        assert printed[-2:] == ["0.6666666865348816 (4, 3)", "True"]
