"""The CPU kernels: every layout, dtype and exponent against float64, and what they promise beside."""

import itertools
import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import mml_arrayapi as mml

pytest.importorskip("numba")

from mml_arrayapi import registry
from mml_arrayapi.backends import cpu_blocks, numpy_fused, threads

NAME = "numpy-cpu"
TOLERANCE = {"float64": 1e-13, "float32": 1e-6, "float16": 1e-3}


@pytest.fixture
def small_blocks(monkeypatch):
    """Make small arrays go through many blocks, and through the kernels for large ones."""
    monkeypatch.setattr(cpu_blocks, "BLOCK", 1000)
    monkeypatch.setattr(cpu_blocks, "MANY", 0)
    monkeypatch.setattr(cpu_blocks, "SERIAL", 0)


def reference(x, y, p=1, margin=1.0, weight=None):
    """Losses per row and gradient of their sum, in float64, by the definition."""
    x, rows = np.asarray(x, np.float64), np.arange(len(x))
    z = (x - x[rows, y][:, None]) + margin
    own = np.arange(x.shape[1]) == np.asarray(y)[:, None]
    z = np.where((z > 0) & ~own, z, 0)
    slope = np.where(z > 0, p * np.where(z > 0, z, 1) ** (p - 1), 0)
    slope = np.where(own, -slope.sum(1, keepdims=True), slope)
    factor = (np.ones(len(x)) if weight is None else np.asarray(weight, np.float64)[y]) / x.shape[1]
    return factor * (z**p).sum(1), factor[:, None] * slope


LAYOUTS = {
    "rows": lambda x: x,
    "fortran": np.asfortranarray,
    "reversed": lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "strided": lambda x: np.repeat(np.repeat(x, 2, 0), 3, 1)[::2, ::3],
    "fortran, reversed": lambda x: np.asfortranarray(x[::-1])[::-1],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_every_form_matches_float64(small_blocks, rng, dtype, layout):
    shapes = (1, 1), (3, 2), (40, 8), (403, 9), (70, 16), (300, 39), (7, 2063)
    exponents = {"float32": (1, 2, 1.5), "float16": (1, 2), "float64": (1, 1.5)}[dtype]
    for (n, c), p in itertools.product(shapes, exponents):
        x = LAYOUTS[layout](rng.normal(size=(n, c)).astype(dtype))
        y, weight = rng.integers(0, c, n), rng.random(c).astype(np.float32)
        upstream = rng.random(n)
        keywords = {"p": p, "margin": 0.7, "weight": weight, "backend": NAME}
        losses, grad = mml.multi_margin_loss_and_grad(
            x, y, reduction="none", grad_output=upstream, **keywords
        )
        expected, slope = reference(x, y, p, 0.7, weight)
        slope = slope * upstream[:, None]
        tolerance = TOLERANCE[dtype]
        tiny = 1e-7 if dtype == "float16" else 1e-14
        np.testing.assert_allclose(losses, expected, rtol=2 * tolerance, atol=tiny)
        near = tiny + tolerance * abs(slope).max()
        np.testing.assert_allclose(grad, slope, rtol=2 * tolerance, atol=near)
        for reduction, total in (("mean", expected.mean()), ("sum", expected.sum())):
            loss = mml.multi_margin_loss(x, y, reduction=reduction, **keywords)
            np.testing.assert_allclose(float(loss), total, rtol=tolerance, atol=tiny)


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_classes_on_any_axis_and_batches_that_no_stride_walks(small_blocks, rng, axis):
    x = rng.normal(size=(4, 5, 6, 7)).astype(np.float32)[::2, :, 1:4]
    y = rng.integers(0, x.shape[axis], np.delete(x.shape, axis))
    loss, grad = mml.multi_margin_loss_and_grad(x, y, axis=axis, reduction="none", backend=NAME)
    flat = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    expected, slope = reference(flat, y.reshape(-1))
    np.testing.assert_allclose(loss.reshape(-1), expected, rtol=1e-6)
    moved = np.moveaxis(grad, axis, -1).reshape(flat.shape)
    np.testing.assert_allclose(moved, slope, rtol=1e-6, atol=1e-7)
    assert grad.shape == x.shape


@pytest.mark.parametrize("layout", ["rows", "fortran"])
@pytest.mark.parametrize("c", [5, 12, 700])
@pytest.mark.parametrize("p", [1, 2, 1.5])
def test_nan_infinity_and_targets_out_of_range(small_blocks, p, c, layout):
    inf, nan = math.inf, math.nan
    x = np.zeros((75, c), np.float32)
    y = np.zeros(75, np.int64)
    x[:, 3] -= 1  # at the kink
    x[3, c - 1] = nan
    x[8, 0] = nan
    x[13, 0] = x[13, 2] = inf  # inf - inf
    y[20], y[41] = c, -1
    x[50, 1] = inf
    x[60, 1:] = -inf  # masked classes cost nothing
    x[61, 0] = inf
    x = LAYOUTS[layout](x)
    losses, grad = mml.multi_margin_loss_and_grad(
        x, y, p=p, reduction="none", check_target="nan", backend=NAME
    )
    rows = np.isnan(losses)
    assert np.flatnonzero(rows).tolist() == [3, 8, 13, 20, 41]
    assert np.isnan(grad[rows]).all()
    assert not np.isnan(grad[~rows]).any()
    assert losses[50] == inf
    assert losses[60] == losses[61] == 0
    assert (grad[~rows, 3] == 0).all()
    with pytest.raises(mml.InvalidTargetError, match=rf"target\[20\] is {c}"):
        mml.multi_margin_loss(x, y, p=p, backend=NAME)


def test_one_class_costs_nothing_but_a_nan_stays(small_blocks):
    x = np.array([[0.0], [math.nan], [math.inf], [-math.inf]])
    losses = mml.multi_margin_loss(x, np.zeros(4, int), reduction="none", backend=NAME)
    np.testing.assert_array_equal(losses, [0, math.nan, 0, 0])


def test_the_margin_survives_large_scores():
    # (x_j - x_y) + margin; reassociated, the margin of 1e-3 would vanish in scores of 1e5.
    x = np.full((64, 100), 1e5, np.float32)
    loss = mml.multi_margin_loss(x, np.zeros(64, int), margin=1e-3, backend=NAME)
    assert float(loss) == pytest.approx(99e-5, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 10**7), (2 * 10**5, 10)])
@pytest.mark.parametrize("p", [1, 2])
def test_sums_are_accurate_at_any_size(shape, p, rng):
    x = rng.random(shape, dtype=np.float32)
    y = rng.integers(0, shape[1], shape[0])
    loss, grad = mml.multi_margin_loss_and_grad(x, y, p=p, reduction="sum", backend=NAME)
    expected, slope = reference(x, y, p)
    assert float(loss) == pytest.approx(math.fsum(expected), rel=1e-6)
    own = np.take_along_axis(grad, y[:, None], 1)
    np.testing.assert_allclose(own, np.take_along_axis(slope, y[:, None], 1), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number_is_widened_exactly(dtype):
    torch = pytest.importorskip("torch")
    bits = np.arange(2**16, dtype=np.uint16)
    scores = torch.from_numpy(bits).view(getattr(torch, dtype))
    exact = scores.double().numpy()
    finite = np.isfinite(exact)
    # Two classes, the target's score 0, margin 0: the loss is half of a positive score.
    pairs = torch.stack([torch.zeros_like(scores), scores], 1)
    losses = mml.multi_margin_loss(
        pairs,
        torch.zeros(2**16, dtype=torch.int64),
        margin=0.0,
        reduction="none",
        backend="torch-cpu",
    )
    expected = torch.from_numpy(np.maximum(np.where(finite, exact, 0), 0) / 2).to(scores.dtype)
    torch.testing.assert_close(losses[finite], expected[finite], rtol=0, atol=0)
    assert losses[np.isnan(exact)].isnan().all()
    assert losses[exact == math.inf].tolist() == [math.inf]
    assert losses[exact == -math.inf].tolist() == [0]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("p", [1, 2])  # p = 1 rounds once a row, the others every element
def test_gradients_are_rounded_to_nearest_even(dtype, p, rng):
    torch = pytest.importorskip("torch")
    n = 4096
    factors = np.exp(rng.uniform(-20, 12, n))  # subnormal, normal and overflowing float16
    pairs = torch.tensor([[0.0, 1.0]] * n, dtype=getattr(torch, dtype))
    _, grad = mml.multi_margin_loss_and_grad(
        pairs,
        torch.zeros(n, dtype=torch.int64),
        p=p,
        margin=0.5,
        reduction="none",
        grad_output=torch.from_numpy(factors),
        backend="torch-cpu",
    )
    exact = (factors.astype(np.float64) * 0.5).astype(np.float32)  # p = 1
    if p == 2:
        exact = factors.astype(np.float32) * np.float32(1.5)
    expected = torch.from_numpy(exact).to(pairs.dtype)
    torch.testing.assert_close(grad[:, 1], expected, rtol=0, atol=0)
    torch.testing.assert_close(grad[:, 0], -expected, rtol=0, atol=0)


@pytest.mark.parametrize("c", [10, 300])
@pytest.mark.parametrize("layout", ["rows", "fortran"])
def test_results_have_the_same_bits_for_any_number_of_threads(
    monkeypatch, small_blocks, rng, layout, c
):
    x = LAYOUTS[layout](rng.normal(size=(999, c)).astype(np.float32))
    y = rng.integers(0, c, 999)
    results = set()
    for count in (1, 2, 7):
        monkeypatch.setenv(threads.ENVIRONMENT, str(count))
        loss, grad = mml.multi_margin_loss_and_grad(x, y, p=2, backend=NAME)
        results.add((float(loss), grad.tobytes(), float(mml.multi_margin_loss(x, y, backend=NAME))))
    assert len(results) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_of_the_inputs_size_is_copied(rng, layout):
    x = LAYOUTS[layout](rng.normal(size=(3000, 400)).astype(np.float32))
    y = rng.integers(0, 400, 3000)
    weight = np.ones(400, np.float32)
    for function, allowed in (
        (mml.multi_margin_loss, 0),
        (mml.multi_margin_loss_and_grad, x.size * 4),
    ):
        function(x, y, weight=weight, backend=NAME)  # compiles
        tracemalloc.start()
        result = function(x, y, weight=weight, backend=NAME)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert result is not None
        assert peak < allowed + 300_000


def test_read_only_arrays_and_memory_maps(tmp_path, rng):
    x = rng.normal(size=(50, 20)).astype(np.float32)
    y = rng.integers(0, 20, 50).astype(np.uint8)
    expected, slope = reference(x, y)
    x.tofile(tmp_path / "scores")
    mapped = np.memmap(tmp_path / "scores", np.float32, "r", shape=(50, 20))
    x.flags.writeable = y.flags.writeable = False
    for scores in (x, mapped):
        assert mml.explain(scores, y, backend=NAME).kernel == NAME
        loss, grad = mml.multi_margin_loss_and_grad(scores, y, reduction="none", backend=NAME)
        np.testing.assert_allclose(loss, expected, rtol=1e-6)
        np.testing.assert_allclose(grad, slope, rtol=1e-6, atol=1e-7)
        assert type(grad) is np.ndarray


def test_the_kernel_says_in_words_what_it_refuses(rng):
    x, y = rng.normal(size=(4, 3)).astype(np.float32), np.zeros(4, int)
    odd = np.zeros(4 * 3 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(4, 3)
    record = np.zeros((4, 3), [("a", np.int16), ("b", np.float32)])["b"]
    cases = (
        (np.ma.masked_array(x), "input is a MaskedArray"),
        (x.astype(">f4"), "not native"),
        (odd, "not aligned"),
        (record, "not aligned"),
    )
    for scores, reason in cases:
        with pytest.raises(ValueError, match=reason):
            mml.multi_margin_loss(scores, y, backend=NAME)
        assert mml.explain(scores, y).kernel == "generic"


def test_the_generic_implementation_serves_until_compiling_pays(monkeypatch, rng):
    monkeypatch.setattr(cpu_blocks, "_work", {})
    x, y = rng.normal(size=(32, 10)), rng.integers(0, 10, 32)
    explained = mml.explain(x, y)
    assert explained.kernel == "generic"
    assert "until calls for float64 and p=1 add up to 4,194,304" in str(explained)
    assert mml.explain(np.zeros((1000, 4200)), np.zeros(1000, int)).kernel == NAME
    assert mml.explain(x, y).kernel == NAME
    assert mml.explain(x, y, p=2).kernel == "generic"


def test_shortcut_gives_what_the_checked_call_gives(rng):
    x, y = rng.normal(size=(32, 10)).astype(np.float32), rng.integers(0, 10, 32)
    for weight in (None, -np.abs(x[0])):
        first = mml.multi_margin_loss(x, y, weight=weight, backend=NAME)
        quick = numpy_fused.shortcut(x, y, 1, 1.0, weight, "mean", -1, "auto")
        assert quick == first
        checked = {"weight": weight, "check_target": "nan"}  # not by the shortcut
        assert quick == mml.multi_margin_loss(x, y, backend=NAME, **checked)
        generic = mml.multi_margin_loss(x, y, backend="generic", **checked)
        np.testing.assert_allclose(quick, generic, rtol=1e-6)
        assert type(quick) is np.float32
    refused = [
        (x, y, True, 1.0, None, "mean", -1, "auto"),
        (x, y, 1, math.inf, None, "mean", -1, "auto"),
        (x, y, 1, math.nan, None, "mean", -1, "auto"),
        (x, y, 1, 10**400, None, "mean", -1, "auto"),
        (x, y, 1, 1.0, None, "mean", -1.0, "auto"),
        (x, y, 1, 1.0, x[0, 1:], "mean", -1, "auto"),
        (x, y, 1, 1.0, x[0].astype(np.float64), "mean", -1, "auto"),
        (x, y, 1, 1.0, x.T[:, 0][::-1], "mean", -1, "auto"),
        (x, y, 1, 1.0, list(x[0]), "mean", -1, "auto"),
        (x, y + 10, 1, 1.0, -np.abs(x[0]), "mean", -1, "auto"),
        (x, y, 1, 1.0, None, "none", -1, "auto"),
        (x, y, 1, 1.0, None, "mean", 0, "auto"),
        (x, y, 1, 1.0, None, "mean", -1, "maybe"),
        (x, y[1:], 1, 1.0, None, "mean", -1, "auto"),
        (x[:, ::2], y, 1, 1.0, None, "mean", -1, "auto"),
        (x[:0], y[:0], 1, 1.0, None, "mean", -1, "auto"),
        (x, y + 10, 1, 1.0, None, "mean", -1, "auto"),
        (x, y.astype(np.int32), 1, 1.0, None, "mean", -1, "auto"),
        (x, list(y), 1, 1.0, None, "mean", -1, "auto"),
    ]
    for arguments in refused:
        assert numpy_fused.shortcut(*arguments) is None


def test_shortcut_is_not_taken_where_a_backend_is_asked_for(monkeypatch, rng):
    monkeypatch.setattr(cpu_blocks, "WAIT", 0)
    x, y = rng.normal(size=(32, 10)).astype(np.float32), rng.integers(0, 10, 32)
    mml.multi_margin_loss(x, y)
    calls = []

    def spy(*arguments):
        calls.append(arguments)
        return numpy_fused.shortcut(*arguments)

    monkeypatch.setitem(registry._shortcuts, np.ndarray, spy)
    mml.multi_margin_loss(x, y)
    assert len(calls) == 1
    with mml.use_backend("generic"):
        mml.multi_margin_loss(x, y)
    mml.multi_margin_loss(x, y, backend="generic")
    assert len(calls) == 1
    with pytest.raises(mml.InvalidTargetError):
        mml.multi_margin_loss(x, y + 10)


PROGRAM = """
import sys
import numpy as np, mml_arrayapi as mml
x, y = np.ones((8, 5), np.float32), np.zeros(8, int)
assert "numba" not in sys.modules
mml.multi_margin_loss(x, y)
assert "numba" not in sys.modules  # a first small call waits for no compiler
print(mml.multi_margin_loss(x, y, backend="numpy-cpu"), "numba" in sys.modules)
"""


def test_numba_comes_late_and_an_unwritable_cache_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "below")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["0.8", "True"], done.stderr


@pytest.fixture
def leaf(monkeypatch, rng):
    """A small float32 batch of PyTorch that the shortcut takes, with its targets."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cpu_blocks, "WAIT", 0)
    x = torch.tensor(rng.normal(size=(32, 10)).astype(np.float32), requires_grad=True)
    y = torch.tensor(rng.integers(0, 10, 32))
    mml.multi_margin_loss(x, y, p=2)
    return torch, x, y


def test_torch_shortcut_gives_what_the_checked_call_gives(leaf):
    torch, x, y = leaf
    torch_cpu = pytest.importorskip("mml_arrayapi.backends.torch_cpu")
    plain = x.detach()
    for z, weight in itertools.product((plain, x), (None, -plain[0].abs())):
        options = {"p": 2, "margin": 3, "weight": weight, "check_target": "nan"}
        checked = mml.multi_margin_loss(plain, y, backend="torch-cpu", **options)
        generic = mml.multi_margin_loss(plain, y, backend="generic", **options)
        quick = torch_cpu.shortcut(z, y, 2, 3, weight, "mean", -1, "auto")
        assert torch.equal(quick, checked)  # which the shortcut didn't serve
        torch.testing.assert_close(quick.detach(), generic, rtol=1e-6, atol=0)
        assert quick.requires_grad == z.requires_grad
    assert torch_cpu.shortcut(plain, y, 3, 3, None, "mean", -1, "auto") is None
    usual = (plain, y, 2, 1.0, None, "mean", -1, "auto")
    for place, other in (
        (0, plain.numpy()),
        (0, plain.double()),
        (0, plain[0]),
        (0, plain[None]),
        (0, plain[1:]),
        (0, plain[:0]),
        (0, plain[:, ::2]),
        (0, plain.to("meta")),
        (0, plain.to_mkldnn()),
        (0, torch.nn.Parameter(plain)),
        (1, y.int()),
        (1, y.numpy()),
        (1, y + 10),
        (1, y - 10),
        (1, y.repeat_interleave(2)[::2]),
        (1, y[:, None]),
        (1, y.to("meta")),
        (1, y.to_sparse()),
        (2, True),
        (2, 3),
        (3, math.inf),
        (3, 10**400),
        (3, False),
        (4, plain[0].numpy()),
        (4, plain[0].double()),
        (4, plain[0, 1:]),
        (4, plain[:10, 0]),
        (4, plain[0].to_sparse()),
        (4, plain[0].to_mkldnn()),
        (4, plain[0].to("meta")),
        (4, x[0]),
        (5, "sum"),
        (6, 0),
        (6, -1.0),
        (7, "nan"),
    ):
        arguments = (*usual[:place], other, *usual[place + 1 :])
        assert torch_cpu.shortcut(*arguments) is None, (place, other)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("keywords", [{}, {"reduction": "sum"}])  # by the shortcut, and not
def test_torch_gradients_of_any_order_match_the_generic_ones(leaf, keywords, weighted):
    torch, x, y = leaf
    keywords = keywords | {"weight": torch.linspace(-1, 2, 10) if weighted else None}

    def derivatives(**more):
        loss = mml.multi_margin_loss(x, y, p=2, **keywords, **more) * 3
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        (plain,) = torch.autograd.grad(loss, x, retain_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, retain_graph=True)
        scales = torch.tensor([1.0, -2.0])
        (many,) = torch.autograd.grad(loss, x, scales, is_grads_batched=True)
        return plain, first, second, many

    for ours, generic in zip(derivatives(), derivatives(backend="generic"), strict=True):
        torch.testing.assert_close(ours, generic)
    name = mml.multi_margin_loss(x, y, p=2, **keywords).grad_fn.name()
    assert name == ("_LossBackward" if "reduction" in keywords else "_SmallLossBackward")


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("c", [1, 2, 7, 8, 9, 15, 16, 33, 1001])
def test_torch_backward_by_bits_equals_the_one_pass_gradient(small_blocks, rng, dtype, c):
    torch = pytest.importorskip("torch")
    x = torch.tensor(rng.normal(size=(61, c)), dtype=getattr(torch, dtype))
    y = torch.tensor(rng.integers(0, c, 61))
    x[5, -1] = x[7, 0] = math.nan
    y[9] = c
    x[11] = x[11, 0]  # at the kink, were it not for the margin
    upstream = torch.tensor(rng.normal(size=61))
    weight = torch.tensor(rng.random(c), dtype=x.dtype)
    layouts = (x, x.flip(0).repeat_interleave(2, 0)[::2].flip(0), x.repeat_interleave(3, 1)[:, ::3])
    for z, w, reduction in itertools.product(layouts, (None, weight), ("none", "mean", "sum")):
        keywords = {"weight": w, "reduction": reduction, "margin": 0.5, "check_target": "nan"}
        leaf = z.detach().requires_grad_()
        loss = mml.multi_margin_loss(leaf, y, **keywords, backend="torch-cpu")
        assert loss.grad_fn.saved_tensors[3].numel() == 61 * -(-c // 8)
        factor = upstream.to(x.dtype) if reduction == "none" else torch.tensor(-2.0, dtype=x.dtype)
        expected, grad = mml.multi_margin_loss_and_grad(
            z, y, **keywords, grad_output=factor, backend="torch-cpu"
        )
        loss.backward(factor)
        torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
        torch.testing.assert_close(leaf.grad, grad, equal_nan=True, rtol=0, atol=0)


def test_torch_keeps_bits_only_where_they_pay(monkeypatch, rng):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(cpu_blocks, "MANY", 1000)

    def kept(x, p):
        y = torch.zeros(len(x), dtype=torch.int64)
        leaf = x.requires_grad_()
        loss = mml.multi_margin_loss(leaf, y, p=p, reduction="sum", backend="torch-cpu")
        return loss.grad_fn.saved_tensors[3] is not None

    assert kept(torch.zeros(100, 10), 1)
    assert not kept(torch.zeros(100, 10), 2)
    assert not kept(torch.zeros(99, 10), 1)
    assert not kept(torch.zeros(10, 100).T, 1)  # read as neighbouring rows


def test_torch_explains_what_it_leaves_to_the_generic_implementation(leaf):
    torch, x, y = leaf

    def why(x, y, **keywords):
        return dict(mml.explain(x, y, p=2, **keywords).considered)["torch-cpu"]

    assert why(x, y) is None
    weight = torch.ones(10, requires_grad=True)
    assert "weight requires a gradient" in why(x, y, weight=weight)
    assert why(x, y, weight=weight.detach()) is None
    assert "negates" in why(torch._neg_view(x.detach()), y)
    assert "a subclass of torch.Tensor" in why(
        x.detach().as_subclass(type("T", (torch.Tensor,), {})), y
    )
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in why(x.detach(), y)
    reasons = []
    torch.func.grad(lambda t: reasons.append(why(x, y)) or t.sum())(x.detach())
    assert "torch.func" in reasons[0]
    with torch.utils._device.DeviceContext("cpu"):
        assert "intercepts" in why(x, y)


def test_torch_no_grad_and_inference_keep_no_graph(leaf):
    torch, x, y = leaf
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not mml.multi_margin_loss(x, y, p=2).requires_grad
    assert mml.multi_margin_loss(x, y, p=2).requires_grad
    with pytest.raises(mml.InvalidTargetError):
        mml.multi_margin_loss(x, y + 10, p=2)


def test_torch_backward_refuses_an_input_changed_in_place(leaf):
    _, x, y = leaf
    z = x * 1
    loss = mml.multi_margin_loss(z, y, p=2)
    z += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
