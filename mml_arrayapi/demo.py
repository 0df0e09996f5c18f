"""``mml-arrayapi demo``: one training code on every installed library, on real handwritten digits.

A linear classifier of scikit-learn's bundled digits (1797 images of 8 x 8 pixels) is trained with
this loss and its gradient. The code of the training, :func:`train`, knows no library. The scores of
the held-out images are then written to disk and evaluated as ``mml-arrayapi evaluate`` does it.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from mml_arrayapi.console import complain
from mml_arrayapi.evaluation import evaluate
from mml_arrayapi.libraries import LIBRARIES, SUPPORTED
from mml_arrayapi.loss import explain, multi_margin_loss, multi_margin_loss_and_grad

Array = Any

STEPS = 200
RATE = 0.1
P = 2  # smooth, so that libraries whose last bits differ don't drift apart over the steps


class Digits(NamedTuple):
    """The images as rows of pixels from 0 to 1 and a constant 1, float32, and their digits."""

    train_images: Array
    train_digits: Array
    test_images: Array
    test_digits: Array


class Result(NamedTuple):
    """What one library came to."""

    kernel: str
    speedup: float | None  # how many times as long the generic code takes; None where it ran
    train_loss: float
    test_loss: float
    accuracy: float
    seconds: float
    test_scores: Array  # NumPy


def train(images: Array, digits: Array, *, steps: int) -> Iterator[Array]:
    """Train a linear classifier by gradient descent, in any library.

    Parameters
    ----------
    images : array, shape (N, pixels), float32
        One image per row.
    digits : array, shape (N,), integer
        What they show.
    steps : int
        How many steps are taken.

    Yields
    ------
    array, shape (pixels, 10)
        The weights after each step.
    """
    xp = array_namespace(images)
    weights = xp.zeros_like(images[:10, :]).T
    for _ in range(steps):
        _, grad = multi_margin_loss_and_grad(images @ weights, digits, p=P)
        weights = weights - RATE * (images.T @ grad)
        if hasattr(weights, "persist"):  # Dask: compute this step, or the graph grows with them
            weights = weights.persist()
        yield weights


def run(images: Digits, xp: Any, advance: Callable[[], None]) -> Result:
    """Train and test with one library.

    Parameters
    ----------
    images : Digits
        NumPy arrays.
    xp : module
        The library's array API namespace.
    advance : callable
        Called after each step.

    Returns
    -------
    Result
    """
    import numpy as np

    train_images, train_digits, test_images, test_digits = (xp.asarray(a) for a in images)
    start = time.perf_counter()
    for weights in train(train_images, train_digits, steps=STEPS):  # noqa: B007 (the last one is used)
        advance()
    train_loss = float(multi_margin_loss(train_images @ weights, train_digits, p=P))
    seconds = time.perf_counter() - start
    scores = test_images @ weights
    test_loss = float(multi_margin_loss(scores, test_digits, p=P))
    hits = xp.astype(xp.argmax(scores, axis=-1) == test_digits, xp.float32)
    kernel = explain(scores, test_digits, p=P).kernel
    return Result(
        kernel,
        None if kernel == "generic" else speedup(train_images @ weights, train_digits),
        train_loss,
        test_loss,
        float(xp.mean(hits)),
        seconds,
        np.asarray(scores.get() if hasattr(scores, "get") else scores),
    )


def speedup(scores: Array, digits: Array, *, rounds: int = 9) -> float:
    """Measure how many times as long the generic code takes for the loss and its gradient.

    Parameters
    ----------
    scores : array, shape (N, C)
        Of any library.
    digits : array, shape (N,)
        The targets.
    rounds : int
        How often each is timed, in turn.

    Returns
    -------
    float
        The quotient of the medians.
    """
    if hasattr(scores, "persist"):
        scores = scores.persist()
    times: dict[str | None, list[float]] = {None: [], "generic": []}
    for n in range(rounds + 1):
        for backend, taken in times.items():
            start = time.perf_counter()
            loss, grad = multi_margin_loss_and_grad(scores, digits, p=P, backend=backend)
            _finish(loss, grad)
            if n:  # the first may compile
                taken.append(time.perf_counter() - start)
    return statistics.median(times["generic"]) / statistics.median(times[None])


def _finish(loss: Array, grad: Array) -> None:
    """Wait until both have been computed."""
    if hasattr(loss, "dask"):
        import dask

        dask.compute(loss, grad)
    elif hasattr(grad, "block_until_ready"):
        grad.block_until_ready()
    else:
        float(loss)  # waits for a GPU


def load_digits() -> Digits:
    """Load scikit-learn's digits, four fifths of them for training."""
    import numpy as np
    from sklearn.datasets import load_digits as load

    pixels, digits = load(return_X_y=True)
    rows = np.hstack([pixels / 16, np.ones((len(pixels), 1))]).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(rows))
    cut = len(rows) * 4 // 5
    first, last = order[:cut], order[cut:]
    return Digits(rows[first], digits[first], rows[last], digits[last])


def add_parser(commands: Any) -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "demo",
        help="train on handwritten digits with every installed library, and compare",
        description="Train a linear classifier of scikit-learn's bundled digits (1797 images of "
        "8 x 8 pixels) with this loss and its gradient, by one code on every installed library; "
        "then write the scores of the held-out images to disk and evaluate them.",
        epilog="example: mml-arrayapi demo --output /tmp/digits",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("mml-demo"),
        metavar="DIR",
        help="where the scores and targets are written (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    try:
        import numpy  # noqa: F401
        import rich  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        print(
            f"demo: {error}; install with: pip install 'mml_arrayapi[demo]' "
            "(in a clone: pip install '.[demo]')",
            file=sys.stderr,
        )
        return 2
    images = load_digits()
    logits, targets = arguments.output / "logits.npy", arguments.output / "targets.npy"
    if not _save(targets, images.test_digits):  # before the work
        return 2
    results = _train_everywhere(images)
    if not _save(logits, next(iter(results.values())).test_scores):
        return 2
    command = ["evaluate", str(logits), str(targets), "--p", str(P)]
    print(f"\nThe held-out images' scores are in {logits}. Evaluating them:")
    print(f"$ mml-arrayapi {shlex.join(command)}\n", flush=True)
    print(evaluate(str(logits), str(targets), p=P))
    return 0


def _save(path: Path, array: Array) -> bool:
    import numpy as np

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)
    except OSError as error:
        complain(f"demo: cannot write to {path.parent}: {error}")
        return False
    return True


def _train_everywhere(images: Digits) -> dict[str, Result]:
    """Train with each library; print the table."""
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table

    table = Table(title=f"The same {STEPS} steps of training on {len(images.train_digits)} digits")
    numbers = ("training loss", "test loss", "accuracy", "seconds", "speed-up")
    for heading in ("library", "kernel", *numbers):
        number = heading in numbers
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    results: dict[str, Result] = {}
    with Progress(transient=True) as progress:
        for name in SUPPORTED:
            try:
                xp = LIBRARIES[name]().namespace
            except ImportError:
                table.add_row(name, "not installed", style="dim")
                continue
            if name == "cupy" and not xp.cuda.is_available():
                table.add_row(name, "no GPU", style="dim")
                continue
            task = progress.add_task(name, total=STEPS)
            result = run(images, xp, lambda task=task: progress.advance(task))  # type: ignore[misc]
            results[name] = result
            table.add_row(
                f"{name} {importlib.import_module(name).__version__}",
                result.kernel,
                f"{result.train_loss:.5f}",
                f"{result.test_loss:.5f}",
                f"{result.accuracy:.1%}",
                f"{result.seconds:.2f}",
                "" if result.speedup is None else f"{result.speedup:.1f} x",
            )
    table.caption = "speed-up: how many times as long the generic code takes for loss and gradient"
    Console(width=None if sys.stdout.isatty() else 112).print(table)
    _print_agreement(results)
    return results


def _print_agreement(results: dict[str, Result]) -> None:
    printed = {f"{r.train_loss:.5f} {r.test_loss:.5f}" for r in results.values()}
    if len(printed) == 1:
        print(f"All {len(results)} libraries agree to the printed digits.")
    else:
        print(f"The libraries disagree: training and test loss are {' or '.join(sorted(printed))}.")
