"""JAX: whether an array's values can be read, and arrays made beside it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mml_arrayapi.libraries import DEVICE, HOST, TRACED


def sight(array: jax.Array) -> str:
    """Tell whether an array's values can be read: "host", "device" or "traced"."""
    if isinstance(array, jax.core.Tracer):
        return TRACED
    return HOST if all(d.platform == "cpu" for d in array.devices()) else DEVICE


def on_host(array: jax.Array) -> np.ndarray:
    """Return the values as a NumPy array: inside ``jit`` every jnp operation is traced."""
    return np.asarray(array)


def arange(n: int, dtype: Any, like: jax.Array) -> jax.Array:  # noqa: ARG001
    """Return 0 to n - 1 on no particular device: JAX moves it to where ``like`` lies."""
    return jnp.arange(n, dtype=dtype)


def place(array: jax.Array) -> frozenset[Any] | None:
    """Return the devices that an array is bound to, however it is sharded over them."""
    if isinstance(array, jax.core.Tracer) or not array.committed:
        return None
    return frozenset(array.devices())
