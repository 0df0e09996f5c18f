"""Evaluation of files: loss, accuracy, share inside the margin, by class; exact and restartable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mml_arrayapi.validation import check_parameters

if TYPE_CHECKING:
    from mml_arrayapi.evaluation.inputs import Rows
    from mml_arrayapi.evaluation.metrics import Evaluation, Loss

Array = Any

TIMEOUT = 300.0


def evaluate(
    logits: Any,
    targets: Any,
    *,
    p: float = 1,
    margin: float = 1.0,
    weight: Array | None = None,
    reduction: str = "mean",
    axis: int = -1,
    backend: str | None = None,
    scheduler: str = "threads",
    workers: int | None = None,
    chunk_size: int | None = None,
    checkpoint: str | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate scores in files of any size.

    The scores are read and counted piece by piece. The losses are added without rounding, so that
    the figures are the same to the last bit for any ``chunk_size``, scheduler and number of
    workers, whatever happens to these on the way.

    Parameters
    ----------
    logits : path, array, or list of those
        The scores: float16, float32 or float64, shape (N, C). A path is a ``.npy`` file (it is
        mapped, not read), a ``.npz`` archive, a Zarr store, a Parquet file (one column of lists,
        or one column of floats per class), or a pattern such as ``"part-*.npy"``, whose files
        follow one another. Where a file holds several arrays or columns, the name of one follows
        a ``#``: ``"file.npz#logits"``. An array is NumPy's or Dask's.
    targets : path, array, or list of those
        Each sample's class: integers, shape (N,).
    p, margin, weight, reduction, axis, backend
        As in :func:`mml_arrayapi.multi_margin_loss`; ``reduction`` is ``"mean"`` or ``"sum"``,
        ``weight`` a NumPy array, ``backend`` a kernel for NumPy arrays.
    scheduler : str, default "threads"
        ``"threads"``, ``"processes"``, or the address of a Dask scheduler, whose workers must see
        the files under the same paths.
    workers : int, optional
        The number of threads or processes, one per core if left out; of a cluster, how many
        workers to wait for.
    chunk_size : int, optional
        The number of rows per piece; about 4 million scores if left out. Zarr's chunks and
        Parquet's row groups are not torn apart.
    checkpoint : path, optional
        A folder for a journal of the finished pieces. A run that was killed is resumed there.
    timeout : float, default 300
        On a cluster, seconds without any finished piece after which the unfinished ones are given
        to idle workers.
    progress : callable, optional
        Called as ``progress(done, rows)`` when a piece is finished.

    Returns
    -------
    Evaluation
        The figures; printed, they are a table.

    Raises
    ------
    InputError
        An input is missing, damaged, or doesn't fit the others; the message says what to do.
    InvalidTargetError
        A target is out of range, with its position in the whole.
    WorkerError
        Workers died again and again, or hang.
    TypeError, ValueError
        A parameter is not accepted.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import evaluate
    >>> figures = evaluate(np.asarray([[2.0, 0.5], [0.25, 0.0]]), np.asarray([0, 1]))
    >>> figures.loss, figures.accuracy, figures.inside_margin
    (0.3125, 0.5, 0.5)
    """
    from mml_arrayapi.evaluation.inputs import rows_of, tally_piece
    from mml_arrayapi.evaluation.journal import Journal
    from mml_arrayapi.evaluation.metrics import Tally
    from mml_arrayapi.evaluation.schedule import run

    loss = _check(p, margin, weight, reduction, backend)
    for name, value in (("workers", workers), ("chunk_size", chunk_size), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, but is {value}")
    rows = rows_of(logits, targets, axis, chunk_size)
    kernel = _kernel(rows, loss)

    total, done = Tally(rows.n_classes), 0
    journal = Journal(checkpoint, _about(rows, loss, kernel)) if checkpoint is not None else None
    finished = journal.finished if journal is not None else {}
    for number, tally in finished.items():
        total.merge(tally)
        done += rows.pieces[number].rows
    jobs = [(number, (piece, rows.axis, loss)) for number, piece in enumerate(rows.pieces)]
    left = [job for job in jobs if job[0] not in finished]
    try:
        for number, tally in run(tally_piece, left, scheduler, workers, timeout) if left else ():
            if journal is not None:
                journal.add(number, tally)
            total.merge(tally)
            done += rows.pieces[number].rows
            if progress is not None:
                progress(done, rows.n_rows)
    finally:
        if journal is not None:
            journal.close()
    return total.evaluation(loss, reduction, kernel)


def _about(rows: Rows, loss: Loss, kernel: str) -> dict[str, Any]:
    """Return what a journal must agree with for its pieces to be used."""
    from mml_arrayapi.evaluation.inputs import InputError

    if any(piece.scores.shard.array is not None for piece in rows.pieces):
        raise InputError("checkpoint: only files can be resumed, but arrays were given")
    weight = None if loss.weight is None else loss.weight.tolist()
    parameters = {"p": loss.p, "margin": loss.margin, "weight": weight, "axis": rows.axis}
    cut = {"kernel": kernel, "chunk size": rows.identity[0], "inputs": rows.identity[1:]}
    return {"version": 1, **parameters, **cut}


def _check(p: float, margin: float, weight: Any, reduction: str, backend: str | None) -> Loss:
    import numpy as np

    from mml_arrayapi.evaluation.metrics import Loss

    p, margin = check_parameters(reduction, p, margin)
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum', but is 'none'")
    return Loss(p, margin, None if weight is None else np.asarray(weight), backend)


def _kernel(rows: Rows, loss: Loss) -> str:
    """Return the name of the kernel that runs; refuse what it refuses before any work."""
    import numpy as np

    from mml_arrayapi.loss import explain

    dtype = np.float64 if rows.dtype.itemsize == 8 else np.float32
    scores = np.zeros((1, rows.n_classes), dtype)
    options = {**loss._asdict(), "reduction": "none", "check_target": "nan"}
    return explain(scores, np.zeros(1, np.int64), **options).kernel
