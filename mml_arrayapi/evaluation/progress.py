"""A bar that shows how far an evaluation is."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    seen = sys.stderr.isatty() or "ipykernel" in sys.modules
    if not seen or find_spec("rich") is None:
        yield None
        return
    import rich.progress
    from rich.console import Console

    columns = (
        rich.progress.BarColumn(None),
        rich.progress.TaskProgressColumn(),
        rich.progress.TextColumn("{task.fields[rows]}", justify="right"),
        rich.progress.TimeRemainingColumn(compact=True, elapsed_when_finished=True),
    )
    shown = rich.progress.Progress(*columns, console=Console(stderr=True), expand=True)
    with warnings.catch_warnings(), shown:
        warnings.simplefilter("ignore")  # in a notebook without ipywidgets
        task: Any = None

        def progress(done: int, rows: int) -> None:
            nonlocal task
            if task is None:
                task = shown.add_task("", total=rows, rows="")
            shown.update(task, completed=done, rows=f"{done:,} of {rows:,} rows")

        yield progress
