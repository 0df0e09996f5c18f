"""The loss and its gradient by loops in exact arithmetic, written from the definition alone."""

import math
from fractions import Fraction

import numpy as np


def sample(scores, target, p, margin, weight):
    """Loss and gradient of one sample of finite scores, as floats rounded once (integer p)."""
    exact = isinstance(p, int)
    number = Fraction if exact else float
    scores = [number(float(s)) for s in scores]
    factor = number(1 if weight is None else float(weight[target])) / len(scores)
    loss, grad = number(0), [number(0)] * len(scores)
    for j, score in enumerate(scores):
        z = score - scores[target] + number(margin)
        if j == target or z <= 0:
            continue
        loss += z**p
        slope = p * z ** (p - 1)
        grad[j] += factor * slope
        grad[target] -= factor * slope
    return loss * factor, grad


def loss_and_grad(scores, targets, *, p=1, margin=1.0, weight=None, reduction="mean"):
    """Losses (reduced) and the gradient of their sum, as float64. Scores are (N, C)."""
    samples = [
        sample(row, int(y), p, margin, weight) for row, y in zip(scores, targets, strict=True)
    ]
    losses = [loss for loss, _ in samples]
    scale = len(samples) if reduction == "mean" else 1
    grad = np.array([[float(g / scale) for g in row] for _, row in samples])
    grad = grad.reshape(np.shape(scores))
    if reduction == "none":
        return np.array([float(loss) for loss in losses]), grad
    total = math.fsum(losses) if isinstance(p, float) else sum(losses)
    if not samples:
        return (math.nan if reduction == "mean" else 0.0), grad
    return float(total / scale), grad
