"""The loss of a stream of batches: exact, mergeable in any order, the same on every library."""

from __future__ import annotations

import math
import threading
from copy import copy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, SupportsFloat, SupportsIndex

from mml_arrayapi.exact_sum import ExactSum
from mml_arrayapi.libraries import library_of, like, to_numpy
from mml_arrayapi.loss import at_least_float32, sample_losses
from mml_arrayapi.typing import Array
from mml_arrayapi.validation import (
    check_ignore_index,
    check_parameters,
    check_readable,
    check_sample_weight,
    check_weight,
    shape_of,
)

if TYPE_CHECKING:
    import numpy as np


class _Totals(NamedTuple):
    """What has been added up; never changed, only replaced as a whole."""

    losses: ExactSum
    weights: ExactSum  # the samples' own weights, 1 each where none were given

    def plus(self, other: _Totals) -> _Totals:
        made = _Totals(ExactSum(), ExactSum())
        for part in (self, other):
            made.losses.merge(part.losses)
            made.weights.merge(part.weights)
        return made


class LossAccumulator:
    """The loss of a stream of batches: exact, whatever the batches and their order.

    The losses of the samples are added without rounding; the sum is rounded once, when it is
    asked for (as ``math.fsum`` does). So the figure has the same bits for any cut into batches,
    any order of merging, any number of workers. It may be updated from several threads, it is
    picklable, and its state is plain JSON.

    Parameters
    ----------
    p : float, default 1
        The exponent, a finite real number >= 1.
    margin : float, default 1.0
        Any finite real number.
    weight : array, shape (C,), real floating, optional
        One factor per class, of any library; it is taken to the library and device of each batch.
    ignore_index : int, optional
        Samples with this target are left out.

    Notes
    -----
    Each sample's loss is what ``multi_margin_loss(..., reduction="none")`` gives, rounded to the
    scores' dtype, but for 16-bit scores, whose losses are kept in float32. With ``sample_weight``,
    it is that loss times the weight, rounded to float64's precision; it may be larger than float64
    can hold.

    On the CPU's kernels, and in NumPy, a sample's loss has the same bits whatever else is in its
    batch. GPUs, JAX and compilers may add a row's terms in another order where the batch has
    another size: the figure is exact for the losses that they give, and these differ in last bits.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import LossAccumulator
    >>> first, second = LossAccumulator(), LossAccumulator()
    >>> first.update(np.asarray([[0.5, 0.0, -2.0]]), np.asarray([0]))
    >>> second.update(np.asarray([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), np.asarray([0, 1]))
    >>> both = first + second
    >>> both
    <LossAccumulator(p=1.0, margin=1.0): 3 samples, mean 0.277778>
    >>> both.count, both.compute("sum")
    (3, 0.8333333333333333)
    """

    def __init__(
        self,
        *,
        p: SupportsFloat = 1,
        margin: SupportsFloat = 1.0,
        weight: Array | None = None,
        ignore_index: SupportsIndex | None = None,
    ) -> None:
        self._p, self._margin = check_parameters("mean", p, margin)
        self._ignore_index = check_ignore_index(ignore_index)
        self._weight = None if weight is None else weight_to_numpy(weight)
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        with self._lock:
            self._totals = _Totals(ExactSum(), ExactSum())

    @property
    def p(self) -> float:
        """The exponent."""
        return self._p

    @property
    def margin(self) -> float:
        """The margin."""
        return self._margin

    @property
    def ignore_index(self) -> int | None:
        """The target of samples that are left out."""
        return self._ignore_index

    @property
    def count(self) -> int:
        """The number of samples so far, without the ignored ones."""
        return self._totals.losses.count

    def __repr__(self) -> str:
        options = [f"p={self.p}", f"margin={self.margin}"]
        if self._weight is not None:
            options.append(f"weight of {len(self._weight)} classes")
        if self.ignore_index is not None:
            options.append(f"ignore_index={self.ignore_index}")
        losses, weights = self._totals
        samples = f"{losses.count} sample{'' if losses.count == 1 else 's'}"
        mean = losses.over_sum(weights)
        return f"<LossAccumulator({', '.join(options)}): {samples}, mean {mean:g}>"

    def update(self, input: Array, target: Array, sample_weight: Array | None = None) -> None:
        r"""Add a batch.

        Parameters
        ----------
        input : array, shape (\*batch, C), real floating
            The scores, of any array API library; the batches may come from different ones. Lazy
            ones are computed.
        target : array, shape (\*batch), any integer dtype
            Each sample's class.
        sample_weight : array, shape (\*batch), real, optional
            A factor for each sample's loss, finite and not negative; the mean is divided by their
            sum. From ``input``'s library, or a NumPy array. Samples without it count as 1.

        Raises
        ------
        TypeError, ValueError, InvalidTargetError
            As :func:`mml_arrayapi.multi_margin_loss` with ``check_target="raise"``; or
            ``sample_weight`` is not accepted. Nothing has been added then.
        """
        if sample_weight is not None:
            check_sample_weight(sample_weight)
        check_readable("input", input)
        check_readable("target", target)
        losses = sample_losses(
            input,
            target,
            p=self.p,
            margin=self.margin,
            weight=None if self._weight is None else like(self._weight, input),
            ignore_index=self.ignore_index,
            check_target="raise",
        )
        check_readable("input", losses)  # within jax.jit those of concrete arrays are traced too
        losses, classes, factors = _together(losses, target, sample_weight)
        kept = None if self.ignore_index is None else classes != self.ignore_index
        if factors is not None:
            factors = _checked_factors(factors, classes.shape, kept)
        if kept is not None:
            losses, factors = losses[kept], None if factors is None else factors[kept]
        batch = _Totals(ExactSum(), ExactSum())
        if factors is None:
            batch.losses.add(losses)
            batch.weights.add_ones(losses.size)
        else:
            batch.losses.add_weighted(losses, factors)
            batch.weights.add(factors)
        with self._lock:
            self._totals = self._totals.plus(batch)

    def merge(self, other: LossAccumulator) -> None:
        """Add what another accumulator has seen.

        Parameters
        ----------
        other : LossAccumulator
            One with the same ``p``, ``margin``, ``weight`` and ``ignore_index``.

        Raises
        ------
        TypeError
            Not an accumulator.
        ValueError
            Its parameters differ.
        """
        if not isinstance(other, LossAccumulator):
            raise TypeError(f"other must be a LossAccumulator, but is a {type(other).__name__}")
        mine, theirs = self._parameters(), other._parameters()
        for name in mine:
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"only accumulators of the same {name} can be merged, but this one has "
                    f"{mine[name]} and the other {theirs[name]}"
                )
        totals = other._totals
        with self._lock:
            self._totals = self._totals.plus(totals)

    def __add__(self, other: LossAccumulator) -> LossAccumulator:
        """Return an accumulator of what both have seen; see :meth:`merge`."""
        if not isinstance(other, LossAccumulator):
            return NotImplemented
        made = copy(self)
        made.merge(other)
        return made

    def compute(self, reduction: Literal["mean", "sum"] = "mean") -> float:
        """Return the loss of all samples so far.

        Parameters
        ----------
        reduction : {"mean", "sum"}
            The mean over the samples, or their sum.

        Returns
        -------
        float
            Correctly rounded. Without samples the sum is 0 and the mean NaN.

        Raises
        ------
        ValueError
            Another reduction: the losses of the single samples are not kept.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', but is {reduction!r}")
        losses, weights = self._totals
        return losses.over(1) if reduction == "sum" else losses.over_sum(weights)

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON: dictionaries, lists, strings and numbers.

        Returns
        -------
        dict
            ``p``, ``margin``, ``weight`` (what is not finite as a string), ``ignore_index``,
            ``sum`` and ``sample_weights`` (see :meth:`ExactSum.state`).
        """
        losses, weights = self._totals
        return {**self._parameters(), "sum": losses.state(), "sample_weights": weights.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> LossAccumulator:
        """Make the accumulator that :meth:`state` described.

        Parameters
        ----------
        state : dict
            What :meth:`state` returned, through JSON or not.

        Returns
        -------
        LossAccumulator

        Raises
        ------
        ValueError
            Something else.

        Examples
        --------
        >>> from mml_arrayapi import LossAccumulator
        >>> LossAccumulator.from_state(LossAccumulator(p=2).state()).p
        2.0
        """
        import numpy as np

        try:
            if more := state.keys() - LossAccumulator().state().keys():
                raise ValueError(f"{more} is not of it")  # noqa: TRY301
            weight = state["weight"]
            if isinstance(weight, str):
                raise TypeError("weight is a string")  # noqa: TRY301
            weight = None if weight is None else np.asarray(list(map(float, weight)))
            options = {name: state[name] for name in ("p", "margin", "ignore_index")}
            LossAccumulator(**options, weight=weight)
            totals = _Totals(*(ExactSum.from_state(state[n]) for n in ("sum", "sample_weights")))
            if totals.losses.count != totals.weights.count or totals.weights.total < 0:
                raise ValueError("sum and sample_weights don't fit together")  # noqa: TRY301
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(
                f"state must be what LossAccumulator.state() returned, but reading it gives "
                f"{type(error).__name__}: {error}"
            ) from error
        made = cls(**options, weight=weight)  # what a subclass raises is no fault of the state
        made._totals = totals
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.copy().items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def _parameters(self) -> dict[str, Any]:
        weight = None
        if self._weight is not None:
            weight = [w if math.isfinite(w) else str(w) for w in self._weight.tolist()]
        options = {"p": self.p, "margin": self.margin, "weight": weight}
        return {**options, "ignore_index": self.ignore_index}


def _together(losses: Array, target: Array, sample_weight: Array | None) -> list[Any]:
    """Return all three as NumPy arrays; those of a lazy library are computed together."""
    arrays: dict[str, Any] = {"input": losses, "target": target, "sample_weight": sample_weight}
    if (compute := library_of("input", losses).compute) is not None:
        lazy = [name for name, array in arrays.items() if type(array) is type(losses)]
        arrays |= zip(lazy, compute(*(arrays[name] for name in lazy)), strict=True)
    if sample_weight is not None:
        arrays["sample_weight"] = _readable(arrays["sample_weight"])
    return [None if array is None else to_numpy(array)[0] for array in arrays.values()]


def _readable(sample_weight: Array) -> np.ndarray:
    shape_of("sample_weight", sample_weight)  # Dask's chunks may turn out to be masked
    try:
        xp = library_of("sample_weight", sample_weight).namespace
        return to_numpy(at_least_float32(xp, sample_weight))[0]
    except Exception as error:
        raise TypeError(
            f"sample_weight must be an array that can be read, but is of type "
            f"{type(sample_weight).__name__}, which gives {type(error).__name__}: {error}"
        ) from error


def _checked_factors(
    weights: np.ndarray, shape: tuple[int, ...], kept: np.ndarray | None
) -> np.ndarray:
    import numpy as np

    if weights.shape != shape:
        raise ValueError(
            f"sample_weight must have the shape of target, {shape}, but has shape {weights.shape}"
        )
    weights = weights.astype(np.float64)
    bad = ~np.isfinite(weights) | (weights < 0)
    if kept is not None:  # padding may have any
        bad &= kept
    if bad.any():
        first = np.argwhere(bad)[0].tolist()
        raise ValueError(
            f"sample_weight must be finite and not negative, but is {weights[bad][0]} at "
            f"position {tuple(first)}"
        )
    return weights


def weight_to_numpy(weight: Array) -> np.ndarray:
    """Check a class weight, and return it in float64.

    Parameters
    ----------
    weight : array, shape (C,)
        As the caller gave it.

    Returns
    -------
    ndarray

    Raises
    ------
    TypeError, ValueError
        With what was given, and what is accepted.
    """
    import numpy as np

    check_weight(weight)
    check_readable("weight", weight)
    library = library_of("weight", weight)
    if library.compute is not None:
        return weight_to_numpy(*library.compute(weight))  # chunks may turn out to be masked
    return to_numpy(at_least_float32(library.namespace, weight))[0].astype(np.float64)
