"""A metric for torchmetrics: the loss of all samples, exact for any number of processes.

Importing this module imports torchmetrics and PyTorch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, SupportsFloat, SupportsIndex

import torch
from torchmetrics import Metric

from mml_arrayapi.accumulator import LossAccumulator

Array = Any

SUMS = ("sum", "sample_weights")  # of a state; the rest are parameters
SIZE = 2048  # bytes of the state's JSON: two sums of at most 560 hexadecimal digits, ten counts


class MultiMarginLoss(Metric):  # type: ignore[misc]  # its base is Any to the type checker
    """The loss of a stream of batches as a ``torchmetrics.Metric``.

    Parameters
    ----------
    p : float, default 1
        The exponent, a finite real number >= 1.
    margin : float, default 1.0
        Any finite real number.
    weight : array, shape (C,), real floating, optional
        One factor per class.
    ignore_index : int, optional
        Samples with this target are left out.
    reduction : {"mean", "sum"}
        What :meth:`compute` returns.
    **kwargs
        Those of ``torchmetrics.Metric``, such as ``sync_on_compute``.

    Notes
    -----
    The state is a :class:`mml_arrayapi.LossAccumulator`'s. Processes are synchronised by merging
    their exact sums, so the result has the same bits for any number of processes and, on the CPU's
    kernels, any cut into batches.

    Examples
    --------
    >>> import torch
    >>> from mml_arrayapi.torchmetrics import MultiMarginLoss
    >>> metric = MultiMarginLoss()
    >>> metric.update(torch.tensor([[0.5, 0.0, -2.0]]), torch.tensor([0]))
    >>> metric.update(torch.tensor([[0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 1]))
    >>> metric.compute()
    tensor(0.2778, dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    plot_lower_bound = 0.0

    totals: torch.Tensor

    def __init__(
        self,
        p: SupportsFloat = 1,
        margin: SupportsFloat = 1.0,
        weight: Array | None = None,
        ignore_index: SupportsIndex | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # What the accumulator is, but for its sums; these are in the state.
        self._empty = LossAccumulator(p=p, margin=margin, weight=weight, ignore_index=ignore_index)
        self._empty.compute(reduction)  # raises for another reduction
        self.reduction = reduction
        self.add_state("totals", _to_tensor(self._empty), dist_reduce_fx=self._merged)

    def update(
        self, input: torch.Tensor, target: torch.Tensor, sample_weight: torch.Tensor | None = None
    ) -> None:
        r"""Add a batch.

        Parameters
        ----------
        input : torch.Tensor, shape (\*batch, C), real floating
            The scores.
        target : torch.Tensor, shape (\*batch), any integer dtype
            Each sample's class.
        sample_weight : torch.Tensor, shape (\*batch), real, optional
            A factor for each sample's loss, finite and not negative.
        """
        accumulator = self._from_tensor(self.totals)
        if isinstance(input, torch.Tensor):  # else the accumulator says what is accepted
            input = input.detach()
        accumulator.update(input, target, sample_weight)
        self.totals = _to_tensor(accumulator).to(self.totals.device)

    def compute(self) -> torch.Tensor:
        """Return the loss of all samples so far, float64."""
        loss = self._from_tensor(self.totals).compute(self.reduction)
        return torch.tensor(loss, dtype=torch.float64, device=self.totals.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot values with matplotlib; see ``torchmetrics.Metric.plot``.

        Parameters
        ----------
        val : tensor or sequence of tensors, optional
            What :meth:`compute` or calling the metric returned; :meth:`compute` is called if left
            out.
        ax : matplotlib.axes.Axes, optional
            Where to plot.

        Returns
        -------
        figure, axes
        """
        return self._plot(val, ax)

    def _merged(self, states: torch.Tensor) -> torch.Tensor:
        """Merge the states of several processes, one per row."""
        merged = self._from_tensor(states[0])
        for state in states[1:]:
            merged.merge(self._from_tensor(state))
        return _to_tensor(merged).to(states.device)

    def _from_tensor(self, totals: torch.Tensor) -> LossAccumulator:
        state = json.loads(bytes(totals.to("cpu", torch.uint8).tolist()))
        own = self._empty.state()
        if state.pop("parameters") != _digest(own):
            raise ValueError(
                "the state is that of a metric with another p, margin, weight or ignore_index; "
                f"this one is {self._empty!r}"
            )
        return LossAccumulator.from_state({**own, **state})


def _to_tensor(accumulator: LossAccumulator) -> torch.Tensor:
    """Return the sums of an accumulator as bytes of JSON, filled up with spaces.

    With them goes what tells metrics of other parameters apart: a MetricCollection makes one of
    all whose states are equal after the first batch.
    """
    state = accumulator.state()
    sums = {name: state[name] for name in SUMS}
    text = json.dumps({"parameters": _digest(state), **sums}).encode().ljust(SIZE)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).clone()


def _digest(state: dict[str, Any]) -> str:
    parameters = {name: value for name, value in state.items() if name not in SUMS}
    return hashlib.sha256(json.dumps(parameters).encode()).hexdigest()[:32]
