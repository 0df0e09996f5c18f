"""The conformance suite's float64 reference, on NumPy arrays. (The exact one is ``make_golden.exact``.)"""

import math

import numpy as np

from mml_arrayapi.conformance.reference import reference

# Why the loss of a sample of four classes is NaN: its scores, its target, and class 1's weight.
UNDEFINED = {
    "a score": ([0.5, -1.4, 2.0, math.nan], 1, 1.0),
    "own score": ([0.5, math.nan, 2.0, 0.0], 1, 1.0),
    "infinities": ([0.0, math.inf, math.inf, 0.0], 1, 1.0),
    "target": ([0.5, -1.4, 2.0, 0.1], 7, 1.0),
    "weight": ([0.5, -1.4, 2.0, 0.1], 1, math.nan),
}


def losses_and_grad(scores, targets, *, p=1, margin=1.0, weight=None, ignore_index=None):
    """The losses of (N, C) scores and the gradient of their sum, float64."""
    found = _reference(scores, targets, p, margin, weight, ignore_index)
    return np.array(found.losses), np.array(found.grad).reshape(np.shape(scores))


def loss_and_grad(
    scores, targets, *, p=1, margin=1.0, weight=None, reduction="mean", ignore_index=None
):
    """The losses of (N, C) scores, reduced, and the gradient of their sum or mean, float64."""
    found = _reference(scores, targets, p, margin, weight, ignore_index)
    grad = np.array(found.grad).reshape(np.shape(scores))
    if reduction == "none":
        return np.array(found.losses), grad
    return found.total(reduction)[0], grad / (found.count or 1) if reduction == "mean" else grad


def _reference(scores, targets, p, margin, weight, ignore_index):
    rows = np.asarray(scores, dtype=np.float64).tolist()
    weight = None if weight is None else np.asarray(weight, dtype=np.float64).tolist()
    integers = [int(y) for y in targets]
    return reference(rows, integers, p=p, margin=margin, weight=weight, ignore_index=ignore_index)
