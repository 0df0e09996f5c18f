"""In the place of ``torch.nn.MultiMarginLoss`` and ``torch.nn.functional.multi_margin_loss``.

Change the import, and nothing else: arguments, positions, defaults, the deprecated ``size_average``
and ``reduce``, and saved state are PyTorch's. What the numbers are is
:func:`mml_arrayapi.multi_margin_loss`'s business; where PyTorch's differ is told in
``docs/pytorch.md``.
"""

# No annotations as strings (``from __future__``): a graph of torch.fx keeps them, and could then
# not be pickled.
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from mml_arrayapi import loss as _loss
from mml_arrayapi.backends.pytorch import library  # noqa: F401  (what exported programs call)
from mml_arrayapi.backends.pytorch.state import reduction_name
from mml_arrayapi.validation import check_parameters, check_weight

__all__ = ["MultiMarginLoss", "multi_margin_loss"]


def multi_margin_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    p: float = 1,
    margin: float = 1.0,
    weight: torch.Tensor | None = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> torch.Tensor:
    r"""Compute the loss, with the signature of ``torch.nn.functional.multi_margin_loss``.

    Parameters
    ----------
    input : torch.Tensor, shape (N, C) or (C,), real floating
        The scores; more batch axes in front are accepted too.
    target : torch.Tensor, shape (N,) or (), any integer dtype
        Each sample's class, 0 to C - 1.
    p : float, default 1
        The exponent, any real number >= 1 (PyTorch has 1 and 2).
    margin : float, default 1.0
        Any finite real number.
    weight : torch.Tensor, shape (C,), real floating, optional
        One factor per class.
    size_average, reduce : bool, optional
        Deprecated, with PyTorch's own warning: they override ``reduction``.
    reduction : {"mean", "none", "sum"}
        The mean over the samples, one loss per sample, or their sum.

    Returns
    -------
    torch.Tensor
        Shape (), or that of ``target``; the dtype of ``input``.

    Raises
    ------
    ValueError, TypeError, InvalidTargetError
        As :func:`mml_arrayapi.multi_margin_loss` does.

    Examples
    --------
    >>> import torch
    >>> from mml_arrayapi.pytorch import multi_margin_loss
    >>> multi_margin_loss(torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3]), 2)
    tensor(0.1525)
    """
    tensors = input, target, weight
    if has_torch_function(tensors):  # a proxy of torch.fx, a subclass with an opinion
        options = p, margin, weight, size_average, reduce, reduction
        return handle_torch_function(multi_margin_loss, tensors, input, target, *options)
    name: Any = reduction_name(size_average, reduce, reduction)
    return _loss.multi_margin_loss(input, target, p=p, margin=margin, weight=weight, reduction=name)


class MultiMarginLoss(torch.nn.MultiMarginLoss):
    """The loss as a module, with the constructor and the state of ``torch.nn.MultiMarginLoss``.

    Parameters
    ----------
    p : float, default 1
        The exponent, any real number >= 1 (PyTorch has 1 and 2).
    margin : float, default 1.0
        Any finite real number.
    weight : torch.Tensor, shape (C,), real floating, optional
        One factor per class. A buffer: it moves with the module, and is in its ``state_dict``.
    size_average, reduce : bool, optional
        Deprecated, with PyTorch's own warning: they override ``reduction``.
    reduction : {"mean", "none", "sum"}
        The mean over the samples, one loss per sample, or their sum.

    Raises
    ------
    ValueError, TypeError
        An argument is not accepted; ``forward`` raises as
        :func:`mml_arrayapi.multi_margin_loss`.

    Examples
    --------
    >>> import torch
    >>> from mml_arrayapi.pytorch import MultiMarginLoss
    >>> criterion = MultiMarginLoss(margin=0.5)
    >>> criterion
    MultiMarginLoss(p=1, margin=0.5, reduction='mean')
    >>> scores = torch.tensor([[0.1, 0.2, 0.4, 0.8]], requires_grad=True)
    >>> criterion(scores, torch.tensor([3])).backward()
    >>> scores.grad
    tensor([[ 0.0000,  0.0000,  0.2500, -0.2500]])
    """

    def __init__(
        self,
        p: float = 1,
        margin: float = 1.0,
        weight: torch.Tensor | None = None,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
    ) -> None:
        name = reduction_name(size_average, reduce, reduction)
        floats = check_parameters(name, p, margin)
        # Plain numbers: torch.compile takes scalars of NumPy for arrays.
        p, margin = (x if type(x) is int else f for x, f in zip((p, margin), floats, strict=True))
        if weight is not None:
            check_weight(weight)
        super().__init__(1, margin, weight, reduction=name)
        self.p = p

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Compute the loss of scores and their targets; see :func:`multi_margin_loss`."""
        return multi_margin_loss(
            input, target, self.p, self.margin, self.weight, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        """Return the parameters, for ``repr``."""
        return f"p={self.p}, margin={self.margin}, reduction={self.reduction!r}"
