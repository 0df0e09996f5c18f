"""JAX: what the formula needs of it, its derivatives, and the formula under ``jit`` as a kernel.

The compiled formula is JAX's own: it goes through ``jit``, ``grad``, ``vmap``, ``shard_map`` and
``export`` like any other code, keeps how arrays are sharded, and runs on every device. The C++
kernels are not called from here: ``pure_callback`` takes longer than the formula (4.4 milliseconds
against 2.3 for 8192 x 1000 scores), and ``jax.ffi`` needs jaxlib's headers to be built with.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec, auto_axes

from mml_arrayapi import formula
from mml_arrayapi.backends.numpy_formula import in_range, widened
from mml_arrayapi.kernel import Kernel, Options, Problem
from mml_arrayapi.libraries import DEVICE, HOST, TRACED, library_of
from mml_arrayapi.validation import CHECKS, REDUCTIONS, check_targets

NARROW = (jnp.dtype("int32"), jnp.dtype("float32"))
WIDE = (jnp.dtype("int64"), jnp.dtype("float64"))
REAL = frozenset(map(jnp.dtype, ("float32", "float64", "float16", "bfloat16")))
INTEGER = frozenset(jnp.dtype(f"{kind}int{bits}") for kind in ("", "u") for bits in (8, 16, 32, 64))
# The type of arrays that have values; to make one would start JAX's devices.
ARRAYS = [kind for kind in jax.Array.__subclasses__() if kind.__module__.startswith("jaxlib.")]
SHORT = 64  # float32 elements of a row
SHORT_WIDE = 16  # float64 elements: with a product of 8192 x 20 a loss took 19 ms in place of 5.5


def value_access(array: jax.Array) -> str:
    """Tell whether an array's values can be read: "host", "device" or "traced"."""
    if isinstance(array, jax.core.Tracer) or not array.is_fully_addressable:
        return TRACED  # the latter are spread over several processes
    return HOST if all(d.platform == "cpu" for d in array.devices()) else DEVICE


def on_host(array: jax.Array) -> np.ndarray:
    """Return the values as a NumPy array: inside ``jit`` every jnp operation is traced."""
    values: np.ndarray = widened(np.asarray(array))
    return values


def device_key(array: jax.Array) -> frozenset[Any] | None:
    """Return the devices that an array is bound to, however it is sharded over them."""
    if isinstance(array, jax.core.Tracer) or not array.committed:
        return None
    return frozenset(array.devices())


def unsupported_layout(array: Any) -> str | None:
    """Tell what an object of JAX is that is no array, or None."""
    return None if isinstance(array, jax.Array) else f"a {type(array).__name__} of JAX"


def widest(_: jax.Array) -> tuple[Any, Any]:
    """Return the widest integer and real dtype: 32 bits wide by JAX's default."""
    return WIDE if jax.config.jax_enable_x64 else NARROW


def places(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:  # noqa: ARG001
    """Return what finds elements along an axis: their index, which XLA else makes anew for each."""
    return lax.optimization_barrier(index)


def take(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    """Return the elements at ``index`` along an axis."""
    return jnp.take_along_axis(x, index, axis, mode="promise_in_bounds")


def look_up(table: jax.Array, index: jax.Array, axis: int) -> jax.Array:  # noqa: ARG001
    """Return the elements of a vector."""
    return table.at[index].get(mode="promise_in_bounds")


def put(x: jax.Array, index: jax.Array, values: jax.Array | float, axis: int) -> jax.Array:
    """Return ``x`` with ``values`` at ``index`` along an axis.

    One value is selected, which XLA fuses with what comes before and after. A row's own value is
    written, since broadcasting those values takes memory of the size of ``x``; but not where sizes
    are symbolic.
    """
    if all(isinstance(n, int) for n in x.shape) and not isinstance(values, float):
        return jnp.put_along_axis(x, index, values, axis, inplace=False, mode="promise_in_bounds")
    return jnp.where(lax.broadcasted_iota(index.dtype, x.shape, axis) == index, values, x)


def relu(x: jax.Array) -> jax.Array:
    """Return the larger of ``x`` and 0, with a slope of 0 at 0."""
    return jnp.where(x <= 0, 0, x)


def scaled(slope: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the product, 0 where the slope is 0 and the scale isn't NaN."""
    inactive = jnp.where(jnp.isnan(scale), scale, 0)
    # Else XLA on the CPU joins what makes the factors of rows with their broadcast, and takes
    # memory of the size of ``slope`` for it: 18 milliseconds become 11 for 8192 x 1000 scores.
    scale, inactive = lax.optimization_barrier((scale, inactive))
    if slope.dtype == bool:
        return jnp.where(slope, scale, inactive)
    return jnp.where(slope != 0, slope * scale, inactive)


@partial(jax.custom_jvp, nondiff_argnums=())
def nan_unless(condition: jax.Array, x: jax.Array) -> jax.Array:
    """Return ``x``, NaN where a condition does not hold: no NaN is made where it does."""
    return jnp.where(condition, x, 0) / condition.astype(x.dtype)


def _tangent_of_nan_unless(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Return the tangent of ``x``, 0 where it does not count: forward and backward."""
    return nan_unless(*primals), jnp.where(primals[0], tangents[1], 0)


nan_unless.defjvp(_tangent_of_nan_unless)


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def nan_rows(x: jax.Array, scale: jax.Array, losses: jax.Array, axis: int) -> jax.Array:  # noqa: ARG001
    """Return the scale of each row, NaN where its loss is."""
    return jnp.where(jnp.isnan(losses), losses, scale)


def _tangent_of_nan_rows(axis: int, primals: Any, tangents: Any) -> tuple[Any, Any]:
    """Make every derivative of such a row NaN; of others no NaN is made."""
    (x, scale, losses), (of_x, of_scale, _) = primals, tangents
    is_nan = jnp.isnan(losses)
    every = jnp.where(is_nan, of_x, 0).sum(axis, keepdims=True).astype(of_scale.dtype) + of_scale
    tangent = jnp.where(is_nan, every, of_scale) * jnp.where(is_nan, losses, 1)
    return nan_rows(x, scale, losses, axis), tangent


nan_rows.defjvp(_tangent_of_nan_rows)


def shrunk(terms: jax.Array, factor: float) -> jax.Array:
    """Return the product, by a selection: XLA's sums take a factor only as an array of its own.

    Not that of losses, which are few and may be differentiated as something linear.
    """
    return terms * factor if terms.ndim == 1 else jnp.where(terms == 0, terms, terms * factor)


def total(x: jax.Array, axis: int | None, dtype: Any) -> jax.Array:
    """Return the sum along an axis; of short rows XLA's product with ones takes half as long.

    Not of three axes: runs of a long row, which XLA adds where they are computed.
    """
    short = SHORT if dtype == jnp.float32 else SHORT_WIDE
    if axis == 1 and x.ndim == 2 and isinstance(x.shape[1], int) and x.shape[1] <= short:
        ones = jnp.ones(x.shape[1], dtype)
        return jnp.matmul(x.astype(dtype), ones, precision=lax.Precision.HIGHEST)[..., None]
    return jnp.sum(x, axis=axis, keepdims=axis is not None, dtype=dtype)


def run_length(n: Any, longest: int) -> int:
    """Return a divisor of ``n`` where there is a long one: XLA copies what must be cut off."""
    if isinstance(n, int):
        divisor = max(d for d in range(1, longest + 1) if n % d == 0)
        return divisor if 2 * divisor >= longest else longest
    return longest


def loss(problem: Problem) -> jax.Array:
    """Compute the loss with the formula's own gradient."""
    dtype = problem.input.dtype
    if dtype.itemsize == 2:  # so that the factors of the gradient are formed in float32
        problem = problem._replace(input=problem.input.astype(jnp.float32))
    call, arrays = _split(problem)
    spec, axis = jax.typeof(problem.input).sharding.spec, problem.axis
    rows = (*spec[:axis], *spec[axis + 1 :]) if problem.reduction == "none" else ()
    return _sharded(partial(_loss, call), arrays, rows).astype(dtype)


def _sharded(function: Any, arrays: tuple[Any, ...], spec: tuple[Any, ...]) -> jax.Array:
    """Call a function with the scores and other arrays, and shard what it returns.

    Where shardings are part of the types, they are not within the function: JAX would refuse
    gathers, most reshapes, and selections from arrays that are sharded in several ways.
    """
    sharding = jax.typeof(arrays[0]).sharding
    if axes := sharding.mesh.explicit_axes:
        out = sharding.update(spec=PartitionSpec(*spec))
        function = auto_axes(function, axes=axes, out_sharding=out)
    return function(*arrays)


def _split(problem: Problem) -> tuple[Problem, tuple[Any, Any, Any]]:
    """Return the static part of a problem, which can be hashed, and its arrays."""
    call = problem._replace(input=None, target=None, weight=None)
    return call, (problem.input, problem.target, problem.weight)


def _joined(call: Problem, input: Any, target: Any, weight: Any) -> Problem:
    return call._replace(input=input, target=target, weight=weight)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loss(call: Problem, input: Any, target: Any, weight: Any) -> jax.Array:
    return formula.loss(_joined(call, input, target, weight))


@partial(_loss.defjvp, symbolic_zeros=True)
def _tangent(call: Problem, primals: Any, tangents: Any) -> tuple[Any, Any]:
    problem = _joined(call, *primals)
    of_input, _, of_weight = tangents
    rows = problem.reduction == "none"
    tangent = jnp.zeros(problem.target.shape if rows else (), problem.input.dtype)
    if type(of_input) is not SymbolicZero:
        products = formula.loss_and_grad(problem, None)[1] * of_input
        ignored = formula.ignored_samples(problem, library_of("input", problem.input))
        if ignored is not None:  # even where the tangent is infinite or NaN
            products = jnp.where(jnp.expand_dims(ignored, problem.axis), 0, products)
        tangent += jnp.sum(products, axis=problem.axis if rows else None)
    if problem.weight is not None and type(of_weight) is not SymbolicZero:
        tangent += _tangent_by_weight(problem, of_weight)
    return _loss(call, *primals), tangent


def _tangent_by_weight(problem: Problem, tangent: Any) -> jax.Array:
    """Return the loss with other weights, in which it is linear."""
    losses = formula.losses(problem._replace(weight=None))
    index = problem.target.astype(widest(problem.input)[0])
    counts = (index >= 0) & (index < problem.input.shape[problem.axis])
    ignored = formula.ignored_samples(problem, library_of("input", problem.input))
    if ignored is not None:
        counts &= ~ignored
    factor = _spread_look_up(tangent.astype(losses.dtype), jnp.where(counts, index, 0))
    counts, factor = (jnp.expand_dims(one, problem.axis) for one in (counts, factor))
    # Twice: neither the loss of such a sample nor the tangent may count.
    losses = jnp.where(counts, jnp.where(counts, losses, 0) * factor, 0)
    return formula.reduce(problem._replace(weight=None), losses)


def _spread_look_up(table: jax.Array, index: jax.Array) -> jax.Array:
    """Return the elements of a vector, from copies of it.

    The transpose, a gradient, adds what was taken of each element, and XLA does so one after the
    other: of 10 million samples, float32 lost an eighth. With copies in rows and columns, a copy,
    a row and all rows add equally many.
    """
    n, places = index.size, [index]
    if table.dtype == jnp.float32 and isinstance(n, int) and n > 1:
        each = round(n ** (1 / 3))
        rows = -(-n // each**2)
        # Else XLA adds rows and columns in one go.
        table = lax.optimization_barrier(jnp.broadcast_to(table, (rows, *table.shape)))
        table = jnp.broadcast_to(table[:, None], (rows, each, table.shape[-1]))
        place = jnp.reshape(jnp.arange(n) // each, index.shape)
        places = [place // each, place % each, index]
    return table.at[tuple(places)].get(mode="promise_in_bounds")


@partial(jax.jit, static_argnums=0)
def _compiled_loss(call: Problem, *arrays: Any) -> jax.Array:
    return loss(_joined(call, *arrays))


@partial(jax.jit, static_argnums=0)
def _compiled_loss_and_grad(call: Problem, grad_output: Any, *arrays: Any) -> Any:
    return loss_and_grad(_joined(call, *arrays), grad_output)


def loss_and_grad(problem: Problem, grad_output: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Compute loss and gradient, each of which can be differentiated."""
    call, arrays = _split(problem)
    spec = jax.typeof(problem.input).sharding.spec
    return loss(problem), _sharded(partial(_grad, call), (*arrays, grad_output), spec)


def _grad(call: Problem, input: Any, target: Any, weight: Any, grad_output: Any) -> jax.Array:
    return formula.loss_and_grad(_joined(call, input, target, weight), grad_output)[1]


def _kernel_loss(problem: Problem) -> jax.Array:
    call, arrays = _split(check_targets(problem))
    return _compiled_loss(call, *arrays)


def _kernel_loss_and_grad(problem: Problem, grad_output: Any) -> Any:
    call, arrays = _split(check_targets(problem))
    return _compiled_loss_and_grad(call, grad_output, *arrays)


def _direct(input: Any, target: Any, weight: Any, options: Options) -> jax.Array | None:
    """Run the most ordinary calls without the checks, which take longer than a small loss.

    JAX's threads sleep 40 microseconds after a computation, and to wake them takes 80: with the
    checks, 32 x 10 scores took 160 in a loop.
    """
    p, margin, reduction, ignore_index, axis, check_target = options
    shape = input.shape
    if (
        not (_is_plain(input, REAL) and _is_plain(target, INTEGER) and shape and input.size)
        or type(axis) is not int
        or axis not in (-1, len(shape) - 1)
        or target.shape != shape[:-1]
        or next(iter(target.devices())).platform != "cpu"  # what isn't committed is on one
        or not (weight is None or (_is_plain(weight, REAL) and weight.shape == shape[-1:]))
    ):
        return None
    if (
        type(p) not in (int, float)
        or not 1 <= p < 1e9
        or type(margin) not in (int, float)
        or not -1e9 < margin < 1e9
        or type(reduction) is not str
        or reduction not in REDUCTIONS
        or ignore_index is not None
        or type(check_target) is not str
        or check_target not in CHECKS
    ):
        return None
    if check_target != "nan":
        if not in_range(np.asarray(target), shape[-1]):
            return None
        check_target = "raise"
    settings = float(p), float(margin), reduction, len(shape) - 1, check_target
    return _compiled_loss(Problem(jnp, "jax", None, None, None, *settings), input, target, weight)


def _is_plain(array: Any, dtypes: frozenset[Any]) -> bool:
    return type(array) in ARRAYS and not array.committed and array.dtype in dtypes


def _never_refuses(problem: Problem) -> str | None:  # noqa: ARG001
    return None


KERNEL = Kernel(
    name="jax-jit",
    library="jax",
    refuses=_never_refuses,
    loss=_kernel_loss,
    loss_and_grad=_kernel_loss_and_grad,
    supports=frozenset({"ignore_index"}),
    direct=dict.fromkeys(ARRAYS, _direct),
)

ROW: dict[str, Any] = {
    "device_key": device_key,
    "unsupported_layout": unsupported_layout,
    "widest": widest,
    "places": places,
    "take": take,
    "put": put,
    "look_up": look_up,
    "relu": relu,
    "scaled": scaled,
    "nan_unless": nan_unless,
    "nan_rows": nan_rows,
    "divisor": lambda count: count,  # of 0: 0 / 0 is NaN
    "shrunk": shrunk,
    "sum": total,
    "runs": lambda _: True,
    "run_length": run_length,
    "loss": loss,
    "loss_and_grad": loss_and_grad,
}
