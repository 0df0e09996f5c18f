"""The operators of compiled graphs, in C++, beside their twins in Python."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad

torch = pytest.importorskip("torch")
StorageWeakRef = pytest.importorskip("torch.multiprocessing.reductions").StorageWeakRef
engine = pytest.importorskip("mml_arrayapi.backends.pytorch.cpu")
pytestmark = [
    pytest.mark.skipif(engine.native is None, reason=f"torch-cpu: {engine.cpu.reason()}"),
    pytest.mark.skipif(not engine.GRAPH_OPERATORS, reason="PyTorch before 2.10"),
]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.uint32, torch.uint64]


@pytest.fixture
def declined(monkeypatch):
    """How often the twins in Python have run since."""
    calls = []
    monkeypatch.setattr(engine, "native", _Recording(engine.native, calls))
    return calls


class _Recording:
    def __init__(self, native, calls):
        self._native, self._calls = native, calls

    def __getattr__(self, name):
        if name in ("loss", "grad"):
            self._calls.append(name)
        return getattr(self._native, name)


def operator(name):
    return getattr(torch.ops.mml_arrayapi, f"graph_multi_margin_loss{name}").default


def same(first, second):
    if isinstance(first, tuple):
        return all(map(same, first, second))
    alike = (first.dtype, first.shape, first.stride()) == (
        second.dtype,
        second.shape,
        second.stride(),
    )
    return alike and torch.equal(first.nan_to_num(77), second.nan_to_num(77))


def batch(dtype, shape=(7, 5), axis=-1):
    draw = torch.Generator().manual_seed(20261127)
    x = torch.randn(shape, generator=draw).to(dtype)
    n, rows = shape[axis], [k for i, k in enumerate(shape) if i != axis % len(shape)]
    return x, torch.randint(n, rows, generator=draw), torch.rand(n, generator=draw).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0, 1.5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("ignore_index", [None, 2])
def test_the_bits_of_the_twins(declined, dtype, p, reduction, ignore_index):
    x, y, weight = batch(dtype)
    x[1, 2], y[3] = float("nan"), 9
    for w in (None, weight):
        options = p, 0.5, reduction, ignore_index, 1
        made = operator("")(x, y, w, *options, True)
        upstream = torch.full_like(made[0], 3)
        grad = operator("_backward")(upstream, x, y, w, made[1], *options)
        assert declined == []
        assert same(made, operator("_in_python")(x, y, w, *options, True))
        twin = operator("_backward_in_python")(upstream, x, y, w, made[1], *options)
        assert same(grad, twin)
        declined.clear()


@pytest.mark.parametrize("target", INTEGERS, ids=str)
def test_targets_of_every_width(declined, target):
    x, y, _ = batch(torch.float32)
    made = operator("")(x, y.to(target), None, 1.0, 1.0, "none", None, 1, False)
    assert declined == []
    assert same(made[0], multi_margin_loss(x, y, reduction="none"))


LAYOUTS = {
    "classes first": ((5, 7), 0, lambda x: x),
    "transposed": ((7, 5), 1, lambda x: x.t().contiguous().t()),
    "more axes": ((2, 3, 5), 2, lambda x: x),
    "axis in the middle": ((2, 5, 3), 1, lambda x: x),
    "one sample": ((5,), 0, lambda x: x),
    "one class": ((7, 1), 1, lambda x: x),
    "an axis of one": ((7, 5, 1), 1, lambda x: x),
    "channels last": ((2, 5, 3, 4), 1, lambda x: x.to(memory_format=torch.channels_last)),
}
DECLINED = {  # where torch.empty_like() chooses an order of its own
    "every second row": ((7, 5), 1, lambda x: torch.stack((x, x), 1).flatten(0, 1)[::2]),
    "expanded": ((7, 5), 1, lambda x: x[:1].expand(7, 5)),
    "overlapping": ((3, 3), 1, lambda x: x.flatten().as_strided((3, 3), (2, 2))),
    "no rows": ((0, 5), 1, lambda x: x),
}


@pytest.mark.parametrize("name", [*LAYOUTS, *DECLINED])
def test_layouts(declined, name):
    shape, axis, change = {**LAYOUTS, **DECLINED}[name]
    x, y, weight = batch(torch.float32, shape, axis)
    x = change(x)
    options = 2.0, 1.0, "sum", None, axis
    loss = operator("")(x, y, weight, *options, False)
    upstream = torch.ones_like(loss[0])
    grad = operator("_backward")(upstream, x, y, weight, None, *options)
    assert declined == (["grad"] if name in DECLINED else [])
    value, expected = multi_margin_loss_and_grad(
        x, y, p=2, weight=weight, reduction="sum", axis=axis, backend="generic"
    )
    torch.testing.assert_close((loss[0], grad), (value, expected))
    assert grad.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_mask_that_is_written(declined, dtype):
    x, y, _ = batch(dtype, (1100, 1001))
    options = 1.0, 1.0, "mean", None, 1
    loss, mask = operator("")(x, y, None, *options, True)
    twin, twins_mask = operator("_in_python")(x, y, None, *options, True)
    size = engine.native.bits_size(x, (*options, "nan"))
    assert same(loss, twin)
    assert mask.shape == twins_mask.shape
    assert mask[-1] == twins_mask[-1] != 0
    assert torch.equal(mask[:size], twins_mask[:size])
    declined.clear()
    grads = [
        operator("_backward")(torch.tensor(2.0, dtype=dtype), x, y, None, one, *options)
        for one in (None, mask, mask[:-1], torch.zeros_like(mask))
    ]
    assert declined == []
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    mask[:size] = 0  # the scores are not read
    grad = operator("_backward")(torch.tensor(2.0, dtype=dtype), x, y, None, mask, *options)
    assert not grad.any()


def test_what_is_declined_goes_to_the_twin(declined):
    x, y, _ = batch(torch.float32)
    arguments = None, 1.0, 1.0, "mean", None, 1, False
    x.untyped_storage().resize_(8)
    with pytest.raises(RuntimeError, match="input is a tensor whose storage was freed or shrunk"):
        torch.ops.mml_arrayapi.multi_margin_loss.default(x, y, *arguments[:-1], "nan", False)
    with pytest.raises(RuntimeError, match="graph_multi_margin_loss_in_python failed"):
        operator("")(x, y, *arguments)
    assert declined == ["loss", "loss"]
    wide = torch.zeros((1,) * 17 + (3,), dtype=torch.float32)  # more axes than the kernels take
    loss = operator("")(wide, torch.zeros((1,) * 17, dtype=torch.int64), *arguments[:5], 17, False)
    torch.testing.assert_close(loss[0], torch.tensor(2 / 3))


def test_values_behind_a_sign_or_none(declined):
    x, y, _ = batch(torch.float32)
    upstream = torch.complex(torch.zeros(7), -torch.ones(7)).conj().imag  # the bits say -1
    options = 2.0, 1.0, "none", None, 1
    grad = operator("_backward")(upstream, x, y, None, None, *options)
    assert torch.equal(grad, operator("_backward")(torch.ones(7), x, y, None, None, *options))
    none = torch._efficientzerotensor(7)
    assert not operator("_backward")(none, x, y, None, None, *options).any()


def test_float64_sums_that_overflow():
    x = torch.tensor([[0.0, 1.7e308, 1.7e308]], dtype=torch.float64)
    loss, _ = operator("")(x, torch.tensor([0]), None, 1.0, 1.0, "mean", None, 1, False)
    assert loss.item() == pytest.approx(1.7e308 / 3 * 2)


@pytest.mark.parametrize("name", ["transposed", "every second row"])
def test_nothing_is_kept(declined, name):
    change = {**LAYOUTS, **DECLINED}[name][2]
    x, y, weight = batch(torch.float32)
    gone = []
    for _ in range(3):
        arrays = [change(x.clone()), y.clone(), weight.clone()]
        made = operator("")(*arrays, 1.0, 1.0, "mean", 2, 1, True)
        upstream = torch.ones(())
        grad = operator("_backward")(upstream, *arrays, made[1], 1.0, 1.0, "mean", 2, 1)
        kept = [StorageWeakRef(t.untyped_storage()) for t in (*arrays, *made, grad, upstream)]
        del arrays, made, upstream, grad
        gone += [one.expired() for one in kept]
    assert declined == (["grad"] * 3 if name in DECLINED else [])
    assert all(gone)
    assert len(gone) == 21


def test_from_many_threads(declined):
    x, y, _ = batch(torch.float32, (6000, 100))
    arguments = x, y, None, 1.0, 1.0, "mean", None, 1, False
    expected, start = operator("")(*arguments)[0], threading.Barrier(8)

    def work():
        start.wait()
        return [torch.equal(operator("")(*arguments)[0], expected) for _ in range(20)]

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work) for _ in range(8)]:
            assert all(future.result(60))
    assert declined == []


def test_an_invalid_number_of_threads_is_told_of(declined, monkeypatch):
    monkeypatch.setenv("MML_ARRAYAPI_NUM_THREADS", "none")
    x, y, _ = batch(torch.float32, (6000, 100))
    with pytest.raises(RuntimeError, match="graph_multi_margin_loss_in_python failed"):
        operator("")(x, y, None, 1.0, 1.0, "mean", None, 1, False)
    assert declined == ["loss"]


def test_an_old_pytorch_has_no_such_operators():
    assert engine.native.connect_pytorch(lambda _: None) is False
