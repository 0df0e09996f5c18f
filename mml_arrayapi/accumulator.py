"""The loss of a stream of batches: exact, mergeable in any order, the same on every library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mml_arrayapi.exact_sum import ExactSum
from mml_arrayapi.libraries import library_of
from mml_arrayapi.loss import at_least_float32, sample_losses
from mml_arrayapi.validation import check_parameters

if TYPE_CHECKING:
    import numpy as np

Array = Any


class LossAccumulator:
    """The loss of a stream of batches: exact, whatever the batches and their order.

    The losses of the samples are added without rounding; the sum is rounded once, when it is
    asked for (as ``math.fsum`` does). So the figure has the same bits for any cut into batches,
    any order of merging, any number of workers. It is picklable, and its state is plain JSON.

    Parameters
    ----------
    p : float, default 1
        The exponent, a finite real number >= 1.
    margin : float, default 1.0
        Any finite real number.
    weight : array, shape (C,), real floating, optional
        One factor per class, of any library; it is taken to the library and device of each batch.

    Notes
    -----
    Each sample's loss is what ``multi_margin_loss(..., reduction="none")`` gives, rounded to the
    scores' dtype, but for 16-bit scores, whose losses are kept in float32.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import LossAccumulator
    >>> first, second = LossAccumulator(), LossAccumulator()
    >>> first.update(np.asarray([[0.5, 0.0, -2.0]]), np.asarray([0]))
    >>> second.update(np.asarray([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), np.asarray([0, 1]))
    >>> first.merge(second)
    >>> first.count, first.compute("sum")
    (3, 0.8333333333333333)
    """

    def __init__(self, *, p: float = 1, margin: float = 1.0, weight: Array | None = None) -> None:
        self.p, self.margin = check_parameters("mean", p, margin)
        self._weight = None if weight is None else _weight_to_numpy(weight)
        self._sum = ExactSum()

    @property
    def count(self) -> int:
        """The number of samples so far."""
        return self._sum.count

    def update(self, input: Array, target: Array) -> None:
        r"""Add a batch.

        Parameters
        ----------
        input : array, shape (\*batch, C), real floating
            The scores, of any array API library; the batches may come from different ones. Lazy
            ones are computed.
        target : array, shape (\*batch), any integer dtype
            Each sample's class.

        Raises
        ------
        TypeError, ValueError, InvalidTargetError
            As :func:`mml_arrayapi.multi_margin_loss` with ``check_target="raise"``. Nothing has
            been added then.
        """
        import numpy as np

        library = library_of("input", input)
        weight = self._weight
        if weight is not None:
            weight = library.namespace.asarray(weight, device=getattr(input, "device", None))
        losses = sample_losses(
            input, target, p=self.p, margin=self.margin, weight=weight, check_target="raise"
        )
        self._sum.add(np.asarray(library.on_host(losses)))

    def merge(self, other: LossAccumulator) -> None:
        """Add what another accumulator has seen.

        Parameters
        ----------
        other : LossAccumulator
            One with the same ``p``, ``margin`` and ``weight``.

        Raises
        ------
        TypeError
            Not an accumulator.
        ValueError
            Its parameters differ.
        """
        if not isinstance(other, LossAccumulator):
            raise TypeError(f"other must be a LossAccumulator, but is a {type(other).__name__}")
        mine, theirs = self.state(), other.state()
        for name in ("p", "margin", "weight"):
            if mine[name] != theirs[name]:
                raise ValueError(
                    f"only accumulators of the same {name} can be merged, but this one has "
                    f"{mine[name]} and the other {theirs[name]}"
                )
        self._sum.merge(other._sum)

    def compute(self, reduction: str = "mean") -> float:
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
        return self._sum.over(1 if reduction == "sum" else self._sum.count)

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON: dictionaries, lists, strings and numbers.

        Returns
        -------
        dict
            ``p``, ``margin``, ``weight`` and ``sum`` (see :meth:`ExactSum.state`).
        """
        weight = None if self._weight is None else self._weight.tolist()
        return {"p": self.p, "margin": self.margin, "weight": weight, "sum": self._sum.state()}

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

        Examples
        --------
        >>> from mml_arrayapi import LossAccumulator
        >>> LossAccumulator.from_state(LossAccumulator(p=2).state()).p
        2.0
        """
        import numpy as np

        weight = state["weight"]
        weight = None if weight is None else np.asarray(weight, dtype=np.float64)
        made = cls(p=state["p"], margin=state["margin"], weight=weight)
        made._sum = ExactSum.from_state(state["sum"])
        return made


def _weight_to_numpy(weight: Array) -> np.ndarray:
    import numpy as np

    library = library_of("weight", weight)
    xp = library.namespace
    if not xp.isdtype(weight.dtype, "real floating"):
        raise TypeError(f"weight must have a real floating dtype, but has dtype {weight.dtype}")
    if weight.ndim != 1:
        raise ValueError(f"weight must have shape (C,), but has shape {tuple(weight.shape)}")
    return np.asarray(library.on_host(at_least_float32(xp, weight)), dtype=np.float64)
