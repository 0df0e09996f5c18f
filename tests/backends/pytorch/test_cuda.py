"""The CUDA engine on CPU tensors: the emulator stands in for the device."""

from types import SimpleNamespace

import pytest

from mml_arrayapi import InvalidTargetError, multi_margin_loss, multi_margin_loss_and_grad
from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.kernel import Unusable

torch = pytest.importorskip("torch")
autograd = pytest.importorskip("mml_arrayapi.backends.pytorch.autograd")
engine = pytest.importorskip("mml_arrayapi.backends.pytorch.cuda")
pytest.importorskip("mml_arrayapi.backends.pytorch.cpu")  # the operators' own, for the CPU
CASES = [
    (torch.float32, 1), (torch.float32, 2), (torch.float32, 1.5), (torch.float16, 1),
    (torch.bfloat16, 2), (torch.float64, 3),
]  # fmt: skip
IDS = [f"{str(dtype).removeprefix('torch.')}-{p}" for dtype, p in CASES]


@pytest.fixture
def device(monkeypatch, builds):
    """Let the emulator carry out what is launched, and keep the names of the kernels."""
    from tests.backends.cuda import emulator

    machines = {}
    fake = SimpleNamespace(launched=[], trouble=None, fails=False)

    def launch(made, addresses, index, stream):
        if fake.fails:
            raise Unusable("CudaError: 701 from rows_loss")
        variant = made.variant.scalar, made.variant.power
        if variant not in machines:
            machines[variant] = emulator.Machine(builds(variant))
        fake.launched.extend(step.name.partition("_")[2] for step in made.launches)
        machines[variant].launch(made, addresses)

    driver = SimpleNamespace(
        launch=launch,
        trouble=lambda *_: fake.trouble,
        multiprocessors=lambda _: 2,
    )
    monkeypatch.setattr(engine, "driver", driver)
    monkeypatch.setattr(engine, "MISSING", None)
    monkeypatch.setattr(engine.state, "current_stream", lambda _: 0)
    return fake


@pytest.fixture
def kernel(device, monkeypatch):
    """The kernel, for tensors on the CPU. The operators stay the CPU kernel's."""
    monkeypatch.setattr(autograd, "_implement", lambda engine: None)
    monkeypatch.setattr(autograd, "_engines", {})
    run = engine.loss, engine.grad, engine.loss_and_grad, engine.mask_shape, engine.keeps
    return autograd.make_kernel("torch-cuda", autograd.Engine("cpu", engine.refuses, *run))


def direct(kernel, x, target, weight=None, **changes):
    options = {
        "p": 1, "margin": 1.0, "reduction": "mean", "ignore_index": None, "axis": -1,
        "check_target": "auto",
    }  # fmt: skip
    options |= changes
    return kernel.direct[torch.Tensor](x, target, weight, tuple(options.values()))


@pytest.fixture
def batch(rng):
    return (
        torch.tensor(rng.normal(size=(9, 40)).astype("float32")),
        torch.tensor(rng.integers(0, 40, 9)),
        torch.tensor(rng.uniform(0.5, 2, 40).astype("float32")),
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("dtype", "p"), CASES, ids=IDS)
def test_value_and_backward(device, kernel, batch, dtype, p, reduction):
    scores, target, weight = batch
    x = scores.to(dtype).requires_grad_()
    options = {"p": p, "margin": 0.75, "reduction": reduction}
    loss = direct(kernel, x, target, weight, **options)
    upstream = torch.arange(1.0, 1 + loss.numel(), dtype=dtype).reshape(loss.shape)
    value, grad = multi_margin_loss_and_grad(
        x.detach(), target, weight=weight, backend="generic", grad_output=upstream, **options
    )
    torch.testing.assert_close(loss.detach(), value)
    loss.backward(upstream)
    torch.testing.assert_close(x.grad, grad)
    kernels = set(device.launched) - {""}
    assert kernels == ({"loss_mask", "grad_mask"} if p == 1 else {"loss", "loss_grad"})
    both = engine.loss_and_grad(
        x.detach(), target, weight, upstream, (p, 0.75, reduction, None, -1, "auto")
    )
    torch.testing.assert_close(both, (value, grad))


@pytest.mark.parametrize(
    "spell",
    [
        lambda x: x[:, ::2],
        lambda x: x.T.contiguous().T,
        lambda x: x[:, 1:37],
        lambda x: x[:1].expand(5, 40),
        lambda x: x.reshape(3, 3, 40).transpose(0, 1),
        lambda x: x[0],
        lambda x: x[:, :1],
        lambda x: x[:0],
    ],
    ids=["strided", "classes first", "part", "expanded", "3 axes", "one", "one class", "empty"],
)
@pytest.mark.parametrize("p", [1, 2])
def test_layouts(kernel, batch, rng, spell, p):
    x = spell(batch[0]).detach().requires_grad_()
    target = torch.tensor(rng.integers(0, x.shape[-1], x.shape[:-1]).astype("int32"))
    loss = direct(kernel, x, target, p=p, reduction="none")
    value, grad = multi_margin_loss_and_grad(
        x.detach(), target, p=p, reduction="none", backend="generic"
    )
    torch.testing.assert_close(loss.detach(), value)
    loss.sum().backward()
    torch.testing.assert_close(x.grad, grad)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_ignored_rows(kernel, batch, p, reduction):
    scores, target, _ = batch
    x = scores.clone().requires_grad_()
    options = {"p": p, "reduction": reduction, "ignore_index": int(target[3])}
    loss = direct(kernel, x, target, **options)
    loss.sum().backward()
    value, grad = multi_margin_loss_and_grad(scores, target, backend="generic", **options)
    torch.testing.assert_close(loss.detach(), value)
    torch.testing.assert_close(x.grad, grad)
    assert x.grad[3].tolist() == [0] * 40


@pytest.mark.parametrize("p", [1, 2])
def test_targets_out_of_range(kernel, batch, p):
    scores, target, _ = batch
    target[4] = 2**32
    x = scores.clone().requires_grad_()
    loss = direct(kernel, x, target, p=p, reduction="none")
    loss.sum().backward()
    assert loss.isnan().nonzero().tolist() == [[4]]
    assert x.grad.isnan().all(dim=1).nonzero().tolist() == [[4]]
    message = r"target\[1, 1\] is 4294967296, but input has 40 classes"
    with pytest.raises(InvalidTargetError, match=message):
        direct(kernel, scores.reshape(3, 3, 40), target.reshape(3, 3), p=p, check_target="raise")


@pytest.mark.parametrize(
    "changes",
    [
        {"p": True}, {"p": 0.5}, {"p": float("nan")}, {"p": "1"}, {"margin": float("inf")},
        {"margin": True}, {"reduction": []}, {"reduction": "max"}, {"axis": 0}, {"axis": 1.0},
        {"check_target": None}, {"ignore_index": 1.0}, {"weight": torch.ones(39)},
        {"weight": torch.ones(40, dtype=torch.int64)}, {"weight": [1.0] * 40},
        {"target": torch.zeros(8, dtype=torch.int64)}, {"target": torch.zeros(9)},
        {"target": torch.zeros(9, dtype=torch.bool)}, {"target": [0] * 9},
        {"x": torch.zeros(9, 40, dtype=torch.int64)}, {"x": torch.zeros(9, 0)},
        {"x": torch.tensor(1.0)},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_plainly_right_is_left(device, kernel, batch, changes):
    arguments = {"x": batch[0], "target": batch[1], **changes}
    assert direct(kernel, **arguments) is None
    assert device.launched == []


@pytest.mark.parametrize("p", [1, 2])
def test_a_device_in_trouble_is_nobodys_error(device, kernel, batch, p):
    scores, target, _ = batch
    x = scores.clone().requires_grad_()
    loss = direct(kernel, x, target, p=p)
    device.fails = True
    assert direct(kernel, scores, target, p=p) is None
    loss.backward()  # the formula's
    torch.testing.assert_close(
        x.grad, multi_margin_loss_and_grad(scores, target, p=p, backend="generic")[1]
    )


def test_a_device_that_says_nothing_is_nobodys_error(device, kernel, batch, monkeypatch):
    def multiprocessors(_):
        raise Unusable("CudaError: 101")

    monkeypatch.setattr(engine.driver, "multiprocessors", multiprocessors)
    assert direct(kernel, *batch[:2]) is None
    assert device.launched == []


def test_the_mask_is_what_the_fake_operator_says():
    for dtype, scalar in engine.SCALARS.items():
        for classes in (7, 40, 5000, 200_000):
            width = cuda_plan.mask_bytes(scalar, classes)
            assert engine.mask_shape(dtype, 9, classes) == (9, width)


def refusal(x, y):
    return engine.KERNEL.refuses(autograd._problem(x, y, None, (1.0, 1.0, "mean", None, 1, "nan")))


def test_refusals(monkeypatch):
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    assert refusal(x, y) == "input is on cpu, not on a CUDA device"
    assert refusal(x.to("meta"), y.to("meta")) == "input is on meta, not on a CUDA device"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert engine.refuses(None) == "this PyTorch is built for ROCm, the kernels are for CUDA"


def test_a_missing_driver_is_nobodys_error(monkeypatch):
    monkeypatch.setattr(engine, "MISSING", "cannot be imported: No module named 'cuda'")
    x, y = torch.zeros(2, 3), torch.tensor([0, 1])
    assert multi_margin_loss(x, y) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="kernel 'torch-cuda' cannot run this call: "):
        multi_margin_loss(x, y, backend="torch-cuda")
