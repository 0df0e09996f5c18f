"""Columns of a Parquet file as an array."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from operator import index
from typing import Any
from urllib.parse import unquote

from mml_arrayapi.evaluation.errors import InputError, require
from mml_arrayapi.evaluation.files import File
from mml_arrayapi.evaluation.names import natural, numbered

Array = Any

# What is no class though it is a float, no label though it is an integer, no scores though it is
# a list: such columns are taken only where they are named.
NOT_GUESSED = re.compile(
    r"(.*_)?(idx|index|row|key|fold|split|time|timestamp|date|year|month|day|hour)"
    r"|(.*_)?(epoch|step|iteration|seed|rank|age)|__index_level_\d+__|unnamed.*"
    r"|(.*_)?id|(user|image|img|sample|item|row|doc|record|file|query|video|patient|uu|gu)id"
    r"|.*(embed|feature|hidden|vector|token|weight|prob|softmax|sigmoid|attention|bbox|activation"
    r"|coord|pixel|audio|spectr|keypoint).*",
    re.IGNORECASE,
)
NO_LABEL = re.compile(  # though an integer
    r".*(pred|argmax|output|length|size|count|guess).*|(.*_|y)?hat|top_?\d+.*|best|(.*_)?len",
    re.IGNORECASE,
)
# Columns that say what they are: where there is one, no other is taken unasked.
TELLING = {
    "scores": re.compile(r"logits|scores", re.IGNORECASE),
    "targets": re.compile(r"labels?|targets?|class|y", re.IGNORECASE),
    "sample weights": re.compile(r"(sample_?)?weights?", re.IGNORECASE),
    "class weights": re.compile(r"(class_?)?weights?", re.IGNORECASE),
}
NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # of which pyarrow infers no type
EXTENSION = b"ARROW:extension:name"
MAGIC = b"PAR1"  # a file begins and ends with it
PARTITION = re.compile(r"([^/=]+)=([^/]*)/")
UDT = ["type", "size", "indices", "values"]  # the fields of Spark's VectorUDT
ENCRYPTED = re.compile("Could not read encrypted|Cannot decrypt")  # of Arrow's errors


class ParquetColumns:
    """Columns of a Parquet file; its row groups are its chunks.

    Attributes
    ----------
    columns : list of str
        The columns, in the order in which they are read.
    categories : tuple of str
        Of an enum, what its codes stand for.
    index : tuple of str
        The columns that pandas keeps its index in.
    shape : tuple of int or None
        The number of classes is None where no row tells it.
    """

    def __init__(self, file: File, role: str) -> None:
        import numpy as np

        self._name, self._partitions = file.name, _partitions(file)
        self._keys = dict(self._partitions)
        keys = self._open(file)
        groups = [group.num_rows for group in self._fragment.row_groups]
        self._starts = tuple(accumulate(groups, initial=0))
        self.index = _index_of(self._fragment.physical_schema, self._starts[-1])
        keeps = self.index if isinstance(self.index, tuple) else ()
        names = self._schema.names
        plain = file.plain_name
        if file.item:
            self.columns = _named(file.item, names, plain)
        else:
            # Not just any partition, which a folder is named after (rank=0, epoch=3), or index.
            likely = [
                f
                for f in self._schema
                if f.name not in (*keys, *keeps) or TELLING["targets"].fullmatch(f.name)
            ]
            self.columns = _guess(role, likely, plain)
        self._refuse_doubles()
        self._kinds = [_Kind(self._schema.field(name)) for name in self.columns]
        self._refuse_mixtures(role, plain)
        kind, rows = self._kinds[0], self._starts[-1]
        width: tuple[Any, ...] = ()
        if kind.nested:
            width = kind.width or self._first_width()
        elif role == "scores":
            width = (len(self.columns),)
        self.shape = (rows, *width)
        self.categories = tuple(kind.categories)
        # Of integers that no integer type holds it would be a float's.
        self.dtype = np.result_type(*(k.dtype for k in self._kinds)) if kind.floats else kind.dtype
        self.chunks = (tuple(groups) or (0,), *((n,) for n in width))

    def _open(self, file: File) -> dict[str, str]:
        """Open the file; return the partitions that are none of its own columns."""
        ds = require("pyarrow.dataset", file.name)
        pa = require("pyarrow", file.name)
        options = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
        given = {
            "source": file.path,
            "format": ds.ParquetFileFormat(default_fragment_scan_options=options),
            "filesystem": file.filesystem,
        }
        with _cause_told(file.name):
            dataset = ds.dataset(**given)
        stored = dataset.schema.names
        keys = {key: value for key, value in self._keys.items() if key not in stored}
        if keys:
            schema = pa.schema({key: _partition_type(value) for key, value in keys.items()})
            partitioning = ds.partitioning(schema, flavor="hive")
            given |= {"partitioning": partitioning, "partition_base_dir": file.root}
            dataset = ds.dataset(**given)
        self._schema, self._ds = dataset.schema, ds
        (self._fragment,) = dataset.get_fragments()
        _refuse_two(file, self._fragment.metadata)
        return keys

    def _refuse_mixtures(self, role: str, plain: str) -> None:
        """Refuse columns that make no array, or none together."""
        for name, kind in zip(self.columns, self._kinds, strict=True):
            if kind.extension:
                raise InputError(
                    f"{plain}: column {name!r} is of the extension type {kind.extension}, whose "
                    "meaning is not known here; write plain numbers"
                )
        if role != "scores" and len(self.columns) > 1:
            raise InputError(
                f"{plain}: {role} must be in one column, but {len(self.columns)} are named: "
                f"{', '.join(self.columns)}"
            )
        if any(one.nested for one in self._kinds) and len(self.columns) > 1:
            raise InputError(
                f"{plain}: column {self.columns[0]!r} and others cannot be read together: one "
                "column of lists, or one column of numbers per class"
            )
        if len({one.floats for one in self._kinds}) > 1:
            told = ", ".join(f"{name} ({self._schema.field(name).type})" for name in self.columns)
            raise InputError(f"{plain}: some of its columns are floats, some are not: {told}")

    def _refuse_doubles(self) -> None:
        """Refuse a column that is named twice, or is a partition's as well."""
        stored = self._fragment.physical_schema.names
        for name in self.columns:
            if self.columns.count(name) > 1:
                raise InputError(f"{self._name}: column {name!r} is named twice")
            if [key for key, _ in self._partitions].count(name) > 1:
                raise InputError(
                    f"{self._name}: two folders of its path are partitions {name!r}; rename one"
                )
            if name in self._keys and name in stored:
                raise InputError(
                    f"{self._name}: has a column {name!r}, and is in a folder of the partition "
                    f"{name}={self._keys[name]}; drop one of the two, or give the file itself"
                )

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        import numpy as np

        start, stop, _ = where[0].indices(self.shape[0])
        parts = [np.empty((0, *self.shape[1:]), self.dtype)]
        for group, (low, high) in enumerate(pairwise(self._starts)):
            if low < high and start < high and low < stop:
                rows = self._array(self._table(group, self.columns))
                if rows.shape != (high - low, *self.shape[1:]):
                    raise InputError(
                        f"{self._name}: lists of column {self.columns[0]!r} have different "
                        f"lengths, such as {rows.shape[1]} and {self.shape[1]}; each must hold one "
                        "score per class"
                    )
                parts.append(rows[max(0, start - low) : stop - low])
        rows = parts[1] if len(parts) == 2 else np.concatenate(parts)
        return rows[(slice(None), *where[1:])]

    def index_rows(self) -> Iterator[Any]:
        """Yield the index of pandas of each row group, as Arrow tables."""
        for group, (low, high) in enumerate(pairwise(self._starts)):
            if isinstance(self.index, range):
                yield index_table(self.index[low:high])
            elif self.index:
                names = map(str, range(len(self.index)))  # of two files they may differ
                yield self._table(group, self.index).rename_columns([*names])

    def _table(self, group: int, names: Sequence[str]) -> Any:
        # By expressions, since a name with a dot is otherwise taken for a path.
        columns = {name: self._ds.field(name) for name in names}
        part = self._fragment.subset(row_group_ids=[group])
        with _cause_told(self._name):  # of single columns, too
            return part.to_table(schema=self._schema, columns=columns, use_threads=False)

    def _first_width(self) -> tuple[Any, ...]:
        for group, (low, high) in enumerate(pairwise(self._starts)):
            if low < high:
                return tuple(self._array(self._table(group, self.columns)).shape[1:])
        return (None,)

    def _array(self, table: Any) -> Array:
        import numpy as np

        for name, column in zip(self.columns, table.columns, strict=True):
            if column.null_count:
                raise InputError(
                    f"{self._name}: column {name!r} has empty values; fill or drop them"
                )
        columns = [
            kind.to_numpy(column, f"{self._name}: column {name!r}")
            for kind, name, column in zip(self._kinds, self.columns, table.columns, strict=True)
        ]
        if self._kinds[0].nested or len(self.shape) == 1:
            return columns[0]
        return np.stack(columns, axis=1)


@contextmanager
def _cause_told(name: str) -> Iterator[None]:
    """Give errors of Arrow whose message leads astray another one."""
    try:
        yield
    except (OSError, ValueError) as error:
        if ENCRYPTED.search(str(error)):
            raise InputError(f"{name}: is encrypted; decrypt it first") from error
        if "duplicate field names" in str(error):
            raise InputError(f"{name}: has several columns of one name; rename them") from error
        raise


def _index_of(schema: Any, rows: int) -> tuple[str, ...] | range | None:
    """Return the columns in which pandas keeps the index, or the range that it is."""
    told: Any = ()
    with suppress(ValueError):  # no JSON
        told = (schema.pandas_metadata or {}).get("index_columns", ())
    names = tuple(name for name in told if isinstance(name, str) and name in schema.names)
    if names or len(told) != 1 or not isinstance(told[0], dict):
        return names or None
    with suppress(LookupError, TypeError, ValueError):  # damaged
        made = range(*(index(told[0][name]) for name in ("start", "stop", "step")))
        return made if len(made) == rows else None
    return None


def index_table(rows: range) -> Any:
    """Return a part of an index that is a range, as an Arrow table."""
    import numpy as np
    import pyarrow as pa

    return pa.table({"0": np.arange(rows.start, rows.stop, rows.step)})


def first_difference(first: Iterator[Any], second: Iterator[Any]) -> tuple[int, Any, Any] | None:
    """Return where two indices differ, and how they go on there; None if they don't."""
    import pyarrow as pa

    at, (a, b) = 0, (next(first, None), next(second, None))
    while a is not None and b is not None:
        n = min(len(a), len(b))
        ours, theirs = a.slice(0, n), b.slice(0, n)
        with suppress(pa.ArrowException, ValueError):  # other types may hold the same values
            theirs = theirs.cast(ours.schema)
        if not ours.equals(theirs):
            rows = enumerate(zip(_rows(ours), _rows(theirs), strict=True), at)
            return next(((i, x, y) for i, (x, y) in rows if x != y), (at, ours.schema, b.schema))
        at += n
        a = a.slice(n) if n < len(a) else next(first, None)
        b = b.slice(n) if n < len(b) else next(second, None)
    return None


def _rows(table: Any) -> list[Any]:
    columns = [column.to_pylist() for column in table.columns]
    return columns[0] if len(columns) == 1 else [*zip(*columns, strict=True)]


def is_shuffled(index: Iterator[Any], n: int) -> bool:
    """Whether an index holds the numbers from 0 to n - 1 in another order."""
    import numpy as np
    import pyarrow.types as kinds

    seen, at, in_order = np.zeros(n, bool), 0, True
    for table in index:
        column = table.column(0)
        if table.num_columns > 1 or not kinds.is_integer(column.type) or column.null_count:
            return False
        values = column.to_numpy()
        if not ((values >= 0) & (values < n)).all():
            return False
        seen[values] = True
        in_order = in_order and bool((values == np.arange(at, at + len(values))).all())
        at += len(values)
    return bool(seen.all()) and not in_order


def _extension(field: Any) -> str:
    """Return the name of the extension type that a field's metadata tells of."""
    return str((field.metadata or {}).get(EXTENSION, b"").decode())


def _refuse_two(file: File, footer: Any) -> None:
    """Refuse files that were joined byte by byte: the last one's footer finds the first's pages."""
    with file.open() as opened:
        size = opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        if length != footer.serialized_size:  # signed: pyarrow aborts over an encrypted column
            return
        # Between pages and footer are indices and filters, in most files nothing; and if another
        # file stands in front, as much as it takes.
        gap = size - length - _end_of_pages(footer)
        opened.seek(0)
        at, tail = 0, b""
        while at < gap and (piece := opened.read(min(gap + 4 - at, 2**20))):
            for seam in re.finditer(MAGIC * 2, tail + piece):
                if _ends_at(opened, at - len(tail) + seam.start() + 4):
                    raise InputError(
                        f"{file.plain_name}: holds several Parquet files, one after another, of "
                        "which only one would be read; write them to files of their own"
                    )
            at, tail = at + len(piece), piece[-7:]
            opened.seek(at)


def _ends_at(opened: Any, end: int) -> bool:
    """Whether a Parquet file ends here, and not a text that looks like its end."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    opened.seek(end - 8)
    length = int.from_bytes(opened.read(4), "little")
    if not 0 < length <= end - 12:
        return False
    opened.seek(end - 8 - length)
    try:
        pq.read_metadata(pa.BufferReader(MAGIC + opened.read(length + 8)))
    except (OSError, pa.ArrowException):
        return False
    return True


def _end_of_pages(footer: Any) -> int:
    """Return where the pages end."""
    if not (footer.num_row_groups and footer.num_columns):
        return len(MAGIC)
    last = footer.row_group(footer.num_row_groups - 1).column(footer.num_columns - 1)
    starts = last.dictionary_page_offset, last.data_page_offset
    return int(min(filter(None, starts), default=len(MAGIC)) + last.total_compressed_size)


class _Kind:
    """What the type of a column stands for: numbers, lists, a tensor, Spark's vectors, an enum."""

    def __init__(self, field: Any) -> None:
        import numpy as np
        import pyarrow as pa
        import pyarrow.types as kinds

        kind = field.type
        self.tensor = isinstance(kind, pa.FixedShapeTensorType)
        self.udt = kinds.is_struct(kind) and [inner.name for inner in kind] == UDT
        self.width: tuple[int, ...] = ()
        self.categories = _categories(field)
        value = kind
        # Periods, say, are stored as integers, and seen as these where pandas isn't loaded.
        self.extension = _extension(field)
        if self.tensor:
            order = kind.permutation or range(len(kind.shape))  # of axes; shape is that in memory
            self.width, value = tuple(kind.shape[i] for i in order), kind.value_type
        elif self.udt:
            value = kind.field("values").type.value_type
        elif is_list(kind):
            self.width = (kind.list_size,) if kinds.is_fixed_size_list(kind) else ()
            value = kind.value_type
            self.extension = self.extension or _extension(kind.value_field)
        self.nested = self.tensor or self.udt or is_list(kind)
        if isinstance(value, pa.BaseExtensionType):
            self.extension = value.extension_name
        if self.extension:
            value = pa.null()
        try:
            # to_pandas_dtype() needs pandas before pyarrow 26
            empty = pa.array([], pa.int64() if self.categories else value)
            encoded = kinds.is_dictionary(empty.type)
            self.dtype = np.dtype(object) if encoded else empty.to_numpy(zero_copy_only=False).dtype
        except (NotImplementedError, pa.ArrowException):
            self.dtype = np.dtype(object)
        self.floats = kinds.is_floating(value)
        self.integers = bool(self.categories) or kinds.is_integer(value)

    def to_numpy(self, column: Any, where: str) -> Array:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        if self.categories:
            codes = pc.index_in(column.cast(pa.string()), pa.array(self.categories))
            if codes.null_count:
                raise InputError(f"{where} has values that are none of its categories")
            return codes.to_numpy().astype(np.int64)
        if self.tensor:
            for chunk in column.chunks:
                _refuse_nulls(chunk.storage.flatten(), where)
            parts = [chunk.to_numpy_ndarray() for chunk in column.chunks]
            return np.concatenate(parts) if parts else np.empty((0, *self.width), self.dtype)
        if self.udt:
            return _vectors(column.combine_chunks(), where)
        return _matrix(column, where) if self.nested else column.to_numpy()


def _matrix(lists: Any, where: str) -> Array:
    """Make rows of lists of equal lengths."""
    import pyarrow.compute as pc

    lengths = sorted(pc.unique(pc.list_value_length(lists)).to_pylist())
    if len(lengths) > 1:
        name, _, column = where.rpartition(": ")
        raise InputError(
            f"{name}: lists of {column} have different lengths, such as {lengths[:3]}; each must "
            "hold one score per class"
        )
    values = pc.list_flatten(lists)
    _refuse_nulls(values, where)
    return values.to_numpy().reshape(len(lists), *lengths)


def _refuse_nulls(values: Any, where: str) -> None:
    if values.null_count:
        raise InputError(f"{where}: lists hold empty values; fill or drop them")


def _vectors(column: Any, where: str) -> Array:
    """Make rows of Spark's vectors, dense (type 1) or sparse (type 0)."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    column = column if hasattr(column, "field") else column.chunk(0)
    kind = pc.fill_null(column.field("type"), -1).to_numpy()
    if not np.isin(kind, (0, 1)).all():
        raise InputError(f"{where} has vectors whose type is neither 0 nor 1")
    dense, sparse = (column.filter(pa.array(kind == wanted)) for wanted in (1, 0))
    values, lengths = _flat(dense.field("values"), where)
    scores, counts = _flat(sparse.field("values"), where)
    places, numbers = _flat(sparse.field("indices"), where)
    sizes = pc.fill_null(sparse.field("size"), -1).to_numpy()
    n_classes, *others = {*lengths.tolist(), *sizes.tolist()} or {0}
    if others or n_classes < 0:
        raise InputError(f"{where} has vectors of different sizes; each must hold one per class")
    rows = np.repeat(np.flatnonzero(kind == 0), counts)
    fit = (counts == numbers).all() and ((places >= 0) & (places < n_classes)).all()
    if not fit or (np.diff(rows * n_classes + places) <= 0).any():
        raise InputError(
            f"{where} has sparse vectors whose indices are not one for each value, ascending from "
            f"0 to {n_classes - 1} at most"
        )
    made = np.zeros((len(column), n_classes))
    made[kind == 1] = values.reshape(-1, n_classes)
    made[rows, places] = scores
    return made


def _flat(lists: Any, where: str) -> tuple[Array, Array]:
    """Return the values of all lists, and each one's length."""
    import pyarrow.compute as pc

    _refuse_nulls(lists, where)
    values = pc.list_flatten(lists)
    _refuse_nulls(values, where)
    return values.to_numpy(), pc.list_value_length(lists).to_numpy()


def _categories(field: Any) -> list[str]:
    """Return the categories of a polars Enum, in the order of their codes."""
    told = field.metadata or {}
    rest = told.get(b"_PL_ENUM_VALUES2", told.get(b"_PL_ENUM_VALUES", b""))
    found = []
    while rest:
        length, _, rest = rest.partition(b";")
        found.append(rest[: int(length)].decode())
        rest = rest[int(length) :]
    return found


def is_list(kind: Any) -> bool:
    """Whether a type is one of Arrow's lists."""
    import pyarrow.types as kinds

    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))


def _named(item: str, names: Sequence[str], file: str) -> list[str]:
    """Return the columns that ``item`` names, with commas, in quotes (as CSV), or by a pattern."""
    if item in names:
        return [item]
    found: list[str] = []
    for given in next(csv.reader([item])):
        matching = [n for n in names if n == given] or [n for n in names if fnmatchcase(n, given)]
        if not matching:
            raise InputError(f"{file}: has no column {given!r}; its columns are {', '.join(names)}")
        if len(matching) > 1 and matching != sorted(matching, key=natural):
            raise InputError(
                f"{file}: the columns that match {given!r} are not in the order of their names: "
                f"{', '.join(matching)}; name them one by one"
            )
        found += matching
    return found


def _partitions(file: File) -> list[tuple[str, str]]:
    """Return the partitions, and their values, that the folders of a pattern's file name."""
    below = file.path[len(file.root) :] if file.root else ""
    return [(unquote(key), unquote(value)) for key, value in PARTITION.findall(below)]


def _partition_type(value: str) -> Any:
    """Return the type that pyarrow infers; it infers none of a value that is null."""
    import pyarrow as pa

    if value == NULL_PARTITION:
        return pa.int32()
    whole = re.fullmatch(r"-?[0-9]+", value) and -(2**31) <= int(value) < 2**31
    return pa.int32() if whole else pa.string()


def _guess(role: str, schema: Sequence[Any], file: str) -> list[str]:
    """Choose the columns by their types, where nothing else is possible.

    Scores: the only column of lists of floats, or the only floats if they are numbered (``c0``,
    ``c1``, ...). Targets: the only integers. Sample weights: the only float. Of several, the one
    whose name says it, which for weights may be of integers.
    """
    told = {field.name: _Kind(field) for field in schema}
    lists = [name for name, kind in told.items() if kind.nested and kind.floats]
    plain = [name for name, kind in told.items() if not kind.nested]
    floats = [name for name in plain if told[name].floats]
    integers = [name for name in plain if told[name].integers]
    telling = [name for name in told if TELLING[role].fullmatch(name)]
    if role == "scores":
        exact = [name for name in lists if name in telling]
        found = exact if len(exact) == 1 else floats if not lists and _numbers(floats) else lists
        doubt = found is lists and (len(lists) != 1 or bool(floats))
    else:
        numbers = [*floats, *integers] if role != "targets" else []
        exact = [name for name in numbers if name in telling]
        found = exact if len(exact) == 1 else integers if role == "targets" else floats
        doubt = len(found) != 1
    others = [name for name in found if name not in telling]
    doubt |= bool(telling and others) or any(NOT_GUESSED.fullmatch(name) for name in others)
    doubt |= role == "targets" and any(NO_LABEL.fullmatch(name) for name in others)
    if not found or doubt:
        raise InputError(
            f"{file}: cannot tell which columns hold the {role}; name them, as in {file}#NAME, "
            f"{file}#NAME,NAME or '{file}#c*'; its columns are "
            f"{', '.join(f'{f.name} ({told[f.name].extension or f.type})' for f in schema)}"
        )
    return found


def _numbers(names: Sequence[str]) -> bool:
    """Whether columns are numbered one after another, as they stand in the file."""
    if len(names) < 2 or not numbered(names):
        return False
    ends = [re.search(r"(\d+)\D*$", name) for name in names]
    numbers = [int(end[1]) for end in ends if end]
    return numbers == list(range(numbers[0], numbers[0] + len(names))) if numbers else False
