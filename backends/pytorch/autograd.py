"""The front of both PyTorch kernels: operators, derivatives, transforms, and which way a call goes.

Where operations simply run, a call goes straight to the engine of its device. Where a compiler, a
transform or a mode looks on, it goes through the operators of ``torch.ops.mml_arrayapi``, which
all of them understand; the way through PyTorch's dispatcher takes longer than a small loss.

What a compiler records in the end are two other operators, which have no derivatives and never read
the targets to look for an error. On the CPU they are written in C++: a step through Python takes
longer than a small loss.

Whatever autograd hands back (saved tensors may have gone through hooks, gradients may be views
that negate) is looked at again before an engine reads its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import array_api_compat.torch as xp
import torch
from torch import Tensor

from mml_arrayapi import formula
from mml_arrayapi.backends.pytorch import generic, state
from mml_arrayapi.backends.pytorch.state import (
    PLAIN,
    below_autograd,
    is_dynamo_compiling,
    is_grad_enabled,
    ordinary,
    readable,
    single_level,
    under_autocast,
)
from mml_arrayapi.kernel import Kernel, Options, Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.validation import check_targets
from mml_arrayapi.wide_sum import SMALL, divided_sum

LARGEST = 2**63 - 1  # what an operator's integers hold


class Engine(NamedTuple):
    """What runs the loss on one type of device.

    All but the first two and the last return None for what they can't serve. They look at
    everything themselves, as nobody may have done so: whether a tensor's memory is its values (see
    :func:`state.readable`), dtypes, shapes, strides and the options' types.

    Attributes
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``.
    refuses : callable
        ``refuses(problem)``: why the engine can't run a problem, or None.
    loss : callable
        ``loss(input, target, weight, options, keep_mask)`` returns the loss and, with
        ``keep_mask`` (p = 1) and where it pays, the mask: which hinges are positive, in bits.
    grad : callable
        ``grad(grad_output, input, target, weight, mask, options)``; with a mask it reads no score.
        A mask of zeros is none.
    loss_and_grad : callable
        ``loss_and_grad(input, target, weight, grad_output, options)``.
    mask_shape : callable
        ``mask_shape(dtype, rows, n_classes)``: the mask's shape, in bytes, on every machine.
    keeps : callable
        ``keeps(input, options)``: whether a mask pays for these scores.
    graph_operators : bool
        Whether the engine has registered the operators of compiled graphs itself, which call those
        of :data:`_TWINS` for what they can't serve.
    """

    device: str
    refuses: Callable[[Problem], str | None]
    loss: Callable[..., tuple[Tensor, Tensor | None] | None]
    grad: Callable[..., Tensor | None]
    loss_and_grad: Callable[..., tuple[Tensor, Tensor] | None]
    mask_shape: Callable[[torch.dtype, int, int], tuple[int, ...]]
    keeps: Callable[[Tensor, Options], bool]
    graph_operators: bool = False


_engines: dict[str, Engine] = {}


def make_kernel(name: str, engine: Engine) -> Kernel:
    """Make an engine's kernel, and let the operators run on its device.

    Parameters
    ----------
    name : str
        The kernel's name.
    engine : Engine
        What runs it.

    Returns
    -------
    Kernel
    """
    _engines[engine.device] = engine
    on_device = "is_" + engine.device

    def refuses(problem: Problem) -> str | None:
        arrays = ("input", problem.input), ("target", problem.target), ("weight", problem.weight)
        for argument, tensor in arrays:
            if tensor is not None:
                reason = state.why_not_kernel(argument, tensor, engine.device)
                if reason is not None:
                    return reason
        if problem.weight is not None and problem.weight.requires_grad and is_grad_enabled():
            return "weight requires a gradient, which the generic implementation gives"
        if not _fits(problem.ignore_index):
            return "ignore_index does not fit 64 bits"
        return state.why_generic() or engine.refuses(problem)

    def direct(input: Any, target: Any, weight: Any, options: Options) -> Tensor | None:
        if is_dynamo_compiling():
            return _in_graph(input, target, weight, options) if engine.device == "cpu" else None
        if (
            not ordinary()
            or not getattr(input, on_device)
            or type(target) not in PLAIN
            or not (weight is None or type(weight) in PLAIN)
            or not (options[3] is None or _fits(options[3]))
        ):
            return None
        if input.itemsize == 2:
            if not readable(input):  # to widen it reads it
                return None
            input = under_autocast(input)
        if is_grad_enabled():
            if weight is not None and weight.requires_grad:
                return None
            if input.requires_grad:
                if target.ndim + 1 != input.ndim:  # one sample, spelled in another way
                    return None
                # PyTorch's own apply() fails over these.
                if input.is_nested or target.is_nested or (weight is not None and weight.is_nested):
                    return None
                return _Loss.apply(input, target, weight, options, options[0] == 1, engine)
        made = engine.loss(input, target, weight, options, False)
        return None if made is None else made[0]

    def loss(problem: Problem) -> Tensor:
        arguments, options = (problem.input, problem.target, problem.weight), problem.options()
        result = direct(*arguments, options)
        if result is not None:
            return result
        keep_mask = problem.p == 1 and problem.input.requires_grad and is_grad_enabled()
        return _loss(*arguments, *options, keep_mask)[0]

    def loss_and_grad(problem: Problem, grad_output: Tensor | None) -> tuple[Tensor, Tensor]:
        arguments = problem.input, problem.target, problem.weight, grad_output
        return _loss_and_grad(*arguments, *problem.options())

    _implement(engine)
    on_types = dict.fromkeys(PLAIN, direct)
    features = frozenset({"ignore_index"})
    return Kernel(name, "torch", refuses, loss, loss_and_grad, supports=features, direct=on_types)


def _fits(ignore_index: Any) -> bool:
    """Tell whether an operator takes an ignore_index; what is no integer has its own error."""
    return type(ignore_index) is not int or -LARGEST - 1 <= ignore_index <= LARGEST


# --------------------------------------------------------------------------------------------------
# The operators: the loss (and the mask), the gradient, both in one pass.

_OPTIONS = "float p, float margin, str reduction, SymInt? ignore_index, int axis, str check_target"
_SCORES = "Tensor input, Tensor target, Tensor? weight"
_NAMES = ("multi_margin_loss", "multi_margin_loss_backward", "multi_margin_loss_and_grad")
_SIGNATURES = (
    f"({_SCORES}, {_OPTIONS}, bool keep_mask) -> (Tensor, Tensor)",
    f"(Tensor grad_output, {_SCORES}, Tensor? mask, {_OPTIONS}) -> Tensor",
    f"({_SCORES}, Tensor? grad_output, {_OPTIONS}) -> (Tensor, Tensor)",
)
# Of compiled graphs: what is out of range gives NaN.
_GRAPH_OPTIONS = "float p, float margin, str reduction, SymInt? ignore_index, int axis"
_GRAPH_NAMES = ("graph_multi_margin_loss", "graph_multi_margin_loss_backward")
_TWINS = tuple(f"{name}_in_python" for name in _GRAPH_NAMES)
_GRAPH_SIGNATURES = tuple(one.replace(_OPTIONS, _GRAPH_OPTIONS) for one in _SIGNATURES[:2])
_library = torch.library.Library("mml_arrayapi", "DEF")
for _name, _signature in zip(
    (*_NAMES, *_GRAPH_NAMES, *_TWINS), (*_SIGNATURES, *2 * _GRAPH_SIGNATURES), strict=True
):
    _library.define(_name + _signature, tags=torch.Tag.pt2_compliant_tag)
_loss = torch.ops.mml_arrayapi.multi_margin_loss.default
_gradient = torch.ops.mml_arrayapi.multi_margin_loss_backward.default
_loss_and_grad = torch.ops.mml_arrayapi.multi_margin_loss_and_grad.default
_graph_loss = torch.ops.mml_arrayapi.graph_multi_margin_loss.default
_graph_gradient = torch.ops.mml_arrayapi.graph_multi_margin_loss_backward.default


def _loss_below(input: Any, target: Any, weight: Any, options: Options, keep_mask: bool) -> Any:
    """Run the loss below autograd; put the graphs' operator into what torch.compile records."""
    if state.is_recording() and options[5] == "nan":
        return _graph_loss(input, target, weight, *options[:5], keep_mask)
    return _loss(input, target, weight, *options, keep_mask)


def _gradient_below(*arguments: Any) -> Tensor:
    if state.is_recording() and arguments[-1] == "nan":
        return _graph_gradient(*arguments[:-1])
    return _gradient(*arguments)


def _in_graph(input: Any, target: Any, weight: Any, options: Options) -> Tensor | None:
    """Put the operator into torch.compile's graph; None for a call that is not plainly right.

    Each name that is looked up while tracing is checked again before every compiled call: those of
    all the checks took 28 of 105 microseconds.
    """
    p, margin, reduction, ignore_index, axis, check_target = options
    if (
        state.forward_levels()
        or type(axis) is not int
        or axis not in (-1, input.ndim - 1)
        or not input.is_cpu
        or not input.is_floating_point()
        or input.itemsize == 1
        or input.layout is not torch.strided
        or type(target) is not torch.Tensor
        or not target.is_cpu
        or target.dtype is not torch.int64
        or not 0 < target.ndim + 1 == input.ndim <= 16
        or target.shape != input.shape[:-1]
    ):
        return None
    if weight is not None and (
        type(weight) is not torch.Tensor
        or weight.dtype is not input.dtype
        or not weight.is_cpu
        or weight.shape != input.shape[-1:]
        or weight.requires_grad
    ):
        return None
    if (
        type(p) not in (int, float)
        or not 1 <= p < 1000
        or type(margin) not in (int, float)
        or not -1e9 < margin < 1e9
        or type(reduction) is not str
        or reduction not in ("none", "mean", "sum")
        or not (ignore_index is None or (type(ignore_index) is int and _fits(ignore_index)))
        or type(check_target) is not str
        or check_target not in ("auto", "nan")
    ):
        return None
    input = under_autocast(input)
    keep_mask = p == 1 and input.requires_grad and is_grad_enabled()
    axis = input.ndim - 1
    options = float(p), float(margin), reduction, ignore_index, axis, "nan"
    return _loss(input, target, weight, *options, keep_mask)[0]


def _implement(engine: Engine) -> None:
    """Register what the operators run on a type of device."""

    def loss(input: Any, target: Any, weight: Any, *options: Any) -> tuple[Tensor, Tensor]:
        options, keep_mask = options[:-1], options[-1]
        made = engine.loss(input, target, weight, options, keep_mask)
        if made is None:
            made = _formula_loss(input, target, weight, options), None
        value, mask = made
        if mask is None:
            mask = _empty_mask(engine, input, target, options) if keep_mask else _no_mask(input)
        return value, mask

    def gradient(
        grad_output: Any, input: Any, target: Any, weight: Any, mask: Any, *options: Any
    ) -> Tensor:
        grad = engine.grad(grad_output, input, target, weight, mask, options)
        if grad is None:
            grad = _formula_loss_and_grad(input, target, weight, grad_output, options)[1]
        return grad

    def loss_and_grad(
        input: Any, target: Any, weight: Any, grad_output: Any, *options: Any
    ) -> tuple[Tensor, Tensor]:
        made = engine.loss_and_grad(input, target, weight, grad_output, options)
        if made is None:
            made = _formula_loss_and_grad(input, target, weight, grad_output, options)
        return made

    def graph_loss(*arguments: Any) -> tuple[Tensor, Tensor]:
        return loss(*arguments[:-1], "nan", arguments[-1])

    def graph_gradient(*arguments: Any) -> Tensor:
        return gradient(*arguments, "nan")

    names = *_NAMES, *(_TWINS if engine.graph_operators else _GRAPH_NAMES)
    runs = loss, gradient, loss_and_grad, graph_loss, graph_gradient
    for name, run in zip(names, runs, strict=True):
        _library.impl(name, run, engine.device.upper())


def _no_mask(input: Tensor) -> Tensor:
    return input.new_empty(0, dtype=torch.uint8)


def _empty_mask(engine: Engine, input: Tensor, target: Tensor, options: Options) -> Tensor:
    shape = engine.mask_shape(input.dtype, target.numel(), input.shape[options[4]])
    return input.new_zeros(shape, dtype=torch.uint8)


def _formula_loss(input: Any, target: Any, weight: Any, options: Options) -> Tensor:
    return _formula().loss(_problem(input, target, weight, options))


def _formula_loss_and_grad(
    input: Any, target: Any, weight: Any, grad_output: Any, options: Options
) -> tuple[Tensor, Tensor]:
    problem = _problem(input, target, weight, options)
    if grad_output is not None and (what := state.unsupported_layout(grad_output)):
        raise RuntimeError(f"grad_output is {what}")
    return _formula().loss_and_grad(problem, grad_output)


def _formula() -> Any:
    """Return the generic implementation, within torch.func without derivatives of its own.

    Those are for the level at hand; within an operator they would be asked for on another.
    """
    return formula if state.is_transformed() else generic


def _problem(input: Any, target: Any, weight: Any, options: Options) -> Problem:
    for name, tensor in (("input", input), ("target", target), ("weight", weight)):
        if tensor is not None and (what := state.unsupported_layout(tensor)):
            raise RuntimeError(f"{name} is {what}")
    _check_classes(input, options[4])
    p, margin, reduction, ignore_index, axis, check_target = options
    problem = Problem(
        xp, "torch", input, target, weight, p, margin, reduction, axis, check_target, ignore_index
    )
    return check_targets(problem)


def _check_classes(input: Any, axis: int) -> None:
    """Check that there is a class; in a graph, where data may tell, that is known when it runs."""
    n_classes = input.shape[axis]
    if type(n_classes) is int and n_classes == 0:
        raise ValueError(f"input must have at least one class, but has shape {(*input.shape,)}")


# What the operators return in shape and type alone, for compilers and tensors without values.


def _fake_loss(input: Any, target: Any, weight: Any, *options: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    options, keep_mask = options[:-1], options[-1]
    _check_classes(input, options[4])
    loss = input.new_empty(target.shape if options[2] == "none" else ())
    if not keep_mask:
        return loss, _no_mask(input)
    return loss, _empty_mask(_engines[input.device.type], input, target, options)


def _fake_gradient(_: Any, input: Any, *__: Any) -> Tensor:
    return torch.empty_like(input)


def _fake_loss_and_grad(
    input: Any, target: Any, weight: Any, _: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    return _fake_loss(input, target, weight, *options, False)[0], torch.empty_like(input)


for _operator, _fake in (
    (_loss, _fake_loss),
    (_gradient, _fake_gradient),
    (_loss_and_grad, _fake_loss_and_grad),
    (_graph_loss, _fake_loss),
    (_graph_gradient, _fake_gradient),
):
    torch.library.register_fake(_operator, _fake, lib=_library)


# --------------------------------------------------------------------------------------------------
# Derivatives. These are the operators' Autograd kernels rather than what register_autograd makes:
# those cost 20 microseconds a call and don't work within torch.func.


def _autograd_loss(input: Any, target: Any, weight: Any, *options: Any) -> tuple[Tensor, Tensor]:
    options, keep_mask = options[:-1], options[-1]
    if _formula_must_follow(weight):
        return _formula_loss(input, target, weight, options), _no_mask(input)
    if is_grad_enabled() and input.requires_grad:
        with single_level():
            return _Loss.apply(input, target, weight, options, keep_mask, None)
    with below_autograd():
        return _loss_below(input, target, weight, options, keep_mask)


def _autograd_gradient(
    grad_output: Any, input: Any, target: Any, weight: Any, mask: Any, *options: Any
) -> Tensor:
    if _formula_must_follow(weight):
        return _formula_loss_and_grad(input, target, weight, grad_output, options)[1]
    arguments = grad_output, input, target, weight, mask
    if is_grad_enabled() and (grad_output.requires_grad or input.requires_grad):
        with single_level():
            return _Gradient.apply(*arguments, options)
    with below_autograd():
        return _gradient_below(*arguments, *options)


def _autograd_loss_and_grad(
    input: Any, target: Any, weight: Any, grad_output: Any, *options: Any
) -> tuple[Tensor, Tensor]:
    if _formula_must_follow(weight):
        return _formula_loss_and_grad(input, target, weight, grad_output, options)
    followed = input.requires_grad or (grad_output is not None and grad_output.requires_grad)
    if is_grad_enabled() and followed:
        loss, _ = _loss(input, target, weight, *options, False)
        upstream = torch.ones_like(loss) if grad_output is None else grad_output
        return loss, _gradient(upstream, input, target, weight, None, *options)
    with below_autograd():
        return _loss_and_grad(input, target, weight, grad_output, *options)


def _formula_must_follow(weight: Tensor | None) -> bool:
    followed = weight is not None and weight.requires_grad and is_grad_enabled()
    return followed or state.forward_levels() > 0


_library.impl(_NAMES[0], _autograd_loss, "Autograd")
_library.impl(_NAMES[1], _autograd_gradient, "Autograd")
_library.impl(_NAMES[2], _autograd_loss_and_grad, "Autograd")


class _Loss(state.SingleLevelFunction):
    """The loss; for p = 1 it keeps a mask, from which the gradient follows without the scores."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        options: Options,
        keep_mask: bool,
        engine: Engine | None,
    ) -> Any:
        if engine is not None:
            made = engine.loss(input, target, weight, options, keep_mask)
            if made is None:
                return None
        else:
            with torch.enable_grad(), below_autograd():  # outer levels of torch.func go on deriving
                made = _loss_below(input, target, weight, options, keep_mask)
        loss, mask = made
        if engine is None and not state.is_transformed() and readable(input):
            # What is saved must not depend on the way that led here: checkpoint() compares it.
            mask = mask if _engines[input.device.type].keeps(input, options) else None
        _save(ctx, input=input, target=target, weight=weight, mask=mask)
        ctx.options, ctx.engine = options, engine
        ctx.set_materialize_grads(False)
        return loss if engine is not None else made

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: Any) -> Any:
        if grad_output is None:
            return (None,) * 6
        return _backward(ctx, grad_output), None, None, None, None, None


def _backward(ctx: Any, grad_output: Tensor) -> Tensor:
    """Return the gradient for the scores, from whatever autograd hands back."""
    arguments = grad_output, *_saved(ctx)
    input, target, weight = arguments[1:4]
    p, margin, reduction, ignore_index, axis, _ = ctx.options
    options = p, margin, reduction, ignore_index, axis % input.ndim, "nan"  # the loss has looked
    if state.is_mapped(grad_output):
        return _formula_loss_and_grad(input, target, weight, grad_output, options)[1]
    if ctx.engine is not None and ordinary() and not is_grad_enabled():
        grad: Tensor | None = ctx.engine.grad(*arguments, options)
        if grad is not None:
            return grad
    return _gradient(*arguments, *options)


def _save(ctx: Any, **tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors.values())
    ctx.kinds = {
        name: None if tensor is None else (tensor.device, tensor.dtype, tensor.shape)
        for name, tensor in tensors.items()
    }


def _saved(ctx: Any) -> Iterator[Tensor | None]:
    """Yield what was saved, where hooks or an assignment to ``.data`` changed it as it was."""
    for tensor, (name, kind) in zip(ctx.saved_tensors, ctx.kinds.items(), strict=True):
        if kind is None:
            yield None
            continue
        device, dtype, shape = kind
        if tensor.shape != shape:
            raise RuntimeError(
                f"{name} had shape {tuple(shape)} when the loss was computed, but comes back for "
                f"the backward pass with shape {tuple(tensor.shape)} (saved_tensors_hooks, or "
                f".data was assigned)"
            )
        changed = tensor.dtype is not dtype or tensor.device != device
        yield tensor.to(device, dtype) if changed else tensor


class _Gradient(state.SingleLevelFunction):
    """The gradient for the scores; its own derivatives are those of the formula."""

    @staticmethod
    def forward(
        ctx: Any,
        grad_output: Tensor,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        mask: Tensor | None,
        options: Options,
    ) -> Tensor:
        _save(ctx, grad_output=grad_output, input=input, target=target, weight=weight)
        ctx.options = options
        with torch.enable_grad(), below_autograd():
            return _gradient_below(grad_output, input, target, weight, mask, *options)

    @staticmethod
    def backward(ctx: Any, tangent: Tensor) -> Any:
        arguments = tangent, *_saved(ctx), ctx.options
        of_upstream, of_input, *_ = ctx.needs_input_grad
        return (
            _for_upstream(*arguments) if of_upstream else None,
            _for_input(*arguments) if of_input else None,
            *(None,) * 4,
        )


def _for_upstream(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> Tensor:
    """Return the gradient of ``sum(tangent * gradient)`` for ``grad_output``."""
    wide = torch.promote_types(input.dtype, torch.float32)  # 16 bits would round each addend
    ones = torch.ones_like(grad_output, dtype=wide)
    unit = _gradient(ones, input.to(wide), target, weight, None, *options)
    products = tangent.to(wide) * unit
    total = products.sum(options[4]) if options[2] == "none" else products.sum()
    return total.to(grad_output.dtype)


def _for_input(
    tangent: Tensor,
    grad_output: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    options: Options,
) -> Tensor:
    """Return the gradient of ``sum(tangent * gradient)`` for ``input``: the Hessian times tangent.

    It is ``c_j * (tangent_j - tangent_y)``, and for the target minus the sum of the others, with
    ``c_j = grad_output * weight[y] / C * p * (p - 1) * z_j ** (p - 2)`` where ``z_j > 0``. A row
    whose loss is NaN has NaN.
    """
    p, margin, reduction, ignore_index, axis, _ = options
    wide = torch.promote_types(input.dtype, torch.float32)
    x, v = (t.movedim(axis, -1).to(wide) for t in (input, tangent))
    n_classes = x.shape[-1]
    y = target.to(torch.int64).unsqueeze(-1)  # what is too large turns negative
    in_range = (y >= 0) & (y < n_classes)
    kept = ~_ignored(y, target.dtype, ignore_index)
    y = torch.where(in_range, y, 0)
    if abs(margin) > torch.finfo(wide).max:  # infinite: outweighs any difference
        x, margin = x + margin, 0
    z = (x - x.gather(-1, y)) + margin
    own = torch.arange(n_classes, device=x.device) == y
    active = (z > 0) & ~own & (p != 1)
    curvature = p * (p - 1) * torch.where(active, z, 1) ** (p - 2)
    scale = grad_output.to(wide) / n_classes
    if reduction == "none":
        scale = scale.unsqueeze(-1)
    elif reduction == "mean":
        scale = scale / kept.sum()
    if weight is not None:
        scale = scale * weight.to(wide)[y]
    others = torch.where(active, curvature * (v - v.gather(-1, y)) * scale, 0)
    result = torch.where(own, -others.sum(-1, keepdim=True), others)
    result = torch.where(kept, result, 0).movedim(-1, axis)
    losses = formula.losses(_problem(input.detach(), target, weight, options))
    return torch.where(losses.isnan(), torch.nan, result).to(input.dtype)


# --------------------------------------------------------------------------------------------------
# torch.func.vmap: the mapped axis becomes the first of the batch's, each sample's loss is computed,
# and the reduction is done here. Where the weight is mapped, the calls are made one after another.


def _map_loss(
    info: Any, in_dims: Any, input: Any, target: Any, weight: Any, *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, None]]:
    options = options[:-1]
    if in_dims[2] is not None and info.batch_size:
        calls = _split(info, in_dims, (input, target, weight))
        losses = torch.stack([_loss(*call, *options, False)[0] for call in calls])
        return (losses, _no_mask(input)), (0, None)
    weight = weight if in_dims[2] is None else None
    x, y = _first(info, in_dims[0], input), _first(info, in_dims[1], target)
    if x.itemsize == 2 and options[2] != "none":
        x = x.float()
    factors = weight if options[2] == "none" else None
    losses, _ = _loss(x, y, factors, *_per_sample(options, x.ndim - 1), False)
    if options[2] != "none":
        losses = _reduced(losses, y, weight, options)
    return (losses.to(input.dtype), _no_mask(input)), (0, None)


def _reduced(losses: Tensor, target: Tensor, weight: Tensor | None, options: Options) -> Tensor:
    """Return the sum or mean of each of the mapped calls."""
    rows, small = _rows(losses), False
    divisor = _count(target, options[3]) if options[2] == "mean" else 1
    if weight is not None:  # with it, losses may be beyond their dtype where the mean isn't
        y = _rows(target.to(torch.int64))
        lost = _ignored(y, target.dtype, options[3])
        known = (y >= 0) & (y < len(weight)) & ~lost
        factor = weight.to(rows.dtype).double()[torch.where(known, y, 0)]
        rows = torch.where(lost, 0, rows.double() * SMALL * factor)
        divisor, small = divisor * SMALL, True
    return divided_sum(library_of("input", rows), rows, 1, divisor, small=small).squeeze(1)


def _map_gradient(
    info: Any,
    in_dims: Any,
    grad_output: Any,
    input: Any,
    target: Any,
    weight: Any,
    mask: Any,  # noqa: ARG001
    *options: Any,
) -> tuple[Tensor, int]:
    if in_dims[3] is not None and info.batch_size:
        calls = _split(info, in_dims, (grad_output, input, target, weight))
        return torch.stack([_gradient(*call, None, *options) for call in calls]), 0
    weight = weight if in_dims[3] is None else None
    x, y = _first(info, in_dims[1], input), _first(info, in_dims[2], target)
    upstream = _first(info, in_dims[0], grad_output)
    if options[2] != "none":
        upstream = upstream.to(torch.promote_types(upstream.dtype, torch.float32))
        if options[2] == "mean":
            upstream = upstream.unsqueeze(1) / _count(y, options[3])
        upstream = upstream.reshape(len(y), *(1,) * (y.ndim - 1)).expand(y.shape)
    return _gradient(upstream, x, y, weight, None, *_per_sample(options, x.ndim - 1)), 0


def _map_loss_and_grad(
    info: Any, in_dims: Any, input: Any, target: Any, weight: Any, grad_output: Any, *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    (losses, _), _ = _map_loss(info, in_dims, input, target, weight, *options, False)
    upstream, at = (
        (grad_output, in_dims[3]) if grad_output is not None else (torch.ones_like(losses), 0)
    )
    grad, _ = _map_gradient(
        info, (at, *in_dims[:3], None), upstream, input, target, weight, None, *options
    )
    return (losses, grad), (0, 0)


def _map_graph_loss(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _map_loss(info, in_dims, *arguments[:-1], "nan", arguments[-1])


def _map_graph_gradient(info: Any, in_dims: Any, *arguments: Any) -> Any:
    return _map_gradient(info, in_dims, *arguments, "nan")


for _operator, _rule in (
    (_loss, _map_loss),
    (_gradient, _map_gradient),
    (_loss_and_grad, _map_loss_and_grad),
    (_graph_loss, _map_graph_loss),
    (_graph_gradient, _map_graph_gradient),
):
    torch.library.register_vmap(_operator, _rule, lib=_library)


def _split(info: Any, in_dims: Any, tensors: Any) -> Iterator[tuple[Tensor | None, ...]]:
    """Yield the arguments of each of the mapped calls."""
    for i in range(info.batch_size):
        yield tuple(
            tensor if tensor is None or dim is None else tensor.select(dim, i)
            for dim, tensor in zip(in_dims, tensors, strict=False)
        )


def _first(info: Any, dim: int | None, tensor: Tensor) -> Tensor:
    """Bring the mapped axis to the front, where need be by repeating without a copy."""
    if dim is None:
        return tensor.expand(info.batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


def _per_sample(options: Options, ndim: int) -> Options:
    """Return the options for one more batch axis in front of ``ndim``, without reduction."""
    p, margin, _, ignore_index, axis, check_target = options
    return p, margin, "none", ignore_index, axis % ndim + 1, check_target


def _rows(tensor: Tensor) -> Tensor:
    """Return one row for each of the mapped calls, of which there may be none."""
    return tensor.flatten(1) if tensor.ndim > 1 else tensor.unsqueeze(1)


def _count(target: Tensor, ignore_index: int | None) -> Any:
    """Count the samples of each mean: one number, or shape ``(calls, 1)``."""
    rows = _rows(target)
    if ignore_index is None:
        return rows.shape[1]
    return (~_ignored(rows.to(torch.int64), target.dtype, ignore_index)).sum(1, keepdim=True)


def _ignored(target: Tensor, given: torch.dtype, ignore_index: int | None) -> Tensor:
    """Tell which targets are ignored: ``target`` as int64, in which PyTorch can compare them all.

    A value that the dtype they were given in can't hold matches nothing.
    """
    limits = torch.iinfo(given)
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return torch.zeros_like(target, dtype=torch.bool)
    return target == ignore_index
