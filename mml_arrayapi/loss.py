"""The public functions: check the arguments, choose the kernel, run it."""

from __future__ import annotations

import math
from typing import Any

from mml_arrayapi import registry, validation
from mml_arrayapi.kernel import Problem
from mml_arrayapi.libraries import library_of

Array = Any


def multi_margin_loss(
    input: Array,
    target: Array,
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Array | None = None,
    reduction: str = "mean",
    axis: int = -1,
    check_target: str = "auto",
    backend: str | None = None,
) -> Array:
    r"""Compute the multi-class hinge loss of Weston and Watkins.

    For a sample with scores :math:`x` and target :math:`y` out of :math:`C` classes it is

    .. math::

        \frac{w_y}{C} \sum_{j \ne y} \max(0, (x_j - x_y) + \mathrm{margin})^p

    Parameters
    ----------
    input : array, shape (\*batch, C), real floating
        The scores, of any array API library. Typically ``(N, C)``; ``(C,)`` is one sample.
        16-bit scores are computed in float32.
    target : array, shape (\*batch), any integer dtype
        Each sample's class, 0 to C - 1. From the same library and device as ``input`` (for a
        Dask input, a NumPy array will do).
    p : float, default 1
        The exponent, a finite real number >= 1.
    margin : float, default 1.0
        Any finite real number.
    weight : array, shape (C,), real floating, optional
        One factor per class; it multiplies outside the power, so it may be negative.
    reduction : {"mean", "none", "sum"}
        The mean over the samples, one loss per sample, or their sum. All are divided by C.
    axis : int, default -1
        Where in ``input`` the classes are.
    check_target : {"auto", "raise", "nan"}
        What a target out of range does: raise :class:`InvalidTargetError`, or make that sample's
        loss (and gradient) NaN without reading any value. ``"auto"`` raises where values are at
        hand (NumPy, PyTorch on the CPU, eager JAX on the CPU, array-api-strict; Dask when
        computed) and gives NaN where reading them would stall a device or can't be done (CUDA;
        ``jit``, ``vmap``, ``torch.compile``).
    backend : str, optional
        Name of the kernel that must run; see :func:`mml_arrayapi.list_backends`.

    Returns
    -------
    array
        Shape ``()``, or with ``reduction="none"`` the shape of ``target``; ``input``'s dtype and
        device. A NaN among a sample's scores makes its loss NaN. An empty batch gives ``[]``, 0
        for the sum and NaN for the mean.

    Raises
    ------
    ValueError, TypeError
        An argument is not accepted. Raised before any work.
    InvalidTargetError
        A target is out of range, and ``check_target`` says to raise.

    See Also
    --------
    multi_margin_loss_and_grad : the loss together with its gradient.

    References
    ----------
    J. Weston and C. Watkins, "Multi-class support vector machines", Royal Holloway technical
    report CSD-TR-98-04, 1998.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import multi_margin_loss
    >>> scores = np.asarray([[0.1, 0.2, 0.4, 0.8]])
    >>> round(float(multi_margin_loss(scores, np.asarray([3]))), 6)
    0.325
    """
    # A small call costs 3 microseconds by the shortcut, and the checks alone 10.
    shortcut = registry.shortcut_for(input) if backend is None else None
    if shortcut is not None:
        loss = shortcut(input, target, p, margin, weight, reduction, axis, check_target)
        if loss is not None:
            return loss
    problem = validation.check(
        input,
        target,
        p=p,
        margin=margin,
        weight=weight,
        reduction=reduction,
        axis=axis,
        check_target=check_target,
    )
    loss = registry.choose(problem, backend).loss(problem)
    return _in_targets_shape(problem, target, loss)


def multi_margin_loss_and_grad(
    input: Array,
    target: Array,
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Array | None = None,
    reduction: str = "mean",
    axis: int = -1,
    check_target: str = "auto",
    backend: str | None = None,
    grad_output: Array | None = None,
) -> tuple[Array, Array]:
    r"""Compute the loss of :func:`multi_margin_loss`, and its gradient for the scores.

    Parameters
    ----------
    input, target, p, margin, weight, reduction, axis, check_target, backend
        As in :func:`multi_margin_loss`.
    grad_output : array, real floating, optional
        The gradient of something for the loss, of the loss's shape; 1 if left out. It is
        multiplied in float32 or wider, so that with 16-bit scores a large loss scale saves small
        gradients.

    Returns
    -------
    loss : array
        As :func:`multi_margin_loss` returns it.
    grad : array
        The derivative of ``sum(loss * grad_output)`` by ``input``: its shape, dtype and device.
        At a kink it is 0. A sample whose loss is NaN, or whose target is out of range, has a
        gradient of NaN.

    Raises
    ------
    ValueError, TypeError, InvalidTargetError
        As :func:`multi_margin_loss`.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import multi_margin_loss_and_grad
    >>> loss, grad = multi_margin_loss_and_grad(np.asarray([[0.5, 0.0, -2.0]]), np.asarray([0]))
    >>> print(round(float(loss), 6), grad.round(6))
    0.166667 [[-0.333333  0.333333  0.      ]]
    """
    problem = validation.check(
        input,
        target,
        p=p,
        margin=margin,
        weight=weight,
        reduction=reduction,
        axis=axis,
        check_target=check_target,
    )
    if grad_output is not None:
        grad_output = validation.check_grad_output(problem, target.shape, grad_output)
    loss, grad = registry.choose(problem, backend).loss_and_grad(problem, grad_output)
    if input.ndim == 0:
        grad = problem.xp.reshape(grad, ())
    return _in_targets_shape(problem, target, loss), grad


def explain(
    input: Array,
    target: Array,
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Array | None = None,
    reduction: str = "mean",
    axis: int = -1,
    check_target: str = "auto",
    backend: str | None = None,
) -> registry.Explanation:
    """Tell which kernel :func:`multi_margin_loss` would run on these arguments, and why.

    Parameters
    ----------
    input, target, p, margin, weight, reduction, axis, check_target, backend
        As in :func:`multi_margin_loss`.

    Returns
    -------
    Explanation
        ``kernel`` is the name of the one that runs; ``considered`` lists every kernel with the
        reason why it doesn't run, or None. Printed, it is a small table.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import explain
    >>> explain(np.zeros((2, 3)), np.asarray([0, 1]), backend="generic").kernel
    'generic'
    """
    problem = validation.check(
        input,
        target,
        p=p,
        margin=margin,
        weight=weight,
        reduction=reduction,
        axis=axis,
        check_target=check_target,
    )
    return registry.explain(problem, backend)


def _in_targets_shape(problem: Problem, target: Array, loss: Array) -> Array:
    """Give per-sample losses the target's shape, where one sample was spelled another way."""
    if problem.reduction == "none" and loss.ndim != target.ndim:
        return problem.xp.reshape(loss, target.shape)
    return loss


def sample_losses(
    input: Array,
    target: Array,
    *,
    p: float,
    margin: float,
    weight: Array | None,
    check_target: str,
    axis: int = -1,
    backend: str | None = None,
    elements: float = math.inf,
) -> Array:
    """Compute the losses of a part of a job.

    Parameters
    ----------
    input, target, p, margin, weight, check_target, axis, backend
        As in :func:`mml_arrayapi.multi_margin_loss`.
    elements : float
        The size of the whole job's input; the kernel depends on it, but on nothing that this
        process has done before.

    Returns
    -------
    array
        One loss per sample, in float32 for 16-bit scores.
    """
    input = at_least_float32(library_of("input", input).namespace, input)
    problem = validation.check(
        input,
        target,
        p=p,
        margin=margin,
        weight=weight,
        reduction="none",
        axis=axis,
        check_target=check_target,
    )
    return registry.choose_for_job(problem, backend, elements).loss(problem)


def at_least_float32(xp: Any, input: Array) -> Array:
    """Widen 16-bit scores, so that their losses are not rounded to 16 bits one by one."""
    if xp.isdtype(input.dtype, "real floating") and xp.finfo(input.dtype).bits == 16:
        return xp.astype(input, xp.float32)
    return input
