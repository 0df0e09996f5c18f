"""PyTorch: how the generic formula is run on its tensors, and its derivatives for autograd."""

from __future__ import annotations

from functools import cache
from typing import Any

import array_api_compat.torch as xp
import torch
from torch import Tensor

from mml_arrayapi import formula
from mml_arrayapi.backends import numpy_formula
from mml_arrayapi.backends.pytorch import state
from mml_arrayapi.backends.pytorch.state import arange
from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import library_of, widest

WIDE = (torch.int64, torch.float64)
COMPARABLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
NARROW = 2**31  # classes that int32 can number
FEW = 2**18  # elements


def widest_of(tensor: Tensor) -> tuple[Any, Any]:
    """Return the widest integer and real dtype of the tensor's device."""
    if tensor.is_cpu:  # half the time of asking for the device
        return WIDE
    kind = tensor.device.type
    return WIDE if kind in ("cuda", "meta") else _widest_on(kind)


@cache
def _widest_on(kind: str) -> tuple[Any, Any]:
    return widest(xp, torch.empty(0, device=kind))


def places(x: Tensor, index: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    """Return what finds elements along an axis: their index."""
    return index


def take(x: Tensor, index: Tensor, axis: int) -> Tensor:
    """Return the elements at ``index`` along an axis; take_along_dim() takes twice as long."""
    return torch.gather(x, axis, index)


def look_up(table: Tensor, index: Tensor, axis: int) -> Tensor:  # noqa: ARG001
    """Return the elements of a vector."""
    return table[index]


def put(x: Tensor, index: Tensor, values: Tensor | float, axis: int) -> Tensor:
    """Return ``x`` with ``values`` at ``index`` along an axis."""
    if _runs_at_once(x):
        return x.scatter_(axis, index, values)
    # Compilers fuse this with its neighbours, vmap has no rule for scatter_(), and on a GPU that
    # is not deterministic.
    return torch.where(_mask(x.shape[axis], index, axis), values, x)


def _runs_at_once(x: Tensor) -> bool:
    """Tell whether operations on a tensor simply run, in the CPU's memory, and have values."""
    return state.ordinary() and type(x) in state.PLAIN and x.is_cpu and not state.is_mapped(x)


def _mask(n_classes: int, index: Tensor, axis: int) -> Tensor:
    # A size that is being exported may be symbolic, and would be bound by the comparison.
    if not state.is_exporting() and isinstance(n_classes, int) and n_classes <= NARROW:
        index = index.to(torch.int32)  # vectors of the compiled code compare twice as many
    classes = arange(n_classes, index.dtype, index)
    return index == classes.reshape([n_classes if i == axis else 1 for i in range(index.ndim)])


def relu(x: Tensor) -> Tensor:
    """Return the larger of ``x`` and 0."""
    return torch.relu_(x)


def scaled(slope: Tensor, scale: Tensor) -> Tensor:
    """Return the product, 0 where the slope is 0; a selection takes five times as long."""
    if _runs_at_once(scale) and not scale.isinf().any():
        return slope * scale
    return torch.where(slope != 0, slope * scale, torch.where(scale.isnan(), scale, 0))


def nan_rows(x: Tensor, scale: Tensor, losses: Tensor, axis: int) -> Tensor:
    """Return the scale of each row, NaN where its loss is."""
    is_nan = losses.isnan()
    compiling = state.is_compiling()  # no backward pass through that of compiled code
    followed = (
        not compiling and torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad)
    )
    if not followed and not state.is_transformed():
        return torch.where(is_nan, losses, scale)
    # A product with all that the row depends on, whose derivatives are NaN.
    every = torch.where(is_nan, x, 0).sum(axis, keepdim=True) * torch.where(is_nan, scale, 0)
    return torch.where(is_nan, every * torch.where(is_nan, losses, 0), scale)


def total(x: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """Return the sum along an axis."""
    return torch.sum(x, axis, axis is not None, dtype=dtype)


def in_range(target: Tensor, n_classes: int) -> bool:
    """Tell whether all targets are classes; of few, NumPy takes 20 microseconds more."""
    if target.dtype in COMPARABLE and _runs_at_once(target):
        low, high = torch.aminmax(target)
        return low.item() >= 0 and high.item() < n_classes
    return numpy_formula.in_range(state.on_host(target), n_classes)


def runs(terms: Tensor) -> bool:
    """Tell whether a sum in float64 is slow: where the wide copy is large, or compiled."""
    if state.is_exporting():  # sizes may be symbolic, and can't be compared
        return False
    return state.is_compiling() or terms.numel() > FEW


class _Call:
    """A problem without its tensors: PyTorch looks into tuples for tensors, not into this."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem._replace(input=None, target=None, weight=None)

    def on(self, input: Tensor, target: Tensor, weight: Tensor | None) -> Problem:
        return self.problem._replace(input=input, target=target, weight=weight)


class _Compiled(torch.autograd.Function):
    """The loss with the formula's own gradient; every derivative of that is PyTorch's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, target: Tensor, weight: Tensor | None, call: _Call) -> Tensor:  # type: ignore[override]
        return formula.loss(call.on(input, target, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:  # noqa: ARG004
        *tensors, ctx.call = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> Any:  # type: ignore[override]
        if grad_output is None:  # as _Loss wants it
            return None, None, None, None
        problem = ctx.call.on(*ctx.saved_tensors)
        grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            grad = formula.loss_and_grad(problem, grad_output)[1]
        if ctx.needs_input_grad[2]:
            weight_grad = _weight_grad(problem, grad_output)
        return grad, None, weight_grad, None


class _Loss(_Compiled):
    """The same with a forward-mode derivative, which torch.compile can't trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _Compiled.setup_context(ctx, inputs, output)
        ctx.set_materialize_grads(False)  # tangents of 0 would make NaN of infinite losses

    @staticmethod
    def jvp(ctx: Any, input: Any, target: Any, weight: Any, call: Any) -> Tensor:  # type: ignore[override]  # noqa: ARG004
        problem = ctx.call.on(*ctx.saved_tensors)
        result = torch.zeros((), dtype=problem.input.dtype, device=problem.input.device)
        if input is not None:
            result = result + _tangent(problem, input)
        if weight is not None:  # the loss is linear in the weights
            losses = formula.losses(problem._replace(weight=weight))
            known = _known(problem).unsqueeze(problem.axis)
            result = result + formula.reduce(problem, torch.where(known, losses, 0))
        return result


def _known(problem: Problem) -> Tensor:
    """Tell which targets are classes, not ignored; what is too large for int64 turns negative."""
    index = problem.target.to(torch.int64)
    known = (index >= 0) & (index < problem.input.shape[problem.axis])
    ignored = formula.ignored_samples(problem, library_of("input", problem.input))
    return known if ignored is None else known & ~ignored


def _tangent(problem: Problem, tangent: Tensor) -> Tensor:
    """Multiply the gradient with a tangent, in the computing precision."""
    dtype, axis = problem.input.dtype, problem.axis
    if dtype not in WIDE[1:]:
        problem = problem._replace(input=problem.input.to(torch.float32))
    product = formula.loss_and_grad(problem, None)[1] * tangent
    ignored = formula.ignored_samples(problem, library_of("input", problem.input))
    if ignored is not None:  # even where the tangent is infinite or NaN
        product = torch.where(ignored.unsqueeze(axis), 0, product)
    return (product.sum(axis) if problem.reduction == "none" else product.sum()).to(dtype)


def _weight_grad(problem: Problem, grad_output: Tensor) -> Tensor:
    """Return the gradient for the weights: each class's losses without its weight, added."""
    axis, n_classes = problem.axis, problem.input.shape[problem.axis]
    losses = formula.losses(problem._replace(weight=None))
    losses = losses * formula.upstream(problem, grad_output)
    known = _known(problem).unsqueeze(axis)
    index = torch.where(known, problem.target.to(torch.int64).unsqueeze(axis), 0)
    losses = torch.where(known, losses, 0)
    shares = torch.where(_mask(n_classes, index, axis), losses, 0)
    batch = [i for i in range(shares.ndim) if i != axis]
    return (shares.sum(batch) if batch else shares).to(problem.weight.dtype)  # type: ignore[union-attr]


def _followed(problem: Problem) -> bool:
    """Tell whether anything may be differentiated."""
    return (
        problem.input.requires_grad
        or (problem.weight is not None and problem.weight.requires_grad)
        or state.is_transformed()
    )


def loss(problem: Problem) -> Tensor:
    """Compute the loss, followed by autograd and every transform of PyTorch."""
    if not _followed(problem):
        return formula.loss(problem)
    # PyTorch differentiates no Function's jvp in forward mode once more, torch.jit.trace saves no
    # Function, and torch.export(strict=True) saves one without its backward pass.
    compiling = state.is_compiling()
    simply = state.is_exporting() or (not compiling and state.is_tracing())
    if simply:
        return formula.loss(problem)
    if state.forward_levels() < 2:
        function = _Compiled if compiling else _Loss
        tensors = problem.input, problem.target, problem.weight
        return function.apply(*tensors, _Call(problem))
    losses = formula.losses(problem)
    for _ in range(2):  # so that second derivatives of a NaN are NaN
        losses = nan_rows(problem.input, losses, losses, problem.axis)
    return formula.reduce(problem, losses)


def loss_and_grad(problem: Problem, grad_output: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute the loss and its gradient; where autograd follows, both can be differentiated."""
    if _followed(problem):
        return loss(problem), formula.loss_and_grad(problem, grad_output)[1]
    return formula.loss_and_grad(problem, grad_output)


ROW: dict[str, Any] = {
    "on_host": state.on_host,
    "in_range": in_range,
    "widest": widest_of,
    "places": places,
    "take": take,
    "put": put,
    "look_up": look_up,
    "relu": relu,
    "scaled": scaled,
    "nan_rows": nan_rows,
    "divisor": lambda count: count,  # of 0: 0 / 0 is NaN, and a symbolic size can't be compared
    "sum": total,
    "runs": runs,
    "loss": loss,
    "loss_and_grad": loss_and_grad,
}
