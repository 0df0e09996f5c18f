"""LossAccumulator and the exact sums under it."""

import itertools
import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mml_arrayapi import InvalidTargetError, LossAccumulator
from mml_arrayapi.exact_sum import UNIT, ExactSum, exact_sums
from mml_arrayapi.loss import sample_losses

FINITE = st.floats(allow_nan=False, allow_infinity=False)


def exact_sum(values):
    made = ExactSum()
    made.add(np.asarray(values))
    return made


def batch(n=200, n_classes=5, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((n, n_classes)).astype(dtype)
    return scores, rng.integers(0, n_classes, n)


@given(st.lists(FINITE))
def test_the_sum_is_the_fraction(values):
    total = exact_sum(np.asarray(values, dtype=np.float64)).total
    assert Fraction(total, 2**UNIT) == sum(map(Fraction, values))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_the_sum_of_float32_is_fsum(values):
    assert exact_sum(np.asarray(values, dtype=np.float32)).over(1) == math.fsum(values)


def test_cancellation_and_subnormals_are_exact():
    tiny = 5e-324
    assert exact_sum([1e308, tiny, -1e308, tiny]).over(1) == 2 * tiny
    assert exact_sum([1.0] + [2.0**-53] * 2).over(1) == 1 + 2.0**-52


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_values_in_blocks_are_exact(dtype):
    values = np.random.default_rng(0).standard_exponential(200_003).astype(dtype) * 1000
    values[::1000] *= dtype(1e-12)  # far below their neighbours
    assert exact_sum(values).over(1) == math.fsum(values)
    assert exact_sum(values).over(7) == float(sum(map(Fraction, values.tolist())) / 7)


@pytest.mark.parametrize("n_groups", [1, 7, 30_000])
def test_groups_are_summed_apart(n_groups):
    rng = np.random.default_rng(n_groups)
    values, groups = rng.standard_normal(5000), rng.integers(0, n_groups, 5000)
    sums = exact_sums(values, groups, n_groups)
    for group in np.unique(groups)[:100]:
        assert sums[group] == exact_sums(values[groups == group])[0]
    assert sum(sums) == exact_sums(values)[0]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1.0, math.nan], math.nan),
        ([1.0, math.inf], math.inf),
        ([1.0, -math.inf], -math.inf),
        ([math.inf, -math.inf], math.nan),
        ([1.5e308, 1.5e308], math.inf),
        ([-1.5e308, -1.5e308], -math.inf),
    ],
)
def test_values_beyond_the_finite(values, wanted):
    result = exact_sum(values).over(1)
    assert result == wanted or (math.isnan(result) and math.isnan(wanted))


@pytest.mark.parametrize("values", [[], [0.0], [0.1, -7e300], [math.nan, math.inf, 3.0, -math.inf]])
def test_the_state_survives_json(values):
    made = exact_sum(np.asarray(values, dtype=np.float64))
    assert ExactSum.from_state(json.loads(json.dumps(made.state()))) == made
    assert pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_accumulator_is_fsum_of_the_losses(p, weighted):
    scores, target = batch()
    weight = np.asarray([1.0, -0.5, 2.0, 0.25, 3.0]) if weighted else None
    losses = sample_losses(scores, target, p=p, margin=0.5, weight=weight, check_target="raise")
    stream = LossAccumulator(p=p, margin=0.5, weight=weight)
    for part in (slice(0, 1), slice(1, 150), slice(150, 150), slice(150, 200)):
        stream.update(scores[part], target[part])
    assert stream.count == 200
    assert stream.compute("sum") == math.fsum(losses)
    assert stream.compute() == float(sum(map(Fraction, losses.tolist())) / 200)


def test_any_cut_and_any_order_of_merging_give_the_same_bits():
    scores, target = batch()
    states = []
    for cut in ([200], [1] * 200, [64, 64, 72], [199, 1]):
        ends = itertools.accumulate(cut)
        parts = [slice(stop - n, stop) for n, stop in zip(cut, ends, strict=True)]
        for order in (parts, parts[::-1]):
            whole = LossAccumulator()
            for part in order:
                one = LossAccumulator()
                one.update(scores[part], target[part])
                whole.merge(pickle.loads(pickle.dumps(one)))
            states.append(whole.state())
    assert all(state == states[0] for state in states)


def test_a_long_stream_of_small_batches_does_not_drift():
    stream = ExactSum()
    for _ in range(1000):
        stream.add(np.full(32, 2.688, dtype=np.float32))
    assert stream.over(stream.count) == float(np.float32(2.688))


def test_float16_losses_beyond_float16_are_kept():
    scores = np.asarray([[0.0, 300.0, 300.0], [0.0, 0.0, 0.0]], dtype=np.float16)
    stream = LossAccumulator(p=2)
    stream.update(scores, np.asarray([0, 0]))
    assert stream.compute() == pytest.approx((2 * 301**2 / 3 + 2 / 3) / 2, rel=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax.numpy", "array_api_strict", "dask.array"])
def test_batches_of_any_library(library):
    xp = pytest.importorskip(library)
    scores, target = batch()
    weight = np.linspace(0.5, 2, 5, dtype=np.float32)
    stream, wanted = LossAccumulator(weight=weight), LossAccumulator(weight=weight)
    wanted.update(scores, target)
    stream.update(xp.asarray(scores), xp.asarray(target))
    assert stream.count == 200
    assert stream.compute() == pytest.approx(wanted.compute(), rel=1e-6)
    again = LossAccumulator(weight=xp.asarray(weight))
    again.update(scores, target)
    assert again.compute() == wanted.compute()


def test_torch_tensors_that_require_gradients_and_bfloat16():
    torch = pytest.importorskip("torch")
    scores, target = batch()
    stream = LossAccumulator()
    stream.update(torch.asarray(scores).requires_grad_(), torch.asarray(target))
    stream.update(torch.asarray(scores).to(torch.bfloat16), torch.asarray(target))
    assert stream.count == 400
    assert 0.5 < stream.compute() < 1.5


def test_the_accumulators_state_survives_json_and_pickle():
    scores, target = batch()
    stream = LossAccumulator(p=1.5, margin=0.1, weight=np.linspace(0.1, 1, 5, dtype=np.float32))
    stream.update(scores, target)
    for again in (
        LossAccumulator.from_state(json.loads(json.dumps(stream.state()))),
        pickle.loads(pickle.dumps(stream)),
    ):
        assert again.state() == stream.state()
        again.update(scores, target)
        assert again.compute() == stream.compute()


def test_without_samples():
    assert LossAccumulator().compute("sum") == 0
    assert math.isnan(LossAccumulator().compute())


def test_a_refused_batch_adds_nothing():
    scores, target = batch()
    stream = LossAccumulator()
    with pytest.raises(InvalidTargetError, match=r"target\[0\] is 5"):
        stream.update(scores, np.full(200, 5))
    with pytest.raises(TypeError, match="input must have a real floating dtype"):
        stream.update(target[:, None], target)
    assert stream.count == 0


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"p": 0.5}, "p must be a finite real number >= 1, but is 0.5"),
        ({"margin": math.inf}, "margin must be a finite real number, but is inf"),
        ({"weight": np.ones((2, 2))}, r"weight must have shape \(C,\), but has shape \(2, 2\)"),
    ],
)
def test_refused_values(keywords, message):
    with pytest.raises(ValueError, match=message):
        LossAccumulator(**keywords)


def test_refused_types():
    with pytest.raises(TypeError, match="weight must have a real floating dtype, but has"):
        LossAccumulator(weight=np.ones(3, dtype=int))
    with pytest.raises(TypeError, match="other must be a LossAccumulator, but is a float"):
        LossAccumulator().merge(1.0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', but is 'none'"):
        LossAccumulator().compute("none")


@pytest.mark.parametrize("other", [{"p": 2}, {"margin": 2}, {"weight": np.ones(3)}])
def test_different_losses_do_not_merge(other):
    name = next(iter(other))
    with pytest.raises(ValueError, match=f"only accumulators of the same {name} can be merged"):
        LossAccumulator().merge(LossAccumulator(**other))
