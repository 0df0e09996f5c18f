"""The GPU kernels on a GPU. Skipped, by name, where there is none."""

import contextlib
import threading

import numpy as np
import pytest

from mml_arrayapi import InvalidTargetError, explain, multi_margin_loss, multi_margin_loss_and_grad

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("no CUDA device for PyTorch", allow_module_level=True)

DEVICE = "cuda:0"
NAME = "torch-cuda"
TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# Tiles, rows and whole blocks; multiples of 16 bytes, and not.
SHAPES = [
    (1000, 1),
    (3000, 10),
    (777, 31),
    (65, 32),
    (300, 100),
    (129, 1001),
    (40, 4099),
    (7, 40007),
]


def random(rows, classes, dtype=torch.float32, seed=0):
    """Scores that are multiples of 1/8: differences are exact, so sums and powers are compared."""
    draw = np.random.default_rng(seed)
    scores = torch.tensor(np.round(draw.normal(size=(rows, classes)) * 16) / 8, dtype=dtype)
    target = torch.tensor(draw.integers(0, classes, rows))
    weight = torch.tensor(draw.uniform(0.5, 2, classes).astype(np.float32))
    return scores, target, weight


def on(device, tensors):
    return tuple(tensor.to(device) for tensor in tensors)


def expected(scores, target, upstream=None, **options):
    """What the generic implementation says in float64 on the CPU, rounded to the scores' dtype."""
    if options.get("weight") is not None:
        options["weight"] = options["weight"].double()
    loss, grad = multi_margin_loss_and_grad(
        scores.double(), target, backend="generic", grad_output=upstream, **options
    )
    return loss.to(scores.dtype), grad.to(scores.dtype)


def close(got, wanted):
    rtol = TOLERANCE[wanted.dtype]
    smallest = torch.finfo(wanted.dtype).smallest_normal
    torch.testing.assert_close(
        got.cpu(), wanted, rtol=rtol, atol=smallest + 1e-30, equal_nan=True, check_device=False
    )


@pytest.mark.parametrize("p", [1, 2, 1.5, 3])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_and_gradients(dtype, p):
    for i, (rows, classes) in enumerate(SHAPES):
        scores, target, weight = random(rows, classes, dtype, seed=i)
        options = {"p": p, "margin": 0.5, "reduction": ("mean", "none", "sum")[i % 3]}
        x, y, w = on(DEVICE, (scores, target, weight))
        assert explain(x, y, weight=w, **options).kernel == NAME
        shape = (rows,) if options["reduction"] == "none" else ()
        upstream = torch.tensor(np.random.default_rng(i).uniform(1, 2, shape), dtype=dtype)
        loss, grad = expected(scores, target, upstream.double(), weight=weight, **options)
        value, gradient = multi_margin_loss_and_grad(
            x, y, weight=w, grad_output=upstream.to(DEVICE), **options
        )
        close(value, loss)
        close(gradient, grad)
        x.requires_grad_()
        value = multi_margin_loss(x, y, weight=w, **options)
        value.backward(upstream.to(DEVICE))
        close(value.detach(), loss)
        close(x.grad, grad)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("kind", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "uint64"])
def test_targets_of_every_width(kind, p):
    scores, target, _ = random(50, 100)
    loss, grad = expected(scores, target, p=p)
    x, y = on(DEVICE, (scores, target))
    got = multi_margin_loss_and_grad(x, y.to(getattr(torch, kind)), p=p)
    close(got[0], loss)
    close(got[1], grad)


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("skip", [0, 1, 3])
@pytest.mark.parametrize("classes", [10, 100, 1001, 5000])
def test_rows_that_are_strided_or_not_aligned(classes, skip, p):
    scores, target, _ = random(33, classes)
    wide = torch.full((33, classes + 5), float("nan"), device=DEVICE)
    x = wide[:, skip : skip + classes]
    x.copy_(scores)
    loss, grad = expected(scores, target, p=p)
    y = target.to(DEVICE)
    close(multi_margin_loss_and_grad(x, y, p=p)[1], grad)
    leaf = x.detach().requires_grad_()
    value = multi_margin_loss(leaf, y, p=p)
    value.backward()
    close(value.detach(), loss)
    close(leaf.grad, grad)


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("classes", [10, 1000, 5000])
def test_nan_infinities_and_targets_out_of_range(classes, p):
    scores, target, _ = random(12, classes)
    scores[1, 3], scores[2, 4], scores[3, 5] = float("nan"), float("inf"), float("-inf")
    scores[4, target[4]] = float("nan")
    scores[5, target[5]] = float("inf")
    target[7], target[8] = -1, 2**32
    loss, grad = expected(scores, target, p=p, reduction="none", check_target="nan")
    x, y = on(DEVICE, (scores, target))
    options = {"p": p, "reduction": "none", "check_target": "nan"}
    value, gradient = multi_margin_loss_and_grad(x, y, **options)
    close(value, loss)
    close(gradient, grad)
    x.requires_grad_()
    multi_margin_loss(x, y, **options).sum().backward()
    close(x.grad, grad)
    with pytest.raises(InvalidTargetError, match=r"target\[7\] is -1, but input has"):
        multi_margin_loss(x, y, p=p, check_target="raise")
    assert torch.ones(3, device=DEVICE).sum().item() == 3  # the context lives


@pytest.mark.parametrize("p", [1, 2])
def test_nothing_waits_for_the_device(p):
    scores, target, weight = on(DEVICE, random(4000, 100))
    scores.requires_grad_()

    def step():
        multi_margin_loss(scores, target, p=p, weight=weight).backward()
        multi_margin_loss_and_grad(scores.detach(), target, p=p, reduction="none")

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError, match="synchroniz"):  # it would have been seen
            scores[0, 0].item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("p", [1, 2])
def test_the_current_stream_is_used(p):
    scores, target, _ = random(4000, 1000)
    x, y = on(DEVICE, (torch.zeros_like(scores), target))
    loss, grad = expected(scores, target, p=p)
    multi_margin_loss_and_grad(x, y, p=p)
    stream = torch.cuda.Stream()
    given = scores.to(DEVICE)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # whoever runs on another stream sees zeros
        x.copy_(given)
        value, gradient = multi_margin_loss_and_grad(x, y, p=p)
    stream.synchronize()
    close(value, loss)
    close(gradient, grad)


def test_a_thread_that_has_not_touched_cuda_yet():
    scores, target, _ = random(500, 1000)
    loss, grad = expected(scores, target)
    x, y = on(DEVICE, (scores, target))
    got = []
    for _ in range(2):  # the second finds its memory in the allocator's cache
        thread = threading.Thread(target=lambda: got.append(multi_margin_loss_and_grad(x, y)))
        thread.start()
        thread.join()
        close(got[-1][0], loss)
        close(got[-1][1], grad)
        del got[:]


@pytest.mark.parametrize("p", [1, 2])
def test_captured_in_a_graph(p):
    x = torch.zeros(500, 1000, device=DEVICE, requires_grad=True)
    y = torch.zeros(500, dtype=torch.int64, device=DEVICE)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            x.grad = None
            multi_margin_loss(x, y, p=p).backward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    x.grad = None
    with torch.cuda.graph(graph):
        value = multi_margin_loss(x, y, p=p)
        value.backward()
    for seed in (1, 2):
        scores, target, _ = random(500, 1000, seed=seed)
        with torch.no_grad():
            x.copy_(scores)
        y.copy_(target)
        graph.replay()
        loss, grad = expected(scores, target, p=p)
        close(value.detach(), loss)
        close(x.grad, grad)


def test_several_devices():
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    scores, target, _ = random(500, 1000)
    loss, grad = expected(scores, target)
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        x, y = on(device, (scores, target))
        value, gradient = multi_margin_loss_and_grad(x, y)
        assert value.device == torch.device(device)
        close(value, loss)
        close(gradient, grad)


def test_half_precision_scale_at_2_to_the_26_elements():
    # PyTorch's own 1 / (N * C) is 0 in half precision from 2**25 on.
    x = torch.zeros(2**16, 2**10, dtype=torch.float16, device=DEVICE, requires_grad=True)
    y = torch.zeros(2**16, dtype=torch.int64, device=DEVICE)
    multi_margin_loss(x, y).backward(torch.tensor(2.0**15, dtype=torch.float16, device=DEVICE))
    assert x.grad[5, 1].item() == 2.0**-11
    assert x.grad[5, 0].item() == pytest.approx(-1023 * 2.0**-11, rel=1e-3)


@pytest.mark.parametrize("p", [1, 2])
def test_more_than_2_to_the_31_elements(p):
    free, _ = torch.cuda.mem_get_info()
    rows, classes = 2_200_000, 1000
    if free < 20e9:
        pytest.skip(f"{free / 1e9:.0f} GB of GPU memory are free, 20 are needed")
    scores, target, _ = random(50, classes, torch.bfloat16)
    x = torch.zeros(rows, classes, dtype=torch.bfloat16, device=DEVICE)
    y = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    x[-50:], y[-50:] = scores.to(DEVICE), target.to(DEVICE)
    loss, grad = expected(scores, target, reduction="none", p=p)
    x.requires_grad_()
    value = multi_margin_loss(x, y, reduction="none", p=p)
    value.backward(torch.ones_like(value))
    close(value[-50:].detach(), loss)
    close(x.grad[-50:], grad)


@pytest.mark.parametrize("p", [1, 2])
def test_results_are_the_same_bits_every_time(p):
    x, y, w = on(DEVICE, random(20000, 100))
    x = x + torch.rand_like(x)
    first = multi_margin_loss_and_grad(x, y, weight=w, p=p)
    for _ in range(10):
        again = multi_margin_loss_and_grad(x, y, weight=w, p=p)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("p", [1, 2])
def test_compiled_whole(p):
    scores, target, _ = random(300, 1000)
    loss, grad = expected(scores, target, p=p)
    x, y = on(DEVICE, (scores, target))
    x.requires_grad_()
    with warnings_ignored():
        value = torch.compile(multi_margin_loss, fullgraph=True)(x, y, p=p)
        value.backward()
    close(value.detach(), loss)
    close(x.grad, grad)


def test_derivatives_of_the_second_order_and_transforms():
    scores, target, _ = random(4, 6, torch.float64)
    x, y = on(DEVICE, (scores, target))
    x.requires_grad_()

    def loss(s):
        return multi_margin_loss(s, y, p=2)

    assert torch.autograd.gradgradcheck(loss, x)
    hessian = torch.func.hessian(loss)(x.detach())
    assert hessian.shape == (4, 6, 4, 6)
    each = torch.func.vmap(lambda s, t: multi_margin_loss(s, t))(x.detach(), y)
    close(each.mean(), expected(scores, target)[0])


def test_autocast():
    x, y, _ = on(DEVICE, random(40, 100, torch.bfloat16))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert multi_margin_loss(x.requires_grad_(), y).dtype == torch.float32
        assert multi_margin_loss(x.float(), y).dtype == torch.float32


# How the benchmark calls, with fewer rows where the rows are many.
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize(
    ("rows", "classes", "dtype"),
    [
        (4096, 1000, torch.float32),
        (64, 128256, torch.bfloat16),
        (100_003, 10, torch.float32),
        (512, 512, torch.float32),
        (8, 1_000_000, torch.float32),
        (1, 10_000_000, torch.float32),
    ],
    ids=str,
)
def test_the_calls_that_users_write_twice(rows, classes, dtype, p):
    scores, target, _ = random(rows, classes, dtype)
    loss, grad = expected(scores, target, p=p)
    x, y = on(DEVICE, (scores, target))
    x.requires_grad_()
    assert explain(x, y, p=p).kernel == NAME
    for _ in range(2):
        value = multi_margin_loss(x, y, p=p)
        (gradient,) = torch.autograd.grad(value, x)
        close(value.detach(), loss)
        close(gradient, grad)


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(("rows", "classes"), [(1000, 10), (300, 100), (40, 5000), (3, 100_000)])
def test_ignored_rows(rows, classes, reduction, p):
    scores, target, weight = random(rows, classes)
    target[::3] = -100
    scores[0] = float("nan")
    options = {"p": p, "reduction": reduction, "ignore_index": -100}
    loss, grad = expected(scores, target, weight=weight, **options)
    x, y, w = on(DEVICE, (scores, target, weight))
    assert explain(x, y, weight=w, **options).kernel == NAME
    value, gradient = multi_margin_loss_and_grad(x, y, weight=w, **options)
    close(value, loss)
    close(gradient, grad)
    x.requires_grad_()
    multi_margin_loss(x, y, weight=w, **options).sum().backward()
    close(x.grad, grad)
    y.fill_(-100)
    nothing = multi_margin_loss(x.detach(), y, **options)
    assert nothing.isnan() if reduction == "mean" else not nothing.any()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("rows", "classes"), [(50, 16), (20, 100), (9, 5000), (2, 100_000)])
def test_a_finite_answer_stays_finite(rows, classes, dtype, reduction):
    scores = torch.zeros(rows, classes, dtype=dtype)
    scores[:, 0] = -torch.finfo(dtype).max / 3
    target = torch.zeros(rows, dtype=torch.int64)
    value, gradient = multi_margin_loss_and_grad(*on(DEVICE, (scores, target)), reduction=reduction)
    one = float(-scores[0, 0]) * ((classes - 1) / classes)
    total = one * rows if one <= torch.finfo(dtype).max / rows else float("inf")
    wanted = total if reduction == "sum" else one
    assert value.cpu().double().numpy() == pytest.approx(wanted, rel=1e-6)
    scale = 1 / classes / (rows if reduction == "mean" else 1)
    torch.testing.assert_close(gradient[:, 1].cpu(), torch.full((rows,), scale, dtype=dtype))


@pytest.mark.parametrize("classes", [10, 100, 5000])
def test_a_row_that_is_nan_by_its_weight_has_a_gradient_of_nan(classes):
    scores, target, weight = random(5, classes)
    weight[target[2]] = float("nan")
    rows = [bool(t == target[2]) for t in target]
    x, y, w = on(DEVICE, (scores.requires_grad_(), target, weight))
    x = x.detach().requires_grad_()
    multi_margin_loss(x, y, weight=w, reduction="none").sum().backward()
    assert x.grad.isnan().all(dim=1).tolist() == rows
    assert x.grad.isnan().any(dim=1).tolist() == rows


@pytest.mark.parametrize("margin", [1e39, -1e39])
def test_a_margin_beyond_float32_is_infinite(margin):
    x, y, _ = on(DEVICE, random(5, 40))
    loss = multi_margin_loss(x, y, margin=margin)
    assert loss.item() == max(margin * float("inf"), 0)


def test_device_contexts_leave_the_kernel_on():
    x, y, _ = on(DEVICE, random(5, 40))
    with torch.device("cuda"):
        assert explain(x, y).kernel == NAME


@contextlib.contextmanager
def warnings_ignored():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cupy():
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if cupy.cuda.runtime.getDeviceCount() == 0:
        pytest.skip("no CUDA device for CuPy")
    return cupy


@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_cupy_values_and_gradients(cupy, dtype, p):
    for i, (rows, classes) in enumerate(SHAPES):
        scores, target, weight = random(rows, classes, dtype, seed=i)
        options = {"p": p, "margin": 0.5, "reduction": ("mean", "none", "sum")[i % 3]}
        x, y, w = (cupy.asarray(tensor.numpy()) for tensor in (scores, target, weight))
        assert explain(x, y, weight=w, **options).kernel == "cupy-cuda"
        loss, grad = expected(scores, target, weight=weight, **options)
        value, gradient = multi_margin_loss_and_grad(x, y, weight=w, **options)
        close(torch.tensor(cupy.asnumpy(value)), loss)
        close(torch.tensor(cupy.asnumpy(gradient)), grad)
        close(torch.tensor(cupy.asnumpy(multi_margin_loss(x, y, weight=w, **options))), loss)


def test_subnormal_numbers_are_the_same_for_cupy_and_pytorch(cupy):
    tiny = torch.tensor([[1e-41, 0.0, 2e-41, -1e-41] * 10] * 3)
    y = torch.zeros(3, dtype=torch.int64)
    x, target = on(DEVICE, (tiny, y))
    loss, grad = multi_margin_loss_and_grad(x, target, margin=0.0, reduction="none")
    other = multi_margin_loss_and_grad(
        cupy.asarray(tiny.numpy()), cupy.asarray(y.numpy()), margin=0.0, reduction="none"
    )
    assert loss.cpu()[0] > 0
    assert torch.equal(torch.tensor(cupy.asnumpy(other[0])), loss.cpu())
    assert torch.equal(torch.tensor(cupy.asnumpy(other[1])), grad.cpu())


@pytest.mark.parametrize(("rows", "classes"), [(1000, 10), (300, 100), (3, 100_000)])
def test_cupy_ignored_rows(cupy, rows, classes):
    scores, target, _ = random(rows, classes)
    target[::3] = -100
    loss, grad = expected(scores, target, ignore_index=-100)
    x, y = (cupy.asarray(tensor.numpy()) for tensor in (scores, target))
    assert explain(x, y, ignore_index=-100).kernel == "cupy-cuda"
    value, gradient = multi_margin_loss_and_grad(x, y, ignore_index=-100)
    close(torch.tensor(cupy.asnumpy(value)), loss)
    close(torch.tensor(cupy.asnumpy(gradient)), grad)


def test_cupy_layouts_streams_and_targets_out_of_range(cupy):
    scores, target, _ = random(33, 101)
    loss, grad = expected(scores, target)
    wide = cupy.full((33, 110), cupy.nan, cupy.float32)
    wide[:, 3:104] = cupy.asarray(scores.numpy())
    y = cupy.asarray(target.numpy())
    with cupy.cuda.Stream(non_blocking=True) as stream:
        value, gradient = multi_margin_loss_and_grad(wide[:, 3:104], y)
        stream.synchronize()
    close(torch.tensor(cupy.asnumpy(value)), loss)
    close(torch.tensor(cupy.asnumpy(gradient)), grad)
    y[5] = 101
    assert bool(cupy.isnan(multi_margin_loss(wide[:, 3:104], y)))
    with pytest.raises(InvalidTargetError, match=r"target\[5\] is 101"):
        multi_margin_loss(wide[:, 3:104], y, check_target="raise")
    assert int(cupy.ones(3).sum()) == 3
