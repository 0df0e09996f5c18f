"""The command ``mml-arrayapi``: ``demo``, ``evaluate``, ``backends``, ``conformance``.

Each command's module offers ``add_parser(commands)``, which adds its parser and sets ``run``, a
function of the parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Any

from mml_arrayapi._version import __version__
from mml_arrayapi.console import complain
from mml_arrayapi.registry import list_backends

BAD_OUTPUT = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells say
CLOSED = 141  # 128 + SIGPIPE
FULL = {errno.ENOSPC, errno.EFBIG, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EBADF}


def parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line.

    Returns
    -------
    argparse.ArgumentParser
    """
    # Imported here, where main() expects Ctrl-C: it takes longer than all the rest.
    from mml_arrayapi import demo
    from mml_arrayapi.conformance import command as conformance
    from mml_arrayapi.evaluation import command as evaluation

    whole = argparse.ArgumentParser(
        prog="mml-arrayapi",
        description="The multi-class hinge loss (multi_margin_loss) for every array library.",
        epilog="mml-arrayapi COMMAND --help shows the options of a command, and an example.",
    )
    whole.add_argument("--version", action="version", version=__version__)
    commands = whole.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, evaluation, conformance):
        command.add_parser(commands)
    listing = commands.add_parser(
        "backends",
        help="list the kernels, available or not, and why",
        description="List the kernels: the library whose arrays each takes, whether it can run "
        "here, and why not.",
        epilog="example: mml-arrayapi backends",
    )
    listing.set_defaults(run=_backends)
    if "_ARGCOMPLETE" in os.environ:  # a shell asks for completions; it has argcomplete
        import argcomplete

        argcomplete.autocomplete(whole)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; the process's own if left out.

    Returns
    -------
    int
        The exit code: 0, 1 where something that was checked failed, 2 for bad input or output that
        cannot be written, 130 for Ctrl-C, 141 where the reader of the output closed it.
    """
    # None where the caller has closed them: ">&-". What cannot be printed is an error.
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  (as long as the process)
    if sys.stdout is None:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w")
    if isinstance(sys.stdout, TextIOWrapper):  # names may have characters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            arguments = parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
            return int(arguments.run(arguments))
        finally:
            _flush()
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return CLOSED
    except OSError as error:
        # After an error in the middle of the output, nothing may be left that _flush() would write.
        full = error.filename is None and error.errno in FULL
        if not (full or isinstance(error, _OutputError)):
            raise
        complain(f"mml-arrayapi: error: the output cannot be written ({error.strerror})")
        return BAD_OUTPUT


def _joined(argv: Sequence[str]) -> list[str]:
    """Write ``--margin -1e-3`` as ``--margin=-1e-3``, which argparse would take for an option."""
    made: list[str] = []
    for one in argv:
        numbers = re.fullmatch(r"-(inf|[0-9.])[-0-9.,eE+inf]*", one)
        if numbers and made and re.fullmatch(r"--[a-z][a-z-]*", made[-1]):
            made[-1] += f"={one}"
        else:
            made.append(one)
    return made


class _OutputError(OSError):
    pass


def _flush() -> None:
    """Write what is left of the output; where that fails, drop it: Python would try at its end."""
    try:
        print(end="", flush=True)
    except OSError as error:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise _OutputError(error.errno, error.strerror) from error


def _backends(_: Any) -> int:
    rows = [(b.name, b.library, "yes" if b.available else "no", b.reason) for b in list_backends()]
    headings = ("kernel", "arrays of", "available", "")
    if sys.stdout.isatty() and find_spec("rich") is not None:
        _print_table(headings, rows)
        return 0
    widths = [max(len(row[i]) for row in (headings, *rows)) for i in range(3)]
    for row in (headings, *rows):
        start = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        print(f"{start}  {row[3]}".rstrip())
    return 0


def _print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the table in colours, folded to the terminal's width."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for name, library, available, reason in rows:
        colour = "green" if available == "yes" else "red"
        table.add_row(Text(name, "bold"), library, Text(available, colour), Text(reason))
    Console().print(table)
