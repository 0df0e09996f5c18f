"""The drop-in module and function: PyTorch's own samples, arguments, warnings and saved state."""

import copy
import inspect
import pickle
import warnings

import pytest

from mml_arrayapi import InvalidTargetError
from mml_arrayapi import multi_margin_loss as ours

torch = pytest.importorskip("torch")
mine = pytest.importorskip("mml_arrayapi.pytorch")
theirs = torch.nn


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(20261125)
    return torch.randn(6, 5, generator=draw), torch.randint(5, (6,), generator=draw)


def test_signatures():
    def of(function):
        parameters = inspect.signature(function).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert of(mine.MultiMarginLoss) == of(theirs.MultiMarginLoss)
    assert of(mine.multi_margin_loss) == of(theirs.functional.multi_margin_loss)


@pytest.mark.filterwarnings("ignore")  # importing PyTorch's test helpers warns
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pytorchs_own_module_samples(dtype, training):
    from torch.testing._internal.common_modules import module_db

    (info,) = (m for m in module_db if m.module_cls is theirs.MultiMarginLoss)
    samples = info.module_inputs_func(info, "cpu", dtype, requires_grad=True, training=training)
    assert len(samples) >= 7
    for sample in samples:
        made = sample.constructor_input
        criterion = mine.MultiMarginLoss(*made.args, **made.kwargs).train(training)
        reference = theirs.MultiMarginLoss(*made.args, **made.kwargs)
        x, target = sample.forward_input.args
        loss, expected = criterion(x, target), reference(x, target)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            loss, sample.reference_fn(criterion, x, target), check_dtype=False
        )
        grads = [torch.autograd.grad(value.sum(), x)[0] for value in (loss, expected)]
        torch.testing.assert_close(*grads)
        copies = (copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion)))
        for same in (*copies, criterion.double().to(dtype)):
            torch.testing.assert_close(same(x, target), expected)


@pytest.mark.filterwarnings("ignore")
def test_pytorchs_own_error_samples_are_errors():
    from torch.testing._internal.common_modules import module_db

    (info,) = (m for m in module_db if m.module_cls is theirs.MultiMarginLoss)
    make = info.module_error_inputs_func
    samples = make(info, "cpu", torch.float32, False, True) if make else []
    for sample in samples:
        inputs = sample.module_error_input
        with pytest.raises(ValueError, match=r"target must have input's shape"):
            mine.MultiMarginLoss()(*inputs.forward_input.args)


def test_positional_arguments(batch):
    x, target = batch
    weight = torch.rand(5)
    for arguments in ((), (2,), (1, 0.5), (2, 0.5, weight), (1, 1.0, weight, None, None, "none")):
        expected = theirs.functional.multi_margin_loss(x, target, *arguments)
        torch.testing.assert_close(mine.multi_margin_loss(x, target, *arguments), expected)
        torch.testing.assert_close(mine.MultiMarginLoss(*arguments)(x, target), expected)


@pytest.mark.parametrize("options", [{"size_average": False}, {"reduce": False}], ids=str)
def test_deprecated_arguments_within_a_graph(batch, options):
    def loss(x, target):
        return mine.multi_margin_loss(x, target, **options)

    torch.compiler.reset()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)(*batch)
    with pytest.warns(UserWarning, match="reduction="):
        torch.testing.assert_close(compiled, loss(*batch))


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_deprecated_arguments(batch, size_average, reduce):
    x, target = batch
    options = {"size_average": size_average, "reduce": reduce}

    def said(function):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            value = function(x, target)
        return value, [str(warning.message) for warning in caught]

    for kind in ("multi_margin_loss", "MultiMarginLoss"):
        if kind == "MultiMarginLoss":
            a, b = (lambda x, y, m=m: m.MultiMarginLoss(**options)(x, y) for m in (mine, theirs))
        else:
            a, b = (
                lambda x, y, m=m: m.multi_margin_loss(x, y, **options)
                for m in (mine, theirs.functional)
            )
        (value, messages), (expected, expected_messages) = said(a), said(b)
        torch.testing.assert_close(value, expected)
        assert messages == expected_messages


def test_the_old_name_of_the_mean(batch):
    with pytest.warns(UserWarning, match="elementwise_mean"):
        loss = mine.multi_margin_loss(*batch, reduction="elementwise_mean")
    torch.testing.assert_close(loss, ours(*batch))


def test_saved_state_goes_both_ways():
    weight = torch.rand(5)
    a, b = (
        mine.MultiMarginLoss(weight=weight.clone()),
        theirs.MultiMarginLoss(weight=torch.zeros(5)),
    )
    assert list(a.state_dict()) == ["weight"]
    assert "weight" in dict(a.named_buffers())
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(b.weight, weight)
    a.load_state_dict(theirs.MultiMarginLoss(weight=weight * 2).state_dict())
    torch.testing.assert_close(a.weight, weight * 2)
    assert not mine.MultiMarginLoss().state_dict()
    assert a.to("meta").weight.device.type == "meta"
    assert isinstance(a, theirs.MultiMarginLoss)


def test_repr():
    assert repr(mine.MultiMarginLoss(2, 0.5, reduction="sum")) == (
        "MultiMarginLoss(p=2, margin=0.5, reduction='sum')"
    )


def test_more_than_pytorch_has(batch):
    x, target = batch
    torch.testing.assert_close(mine.MultiMarginLoss(p=1.5)(x, target), ours(x, target, p=1.5))
    assert mine.MultiMarginLoss()(x.bfloat16(), target.int()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"p": 0.5}, "p must be"),
        ({"p": "1"}, "p must be"),
        ({"margin": float("inf")}, "margin must be"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"p": 0.5, "weight": torch.ones(2, 2)}, "p must be"),
        ({"weight": torch.ones(2, 2)}, r"weight must have shape \(C,\), but has shape \(2, 2\)"),
        ({"weight": [1.0, 2.0]}, "weight must be an array, but is"),
    ],
)
def test_errors_when_constructed(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mine.MultiMarginLoss(**options)


def test_errors_when_called(batch):
    x, target = batch
    with pytest.raises(InvalidTargetError, match=r"target\[0\] is 5"):
        mine.MultiMarginLoss()(x, target * 0 + 5)
    with pytest.raises(ValueError, match="reduction must be one of"):
        mine.multi_margin_loss(x, target, reduction="max")


@pytest.mark.parametrize("criterion", [mine.MultiMarginLoss(p=2), mine.multi_margin_loss])
def test_torch_fx_traces_it(batch, criterion):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.criterion = torch.nn.Linear(5, 5), criterion

        def forward(self, scores, target):
            return self.criterion(self.layer(scores), target)

    model = Model()
    traced = torch.fx.symbolic_trace(model)
    assert any(node.target is mine.multi_margin_loss for node in traced.graph.nodes)
    torch.testing.assert_close(traced(*batch), model(*batch))


@pytest.mark.parametrize("module", [mine.MultiMarginLoss(p=2), mine.MultiMarginLoss()])
def test_its_own_graph_can_be_pickled(batch, module):
    traced = pickle.loads(pickle.dumps(torch.fx.symbolic_trace(module)))
    torch.testing.assert_close(traced(*batch), module(*batch))


@pytest.mark.parametrize("kind", ["float64", "float32", "int64"])
def test_scalars_of_numpy_are_numbers_when_compiled(batch, kind, fresh_compiler):
    np = pytest.importorskip("numpy")
    two = np.dtype(kind).type(2)
    module = mine.MultiMarginLoss(p=two, margin=two)
    assert repr(module) == repr(mine.MultiMarginLoss(p=2.0, margin=2.0))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*batch), module(*batch))

    def loss(x, y):
        one = np.dtype(kind).type(1) if kind == "int64" else 1
        return ours(x, y, p=two, margin=two, ignore_index=one, axis=one)

    torch.testing.assert_close(torch.compile(loss, backend="eager")(*batch), loss(*batch))


def test_what_is_no_number_is_refused_when_compiled(batch, fresh_compiler):
    np = pytest.importorskip("numpy")
    for wrong in (np.bool_(True), np.ones(2), np.complex64(1), np.str_("1")):
        with pytest.raises(TypeError, match="margin must be a real number, but is "):
            torch.compile(lambda x, y: ours(x, y, margin=wrong), backend="eager")(*batch)  # noqa: B023


@pytest.mark.filterwarnings("ignore:reduction='elementwise_mean' is deprecated")
def test_the_oldest_name_of_the_mean(batch):
    module = mine.MultiMarginLoss(reduction="elementwise_mean")
    assert module(*batch) == mine.multi_margin_loss(*batch, reduction="elementwise_mean")
