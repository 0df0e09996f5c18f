"""The loss as one would write it by hand, in each library: p = 1, margin = 1, mean, no checks.

These are what `formula.py` beside this file compares with. They know that every score is finite
and every target in range, add in the library's own way, and serve one case each.
"""


def numpy():
    """Return the loss, and the loss with its gradient."""
    import numpy as np

    def hinge(x, y):
        rows = np.arange(len(x))
        z = x - x[rows, y][:, None] + np.float32(1)
        np.maximum(z, 0, out=z)
        z[rows, y] = 0
        return z, rows

    def loss(x, y):
        return hinge(x, y)[0].mean()

    def loss_and_grad(x, y):
        z, rows = hinge(x, y)
        grad = (z > 0).astype(np.float32)
        grad[rows, y] = -grad.sum(1)
        grad *= np.float32(1 / x.size)
        return z.mean(), grad

    return loss, loss_and_grad


def torch():
    """Return the loss; PyTorch differentiates it."""

    def loss(x, y):
        y = y[:, None]
        z = (x - x.gather(1, y) + 1).clamp(min=0)
        return z.scatter(1, y, 0.0).mean()

    return loss


def jax():
    """Return the loss; JAX differentiates and compiles it."""
    import jax.numpy as jnp

    def loss(x, y):
        y = y[:, None]
        z = x - jnp.take_along_axis(x, y, 1) + 1
        return jnp.where((z > 0) & (jnp.arange(x.shape[1]) != y), z, 0).mean()

    return loss


def dask():
    """Return the loss in `dask.array` operations; the targets are in the scores' chunks."""
    import dask.array as da

    def loss(x, y):
        own = da.arange(x.shape[1], chunks=x.chunks[1]) == y[:, None]
        score = da.where(own, x, 0).sum(axis=1, keepdims=True)
        return da.where(own, 0, da.maximum(x - score + 1, 0)).mean()

    return loss
