"""Evaluation of files: loss, accuracy, share inside the margin, by class; exact and restartable."""

from __future__ import annotations

import json
import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from mml_arrayapi.arguments import InvalidTargetError, check_parameters

if TYPE_CHECKING:
    from mml_arrayapi.sources import Rows
    from mml_arrayapi.tally import Evaluation, Loss, Tally

Array = Any

BAD_INPUT = 2


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
    workers: int | None = None,
    chunk_size: int | None = None,
) -> Evaluation:
    """Evaluate scores in files of any size.

    The scores are read and counted piece by piece. The losses are added without rounding, so that
    the figures are the same to the last bit for any ``chunk_size`` and number of workers.

    Parameters
    ----------
    logits : path, array, or list of those
        The scores: float16, float32 or float64, shape (N, C). A path is a ``.npy`` file (it is
        mapped, not read), a ``.npz`` archive, or a pattern such as ``"part-*.npy"``, whose files
        follow one another. An archive of several arrays takes the name of one:
        ``"file.npz#logits"``.
    targets : path, array, or list of those
        Each sample's class: integers, shape (N,).
    p, margin, weight, reduction, axis, backend
        As in :func:`mml_arrayapi.multi_margin_loss`; ``reduction`` is ``"mean"`` or ``"sum"``,
        ``weight`` a NumPy array.
    workers : int, optional
        The number of threads; one per core if left out.
    chunk_size : int, optional
        The number of rows per piece; about 4 million scores if left out.

    Returns
    -------
    Evaluation
        The figures; printed, they are a table.

    Raises
    ------
    InputError
        An input is missing, damaged, or doesn't fit the other; the message says what to do.
    InvalidTargetError
        A target is out of range, with its position in the whole.
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
    from mml_arrayapi.sources import rows_of
    from mml_arrayapi.tally import Tally

    loss = _check(p, margin, weight, reduction, backend)
    rows = rows_of(logits, targets, axis, chunk_size)
    loss = loss._replace(elements=rows.elements)
    kernel = _kernel(rows, loss)
    tally = Tally(rows.n_classes)
    for one in _run(rows, loss, workers):
        tally.merge(one)
    return tally.evaluation(loss, reduction, kernel)


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


def _run(rows: Rows, loss: Loss, workers: int | None) -> Any:
    """Yield the tally of each piece, as they come."""
    from mml_arrayapi.sources import tally_piece

    pool: Executor = ThreadPoolExecutor(workers)
    try:
        futures: list[Future[Tally]] = [
            pool.submit(tally_piece, piece, rows.axis, loss) for piece in rows.pieces
        ]
        for future in as_completed(futures):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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
    parser.add_argument("logits", metavar="LOGITS", help="scores, shape (N, C): .npy, .npz; or a "
                        "quoted pattern of such files; FILE#NAME for one of several arrays")
    parser.add_argument("targets", metavar="TARGETS", help="integer classes, shape (N,)")
    parser.add_argument("--p", type=float, default=1.0, help="exponent, at least 1 (default 1)")
    parser.add_argument("--margin", type=float, default=1.0, help="default 1")
    parser.add_argument("--weight", metavar="W", help="one weight per class: a .npy or .npz file, "
                        "or numbers separated by commas")
    parser.add_argument("--reduction", choices=("mean", "sum"), default="mean")
    parser.add_argument("--axis", type=int, default=-1, help="the classes' axis (default -1)")
    parser.add_argument("--backend", metavar="KERNEL", help="the kernel that must run")
    parser.add_argument("--workers", type=int, help="default: one per core")
    parser.add_argument("--chunk-size", type=int, metavar="ROWS", help="rows read at a time")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=_command)


def _command(arguments: Any) -> int:
    from mml_arrayapi.sources import InputError

    try:
        figures = evaluate(
            arguments.logits,
            arguments.targets,
            p=arguments.p,
            margin=arguments.margin,
            weight=_weight(arguments.weight),
            reduction=arguments.reduction,
            axis=arguments.axis,
            backend=arguments.backend,
            workers=arguments.workers,
            chunk_size=arguments.chunk_size,
        )
    except InvalidTargetError as error:
        return _fail(f"{arguments.targets}: {error}; check the labels, or --axis")
    except (InputError, ValueError, TypeError) as error:
        return _fail(str(error))
    print(json.dumps(figures.to_json(), indent=1) if arguments.json else figures)
    return 0


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


def _fail(message: str) -> int:
    print(f"mml-arrayapi evaluate: error: {message}", file=sys.stderr)
    return BAD_INPUT
