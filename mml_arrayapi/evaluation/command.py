"""``mml-arrayapi evaluate``: the evaluation of files on the command line."""

from __future__ import annotations

import json
import os
import shlex
import sys
from typing import Any

from mml_arrayapi.console import complain
from mml_arrayapi.evaluation.errors import InputError, WorkerError, on_a_line, one_line, require
from mml_arrayapi.evaluation.run import TIMEOUT, check_path, evaluate
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
        epilog="example: mml-arrayapi evaluate logits.npy labels.npy --report report.html; "
        "accuracy: the share of samples whose target has the highest score of all; a tie is "
        "no success. inside the margin: the share of samples with another class within the margin "
        "of the target's score, or above it. Exit codes: 0; 1 if workers fail; 2 for bad input, or "
        "if a file or the output cannot be written; 130 for Ctrl-C; 141 if the output is closed.",
    )
    add = parser.add_argument
    add(
        "logits",
        metavar="LOGITS",
        help="scores, shape (N, C): .npy, .npz, .parquet, .h5, .safetensors, a Zarr store, a URL, "
        "or a quoted pattern such as 'part-*.npy'; FILE#NAME for one of several arrays or columns",
    )
    add("targets", metavar="TARGETS", help="integer classes, shape (N,)")
    add("--p", type=float, default=1.0, help="exponent, at least 1 (default 1)")
    add("--margin", type=float, default=1.0, help="default 1")
    add("--weight", metavar="W", help="one weight per class: a file, or numbers with commas")
    add("--sample-weight", metavar="FILE", help="one weight per sample")
    add("--ignore-index", type=int, metavar="LABEL", help="leave out samples with this label")
    add("--reduction", choices=("mean", "sum"), default="mean")
    add("--axis", type=int, default=-1, help="the classes' axis (default -1)")
    add("--backend", metavar="KERNEL", help="the kernel that must run")
    add("--class-names", metavar="FILE", help="one name per line, or a list in a .json file")
    add(
        "--unwritten-chunks",
        choices=("error", "fill"),
        help="chunks of a store that were never written (default: an error, except in the scores)",
    )
    add(
        "--scheduler",
        default="threads",
        metavar="threads|processes|ADDRESS",
        help="who does the work; ADDRESS of a Dask scheduler (default threads)",
    )
    add("--workers", type=int, metavar="N", help="default: as the CPUs and the memory allow")
    add("--chunk-size", type=int, metavar="ROWS", help="rows read at a time")
    add(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="S",
        help="on a cluster: seconds without progress until idle workers take over (default 300)",
    )
    add("--checkpoint", metavar="DIR", help="keep finished batches there; resume if it has some")
    add("--json", action="store_true", help="print JSON instead of a table")
    add("--report", metavar="FILE.html", help="write a page with plots")
    add("--compare", metavar="OTHER.json", help="show the figures beside those of another --json")
    parser.set_defaults(run=_command)


OPTIONS: tuple[str, ...] = (
    "p",
    "margin",
    "sample_weight",
    "ignore_index",
    "reduction",
    "axis",
    "backend",
)
OPTIONS += ("class_names", "unwritten_chunks", "scheduler", "workers", "chunk_size", "timeout")


def _command(arguments: Any) -> int:
    try:
        _evaluate(arguments)
    except InvalidTargetError as error:
        return _fail(f"{arguments.targets}: {error}; check the labels, or --axis", BAD_INPUT)
    except WorkerError as error:
        return _fail(str(error), FAILED)
    except MemoryError as error:
        return _fail(
            f"{arguments.logits}: there is not enough memory for a batch ({one_line(error)}); check"
            " the file's shape, or give a smaller --chunk-size",
            BAD_INPUT,
        )
    except (InputError, ValueError, TypeError) as error:
        return _fail(str(error), BAD_INPUT)
    return 0


def _evaluate(arguments: Any) -> None:
    require("numpy", "evaluate")
    from mml_arrayapi.evaluation import inputs, report
    from mml_arrayapi.evaluation.journal import check_writable, write_whole

    if arguments.report is not None:  # what the report needs, before any work
        report.check_libraries()
        check_writable(check_path("--report", arguments.report))
        _refuse_overwriting(arguments)
    before, weight = None, _weight(arguments.weight)
    if arguments.compare is not None:
        if arguments.json and arguments.report is None:
            raise InputError("--compare: JSON has no room for it; give --report, or no --json")
        options = {name: getattr(arguments, name) for name in ("reduction", "p", "margin")}
        options["ignore_index"] = arguments.ignore_index
        options["weight"] = None if weight is None else weight.tolist()
        options["weighted"] = arguments.sample_weight is not None
        before = report.read_figures(check_path("--compare", arguments.compare), options)
    figures = evaluate(
        arguments.logits,
        arguments.targets,
        weight=weight,
        checkpoint=arguments.checkpoint,
        progress=True,
        **{name: getattr(arguments, name) for name in OPTIONS},
    )
    text = json.dumps(figures.to_json(), indent=1) if arguments.json else str(figures)
    if before is not None and not arguments.json:
        text += "\n\n" + report.comparison(figures, before, arguments.compare)
    try:
        print(text, flush=True)
    finally:  # whoever reads the figures may be gone, but not the report's reader
        if arguments.report is not None:
            command = inputs.printable(shlex.join(["mml-arrayapi", *sys.argv[1:]]))
            write_whole(arguments.report, report.to_html(figures, command, before))


def _refuse_overwriting(arguments: Any) -> None:
    """Raise if the report is to be written over what is read, or over the journal."""
    from mml_arrayapi.evaluation.files import find, lies_in
    from mml_arrayapi.evaluation.journal import local_path

    given = (arguments.logits, arguments.targets, arguments.sample_weight)
    files = [file for one in given if one is not None for file in find(one)]
    taken = [file.path for file in files if file.filesystem is None]
    weight = (arguments.weight or "").partition("#")[0]
    taken += filter(None, (arguments.weight, weight, arguments.class_names, arguments.compare))
    if arguments.checkpoint and (journal := local_path(arguments.checkpoint)):
        taken.append(str(journal))
    report = os.path.realpath(arguments.report)
    for path in map(os.path.realpath, taken):
        # A store is a folder, and so is what the journal will lie in.
        if lies_in(report, path) or lies_in(path, report):
            raise InputError(
                f"--report {arguments.report}: would overwrite {path}, which this run uses; give "
                "another file"
            )


def _weight(text: str | None) -> Any:
    """Read the weights from a file, or from the argument itself."""
    import numpy as np

    from mml_arrayapi.evaluation.inputs import read_class_weights

    if text is None:
        return None
    try:
        return np.asarray([float(part) for part in text.split(",")])
    except ValueError:
        if not text.strip("0123456789+-.,eE "):  # "1,2," is no file
            raise InputError(
                f"--weight {text!r}: must be numbers with commas between them, or a file"
            ) from None
        return np.asarray(read_class_weights(text), dtype=float)


def _fail(message: str, code: int) -> int:
    complain(f"mml-arrayapi evaluate: error: {on_a_line(message)}")
    return code
