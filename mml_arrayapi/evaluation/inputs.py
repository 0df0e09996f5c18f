"""Files and arrays as rows that are read piece by piece, with errors that name the file."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mml_arrayapi.evaluation.metrics import Loss, Tally
from mml_arrayapi.validation import InvalidTargetError

Array = Any

PIECE = 2**22  # scores read at a time, unless told otherwise: 16 MB of float32
SCORES, TARGETS = "scores", "targets"


class InputError(ValueError):
    """An input of an evaluation cannot be used. The message names it and says what to do.

    Examples
    --------
    >>> from mml_arrayapi import InputError, evaluate
    >>> try:
    ...     evaluate("no-such-file.npy", "targets.npy")
    ... except InputError as error:
    ...     print(error)
    no-such-file.npy: there is no such file; check the path
    """


class WorkerError(RuntimeError):
    """The workers cannot finish an evaluation; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, or one array.

    Attributes
    ----------
    name : str
        The path as it was given, with ``#item`` where the file holds several arrays; or what the
        array is.
    path : str
        The absolute path (workers run in other folders), with ``#item``; empty for an array.
    role : {"scores", "targets"}
        What it is read for.
    array : array or None
        The array, where it is no file.
    stamp : tuple of int
        The file's size and time of change, so that a changed file is not taken for the old one.
    shape, dtype
        As NumPy has them.
    steps : tuple of int
        Where rows may be cut, where not everywhere: the starts of Parquet's row groups.
    chunks : tuple of int
        The shape of what is stored together (Zarr): its rows are not torn apart.
    """

    name: str
    path: str
    role: str
    array: Array | None
    stamp: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: Any
    steps: tuple[int, ...] = ()
    chunks: tuple[int, ...] = ()

    def read(self, axis: int, start: int, stop: int) -> Any:
        """Return some rows as a NumPy array; ``axis`` is the rows' axis."""
        import numpy as np

        where = (*(slice(None),) * axis, slice(start, stop))
        try:
            source = _open(self.path, self.role, self.stamp) if self.array is None else self.array
            part = source[where]
            if hasattr(part, "compute"):  # Dask: this runs in a worker already
                part = part.compute(scheduler="synchronous")
            return np.asarray(part)
        except (InputError, MemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{self.name}: rows {start} to {stop - 1} cannot be read ({_line(error)}); "
                "write or copy it again"
            ) from error


class Span(NamedTuple):
    """Rows of one shard."""

    shard: Shard
    start: int
    stop: int


class Piece(NamedTuple):
    """Rows that are read and tallied together; ``start`` counts from the first row of all."""

    start: int
    scores: Span
    targets: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.scores.stop - self.scores.start


class Rows(NamedTuple):
    """What is evaluated, cut into pieces.

    Attributes
    ----------
    pieces : list of Piece
        All rows, in order.
    axis : int
        The classes' axis in the scores, not negative.
    n_classes, elements : int
        The number of classes, and of scores in all.
    dtype
        The scores' NumPy dtype.
    identity : list
        The size of the pieces, then what each shard is, as plain JSON.
    """

    pieces: list[Piece]
    axis: int
    n_classes: int
    elements: int
    dtype: Any
    identity: list[Any]

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return sum(piece.rows for piece in self.pieces)


def tally_piece(piece: Piece, axis: int, loss: Loss) -> Tally:
    """Read a piece and count it."""
    import numpy as np

    span = piece.scores
    scores = span.shard.read(0 if axis else 1, span.start, span.stop)
    parts = [s.shard.read(0, s.start, s.stop) for s in piece.targets]
    target = parts[0] if len(parts) == 1 else np.concatenate(parts)
    tally = Tally(scores.shape[axis])
    rows = np.moveaxis(scores, axis, -1).reshape(-1, scores.shape[axis])
    try:
        tally.add(rows, target.reshape(-1), loss)
    except InvalidTargetError as error:
        first, *others = (int(i) for i in np.unravel_index(error.position[0], target.shape))
        position = (first + piece.start, *others)
        raise InvalidTargetError(position, error.value, error.n_classes) from None
    return tally


def rows_of(logits: Any, targets: Any, axis: int, chunk_size: int | None) -> Rows:
    """Find the shards, check that they fit together, and cut them into pieces.

    Parameters
    ----------
    logits, targets, axis, chunk_size
        As in :func:`mml_arrayapi.evaluate`.

    Returns
    -------
    Rows

    Raises
    ------
    InputError
        With the name of the file, what is wrong, and what to do.
    """
    scores, labels = _shards(logits, SCORES), _shards(targets, TARGETS)
    first = scores[0]
    ndim = len(first.shape)
    if ndim < 2:
        raise InputError(
            f"{first.name}: scores must have shape (N, C), but have shape {first.shape}"
        )
    if not -ndim <= axis < ndim:
        raise InputError(f"{first.name}: scores have {ndim} axes, but axis is {axis}")
    axis %= ndim
    rows_axis = 0 if axis else 1
    _check_alike(scores, axis, rows_axis)
    batch = tuple(n for i, n in enumerate(first.shape) if i not in (axis, rows_axis))
    for shard in labels:
        if shard.shape[1:] != batch or not shard.shape:
            wanted = ", ".join(map(str, ("N", *batch)))
            raise InputError(
                f"{shard.name}: targets must have shape ({wanted}) beside scores of shape "
                f"{first.shape} with the classes at axis {axis}, but have shape {shard.shape}"
            )
    _check_lengths(scores, labels, rows_axis)
    per_row = first.shape[axis]
    for n in batch:
        per_row *= n
    step = max(1, PIECE // max(1, per_row)) if chunk_size is None else chunk_size
    pieces = list(_pieces(scores, labels, rows_axis, step))
    identity = [[s.path, list(s.shape), str(s.dtype), *s.stamp] for s in (*scores, *labels)]
    elements = per_row * sum(s.shape[rows_axis] for s in scores)
    return Rows(pieces, axis, first.shape[axis], elements, first.dtype, [step, *identity])


def read_array(path: str) -> Any:
    """Read a whole file of floats.

    Parameters
    ----------
    path : str
        A file of any accepted format.

    Returns
    -------
    numpy array

    Raises
    ------
    InputError
        It cannot be read.
    """
    shard = _file_shard(_names(path)[0], SCORES)
    return shard.read(0, 0, shard.shape[0] if shard.shape else 1)


def _check_alike(scores: list[Shard], axis: int, rows_axis: int) -> None:
    first = scores[0]
    if first.shape[axis] == 0:
        raise InputError(
            f"{first.name}: scores must have at least one class, but have shape {first.shape}"
        )
    for shard in scores:
        same = len(shard.shape) == len(first.shape) and all(
            m == n or i == rows_axis
            for i, (m, n) in enumerate(zip(shard.shape, first.shape, strict=True))
        )
        if not same or shard.dtype != first.dtype:
            raise InputError(
                f"{shard.name}: scores of shape {shard.shape} and dtype {shard.dtype} don't "
                f"continue those of {first.name}, of shape {first.shape} and dtype {first.dtype}; "
                "give files of one data set"
            )


def _check_lengths(scores: list[Shard], labels: list[Shard], rows_axis: int) -> None:
    if len(scores) == len(labels):
        for s, t in zip(scores, labels, strict=True):
            if s.shape[rows_axis] != t.shape[0]:
                raise InputError(
                    f"{t.name}: has {t.shape[0]:,} targets, but {s.name} has "
                    f"{s.shape[rows_axis]:,} samples; give files that belong together"
                )
    n_scores = sum(s.shape[rows_axis] for s in scores)
    n_labels = sum(t.shape[0] for t in labels)
    if n_scores != n_labels:
        raise InputError(
            f"{labels[0].name}: {len(labels)} file(s) have {n_labels:,} targets, but "
            f"{len(scores)} file(s) from {scores[0].name} on have {n_scores:,} samples; "
            "give files that belong together"
        )


def _pieces(scores: list[Shard], labels: list[Shard], rows_axis: int, step: int) -> Iterator[Piece]:
    ends = list(accumulate((t.shape[0] for t in labels), initial=0))
    base = 0
    for shard in scores:
        n = shard.shape[rows_axis]
        steps: Sequence[int] = shard.steps
        if shard.chunks:
            steps = range(0, n, shard.chunks[rows_axis])
        for start, stop in pairwise(_cuts(n, steps, step)):
            spans = []
            for t, low, high in zip(labels, ends, ends[1:], strict=False):
                a, b = max(base + start, low), min(base + stop, high)
                if a < b:
                    spans.append(_span(t, 0, a - low, b - low))
            yield Piece(base + start, _span(shard, rows_axis, start, stop), tuple(spans))
        base += shard.shape[rows_axis]


def _cuts(n: int, steps: Sequence[int], step: int) -> list[int]:
    """Cut n rows into pieces of about ``step``, at whole ``steps`` where there are any."""
    if not n:
        return []
    cuts = [0]
    for at in steps or range(step, n, step):
        if at - cuts[-1] >= step and at < n:
            cuts.append(at)
    return [*cuts, n]


def _span(shard: Shard, axis: int, start: int, stop: int) -> Span:
    """Rows of a shard; of an array only these rows travel to the worker."""
    if shard.array is None:
        return Span(shard, start, stop)
    part = shard.array[(*(slice(None),) * axis, slice(start, stop))]
    return Span(replace(shard, array=part), 0, stop - start)


def _shards(given: Any, role: str) -> list[Shard]:
    """Find what a path, a pattern, an array, or a list of those stands for."""
    if isinstance(given, (str, os.PathLike)):
        return [_file_shard(name, role) for name in _names(os.fspath(given))]
    if isinstance(given, (list, tuple)):
        found = [shard for one in given for shard in _shards(one, role)]
        if not found:
            raise InputError(f"{role}: the list is empty; give at least one file or array")
        return found
    if not hasattr(given, "shape") or not hasattr(given, "dtype"):
        raise TypeError(
            f"{role} must be a path, an array, or a list of those, but is of type "
            f"{type(given).__name__}"
        )
    return [_shard(role, "", role, given, (), given)]


def _names(path: str) -> list[str]:
    file, item = _split(path)
    if os.path.isdir(file) and not _is_zarr(file):
        found = sorted(glob.glob(os.path.join(glob.escape(file), "*.parquet")))
    elif os.path.exists(file):
        found = [file]
    else:
        found = sorted(glob.glob(file, recursive=True))
    if not found:
        what = "no file matches it" if glob.has_magic(file) else "there is no such file"
        if os.path.isdir(file):
            what = "the folder is no Zarr store and holds no .parquet files"
        raise InputError(f"{path}: {what}; check the path")
    return [f"{name}#{item}" if item else name for name in found]


def _split(path: str) -> tuple[str, str]:
    """Split ``file#item``; a file whose own name has a ``#`` is found first."""
    if os.path.exists(path) or "#" not in path:
        return path, ""
    file, _, item = path.rpartition("#")
    return file, item


def _file_shard(name: str, role: str) -> Shard:
    file, item = _split(name)
    path = os.path.abspath(file)
    try:
        status = os.stat(file)
        stamp = (status.st_size, status.st_mtime_ns)
        full = f"{path}#{item}" if item else path
        return _shard(name, full, role, None, stamp, _open(full, role, stamp))
    except InputError as error:
        raise InputError(str(error).replace(path, file)) from error
    except ImportError as error:
        raise InputError(
            f"{name}: reading it needs {error.name}; pip install 'mml_arrayapi[evaluate]'"
        ) from error
    except Exception as error:
        raise InputError(
            f"{name}: cannot be read ({_line(error)}); write or copy it again"
        ) from error


def _shard(
    name: str, path: str, role: str, array: Array, stamp: tuple[int, ...], source: Array
) -> Shard:
    import numpy as np

    dtype = np.dtype(source.dtype)
    if role == SCORES and not (dtype.kind == "f" and dtype.itemsize in (2, 4, 8)):
        raise InputError(
            f"{name}: scores must be float16, float32 or float64, but are {dtype}; "
            "convert them, as with array.astype('float32')"
        )
    if role == TARGETS and dtype.kind not in "iu":
        raise InputError(
            f"{name}: targets must be integers, but are {dtype}; "
            "convert them, as with array.astype('int64')"
        )
    shape = tuple(int(n) for n in source.shape)
    chunks = getattr(source, "chunks", None) or ()
    if array is not None:  # a Dask array's chunks have another form, and need not be respected
        chunks = ()
    return Shard(
        name, path, role, array, stamp, shape, dtype, getattr(source, "steps", ()), tuple(chunks)
    )


@lru_cache(maxsize=8)  # .npz files are read whole: once a process, not once a piece
def _open(name: str, role: str, _: tuple[int, ...]) -> Array:
    file, item = _split(name)
    if _is_zarr(file):
        return _open_zarr(file, item)
    opener = FORMATS.get(Path(file).suffix.lower())
    if opener is None:
        raise InputError(
            f"{name}: the format is not known; accepted are {', '.join(FORMATS)} files and Zarr "
            "stores"
        )
    return opener(file, item, role)


def _is_zarr(file: str) -> bool:
    markers = ("zarr.json", ".zarray", ".zgroup")
    return any(os.path.exists(os.path.join(file, marker)) for marker in markers)


def _open_npy(file: str, item: str, role: str) -> Array:  # noqa: ARG001
    import numpy as np

    _refuse_empty(file)
    return np.load(file, mmap_mode="r", allow_pickle=False)


def _open_npz(file: str, item: str, role: str) -> Array:
    import numpy as np

    _refuse_empty(file)
    # np.load leaves a file open that it fails on.
    with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
        return archive[_choose_item(file, item, role, archive.files)]


def _refuse_empty(file: str) -> None:
    if not os.path.getsize(file):  # np.load would speak of pickles
        raise InputError(f"{file}: the file is empty; write or copy it again")


def _open_zarr(file: str, item: str) -> Array:
    import zarr

    store = zarr.open(file, mode="r")
    if hasattr(store, "dtype"):
        return store
    return store[_choose_item(file, item, "array", [name for name, _ in store.arrays()])]


def _choose_item(file: str, item: str, role: str, items: Sequence[str]) -> str:
    if item in items:
        return item
    if not item and len(items) == 1:
        return items[0]
    missing = f"has no array {item!r}" if item else f"holds {len(items)} arrays"
    raise InputError(
        f"{file}: {missing}; name the one with the {role}, as in {file}#NAME, where NAME is one "
        f"of {', '.join(items) or 'none'}"
    )


class _Parquet:
    """Columns of a Parquet file as an array; reading rows reads the row groups that hold them."""

    def __init__(self, file: str, item: str, role: str) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.parquet as pq

        opened = pq.ParquetFile(file, memory_map=True)
        self._name, self._metadata, schema = file, opened.metadata, opened.schema_arrow
        self._columns = item.split(",") if item else _columns_for(role, schema, file)
        missing = [name for name in self._columns if name not in schema.names]
        if missing:
            raise InputError(
                f"{file}: has no column {missing[0]!r}; its columns are {', '.join(schema.names)}"
            )
        types = [schema.field(name).type for name in self._columns]
        metadata = self._metadata
        counts = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self.steps = tuple(accumulate(counts, initial=0))
        self.listed = len(types) == 1 and _is_list(types[0])
        n_classes: tuple[int, ...] = ()
        if self.listed:
            first = self._table(0).column(0)[:1].combine_chunks() if metadata.num_rows else []
            n_classes = (len(first[0]) if len(first) else 0,)
            types = [types[0].value_type]
        elif role == SCORES:
            n_classes = (len(self._columns),)
        self.shape = (metadata.num_rows, *n_classes)
        self.dtype = np.result_type(*(pa.DataType.to_pandas_dtype(t) for t in types))

    def _table(self, group: int) -> Any:
        import pyarrow.parquet as pq

        # Opened anew: pieces are read by several threads, and an open file is for one.
        file = pq.ParquetFile(self._name, memory_map=True, metadata=self._metadata)
        return file.read_row_group(group, columns=self._columns, use_threads=False)

    def __getitem__(self, where: tuple[slice, ...]) -> Any:
        import numpy as np

        start, stop = where[-1].start, where[-1].stop
        parts = [np.empty((0, *self.shape[1:]), self.dtype)]
        for group, (low, high) in enumerate(pairwise(self.steps)):
            if start < high and low < stop:
                rows = self._array(self._table(group))
                parts.append(rows[max(0, start - low) : stop - low])
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def _array(self, table: Any) -> Any:
        import numpy as np
        import pyarrow.compute as pc

        for name, column in zip(self._columns, table.columns, strict=True):
            if column.null_count:
                raise InputError(
                    f"{self._name}: column {name!r} has empty values; fill or drop them"
                )
        if not self.listed:
            columns = [column.to_numpy() for column in table.columns]
            return columns[0] if len(self.shape) == 1 else np.stack(columns, axis=1)
        lists = table.column(0)
        lengths = pc.unique(pc.list_value_length(lists)).to_pylist()
        if lengths != [self.shape[1]]:
            raise InputError(
                f"{self._name}: lists of column {self._columns[0]!r} have different lengths, such "
                f"as {sorted({self.shape[1], *lengths})[:3]}; each must hold one score per class"
            )
        values = pc.list_flatten(lists)
        if values.null_count:
            raise InputError(f"{self._name}: lists hold empty values; fill or drop them")
        return values.to_numpy().reshape(-1, self.shape[1])


def _columns_for(role: str, schema: Any, file: str) -> list[str]:
    """Choose the columns by their types: one column of lists or all floats; the only integers."""
    import pyarrow.types as kinds

    lists = [field.name for field in schema if _is_list(field.type)]
    floats = [field.name for field in schema if kinds.is_floating(field.type)]
    integers = [field.name for field in schema if kinds.is_integer(field.type)]
    if role == SCORES and len(lists) == 1:
        return lists
    if role == SCORES and not lists and floats:
        return floats
    if role == TARGETS and len(integers) == 1:
        return integers
    raise InputError(
        f"{file}: cannot tell which columns hold the {role}; name them, as in {file}#NAME or "
        f"{file}#NAME,NAME; its columns are {', '.join(f'{f.name} ({f.type})' for f in schema)}"
    )


def _is_list(kind: Any) -> bool:
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


FORMATS: dict[str, Callable[[str, str, str], Array]] = {
    ".npy": _open_npy,
    ".npz": _open_npz,
    ".parquet": _Parquet,
}


def _line(error: BaseException) -> str:
    """Return an error's message on one line, shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:200]}..."
