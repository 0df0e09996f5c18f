"""A bar that shows how far an evaluation is."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mml_arrayapi.evaluation.errors import require


@contextmanager
def bar() -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar on the standard error stream, or in a notebook; in a pipe or a file, nothing.

    Yields
    ------
    callable or None
        To be called as ``progress(done, rows)``.
    """
    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        yield None
        return
    console = require("rich.console", "progress").Console(stderr=True)
    rich = require("rich.progress", "progress")
    columns = (
        rich.BarColumn(None),
        rich.TaskProgressColumn(),
        rich.TextColumn("{task.fields[rows]}", justify="right"),
        rich.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    shown = rich.Progress(*columns, console=console, expand=True)
    with warnings.catch_warnings(), shown:
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets
        task: Any = None

        def progress(done: int, rows: int) -> None:
            nonlocal task
            if task is None:
                task = shown.add_task("", total=rows, rows="")
            shown.update(task, completed=done, rows=f"{done:,} of {rows:,} rows")

        yield progress
