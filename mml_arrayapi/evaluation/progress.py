"""A bar that shows how far an evaluation is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


@contextmanager
def bar() -> Iterator[Callable[[int, int], None] | None]:
    """Show a bar in a terminal or a notebook; in a pipe, or without rich, nothing.

    Yields
    ------
    callable or None
        To be called as ``progress(done, rows)``.
    """
    ipython: Any = sys.modules.get("IPython")
    if ipython is not None and hasattr(ipython.get_ipython(), "kernel"):
        yield _in_notebook()
    elif sys.stderr.isatty() and find_spec("rich") is not None:
        with _in_terminal() as progress:
            yield progress
    else:
        yield None


def _in_notebook() -> Callable[[int, int], None]:
    shown: Any = None

    def progress(done: int, rows: int) -> None:
        nonlocal shown
        if shown is None:
            # rich's bar needs ipywidgets there
            shown = import_module("IPython.display").ProgressBar(rows)
            shown.display()
        shown.progress = done

    return progress


@contextmanager
def _in_terminal() -> Iterator[Callable[[int, int], None]]:
    import rich.progress
    from rich.console import Console

    columns = (
        rich.progress.BarColumn(None),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[rows]}", justify="right"),
        rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    with rich.progress.Progress(*columns, console=Console(stderr=True), expand=True) as shown:
        task: Any = None

        def progress(done: int, rows: int) -> None:
            nonlocal task
            if task is None:
                task = shown.add_task("", total=rows, rows="")
            shown.update(task, completed=done, rows=f"{done:,} of {rows:,} rows")

        yield progress
