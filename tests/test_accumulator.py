"""LossAccumulator and the exact sums under it."""

import copy
import itertools
import json
import math
import pickle
import subprocess
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mml_arrayapi import InvalidTargetError, LossAccumulator, evaluate
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
    made, merged = exact_sum(values), ExactSum()
    result = made.over(1)
    assert result == wanted or (math.isnan(result) and math.isnan(wanted))
    merged.merge(made)
    assert merged == made
    assert merged.count == len(values)


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
    with pytest.raises(
        TypeError, match=r"weight must have a real floating .*, but has dtype int64"
    ):
        LossAccumulator(weight=np.ones(3, dtype=int))
    with pytest.raises(TypeError, match=r"weight must be an array, but is 2\.0 of type float"):
        LossAccumulator(weight=2.0)
    with pytest.raises(TypeError, match="other must be a LossAccumulator, but is a float"):
        LossAccumulator().merge(1.0)
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', but is 'none'"):
        LossAccumulator().compute("none")


@pytest.mark.parametrize("other", [{"p": 2}, {"margin": 2}, {"weight": np.ones(3)}])
def test_different_losses_do_not_merge(other):
    name = next(iter(other))
    with pytest.raises(ValueError, match=f"only accumulators of the same {name} can be merged"):
        LossAccumulator().merge(LossAccumulator(**other))


@pytest.mark.parametrize("name", ["p", "margin", "ignore_index"])
def test_all_samples_are_added_under_the_same_parameters(name):
    accumulator = LossAccumulator(p=2)
    with pytest.raises(AttributeError, match=f"'{name}' of 'LossAccumulator' object has no setter"):
        setattr(accumulator, name, 3)
    assert (accumulator.p, accumulator.margin, accumulator.ignore_index) == (2, 1, None)


def test_updates_from_many_threads_lose_nothing():
    """A total that is read before the slow sum and written after it would lose losses."""
    scores, target = batch()
    wanted, stream = LossAccumulator(), LossAccumulator()
    for _ in range(80):
        wanted.update(scores, target)
    start = threading.Barrier(8)

    def work():
        start.wait()
        for _ in range(10):
            stream.update(scores, target)
            repr(stream)

    threads = [threading.Thread(target=work) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert stream.state() == wanted.state()


def test_accumulators_that_are_merged_into_each_other_at_once():
    scores, target = batch()
    a, b = LossAccumulator(), LossAccumulator()
    a.update(scores, target)
    threads = [threading.Thread(target=x.merge, args=(y,)) for x, y in ((a, b), (b, a))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert not any(thread.is_alive() for thread in threads)
    a.merge(a)
    assert a.count % 400 == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_sample_weights_of_pytorch_and_jax_that_cannot_be_read():
    scores, target = batch(2)
    torch = pytest.importorskip("torch")
    wrong = {
        torch.ones(
            2, dtype=torch.float8_e5m2
        ): "must have a real dtype, but has dtype torch.float8",
        torch.ones(2, device="meta"): "must have values that can be read, but is being traced",
        torch.ones(2).to_sparse(): "must be a dense array, but is ",
    }
    jax = pytest.importorskip("jax")
    wrong = [*wrong.items(), (jax.random.split(jax.random.key(0)), "must have a real dtype, but")]
    masked = torch.masked.masked_tensor(torch.ones(2), torch.tensor([True, False]))
    wrong.append((masked, "must be a dense array, but is a MaskedTensor, whose mask would be lost"))
    for factors, message in wrong:
        with pytest.raises((TypeError, ValueError), match=f"^sample_weight {message}"):
            LossAccumulator().update(scores, target, factors)


def test_weights_that_cannot_be_read():
    torch, jax = pytest.importorskip("torch"), pytest.importorskip("jax")
    with pytest.raises(ValueError, match=r"^weight must have values that can be read"):
        LossAccumulator(weight=torch.ones(3, device="meta"))
    with pytest.raises(ValueError, match=r"^weight must have values that can be read"):
        jax.jit(lambda weight: LossAccumulator(weight=weight))(jax.numpy.ones(3))


def test_a_reset_among_updates_loses_no_later_one():
    """The lock is the accumulator's for life: updates on either side of a reset share it."""
    scores, target = batch(1)
    stream = LossAccumulator()
    with stream._lock:
        workers = [
            threading.Thread(target=stream.reset),
            *(threading.Thread(target=stream.update, args=(scores, target)) for _ in range(2)),
        ]
        for worker in workers:
            worker.start()
            worker.join(0.05)
        assert stream.count == 0
        assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        worker.join()
    assert 0 <= stream.count <= 2


STATE = LossAccumulator().state()


@pytest.mark.parametrize(
    "state",
    [
        None, {}, {"p": 1}, {**STATE, "sum": "0x0p0"}, {**STATE, "sum": ["nonsense", 0, 0, 0, 0]},
        {**STATE, "sum": ["0x1p0", 1, 0, 0]}, {**STATE, "sample_weights": ["0x1p0", -1, 0, 0, 0]},
        {**STATE, "weight": "many"}, {**STATE, "p": 0},
        {**STATE, "sum": ["0x1p-9999", 1, 0, 0, 0]}, {**STATE, "weight": []}, {**STATE, "extra": 1},
    ],
    ids=["None", "empty", "a part", "no counts", "no number", "too few", "negative",
         "weight", "p", "too small", "no weight", "more"],
)  # fmt: skip
def test_what_is_no_state_is_refused(state):
    with pytest.raises(ValueError, match=r"^state must be what LossAccumulator.state\(\) returned"):
        LossAccumulator.from_state(state)


def test_a_weight_of_no_classes_is_refused():
    with pytest.raises(ValueError, match=r"weight must have one element per class, but has shape"):
        LossAccumulator(weight=np.ones(0))


def masked_later(block):
    return np.ma.masked_array(block, mask=block == 0)


def test_masks_are_refused_at_every_entrance():
    scores, target = batch(6)
    weights = np.ma.masked_array(np.ones(6), mask=[0, 1, 0, 0, 0, 0])
    with pytest.raises(TypeError, match="weight must be a dense array, but is a masked array"):
        LossAccumulator(weight=weights)
    da = pytest.importorskip("dask.array", reason="Dask is not installed")
    stream = LossAccumulator()
    x, y = (da.from_array(array, chunks=3) for array in (scores, target))
    with pytest.raises(TypeError, match="sample_weight must be a dense array, but is a Dask array"):
        stream.update(x, y, da.from_array(weights, chunks=3, asarray=False))
    # Nothing says so before it is computed.
    late = da.ones(6, chunks=3).map_blocks(masked_later, meta=np.empty(0))
    with pytest.raises(TypeError, match="weight must be a dense array, but is a masked array"):
        LossAccumulator(weight=late)
    with pytest.raises(TypeError, match="sample_weight must be a dense array, but is a masked"):
        stream.update(x, y, late)
    assert stream.count == 0
    stream.update(x, y, np.ones(6))
    assert stream.count == 6


def test_adding_and_resetting():
    scores, target = batch()
    first, second = LossAccumulator(p=2), LossAccumulator(p=2)
    first.update(scores[:50], target[:50])
    second.update(scores[50:], target[50:])
    both, whole = first + second, LossAccumulator(p=2)
    whole.update(scores, target)
    assert both.state() == whole.state()
    assert (first.count, second.count) == (50, 150)
    whole.reset()
    assert whole.state() == LossAccumulator(p=2).state()
    with pytest.raises(ValueError, match="only accumulators of the same p can be merged"):
        first + LossAccumulator()
    with pytest.raises(TypeError, match="unsupported operand"):
        first + 1


def test_what_it_looks_like():
    stream = LossAccumulator(p=2, weight=np.ones(3), ignore_index=-100)
    options = "p=2.0, margin=1.0, weight of 3 classes, ignore_index=-100"
    assert repr(stream) == f"<LossAccumulator({options}): 0 samples, mean nan>"
    stream.update(np.zeros((1, 3)), np.asarray([0]))
    assert repr(stream) == f"<LossAccumulator({options}): 1 sample, mean 0.666667>"


def test_weights_that_are_no_numbers():
    made = [LossAccumulator(weight=np.asarray([1.0, math.nan, math.inf])) for _ in range(2)]
    made[0].update(np.zeros((1, 3)), np.asarray([0]))
    made[1].update(np.zeros((1, 3)), np.asarray([1]))
    text = json.dumps(made[0].state(), allow_nan=False)
    again = LossAccumulator.from_state(json.loads(text))
    assert again.state() == made[0].state()
    assert (made[0] + again).count == 2
    assert math.isnan((made[0] + made[1]).compute())


@pytest.mark.parametrize("p", [1, 2])
def test_sample_weights(p):
    scores, target = batch()
    factors = np.linspace(0, 2, 200, dtype=np.float32)
    losses = sample_losses(scores, target, p=p).astype(np.float64) * factors
    whole, parts = LossAccumulator(p=p), LossAccumulator(p=p)
    whole.update(scores, target, factors)
    for part in (slice(0, 7), slice(7, 200)):
        parts.update(scores[part], target[part], sample_weight=factors[part])
    assert parts.state() == whole.state()
    assert whole.compute("sum") == math.fsum(losses)
    exact = sum(map(Fraction, losses.tolist())) / sum(map(Fraction, factors.tolist()))
    assert whole.compute() == float(exact)
    assert whole.count == 200
    plain, ones = LossAccumulator(p=p), LossAccumulator(p=p)
    plain.update(scores, target)
    ones.update(scores, target, np.ones(200, np.int8))
    assert ones.state() == plain.state()


def test_sample_weights_that_sum_to_nothing():
    stream = LossAccumulator()
    stream.update(np.zeros((2, 3)), np.asarray([0, 1]), np.zeros(2))
    assert stream.compute("sum") == 0
    assert math.isnan(stream.compute())


def test_the_weight_of_an_ignored_sample_may_be_anything():
    scores, target = np.asarray([[0.0, 1], [2, 2], [3, 0]]), np.asarray([0, -100, 1])
    accumulator = LossAccumulator(ignore_index=-100)
    accumulator.update(scores, target, np.asarray([1.0, math.nan, 2.0]))
    wanted = LossAccumulator()
    wanted.update(scores[::2], target[::2], np.asarray([1.0, 2.0]))
    assert accumulator.compute() == wanted.compute()
    with pytest.raises(ValueError, match=r"finite and not negative, but is nan at position \(0"):
        accumulator.update(scores, target, np.asarray([math.nan, 1.0, 2.0]))


@pytest.mark.parametrize(
    ("factors", "error", "message"),
    [
        (np.ones((200, 1)), ValueError, r"must have the shape of target, \(200,\), but has shape"),
        (
            np.full(200, math.nan),
            ValueError,
            r"finite and not negative, but is nan at position \(0",
        ),
        (np.r_[np.ones(3), -1, np.ones(196)], ValueError, r"but is -1.0 at position \(3,\)"),
        (np.ones(200, complex), TypeError, "must have a real dtype, but has dtype complex128"),
        ([1.0] * 200, TypeError, "must be an array, but is .* of type list"),
        (np.ones(200, "U1"), TypeError, "must have a real dtype, but has dtype <U1"),
        (np.ma.ones(200), TypeError, "must be a dense array, but is a masked array"),
    ],
    ids=["shape", "nan", "negative", "complex", "list", "strings", "masked"],
)
def test_sample_weights_that_are_refused(factors, error, message):
    scores, target = batch()
    stream = LossAccumulator()
    with pytest.raises(error, match=f"sample_weight.*{message}|^{message}"):
        stream.update(scores, target, factors)
    assert stream.state() == LossAccumulator().state()


@pytest.mark.parametrize(
    "library", ["numpy", "torch", "jax.numpy", "array_api_strict", "dask.array"]
)
def test_ignored_samples(library):
    xp = pytest.importorskip(library)
    scores, target = batch()
    target[::3] = -100
    scores[::3] = math.nan
    kept = target != -100
    factors = np.linspace(0.5, 1, 200, dtype=np.float32)
    stream, wanted = LossAccumulator(ignore_index=-100), LossAccumulator()
    for options in ([], [factors]):
        stream.update(xp.asarray(scores), xp.asarray(target), *map(xp.asarray, options))
        wanted.update(scores[kept], target[kept], *(f[kept] for f in options))
    assert stream.count == wanted.count == 2 * kept.sum()
    assert stream.compute() == pytest.approx(wanted.compute(), rel=1e-6)


def test_ignore_index_is_part_of_what_must_agree():
    with pytest.raises(ValueError, match="same ignore_index can be merged, but this one has None"):
        LossAccumulator().merge(LossAccumulator(ignore_index=3))
    with pytest.raises(TypeError, match=r"ignore_index must be None or an integer, but is 1\.5"):
        LossAccumulator(ignore_index=1.5)


def test_other_devices_of_array_api_strict():
    xp = pytest.importorskip("array_api_strict")
    if not hasattr(xp, "Device"):
        pytest.skip("this array_api_strict has one device")
    scores, target = batch()
    weight = np.linspace(0.5, 2, 5)
    for name in ("device1", "device2", "no_x64"):
        try:
            device = xp.Device(name)
        except ValueError:
            continue
        single = name == "no_x64"
        stream = LossAccumulator(weight=weight)
        stream.update(
            xp.asarray(scores, device=device),
            xp.asarray(target.astype(np.int32) if single else target, device=device),
        )
        wanted = LossAccumulator(weight=weight.astype(np.float32))
        wanted.update(scores, target)
        assert stream.compute() == pytest.approx(wanted.compute(), rel=1e-6), name


def test_jax_arrays_over_several_devices_with_a_weight():
    pytest.importorskip("jax")
    code = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from mml_arrayapi import LossAccumulator
mesh = Mesh(np.asarray(jax.devices()), ("batch",))
scores = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)
target = np.arange(64, dtype=np.int32) % 5
place = lambda a: jax.device_put(a, NamedSharding(mesh, PartitionSpec("batch")))
made = []
for arrays in ((scores, target), (place(scores), place(target))):
    stream = LossAccumulator(weight=np.linspace(0.5, 2, 5, dtype=np.float32))
    stream.update(*arrays)
    made.append(stream.compute())
assert abs(made[0] / made[1] - 1) < 1e-6, made
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_producers_of_lazy_arrays_run_once():
    da = pytest.importorskip("dask.array")
    scores, target = batch()
    runs = []

    def produce(block):
        runs.append(1)
        return block

    both = da.from_array(np.c_[scores, target], chunks=(100, -1)).map_blocks(
        produce, meta=np.empty((0, 0))
    )
    stream = LossAccumulator(ignore_index=4)
    stream.update(both[:, :5], both[:, 5].astype(int), both[:, 5])
    assert len(runs) == 2


def test_arrays_that_are_traced():
    jax = pytest.importorskip("jax")
    scores, target = (jax.numpy.asarray(a) for a in batch(4))

    def update(x, y):
        LossAccumulator().update(x, y)
        return x.sum()

    for transform in (jax.jit, jax.vmap, jax.grad):
        with pytest.raises(ValueError, match="input must have values that can be read"):
            transform(update)(scores, target)
    with pytest.raises(ValueError, match="target must have values that can be read"):
        jax.jit(lambda y: update(scores, y))(target)
    with pytest.raises(ValueError, match="input must have values that can be read"):
        jax.jit(lambda: update(scores, target))()


class Named(LossAccumulator):
    pass


class Counting(LossAccumulator):
    def __init__(self, name, **options):
        super().__init__(**options)
        self.name, self.batches = name, 0

    def update(self, *arrays):
        super().update(*arrays)
        self.batches += 1


def test_subclasses_keep_what_is_theirs():
    made = Counting("training", p=2)
    made.update(*batch(5))
    for other in (
        pickle.loads(pickle.dumps(made)),
        copy.copy(made),
        copy.deepcopy(made),
        made + LossAccumulator(p=2),
    ):
        assert (type(other), other.name, other.batches) == (Counting, "training", 1)
        assert other.compute() == made.compute()
        other.update(*batch(3))
        assert (other.count, made.count) == (8, 5)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'name'"):
        Counting.from_state(made.state())


def test_subclasses_stay_themselves():
    made = Named(p=2)
    made.update(*batch(5))
    for other in (
        pickle.loads(pickle.dumps(made)),
        copy.deepcopy(made),
        made + LossAccumulator(p=2),
    ):
        assert type(other) is Named
        assert other.compute() == made.compute()


def test_sample_weights_of_16_bits():
    torch = pytest.importorskip("torch")
    scores, target = (torch.from_numpy(array) for array in batch(5))
    for dtype in (torch.bfloat16, torch.float16):
        made = LossAccumulator()
        made.update(scores, target, torch.full((5,), 0.5, dtype=dtype))
        assert made.compute() == pytest.approx(sample_losses(scores, target).double().mean().item())


def test_weights_beyond_float32_are_infinite_there():
    jnp = pytest.importorskip("jax.numpy")
    made = LossAccumulator(weight=np.array([1.0, 1e300]))
    with np.errstate(all="raise"):
        made.update(jnp.zeros((1, 2)), jnp.array([1]))
    assert made.compute() == math.inf


def test_weighted_losses_beyond_float64_have_a_finite_mean():
    scores, target, weights = np.asarray([[1e307, 0.0]] * 2), np.asarray([1, 1]), [1e10, 3e10]
    stream = LossAccumulator()
    stream.update(scores, target, np.asarray(weights))
    assert stream.count == 2
    assert stream.compute("sum") == math.inf
    assert stream.compute() == pytest.approx(5e306, rel=1e-15)
    again = LossAccumulator.from_state(json.loads(json.dumps(stream.state())))
    assert again.compute() == stream.compute()
    assert stream.compute() == evaluate(scores, target, sample_weight=np.asarray(weights)).loss


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("weight", [5e-324, 1e-320, 1e-310, 3e-308, 1.0, 1e308])
def test_equal_weights_of_any_size_leave_the_mean(weight, kind):
    draw = np.random.default_rng(3)
    scores, target = draw.standard_normal((50, 6)).astype(kind), draw.integers(0, 5, 50)
    plain, stream = LossAccumulator(), LossAccumulator()
    plain.update(scores, target)
    stream.update(scores, target, np.full(50, weight))
    assert stream.compute() == pytest.approx(plain.compute(), rel=1e-15)
    figures = evaluate(scores, target, sample_weight=np.full(50, weight))
    assert figures.loss == stream.compute()
    one = evaluate(scores, target)
    for ours, theirs in zip(figures.classes, one.classes, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-15, nan_ok=True)


def test_weighted_losses_below_float64():
    """Each product to 53 bits, as far as the unit of sums goes; those of zero are zero."""
    scores = np.asarray([[2.0**-30, 0.0], [0.0, 1.0], [1.0, 0.0]])
    weights, target = np.asarray([3 * 2.0**-1074, 0.0, 2.0**-1050]), np.asarray([1, 0, 1])
    stream = LossAccumulator()
    stream.update(scores, target, weights)
    wanted = Fraction(3, 2**1075) * (1 + Fraction(1, 2**30)) + Fraction(1, 2**1050)
    assert Fraction(stream._totals.losses.total, 2**1130) == wanted


@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_arrays_that_numpy_reads_by_dlpack_alone(ignore_index, weighted):
    xp = pytest.importorskip("marray").masked_namespace(np)
    draw = np.random.default_rng(5)
    arrays = [draw.standard_normal((20, 3)), draw.integers(0, 3, 20)]
    arrays += [draw.uniform(size=20)] * weighted
    assert np.asarray(xp.asarray(arrays[0])).dtype == object
    ours, theirs = (LossAccumulator(ignore_index=ignore_index) for _ in range(2))
    ours.update(*map(xp.asarray, arrays))
    theirs.update(*arrays)
    assert ours.compute() == theirs.compute()


@pytest.mark.parametrize(
    "change",
    [
        {"weight": [10**400]},
        {"weight": "123"},
        {"sum": ["0x1p0", math.inf, 0, 0, 0]},
        {"sum": ["0x1p5", 1.5, 0, 0, 0]},
        {"sum": ["0x1p99999999999", 1, 0, 0, 0]},
        {"sum": ["0x1p-99999", 1, 0, 0, 0]},
        {"sum": ["0x1p5", 1, 0, 0, 2], "sample_weights": ["0x1p0", 1, 0, 0, 0]},
        {"sum": ["0x1p5", 1, 0, 0, 0]},
        {"sample_weights": ["-0x1p0", 0, 0, 0, 0]},
    ],
    ids=[
        "large weight",
        "text",
        "infinite count",
        "no count",
        "large",
        "small",
        "two of one",
        "another count",
        "negative weights",
    ],
)
def test_states_that_no_accumulator_has(change):
    state = LossAccumulator().state() | change
    with pytest.raises(ValueError, match=r"state must be what LossAccumulator.state\(\) returned"):
        LossAccumulator.from_state(state)
