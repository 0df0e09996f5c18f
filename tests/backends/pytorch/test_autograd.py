"""PyTorch: derivatives, transforms, compilation, tensors without values, and its own samples."""

import math

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, explain, multi_margin_loss, multi_margin_loss_and_grad
from tests.backends.pytorch.conftest import compile_whole
from tests.reference import UNDEFINED
from tests.reference import loss_and_grad as reference

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("fresh_compiler")
func = torch.func
P = [1, 2, 1.5, 3]


@pytest.fixture
def batch(rng):
    scores = torch.tensor(rng.normal(size=(6, 5)).astype(np.float32))
    return (
        scores,
        torch.tensor(rng.integers(0, 5, 6)),
        torch.tensor(rng.normal(size=5).astype(np.float32)),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("p", P)
def test_backward_with_any_upstream_gradient(batch, rng, p, reduction):
    scores, target, weight = batch
    scores = scores.requires_grad_()
    loss = multi_margin_loss(scores, target, p=p, weight=weight, reduction=reduction)
    upstream = torch.tensor(rng.normal(size=loss.shape).astype(np.float32))
    loss.backward(upstream)
    _, expected = multi_margin_loss_and_grad(
        scores.detach(), target, p=p, weight=weight, reduction=reduction, grad_output=upstream
    )
    torch.testing.assert_close(scores.grad, expected)


@pytest.mark.parametrize("p", P)
def test_first_and_second_derivatives_of_scores_and_weight(batch, p):
    scores, target, weight = (t.double() if t.is_floating_point() else t for t in batch)
    arguments = scores.requires_grad_(), weight.requires_grad_()

    def loss(x, w):
        return multi_margin_loss(x, target, p=p, weight=w, margin=0.9)

    assert torch.autograd.gradcheck(loss, arguments, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, arguments)


def _double_backward(loss, x):
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(x), x, create_graph=True)
    columns = [torch.autograd.grad(one, x, retain_graph=True)[0] for one in grad.flatten()]
    return torch.stack(columns).reshape(*x.shape, *x.shape)


SECOND = {
    "double backward": _double_backward,
    "hessian": lambda loss, x: func.hessian(loss)(x),
    "reverse over reverse": lambda loss, x: func.jacrev(func.jacrev(loss))(x),
    "forward over forward": lambda loss, x: func.jacfwd(func.jacfwd(loss))(x),
}


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("cause", UNDEFINED)
@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("how", ["kernel", "generic", "weight"])
def test_every_second_derivative_of_a_nan_is_nan(p, cause, second, how):
    scores, target, factor = UNDEFINED[cause]
    x = torch.tensor([scores, [0.0, 1, -torch.inf, 3]], dtype=torch.double)
    weight = torch.tensor([1.0, factor, 1, 1], dtype=torch.double, requires_grad=how == "weight")
    target = torch.tensor([target, 3])

    def loss(x):
        options = {"p": p, "weight": weight, "check_target": "nan"}
        return multi_margin_loss(
            x, target, backend="generic" if how == "generic" else None, **options
        )

    made = SECOND[second](loss, x).detach()
    assert made[0, :, 0].isnan().all()
    if second != "forward over forward":  # which multiplies all that is NaN with tangents of 0
        assert not made[1, :, 1].isnan().any()


@pytest.mark.parametrize("how", ["kernel", "generic", "weight"])
def test_the_derivative_of_a_gradient_of_nan_by_the_upstream_gradient(how):
    x = torch.tensor([[0.5, -1.4, 2, torch.nan], [0, 1, 2, 0.5]], dtype=torch.double)
    weight = torch.ones(4, dtype=torch.double, requires_grad=how == "weight")
    upstream = torch.ones(2, dtype=torch.double, requires_grad=True)
    x, target = x.requires_grad_(), torch.tensor([1, 1])
    backend = "generic" if how == "generic" else None
    options = {"p": 2, "reduction": "none", "weight": weight, "backend": backend}
    loss = multi_margin_loss(x, target, **options)
    (grad,) = torch.autograd.grad((loss * upstream).sum(), x, create_graph=True)
    (made,) = torch.autograd.grad(grad[:, 2].sum(), upstream)
    assert made.tolist() == pytest.approx([math.nan, 1.0], nan_ok=True)


@pytest.mark.parametrize("transform", [func.jacrev, func.jacfwd])
@pytest.mark.parametrize("scores", [[0.5, math.nan, 0.2], [0.5, 0.1, 0.2]], ids=["NaN", "finite"])
def test_no_weight_is_charged_with_a_target_out_of_range(transform, scores):
    x, target = torch.tensor([scores, [0.0, 1, 2]]), torch.tensor([7, 1])

    def loss(weight):
        return multi_margin_loss(x, target, weight=weight, check_target="nan")

    assert transform(loss)(torch.ones(3)).tolist() == pytest.approx([0, 1 / 3, 0])


@pytest.mark.parametrize("p", [1.5, 2, 3])
@pytest.mark.parametrize("place", [0, 2], ids=["own score", "score"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_second_derivatives_of_a_row_of_nan_are_nan(p, place, backend):
    x = torch.tensor([[0.5, 1, 2, 0], [0, 1, 2, 3]], dtype=torch.double)
    x[0, place] = torch.nan
    loss = multi_margin_loss(x.requires_grad_(), torch.tensor([0, 1]), p=p, backend=backend)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad((grad * torch.arange(8).reshape(2, 4)).sum(), x)
    assert second.isnan().tolist() == [[True] * 4, [False] * 4]


def test_inactive_classes_have_no_second_derivative_beside_an_infinite_weight():
    x = torch.tensor([[0.0, 5.0, -5.0]], dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([torch.inf, 1, 1], dtype=torch.float64)
    loss = multi_margin_loss(x, torch.tensor([0]), p=2, weight=weight)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(grad[0, 1], x)
    assert second.tolist() == [[-torch.inf, torch.inf, 0]]


@pytest.mark.parametrize("p", P)
def test_rows_without_a_value_have_a_gradient_of_nan(p):
    inf, nan = float("inf"), float("nan")
    scores = [[0.0, 1, 2], [0, nan, -9], [nan, 0, 0], [inf, inf, 0], [0, 1, 2]]
    x = torch.tensor(scores, dtype=torch.float32, requires_grad=True)
    target = torch.tensor([0, 0, 0, 0, 3])
    loss = multi_margin_loss(x, target, p=p, reduction="none", check_target="nan")
    loss.sum().backward()
    expected = [False, True, True, True, True]
    assert loss.isnan().tolist() == expected
    assert x.grad.isnan().all(dim=1).tolist() == x.grad.isnan().any(dim=1).tolist() == expected


def test_a_weight_alone_gets_its_gradient(batch):
    scores, target, weight = batch
    weight = weight.requires_grad_()
    multi_margin_loss(scores, target, weight=weight, reduction="sum").backward()
    losses = multi_margin_loss(scores, target, reduction="none")
    expected = torch.zeros(5).index_add_(0, target, losses)
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("p", P)
def test_function_transforms(batch, p):
    scores, target, weight = batch

    def loss(x, y=target):
        return multi_margin_loss(x, y, p=p, weight=weight)

    value, expected = multi_margin_loss_and_grad(scores, target, p=p, weight=weight)
    torch.testing.assert_close(func.grad(loss)(scores), expected)
    per_sample = func.vmap(loss)(scores, target)
    torch.testing.assert_close(
        per_sample, multi_margin_loss(scores, target, p=p, weight=weight, reduction="none")
    )
    torch.testing.assert_close(func.vmap(func.grad(loss))(scores, target), expected * 6)
    tangent = torch.randn_like(scores)
    primal, derivative = func.jvp(loss, (scores,), (tangent,))
    torch.testing.assert_close(primal, value)
    torch.testing.assert_close(derivative, (expected * tangent).sum())
    hessian = func.hessian(loss)(scores[0], target[0])
    numeric = torch.autograd.functional.hessian(
        lambda x: loss(x.unsqueeze(0), target[:1]), scores[0]
    )
    torch.testing.assert_close(hessian, numeric)
    if p == 2:
        assert hessian.abs().sum() > 0


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_forward_mode_leaves_tangents_of_ignored_samples_out(reduction):
    scores = torch.tensor([[0.5, 0.0, 1.0], [math.nan, 0.0, 1.0]])
    tangent = torch.tensor([[1.0, 2.0, 3.0], [math.nan, math.inf, 0.0]])

    def loss(x):
        target = torch.tensor([0, -100])
        return multi_margin_loss(x, target, ignore_index=-100, reduction=reduction)

    # Both other classes are within the margin: ((2 - 1) + (3 - 1)) / 3
    _, found = func.jvp(loss, (scores,), (tangent,))
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0] if reduction == "none" else 1.0))


@pytest.mark.parametrize("upstream", [math.inf, math.nan])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_a_weights_gradient_leaves_ignored_samples_out(backend, upstream):
    scores, target = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 2.0]]), torch.tensor([0, 1])

    def loss(weight):
        options = {"ignore_index": 0, "reduction": "none", "backend": backend}
        return multi_margin_loss(scores, target, weight=weight, **options)

    weight = torch.ones(3, requires_grad=True)
    loss(weight).backward(torch.tensor([upstream, 1.0]))
    torch.testing.assert_close(weight.grad, torch.tensor([0, 2 / 3, 0]))  # (0 + 2) / 3
    tangent = torch.tensor([upstream, 1.0, 1.0])
    _, found = func.jvp(loss, (torch.ones(3),), (tangent,))
    torch.testing.assert_close(found, torch.tensor([0, 2 / 3]))


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",
    "ignore:.*torch.jit:DeprecationWarning",
)
def test_compiled_forward_mode_over_vmap_of_a_view(batch):
    scores, target = torch.stack([batch[0]] * 3)[0], batch[1]  # a view of a larger tensor

    def tangent(x, y):
        mapped = torch.vmap(multi_margin_loss)
        return func.jvp(lambda x: mapped(x, y), (x,), (x.cos(),))[1]

    compiled = torch.compile(tangent, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(scores, target), tangent(scores, target))


@pytest.mark.parametrize("backend", [None, "generic"])
def test_forward_mode_beside_weights_that_have_no_tangent(backend):
    x, weight = torch.tensor([[0.0, -3e38, 3e38]]), torch.ones(3)

    def loss(x, target=1):
        target = torch.tensor([target])
        return multi_margin_loss(x, target, weight=weight, ignore_index=9, backend=backend)

    value, tangent = func.jvp(loss, (x,), (torch.tensor([[0.0, 1.0, 0.0]]),))
    assert value == math.inf
    torch.testing.assert_close(tangent, torch.tensor(-2 / 3))
    ignored = func.jacfwd(lambda x: loss(x, 9))(x)  # the mean of nothing is NaN, and constant
    assert ignored.tolist() == [[0, 0, 0]]


def test_compiled_at_the_kink_the_gradient_is_zero():
    # Written with clamp, as PyTorch's own loss is when compiled, it would be 1 / C.
    x = torch.tensor([[1.0, 2.0, 0.0]], requires_grad=True)
    target = torch.tensor([1])
    compile_whole(multi_margin_loss)(x, target).backward()
    assert x.grad.tolist() == [[0, 0, 0]]


def test_compiled_targets_out_of_range_and_nan_give_nan():
    step = compile_whole(multi_margin_loss)
    x = torch.zeros(3, 4, requires_grad=True)
    loss = step(x, torch.tensor([0, 9, 1]), reduction="none")
    loss.sum().backward()
    assert loss.isnan().tolist() == [False, True, False]
    assert x.grad.isnan().all(dim=1).tolist() == [False, True, False]
    scores = torch.tensor([[0.0, float("nan")], [0.0, 0.0]])
    assert step(scores, torch.tensor([0, 0]), reduction="none").isnan().tolist() == [True, False]


def test_tensors_without_values():
    from torch._subclasses.fake_tensor import FakeTensorMode

    for device in ("meta", "cpu"):
        mode = FakeTensorMode()
        x = torch.empty(3, 4, dtype=torch.bfloat16, device=device)
        t = torch.empty(3, dtype=torch.int32, device=device)
        if device == "cpu":
            x, t = mode.from_tensor(x), mode.from_tensor(t)
        for reduction in ("none", "mean"):
            loss, grad = multi_margin_loss_and_grad(x, t, reduction=reduction)
            assert loss.shape == ((3,) if reduction == "none" else ())
            assert loss.dtype == grad.dtype == torch.bfloat16
            assert loss.device == grad.device == torch.device(device)
            assert grad.shape == (3, 4)
    with FakeTensorMode():
        assert multi_margin_loss(torch.empty(3, 4), torch.empty(3, dtype=torch.int64)).shape == ()


def test_autocast(batch):
    scores, target, _ = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert multi_margin_loss(scores.bfloat16(), target).dtype == torch.float32
        torch.testing.assert_close(multi_margin_loss(scores, target), multi_margin_loss(*batch[:2]))


def test_raise_where_there_are_no_values_to_look_at():
    message = "check_target='raise' needs the values of target, but target is being traced"
    x, t = torch.zeros(2, 3, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=message):
        multi_margin_loss(x, t, check_target="raise")
    with pytest.raises(ValueError, match=message):
        func.vmap(lambda a, b: multi_margin_loss(a, b, check_target="raise"))(
            torch.zeros(2, 3), torch.tensor([0, 1])
        )


def test_targets_are_looked_at_within_grad():
    def loss(x):
        return multi_margin_loss(x, torch.tensor([0, 3]))

    with pytest.raises(InvalidTargetError, match=r"target\[1\] is 3, but input has 3 classes"):
        func.grad(loss)(torch.zeros(2, 3))


def test_parameters_and_subclasses_are_tensors(batch):
    scores, target, _ = batch
    loss = multi_margin_loss(torch.nn.Parameter(scores), target)
    loss.backward()
    torch.testing.assert_close(loss.detach(), multi_margin_loss(scores, target))
    assert explain(torch.nn.Parameter(scores), target).kernel


def test_mixed_devices():
    with pytest.raises(
        TypeError,
        match="target must be on the same device as input, but target is on cpu and input is on meta",
    ):
        multi_margin_loss(torch.zeros(2, 3, device="meta"), torch.tensor([0, 1]))


def samples():
    """PyTorch's own inputs for this loss: those of its operator tests, and its reference inputs."""
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.multi_margin_loss")
    for dtype in (torch.float32, torch.float64):
        for make in (info.sample_inputs, info.reference_inputs):
            yield from make("cpu", dtype, requires_grad=True)


@pytest.mark.filterwarnings("ignore")  # importing PyTorch's test helpers warns
def test_pytorchs_own_samples():
    count = 0
    for sample in samples():
        x, (target, *rest), options = sample.input, sample.args, sample.kwargs
        assert not rest
        if x.shape == ():  # its target may be absent-minded; PyTorch takes the score as one class
            assert target.numel() == 1
        expected = torch.nn.functional.multi_margin_loss(x, target, **options)
        loss = multi_margin_loss(x, target, **options)
        torch.testing.assert_close(loss, expected, msg=lambda m, s=sample: f"{m}\n{s}")
        (expected_grad,) = torch.autograd.grad(expected.sum(), x)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        torch.testing.assert_close(grad, expected_grad, msg=lambda m, s=sample: f"{m}\n{s}")
        _, explicit = multi_margin_loss_and_grad(x.detach(), target, **options)
        torch.testing.assert_close(explicit, expected_grad, msg=lambda m, s=sample: f"{m}\n{s}")
        count += 1
    assert count >= 404  # 202 reference inputs per dtype, and the samples


@pytest.mark.parametrize("p", [1, 2])
def test_large_class_counts_at_the_target_class(p):
    # PyTorch's own kernel is off by 6.5% here at C = 1e7.
    c = 10_000_000
    x = torch.rand(1, c, generator=torch.Generator().manual_seed(0)).requires_grad_()
    multi_margin_loss(x, torch.tensor([0]), p=p).backward()
    scores = x.detach()[0].numpy().astype(np.float64)
    z = scores - scores[0] + 1
    z[0] = 0
    assert float(x.grad[0, 0]) == pytest.approx(-np.sum(p * z ** (p - 1) * (z > 0)) / c, rel=1e-6)


def test_gradient_mode_is_respected(batch):
    scores, target, _ = batch
    with torch.no_grad():
        assert not multi_margin_loss(scores.requires_grad_(), target).requires_grad
    assert multi_margin_loss(scores, target).requires_grad
    expected, _ = reference(scores.detach().numpy(), target.numpy())
    assert multi_margin_loss(scores, target).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("to", ["to_sparse_coo", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_tensor_that_is_not_dense_is_named(to):
    x, y = torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"input must be a dense array, but is a tensor of layout"):
        multi_margin_loss(getattr(x, to)(), y)
    for name in ("target", "weight", "grad_output"):
        arguments = {"target": y, "weight": torch.ones(4), "grad_output": torch.ones(3)}
        arguments[name] = arguments[name].to_sparse_coo()
        with pytest.raises(TypeError, match=rf"{name} must be a dense array.*torch.sparse_coo"):
            multi_margin_loss_and_grad(x, reduction="none", **arguments)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_masked_tensors(batch, name):
    arguments = dict(zip(("input", "target", "weight"), batch, strict=False))
    plain = arguments.setdefault("weight", torch.ones(arguments["input"].shape[-1]))
    plain = arguments[name]
    arguments[name] = torch.masked.masked_tensor(plain, plain > 0)
    with pytest.raises(TypeError, match=f"{name} must be a dense array, but is a MaskedTensor"):
        multi_margin_loss(**arguments)
