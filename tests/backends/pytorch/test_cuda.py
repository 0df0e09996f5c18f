"""PyTorch's side of the GPU kernels on CPU tensors: the emulator stands in for the device."""

import contextlib
import subprocess
import sys

import pytest

from mml_arrayapi import (
    InvalidTargetError,
    explain,
    multi_margin_loss,
    multi_margin_loss_and_grad,
    registry,
    use_backend,
    validation,
)

torch = pytest.importorskip("torch")
torch_cuda = pytest.importorskip(
    "mml_arrayapi.backends.torch_cuda", reason="PyTorch's GPU kernels need cuda-bindings"
)
NAME = torch_cuda.KERNEL.name
TYPES = {
    torch.float32: (1, 2, 1.5),
    torch.float16: (1, 2),
    torch.bfloat16: (2, 3),
    torch.float64: (3,),
}


@pytest.fixture(scope="module")
def operators_on_cpu():
    library = torch.library.Library("mml_arrayapi", "IMPL")
    for name, (_, implementation, _) in torch_cuda.OPERATORS.items():
        library.impl(name, implementation, "CPU")
    yield
    library._destroy()


@pytest.fixture
def launched(monkeypatch, builds, operators_on_cpu):
    """Let the emulator carry out what is launched, and keep the names of the kernels."""
    from tests.backends.cuda import emulator

    names, machines = [], {}

    def launch(plan, addresses, index):
        variant = plan.scalar, plan.power
        if variant not in machines:
            machines[variant] = emulator.Machine(builds(variant))
        names.extend(step.name for step in plan.launches)
        machines[variant].launch(plan, addresses)

    monkeypatch.setattr(torch_cuda, "DEVICE", "cpu")
    monkeypatch.setattr(torch_cuda, "_on_device", launch)
    monkeypatch.setattr(torch_cuda, "_properties", lambda index: (2, "sm_90"))
    return names


@pytest.fixture
def batch(rng):
    return (
        torch.tensor(rng.normal(size=(9, 40)).astype("float32")),
        torch.tensor(rng.integers(0, 40, 9)),
        torch.tensor(rng.normal(size=40).astype("float32")),
    )


CASES = [(dtype, p) for dtype, powers in TYPES.items() for p in powers]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("dtype", "p"), CASES, ids=lambda v: str(v).removeprefix("torch."))
def test_value_and_backward_equal_the_generic_ones(launched, batch, rng, dtype, p, reduction):
    scores, target, weight = batch
    options = {"p": p, "weight": weight, "reduction": reduction, "margin": 0.75}
    x = scores.to(dtype).requires_grad_()
    y = x.detach().clone().requires_grad_()
    loss = multi_margin_loss(x, target, backend=NAME, **options)
    expected = multi_margin_loss(y, target, backend="generic", **options)
    torch.testing.assert_close(loss, expected)
    upstream = torch.tensor(rng.normal(size=tuple(loss.shape))).to(dtype)
    loss.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(x.grad, y.grad)
    kernels = {name.partition("_")[2] for name in launched} - {""}
    assert kernels == ({"loss_mask", "grad_mask"} if p == 1 else {"loss", "loss_grad"})

    launched.clear()
    value, grad = multi_margin_loss_and_grad(
        x.detach(), target, backend=NAME, grad_output=upstream, **options
    )
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(grad, y.grad)
    assert {name.partition("_")[2] for name in launched} - {""} == {"loss_grad"}


def test_nothing_is_kept_for_backward_where_no_gradient_is_wanted(launched, batch):
    scores, target, _ = batch
    multi_margin_loss(scores, target, backend=NAME)
    with torch.no_grad():
        multi_margin_loss(scores.requires_grad_(), target, backend=NAME)
    assert launched == ["rows_loss", "rows_loss"]


@pytest.mark.parametrize(
    "spell",
    [
        lambda x: x[:, ::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[:, 1:37],
        lambda x: x[::2],
        lambda x: x[:1].expand(5, 40),
        lambda x: x.reshape(3, 3, 40),
        lambda x: x.reshape(3, 3, 40).transpose(0, 1),
        lambda x: x[0],
        lambda x: x[:, :1],
        lambda x: x[:0],
        lambda x: torch.nn.Parameter(x),
    ],
)
@pytest.mark.parametrize("p", [1, 2])
def test_layouts(launched, batch, rng, spell, p):
    x = spell(batch[0]).detach().requires_grad_()
    y = x.detach().clone().requires_grad_()
    classes = x.shape[-1]
    target = torch.tensor(rng.integers(0, classes, x.shape[:-1]).astype("int32"))
    for backend, scores in ((NAME, x), ("generic", y)):
        loss = multi_margin_loss(scores, target, p=p, reduction="none", backend=backend)
        (loss * torch.arange(loss.numel()).reshape(loss.shape)).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_an_upstream_gradient_that_is_one_number_expanded(launched, batch):
    scores, target, _ = batch
    x = scores.requires_grad_()
    multi_margin_loss(x, target, reduction="none", backend=NAME).sum().backward()
    _, expected = multi_margin_loss_and_grad(
        scores.detach(), target, reduction="sum", backend="generic"
    )
    torch.testing.assert_close(x.grad, expected)


def test_half_precision_scale_is_formed_in_single_precision(launched):
    # In half precision 1 / 2**26 is 0: no loss scale brings it back.
    x = torch.zeros(4, 40, dtype=torch.float16)
    scale = torch.tensor(2.0**20)
    _, grad = multi_margin_loss_and_grad(
        x, torch.zeros(4, dtype=torch.int64), reduction="none", grad_output=scale.expand(4) / 2**26,
        backend=NAME,
    )  # fmt: skip
    assert grad[0, 1].item() == pytest.approx(2.0**-6 / 40, rel=1e-3)


def test_derivatives_of_the_second_order(launched, batch):
    x, target = batch[0][:3, :6].double().requires_grad_(), torch.tensor([0, 5, 2])

    def loss(scores):
        return multi_margin_loss(scores, target, p=3, backend=NAME)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)
    assert "tiles_loss_grad" in launched


def test_transforms_are_left_to_the_generic_implementation(launched, batch):
    scores, target, weight = batch
    torch_func = torch.func

    def refusal(x):
        seen.append(dict(explain(x, target).considered)[NAME])
        return x.sum()

    seen = []
    torch_func.grad(refusal)(scores)
    torch_func.jvp(refusal, (scores,), (scores,))
    with torch.autograd.forward_ad.dual_level():
        refusal(torch.autograd.forward_ad.make_dual(scores, scores))
    assert all("is active, which the generic implementation follows" in reason for reason in seen)
    assert len(seen) == 3
    weighted = explain(scores, target, weight=weight.requires_grad_())
    assert "weight requires a gradient" in dict(weighted.considered)[NAME]
    assert launched == []


@pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning"
)  # Dynamo's own
@pytest.mark.parametrize("p", [1, 2])
def test_compiled_whole_with_the_kernels_in_the_graph(launched, batch, p):
    scores, target, weight = batch
    graphs = []

    def backend(module, _):
        graphs.append(module.code)
        return make_boxed_func(module.forward)

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def step(x, y, w):
        return multi_margin_loss(x, y, p=p, weight=w, backend=NAME)

    x = scores.clone().requires_grad_()
    compiler = aot_autograd(fw_compiler=backend, bw_compiler=backend)
    loss = torch.compile(step, fullgraph=True, backend=compiler)(x, target, weight)
    loss.backward()
    expected, expected_grad = multi_margin_loss_and_grad(
        scores, target, p=p, weight=weight, backend="generic"
    )
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(x.grad, expected_grad)
    forward, backward = graphs
    assert ("mml_arrayapi.loss_mask" if p == 1 else "mml_arrayapi.loss.") in forward
    assert ("mml_arrayapi.grad_mask" if p == 1 else "mml_arrayapi.grad.") in backward
    torch.compiler.reset()


@pytest.mark.parametrize("classes", [7, 41])
def test_operators_keep_their_promises(launched, rng, classes):
    scores = torch.tensor(rng.normal(size=(6, classes)).astype("float32"))
    target = torch.tensor(rng.integers(0, classes, 6))
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.mml_arrayapi
    for reduction in ("none", "mean"):
        options = (1.0, 1.0, reduction)
        torch.library.opcheck(
            operators.loss.default, (scores, target, None, *options, False), test_utils=checks
        )
        arguments = (scores, target, scores[0], *options, False)
        torch.library.opcheck(operators.loss_mask.default, arguments, test_utils=checks)
        loss, mask, counts = operators.loss_mask(*arguments)
        torch.library.opcheck(
            operators.grad_mask.default,
            (loss, target, None, mask, counts, [6, classes], reduction),
            test_utils=checks,
        )
        torch.library.opcheck(
            operators.grad.default, (loss, scores, target, None, *options), test_utils=checks
        )
        torch.library.opcheck(
            operators.loss_grad.default,
            (scores, target, None, None, *options, False),
            test_utils=checks,
        )


def test_targets_out_of_range(launched, batch):
    scores, target, _ = batch
    target = target.clone()
    target[4] = 2**32
    for p in (1, 2):
        x = scores.clone().requires_grad_()
        loss = multi_margin_loss(x, target, p=p, reduction="none", check_target="nan", backend=NAME)
        loss.sum().backward()
        assert loss.isnan().nonzero().tolist() == [[4]]
        assert x.grad.isnan().all(dim=1).nonzero().tolist() == [[4]]
        with pytest.raises(
            InvalidTargetError, match=r"target\[4\] is 4294967296, but input has 40 classes"
        ):
            multi_margin_loss(x, target, p=p, check_target="raise", backend=NAME)
    with pytest.raises(InvalidTargetError, match=r"target\[1, 1\]"):
        multi_margin_loss_and_grad(
            scores.reshape(3, 3, 40), target.reshape(3, 3), check_target="raise", backend=NAME
        )


def test_a_flag_is_made_only_to_raise(launched, batch, monkeypatch):
    made = []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: made.append(a) or full(*a, **k))
    scores, target, _ = batch
    multi_margin_loss(scores, target, check_target="nan", backend=NAME)
    assert made == []
    multi_margin_loss(scores, target, check_target="raise", backend=NAME)
    assert len(made) == 1


def test_refuses_other_devices_and_kinds_of_tensors(launched, batch, monkeypatch):
    scores, target, _ = batch
    x = torch.zeros(2, 3, device="meta")
    y = torch.zeros(2, device="meta", dtype=torch.int64)
    assert dict(explain(x, y).considered)[NAME] == "input is on meta, not on a CUDA device"
    negated = torch.zeros(2, 3, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    reason = dict(explain(negated, target[:2] % 3).considered)[NAME]
    assert reason == "input is no plain strided tensor"

    class Mine(torch.Tensor):
        pass

    reason = dict(explain(scores.as_subclass(Mine), target).considered)[NAME]
    assert reason == "input is a Mine, a subclass of torch.Tensor"
    monkeypatch.setattr(torch_cuda, "DEVICE", "cuda")
    assert dict(explain(scores, target).considered)[NAME] == "input is on cpu, not on a CUDA device"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    monkeypatch.setattr(torch_cuda, "DEVICE", "cpu")
    assert "built for ROCm" in dict(explain(scores, target).considered)[NAME]


def test_the_tensors_device_and_its_current_stream_are_used(monkeypatch):
    # Launched on: what device was current, what stream was asked for.
    seen, current = [], [0]

    @contextlib.contextmanager
    def device(index):
        current[0] = index
        yield
        current[0] = 0

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch_cuda, "_properties", lambda index: (2, f"sm_9{index}"))
    monkeypatch.setattr(
        torch._C, "_cuda_getCurrentRawStream", lambda index: 1000 + index, raising=False
    )
    monkeypatch.setattr(
        torch_cuda.cuda_driver,
        "launch",
        lambda plan, addresses, index, stream, architecture: seen.append(
            (current[0], index, stream, architecture(index), plan, addresses)
        ),
    )
    for index in (0, 1):
        torch_cuda._on_device("plan", "addresses", index)
    assert seen == [
        (0, 0, 1000, "sm_90", "plan", "addresses"),
        (1, 1, 1001, "sm_91", "plan", "addresses"),
    ]
    assert current == [0]


def test_the_first_call_of_a_process_may_be_compiled():
    program = (
        "import torch\n"
        "from mml_arrayapi import multi_margin_loss as loss\n"
        "step = torch.compile(loss, fullgraph=True, backend='eager')\n"
        "assert step(torch.zeros(3, 4), torch.tensor([0, 1, 2])).item() == 0.75\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def known(monkeypatch):
    """Shortcuts, as in a process that begins."""
    monkeypatch.setattr(torch_cuda, "_known", {})
    monkeypatch.setattr(registry, "_shortcuts", {})
    return torch_cuda._known


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "p"), CASES, ids=lambda v: str(v).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "classes"), [(9, 40), (70, 300), (5, 7), (3, 4097)])
def test_a_call_that_comes_again(launched, known, rng, rows, classes, dtype, p, reduction):
    options = {"p": p, "reduction": reduction, "margin": 0.75, "check_target": "nan"}
    seen = []
    for _ in range(2):
        x = torch.tensor(rng.normal(size=(rows, classes))).to(dtype).requires_grad_()
        y = x.detach().clone().requires_grad_()
        target = torch.tensor(rng.integers(0, classes, rows))
        call = multi_margin_loss if not seen else shortcut_only
        with torch.no_grad():
            value = call(x, target, backend=NAME, **options)
        loss = call(x, target, backend=NAME, **options)
        expected = multi_margin_loss(y, target, backend="generic", **options)
        torch.testing.assert_close(value, expected.detach())
        torch.testing.assert_close(loss, expected)
        (loss * 3).backward()
        (expected * 3).backward()
        torch.testing.assert_close(x.grad, y.grad)
        seen.append(launched.copy())
        launched.clear()
    assert len(known) == 1
    assert seen[0] == seen[1]


def shortcut_only(x, target, *, backend, p, reduction, margin, check_target):
    loss = torch_cuda.shortcut(x, target, p, margin, None, reduction, -1, check_target)
    assert loss is not None
    return loss


def test_the_shortcut_serves_what_was_chosen_unasked(launched, known, batch, monkeypatch):
    scores, target, _ = batch
    kernels = tuple(k for k in registry._kernels_of("torch") if k.name in (NAME, "generic"))
    monkeypatch.setitem(registry._loaded, "torch", kernels)
    taken = []
    monkeypatch.setattr(validation, "check", spy(validation.check, taken))
    for _ in range(3):
        multi_margin_loss(scores, target, check_target="nan")
    assert len(taken) == 1
    assert launched == ["rows_loss"] * 3
    with use_backend("generic"):
        multi_margin_loss(scores, target, check_target="nan")
    assert len(taken) == 2
    assert launched == ["rows_loss"] * 3


def spy(function, calls):
    def spied(*args, **kwargs):
        calls.append(args)
        return function(*args, **kwargs)

    return spied


def test_the_shortcut_leaves_what_is_not_plainly_right(launched, known, batch):
    scores, target, weight = batch
    plain = {
        "p": 1, "margin": 1.0, "weight": None, "reduction": "mean", "axis": -1,
        "check_target": "nan",
    }  # fmt: skip

    def taken(x=scores, y=target, **changes):
        return torch_cuda.shortcut(x, y, *{**plain, **changes}.values()) is not None

    assert not taken()
    multi_margin_loss(scores, target, check_target="nan", backend=NAME)
    assert taken()
    assert taken(p=1.0, margin=1, check_target="auto")
    assert taken(torch.nn.Parameter(scores))
    for changes in (
        {"p": True}, {"p": 2}, {"p": float("nan")}, {"p": "1"}, {"margin": 2.0}, {"margin": True},
        {"margin": float("inf")}, {"weight": weight}, {"reduction": "none"}, {"reduction": []},
        {"axis": 0}, {"check_target": "raise"}, {"check_target": "perhaps"}, {"check_target": None},
    ):  # fmt: skip
        assert not taken(**changes)
    wide = torch.zeros(9, 41)
    for x in (
        scores.double(), scores[:8], scores[:, :39], scores.T.contiguous().T, wide[:, :40],
        wide.reshape(-1)[1:361].reshape(9, 40), torch._neg_view(scores), scores.to("meta"),
        scores.to_sparse(), scores.numpy(), Mine(scores),
    ):  # fmt: skip
        assert not taken(x)
    for y in (
        target.int(), target[:8], target.reshape(9, 1), target.to("meta"), target.tolist(),
        torch.zeros(18, dtype=torch.int64)[::2], target.to_sparse(),
    ):  # fmt: skip
        assert not taken(y=y)
    inside = []
    torch.func.grad(lambda x: inside.append(taken(x)) or x.sum())(scores)
    torch.func.vmap(lambda x: inside.append(taken(x)) or x.sum())(scores.expand(2, 9, 40))
    with torch.autograd.forward_ad.dual_level():
        inside.append(taken())
    with torch._subclasses.FakeTensorMode():
        inside.append(taken())
    assert inside == [False] * 4


class Mine(torch.Tensor):
    pass


def test_few_calls_are_remembered(launched, known, batch, monkeypatch):
    monkeypatch.setattr(torch_cuda, "MOST", 2)
    for rows in (1, 2, 3):
        multi_margin_loss(batch[0][:rows], batch[1][:rows], check_target="nan", backend=NAME)
    assert len(known) == 1


def test_derivatives_of_the_second_order_of_a_call_that_comes_again(launched, known, batch):
    x, target = batch[0][:3, :6].double().contiguous().requires_grad_(), torch.tensor([0, 5, 2])
    options = {"p": 3, "reduction": "mean", "margin": 1.0, "check_target": "nan"}
    multi_margin_loss(x, target, backend=NAME, **options)

    def loss(scores):
        return shortcut_only(scores, target, backend=NAME, **options)

    assert torch.autograd.gradcheck(loss, x)
    assert torch.autograd.gradgradcheck(loss, x)


def test_an_upstream_gradient_that_is_negated_memory(launched, known, batch):
    scores, target, _ = batch
    _, expected = multi_margin_loss_and_grad(scores, target, backend="generic")
    for _ in range(2):
        for call in (multi_margin_loss, shortcut_only):
            x = scores.clone().requires_grad_()
            options = {"p": 1, "reduction": "mean", "margin": 1.0, "check_target": "nan"}
            loss = call(x, target, backend=NAME, **options)
            loss.backward(torch._neg_view(torch.tensor(-1.0)))
            torch.testing.assert_close(x.grad, expected)
