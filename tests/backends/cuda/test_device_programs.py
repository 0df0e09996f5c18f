"""Programs as people write them, on a GPU. Skipped, by name, where there is none."""

import json
import os
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi import InvalidTargetError, multi_margin_loss, multi_margin_loss_and_grad

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device for PyTorch", allow_module_level=True)

DEVICE = "cuda:0"
ROWS, CLASSES = 300, 100


@pytest.fixture
def batch(rng):
    scores = np.round(rng.normal(size=(ROWS, CLASSES)) * 16).astype(np.float32) / 8
    return scores, rng.integers(0, CLASSES, ROWS), rng.uniform(0.5, 2, CLASSES).astype(np.float32)


@pytest.fixture
def tensors(batch):
    scores, target, weight = (torch.tensor(array, device=DEVICE) for array in batch)
    return scores.requires_grad_(), target, weight


@pytest.fixture
def wanted(batch):
    """The loss and its gradient, by the kernels for NumPy arrays."""

    def wanted(**options):
        if options.get("weight") is not None:
            options["weight"] = batch[2]
        loss, grad = multi_margin_loss_and_grad(*batch[:2], backend="generic", **options)
        return torch.tensor(loss), torch.tensor(grad)

    return wanted


def close(got, expected):
    torch.testing.assert_close(got.detach().cpu(), expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("how", [{}, {"dynamic": True}, {"mode": "reduce-overhead"}], ids=str)
@pytest.mark.parametrize("options", [{"p": 1}, {"p": 2, "ignore_index": 3}], ids=str)
def test_compiled_steps(fresh_compiler, tensors, wanted, how, options):
    x, y, weight = tensors

    def step(scores, target):
        return multi_margin_loss(scores * 1, target, weight=weight, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compiled = torch.compile(step, fullgraph=True, **how)
        for _ in range(3):
            x.grad = None
            loss = compiled(x, y)
            loss.backward()
    value, grad = wanted(weight=True, **options)
    close(loss, value)
    close(x.grad, grad)


def test_a_compiled_target_out_of_range(fresh_compiler, tensors):
    x, y, _ = tensors
    y[5] = CLASSES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.compile(multi_margin_loss)(x, y).isnan()
    torch.cuda.synchronize()


def test_exported(tensors, wanted):
    class Loss(torch.nn.Module):
        def forward(self, scores, target):
            return multi_margin_loss(scores, target, p=2)

    x, y, _ = tensors
    rows = torch.export.Dim("rows", min=2, max=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(
            Loss(), (x.detach()[:7], y[:7]), dynamic_shapes=({0: rows}, {0: rows})
        )
        close(program.module()(x.detach(), y), wanted(p=2)[0])


@pytest.mark.parametrize("p", [1, 2])
def test_saved_tensors_on_the_host_and_checkpoints(tensors, wanted, p):
    x, y, _ = tensors
    value, grad = wanted(p=p)
    with torch.autograd.graph.save_on_cpu():
        loss = multi_margin_loss(x, y, p=p)
    loss.backward()
    close(loss, value)
    close(x.grad, grad)
    x.grad = None
    again = torch.utils.checkpoint.checkpoint(
        lambda s: multi_margin_loss(s * 1, y, p=p), x, use_reentrant=False
    )
    again.backward()
    close(x.grad, grad)


def test_transforms(tensors, wanted):
    x, y, _ = tensors
    x = x.detach()
    value, grad = wanted(p=2)
    close(torch.func.grad(lambda s: multi_margin_loss(s, y, p=2))(x), grad)
    loss, tangent = torch.func.jvp(lambda s: multi_margin_loss(s, y, p=2), (x,), (x,))
    close(loss, value)
    torch.testing.assert_close(tangent.cpu(), (grad * x.cpu()).sum(), rtol=1e-5, atol=0)
    each = torch.func.vmap(lambda s, t: multi_margin_loss(s, t, p=2))(x, y)
    close(each.mean(), value)


def test_a_training_step_with_a_scaler(tensors):
    x, y, weight = tensors
    from mml_arrayapi.pytorch import MultiMarginLoss

    model = torch.nn.Linear(CLASSES, CLASSES, device=DEVICE)
    loss_of = MultiMarginLoss(weight=weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cuda")
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_of(model(x.detach()), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert loss.dtype == torch.float32
    assert losses == sorted(losses, reverse=True)


def test_modes_of_pytorch(tensors, wanted):
    x, y, _ = tensors
    value, grad = wanted()
    torch.use_deterministic_algorithms(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it takes time
            anomalies = torch.autograd.detect_anomaly(check_nan=True)
        with anomalies:
            loss = multi_margin_loss(x, y)
            loss.backward()
    finally:
        torch.use_deterministic_algorithms(False)
    close(loss, value)
    close(x.grad, grad)
    with torch.inference_mode():
        close(multi_margin_loss(x, y), value)


def test_arguments_on_another_device(tensors):
    x, y, weight = tensors
    with pytest.raises(
        TypeError, match="target must be on the same device as input, but target is on cpu"
    ):
        multi_margin_loss(x, y.cpu())
    with pytest.raises(TypeError, match="weight must be on the same device as input"):
        multi_margin_loss(x, y, weight=weight.cpu())
    with pytest.raises(TypeError, match="grad_output must be on the same device as input"):
        multi_margin_loss_and_grad(x, y, grad_output=torch.tensor(1.0))


def test_threads_with_streams_of_their_own(tensors, wanted):
    x, y, _ = tensors
    value, grad = wanted(p=2)
    found = []

    def work():
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(20):
                loss, gradient = multi_margin_loss_and_grad(x.detach(), y, p=2)
            torch.cuda.current_stream().synchronize()
            found.append((loss.cpu(), gradient.cpu()))

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for loss, gradient in found:
        close(loss, value)
        close(gradient, grad)


def test_no_memory_left_for_the_gradient():
    x = torch.zeros(2**14, 2**14, device=DEVICE)  # 1 GiB
    y = torch.zeros(2**14, dtype=torch.int64, device=DEVICE)
    held = torch.cuda.memory_reserved() + 2**27
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(held / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            multi_margin_loss_and_grad(x, y)
        assert multi_margin_loss(x, y).item() == pytest.approx(1 - 2**-14)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert mml.explain(x, y).kernel == "torch-cuda"


def test_figures_of_a_stream_of_batches(batch, tensors):
    scores, target, _ = batch
    on_host, on_device = mml.LossAccumulator(), mml.LossAccumulator()
    x, y = tensors[0].detach(), tensors[1]
    for start in range(0, ROWS, 64):
        rows = slice(start, start + 64)
        on_host.update(scores[rows], target[rows])
        on_device.update(x[rows], y[rows])
    assert on_device.count == ROWS
    assert on_device.compute() == pytest.approx(on_host.compute(), rel=1e-7)
    y[70] = -1
    with pytest.raises(InvalidTargetError, match=r"target\[70\] is -1"):
        on_device.update(x, y)
    assert on_device.count == ROWS


def test_a_metric(batch, tensors):
    module = pytest.importorskip("mml_arrayapi.torchmetrics", exc_type=ImportError)
    metric = module.MultiMarginLoss().to(DEVICE)
    metric.update(tensors[0], tensors[1])
    value = metric.compute()
    assert value.device.type == "cuda"
    assert value.item() == pytest.approx(float(multi_margin_loss(*batch[:2])), rel=1e-6)


PROGRAM = """
import json
import numpy as np, torch
import mml_arrayapi as mml
x, t = np.eye(3, dtype=np.float32), np.asarray([0, 1, 2])
leaf = torch.tensor(x, requires_grad=True)
mml.multi_margin_loss(leaf, torch.tensor(t)).backward()
print(json.dumps({
    "numpy": float(mml.multi_margin_loss(x, t)),
    "torch": leaf.grad.tolist(),
    "why": {b.name: b.reason for b in mml.list_backends() if b.library in ("torch", "cupy")},
}))
"""


def test_a_gpu_that_is_hidden():
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert found["numpy"] == 0
    assert found["torch"] == [[0.0] * 3] * 3
    assert found["why"]["torch-cuda"]
    assert found["why"]["cupy-cuda"]


def test_a_kernel_asked_for_by_the_environment(tensors, wanted, monkeypatch):
    with mml.use_backend("torch-cuda"):
        close(multi_margin_loss(*tensors[:2]), wanted()[0])
    with pytest.raises(ValueError, match="torch-cuda"):
        multi_margin_loss(tensors[0].detach().cpu(), tensors[1].cpu(), backend="torch-cuda")


# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not cupy.cuda.is_available():
        pytest.skip("no CUDA device for CuPy")
    return cupy


@pytest.mark.parametrize("cut", [(64, CLASSES), (64, 40)], ids=["rows", "both"])
def test_dask_with_chunks_of_cupy(cupy, batch, cut):
    da = pytest.importorskip("dask.array")
    scores, target, weight = batch
    x = da.from_array(scores, chunks=cut).map_blocks(cupy.asarray)
    y = da.from_array(target, chunks=64).map_blocks(cupy.asarray)
    assert mml.explain(x, y).kernel == "dask-blocks"
    each, grad = multi_margin_loss_and_grad(x, y, weight=weight, reduction="none")
    values, gradients = multi_margin_loss_and_grad(scores, target, weight=weight, reduction="none")
    got = each.compute(), grad.compute()
    assert all(isinstance(array, cupy.ndarray) for array in got)
    np.testing.assert_allclose(got[0].get(), values, rtol=2e-6)
    np.testing.assert_allclose(got[1].get(), gradients, rtol=2e-6)
    mean = multi_margin_loss(x, y)
    assert float(mean.compute()) == pytest.approx(
        float(multi_margin_loss(scores, target)), rel=1e-6
    )


def test_batches_of_cupy_and_others_in_one_figure(cupy, batch):
    scores, target, _ = batch
    figure = mml.LossAccumulator(p=2)
    figure.update(cupy.asarray(scores[:100]), cupy.asarray(target[:100]))
    figure.update(
        torch.tensor(scores[100:200], device=DEVICE), torch.tensor(target[100:200], device=DEVICE)
    )
    figure.update(scores[200:], target[200:])
    assert figure.compute() == pytest.approx(
        float(multi_margin_loss(scores, target, p=2)), rel=1e-6
    )


@pytest.fixture(scope="module")
def jax():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip(f"JAX has no GPU, but {jax.default_backend()}")
    return jax


def test_jax(jax, batch):
    scores, target, weight = map(jax.numpy.asarray, batch)
    value, gradient = multi_margin_loss_and_grad(*batch[:2], weight=batch[2], p=2)

    def loss(s):
        return multi_margin_loss(s, target, weight=weight, p=2)

    assert mml.explain(scores, target).kernel == "jax-jit"
    for run in (loss, jax.jit(loss)):
        got, grad = jax.value_and_grad(run)(scores)
        assert got.device.platform == "gpu"
        np.testing.assert_allclose(got, value, rtol=2e-6)
        np.testing.assert_allclose(grad, gradient, rtol=2e-6, atol=1e-9)
    wrong = target.at[5].set(-1)
    assert bool(jax.numpy.isnan(multi_margin_loss(scores, wrong)))
    with pytest.raises(InvalidTargetError, match=r"target\[5\] is -1"):
        multi_margin_loss(scores, wrong, check_target="raise")
