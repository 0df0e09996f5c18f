"""The command ``mml-arrayapi``: ``demo``, ``evaluate``, ``backends``, ``conformance``.

Each command's module offers ``add_parser(commands)``, which adds its parser and sets ``run``, a
function of the parsed arguments that returns the exit code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from mml_arrayapi import demo
from mml_arrayapi._version import __version__
from mml_arrayapi.conformance import command as conformance
from mml_arrayapi.evaluation import command as evaluation
from mml_arrayapi.registry import list_backends

INTERRUPTED = 130  # 128 + SIGINT, as shells say


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The arguments; the process's own if left out.

    Returns
    -------
    int
        The exit code: 0, 1 where something that was checked failed, 2 for bad input, 130 for
        Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="mml-arrayapi",
        description="The multi-class hinge loss (multi_margin_loss) for every array library.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (demo, evaluation, conformance):
        command.add_parser(commands)
    listing = commands.add_parser("backends", help="list the kernels there are, and why not others")
    listing.set_defaults(run=_backends)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _backends(_: Any) -> int:
    rows = [("kernel", "arrays of", "available", "")]
    rows += [(b.name, b.library, "yes" if b.available else "no", b.reason) for b in list_backends()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        start = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False))
        print(f"{start}  {row[3]}".rstrip())
    return 0
