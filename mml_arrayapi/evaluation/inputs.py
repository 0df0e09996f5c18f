"""Files and arrays as one data set that is read batch by batch, with errors that name the file."""

from __future__ import annotations

import math
import os
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate, pairwise
from numbers import Integral
from threading import Lock
from typing import Any, NamedTuple

from mml_arrayapi.evaluation.errors import InputError, advice, one_line
from mml_arrayapi.evaluation.files import File, find
from mml_arrayapi.evaluation.formats import (
    CLASS_WEIGHTS,
    SCORES,
    TARGETS,
    WEIGHTS,
    Rules,
    adopt,
    open_array,
)
from mml_arrayapi.evaluation.names import cores, correspond, in_another_order, natural, numbered

Array = Any

BATCH = 2**21  # scores read at a time, unless told otherwise: 8 MB of float32
# Of many classes more, since a batch costs a millisecond beside the kernel: 256 rows, but 64 where
# these have more scores than that.
LARGE_BATCH = 2**25
CHUNKS = 8  # decoded chunks (of labels: scores are cut where chunks begin) kept for other batches

_lock = Lock()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file, or one array.

    Attributes
    ----------
    name : str
        The path as it was given, with ``#item`` where the file holds several arrays; or what the
        array is.
    role : {"scores", "targets", "sample weights"}
        What it is read for.
    source : File or array
        Where the rows come from.
    version : str
        What changes when the file does; empty for an array.
    rules : Rules
        How values that are no plain data are taken.
    shape, dtype
        As NumPy has them.
    chunks : tuple or None
        The sizes of what is stored together: such rows are not torn apart.
    columns : tuple of str
        Of a table, the columns that are read.
    chosen : str
        What was chosen of the file, where no one array was named: its columns, or its only array.
    categories : tuple of str
        Of an enum, what its codes stand for.
    index : tuple of str, range or None
        Of a table that pandas wrote, the columns that keep its index, or the range that it is.
    address : str
        Where an HDF5 file holds the array, under whatever names.
    """

    name: str
    role: str
    source: Any
    version: str
    rules: Rules
    shape: tuple[Any, ...]
    dtype: Any
    chunks: Any
    columns: tuple[str, ...] = ()
    chosen: str = ""
    categories: tuple[str, ...] = ()
    index: tuple[str, ...] | range | None = None
    address: str = ""

    def read(self, axis: int, start: int, stop: int) -> Array:
        """Return some rows as a NumPy array; ``axis`` is the rows' axis."""
        import numpy as np

        where = (*(slice(None),) * axis, slice(start, stop))
        try:
            part = self.source[where] if self.version == "" else self._read_file(where)
            if hasattr(part, "compute"):  # Dask: this runs in a worker already
                part = part.compute(scheduler="synchronous")
            refuse_subclass(self.role, part)
            part = np.asarray(part)
            if part.dtype.name == "bfloat16":
                part = part.astype(np.float32)
            if part.shape != (*self.shape[:axis], stop - start, *self.shape[axis + 1 :]):
                raise ValueError(f"they have shape {part.shape}")  # noqa: TRY301
            if part.dtype.newbyteorder("=") != self.dtype.newbyteorder("="):
                raise ValueError(f"they have dtype {part.dtype}, not {self.dtype}")  # noqa: TRY301
        except Exception as error:
            raise self.unreadable(f"rows {start} to {stop - 1}", error) from error
        if not (self.version and self.source.store):  # stores are looked at once, at the end
            self.check_version()
        return part

    def check_version(self) -> None:
        """Raise if the file is not the one that the evaluation began with."""
        try:
            self._check_version()
        except InputError:
            raise
        except Exception as error:  # of a network: each file system has its own
            raise InputError(
                f"{self.name}: whether it has changed cannot be told ({one_line(error)}); run again"
            ) from error

    def _check_version(self) -> None:
        why = ""
        try:
            if not self.version or file_version(self.source) == self.version:
                return
        except FileNotFoundError as error:
            why = f" ({one_line(error)})"
        raise InputError(
            f"{self.name}: the file has changed since the evaluation began{why}; run again when "
            "nothing writes to it (workers must see the same file, not a copy)"
        )

    def unreadable(self, what: str, error: Exception) -> InputError:
        """Return the error that says so; but raise that the file has changed, or a plain error."""
        try:
            self._check_version()
        except InputError:
            raise
        except Exception:  # noqa: BLE001  (the first error tells more)
            pass
        if isinstance(error, (InputError, MemoryError, TypeError)):
            raise error
        told = advice(error, "write or copy it again")
        return InputError(f"{self.name}: {what} cannot be read {told}")

    def starts(self, axis: int) -> list[int]:
        """Return where the rows' chunks begin, and the number of rows; nothing without chunks."""
        n = self.shape[axis]
        if not self.chunks:
            return []
        sizes = self.chunks[axis]
        if isinstance(sizes, int):
            return [*range(0, n, sizes), n]
        return list(accumulate(sizes, initial=0))

    def _read_file(self, where: tuple[slice, ...]) -> Array:
        """Read rows; a chunk that they are only a part of is kept for the batches after."""
        import numpy as np

        key = (self.source, self.role, self.rules, self.version)
        array = _open(*key)
        axis, start, stop = len(where) - 1, where[-1].start, where[-1].stop
        starts = self.starts(axis)
        first = bisect_right(starts, start) - 1
        if not starts or (starts[first] == start and stop in starts):
            return array[where]
        parts = []
        for low, high in pairwise(starts[first:]):
            if low >= stop:
                break
            with _lock:  # whoever comes second finds it read
                kept = _read_chunk(key, axis, low, high)
            parts.append(kept[(*where[:-1], slice(max(start - low, 0), stop - low))])
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def forget() -> None:
    """Forget decoded chunks and open files."""
    _read_chunk.cache_clear()
    _open.cache_clear()


@lru_cache(maxsize=64)
def _open(file: File, role: str, rules: Rules, version: str) -> Array:  # noqa: ARG001
    return open_array(file, role, rules)


@lru_cache(maxsize=CHUNKS)
def _read_chunk(key: Any, axis: int, start: int, stop: int) -> Array:
    return _open(*key)[(*(slice(None),) * axis, slice(start, stop))]


def file_version(file: File) -> str:
    """Return what changes when the file does, or the array within the store that is meant."""
    return file.version(file.item if file.store and file.exists(f"/{file.item}") else "")


class ShardSlice(NamedTuple):
    """Rows of one shard."""

    shard: Shard
    start: int
    stop: int

    def read(self, axis: int) -> Array:
        """Return the rows as a NumPy array."""
        return self.shard.read(axis, self.start, self.stop)


class Batch(NamedTuple):
    """Rows that are read and counted together; ``start`` counts from the first row of all.

    Where a shard is an array, its rows stand here themselves.
    """

    start: int
    stop: int
    scores: tuple[Any, ...]  # one ShardSlice
    targets: tuple[Any, ...]  # as many as there are shards
    weights: tuple[Any, ...]


class Dataset(NamedTuple):
    """What is evaluated, cut into batches.

    Attributes
    ----------
    shards : dict of str to list of Shard
        The files or arrays, by role.
    batches : list of Batch
        All rows, in order.
    axis : int
        The classes' axis in the scores, not negative.
    """

    shards: dict[str, list[Shard]]
    batches: list[Batch]
    axis: int

    @property
    def rows_axis(self) -> int:
        """The axis of the scores along which they are cut."""
        return 0 if self.axis else 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the first scores."""
        return self.shards[SCORES][0].shape

    @property
    def n_classes(self) -> int:
        """The number of classes."""
        return int(self.shape[self.axis])

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return self.batches[-1].stop if self.batches else 0

    @property
    def samples_per_row(self) -> int:
        """How many samples a row has, where the scores have more than two axes."""
        axes = (self.axis, self.rows_axis)
        return math.prod(n for i, n in enumerate(self.shape) if i not in axes)

    @property
    def is_lazy(self) -> bool:
        """Whether any input is a Dask array."""
        return any(hasattr(s.source, "dask") for shards in self.shards.values() for s in shards)

    def refuse_persisted(self) -> None:
        """Raise if chunks of a Dask array are on a cluster already."""
        if not self.is_lazy or "distributed" not in sys.modules:
            return
        from distributed import futures_of

        if futures_of([s.source for shards in self.shards.values() for s in shards]):
            raise InputError(
                "scheduler: there are arrays whose chunks are on a cluster (client.persist); give "
                "its client, as in scheduler=client"
            )

    def largest_batch(self) -> int:
        """Return the bytes of the scores of the largest batch."""
        rows = max((batch.stop - batch.start for batch in self.batches), default=0)
        per_row = self.samples_per_row * self.n_classes
        return rows * per_row * int(self.shards[SCORES][0].dtype.itemsize)

    def place(self, sample: int) -> tuple[str, int, tuple[int, ...]]:
        """Return a sample's file, its row there, and its position in the whole."""
        import numpy as np

        row, within = divmod(sample, self.samples_per_row)
        inner = [n for i, n in enumerate(self.shape) if i not in (self.axis, self.rows_axis)]
        rest = tuple(int(i) for i in np.unravel_index(within, inner)) if inner else ()
        first = 0
        for shard in self.shards[SCORES]:
            n = shard.shape[self.rows_axis]
            if row < first + n:
                return shard.name, row - first, (row, *rest)
            first += n
        raise IndexError(sample)

    def check_versions(self) -> None:
        """Raise if a file is not the one that the evaluation began with."""
        for shards in self.shards.values():
            for shard in shards:
                shard.check_version()

    def identity(self) -> list[Any]:
        """Return what each shard is, as plain JSON."""
        return [
            [role, s.source.where, list(s.shape), str(s.dtype), list(s.columns), s.version]
            for role, shards in self.shards.items()
            for s in shards
        ]

    def pairing(self) -> list[dict[str, Any]]:
        """Return which rows of which files belong together, in order, as plain JSON."""
        made = []
        first = 0
        spans_of = {role: _spans(self.shards.get(role, [])) for role in (TARGETS, WEIGHTS)}
        for shard in self.shards[SCORES]:
            stop = first + shard.shape[self.rows_axis]
            line: dict[str, Any] = {"rows": [first, stop], SCORES: _told(shard, 0, stop - first)}
            for role, find_spans in spans_of.items():
                if spans := find_spans(first, stop):
                    line[role] = [_told(s.shard, s.start, s.stop) for s in spans]
            made.append(line)
            first = stop
        return made


def _told(shard: Shard, start: int, stop: int) -> dict[str, Any]:
    name = printable(shard.name)
    told: dict[str, Any] = {"name": name, "rows": [start, stop]}
    return {**told, "columns": list(shard.columns)} if shard.columns else told


def printable(name: str) -> str:
    """Return a name with what is not UTF-8 in it written out, so that it can be printed."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def open_dataset(
    logits: Any, targets: Any, sample_weight: Any, axis: int, chunk_size: int | None, rules: Rules
) -> Dataset:
    """Find the shards, check that they fit together, and cut them into batches.

    Parameters
    ----------
    logits, targets, sample_weight, axis, chunk_size
        As in :func:`mml_arrayapi.evaluate`.
    rules : Rules
        How values that are no plain data are taken.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        With the name of the file, what is wrong, and what to do.
    """
    import numpy as np

    given = {SCORES: logits, TARGETS: targets, WEIGHTS: sample_weight}
    optional = [WEIGHTS] if sample_weight is None else []
    found = {role: _shards(given[role], role, rules) for role in given if role not in optional}
    found = _optimised(found)
    scores = found[SCORES] = _of_known_width(found[SCORES])
    first = scores[0]
    ndim = len(first.shape)
    if ndim < 2:
        raise InputError(
            f"{first.name}: scores must have shape (N, C), but have shape {first.shape}"
        )
    if not -ndim <= axis < ndim:
        raise InputError(f"{first.name}: scores have {ndim} axes, but axis is {axis}")
    data = Dataset(found, [], axis % ndim)
    _check_alike(scores, data.axis, data.rows_axis)
    _check_once(scores)
    for shards in found.values():
        _check_chosen(shards)
    batch = tuple(n for i, n in enumerate(first.shape) if i not in (data.axis, data.rows_axis))
    for role, shards in [*found.items()][1:]:
        for shard in shards:
            if shard.shape[1:] != batch or not shard.shape:
                wanted = str(("N", *batch)).replace("'", "")
                raise InputError(
                    f"{shard.name}: {role} must have shape {wanted} beside scores of shape "
                    f"{first.shape} with the classes at axis {data.axis}, but have shape "
                    f"{shard.shape}"
                )
        _check_order(scores, shards)
        kinds = {str(shard.dtype): shard.dtype for shard in shards}
        if role == TARGETS and np.result_type(*kinds.values()).kind not in "iu":
            raise InputError(
                f"targets: no integer type holds those of {' and '.join(kinds)}; convert some"
            )
        _check_lengths(scores, shards, data.rows_axis)
        _check_indices(scores, shards)
    per_row = max(1, data.n_classes * data.samples_per_row)
    rows = max(256 if 256 * per_row <= LARGE_BATCH else 64, BATCH // per_row)
    step = rows if chunk_size is None else chunk_size
    return data._replace(batches=list(_batches(data, step)))


def _optimised(found: dict[str, list[Shard]]) -> dict[str, list[Shard]]:
    """Let Dask optimise its arrays, all together, so that what they share stays shared."""
    lazy = [s for shards in found.values() for s in shards if hasattr(s.source, "dask")]
    if not lazy:
        return found
    import dask

    # Fusion of single tasks would repeat a chunk's producer for each of its consumers.
    with dask.config.set({"optimization.fuse.active": False}):
        made = iter(dask.optimize(*(_planned(shard.source) for shard in lazy)))
    return {
        role: [
            replace(s, source=_as_declared(next(made), role)) if hasattr(s.source, "dask") else s
            for s in shards
        ]
        for role, shards in found.items()
    }


def _as_declared(array: Array, role: str) -> Array:
    """Return the array with each chunk looked at: others than declared would be paired wrongly."""
    from itertools import product

    from dask.highlevelgraph import HighLevelGraph

    name, kind = f"as-declared-{array.name}", str(array.dtype)
    tasks = {
        (name, *place): (partial(_checked_chunk, shape, kind, role), (array.name, *place))
        for place, shape in zip(
            product(*map(range, array.numblocks)), product(*array.chunks), strict=True
        )
    }
    graph = HighLevelGraph.from_collections(name, tasks, dependencies=[array])
    return type(array)(graph, name, array.chunks, meta=array._meta)


def _checked_chunk(shape: tuple[int, ...], dtype: str, role: str, chunk: Array) -> Array:
    import numpy as np

    refuse_subclass(role, chunk)
    if not isinstance(chunk, np.ndarray):
        raise InputError(
            f"{role}: a chunk of the Dask array is of type {type(chunk).__name__}; chunks must be "
            "NumPy arrays, as map_blocks(np.asarray) makes them"
        )
    got = chunk.shape, str(chunk.dtype)
    if got != (shape, dtype):
        raise InputError(
            f"{role}: Dask was told of a chunk of shape {shape} and dtype {dtype}, but it has "
            f"shape {got[0]} and dtype {got[1]}; give map_blocks() its chunks and dtype"
        )
    return chunk


def _planned(array: Array) -> Array:
    """Return a Dask array as one of tasks: those of the query planner would plan every batch."""
    from dask.array.core import Array as ArrayOfTasks
    from dask.core import flatten

    if isinstance(array, ArrayOfTasks):
        return array
    name = next(flatten(array.__dask_keys__()))[0]
    return ArrayOfTasks(array.__dask_graph__(), name, array.chunks, meta=array._meta)


def read_class_weights(path: str) -> Array:
    """Read the weights of the classes from a file of any format.

    Parameters
    ----------
    path : str
        Where it is.

    Raises
    ------
    InputError
        It cannot be read, or is not one file with one axis.
    """
    shard, *others = _shards(path, CLASS_WEIGHTS, Rules())
    if others:
        raise InputError(
            f"{path}: stands for {1 + len(others)} files, but the class weights must be in one"
        )
    if len(shard.shape) != 1:
        raise InputError(
            f"{path}: class weights must have shape (C,), but have shape {shard.shape}"
        )
    return shard.read(0, 0, shard.shape[0])


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
        if not same or shard.dtype.newbyteorder("=") != first.dtype.newbyteorder("="):
            raise InputError(
                f"{shard.name}: scores of shape {shard.shape} and dtype {shard.dtype} don't "
                f"continue those of {first.name}, of shape {first.shape} and dtype {first.dtype}; "
                "give files of one data set"
            )


def _check_chosen(shards: list[Shard]) -> None:
    """Refuse parts of which different columns or arrays would be read unasked; or other codes."""
    unnamed = [shard for shard in shards if shard.chosen]
    for shard in unnamed:
        if shard.chosen != unnamed[0].chosen:
            raise InputError(
                f"{shard.name}: {shard.chosen} would be read of it, but {unnamed[0].chosen} of "
                f"{unnamed[0].name}; name what to read, as in {shard.name}#NAME (columns of scores "
                "in the order of the classes, as in #NAME,NAME)"
            )
    for shard in shards:
        if shard.categories != shards[0].categories:
            raise InputError(
                f"{shard.name}: the categories of its enum are {list(shard.categories)}, but those "
                f"of {shards[0].name} are {list(shards[0].categories)}; write all with the same"
            )


def _check_once(scores: list[Shard]) -> None:
    names: dict[Any, dict[str, str]] = {}
    stores = []
    for shard in scores:
        if not shard.version:
            continue
        place, item = shard.source.identity(shard.columns)
        item = shard.address or item
        if shard.source.store:
            stores.append((f"{place}/", shard.name))
            continue
        items = names.setdefault(place, {})
        # Without an item a file holds one array only: whatever is named of it is the same.
        for other, name in items.items():
            if other == item or "" in (item, other):
                raise _given_twice(shard.name, name)
        items[item] = shard.name
    for (outer, name), (inner, other) in pairwise(sorted(stores)):
        if inner.startswith(outer):
            raise _given_twice(other, name)


def _given_twice(name: str, other: str) -> InputError:
    twice = "twice" if other == name else f"twice, as {other} too"
    return InputError(f"{name}: is given {twice}; its samples would count twice")


def _of_known_width(scores: list[Shard]) -> list[Shard]:
    """Give tables without rows, of whose lists nobody knows the length, that of the others."""
    known = [shard for shard in scores if None not in shard.shape]
    if not known:
        raise InputError(f"{scores[0].name}: has no rows, so that the number of classes is unknown")
    empty = (0, *known[0].shape[1:])
    return [replace(shard, shape=empty) if None in shard.shape else shard for shard in scores]


def _check_order(scores: list[Shard], others: list[Shard]) -> None:
    """Refuse files whose order a pattern leaves in doubt."""
    ours, theirs = _found(scores), _found(others)
    if len(scores) != len(others):
        for names in (*ours.values(), *theirs.values()):
            if not _in_order(names):
                raise InputError(
                    f"{names[0]}: the order of its {len(names)} files is in doubt, since their "
                    f"names differ in more than rising numbers, and {len(scores)} file(s) of "
                    f"scores stand beside {len(others)} of {others[0].role}; give a list, or as "
                    "many files of both"
                )
        return
    for places in dict.fromkeys((*ours, *theirs)):
        first, second = ours.get(places), theirs.get(places)
        if first and second:
            fit = correspond(first, second)
        elif any(_cross(places, other) for other in (theirs if first else ours)):
            fit = False
            first, second = (_names(shards[slice(*places)]) for shards in (scores, others))
        else:  # a list on one side: that of a pattern must be its order
            listed = [shard.name for shard in (others if first else scores)[slice(*places)]]
            fit = _in_order(first or second or []) and listed == sorted(listed, key=natural)
            first, second = (_names(shards[slice(*places)]) for shards in (scores, others))
            whole = (_whole_names(shards[slice(*places)]) for shards in (scores, others))
            fit = fit or (len(first) == len(second) and correspond(first, second))
            fit = fit or correspond(*whole)
        if not fit:
            told = [f"{one[0]} to {one[-1]}" if one else "arrays" for one in (first, second)]
            raise InputError(
                f"{told[0]}: the parts in which their names differ are not, file by file, those of "
                f"{told[1]}, so that it is in doubt which belong together; name them alike, or "
                "give lists"
            )
    _check_sequence(scores, others)


def _check_sequence(scores: list[Shard], others: list[Shard]) -> None:
    """Refuse files whose names correspond, but in another order."""
    names = [_whole_names(shards) for shards in (scores, others)]
    if in_another_order(*names):
        first, second = map(cores, names)
        raise InputError(
            f"{others[0].name}: the {others[0].role} are those of the scores by name, "
            f"but in another order ({', '.join(second[:3])} beside {', '.join(first[:3])}); give "
            "both in the same"
        )


def _cross(first: tuple[int, int], second: tuple[int, int]) -> bool:
    """Whether two stretches of a list overlap, and neither is within the other."""
    (a, b), (c, d) = sorted((first, second))
    return a < c < b < d


def _in_order(names: list[str]) -> bool:
    """Whether the order of files that a pattern found is beyond doubt."""
    return numbered(names) and not any("=" in name for name in names)


def _found(shards: list[Shard]) -> dict[tuple[int, int], list[str]]:
    """Return the names of several files that one pattern found, by their places in the list."""
    patterns = [getattr(shard.source, "pattern", "") for shard in shards]
    ends = [0]
    for i in range(1, len(patterns)):  # a pattern that is given twice begins anew
        again = patterns[i] and shards[i].source == shards[ends[-1]].source
        if patterns[i] != patterns[i - 1] or again:
            ends.append(i)
    return {
        (start, stop): _names(shards[start:stop])
        for start, stop in pairwise([*ends, len(patterns)])
        if stop - start > 1 and patterns[start]
    }


def _names(shards: list[Shard]) -> list[str]:
    """Return what of the files' paths is below the folder that was searched, if one was."""
    files = [shard.source for shard in shards if isinstance(shard.source, File)]
    return [f.path[len(f.root or os.path.dirname(f.path)) :].lstrip("/") for f in files]


def _whole_names(shards: list[Shard]) -> list[str]:
    """Return absolute paths and URLs, and what arrays are."""
    return [s.source.where if isinstance(s.source, File) else s.name for s in shards]


def _check_lengths(scores: list[Shard], others: list[Shard], rows_axis: int) -> None:
    role = others[0].role
    if len(scores) == len(others):
        for s, t in zip(scores, others, strict=True):
            if s.shape[rows_axis] != t.shape[0]:
                raise InputError(
                    f"{t.name}: has {t.shape[0]:,} {role}, but {s.name} has "
                    f"{s.shape[rows_axis]:,} samples; give files that belong together"
                )
    n_scores = sum(s.shape[rows_axis] for s in scores)
    n_others = sum(t.shape[0] for t in others)
    if n_scores != n_others:
        raise InputError(
            f"{others[0].name}: {len(others)} file(s) have {n_others:,} {role}, but "
            f"{len(scores)} file(s) from {scores[0].name} on have {n_scores:,} samples; "
            "give files that belong together"
        )


def _check_indices(scores: list[Shard], others: list[Shard]) -> None:
    """Refuse tables whose rows, by their pandas indices, are not those of the scores."""
    from mml_arrayapi.evaluation.parquet import first_difference, is_shuffled

    sides = scores, others
    if any(shard.index is None for shard in (*scores, *others)):
        return
    # An index from 0 on says nothing: pandas makes one for rows that had another, or none.
    plain = [all(shard.index == range(shard.shape[0]) for shard in shards) for shards in sides]
    if all(plain):
        return
    if any(plain):
        other = sides[plain.index(False)]
        if not is_shuffled(_index_rows(other), sum(shard.shape[0] for shard in other)):
            return
    difference = first_difference(*map(_index_rows, sides, plain))
    if difference is not None:
        row, ours, theirs = difference
        raise InputError(
            f"{others[0].name}: row {row} of its {others[0].role} has the pandas index {theirs!r}, "
            f"that of the scores {ours!r}, so that it is in doubt which belong together; sort both "
            "alike, or write them without an index"
        )


def _index_rows(shards: list[Shard], plain: bool = False) -> Iterator[Any]:
    """Yield the pandas index of shards that follow one another; plain ones go on where one ends."""
    from mml_arrayapi.evaluation.parquet import index_table

    if plain:
        yield index_table(range(sum(shard.shape[0] for shard in shards)))
        return
    for shard in shards:
        try:
            yield from _open(shard.source, shard.role, shard.rules, shard.version).index_rows()
        except Exception as error:
            raise shard.unreadable("its pandas index", error) from error


def _batches(data: Dataset, step: int) -> Iterator[Batch]:
    base = 0
    spans_of = [_spans(data.shards.get(role, [])) for role in (TARGETS, WEIGHTS)]
    for shard in data.shards[SCORES]:
        n = shard.shape[data.rows_axis]
        for start, stop in pairwise(_cuts(n, shard.starts(data.rows_axis), step)):
            others = (tuple(find_spans(base + start, base + stop)) for find_spans in spans_of)
            rows = (_slice(shard, data.rows_axis, start, stop),)
            yield Batch(base + start, base + stop, rows, *others)
        base += n


def _cuts(n: int, starts: Sequence[int], step: int) -> list[int]:
    """Cut n rows into batches of about ``step``, where chunks begin if there are any."""
    if not n:
        return []
    cuts = [0]
    for at in starts or range(step, n, step):
        if at - cuts[-1] >= step and at < n:
            cuts.append(at)
    return [*cuts, n]


def _spans(shards: list[Shard]) -> Callable[[int, int], list[ShardSlice]]:
    """Return what finds the rows from ``start`` to ``stop`` of all in the shards."""
    ends = list(accumulate((shard.shape[0] for shard in shards), initial=0))

    def find_spans(start: int, stop: int) -> list[ShardSlice]:
        first, last = max(bisect_right(ends, start) - 1, 0), bisect_left(ends, stop)
        made = []
        for i in range(first, min(last, len(shards))):
            a, b = max(start, ends[i]), min(stop, ends[i + 1])
            if a < b:
                made.append(_slice(shards[i], 0, a - ends[i], b - ends[i]))
        return made

    return find_spans


def _slice(shard: Shard, axis: int, start: int, stop: int) -> ShardSlice:
    """Rows of a shard; of an array only these rows travel to the worker."""
    if shard.version:
        return ShardSlice(shard, start, stop)
    where = (*(slice(None),) * axis, slice(start, stop))
    lazy = hasattr(shard.source, "dask")
    part = shard.source[where] if lazy else _Rows(shard.source, where)
    shape = (*shard.shape[:axis], stop - start, *shard.shape[axis + 1 :])
    return ShardSlice(replace(shard, source=part, shape=shape), 0, stop - start)


class _Rows:
    """Rows of an array: read when they are asked for, or before they go to another process."""

    def __init__(self, array: Array, where: tuple[slice, ...]) -> None:
        self._array, self._where = array, where

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        if isinstance(self._array, Exception):
            raise self._array
        return self._array[self._where][where]

    def __reduce__(self) -> tuple[Any, ...]:
        import numpy as np

        try:
            return np.asarray, (np.asarray(self[()]),)
        except Exception as error:  # noqa: BLE001  (Dask would raise one of its own instead)
            return _Rows, (error, self._where)


def _shards(given: Any, role: str, rules: Rules) -> list[Shard]:
    """Find what a path, a pattern, an array, or a list of those stands for."""
    if isinstance(given, (str, os.PathLike)):
        return [_file_shard(file, role, rules) for file in find(os.fspath(given))]
    if isinstance(given, (list, tuple)):
        found = [shard for one in given for shard in _shards(one, role, rules)]
        if not found:
            raise InputError(f"{role}: the list is empty; give at least one file or array")
        return found
    if not _is_array(given, role):
        raise TypeError(
            f"{role} must be a path, an array, or a list of those, but is of type "
            f"{type(given).__name__}"
        )
    refuse_subclass(role, given)
    if hasattr(given, "coords") or hasattr(given, "iloc"):  # xarray, pandas
        raise TypeError(
            f"{role} must be arrays without labels, which the pairing of samples would ignore, but "
            f"are of type {type(given).__name__}; align them, and give their to_numpy()"
        )
    if hasattr(given, "toarray"):  # NumPy makes an object of it, or of each of its elements
        raise TypeError(
            f"{role} must be dense, but are of type {type(given).__name__}; give their toarray()"
        )
    array = adopt(given, role, rules)
    if any(n != n for n in given.shape):
        raise InputError(
            f"{role}: the sizes of the chunks are unknown; compute_chunk_sizes() first"
        )
    return [_shard(Shard(role, role, array, "", rules, (), None, None), array)]


def _is_array(given: Any, role: str) -> bool:
    try:
        shape, typed = getattr(given, "shape", ()), hasattr(given, "dtype")
    except Exception as error:
        raise InputError(
            f"{role}: the array tells no shape {advice(error, 'give one whose file is open')}"
        ) from error
    # Dask's data frames have sizes, and its delayed objects a shape, that are no numbers.
    numbers = shape is None or (
        isinstance(shape, tuple) and all(isinstance(n, (Integral, float)) for n in shape)
    )
    return numbers and hasattr(given, "shape") and typed


def _file_shard(file: File, role: str, rules: Rules) -> Shard:
    try:
        version = file_version(file)
        array = _open(file, role, rules, version)
        return _shard(Shard(file.name, role, file, version, rules, (), None, None), array)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{file.name}: cannot be read {advice(error, 'write or copy it again')}"
        ) from error


def _shard(shard: Shard, array: Array) -> Shard:
    """Fill in what the array tells of itself; check its dtype."""
    import numpy as np

    try:
        dtype = np.dtype(np.float32 if str(array.dtype) == "bfloat16" else array.dtype)
    except TypeError:
        raise TypeError(
            f"{shard.role} must be files, NumPy arrays or Dask arrays, but have dtype {array.dtype}"
        ) from None
    if dtype.names:
        raise InputError(
            f"{shard.name}: holds records with the fields {', '.join(dtype.names)}, not numbers; "
            f"write the {shard.role} as an array of their own"
        )
    floats = dtype.kind == "f" and dtype.itemsize in (2, 4, 8)
    if shard.role == SCORES and not floats:
        raise InputError(
            f"{shard.name}: scores must be float16, float32 or float64, but are {dtype}; "
            "convert them, as with array.astype('float32')"
        )
    if shard.role == TARGETS and dtype.kind not in "iu":
        numbers = dtype.kind in "bf"  # what dates become would be no classes
        raise InputError(
            f"{shard.name}: targets must be integers, but are {dtype}; "
            + ("convert them, as with array.astype('int64')" if numbers else "number the classes")
        )
    if not (floats or dtype.kind in "iu"):
        raise InputError(f"{shard.name}: {shard.role} must be real numbers, but are {dtype}")
    shape = tuple(n if n is None else int(n) for n in array.shape)
    chunks = getattr(array, "chunks", None) or None
    columns, index = tuple(getattr(array, "columns", ())), getattr(array, "index", None)
    named = not isinstance(shard.source, File) or (shard.source.item and len(columns) < 2)
    return replace(
        shard,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        columns=columns,
        chosen="" if named else ", ".join(columns) or getattr(array, "item", ""),
        categories=tuple(getattr(array, "categories", ())),
        index=index if isinstance(index, (tuple, range)) else None,
        address=str(getattr(array, "address", "")),
    )


def refuse_subclass(role: str, array: Array) -> None:
    """Raise if an array is of a subclass whose meaning a plain one would lose, such as a mask."""
    import numpy as np

    if isinstance(array, np.ndarray) and type(array) not in (np.ndarray, np.memmap):
        raise TypeError(
            f"{role} must be plain arrays, but are of type {type(array).__name__}; convert them, "
            "so that masked values are not taken for data"
        )
