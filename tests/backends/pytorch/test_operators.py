"""The operators: opcheck, compilers' graphs, export, transforms. The kernels run in all of them."""

import asyncio
import math
import threading

import pytest

from mml_arrayapi import (
    Kernel,
    explain,
    multi_margin_loss,
    multi_margin_loss_and_grad,
    register_kernel,
    unregister_kernel,
    use_backend,
)
from tests.backends.pytorch.conftest import (
    BACKWARD,
    FORWARD,
    compile_whole,
    graph_operators_ran,
)
from tests.tree import run_python

torch = pytest.importorskip("torch")
MultiMarginLoss = pytest.importorskip("mml_arrayapi.pytorch").MultiMarginLoss
pytestmark = pytest.mark.usefixtures("fresh_compiler", "kernels_ran")
func = torch.func
P = pytest.mark.parametrize("p", [1, 2, 1.5])
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
OWN_WARNINGS = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning",  # Dynamo's own
    "ignore:.*torch.jit:DeprecationWarning",
    "ignore:.*torch.jit:FutureWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",  # opcheck's, 2.14
)


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(20261125)
    scores = torch.randn(6, 5, generator=draw)
    return scores, torch.randint(5, (6,), generator=draw), torch.rand(5, generator=draw)


def generic(scores, target, **options):
    return multi_margin_loss_and_grad(scores, target, backend="generic", **options)


@OWN_WARNINGS
@pytest.mark.parametrize(
    ("p", "reduction", "ignore_index"),
    [(1.0, "mean", None), (1.0, "none", 3), (2.0, "sum", 3), (2.0, "none", None)],
)
def test_opcheck(batch, p, reduction, ignore_index):
    scores, target, weight = batch
    operators = torch.ops.mml_arrayapi
    options = (p, 0.5, reduction, ignore_index, 1, "nan")
    for x, w in (
        (scores, None),
        (scores.clone().requires_grad_(), weight),
        (scores.t().contiguous().t(), None),
    ):
        loss = operators.multi_margin_loss.default
        torch.library.opcheck(loss, (x, target, w, *options, p == 1))
        value, mask = loss(x, target, w, *options, p == 1)
        upstream = torch.ones_like(value).detach()
        mask = mask.detach() if p == 1 else None
        torch.library.opcheck(
            operators.multi_margin_loss_backward.default,
            (upstream, x.detach(), target, w, mask, *options),
        )
        torch.library.opcheck(
            operators.multi_margin_loss_and_grad.default,
            (x.detach(), target, w, None, *options),
        )


@OWN_WARNINGS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_opcheck_of_a_mask_that_is_written(dtype):
    # From 2**20 scores on. Its shape must be what the fake implementation says.
    x, target = torch.randn(1100, 1001).to(dtype), torch.arange(1100) % 1001
    options = (1.0, 1.0, "mean", None, 1, "nan")
    loss = torch.ops.mml_arrayapi.multi_margin_loss.default
    torch.library.opcheck(
        loss, (x, target, None, *options, True), test_utils=("test_schema", "test_faketensor")
    )
    _, mask = loss(x, target, None, *options, True)
    assert mask[-1] != 0
    from mml_arrayapi.backends.pytorch import cpu

    assert 0 < cpu.native.bits_size(x, options) < len(mask)
    compiled = torch.compile(multi_margin_loss, fullgraph=True)
    grads = []
    for function in (multi_margin_loss, compiled):
        leaf = x.clone().requires_grad_()
        function(leaf, target).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def compiled_graphs(function):
    """The function compiled by AOTAutograd alone, and the graphs that it comes to."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def backend(module, _):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    compiler = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    return torch.compile(function, fullgraph=True, backend=compiler), graphs


@OWN_WARNINGS
@P
def test_the_graphs_hold_the_operators(batch, p):
    scores, target, weight = batch
    step, graphs = compiled_graphs(lambda x, y, w: multi_margin_loss(x, y, p=p, weight=w))
    x = scores.clone().requires_grad_()
    step(x, target, weight).backward()
    x.grad = None
    with graph_operators_ran() as ran:
        loss = step(x, target, weight)
        loss.backward()
    assert ran == [FORWARD, BACKWARD]
    value, grad = generic(scores, target, p=p, weight=weight)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(x.grad, grad)
    forward, backward = graphs
    assert "mml_arrayapi.graph_multi_margin_loss.default" in forward
    assert "mml_arrayapi.graph_multi_margin_loss_backward.default" in backward


@pytest.mark.parametrize(("p", "reduction"), [(1, "mean"), (2, "none"), (1.5, "sum")])
def test_compiled(batch, kernels_ran, p, reduction):
    scores, target, weight = batch
    options = {"p": p, "weight": weight, "reduction": reduction, "ignore_index": 2}
    x = scores.clone().requires_grad_()
    step = compile_whole(multi_margin_loss)
    step(x, target, **options).sum().backward()
    x.grad = None
    with graph_operators_ran() as ran:
        loss = step(x, target, **options)
        loss.sum().backward()
    assert ran == [FORWARD, BACKWARD]
    value, grad = generic(scores, target, **options)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(x.grad, grad)
    both = compile_whole(multi_margin_loss_and_grad)(scores, target, **options)
    torch.testing.assert_close(both, (value, grad))
    assert kernels_ran == ["loss_and_grad"]


def test_compiled_by_inductor_with_a_mask_and_what_comes_before_and_after():
    x, target = torch.randn(1100, 1000), torch.arange(1100) % 1000
    scores = x.clone().requires_grad_()
    step = torch.compile(lambda x, y: multi_margin_loss(x * 2, y) * 3, fullgraph=True)
    step(scores, target).backward()
    scores.grad = None
    with graph_operators_ran() as ran:
        step(scores, target).backward()
    torch.testing.assert_close(scores.grad, generic(x * 2, target)[1] * 6)
    assert ran == [FORWARD, BACKWARD]


def test_compiled_with_changing_sizes_and_options(batch):
    scores, target, _ = batch
    step = compile_whole(multi_margin_loss)
    for n, margin, reduction in (
        (3, 1.0, "mean"),
        (4, 0.5, "sum"),
        (5, 0.25, "none"),
        (6, 0.125, "mean"),
    ):
        x = scores[:n].clone().requires_grad_()
        loss = step(x, target[:n], margin=margin, reduction=reduction)
        loss.sum().backward()
        value, grad = generic(scores[:n], target[:n], margin=margin, reduction=reduction)
        torch.testing.assert_close(loss.detach(), value)
        torch.testing.assert_close(x.grad, grad)
    with graph_operators_ran() as ran:
        step(x, target[:n], margin=margin, reduction=reduction)
    assert ran == [FORWARD]


@pytest.mark.parametrize("backend", [None, "generic", "torch-cpu"])
def test_compiled_with_a_kernel_asked_for(batch, backend):
    scores, target, _ = batch
    step = compile_whole(multi_margin_loss)
    torch.testing.assert_close(step(scores, target, backend=backend), generic(scores, target)[0])
    with graph_operators_ran() as ran:
        step(scores, target, backend=backend)
    assert ran == ([] if backend == "generic" else [FORWARD])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"p": True}, TypeError, "p must be a real number, but is True"),
        ({"margin": float("inf")}, ValueError, "margin must be a finite real number"),
        ({"reduction": "max"}, ValueError, "reduction must be one of"),
        ({"weight": torch.ones(4)}, ValueError, "weight must have one element per class"),
        (
            {"target": torch.zeros(5, dtype=torch.int64)},
            ValueError,
            "target must have input's shape",
        ),
        ({"check_target": "raise"}, ValueError, "check_target='raise' needs the values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_in_a_compiled_call(batch, changes, error, message):
    arguments = {"input": batch[0], "target": batch[1], **changes}
    with pytest.raises(error, match=message):
        torch.compile(multi_margin_loss, backend="eager")(**arguments)


@P
def test_compiled_transforms(batch, p):
    scores, target, _ = batch

    def loss(x, y):
        return multi_margin_loss(x, y, p=p)

    _, grad = generic(scores, target, p=p)
    compiled = compile_whole(func.grad(loss))(scores, target)
    torch.testing.assert_close(compiled, grad)
    compiled = compile_whole(func.vmap(loss))(scores, target)
    torch.testing.assert_close(compiled, generic(scores, target, p=p, reduction="none")[0])
    step = compile_whole(func.vmap(func.grad(loss)))
    torch.testing.assert_close(step(scores, target), grad * 6)
    with graph_operators_ran() as ran:
        step(scores, target)
    assert ran == [BACKWARD]


@P
@REDUCTIONS
def test_transforms(batch, kernels_ran, p, reduction):
    scores, target, weight = batch
    options = {"p": p, "weight": weight, "reduction": reduction}

    def loss(x, y=target):
        return multi_margin_loss(x, y, **options).sum()

    value, grad = generic(scores, target, **options)
    torch.testing.assert_close(func.grad_and_value(loss)(scores), (grad, value.sum()))
    assert kernels_ran == ["loss", "grad"]
    kernels_ran.clear()
    many, targets = (
        torch.stack([scores, -scores, scores * 2]),
        torch.stack([target, target, target.flip(0)]),
    )
    expected = [generic(x, y, **options) for x, y in zip(many, targets, strict=True)]
    values = func.vmap(lambda x, y: multi_margin_loss(x, y, **options))(many, targets)
    torch.testing.assert_close(values, torch.stack([value for value, _ in expected]))
    grads = torch.stack([grad for _, grad in expected])
    torch.testing.assert_close(func.vmap(func.grad(loss))(many, targets), grads)
    both = func.vmap(lambda x, y: multi_margin_loss_and_grad(x, y, **options))(many, targets)
    torch.testing.assert_close(both, (values, grads))
    of_all = func.grad(lambda x: func.vmap(loss)(x, targets).sum())(many)
    torch.testing.assert_close(of_all, grads)
    torch.testing.assert_close(
        func.vmap(loss, (0, None))(many, target)[2], generic(many[2], target, **options)[0].sum()
    )
    torch.testing.assert_close(
        func.vmap(loss, (None, 0))(scores, targets)[2],
        generic(scores, targets[2], **options)[0].sum(),
    )
    torch.testing.assert_close(
        func.vmap(loss, (2, 0))(many.permute(1, 2, 0), targets)[1], expected[1][0].sum()
    )
    assert set(kernels_ran) == {"loss", "grad"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mapped_calls_with_weighted_losses_beyond_the_dtype(dtype, reduction):
    large = torch.finfo(dtype).max / 2
    scores = torch.tensor([[0, large, 0], [large, 0, 0], [0, large / 8, 0], [0, 0, 0]], dtype=dtype)
    target, weight = torch.tensor([0, 1, 0, 2]), torch.tensor([6, -6, torch.nan], dtype=dtype)

    def loss(x, y=target):
        how = {"weight": weight, "reduction": reduction, "ignore_index": 2, "margin": 0.0}
        return multi_margin_loss(x, y, **how)

    many = torch.stack([scores, scores / 2])
    torch.testing.assert_close(func.vmap(loss)(many), torch.stack([loss(scores), loss(scores / 2)]))
    assert loss(scores).isfinite()
    bad = func.vmap(loss, (None, 0))(scores, torch.stack([target, target + 1]))
    assert bad.isnan().tolist() == [False, True]  # class 2 has a weight of NaN, 3 is none


@pytest.mark.parametrize("large", [1e39, 1e300])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mapped_calls_with_weights_beyond_float32(large, reduction):
    scores = torch.tensor([[0.0, 1e-5, 0.0], [5.0, 0.0, 0.0]])
    target, weight = torch.tensor([0, 0]), torch.tensor([large, 1, 1], dtype=torch.float64)

    def loss(x, y=target):
        return multi_margin_loss(x, y, weight=weight, reduction=reduction, margin=1e-10)

    assert loss(scores).isnan()  # infinity times a loss of 0
    assert func.vmap(loss)(torch.stack([scores, scores[:1].expand(2, 3)])).isnan().tolist() == [
        True,
        False,
    ]


@P
def test_transforms_of_transforms(batch, p):
    scores, target, weight = (t.double() if t.is_floating_point() else t for t in batch)

    def loss(x, w=weight):
        return multi_margin_loss(x, target, p=p, weight=w, margin=0.3)

    def same(x, w=weight):
        return multi_margin_loss(x, target, p=p, weight=w, margin=0.3, backend="generic")

    compare = torch.testing.assert_close
    compare(func.jacrev(loss)(scores), func.jacrev(same)(scores))
    compare(func.jacfwd(loss)(scores), func.jacfwd(same)(scores))
    compare(func.hessian(loss)(scores), func.hessian(same)(scores))
    compare(func.jacrev(func.jacrev(loss))(scores), func.hessian(same)(scores))
    third = func.grad(
        lambda x: func.grad(lambda y: func.grad(loss)(y).pow(2).sum())(x).pow(2).sum()
    )
    other = func.grad(
        lambda x: func.grad(lambda y: func.grad(same)(y).pow(2).sum())(x).pow(2).sum()
    )
    compare(third(scores), other(scores))
    compare(func.grad(loss, argnums=1)(scores, weight), func.grad(same, argnums=1)(scores, weight))
    mixed = func.jacrev(func.grad(loss), argnums=1)(scores, weight)
    compare(mixed, func.jacrev(func.grad(same), argnums=1)(scores, weight))
    weights = torch.stack([weight, weight * 2])
    compare(
        func.vmap(loss, (None, 0))(scores, weights), func.vmap(same, (None, 0))(scores, weights)
    )
    per_weight = func.vmap(func.grad(loss), (None, 0))(scores, weights)
    compare(per_weight, func.vmap(func.grad(same), (None, 0))(scores, weights))
    tangents = torch.ones_like(scores), torch.ones_like(weight)
    compare(func.jvp(loss, (scores, weight), tangents), func.jvp(same, (scores, weight), tangents))


@P
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.uint16, torch.uint64])
def test_mapped_labels_with_one_to_ignore(batch, p, dtype):
    scores, target, _ = batch
    targets = torch.stack([target, target]).to(dtype)
    options = {"p": p, "ignore_index": int(target[0])}
    values = func.vmap(lambda y: multi_margin_loss(scores, y, **options))(targets)
    torch.testing.assert_close(values[1], multi_margin_loss(scores, target, **options))


def test_mapped_half_precision_means_are_rounded_once():
    scores = torch.zeros(2, 4096, 3, dtype=torch.float16)
    target = torch.zeros(2, 4096, dtype=torch.int64)
    loss = func.vmap(lambda x, y: multi_margin_loss(x, y, reduction="sum", margin=10.0))(
        scores, target
    )
    assert loss.tolist() == [float(torch.tensor(4096 * 20 / 3).half())] * 2
    grads = func.vmap(func.grad(lambda x, y: multi_margin_loss(x, y)))(scores, target)
    torch.testing.assert_close(grads[0], generic(scores[0], target[0])[1])


@P
def test_make_fx(batch, kernels_ran, p):
    from torch.fx.experimental.proxy_tensor import make_fx

    scores, target, _ = batch

    def step(x, y):
        return torch.autograd.grad(multi_margin_loss(x, y, p=p), x)[0]

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(step, tracing_mode=mode)(scores.clone().requires_grad_(), target)
        assert "mml_arrayapi.multi_margin_loss.default" in graph.code
        assert "mml_arrayapi.multi_margin_loss_backward.default" in graph.code
        torch.testing.assert_close(graph(scores, target), generic(scores, target, p=p)[1])


@P
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_export_with_any_batch_size_then_train(batch, kernels_ran, p, strict):
    scores, target, weight = batch

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(5))
            self.register_buffer("weight", weight)

        def forward(self, x, y):
            return multi_margin_loss(x * self.scale, y, p=p, weight=self.weight)

    n = torch.export.Dim("n", max=100_000)
    program = torch.export.export(
        Model(), (scores, target), dynamic_shapes={"x": {0: n}, "y": {0: n}}, strict=strict
    )
    assert "mml_arrayapi.multi_margin_loss" in program.graph_module.code
    module = program.module()
    kernels_ran.clear()
    for rows in (6, 3):
        module.zero_grad()
        loss = module(scores[:rows], target[:rows])
        loss.backward()
        value, grad = generic(scores[:rows], target[:rows], p=p, weight=weight)
        torch.testing.assert_close(loss.detach(), value)
        torch.testing.assert_close(module.scale.grad, (grad * scores[:rows]).sum(0))
    assert kernels_ran == ["loss", "grad"] * 2


@pytest.mark.filterwarnings("ignore")
def test_export_keeps_the_operator_in_a_file(batch, tmp_path):
    scores, target, _ = batch

    class Model(torch.nn.Module):
        def forward(self, x, y):
            return multi_margin_loss(x, y)

    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(Model(), (scores, target)), path)
    loaded = torch.export.load(path).module()
    torch.testing.assert_close(loaded(scores, target), multi_margin_loss(scores, target))


@OWN_WARNINGS
@P
def test_compiled_autograd(batch, p):
    scores, target, _ = batch
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p)
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=True)
    ):
        loss.backward()
    torch.testing.assert_close(x.grad, generic(scores, target, p=p)[1])


def test_operators_called_by_themselves(batch):
    scores, target, weight = batch
    options = (2.0, 1.0, "mean", None, 1, "nan")
    x, w = scores.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, mask = torch.ops.mml_arrayapi.multi_margin_loss(x, target, w, *options, False)
    assert mask.numel() == 0
    loss.backward()
    y, v = scores.clone().requires_grad_(), weight.clone().requires_grad_()
    multi_margin_loss(y, target, weight=v, p=2, backend="generic").backward()
    torch.testing.assert_close((x.grad, w.grad), (y.grad, v.grad))
    with torch.inference_mode():
        frozen = torch.ones(2, 3)
        labels = torch.tensor([0, 1])
        loss, _ = torch.ops.mml_arrayapi.multi_margin_loss(frozen, labels, None, *options, False)
        torch.testing.assert_close(loss, multi_margin_loss(frozen, labels, p=2))


def test_what_explain_says_within_a_compiled_function(batch):
    scores, target, _ = batch
    assert explain(scores, target).kernel == "torch-cpu"


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("p", [1, 2])
def test_compiled_forward_mode_keeps_the_losses_part(batch, backend, p):
    scores, target, _ = batch
    tangent = torch.arange(30.0).reshape(6, 5).cos()

    def objective(x):
        return multi_margin_loss(x, target, p=p) + 0.01 * (x**3).sum()

    def derivative(x):
        return func.jvp(objective, (x,), (tangent,))[1]

    hessian = func.hessian(objective)
    for function in (derivative, hessian):
        compiled = torch.compile(function, backend=backend, fullgraph=True)
        torch.testing.assert_close(compiled(scores), function(scores))


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_forward_mode_twice(batch, p, reduction, backend):
    scores, target, weight = (t.double() if t.is_floating_point() else t for t in batch)

    def loss(x):
        options = {"p": p, "weight": weight, "reduction": reduction, "backend": backend}
        return multi_margin_loss(x, target, **options)

    twice = func.jacfwd(func.jacfwd(loss))(scores)
    torch.testing.assert_close(twice, func.jacrev(func.jacrev(loss))(scores))
    assert bool(twice.any()) == (p > 1)


@pytest.mark.parametrize(
    ("dtype", "ignore_index"),
    [
        ("uint8", -100),
        ("int8", 259),
        ("uint16", 65539),
        ("uint64", -1),
        ("uint32", 3),
        ("int32", 3),
    ],
    ids=str,
)
def test_vmap_ignores_what_the_targets_dtype_can_hold(dtype, ignore_index):
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 4, 200, generator=draw)
    target = torch.tensor([[156, 3, 4, 5], [1, 3, 156, 156]]) % (120 if dtype == "int8" else 200)
    target = target.to(getattr(torch, dtype))

    def loss(x, y):
        return multi_margin_loss(x, y, ignore_index=ignore_index)

    one_by_one = [loss(*pair) for pair in zip(scores, target, strict=True)]
    torch.testing.assert_close(func.vmap(loss)(scores, target), torch.stack(one_by_one))
    grads = [func.grad(loss)(*pair) for pair in zip(scores, target, strict=True)]
    torch.testing.assert_close(func.vmap(func.grad(loss))(scores, target), torch.stack(grads))


def test_a_mean_of_huge_losses_stays_finite_under_vmap():
    scores = torch.zeros(2, 4, 3, dtype=torch.float64)
    scores[..., 1] = 1.5e308
    mean = func.vmap(multi_margin_loss)(scores, torch.zeros(2, 4, dtype=torch.long))
    torch.testing.assert_close(mean, torch.full((2,), 5e307, dtype=torch.float64))


@pytest.mark.parametrize("backend", [None, "generic"])
def test_second_derivatives_of_infinite_and_nan_rows(backend):
    infinity, nan = float("inf"), float("nan")
    scores = torch.tensor([[0, infinity, 1], [0, nan, 1], [0, 2, 1.5]], dtype=torch.float64)
    scores.requires_grad_()
    target = torch.tensor([1, 0, 1])
    loss = multi_margin_loss(scores, target, p=2, reduction="sum", backend=backend)
    (grad,) = torch.autograd.grad(loss, scores, create_graph=True)
    (second,) = torch.autograd.grad(grad[:, 0].sum(), scores)
    wanted = torch.tensor([[0, 0, 0], [nan, nan, nan], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(second, wanted, equal_nan=True)


class Holder(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        make = {
            "parameter": torch.nn.Parameter,
            "frozen": lambda x: torch.nn.Parameter(x, requires_grad=False),
            "buffer": torch.nn.Buffer,
        }[kind]
        self.scores, self.weight = make(torch.randn(4, 5)), make(torch.rand(5))

    def forward(self, x, target):
        both = multi_margin_loss(x, target, weight=self.weight)
        return both + multi_margin_loss(self.scores, target)


@OWN_WARNINGS
@pytest.mark.parametrize("kind", ["parameter", "frozen", "buffer"])
def test_parameters_and_buffers_as_arguments(kind):
    model, arguments = Holder(kind), (torch.randn(4, 5), torch.tensor([0, 1, 2, 4]))
    expected = model(*arguments)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), expected)
    exported = torch.export.export(model, arguments, strict=True).module()
    torch.testing.assert_close(exported(*arguments), expected)


@pytest.mark.parametrize("index", [-(2**63) - 1, -(2**63), 2**63, 2**64 - 1, 10**30])
def test_an_ignore_index_that_no_operator_takes(index):
    x, y = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 2])
    wanted = multi_margin_loss(x, y, p=2, backend="generic")
    kernel = explain(x, y, p=2, ignore_index=index).kernel
    assert kernel == ("torch-cpu" if index == -(2**63) else "generic")
    for _ in range(2):
        loss = multi_margin_loss(x, y, p=2, ignore_index=index)
        torch.testing.assert_close(loss, wanted)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        grad.sum().backward()
    compiled = torch.compile(
        lambda x: multi_margin_loss(x, y, p=2, ignore_index=index), backend="eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(x), wanted)


def test_the_smallest_integer_is_ignored_by_the_same_kernel_each_time():
    lowest = torch.iinfo(torch.int64).min
    x, y = torch.randn(301, 77), torch.randint(0, 77, (301,))
    y[5] = lowest
    first, *others = (
        multi_margin_loss(x, y, p=1.5, ignore_index=lowest, reduction="none") for _ in range(3)
    )
    assert first[5] == 0
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_storage_that_was_freed(name):
    given = {"input": torch.randn(3, 3), "target": torch.tensor([0, 1, 2]), "weight": torch.ones(3)}
    given[name].untyped_storage().resize_(0)
    message = f"{name} must be a dense array, but is a tensor whose storage was freed or shrunk"
    for function in (multi_margin_loss, multi_margin_loss_and_grad, explain):
        with pytest.raises(TypeError, match=message):
            function(**given)


@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize(("reduction", "wanted"), [("sum", 0.0), ("mean", math.nan), ("none", [])])
def test_views_of_empty_batches(backend, reduction, wanted):
    """They may begin behind their storage, which has no bytes."""
    options = {"reduction": reduction, "backend": backend}
    whole, target = torch.randn(0, 8), torch.zeros(0, 3, dtype=torch.long)[:, 1]
    for scores in (whole[:, 1:], whole.chunk(2, 1)[1], whole.requires_grad_()[:, 3:]):
        for function in (multi_margin_loss, lambda *a, **k: multi_margin_loss_and_grad(*a, **k)[0]):
            loss = function(scores, target, **options)
            torch.testing.assert_close(
                loss, torch.tensor(wanted), equal_nan=True, check_dtype=False
            )
    multi_margin_loss(scores, target, **options).sum().backward()
    assert whole.grad.shape == (0, 8)
    grad = func.grad(lambda x: multi_margin_loss(x[:, 1:], target, **options).sum())(whole.detach())
    assert grad.shape == (0, 8)
    several = torch.randn(3, 0, 5)[..., 1:]
    assert multi_margin_loss(several, torch.zeros(3, 0, dtype=torch.long), reduction="sum") == 0


@OWN_WARNINGS
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_exported_with_any_number_of_classes(batch, strict, backend):
    class Model(torch.nn.Module):
        def forward(self, x, y, w):
            return multi_margin_loss(x, y, weight=w, backend=backend)

    n, c = torch.export.Dim("n"), torch.export.Dim("c")
    shapes = {"x": {0: n, 1: c}, "y": {0: n}, "w": {0: c}}
    scores, target, weight = batch
    program = torch.export.export(
        Model(), (scores, target, weight), strict=strict, dynamic_shapes=shapes
    )
    scores, weight = torch.randn(9, 11), torch.rand(11)
    target = torch.randint(0, 11, (9,))
    wanted = multi_margin_loss(scores, target, weight=weight)
    torch.testing.assert_close(program.module()(scores, target, weight), wanted)


@P
@pytest.mark.parametrize("ignore_index", [None, 1])
@REDUCTIONS
def test_mapped_operators_count_axes_from_the_end(p, ignore_index, reduction):
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(5, 5, 5, generator=draw)  # of other shapes a wrong axis is an error
    target = torch.randint(5, (5,), generator=draw)
    operator = torch.ops.mml_arrayapi.multi_margin_loss.default

    def loss(x):
        options = (float(p), 1.0, reduction, ignore_index, -1, "nan")
        return operator(x, target, None, *options, False)[0]

    def gradient(x):
        return func.grad(lambda x: loss(x).sum())(x)

    for function in (loss, gradient):
        wanted = torch.stack([function(x) for x in scores])
        torch.testing.assert_close(func.vmap(function)(scores), wanted)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 1}, {"reduction": "none"}], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_an_axis_of_no_calls_is_mapped(options, weighted):
    scores, target = torch.zeros(0, 3, 5), torch.zeros(0, 3, dtype=torch.int64)
    weight = torch.ones(0, 5) if weighted else None

    def loss(x, y, w):
        return multi_margin_loss(x, y, weight=w, **options)

    dims = (0, 0, 0 if weighted else None)
    losses = func.vmap(loss, dims)(scores, target, weight)
    assert losses.shape == ((0, 3) if options.get("reduction") == "none" else (0,))
    gradient = func.grad(lambda *arrays: loss(*arrays).sum())
    assert func.vmap(gradient, dims)(scores, target, weight).shape == (0, 3, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["program", "package"])
def test_what_was_exported_is_loaded_in_another_process(batch, tmp_path, kind):
    scores, target, _ = batch
    path = tmp_path / "loss.pt2"
    program = torch.export.export(MultiMarginLoss(), (scores, target))
    if kind == "program":
        torch.export.save(program, path)
    else:
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # what calls the operator
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=quick
        )
    torch.save((scores, target), tmp_path / "tensors.pt")
    load = {"program": "export.load(path).module()", "package": "_inductor.aoti_load_package(path)"}
    code = f"""
import torch, mml_arrayapi.pytorch
path = {str(path)!r}
tensors = torch.load({str(tmp_path / "tensors.pt")!r})
print(float(torch.{load[kind]}(*tensors)))
"""
    wanted = float(multi_margin_loss(scores, target))
    assert float(run_python(code).splitlines()[-1]) == pytest.approx(wanted, rel=1e-6)


class Trainable(torch.nn.Module):
    """A layer, the loss with weights that are learned, and something else."""

    def __init__(self, backend=None):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.weight = torch.nn.Linear(5, 5), torch.nn.Parameter(torch.ones(5))
        self.backend = backend

    def forward(self, x, y):
        scores = self.layer(x)
        loss = multi_margin_loss(scores, y, p=2, weight=self.weight, backend=self.backend)
        return loss + 0.01 * scores.square().mean()


@OWN_WARNINGS
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_exported_models_train(batch, strict, backend):
    scores, target, _ = batch
    model = Trainable(backend)
    exported = torch.export.export(Trainable(backend), (scores, target), strict=strict).module()
    for one in (model, exported):
        one(scores, target).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(exported.get_parameter(name).grad, parameter.grad)


@OWN_WARNINGS
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("backend", [None, "generic"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_export_with_any_number_of_classes(batch, strict, backend, reduction):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return multi_margin_loss(x, y, reduction=reduction, backend=backend)

    n, c = torch.export.Dim("n", min=1, max=1000), torch.export.Dim("c", min=1, max=1000)
    sizes = {0: n, 1: c}, {0: n}
    exported = torch.export.export(Model(), batch[:2], dynamic_shapes=sizes, strict=strict).module()
    x, y = torch.randn(7, 200), torch.randint(200, (7,))
    torch.testing.assert_close(exported(x, y), multi_margin_loss(x, y, reduction=reduction))


@OWN_WARNINGS
@pytest.mark.parametrize("strict", [False, True], ids=["not strict", "strict"])
@pytest.mark.parametrize("backend", [None, "generic"])
def test_export_with_an_ignore_index_made_of_sizes(strict, backend):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return multi_margin_loss(x, y, ignore_index=x.shape[1] - 1, backend=backend)

    sizes = {0: torch.export.Dim("n"), 1: torch.export.Dim("c", min=2, max=1000)}
    example = torch.randn(10, 7), torch.arange(10) % 7
    exported = torch.export.export(
        Model(), example, dynamic_shapes=(sizes, {0: sizes[0]}), strict=strict
    ).module()
    x, y = torch.randn(13, 9), torch.arange(13) % 9
    torch.testing.assert_close(exported(x, y), multi_margin_loss(x, y, ignore_index=8))


@OWN_WARNINGS
@pytest.mark.parametrize("name", ["p", "margin"])
def test_exported_parameters_made_of_sizes_hold_for_one_value(name):
    class Model(torch.nn.Module):
        def forward(self, x, y):
            return multi_margin_loss(x, y, **{name: x.shape[0] // 5})

    example = torch.randn(10, 7), torch.arange(10) % 7
    dynamic = {0: torch.export.Dim.AUTO}
    exported = torch.export.export(Model(), example, dynamic_shapes=(dynamic, dynamic)).module()
    x, y = torch.randn(13, 7), torch.arange(13) % 7
    torch.testing.assert_close(exported(x, y), multi_margin_loss(x, y, **{name: 2}))
    with pytest.raises(AssertionError, match="Guard failed"):
        exported(torch.randn(15, 7), torch.arange(15) % 7)


@pytest.mark.parametrize("name", ["uint1", "uint4", "uint7", "int2", "int4", "int7"])
def test_targets_of_less_than_8_bits_are_refused_by_every_call(name):
    if not hasattr(torch, name):
        pytest.skip(f"PyTorch has no {name} yet")
    x = torch.randn(3, 5, requires_grad=True)
    packed = torch.tensor([0, 1, 0], dtype=torch.uint8).view(getattr(torch, name))
    multi_margin_loss(x, torch.tensor([0, 1, 0]))
    for options in ({}, {"ignore_index": 0}, {"check_target": "nan"}, {"backend": "generic"}):
        for _ in range(2):
            with pytest.raises(TypeError, match=f"target must have an integer dtype.*{name}"):
                multi_margin_loss(x, packed, **options)


@OWN_WARNINGS
def test_compiled_with_a_number_of_classes_that_depends_on_data(batch):
    scores, target, _ = batch

    def loss(x, y, keep):
        return multi_margin_loss(x[:, keep.nonzero()[:, 0]], y)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled, y = compile_whole(loss), target % 2
        for count in (2, scores.shape[1]):
            keep = torch.arange(scores.shape[1]) < count
            x, z = (scores.clone().requires_grad_() for _ in range(2))
            made, wanted = compiled(x, y, keep), loss(z, y, keep)
            torch.testing.assert_close(made, wanted)
            made.backward()
            wanted.backward()
            torch.testing.assert_close(x.grad, z.grad)
        with pytest.raises((RuntimeError, ValueError), match=r"as told above|at least one class"):
            compiled(scores, y, torch.zeros(scores.shape[1], dtype=torch.bool))


@OWN_WARNINGS
def test_compiled_without_classes(batch):
    with pytest.raises(RuntimeError, match="input must have at least one class"):
        compile_whole(multi_margin_loss)(batch[0][:, :0], batch[1])


@OWN_WARNINGS
@pytest.mark.parametrize("weighted", [False, True], ids=["kernel", "generic"])
def test_compiled_with_a_batch_whose_size_depends_on_data(batch, weighted):
    scores, target, weight = batch
    weight = weight.requires_grad_() if weighted else None

    def loss(x, y, keep):
        return multi_margin_loss(x[keep], y[keep], weight=weight)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = compile_whole(loss)
        for keep in (torch.arange(6) % 2 == 0, torch.arange(6) > 0, torch.arange(6) > 9):
            x, z = (scores.clone().requires_grad_() for _ in range(2))
            made, wanted = compiled(x, target, keep), loss(z, target, keep)
            torch.testing.assert_close(made, wanted, equal_nan=True)
            made.backward()
            wanted.backward()
            torch.testing.assert_close(x.grad, z.grad, equal_nan=True)


def test_compiled_calls_see_the_block_of_their_own_context(batch):
    scores, target, _ = batch
    compiled = compile_whole(multi_margin_loss)
    plain = multi_margin_loss(scores, target)
    ours = torch.tensor(-1.0)
    kernel = Kernel(
        "mine", "torch", lambda _: None, lambda _: ours.clone(), lambda *_: (ours, ours)
    )
    entered, leave, seen = threading.Event(), threading.Event(), []

    def other():
        with use_backend("mine"):
            seen.append(compiled(scores, target))
            entered.set()
            leave.wait(60)
            seen.append(compiled(scores, target))

    def suspended():
        with use_backend("mine"):
            yield compiled(scores, target)
            yield compiled(scores, target)

    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return compiled(scores, target)

    async def tasks():
        return await asyncio.gather(task("mine"), task("torch-cpu"), task("mine"))

    register_kernel(kernel)
    try:
        thread = threading.Thread(target=other)
        thread.start()
        assert entered.wait(120)
        assert compiled(scores, target) == plain
        leave.set()
        thread.join()
        assert seen == [ours, ours]
        generator = suspended()
        assert next(generator) == ours
        assert compiled(scores, target) == plain
        assert next(generator) == ours
        generator.close()
        assert asyncio.run(tasks()) == [ours, plain, ours]
        assert compiled(scores, target) == plain
    finally:
        unregister_kernel("mine")


@pytest.mark.parametrize("shape", [(4000, 1000), (2**16, 64)], ids=str)
def test_half_precision_second_derivatives_add_no_rounded_numbers(shape):
    x = torch.zeros(shape, dtype=torch.float16, requires_grad=True)
    tangent = torch.ones_like(x)
    tangent[:, 0] = 0
    upstream = torch.ones((), dtype=torch.float16, requires_grad=True)
    loss = multi_margin_loss(x, torch.zeros(len(x), dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
    (second,) = torch.autograd.grad(grad, upstream, tangent)
    assert second.item() == pytest.approx(1 - 1 / shape[1], rel=1e-3)


@OWN_WARNINGS
@pytest.mark.parametrize("shape", [(8, 5), (1100, 1001)], ids=["few", "many"])
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("watched", ["forward", "backward", "both"])
def test_checkpoints_under_a_mode_of_one_pass(shape, p, watched):
    """What is saved is the same with and without a mode: else checkpoint() raises."""
    from contextlib import nullcontext

    from torch.utils.checkpoint import checkpoint
    from torch.utils.flop_counter import FlopCounterMode

    def mode(which):
        return FlopCounterMode(display=False) if watched in (which, "both") else nullcontext()

    scores, target = torch.randn(shape), torch.arange(shape[0]) % shape[1]
    leaf, plain = (scores.clone().requires_grad_() for _ in range(2))
    multi_margin_loss(plain * 2, target, p=p).sin().backward()
    with mode("forward"):
        loss = checkpoint(
            lambda x: multi_margin_loss(x * 2, target, p=p).sin(), leaf, use_reentrant=False
        )
    with mode("backward"):
        loss.backward()
    torch.testing.assert_close(leaf.grad, plain.grad)


@OWN_WARNINGS
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("shape", "at", "options"),
    [
        ((6, 5), 1, {}),
        ((6, 5), 1, {"target": torch.int32}),
        ((6, 5), 1, {"p": 1000}),
        ((2, 6, 5), 2, {}),
        ((5, 6), 0, {"axis": 0}),
        ((2, 5, 6), 1, {"axis": 1}),
        ((6, 5), 1, {"call": multi_margin_loss_and_grad}),
    ],
)
def test_export_with_any_number_of_classes_of_any_call(strict, shape, at, options):
    options = {"call": multi_margin_loss, "target": torch.int64, **options}
    call, kind = options.pop("call"), options.pop("target")

    class Module(torch.nn.Module):
        def forward(self, x, y):
            return call(x, y, **options)

    target = torch.zeros([n for i, n in enumerate(shape) if i != at], dtype=kind)
    classes = torch.export.Dim("classes")
    exported = torch.export.export(
        Module(), (torch.randn(shape), target), dynamic_shapes=({at: classes}, None), strict=strict
    )
    assert "mml_arrayapi.multi_margin_loss" in exported.graph_module.code
    more = torch.randn([9 if i == at else n for i, n in enumerate(shape)])
    torch.testing.assert_close(exported.module()(more, target), Module()(more, target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_second_derivatives_of_p_1_are_zeros(batch, reduction, weighted):
    scores, target, weight = batch
    scores.requires_grad_()
    loss = multi_margin_loss(
        scores, target, weight=weight if weighted else None, reduction=reduction
    )
    (grad,) = torch.autograd.grad(loss.sum(), scores, create_graph=True)
    (second,) = torch.autograd.grad((grad * torch.randn_like(grad)).sum(), scores)
    assert torch.equal(second, torch.zeros_like(scores))

    def of_scores(x):
        return multi_margin_loss(x, target)

    torch.autograd.functional.hvp(of_scores, scores, torch.ones_like(scores), strict=True)


def test_a_mask_that_another_build_wrote_is_not_read(monkeypatch):
    """Its bits lie elsewhere; it may come from another machine."""
    from mml_arrayapi.backends.pytorch import cpu

    scores, target = torch.randn(1100, 1001), torch.arange(1100) % 1001
    options = (1.0, 1.0, "mean", None, 1, "nan")
    operators = torch.ops.mml_arrayapi
    _, mask = operators.multi_margin_loss(scores, target, None, *options, True)
    assert cpu._written(mask, scores, options) is not None
    wanted = operators.multi_margin_loss_backward(
        torch.ones(()), scores, target, None, None, *options
    )
    mask[-1] = 3 - mask[-1]
    mask[:-1].random_(0, 255)
    assert cpu._written(mask, scores, options) is None
    got = operators.multi_margin_loss_backward(torch.ones(()), scores, target, None, mask, *options)
    assert torch.equal(got, wanted)
