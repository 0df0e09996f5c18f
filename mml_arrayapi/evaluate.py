"""Evaluation of files: loss, accuracy, share inside the margin, by class; exact and restartable."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mml_arrayapi.arguments import InvalidTargetError, check_parameters

if TYPE_CHECKING:
    from mml_arrayapi.sources import Rows
    from mml_arrayapi.tally import Evaluation, Loss

Array = Any

FAILED, BAD_INPUT = 1, 2
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
    from mml_arrayapi.journal import Journal
    from mml_arrayapi.schedule import run
    from mml_arrayapi.sources import rows_of, tally_piece
    from mml_arrayapi.tally import Tally

    loss = _check(p, margin, weight, reduction, backend)
    for name, value in (("workers", workers), ("chunk_size", chunk_size), ("timeout", timeout)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, but is {value}")
    rows = rows_of(logits, targets, axis, chunk_size)
    loss = loss._replace(elements=rows.elements)
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
    from mml_arrayapi.sources import InputError

    if any(piece.scores.shard.array is not None for piece in rows.pieces):
        raise InputError("checkpoint: only files can be resumed, but arrays were given")
    weight = None if loss.weight is None else loss.weight.tolist()
    parameters = {"p": loss.p, "margin": loss.margin, "weight": weight, "axis": rows.axis}
    cut = {"kernel": kernel, "chunk size": rows.identity[0], "inputs": rows.identity[1:]}
    return {"version": 1, **parameters, **cut}


def _check(p: float, margin: float, weight: Any, reduction: str, backend: str | None) -> Loss:
    import numpy as np

    from mml_arrayapi.tally import Loss

    p, margin = check_parameters(reduction, p, margin)
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum', but is 'none'")
    return Loss(p, margin, None if weight is None else np.asarray(weight), backend)


def _kernel(rows: Rows, loss: Loss) -> str:
    """Return the name of the kernel that runs; refuse what it refuses before any work."""
    import numpy as np

    from mml_arrayapi.arguments import check
    from mml_arrayapi.registry import choose_for_job

    dtype = np.float64 if rows.dtype.itemsize == 8 else np.float32
    problem = check(
        np.zeros((1, rows.n_classes), dtype),
        np.zeros(1, np.int64),
        p=loss.p,
        margin=loss.margin,
        weight=loss.weight,
        reduction="none",
        axis=-1,
        check_target="nan",
    )
    return choose_for_job(problem, loss.backend, loss.elements).name


def add_parser(commands: Any) -> None:
    """Add ``evaluate`` to the command line.

    Parameters
    ----------
    commands
        What ``ArgumentParser.add_subparsers`` returned.
    """
    parser = commands.add_parser(
        "evaluate",
        help="loss and accuracy of scores in files",
        description="Evaluate scores (logits) in files: loss, accuracy, share of samples inside "
        "the margin, in all and by class of the target.",
        epilog="accuracy: the share of samples whose target has the highest score of all; a tie is "
        "no success. inside the margin: the share of samples with another class within the margin "
        "of the target's score, or above it.",
    )
    parser.add_argument(
        "logits",
        metavar="LOGITS",
        help="scores, shape (N, C): .npy, .npz, .parquet, a Zarr store, or a quoted pattern such "
        "as 'part-*.npy'; FILE#NAME for one of several arrays or columns",
    )
    parser.add_argument("targets", metavar="TARGETS", help="integer classes, shape (N,)")
    parser.add_argument("--p", type=float, default=1.0, help="exponent, at least 1 (default 1)")
    parser.add_argument("--margin", type=float, default=1.0, help="default 1")
    parser.add_argument(
        "--weight", metavar="W", help="one weight per class: a file, or numbers with commas"
    )
    parser.add_argument("--reduction", choices=("mean", "sum"), default="mean")
    parser.add_argument("--axis", type=int, default=-1, help="the classes' axis (default -1)")
    parser.add_argument("--backend", metavar="KERNEL", help="the kernel that must run")
    parser.add_argument(
        "--scheduler",
        default="threads",
        metavar="threads|processes|ADDRESS",
        help="who does the work; ADDRESS of a Dask scheduler (default threads)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="default: one per core")
    parser.add_argument("--chunk-size", type=int, metavar="ROWS", help="rows read at a time")
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="on a cluster: seconds without progress until idle workers take over (default 300)",
    )
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="keep finished pieces there; resume if it has some"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--report", metavar="FILE.html", help="write a page with plots")
    parser.set_defaults(run=_command)


def _command(arguments: Any) -> int:
    from mml_arrayapi.journal import write_whole
    from mml_arrayapi.report import to_html
    from mml_arrayapi.sources import InputError, WorkerError

    keep = ("logits", "targets", "p", "margin", "reduction", "axis", "backend", "scheduler")
    options = {name: getattr(arguments, name) for name in (*keep, "workers", "chunk_size")}
    bar = _Progress() if sys.stderr.isatty() else None
    try:
        figures = evaluate(
            **options,
            weight=_weight(arguments.weight),
            timeout=arguments.timeout,
            checkpoint=arguments.checkpoint,
            progress=bar,
        )
        if arguments.report:
            write_whole(arguments.report, to_html(figures, arguments.logits, arguments.targets))
    except InvalidTargetError as error:
        return _fail(f"{arguments.targets}: {error}; check the labels, or --axis", BAD_INPUT)
    except WorkerError as error:
        return _fail(str(error), FAILED)
    except (InputError, ValueError, TypeError) as error:
        return _fail(str(error), BAD_INPUT)
    finally:
        if bar is not None:
            bar.end()
    print(json.dumps(figures.to_json(), indent=1) if arguments.json else figures)
    return 0


class _Progress:
    """A bar on the terminal: the share that is done, rows per second, the time that is left."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._first = 0
        self._shown = 0.0

    def __call__(self, done: int, rows: int) -> None:
        now = time.monotonic()
        if self._start is None:
            self._start, self._first = now, done
        if done < rows and now - self._shown < 0.1:
            return
        self._shown = now
        filled = 30 * done // max(1, rows)
        text = f"[{'#' * filled:<30}] {100 * done // max(1, rows):3d} %  {done:,} of {rows:,} rows"
        if done > self._first:
            speed = (done - self._first) / max(now - self._start, 1e-9)
            text += f"  {speed:,.0f}/s  {(rows - done) / speed:,.0f} s left"
        print(f"\r{text:<100}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._start is not None:
            print(file=sys.stderr)


def _weight(text: str | None) -> Any:
    """Read the weights from a file, or from the argument itself."""
    import numpy as np

    from mml_arrayapi.sources import read_array

    if text is None:
        return None
    try:
        return np.asarray([float(part) for part in text.split(",")])
    except ValueError:
        return read_array(text)


def _fail(message: str, code: int) -> int:
    print(f"mml-arrayapi evaluate: error: {message}", file=sys.stderr)
    return code
