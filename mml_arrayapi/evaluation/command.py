"""``mml-arrayapi evaluate``: the evaluation of files on the command line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from mml_arrayapi.evaluation.run import TIMEOUT, evaluate
from mml_arrayapi.validation import InvalidTargetError

FAILED, BAD_INPUT = 1, 2


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
    from mml_arrayapi.evaluation.inputs import InputError, WorkerError
    from mml_arrayapi.evaluation.journal import write_whole
    from mml_arrayapi.evaluation.report import to_html

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

    from mml_arrayapi.evaluation.inputs import read_array

    if text is None:
        return None
    try:
        return np.asarray([float(part) for part in text.split(",")])
    except ValueError:
        return read_array(text)


def _fail(message: str, code: int) -> int:
    print(f"mml-arrayapi evaluate: error: {message}", file=sys.stderr)
    return code
