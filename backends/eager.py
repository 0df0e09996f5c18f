"""Libraries that compute at once, in the CPU's memory: large inputs go through it in tiles.

The temporaries of a tile stay in the cache, and are all the memory that a call takes beside its
result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from mml_arrayapi import formula
from mml_arrayapi.kernel import Problem

Array = Any

TILE = 2**17  # elements


@np.errstate(all="ignore")
def loss(problem: Problem) -> Array:
    """Compute the loss as :func:`mml_arrayapi.formula.loss` does."""
    if _is_small(problem):
        return formula.loss(problem)
    parts = [formula.losses(tile) for _, tile in _tiles(problem)]
    return formula.reduce(problem, _joined(problem, parts))


@np.errstate(all="ignore")
def loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    """Compute loss and gradient as :func:`mml_arrayapi.formula.loss_and_grad` does."""
    if _is_small(problem):
        return formula.loss_and_grad(problem, grad_output)
    upstream: Any = formula.upstream(problem, grad_output)
    grad = problem.xp.empty_like(problem.input)
    parts = []
    for where, tile in _tiles(problem):
        each = upstream if getattr(upstream, "ndim", 0) == 0 else upstream[where]
        losses, grad[where] = formula.losses_and_grad(tile, each)
        parts.append(losses)
    return formula.reduce(problem, _joined(problem, parts)), grad


def _is_small(problem: Problem) -> bool:
    return bool(problem.input.size <= TILE or problem.input.ndim == 1)


def _tiles(problem: Problem) -> Iterator[tuple[Any, Problem]]:
    """Cut the batch along its first axis; yield each part's place in ``input``, and its problem."""
    shape, axis = problem.input.shape, _cut(problem)
    step = max(1, TILE * shape[axis] // problem.input.size)
    for start in range(0, shape[axis], step):
        rows = slice(start, min(start + step, shape[axis]))
        where = (slice(None),) * axis + (rows, ...)
        yield where, problem._replace(input=problem.input[where], target=problem.target[rows, ...])


def _cut(problem: Problem) -> int:
    return 1 if problem.axis == 0 else 0


def _joined(problem: Problem, parts: list[Array]) -> Array:
    return problem.xp.concat(parts, axis=_cut(problem))


ROW: dict[str, Any] = {"loss": loss, "loss_and_grad": loss_and_grad}
