"""The public functions: check the arguments, choose the kernel, run it."""

from __future__ import annotations

from typing import Any, SupportsFloat, SupportsIndex

from mml_arrayapi import registry, validation
from mml_arrayapi.kernel import Options, Problem
from mml_arrayapi.libraries import library_of
from mml_arrayapi.typing import Array, CheckTarget, Reduction


def multi_margin_loss(
    input: Array,
    target: Array,
    *,
    p: SupportsFloat = 1,
    margin: SupportsFloat = 1.0,
    weight: Array | None = None,
    reduction: Reduction = "mean",
    ignore_index: SupportsIndex | None = None,
    axis: SupportsIndex = -1,
    check_target: CheckTarget = "auto",
    backend: str | None = None,
) -> Any:
    r"""Compute the multi-class hinge loss of Weston and Watkins.

    For a sample with scores ``x`` and target ``y`` out of ``C`` classes it is::

        weight[y] / C * (sum over j != y of max(0, (x[j] - x[y]) + margin) ** p)

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
    ignore_index : int, optional
        Samples with this target have loss 0 and gradient 0, whatever their scores are, and are
        left out of the mean's count. If all are, the mean is NaN.
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
    options = (p, margin, reduction, ignore_index, axis, check_target)
    if backend is None:
        # The checks take several times as long as a small loss: first the kernel, then the words.
        for kernel in registry.direct_kernels(input):
            loss = kernel(input, target, weight, options)
            if loss is not None:
                return loss
    problem = _check(input, target, weight, options, backend)
    loss = registry.run(problem, backend, "loss")
    return _as_given(problem, input, target, loss)


def multi_margin_loss_and_grad(
    input: Array,
    target: Array,
    *,
    p: SupportsFloat = 1,
    margin: SupportsFloat = 1.0,
    weight: Array | None = None,
    reduction: Reduction = "mean",
    ignore_index: SupportsIndex | None = None,
    axis: SupportsIndex = -1,
    check_target: CheckTarget = "auto",
    backend: str | None = None,
    grad_output: Array | None = None,
) -> tuple[Any, Any]:
    r"""Compute the loss of :func:`multi_margin_loss`, and its gradient for the scores.

    Parameters
    ----------
    input, target, p, margin, weight, reduction, ignore_index, axis, check_target, backend
        As in :func:`multi_margin_loss`.
    grad_output : array, real floating, optional
        The gradient of something for the loss, of the loss's shape; 1 if left out. It is
        multiplied in float32 or wider, so that with 16-bit scores a large loss scale saves small
        gradients. A NaN makes its sample's whole gradient NaN; infinity leaves a derivative of 0
        what it is.

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
    options = (p, margin, reduction, ignore_index, axis, check_target)
    problem = _check(input, target, weight, options, backend)
    if grad_output is not None:
        grad_output = validation.check_grad_output(problem, target.shape, grad_output)
    loss, grad = registry.run(problem, backend, "loss_and_grad", grad_output)
    if input.ndim == 0:
        grad = validation.of_one_element(grad, 0)
    if problem.input.dtype != input.dtype:
        grad = problem.xp.astype(grad, input.dtype, copy=False)
    return _as_given(problem, input, target, loss), grad


def explain(
    input: Array,
    target: Array,
    *,
    p: SupportsFloat = 1,
    margin: SupportsFloat = 1.0,
    weight: Array | None = None,
    reduction: Reduction = "mean",
    ignore_index: SupportsIndex | None = None,
    axis: SupportsIndex = -1,
    check_target: CheckTarget = "auto",
    backend: str | None = None,
) -> registry.Explanation:
    """Tell which kernel :func:`multi_margin_loss` would run on these arguments, and why.

    Parameters
    ----------
    input, target, p, margin, weight, reduction, ignore_index, axis, check_target, backend
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
    options = (p, margin, reduction, ignore_index, axis, check_target)
    problem = _check(input, target, weight, options, backend)
    return registry.explain(problem, backend)


def _check(
    input: Array, target: Array, weight: Array | None, options: Options, backend: str | None
) -> Problem:
    checked = validation.check_options(options)
    registry.check_name(backend)
    return validation.check_arrays(input, target, weight, checked)


def _as_given(problem: Problem, input: Array, target: Array, loss: Any) -> Any:
    """Give losses the input's byte order, and one sample's the target's shape."""
    if not getattr(input.dtype, "isnative", True):
        loss = loss.astype(input.dtype)
    if problem.reduction == "none" and loss.ndim != target.ndim:
        return validation.of_one_element(loss, target.ndim)
    return loss


def sample_losses(input: Array, target: Array, **options: Any) -> Any:
    """Compute one loss per sample, in float32 for 16-bit scores: to be added up further on.

    Parameters
    ----------
    input, target, **options
        As in :func:`multi_margin_loss`, without ``reduction``.

    Returns
    -------
    array
        Shape of ``target``.
    """
    input = at_least_float32(library_of("input", input).namespace, input)
    return multi_margin_loss(input, target, reduction="none", **options)


def at_least_float32(xp: Any, input: Array) -> Any:
    """Widen 16-bit scores, so that their losses are not rounded to 16 bits one by one."""
    name = getattr(input.dtype, "name", input.dtype)  # of NumPy's in whatever byte order
    is_16_bit = str(name).rpartition(".")[2] in ("float16", "bfloat16")
    return xp.astype(input, xp.float32) if is_16_bit else input
