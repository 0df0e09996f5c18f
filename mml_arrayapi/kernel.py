"""The two records that kernels are made of: the checked call they get, and what they offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Array = Any
# p, margin, reduction, ignore_index, axis, check_target
Options = tuple[Any, Any, Any, Any, Any, Any]


class Unusable(RuntimeError):
    """Raised by a kernel that finds out only while it runs that it can't: the message says why.

    The call then runs on the generic implementation, or ends with a ValueError if it asked for
    the kernel by name.
    """


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
    ignore_index : int or None
        The target of samples that are left out; only kernels that list ``"ignore_index"`` in
        :attr:`Kernel.supports` get an integer here.
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
    ignore_index: int | None = None

    def options(self) -> Options:  # no property: torch.compile follows those from 2.10 on only
        """Return what the fused kernels get beside the arrays."""
        return self.p, self.margin, self.reduction, self.ignore_index, self.axis, self.check_target


@dataclass(frozen=True, slots=True)
class Kernel:
    """An implementation of the loss for the arrays of one library.

    Attributes
    ----------
    name : str
        The name by which users ask for it, such as ``"numpy-cpu"``.
    library : str
        The library whose arrays it takes: the top-level name of their namespace.
    refuses : callable
        ``refuses(problem)`` is None where the kernel can run the problem, else the reason in
        words. It may look at shapes, dtypes and devices, never at values. An exception counts as
        a refusal.
    loss : callable
        ``loss(problem)``: the loss, in ``input``'s dtype and on its device; with the reduction
        ``"none"`` it has the shape ``(*batch)``, else ``()``.
    loss_and_grad : callable
        ``loss_and_grad(problem, grad_output)``: the loss, and the gradient of
        ``sum(loss * grad_output)`` for ``input``. ``grad_output`` is an array of the loss's shape,
        or None for 1. Like ``loss`` it may raise :class:`Unusable`.
    before : str, optional
        The name of another kernel: this one is asked directly before it. Without it, or where the
        library has none of that name, the kernel is asked after the built-in ones.
    supports : frozenset of str
        The features that the kernel has beyond the common ones; so far ``"ignore_index"``. A call
        that uses a feature is never given to a kernel that doesn't list it.
    direct : mapping of type to callable
        For inputs of exactly these types, ``direct[type(input)](input, target, weight, options)``
        is tried before any argument has been checked; ``options`` is ``(p, margin, reduction,
        ignore_index, axis, check_target)`` as the caller gave them. It returns the loss, or None
        for every call that is not plainly right or not the kernel's; the checks then find the
        words. It must not trust anything it hasn't looked at, and its result must be
        that of ``loss``.
    on_chunks : callable, optional
        For a library whose arrays are made of another's (Dask): ``on_chunks(problem, name,
        library)`` is this kernel, made to run the kernel ``name`` of ``library`` on every chunk;
        None where the chunks are not of that library.

    Raises
    ------
    TypeError
        A field is of another type.
    """

    name: str
    library: str
    refuses: Callable[[Problem], str | None]
    loss: Callable[[Problem], Array]
    loss_and_grad: Callable[[Problem, Array | None], tuple[Array, Array]]
    before: str | None = None
    supports: frozenset[str] = frozenset()
    direct: Mapping[type, Callable[[Array, Array, Array, Options], Array | None]] = field(
        default_factory=dict, hash=False
    )
    on_chunks: Callable[[Problem, str, str], Kernel | None] | None = None

    def __post_init__(self) -> None:
        for name in ("name", "library"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value:
                raise TypeError(f"{name} must be a string that is not empty, but is {value!r}")
        for name in ("refuses", "loss", "loss_and_grad"):
            if not callable(getattr(self, name)):
                raise TypeError(f"{name} must be callable, but is {getattr(self, name)!r}")
        if self.before is not None and not isinstance(self.before, str):
            raise TypeError(f"before must be None or a kernel's name, but is {self.before!r}")
        if not isinstance(self.supports, (frozenset, set)) or not all(
            isinstance(feature, str) for feature in self.supports
        ):
            raise TypeError(f"supports must be a frozenset of strings, but is {self.supports!r}")
        if not isinstance(self.direct, Mapping) or not all(
            isinstance(kind, type) and callable(run) for kind, run in self.direct.items()
        ):
            raise TypeError(
                f"direct must be a mapping of types to callables, but is {self.direct!r}"
            )
        if self.on_chunks is not None and not callable(self.on_chunks):
            raise TypeError(f"on_chunks must be None or callable, but is {self.on_chunks!r}")
