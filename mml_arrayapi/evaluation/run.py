"""The evaluation of files: loss, accuracy, share inside the margin; exact and restartable."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex

from mml_arrayapi._version import __version__
from mml_arrayapi.evaluation.errors import InputError, require
from mml_arrayapi.validation import check_ignore_index, check_parameters, is_number

if TYPE_CHECKING:
    from mml_arrayapi.evaluation.figures import Evaluation
    from mml_arrayapi.evaluation.formats import Rules
    from mml_arrayapi.evaluation.inputs import Dataset
    from mml_arrayapi.evaluation.journal import Journal
    from mml_arrayapi.evaluation.metrics import Loss, MetricState

Array = Any

TIMEOUT = 300.0
WORKERS = 10_000  # more threads than this no machine starts


def evaluate(
    logits: Any,
    targets: Any,
    *,
    p: SupportsFloat = 1,
    margin: SupportsFloat = 1.0,
    weight: Array | None = None,
    sample_weight: Any = None,
    ignore_index: SupportsIndex | None = None,
    reduction: str = "mean",
    axis: SupportsIndex = -1,
    backend: str | None = None,
    class_names: str | os.PathLike[str] | Sequence[str] | None = None,
    unwritten_chunks: str | None = None,
    scheduler: Any = "threads",
    workers: SupportsIndex | None = None,
    chunk_size: SupportsIndex | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    timeout: SupportsFloat = TIMEOUT,
    progress: Callable[[int, int], None] | bool | None = None,
) -> Evaluation:
    """Evaluate scores in files of any size.

    The scores are read and counted batch by batch. The losses are added without rounding, so that
    the figures are the same to the last bit for any ``chunk_size``, scheduler and number of
    workers, whatever happens to these on the way. (Machines with other CPUs may run another build
    of the kernels, whose last bits differ, unless ``MML_ARRAYAPI_CPU_KERNELS`` names one for all.)

    Parameters
    ----------
    logits : path, URL, array, or list of those
        The scores: float16, bfloat16, float32 or float64, shape (N, C). Files are ``.npy``,
        ``.npz``, ``.parquet``, ``.h5``, ``.safetensors`` or Zarr stores, on this machine or
        wherever fsspec reads (``s3://``, ``https://``, ...). A pattern such as ``"part-*.npy"``
        stands for files that follow one another, part-2 before part-10; a folder stands for its
        Parquet files. Where a file holds several arrays or columns, the name of one follows a
        ``#``: ``"file.npz#logits"``. An array is NumPy's, Dask's, Zarr's or h5py's.
    targets : path, URL, array, or list of those
        Each sample's class: integers, shape (N,).
    p, margin, weight, ignore_index, reduction, axis, backend
        As in :func:`mml_arrayapi.multi_margin_loss`; ``reduction`` is ``"mean"`` or ``"sum"``,
        ``weight`` a NumPy array, ``backend`` a kernel for NumPy arrays.
    sample_weight : path, URL, array, or list of those, optional
        Each sample's weight: finite numbers >= 0, shape (N,). The mean is the sum of the losses
        times these over the sum of these; accuracy and the share inside the margin likewise.
    class_names : sequence of str or path, optional
        The names of the classes, for tables and the report: a list, a file with one name per line,
        or a ``.json`` file with a list.
    unwritten_chunks : {"error", "fill"}, optional
        What it means that a chunk of a Zarr store or HDF5 file was never written: an error, or that
        all its values are the store's fill value. If left out, an error, except in the scores.
    scheduler : str, Client or Cluster, default "threads"
        ``"threads"``; ``"processes"`` (a ``LocalCluster`` of Dask); the address of a Dask
        scheduler, or one of Dask's clients or clusters, whose workers must see the same files under
        the same paths.
    workers : int, optional
        The number of processes, or of threads. If left out, as many as the CPUs allowed to this
        process (threads that read files: one more), and no more than its memory suffices for. Of a
        cluster, how many workers to wait for. At most 10,000.
    chunk_size : int, optional
        The number of rows per batch. If left out, about 2 million scores, but 256 rows at least
        (64 where these have more than 32 million scores). What is stored together (the chunks of
        Zarr, HDF5 and Dask, Parquet's row groups, an ``.npz`` array) is not torn apart.
    checkpoint : path or URL, optional
        A folder for a journal of the finished batches. A run that was killed is resumed there.
    timeout : float, default 300
        On a cluster, seconds without any finished batch after which the unfinished ones are given
        to idle workers; infinity for never.
    progress : callable or bool, optional
        Called as ``progress(done, rows)`` when a batch is finished; True shows a bar (in a terminal
        or a notebook).

    Returns
    -------
    Evaluation
        The figures; printed, they are a table.

    Raises
    ------
    InputError
        An input is missing, damaged, has changed meanwhile, or doesn't fit the others; the message
        says what to do.
    InvalidTargetError
        A target is out of range, with its position in the whole: the first of its batch, of which
        several are worked on at a time.
    WorkerError
        Workers have not this version of the package, died again and again, or hang.
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
    require("numpy", "evaluate")
    from mml_arrayapi.evaluation import inputs
    from mml_arrayapi.evaluation.cluster import Work, run
    from mml_arrayapi.evaluation.figures import figures_of
    from mml_arrayapi.evaluation.metrics import MetricState, count_batch

    loss = _check(p, margin, weight, reduction, backend, ignore_index)
    _check_options(axis, workers, chunk_size, timeout, progress)
    folder = None if checkpoint is None else check_path("checkpoint", checkpoint)
    rules = _rules(loss, unwritten_chunks)
    chunk_size = None if chunk_size is None else int(chunk_size)
    data = inputs.open_dataset(logits, targets, sample_weight, int(axis), chunk_size, rules)
    if isinstance(scheduler, str) and scheduler == "threads":
        data.refuse_persisted()
    kernel = _kernel(data, loss)
    # By name: use_backend() and the environment of other threads and workers may differ.
    loss = loss._replace(backend=kernel)
    names = _class_names(class_names, data.n_classes)

    weighted = sample_weight is not None
    total = MetricState(data.n_classes, weighted=weighted)
    nan: dict[str, int] = {}
    done = 0

    def add(number: int, state: MetricState) -> None:
        nonlocal done
        batch = data.batches[number]
        total.merge(state)
        done += batch.stop - batch.start
        if count := int(state.counts[3].sum()):
            name = batch.scores[0].shard.name
            nan[name] = nan.get(name, 0) + count

    with ExitStack() as stack:
        stack.callback(inputs.forget)
        finished: dict[int, MetricState] = {}
        if folder is not None:
            journal = _open_journal(folder, data, _about(data, loss, kernel, rules))
            stack.callback(journal.close)
            finished = journal.finished
        for number, state in finished.items():
            add(number, state)
        if progress is True:
            from mml_arrayapi.evaluation.progress import bar

            progress = stack.enter_context(bar())
        left = {n: batch for n, batch in enumerate(data.batches) if n not in finished}
        options = (data.axis, loss, data.n_classes, data.samples_per_row)
        work = Work(count_batch, options, left, data.is_lazy, data.largest_batch())
        workers = None if workers is None else int(workers)
        for number, state in run(work, scheduler, workers, float(timeout)) if left else ():
            if folder is not None:
                journal.add(number, state)
            add(number, state)
            if callable(progress):  # which may be empty, and so count as false
                progress(done, data.n_rows)
    data.check_versions()
    return figures_of(total, data, loss, reduction, kernel, names, dict(sorted(nan.items())))


def _rules(loss: Loss, unwritten: str | None) -> Rules:
    from mml_arrayapi.evaluation.formats import Rules

    if unwritten not in (None, "error", "fill"):
        raise ValueError(f"unwritten_chunks must be 'error' or 'fill', but is {unwritten!r}")
    return Rules(loss.ignore_index, unwritten)


def _check_options(axis: Any, workers: Any, chunk_size: Any, timeout: Any, progress: Any) -> None:
    given = (("axis", axis), ("workers", workers), ("chunk_size", chunk_size), ("timeout", timeout))
    for name, value in given:
        if value is None and name in ("workers", "chunk_size"):
            continue
        kind = (Real, "a number") if name == "timeout" else (Integral, "an integer")
        if not is_number(value, kind[0]):
            raise TypeError(f"{name} must be {kind[1]}, but is {value!r}")
        if name != "axis" and not value > 0:
            raise ValueError(f"{name} must be positive, but is {value}")
    if workers is not None and workers > WORKERS:
        raise ValueError(f"workers must be at most {WORKERS:,}, but is {workers}")
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"progress must be a callable, True or False, but is {progress!r}")


def check_path(name: str, given: Any) -> str:
    """Return a path, or a URL, as text.

    Parameters
    ----------
    name : str
        The argument's name, for the message.
    given : str or path
        The path.

    Raises
    ------
    InputError
        It is none, or empty.
    """
    if not isinstance(given, (str, os.PathLike)) or not os.fspath(given):
        raise InputError(f"{name} must be a path that is not empty, but is {given!r}")
    return str(os.fspath(given))


def _open_journal(folder: str, data: Dataset, about: dict[str, Any]) -> Journal:
    """Open the journal; raise if it would lie in a store that is read, and so change it."""
    from mml_arrayapi.evaluation.files import lies_in
    from mml_arrayapi.evaluation.journal import Journal, local_path

    path = local_path(folder)
    place = folder.rstrip("/") if path is None else os.path.realpath(path.parent)
    for shard in (shard for shards in data.shards.values() for shard in shards):
        if not getattr(shard.source, "store", False):
            continue
        store, _ = replace(shard.source, item="").identity(())
        if lies_in(place, store):
            raise InputError(
                f"checkpoint {folder}: lies in {shard.source.plain_name}, which this run reads and "
                "would change; give another folder"
            )
    return Journal(folder, about, len(data.batches))


def _about(data: Dataset, loss: Loss, kernel: str, rules: Any) -> dict[str, Any]:
    """Return what a journal must agree with for its batches to be used."""
    from mml_arrayapi.backends import cpu

    if not all(shard.version for shards in data.shards.values() for shard in shards):
        raise InputError("checkpoint: only files can be resumed, but arrays were given")
    weight = None if loss.weight is None else loss.weight.tolist()
    parameters = {"p": loss.p, "margin": loss.margin, "weight": weight, "axis": data.axis}
    parameters |= {"ignore_index": loss.ignore_index, "unwritten_chunks": rules.unwritten}
    starts = [batch.start for batch in data.batches]
    # The builds of the CPU kernels may differ in last bits.
    parameters |= {"kernel": kernel, "build of the CPU kernels": cpu.build()}
    cut = {"chunk size": max((b.stop - b.start for b in data.batches), default=0)}
    parameters |= {"mml_arrayapi": __version__}
    return {"version": 4, **parameters, **cut, "batches": starts, "inputs": data.identity()}


def _check(
    p: Any, margin: Any, weight: Any, reduction: str, backend: str | None, ignore_index: Any
) -> Loss:
    import numpy as np

    from mml_arrayapi.accumulator import weight_to_numpy
    from mml_arrayapi.evaluation.metrics import Loss

    p, margin = check_parameters(reduction, p, margin)
    if reduction == "none":
        raise ValueError("reduction must be 'mean' or 'sum', but is 'none'")
    ignore_index = check_ignore_index(ignore_index)
    if weight is not None:
        weight = np.asarray(weight) if isinstance(weight, (list, tuple)) else weight
        weight = weight_to_numpy(weight)
    return Loss(p, margin, weight, backend, ignore_index)


def _kernel(data: Dataset, loss: Loss) -> str:
    """Return the name of the kernel that runs; refuse what it refuses before any work."""
    import numpy as np

    from mml_arrayapi.loss import explain

    dtype = np.float64 if data.shards["scores"][0].dtype.itemsize == 8 else np.float32
    return explain(
        np.broadcast_to(dtype(0), (1, data.n_classes)),  # however many, no memory
        np.zeros(1, np.int64),
        p=loss.p,
        margin=loss.margin,
        weight=loss.weight,
        reduction="none",
        check_target="nan",
        backend=loss.backend,
    ).kernel


def _class_names(given: Any, n_classes: int) -> Sequence[str] | None:
    if given is None:
        return None
    names, where = given, "class_names"
    if isinstance(given, (str, os.PathLike)):
        where = check_path("class_names", given)
        try:
            with open(where, encoding="utf-8-sig", newline="") as file:
                text = file.read()
            lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
            names = json.loads(text) if where.lower().endswith(".json") else lines
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: the names of the classes cannot be read ({error})"
            ) from error
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: must be a list of names, one per class")
    if len(names) != n_classes:
        raise InputError(
            f"{where}: has {len(names):,} names, but the scores have {n_classes:,} classes"
        )
    return names
