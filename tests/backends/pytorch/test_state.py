"""The private names of PyTorch that are used: each is there, and means what it is taken for."""

import ast
import contextlib
import importlib
import itertools
import re
import warnings
from pathlib import Path

import pytest

import mml_arrayapi
from tests.tree import run_python

torch = pytest.importorskip("torch")
# Not importorskip(): a name that PyTorch has removed must fail, not skip.
state = importlib.import_module("mml_arrayapi.backends.pytorch.state")
func = torch.func
fwAD = torch.autograd.forward_ad


class Quiet(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class QuietDispatch(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_going_on():
    assert state.ordinary()
    with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"):
        assert state.ordinary()


def test_device_contexts_are_harmless():
    with torch.device("meta"), torch.device("cpu"):
        assert torch._C._len_torch_function_stack() == 2
        assert state.ordinary()
    torch.set_default_device("cpu")
    try:
        assert state.ordinary()
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("mode", [Quiet, QuietDispatch, torch._subclasses.FakeTensorMode])
def test_modes_are_seen(mode):
    with mode():
        assert not state.ordinary()
    with torch.device("cpu"), mode():
        assert not state.ordinary()
    assert state.ordinary()


def seen_within(transform, *arguments):
    seen = []

    def look(x):
        seen.append((state.ordinary(), state.forward_levels(), state.why_generic()))
        return x.sum()

    transform(look, *arguments)
    return seen


def test_transforms_are_seen():
    x = torch.ones(2, 3)
    assert seen_within(lambda f: func.grad(f)(x)) == [(False, 0, None)]
    assert seen_within(lambda f: func.vmap(f)(x)) == [(False, 0, None)]
    ((plain, forward, why),) = seen_within(lambda f: func.jvp(f, (x,), (x,)))
    assert not plain
    assert forward == 1
    assert "forward-mode" in why
    with fwAD.dual_level():
        assert not state.ordinary()
        assert state.forward_levels() == 1
    assert state.forward_levels() == 0
    nested = seen_within(lambda f: func.jvp(lambda x: func.jvp(f, (x,), (x,))[1], (x,), (x,)))
    assert nested[0][1] == 2


def test_the_stack_of_transforms_has_forward_mode():
    """Not only forward_ad's level, which a graph of Dynamo's leaves as it is."""
    stack, seen = torch._C._functorch.get_interpreter_stack, []

    @torch._dynamo.disable
    def look(x):
        seen.append([one.key() for one in stack() or ()])
        return x

    assert stack() is None
    func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    assert seen == [[torch._C._functorch.TransformType.Jvp]]


def test_compilers_are_seen():
    def look(x):
        return x + 1 if state.ordinary() else x - 1

    x = torch.zeros(3)
    assert look(x)[0] == 1
    torch.compiler.reset()
    assert torch.compile(look, fullgraph=True, backend="eager")(x)[0] == -1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_the_tracer_is_seen():
    seen = []

    def look(x):
        seen.append((state.ordinary(), state.why_generic()))
        return x + 1

    torch.jit.trace(look, torch.zeros(3), check_trace=False)
    assert seen == [(False, "torch.jit.trace is active, which records the generic implementation")]


class Mine(torch.Tensor):
    pass


def cut(base, size, view=lambda base: base):
    """Leave a view's storage so many bytes, of which it knows nothing."""
    base = base.clone()
    tensor = view(base)
    base.untyped_storage().resize_(size)
    return tensor


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(4, 5).as_subclass(Mine),
        lambda: torch.ones(4, 5).to_sparse(),
        lambda: torch._neg_view(torch.ones(4, 5)),
        lambda: torch.ones(4, 5, dtype=torch.complex64).conj().imag,
        lambda: torch._efficientzerotensor((4, 5)),
        lambda: torch._efficientzerotensor((4, 5))[1:],
        lambda: cut(torch.ones(4, 5), 40, lambda b: b[1:]),
        lambda: torch.nested.nested_tensor([torch.ones(5)]),
        lambda: [1.0],
        lambda: None,
    ],
    ids=["subclass", "sparse", "negated", "conjugate", "zeros", "part of zeros", "shrunk", "nested", "list",
         "None"],
)  # fmt: skip
def test_what_has_no_memory_to_read(make):
    assert not state.readable(make())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x,
        lambda x: torch.nn.Parameter(x),
        lambda x: x[1:, ::2],
        lambda x: x.T,
        lambda x: x[:0],
        lambda x: x[:1].expand(7, 5),
        lambda x: x[3, 4],
        lambda x: x.resolve_neg(),
    ],
)
def test_what_can_be_read(make):
    assert state.readable(make(torch.ones(4, 5)))


@pytest.fixture
def cpu():
    """The module of the CPU kernels."""
    module = importlib.import_module("mml_arrayapi.backends.pytorch.cpu")
    if module.native is None:
        pytest.skip("the kernels are not built")
    return module


ODD = {
    "subclass": lambda t: t.as_subclass(Mine),
    "sparse": lambda t: t.to_sparse(),
    "negated": torch._neg_view,
    "zeros": lambda t: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "part of zeros": lambda t: torch._efficientzerotensor((9, *t.shape), dtype=t.dtype)[8],
    "freed": lambda t: cut(t, 0),
    "shrunk": lambda t: cut(t, t.nbytes - 1),
    "shrunk behind an offset": lambda t: cut(torch.stack((t, t)), 2 * t.nbytes - 1, lambda b: b[1]),
    "shrunk and transposed": lambda t: cut(t.T.contiguous(), t.nbytes - 1, lambda b: b.T),
    "nested": lambda t: torch.nested.nested_tensor([t.float()]),
    "meta": lambda t: t.to("meta"),
    "list": lambda t: t.tolist(),
    "array": lambda t: t.numpy(),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*permute:UserWarning")
@pytest.mark.parametrize("odd", [*ODD, "4 bits"])
@pytest.mark.parametrize("place", ["input", "target", "weight", "grad", "upstream", "bits"])
def test_kernels_look_at_tensors_themselves(cpu, odd, place):
    options = 1.0, 1.0, "none", None, -1, "auto"
    size = cpu.native.row_bytes(torch.ones(4, 50), options) * 4
    tensors = {
        "input": torch.ones(4, 50), "target": torch.zeros(4, dtype=torch.int64),
        "weight": torch.ones(50), "grad": torch.ones(4, 50), "upstream": torch.ones(4),
        "bits": torch.zeros(size, dtype=torch.uint8),
    }  # fmt: skip

    def ran():
        x, y, weight, grad, upstream, bits = tensors.values()
        calls = (
            cpu.native.loss(x, y, weight, options, None if cpu._exchange else torch.ones(4), bits),
            cpu.native.grad(x, y, weight, options, grad, upstream, bits),
            cpu.native.loss_and_grad(
                x, y, weight, options, grad, upstream, None if cpu._exchange else torch.ones(4)
            ),
        )
        return [made is not None for made in calls]

    assert ran() == [True] * 3
    used = {"grad": (1, 2), "upstream": (1, 2), "bits": (0, 1)}.get(place, (0, 1, 2))
    if odd == "4 bits":
        if not hasattr(torch, "uint4") or place not in ("target", "bits"):
            pytest.skip("no integers of 4 bits")
        tensors[place] = tensors[place].to(torch.uint8).view(torch.uint4)
    else:
        tensors[place] = ODD[odd](tensors[place])
    assert ran() == [k not in used for k in range(3)]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.nn.Parameter(t, requires_grad=False),
        lambda t: torch.stack((t, t))[1],
        lambda t: t.T.contiguous().T,
        lambda t: torch.cat((t, t))[: len(t)],
        lambda t: torch._neg_view(torch._neg_view(t)),
        lambda t: torch._neg_view(-t).resolve_neg(),
    ],
)
@pytest.mark.filterwarnings("ignore:.*permute:UserWarning")
def test_kernels_read_ordinary_tensors(cpu, change):
    x, y, weight = torch.randn(4, 50), torch.arange(4), torch.rand(50)
    options = 1.0, 1.0, "none", None, -1, "auto"
    expected = mml_arrayapi.multi_margin_loss(x, y, weight=weight, reduction="none")
    out = None if cpu._exchange else torch.ones(4)
    made = cpu.native.loss(change(x), change(y), change(weight), options, out)
    assert torch.equal(made, expected)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0, 100])
def test_a_shrunk_storage_is_not_read_under_autocast(grad, dtype, size):
    x, y = torch.ones(40, 50, dtype=dtype, requires_grad=grad), torch.zeros(40, dtype=torch.int64)
    mml_arrayapi.multi_margin_loss(x, y)
    x.untyped_storage().resize_(size)
    told = "input must be a dense array, but is a tensor whose storage was freed or shrunk"
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match=told):
        mml_arrayapi.multi_margin_loss(x, y)


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", ["input", "target", "weight"])
def test_nested_tensors_are_told_of(place, grad):
    tensors = {
        "input": torch.ones(4, 50, requires_grad=grad),
        "target": torch.zeros(4, dtype=torch.int64),
        "weight": torch.ones(50),
    }
    mml_arrayapi.multi_margin_loss(**tensors)
    made = torch.nested.nested_tensor([tensors[place].detach()])
    tensors[place] = made.requires_grad_(grad and place == "input")
    if place == "input":
        tensors["target"] = tensors["target"][None]
    for call in (mml_arrayapi.multi_margin_loss, mml_arrayapi.multi_margin_loss_and_grad):
        with pytest.raises(TypeError, match=f"{place} must be"):
            call(**tensors)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("method", ["is_neg", "untyped_storage"])
def test_an_interrupt_while_a_tensor_is_read(monkeypatch, error, method):
    """Within ``torch.device(...)`` these methods go through Python, which looks for signals."""
    x, y = torch.ones(4, 50), torch.zeros(4, dtype=torch.int64)
    expected = mml_arrayapi.multi_margin_loss(x, y)
    original = torch.utils._device.DeviceContext.__torch_function__
    raised = []

    def interrupted(self, function, *arguments, **keywords):
        if function.__name__ == method and not raised:
            raised.append(function)
            raise error
        return original(self, function, *arguments, **keywords)

    monkeypatch.setattr(torch.utils._device.DeviceContext, "__torch_function__", interrupted)
    with torch.device("cpu"):
        with pytest.raises(error):
            mml_arrayapi.multi_margin_loss(x, y)
        assert torch.equal(mml_arrayapi.multi_margin_loss(x, y), expected)
    assert raised


def test_what_escaped_a_transform_is_not_read_when_it_comes_back():
    kept = []
    x, y = torch.ones(4, 50, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    loss = mml_arrayapi.multi_margin_loss(x, y, p=2)
    func.grad(lambda t: (kept.append(t), t.sum())[1])(x.detach())
    x.data = kept[0]
    with contextlib.suppress(NotImplementedError, RuntimeError):
        loss.backward()


def test_a_gradient_whose_storage_shrank_is_not_read():
    x, y = torch.ones(4, 50, requires_grad=True), torch.zeros(4, dtype=torch.int64)
    upstream = cut(torch.ones(4), 0)
    with pytest.raises(RuntimeError, match="grad_output is a tensor whose storage was freed"):
        mml_arrayapi.multi_margin_loss(x, y, reduction="none").backward(upstream)


def test_gradients_that_are_mapped():
    x = torch.ones(3, requires_grad=True)
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            seen.append((state.is_mapped(grad), state.readable(grad)))
            return grad

    y = Look.apply(x)
    torch.autograd.grad(y, x, torch.eye(3), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(3))
    assert seen == [(True, False), (False, True)]


def test_values_of_wrapped_tensors():
    seen = []

    def look(x):
        seen.append((state.value_access(x), None if state.is_mapped(x) else state.value_access(x)))
        return x.sum()

    x = torch.ones(2, 3)
    func.grad(look)(x)
    func.grad(func.grad(look))
    func.vmap(look)(x)
    func.vmap(func.grad(look))(x)
    assert [first for first, _ in seen] == ["host", "traced", "traced"]
    assert state.value_access(x.to("meta")) == "traced"
    with torch._subclasses.FakeTensorMode():
        assert state.value_access(torch.ones(2)) == "traced"


def test_values_within_grad():
    values = []

    def look(x):
        values.append(state.on_host(x).tolist())
        return (x * x).sum()

    func.grad(lambda x: func.grad(look)(x).sum())(torch.ones(3))
    assert values == [[1, 1, 1]]


def test_counting_beside_a_fake_tensor():
    mode = torch._subclasses.FakeTensorMode()
    fake = mode.from_tensor(torch.ones(3))
    assert type(state.arange(4, torch.int64, fake)) is type(fake)
    assert state.arange(4, torch.int64, torch.ones(3)).tolist() == [0, 1, 2, 3]


def test_kinds_of_tensors_are_named():
    x = torch.ones(2)
    assert state.why_not_kernel("input", x, "cpu") is None
    assert state.why_not_kernel("input", x, "cuda") == "input is on cpu, not on a CUDA device"
    fake = torch._subclasses.FakeTensorMode().from_tensor(x)
    assert state.why_not_kernel("input", fake, "cpu") is None
    mine = x.as_subclass(Mine)
    assert state.why_not_kernel("w", mine, "cpu") == "w is a Mine, a subclass of torch.Tensor"
    assert "layout torch.sparse_coo" in state.why_not_kernel("w", x.to_sparse(), "cpu")


def test_a_single_level_function_and_operators_below_autograd():
    # As the operators' Autograd kernels use them.
    library = torch.library.Library("mml_arrayapi_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    twice = torch.ops.mml_arrayapi_test.twice.default
    went = []

    class Twice(state.SingleLevelFunction):
        @staticmethod
        def forward(ctx, x):
            with state.below_autograd():
                return twice(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    def autograd(x):
        went.append("autograd")
        if torch.is_grad_enabled() and x.requires_grad:
            with state.single_level():
                return Twice.apply(x)
        with state.below_autograd():
            return twice(x)

    library.impl("twice", lambda x: went.append("kernel") or x * 2, "CPU")
    library.impl("twice", autograd, "Autograd")
    try:
        x = torch.ones(3, requires_grad=True)
        assert torch.autograd.grad(twice(x).sum(), x)[0].tolist() == [2, 2, 2]
        assert went == ["autograd", "kernel"]
        went.clear()
        assert func.grad(lambda x: twice(x).sum())(torch.ones(3)).tolist() == [2, 2, 2]
        assert went.count("kernel") == 1
    finally:
        library._destroy()


def test_the_deprecated_reductions():
    for size_average, reduce in itertools.product((None, False, True), repeat=2):
        if size_average is None and reduce is None:
            continue
        with pytest.warns(UserWarning, match="reduction="):
            wanted = torch.nn._reduction.legacy_get_string(size_average, reduce)
        with pytest.warns(UserWarning, match=f"reduction='{wanted}'"):
            assert state.reduction_name(size_average, reduce, "mean") == wanted
    with pytest.warns(UserWarning, match="elementwise_mean"):
        assert state.reduction_name(None, None, "elementwise_mean") == "mean"
    assert state.reduction_name(None, None, "sum") == "sum"


def test_the_name_of_the_current_stream():
    # A build without CUDA has no such function; the GPU's tests call it.
    if torch.version.cuda is None:
        assert not hasattr(torch._C, "_cuda_getCurrentRawStream")
    else:
        assert callable(torch._C._cuda_getCurrentRawStream)


def private_names(tree):
    """The names with an underscore that a module takes from PyTorch, or from any tensor."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from node.module.split(".")
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.Import):
            names = (name.name for name in node.names)
            yield from (
                part for name in names if name.startswith("torch") for part in name.split(".")
            )


def test_an_eager_call_does_not_import_the_compiler():
    code = """
import sys, torch
from mml_arrayapi.pytorch import MultiMarginLoss
scores = torch.eye(3).requires_grad_()
MultiMarginLoss()(scores, torch.arange(3)).backward()
print([name for name in ("torch._dynamo", "torch.distributed.nn") if name in sys.modules])
"""
    assert run_python(code) == "[]"


def test_private_names_stand_in_one_file():
    folder = Path(state.__file__).parent
    own = {"_replace"}  # of named tuples
    for path in [*folder.glob("*.py"), Path(mml_arrayapi.__file__).parent / "pytorch.py"]:
        tree = ast.parse(path.read_text("utf-8"))
        found = {name for name in private_names(tree) if re.match("_[^_]", name)} - own
        assert bool(found) == (path.name == "state.py"), (path, found)


@pytest.mark.parametrize(
    "code",
    ["import torch._C", "from torch import _C", "from torch._C import x", "x._base", "torch._C"],
)
def test_private_names_are_found(code):
    assert [name for name in private_names(ast.parse(code)) if name.startswith("_")]


def test_what_torch_compile_records():
    seen = []

    def backend(module, _):
        seen.append(state.is_recording())
        return module.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert seen == [True]
    assert not state.is_recording()


def test_functions_of_the_stable_c_interface():
    assert state.address_of("aoti_torch_get_dim")
    assert state.address_of("aoti_torch_no_such_function") is None


def test_tensors_of_compilers_are_recorded():
    from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode

    with FunctionalTensorMode():
        functional = FunctionalTensor.to_functional(torch.ones(2))
        assert state.why_not_kernel("input", functional, "cpu") is None
        assert state.value_access(functional) == "traced"


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_trainable_model_is_traced_and_saved(tmp_path, reduction):
    from mml_arrayapi.pytorch import MultiMarginLoss

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.loss = torch.nn.Linear(5, 5), MultiMarginLoss(reduction=reduction)

        def forward(self, x, y):
            return self.loss(self.layer(x), y)

    x, y, net = torch.randn(4, 5), torch.randint(5, (4,)), Net()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PyTorch's of torch.jit, and of sizes that become constants
        traced = torch.jit.trace(net, (x, y))
        torch.jit.save(traced, tmp_path / "net.pt")
        loaded = torch.jit.load(tmp_path / "net.pt")
    for made in (net, traced, loaded):
        made.zero_grad()
        made(x * 2, y).sum().backward()
    for one, *others in zip(
        net.parameters(), traced.parameters(), loaded.parameters(), strict=True
    ):
        for other in others:
            torch.testing.assert_close(other.grad, one.grad)
