"""The metric with torchmetrics itself, and with two processes."""

# ruff: noqa: E402 - the libraries may be missing

import copy
import multiprocessing
import pickle
import socket

import numpy as np
import pytest

torch = pytest.importorskip("torch")
torchmetrics = pytest.importorskip("torchmetrics")

from mml_arrayapi import LossAccumulator, multi_margin_loss
from mml_arrayapi.torchmetrics import SIZE, MultiMarginLoss, _to_tensor


@pytest.fixture
def batches():
    draw = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 7, generator=draw), torch.randint(0, 7, (n,), generator=draw))
        for n in (5, 1, 12, 3)
    ]


def accumulated(batches, **options):
    made = LossAccumulator(**options)
    for scores, target in batches:
        made.update(scores, target)
    return made


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_update_compute_reset(batches, reduction):
    options = {"p": 2, "margin": 0.5, "weight": torch.arange(1.0, 8), "ignore_index": 3}
    metric = MultiMarginLoss(reduction=reduction, **options)
    for _ in range(2):
        for scores, target in batches:
            metric.update(scores, target)
        got = metric.compute()
        assert got.dtype == torch.float64
        assert got.item() == accumulated(batches, **options).compute(reduction)
        metric.reset()
    metric.update(*batches[1])
    assert metric.compute().item() == accumulated(batches[1:2], **options).compute(reduction)


def test_forward_returns_the_batchs_loss_and_keeps_all(batches):
    metric = MultiMarginLoss()
    for scores, target in batches:
        got = metric(scores.requires_grad_(), target)
        want = multi_margin_loss(scores.double(), target).item()
        assert got.item() == pytest.approx(want, rel=1e-6)
    assert metric.compute().item() == accumulated(batches).compute()


def test_sample_weights(batches):
    scores, target = batches[2]
    weights = torch.arange(12.0)
    metric = MultiMarginLoss()
    metric.update(scores, target, weights)
    losses = multi_margin_loss(scores.double(), target, reduction="none")
    assert metric.compute().item() == pytest.approx(np.average(losses, weights=weights), rel=1e-6)


def test_merge_state_and_any_order(batches):
    one, other = MultiMarginLoss(), MultiMarginLoss()
    for scores, target in batches[::2]:
        one.update(scores, target)
    for scores, target in batches[1::2]:
        other.update(scores, target)
    one.merge_state(other)
    assert one.compute().item() == accumulated(batches).compute()


def test_copies_and_saved_states(batches):
    metric = MultiMarginLoss(ignore_index=1)
    metric.persistent(True)
    metric.update(*batches[0])
    loaded = MultiMarginLoss(ignore_index=1)
    loaded.load_state_dict(metric.state_dict())
    for made in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), loaded):
        made.update(*batches[2])
        assert made(*batches[3]) > 0
        want = accumulated([batches[i] for i in (0, 2, 3)], ignore_index=1)
        assert made._from_tensor(made.totals).compute() == want.compute()


def test_in_a_collection_and_in_other_dtypes(batches):
    metrics = torchmetrics.MetricCollection({"p1": MultiMarginLoss(), "p2": MultiMarginLoss(p=2)})
    metrics.set_dtype(torch.float16)
    for scores, target in batches:
        metrics.update(scores, target)
    got = metrics.compute()
    for p in (1, 2):
        assert got[f"p{p}"].item() == accumulated(batches, p=p).compute()


def test_the_largest_state_fits():
    made = LossAccumulator()
    big = torch.full((3, 2), torch.finfo(torch.float64).max / 4, dtype=torch.float64)
    big[:, 0] = 0
    made.update(big, torch.zeros(3, dtype=torch.int64), np.full(3, 1e-300))
    for total in (made._totals.losses, made._totals.weights):
        total.total |= (1 << (64 + 1024 + 1130)) - 1
        total.count = total.nan = total.plus = total.minus = 2**63
    tensor = _to_tensor(made)
    assert tensor.shape == (SIZE,)
    assert MultiMarginLoss()._from_tensor(tensor)._totals == made._totals


def test_plot(batches):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    metric = MultiMarginLoss()
    values = [metric(scores, target) for scores, target in batches]
    for value in (None, values):
        figure, axes = metric.plot(value)
        assert axes.get_ylim()[0] <= 0
        matplotlib.pyplot.close(figure)


def test_bad_arguments():
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', but is 'none'"):
        MultiMarginLoss(reduction="none")
    with pytest.raises(ValueError, match="p must be"):
        MultiMarginLoss(p=0)
    metric = MultiMarginLoss()
    with pytest.raises(IndexError):
        metric.update(torch.zeros(1, 3), torch.tensor([3]))
    metric.update(torch.zeros(1, 3), torch.tensor([0]))
    assert metric.compute().item() == pytest.approx(2 / 3)


def process(rank, port, batches, results):
    """Run in a process of its own. The batches are NumPy's: tensors would need shared memory."""
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", world_size=2, rank=rank)
    try:
        metric = MultiMarginLoss()
        for scores, target in batches[rank::2]:
            metric.update(torch.from_numpy(scores), torch.from_numpy(target))
        results[rank] = metric.compute().item(), metric._from_tensor(metric.totals).count
    finally:
        torch.distributed.destroy_process_group()


def test_processes_are_synchronised_exactly(batches):
    if not torch.distributed.is_available():
        pytest.skip("PyTorch has no torch.distributed here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        arrays = [(scores.numpy(), target.numpy()) for scores, target in batches]
        torch.multiprocessing.spawn(process, (port, arrays, results), nprocs=2)
        losses, counts = zip(*results.values(), strict=True)
    want = accumulated(batches)
    assert losses == (want.compute(),) * 2
    assert sorted(counts) == [4, 17]  # each goes on with its own


def test_metrics_of_a_collection_stay_apart():
    from torchmetrics import MetricCollection

    given = {
        "plain": {},
        "p": {"p": 2},
        "margin": {"margin": 0.5},
        "weight": {"weight": torch.tensor([1.0, 5.0, 1.0])},
        "ignored": {"ignore_index": 1},
        "sum": {"reduction": "sum"},
    }
    collection = MetricCollection({name: MultiMarginLoss(**words) for name, words in given.items()})
    alone = {name: MultiMarginLoss(**words) for name, words in given.items()}
    batches = [  # the loss of the first is 0 for all
        (torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([0])),
        (torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]]), torch.tensor([1, 0])),
    ]
    for metric in (collection, *alone.values()):
        for batch in batches:
            metric.update(*batch)
    assert collection.compute() == {name: metric.compute() for name, metric in alone.items()}


def test_a_state_belongs_to_its_parameters():
    one, other = MultiMarginLoss(), MultiMarginLoss(p=2)
    for metric in (one, other):
        metric.persistent(True)
        metric.update(torch.zeros(1, 3), torch.tensor([0]))
    with pytest.raises(ValueError, match="state is that of a metric with another p"):
        one.merge_state(other)
    one.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"this one is <LossAccumulator\(p=1.0"):
        one.compute()
