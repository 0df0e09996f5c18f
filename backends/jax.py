"""JAX: whether an array's values can be read, and what the formula needs of it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from mml_arrayapi import formula
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.libraries import DEVICE, HOST, TRACED
from mml_arrayapi.validation import settle_targets


def sight(array: jax.Array) -> str:
    """Tell whether an array's values can be read: "host", "device" or "traced"."""
    if isinstance(array, jax.core.Tracer):
        return TRACED
    return HOST if all(d.platform == "cpu" for d in array.devices()) else DEVICE


def on_host(array: jax.Array) -> np.ndarray:
    """Return the values as a NumPy array: inside ``jit`` every jnp operation is traced."""
    return np.asarray(array)


def place(array: jax.Array) -> frozenset[Any] | None:
    """Return the devices that an array is bound to, however it is sharded over them."""
    if isinstance(array, jax.core.Tracer) or not array.committed:
        return None
    return frozenset(array.devices())


def unusable(array: Any) -> str | None:
    """Tell what an object of JAX is that is no array, or None."""
    return None if isinstance(array, jax.Array) else f"of type jax {type(array).__name__}"


def widest(_: jax.Array) -> tuple[Any, Any]:
    """Return the widest integer and real dtype: 32 bits wide by JAX's default."""
    x64 = jax.config.jax_enable_x64
    return (
        (jnp.dtype("int64"), jnp.dtype("float64"))
        if x64
        else (jnp.dtype("int32"), jnp.dtype("float32"))
    )


def take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Return the elements at ``index`` along an axis."""
    return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")


def put(x: jax.Array, index: jax.Array, values: jax.Array | float, axis: int) -> jax.Array:
    """Return ``x`` with ``values`` at ``index`` along an axis."""
    return jnp.where(lax.broadcasted_iota(index.dtype, x.shape, axis) == index, values, x)


def relu(x: jax.Array) -> jax.Array:
    """Return the larger of ``x`` and 0, with a slope of 0 at 0."""
    return jnp.where(x <= 0, 0, x)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(call: Problem, input: Any, target: Any, weight: Any) -> jax.Array:
    return formula.loss(call._replace(input=input, target=target, weight=weight))


@partial(_loss.defjvp, symbolic_zeros=True)
def _(call: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    input, target, weight = primals
    problem = call._replace(input=input, target=target, weight=weight)
    input_tangent, _, weight_tangent = tangents
    out = jnp.zeros((), input.dtype)
    if type(input_tangent) is not SymbolicZero:
        grad = formula.loss_and_grad(problem, None)[1]
        out = out + jnp.sum(
            grad * input_tangent, axis=problem.axis if problem.reduction == "none" else None
        )
    if weight is not None and type(weight_tangent) is not SymbolicZero:
        out = out + formula.loss(problem._replace(weight=weight_tangent))  # it is linear in them
    return _loss(call, *primals), jnp.broadcast_to(
        out, problem.target.shape if problem.reduction == "none" else ()
    )


def loss(problem: Problem) -> jax.Array:
    """Compute the loss with the formula's own gradient."""
    x, dtype = problem.input, problem.input.dtype
    if dtype.itemsize == 2:  # the gradient's factors are formed in float32
        x = x.astype(jnp.float32)
    call = problem._replace(input=None, target=None, weight=None)
    return _loss(call, x, problem.target, problem.weight).astype(dtype)


@partial(jax.jit, static_argnums=0)
def _jitted(call: Problem, input: Any, target: Any, weight: Any) -> jax.Array:
    return loss(call._replace(input=input, target=target, weight=weight))


@partial(jax.jit, static_argnums=0)
def _jitted_with_grad(call: Problem, input: Any, target: Any, weight: Any, grad_output: Any) -> Any:
    return formula.loss_and_grad(
        call._replace(input=input, target=target, weight=weight), grad_output
    )


def kernel_loss(problem: Problem) -> jax.Array:
    problem = settle_targets(problem)
    call = problem._replace(input=None, target=None, weight=None)
    return _jitted(call, problem.input, problem.target, problem.weight)


def kernel_loss_and_grad(problem: Problem, grad_output: Any) -> Any:
    problem = settle_targets(problem)
    call = problem._replace(input=None, target=None, weight=None)
    return _jitted_with_grad(call, problem.input, problem.target, problem.weight, grad_output)


KERNEL = Kernel(
    name="jax-jit",
    library="jax",
    refuses=lambda _: None,
    loss=kernel_loss,
    loss_and_grad=kernel_loss_and_grad,
    supports=frozenset({"ignore_index"}),
)

ROW: dict[str, Any] = {
    "loss": loss,
    "on_host": on_host,
    "unusable": unusable,
    "place": place,
    "widest": widest,
    "take": take,
    "put": put,
    "relu": relu,
    "runs": True,
}
