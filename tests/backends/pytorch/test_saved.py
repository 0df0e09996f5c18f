"""What autograd hands back for the backward pass is looked at again before its memory is used."""

import pytest

from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad

torch = pytest.importorskip("torch")
LARGE = (1100, 1000)  # from 2**20 scores on the mask is kept
SHAPES_AND_P = pytest.mark.parametrize(
    ("shape", "p"), [((6, 5), 1), ((6, 5), 2), (LARGE, 1)], ids=["p=1", "p=2", "with a mask"]
)
P = pytest.mark.parametrize("p", [1, 2])


def batch(shape, dtype=torch.float32):
    draw = torch.Generator().manual_seed(20261125)
    scores = torch.randn(shape, generator=draw, dtype=dtype)
    return (
        scores,
        torch.randint(shape[1], shape[:1], generator=draw),
        torch.rand(shape[1], generator=draw),
    )


def expected(scores, target, upstream=None, **options):
    return multi_margin_loss_and_grad(
        scores, target, backend="generic", grad_output=upstream, **options
    )[1]


@SHAPES_AND_P
@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda t: t.t().contiguous() if t.ndim == 2 else t, lambda t: t.t() if t.ndim == 2 else t),
        (lambda t: t.repeat_interleave(2, -1), lambda t: t[..., ::2]),
        (lambda t: t.numpy().copy(), torch.from_numpy),
        (lambda t: t.clone(), lambda t: torch.nn.Parameter(t, requires_grad=False)),
        (lambda t: -t, lambda t: torch._neg_view(t)),
    ],
    ids=["transposed", "strided", "through NumPy", "another class", "negated twice"],
)
def test_hooks_that_change_the_memory(shape, p, pack, unpack):
    scores, target, weight = batch(shape)
    x = scores.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: pack(t.detach()), unpack):
        loss = multi_margin_loss(x, target, p=p, weight=weight)
    loss.backward()
    torch.testing.assert_close(x.grad, expected(scores, target, p=p, weight=weight))


@SHAPES_AND_P
def test_hooks_that_pack_to_half(shape, p):
    scores, target, weight = batch(shape)
    x = scores.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.half(), lambda t: t):
        loss = multi_margin_loss(x, target, p=p, weight=weight)
    loss.backward()
    assert x.grad.dtype == torch.float32
    # Half's rounding moves scores across the kink here and there; for p = 1 that is a whole step.
    wrong = (x.grad - expected(scores, target, p=p, weight=weight)).abs() > 2e-3 / shape[1]
    assert wrong.float().mean() < 2e-3


@SHAPES_AND_P
def test_hooks_that_move_to_another_device(shape, p):
    # The meta device keeps no values: what it stands for here is kept beside it.
    scores, target, weight = batch(shape)
    options = {"p": p, "weight": weight}
    wanted = expected(scores, target, **options)
    kept = []

    def pack(tensor):
        kept.append(tensor.detach().clone())
        return len(kept) - 1, tensor.to("meta")

    hooks = torch.autograd.graph.saved_tensors_hooks
    for context in (
        hooks(pack, lambda packed: kept[packed[0]]),
        torch.autograd.graph.save_on_cpu(),
        torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    ):
        x = scores.clone().requires_grad_()
        with context:
            loss = multi_margin_loss(x, target, **options)
        loss.backward()
        torch.testing.assert_close(x.grad, wanted)
    for lost in kept:  # one comes back without its values: never a plausible number
        x = scores.clone().requires_grad_()
        with hooks(lambda t, like=lost: t.to("meta") if t.shape == like.shape else t, lambda t: t):
            loss = multi_margin_loss(x, target, **options)
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            loss.backward()


@P
def test_what_the_second_derivative_saves_comes_back_from_another_device(p):
    scores, target, weight = batch((6, 5), torch.float64)
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, weight=weight)
    upstream = torch.ones((), dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to("meta"), lambda t: t):
        (grad,) = torch.autograd.grad(loss, x, upstream, create_graph=True)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        grad.sum().backward()


@P
def test_hooks_that_swap_to_disk(tmp_path, p):
    def pack(tensor):
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.pt"
        torch.save(tensor, path)
        return path

    scores, target, _ = batch((6, 5))
    x = scores.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        pack, lambda path: torch.load(path, weights_only=True)
    ):
        loss = multi_margin_loss(x, target, p=p)
    loss.backward()
    torch.testing.assert_close(x.grad, expected(scores, target, p=p))


@SHAPES_AND_P
def test_data_of_another_shape(shape, p):
    scores, target, _ = batch(shape)
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p)
    x.data = torch.zeros(2, 3)
    with pytest.raises(
        RuntimeError,
        match=rf"input had shape \({shape[0]}, {shape[1]}\) when the loss was computed, .* shape \(2, 3\)",
    ):
        loss.backward()


@SHAPES_AND_P
def test_data_of_another_layout_and_type(shape, p):
    scores, target, _ = batch(shape)
    for other in (scores.t().contiguous().t(), scores.double(), scores[:, :1].expand(shape)):
        x = scores.clone().requires_grad_()
        loss = multi_margin_loss(x, target, p=p)
        x.data = other
        loss.backward()
        if p == 2 or other.stride(1):  # for p = 1 the gradient may be that of the old scores
            torch.testing.assert_close(x.grad.float(), expected(other.float(), target, p=p))


@SHAPES_AND_P
@pytest.mark.parametrize("name", ["target", "weight"])
def test_a_target_or_weight_that_shrinks(shape, p, name):
    scores, target, weight = batch(shape)
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, weight=weight)
    tensor = {"target": target, "weight": weight}[name]
    tensor.data = tensor[:2].clone()
    with pytest.raises(RuntimeError, match=f"{name} had shape"):
        loss.backward()


@P
def test_storage_that_is_freed(p):
    scores, target, _ = batch((6, 5))
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, reduction="sum")
    x.untyped_storage().resize_(0)
    x.untyped_storage().resize_(120)
    x.data.copy_(scores)
    loss.backward()
    torch.testing.assert_close(x.grad, expected(scores, target, p=p, reduction="sum"))


def test_changes_in_place_are_errors():
    scores, target, _ = batch((6, 5))
    x = (scores.requires_grad_() * 1).contiguous()
    loss = multi_margin_loss(x, target)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


UPSTREAM = {
    "negated": lambda g: torch._neg_view(-g),
    "conjugate": lambda g: torch.complex(torch.zeros_like(g), -g).conj().imag,
    "strided": lambda g: torch.stack([g, g * 0], -1)[..., 0],
    "double": lambda g: g.double(),
    "half": lambda g: g.half(),
    "Parameter": lambda g: torch.nn.Parameter(g, requires_grad=False),
}


@SHAPES_AND_P
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("make", UPSTREAM.values(), ids=UPSTREAM)
def test_upstream_gradients(shape, p, reduction, make):
    scores, target, _ = batch(shape)
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, reduction=reduction)
    upstream = torch.full(loss.shape, 2.0) + torch.arange(loss.numel()).reshape(loss.shape) % 3
    wanted = expected(scores, target, upstream, p=p, reduction=reduction)
    given = make(upstream)

    # The engine would convert the dtype of a gradient that it is given: an own Function doesn't.
    class Upstream(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, _):
            return given

    Upstream.apply(loss).backward(torch.ones_like(loss))
    torch.testing.assert_close(x.grad, wanted)
    explicit = multi_margin_loss_and_grad(
        scores, target, p=p, reduction=reduction, grad_output=given
    )[1]
    torch.testing.assert_close(explicit, wanted)


@SHAPES_AND_P
def test_an_expanded_upstream_gradient(shape, p):
    scores, target, _ = batch(shape)
    x = scores.clone().requires_grad_()
    multi_margin_loss(x, target, p=p, reduction="none").sum().backward()
    torch.testing.assert_close(x.grad, expected(scores, target, p=p, reduction="sum"))


@P
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_an_upstream_gradient_of_zeros_without_memory(p, reduction):
    scores, target, _ = batch((6, 5))
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, reduction=reduction)
    (grad,) = torch.autograd.grad(loss, x, torch._efficientzerotensor(loss.shape))
    assert grad.tolist() == torch.zeros(6, 5).tolist()
    explicit = multi_margin_loss_and_grad(
        scores, target, p=p, reduction=reduction, grad_output=torch._efficientzerotensor(loss.shape)
    )[1]
    assert explicit.tolist() == torch.zeros(6, 5).tolist()


@P
@pytest.mark.parametrize("name", ["input", "target", "weight"])
def test_arguments_that_are_views_of_negated_memory_or_zeros(p, name):
    scores, target, weight = batch((6, 5))
    for make in (
        lambda t: torch._neg_view(-t),
        lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    ):
        arguments = {"input": scores, "target": target, "weight": weight}
        arguments[name] = make(arguments[name])
        plain = {key: value + 0 for key, value in arguments.items()}
        for options in ({}, {"backend": "torch-cpu"}, {"reduction": "none"}):
            if options.get("backend"):
                pytest.importorskip("mml_arrayapi.backends.cpu")
            torch.testing.assert_close(
                multi_margin_loss(**arguments, p=p, **options),
                multi_margin_loss(**plain, p=p)
                if options.get("reduction") is None
                else multi_margin_loss(**plain, p=p, reduction="none"),
            )
        torch.testing.assert_close(
            multi_margin_loss_and_grad(**arguments, p=p), multi_margin_loss_and_grad(**plain, p=p)
        )


@P
def test_gradients_in_batches(p):
    scores, target, _ = batch((6, 5))
    x = scores.clone().requires_grad_()
    loss = multi_margin_loss(x, target, p=p, reduction="none")
    (grads,) = torch.autograd.grad(loss, x, torch.eye(6), is_grads_batched=True)
    for row, grad in enumerate(grads):
        torch.testing.assert_close(
            grad, expected(scores, target, torch.eye(6)[row], p=p, reduction="none")
        )


def test_no_gradient_comes_back():
    scores, target, _ = batch((6, 5))
    x = scores.requires_grad_()

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, _):
            return None

    Nothing.apply(multi_margin_loss(x, target)).backward()
    assert x.grad is None
