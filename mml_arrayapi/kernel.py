"""The two records that kernels are made of: the checked call they get, and what they offer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

Array = Any


class Problem(NamedTuple):
    r"""One checked call, as kernels get it.

    Attributes
    ----------
    xp : module
        The array API namespace of ``input``.
    library : str
        Short name of the library of ``input``: ``"numpy"``, ``"torch"`` ...
    input : array, shape (\*batch, C), the classes at ``axis``
        The scores.
    target : array, shape (\*batch)
        The classes' indices, of any integer dtype. Values are not checked yet.
    weight : array, shape (C,), or None
        One weight per class.
    p, margin : float
        The exponent, at least 1, and the margin.
    reduction : {"none", "mean", "sum"}
        What is asked for.
    axis : int
        The classes' axis in ``input``, not negative.
    check_target : {"raise", "nan"}
        What to do about targets out of range.
    """

    xp: Any
    library: str
    input: Array
    target: Array
    weight: Array | None
    p: float
    margin: float
    reduction: str
    axis: int
    check_target: str


def _never_waits(problem: Problem) -> str | None:  # noqa: ARG001
    return None


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation of the loss for the arrays of one library.

    Attributes
    ----------
    name : str
        The name by which users ask for it, such as ``"numpy-numba"``.
    library : str
        The library whose arrays it takes: the top-level name of their namespace.
    refuses : callable
        ``refuses(problem)`` is None where the kernel can run the problem, else the reason in
        words. It may look at shapes, dtypes and devices, never at values.
    loss : callable
        ``loss(problem)``: the loss, in ``input``'s dtype and on its device; with the reduction
        ``"none"`` it has the shape ``(*batch)``, else ``()``.
    loss_and_grad : callable
        ``loss_and_grad(problem, grad_output)``: the loss, and the gradient of
        ``sum(loss * grad_output)`` for ``input``. ``grad_output`` is an array of the loss's shape,
        or None for 1.
    waits : callable
        ``waits(problem)`` is None, or a reason, in words, why the kernel had better not run the
        problem unless it is asked for by name: it is to be compiled first, for instance.
    shortcut : callable or None
        ``shortcut(input, target, p, margin, weight, reduction, axis, check_target)``: the loss of
        a plain small call whose arguments haven't been checked, or None for any call that isn't
        plainly right. It is tried, once the kernel has been chosen without being asked for by
        name, on later inputs of the same type, since the checks cost more than a small loss.
    on_chunks : callable, optional
        For a library whose arrays are made of another's (Dask): ``on_chunks(problem, name,
        library)`` is this kernel, made to run the kernel ``name`` of ``library`` on every chunk;
        None where the chunks are not of that library.
    """

    name: str
    library: str
    refuses: Callable[[Problem], str | None]
    loss: Callable[[Problem], Array]
    loss_and_grad: Callable[[Problem, Array | None], tuple[Array, Array]]
    waits: Callable[[Problem], str | None] = _never_waits
    shortcut: Callable[..., Array | None] | None = None
    on_chunks: Callable[[Problem, str, str], Kernel | None] | None = None
