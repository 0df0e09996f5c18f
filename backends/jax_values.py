"""JAX: whether an array's values can be read now."""

from __future__ import annotations

import jax
import numpy as np

from mml_arrayapi.namespaces import DEVICE, HOST, TRACED


def sight(array: jax.Array) -> str:
    """Tell whether an array's values can be read: "host", "device" or "traced"."""
    if isinstance(array, jax.core.Tracer):
        return TRACED
    return HOST if all(d.platform == "cpu" for d in array.devices()) else DEVICE


def on_host(array: jax.Array) -> np.ndarray:
    """Return the values as a NumPy array: inside ``jit`` every jnp operation is traced."""
    return np.asarray(array)
