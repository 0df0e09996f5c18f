"""The Dask kernel: a call's graph. What runs in its tasks is in ``chunks.py``.

With whole rows in a chunk there is one task per chunk, and a tree that merges sums. Where the
classes are chunked too, one task takes the chunks of the same rows, if they are small enough. Else
a target's score is first found in whichever chunk holds it and sent to the other chunks of its
rows; then each chunk sums its own classes.

The losses of the samples are added without rounding (see :mod:`mml_arrayapi.exact_sum`): the
total does not depend on the chunks of the rows, nor on the order in which workers finish.

Two facts shape the graph. Dask fuses what makes a chunk with what uses it only where no index is
summed over, so the classes' axis is kept until the end (of 1,000 chunks, 4,334 tasks become 2,069).
And ``concatenate=None`` must stay Dask's default, since layers that differ in it are not fused.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.array.reductions import _tree_reduce
from dask.layers import ArraySliceDep
from dask.utils import parse_bytes

from mml_arrayapi.backends.dask import chunks
from mml_arrayapi.backends.dask.alignment import (
    batch_axes,
    chunks_of,
    in_one_chunk,
    match_rows,
    options_of,
    unknown,
)
from mml_arrayapi.backends.numpy_formula import widened
from mml_arrayapi.kernel import Kernel, Problem
from mml_arrayapi.libraries import library_of

Array = Any

PER_TASK = 16  # sums are small, and take microseconds to merge
NAME = "multi_margin_loss"  # what the tasks are called, on dashboards too


def loss(problem: Problem, backend: str | None = None) -> da.Array:
    """Build the graph of the loss.

    Parameters
    ----------
    problem : Problem
        The checked call; ``input`` is a Dask array.
    backend : str, optional
        The kernel that the chunks must take.

    Returns
    -------
    dask array
        Shape ``(*batch)`` in the chunks of the scores' rows, or ``()``.
    """
    return _Graph(problem, backend).loss()


def loss_and_grad(
    problem: Problem, grad_output: Array | None, backend: str | None = None
) -> tuple[da.Array, da.Array]:
    """Build the graph of the loss and its gradient.

    Parameters
    ----------
    problem : Problem
        The checked call; ``input`` is a Dask array.
    grad_output : dask array, numpy array or None
        Of the loss's shape; None stands for 1.
    backend : str, optional
        The kernel that the chunks must take.

    Returns
    -------
    loss, grad : dask array
        The gradient has the scores' chunks. Computed together, each chunk is visited once.
    """
    return _Graph(problem, backend).loss_and_grad(problem, grad_output)


class _Graph:
    """The arrays of a call in matching chunks, and the steps that lead to the result."""

    def __init__(self, problem: Problem, backend: str | None) -> None:
        x, axis = problem.input, problem.axis
        self.x, self.rows, self.all = x, batch_axes(problem), tuple(range(x.ndim))
        self.target = match_rows(problem, problem.target)
        self.sizes = chunks_of(problem, self.target)
        self.place = ArraySliceDep(self.sizes), self.all
        self.scores = (x, self.all, *self.place, self.target, self.rows)
        # One block of weights beside every block of scores.
        weight = None if problem.weight is None else in_one_chunk(problem.weight)
        self.weight = (None, None) if weight is None else (weight, (axis,))
        self._weight_in_list = (None, None) if weight is None else (weight, (-2,))
        self.call = chunks.Call(
            options_of(problem), x.shape[axis], x.dtype, backend, x.chunks[axis]
        )
        # The indices of what a task gets as a list of all blocks along the classes.
        self._along_classes = tuple(-1 if i == axis else i for i in self.all)

    def loss(self) -> da.Array:
        if self.x.numblocks[self.call.axis] == 1:
            return self._reduced(
                self._blockwise(chunks.loss_of_rows, self.all, *self.scores, *self.weight)
            )
        if self._fit_together():
            return self._reduced(self._together(chunks.loss_of_joined_rows))
        rows = self._over_parts(self._own(), slopes=False)
        return self._reduced(self._blockwise(chunks.close, self.all, rows, self.all, classes=(1,)))

    def loss_and_grad(
        self, problem: Problem, grad_output: Array | None
    ) -> tuple[da.Array, da.Array]:
        upstream = self._upstream(problem, grad_output)
        if self.x.numblocks[self.call.axis] == 1:
            pair = self._blockwise(
                chunks.loss_and_grad_of_rows,
                self.all,
                *(*self.scores, *upstream, *self.weight),
                name="_and_grad",
            )
            losses = self._blockwise(chunks.first, self.all, pair, self.all)
            grad = self._blockwise(chunks.second, self.all, pair, self.all, name="_grad")
            return self._reduced(losses), grad
        if self._fit_together():
            pair = self._together(chunks.loss_and_grad_of_joined_rows, *upstream, name="_and_grad")
            losses = self._blockwise(chunks.first, self.all, pair, self.all, classes=(1,))
            grad = self._blockwise(
                chunks.of_part, self.all, pair, self._along_classes, *self.place, name="_grad"
            )
            return self._reduced(losses), grad
        own = self._own()
        rows = self._over_parts(own, slopes=True)
        losses = self._blockwise(chunks.close, self.all, rows, self.all, classes=(1,))
        grad = self._blockwise(
            chunks.grad_of_part,
            self.all,
            *(*self.scores, *own, rows, self.all, *upstream, *self.weight),
            name="_grad",
        )
        return self._reduced(losses), grad

    def _fit_together(self) -> bool:
        """Tell whether the chunks of the same rows are together no larger than Dask likes a chunk.

        Then one task takes them all.
        """
        if unknown(self.x):
            return False
        rows = math.prod(max(self.x.chunks[i]) for i in self.rows)
        size = rows * self.call.n_classes * self.x.dtype.itemsize
        return bool(size <= parse_bytes(dask.config.get("array.chunk-size")))

    def _together(self, function: Any, *upstream: Any, name: str = "") -> da.Array:
        """Run a function over the blocks of the same rows; the classes' axis becomes one block."""
        rows = tuple(self.sizes[i] for i in self.rows)
        return self._blockwise(
            function,
            self.all,
            *(self.x, self._along_classes, ArraySliceDep(rows), self.rows),
            *(self.target, self.rows, *upstream),
            *self._weight_in_list,
            name=name,
            new_axes={self.call.axis: 1},
            classes=(1,),
        )

    def _own(self) -> tuple[Any, ...]:
        """Arguments that hold the scores of the targets of a block's rows, as a list."""
        found = self._blockwise(chunks.own_scores, self.all, *self.scores, name="-own")
        return found, self._along_classes

    def _upstream(self, problem: Problem, grad_output: Array | None) -> tuple[Any, ...]:
        """Arguments that hold what the gradient is multiplied with, and each sample's share."""
        reduction = self.call.options.reduction
        upstream: tuple[Any, Any] = None, None
        if grad_output is not None:
            whole = reduction != "none"
            upstream = (
                (in_one_chunk(grad_output), ())
                if whole
                else (match_rows(problem, grad_output, "grad_output"), self.rows)
            )
        share: tuple[Any, Any] = 1.0, None
        if reduction == "mean":
            n = math.prod(sum(self.sizes[i]) for i in self.rows)
            if math.isnan(n) or self.call.options.ignore_index is not None:
                counts = self._blockwise(
                    chunks.number_of_rows, self.rows, self.target, self.rows, name="-count"
                )
                share = self._tree(counts, chunks.added, chunks.share, "-count", np.float64), ()
            else:
                share = 1 / (n or 1), None
        return (*upstream, *share)

    def _over_parts(self, own: tuple[Any, ...], slopes: bool) -> da.Array:
        """Add up the classes in each block of rows; their axis becomes one block."""
        parts = self._blockwise(
            partial(chunks.part_of_rows, slopes=slopes),
            self.all,
            *(*self.scores, *own),
            name="-part",
        )
        return self._blockwise(
            chunks.rows_of_parts,
            self.all,
            *(parts, self._along_classes, self.target, self.rows),
            *self._weight_in_list,
            name="-rows",
            new_axes={self.call.axis: 1},
            classes=(1,),
        )

    def _blockwise(
        self,
        function: Any,
        out: tuple[int, ...],
        *args: Any,
        name: str = "",
        classes: Any = None,
        **keywords: Any,
    ) -> da.Array:
        """Run a function of ``chunks.py`` over matching blocks."""
        sizes = dict(enumerate(self.sizes))
        if classes is not None:
            sizes[self.call.axis] = classes
        return da.blockwise(
            partial(function, call=self.call),
            out,
            *args,
            token=NAME + name,
            adjust_chunks={i: sizes[i] for i in out},
            align_arrays=False,
            dtype=self.x.dtype,
            meta=self._meta(len(out)),
            **keywords,
        )

    def _reduced(self, losses: da.Array) -> da.Array:
        """Merge the sums that the blocks of ``losses`` are; or leave the losses as they are."""
        if self.call.options.reduction == "none":
            return self._blockwise(chunks.only, self.rows, losses, self.all)
        rounded = partial(chunks.rounded, call=self.call, like=self._meta(0))
        return self._tree(losses, chunks.merged, rounded, "", self.x.dtype)

    def _tree(
        self, blocks: da.Array, combine: Any, aggregate: Any, name: str, dtype: Any
    ) -> da.Array:
        """Merge what the blocks are. ``da.reduction`` would do so with one more step per block."""
        each = max(2, int(PER_TASK ** (1 / max(1, len(self.rows)))))
        return _tree_reduce(
            blocks,
            aggregate,
            tuple(range(blocks.ndim)),
            keepdims=False,
            dtype=dtype,
            split_every=dict.fromkeys(range(blocks.ndim), each),
            combine=combine,
            name=NAME + name,
            concatenate=False,
            reduced_meta=self._meta(blocks.ndim),
        )

    def _meta(self, ndim: int) -> Array:
        return da.utils.meta_from_array(self.x._meta, ndim=ndim, dtype=self.x.dtype)


def _on_chunks(problem: Problem, name: str, library: str) -> Kernel | None:
    """Return this kernel, made to take the named one on every chunk; None if that can't be."""
    if library_of("input", problem.input._meta).name != library:
        return None
    return replace(
        KERNEL, loss=partial(loss, backend=name), loss_and_grad=partial(loss_and_grad, backend=name)
    )


KERNEL = Kernel(
    name="dask-blocks",
    library="dask",
    refuses=lambda _: None,
    loss=loss,
    loss_and_grad=loss_and_grad,
    supports=frozenset({"ignore_index"}),
    on_chunks=_on_chunks,
)

# The generic implementation for Dask arrays: the same graph, with the formula on every chunk. In
# operations of dask.array it would make a dozen layers, of which the query planner lacks several,
# and would need to know the sizes of the chunks.
ROW: dict[str, Any] = {
    "loss": partial(loss, backend="generic"),
    "loss_and_grad": partial(loss_and_grad, backend="generic"),
    "widened": widened,
}
