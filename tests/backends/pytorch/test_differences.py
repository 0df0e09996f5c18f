"""Where PyTorch's eager and compiled losses disagree, or are wrong: what ours says, and theirs.

PyTorch's answers are asserted too: when a release changes one, the page docs/pytorch.md is wrong.
"""

import math

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, multi_margin_loss, multi_margin_loss_and_grad
from tests.backends.pytorch.conftest import compile_whole

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fresh_compiler")
theirs = torch.nn.functional.multi_margin_loss
VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])
DECOMPOSES = VERSION >= (2, 11)  # torch.compile calls the eager function before


def both(function):
    """A function as it is and compiled."""
    return [function, compile_whole(function)]


def gradient(function, x, target, **options):
    x = x.clone().requires_grad_()
    function(x, target, **options).sum().backward()
    return x.grad


def test_kink():
    x, target = torch.tensor([[1.0, 2.0]]), torch.tensor([1])
    eager, compiled = both(theirs)
    assert gradient(eager, x, target)[0, 0] == 0
    slope = 0.5 if DECOMPOSES and VERSION < (2, 14) else 0
    assert gradient(compiled, x, target)[0, 0] == slope
    for function in both(multi_margin_loss):
        assert gradient(function, x, target)[0, 0] == 0


@pytest.mark.parametrize(("reduction", "expected"), [("mean", math.nan), ("sum", 0.0)])
def test_empty_batch(reduction, expected):
    x, target = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for function in both(multi_margin_loss):
        np.testing.assert_equal(float(function(x, target, reduction=reduction)), expected)
    # PyTorch eager returns memory that nothing wrote to; there is no value to compare with.


def test_nan_score():
    x, target = torch.tensor([[0.0, math.nan, 0.0]]), torch.tensor([0])
    eager, compiled = both(theirs)
    assert math.isfinite(eager(x, target))
    assert math.isnan(compiled(x, target)) == DECOMPOSES
    for function in both(multi_margin_loss):
        assert math.isnan(function(x, target))
        assert gradient(function, x, target).isnan().all()


def test_zero_dimensional_target_without_reduction():
    x, target = torch.zeros(3), torch.tensor(0)
    eager, compiled = both(theirs)
    assert eager(x, target, reduction="none").shape == ()
    assert compiled(x, target, reduction="none").shape == ((1,) if DECOMPOSES else ())
    for function in both(multi_margin_loss):
        assert function(x, target, reduction="none").shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_scores_on_the_cpu(dtype):
    x, target = torch.zeros(2, 4, dtype=dtype), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="not implemented"):
        theirs(x, target)
    for function in both(multi_margin_loss):
        assert function(x, target) == 0.75


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_targets_of_other_integer_types(dtype):
    x, target = torch.zeros(2, 4), torch.tensor([0, 1], dtype=dtype)
    with pytest.raises(RuntimeError, match="expected scalar type Long"):
        theirs(x, target)
    for function in both(multi_margin_loss):
        assert function(x, target) == 0.75


def test_weight_of_another_precision():
    x, target, weight = torch.zeros(2, 4), torch.tensor([0, 1]), torch.ones(4, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        theirs(x, target, weight=weight)
    for function in both(multi_margin_loss):
        loss = function(x, target, weight=weight)
        assert loss == 0.75
        assert loss.dtype == torch.float32


def test_target_of_two_to_the_32():
    with pytest.raises(InvalidTargetError, match=r"target\[0\] is 4294967296"):
        multi_margin_loss(torch.zeros(1, 3), torch.tensor([2**32]))
    assert math.isnan(
        multi_margin_loss(torch.zeros(1, 3), torch.tensor([2**32]), check_target="nan")
    )


def test_double_backward_and_forward_mode():
    x, target = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2])
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.gradgradcheck(lambda a: theirs(a, target, p=2), (x,))
    assert torch.autograd.gradgradcheck(lambda a: multi_margin_loss(a, target, p=2), (x,))
    with pytest.raises(NotImplementedError, match="forward AD"):
        torch.func.jvp(lambda a: theirs(a, target), (x.detach(),), (torch.ones_like(x),))
    torch.func.jvp(lambda a: multi_margin_loss(a, target), (x.detach(),), (torch.ones_like(x),))


def test_powers_other_than_1_and_2():
    with pytest.raises(ValueError, match="only p == 1 and p == 2 supported"):
        theirs(torch.zeros(1, 3), torch.tensor([0]), p=3)
    assert multi_margin_loss(torch.zeros(1, 3), torch.tensor([0]), p=3, margin=2) == pytest.approx(
        16 / 3
    )


def test_float16_mean_of_many_small_losses():
    # On CUDA PyTorch divides each row by N * C and rounds to float16 before it adds: 0.
    n = 1_000_000
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float16).expand(n, 2)
    loss = multi_margin_loss(x, torch.zeros(n, dtype=torch.int64), margin=1.0390625)
    assert float(loss) == pytest.approx(0.0390625 / 2, rel=1e-3)
    _, grad = multi_margin_loss_and_grad(x[:4], torch.zeros(4, dtype=torch.int64), margin=1.0390625)
    assert grad[0].tolist() == [-0.125, 0.125]
