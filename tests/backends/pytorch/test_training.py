"""As people train: mixed precision, checkpoints, hooks, optimisers, several processes."""

import copy
import datetime
import sys

import pytest

from mml_arrayapi import explain, multi_margin_loss, multi_margin_loss_and_grad
from tests.backends.pytorch.conftest import compile_whole
from tests.tree import run_python

torch = pytest.importorskip("torch")
theirs = torch.nn.functional.multi_margin_loss
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
BACKENDS = pytest.mark.parametrize("backend", [None, "generic"])


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(20261125)
    return torch.randn(8, 5, generator=draw), torch.randint(5, (8,), generator=draw)


@HALF
@BACKENDS
def test_autocast_gives_float32_as_pytorchs_own(batch, dtype, backend):
    scores, target = batch[0].to(dtype), batch[1]
    x = scores.clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = multi_margin_loss(x, target, backend=backend)
        expected = theirs(scores, target)
        _, grad = multi_margin_loss_and_grad(scores, target, backend=backend)
        each = multi_margin_loss(scores, target, reduction="none", backend=backend)
    assert loss.dtype == expected.dtype == each.dtype == torch.float32
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.detach(), expected)
    loss.backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, grad)
    with torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
        assert multi_margin_loss(scores, target, backend=backend).dtype == dtype


@HALF
def test_autocast_compiled(batch, dtype, fresh_compiler):
    scores, target = batch[0].to(dtype), batch[1]
    with torch.autocast("cpu", dtype=dtype):
        loss = compile_whole(multi_margin_loss)(scores, target)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, multi_margin_loss(scores.float(), target))


def test_a_loss_scale_of_65536_does_not_overflow(batch):
    target = batch[1]
    model = torch.nn.Linear(4, 5)
    x = torch.randn(8, 4)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    with torch.autocast("cpu", dtype=torch.float16):
        loss = multi_margin_loss(model(x), target)
    scaler.scale(loss).backward()
    scaled = [p.grad / 65536 for p in model.parameters()]
    assert all(grad.isfinite().all() for grad in scaled)
    model.zero_grad()
    theirs(model(x), target).backward()
    for ours, parameter in zip(scaled, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=5e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_device_contexts_do_not_switch_the_kernel_off(batch, kernels_ran, device):
    scores, target = batch
    with torch.device(device):
        assert explain(scores, target).kernel == "torch-cpu"
        loss = multi_margin_loss(scores.requires_grad_(), target)
        loss.backward()
    assert loss.device.type == "cpu"
    assert scores.grad.device.type == "cpu"
    assert kernels_ran == ["loss", "grad"]
    torch.set_default_device(device)
    try:
        multi_margin_loss(scores.detach(), target, reduction="none")
        multi_margin_loss_and_grad(scores.detach(), target, backend="generic")
    finally:
        torch.set_default_device(None)
    assert kernels_ran == ["loss", "grad", "loss"]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("p", [1, 2])
def test_checkpoints(batch, reentrant, p):
    scores, target = batch
    x = scores.clone().requires_grad_()
    loss = torch.utils.checkpoint.checkpoint(
        lambda x: multi_margin_loss(x * 2, target, p=p), x, use_reentrant=reentrant
    )
    loss.backward()
    y = scores.clone().requires_grad_()
    theirs(y * 2, target, p=p).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_inference_mode_and_no_grad(batch, kernels_ran):
    scores, target = batch
    parameter = torch.nn.Parameter(scores)
    expected = theirs(scores, target)
    with torch.inference_mode():
        loss = multi_margin_loss(parameter, target)
        assert loss.is_inference()
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(multi_margin_loss(scores * 1, target * 1), expected)
    with torch.no_grad():
        assert not multi_margin_loss(parameter, target).requires_grad
    assert kernels_ran == ["loss"] * 3


def test_hooks(batch):
    scores, target = batch
    x = scores.clone().requires_grad_()
    seen = []
    x.register_hook(lambda grad: seen.append(("scores", grad.shape)) or grad * 2)
    loss = multi_margin_loss(x, target, reduction="none")
    loss.register_hook(lambda grad: seen.append(("loss", grad.shape)) or grad * 3)
    loss.grad_fn.register_hook(lambda of_inputs, of_outputs: seen.append(("node", len(of_outputs))))
    loss.mean().backward()
    assert seen == [("loss", (8,)), ("node", 1), ("scores", (8, 5))]
    torch.testing.assert_close(x.grad, 6 * multi_margin_loss_and_grad(scores, target)[1])


def test_twice_backward_and_a_freed_graph(batch):
    scores, target = batch
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * multi_margin_loss_and_grad(scores, target)[1])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_loss_and_grad_stays_differentiable(batch, kernels_ran):
    scores, target = batch[0].double(), batch[1]
    upstream = torch.rand(8, dtype=torch.float64, requires_grad=True)

    def both(x, g):
        options = {"p": 2, "reduction": "none", "grad_output": g}
        return multi_margin_loss_and_grad(x, target, **options)

    assert torch.autograd.gradcheck(both, (scores.clone().requires_grad_(), upstream))
    assert set(kernels_ran) == {"loss", "grad"}


def test_lbfgs(batch):
    scores, target = batch
    results = []
    for loss in (multi_margin_loss, theirs):
        weight = torch.nn.Parameter(torch.zeros(5, 5))
        optimizer = torch.optim.LBFGS([weight], max_iter=10, line_search_fn="strong_wolfe")

        def closure(weight=weight, optimizer=optimizer, loss=loss):
            optimizer.zero_grad()
            value = loss(scores @ weight, target, p=2)
            value.backward()
            return value

        optimizer.step(closure)
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("early_stop", [True, False])
def test_checkpoints_that_stop_early(batch, early_stop):
    scores, target = batch
    x = scores.clone().requires_grad_()
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x: multi_margin_loss(x * 1, target).exp().log(), x, use_reentrant=False
        )
        loss.backward()
    torch.testing.assert_close(x.grad, multi_margin_loss_and_grad(scores, target)[1])


def test_inference_mode_between_forward_and_backward(batch):
    scores, target = batch
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target)
    with torch.inference_mode():
        multi_margin_loss(x, target)
        loss.backward()
    torch.testing.assert_close(x.grad, multi_margin_loss_and_grad(scores, target)[1])
    with torch.inference_mode():
        labels = target * 1
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):  # as PyTorch's own
        multi_margin_loss(x, labels)


@pytest.mark.parametrize("p", [1, 2])
def test_functional_call_and_parametrised_modules(batch, p):
    scores, target = batch
    model = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(5, 5))
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values, function):
        return function(torch.func.functional_call(model, values, (scores,)), target, p=p)

    expected = torch.autograd.grad(theirs(model(scores), target, p=p), model.parameters())
    ours = torch.autograd.grad(multi_margin_loss(model(scores), target, p=p), model.parameters())
    torch.testing.assert_close(ours, expected)
    functional = torch.func.grad(loss)(values, multi_margin_loss)
    torch.testing.assert_close(tuple(functional.values()), expected)


@pytest.mark.filterwarnings(
    "ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning"
)
@pytest.mark.parametrize("p", [1, 2])
def test_autograd_functional(batch, p):
    x, target = batch[0][:2].double(), batch[1][:2]
    functional = torch.autograd.functional
    ones = torch.ones_like(x)

    def derivatives(**options):
        def loss(x):
            return multi_margin_loss(x, target, p=p, **options)

        yield functional.hessian(loss, x)
        yield functional.hessian(loss, x, vectorize=True)
        yield functional.jacobian(loss, x, vectorize=True, strategy="forward-mode")
        yield functional.hvp(loss, x, ones)[1]
        yield functional.vhp(loss, x, ones)[1]

    for ours, expected in zip(derivatives(), derivatives(backend="generic"), strict=True):
        torch.testing.assert_close(ours, expected)


class Batches(torch.utils.data.Dataset):
    """Losses and gradients that the workers of a DataLoader compute."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        # No backward(): PyTorch's engine refuses to run in a fork of a process that has used it.
        target = torch.zeros(i + 3, dtype=torch.int64)
        loss, grad = multi_margin_loss_and_grad(torch.eye(5)[: i + 3], target)
        return [loss.item(), grad.tolist()]


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork")  # Python's, and JAX's where it has been imported
def test_data_loaders_that_fork():
    multi_margin_loss(torch.zeros(1100, 1000), torch.zeros(1100, dtype=torch.int64))  # on threads
    loader = torch.utils.data.DataLoader(
        Batches(), batch_size=None, num_workers=1, multiprocessing_context="fork"
    )
    assert list(loader) == [Batches()[i] for i in range(2)]


class Holder(torch.Tensor):
    """A tensor that holds another, as distributed and quantised ones do."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        tree_map = torch.utils._pytree.tree_map_only
        args, kwargs = tree_map(Holder, lambda holder: holder.inner, (args, kwargs or {}))
        return tree_map(torch.Tensor, Holder, function(*args, **kwargs))


@pytest.mark.parametrize("p", [1, 2])
def test_subclasses_that_hold_other_tensors(batch, p):
    scores, target = batch
    x = Holder(scores).requires_grad_()
    loss = multi_margin_loss(x, Holder(target), p=p)
    loss.backward()
    value, grad = multi_margin_loss_and_grad(scores, target, p=p, backend="generic")
    torch.testing.assert_close((loss.inner, x.grad.inner), (value, grad))
    with pytest.raises(ValueError, match="check_target='raise' needs the values of target"):
        multi_margin_loss(Holder(scores), Holder(target), check_target="raise")


class Mine(torch.Tensor):
    pass


def test_subclasses_go_to_the_formula(batch, kernels_ran):
    scores, target = batch
    loss = multi_margin_loss(scores.as_subclass(Mine), target)
    assert type(loss) is Mine
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), theirs(scores, target))
    assert kernels_ran == []


def _train(rank, folder, state, scores, target):
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    patience = datetime.timedelta(seconds=60)
    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=patience
    )
    try:
        model = torch.nn.Linear(5, 5)
        model.load_state_dict(state)
        model = torch.nn.parallel.DistributedDataParallel(model)
        mine = slice(4 * rank, 4 * rank + 4)
        multi_margin_loss(model(scores[mine]), target[mine]).backward()
        torch.save([p.grad for p in model.parameters()], folder / f"{rank}.pt")
        # Released after the group, it ends Gloo's threads while it holds the interpreter's lock,
        # which one of them may wait for: 1 of 36 runs hung so, with PyTorch's own loss as well.
        del model
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_two_processes(batch, tmp_path):
    scores, target = batch
    model = torch.nn.Linear(5, 5)
    arguments = tmp_path, copy.deepcopy(model.state_dict()), scores, target
    other = torch.multiprocessing.get_context("spawn").Process(target=_train, args=(1, *arguments))
    other.start()
    _train(0, *arguments)
    other.join(60)
    assert other.exitcode == 0
    multi_margin_loss(model(scores), target).backward()
    for rank in (0, 1):
        for ours, parameter in zip(
            torch.load(tmp_path / f"{rank}.pt"), model.parameters(), strict=True
        ):
            torch.testing.assert_close(ours, parameter.grad)


DISTRIBUTED = """
import tempfile
import torch
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from mml_arrayapi import multi_margin_loss
with tempfile.TemporaryDirectory() as folder:
    store = torch.distributed.FileStore(folder + "/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))
    x, y, w = torch.randn(6, 4), torch.randint(4, (6,)), torch.rand(4)
    for placement in (Shard(0), Shard(1), Replicate()):
        of_target = placement if placement == Shard(0) else Replicate()
        for options in ({}, {"reduction": "none", "p": 1.5}, {"ignore_index": 1, "weight": w}):
            plain = x.clone().requires_grad_()
            expected = multi_margin_loss(plain, y, **options)
            expected.sum().backward()
            if "weight" in options:
                options["weight"] = distribute_tensor(w, mesh, [Replicate()])
            scores = distribute_tensor(x, mesh, [placement]).requires_grad_()
            loss = multi_margin_loss(scores, distribute_tensor(y, mesh, [of_target]), **options)
            loss.sum().backward()
            torch.testing.assert_close(loss.full_tensor(), expected)
            torch.testing.assert_close(scores.grad.full_tensor(), plain.grad)
    torch.distributed.destroy_process_group()
print("good")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_distributed_tensors():
    assert run_python(DISTRIBUTED).endswith("good")
