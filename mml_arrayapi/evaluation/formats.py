"""The table of formats: how each becomes an array of which rows are read.

An opener takes a :class:`File`, what it is read for (``"scores"``, ``"targets"``, ``"sample
weights"`` or ``"class weights"``) and the :class:`Rules`, and returns an object with ``shape``,
``dtype``, ``chunks`` (the sizes of what is stored together, as Dask or as Zarr writes them, or
None) and ``__getitem__`` for a tuple of slices. Other packages add formats by entry points in the
group ``mml_arrayapi.formats``; the name of each is the suffix without its dot.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import re
import struct
import zipfile
from base64 import b64decode
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from mml_arrayapi.evaluation.errors import InputError, require
from mml_arrayapi.evaluation.files import URL, File

Array = Any

ENTRY_POINTS = "mml_arrayapi.formats"
SCORES, TARGETS, WEIGHTS = "scores", "targets", "sample weights"
CLASS_WEIGHTS = "class weights"


class Rules(NamedTuple):
    """How values that are no plain data are taken.

    Attributes
    ----------
    ignore_index : int or None
        The label of samples that are left out.
    unwritten : {"error", "fill"} or None
        What a chunk that was never written is; None: an error, except in scores.
    """

    ignore_index: int | None = None
    unwritten: str | None = None

    def refuse_unwritten(self, role: str) -> bool:
        """Whether a chunk that was never written is an error."""
        return self.unwritten == "error" or (self.unwritten is None and role != SCORES)


def open_array(file: File, role: str, rules: Rules) -> Array:
    """Open a file of any format.

    Parameters
    ----------
    file : File
        Where it is, and which of its arrays is meant.
    role : str
        What it is read for.
    rules : Rules
        How values that are no plain data are taken.

    Returns
    -------
    array
        An object with ``shape``, ``dtype``, ``chunks`` and ``__getitem__``.

    Raises
    ------
    InputError
        The format is not known, or the array cannot be told.
    """
    name = file.path
    if file.filesystem is not None:  # what is no name: a query of the web, a version of S3
        name = name.partition("?" if URL.match(name) else "?versionId=")[0]
    suffix = PurePosixPath(name).suffix.lower()
    plugins = _plugins()
    if file.store or suffix == ".zip":
        return _open_zarr(file, role, rules)
    if suffix in plugins:
        return plugins[suffix].load()(file, role, rules)
    if suffix not in FORMATS:
        known = ", ".join((*FORMATS, *plugins))
        raise InputError(
            f"{file.plain_name}: the format is not known; accepted are {known} files and Zarr "
            "stores (folders, and .zarr.zip)"
        )
    if file.filesystem is None and not os.path.isfile(file.path):
        raise InputError(f"{file.plain_name}: is no regular file, but a pipe or a device; copy it")
    if not file.size():
        raise InputError(f"{file.plain_name}: the file is empty; write or copy it again")
    return FORMATS[suffix](file, role, rules)


@cache
def _plugins() -> dict[str, EntryPoint]:
    """Return other packages' formats by suffix; to look for them takes ten milliseconds."""
    return {f".{found.name.lstrip('.')}": found for found in entry_points(group=ENTRY_POINTS)}


def adopt(array: Array, role: str, rules: Rules) -> Array:
    """Read an array that is open already: those of Zarr and HDF5 as their files are read."""
    library = type(array).__module__.partition(".")[0]
    file = File(None, role, "", role)
    if library == "zarr":
        return _zarr_array(file, array, role, rules)
    if library == "h5py":
        if not hasattr(array, "is_virtual"):
            raise TypeError(
                f"{role} must be a dataset of h5py itself, but are of type {type(array).__name__}; "
                "give its values, as in array[...]"
            )
        _check_written(file, array, role, rules)
        return _Attributed(file, role, array, rules, None)
    return array


def choose_item(file: File, role: str, items: Sequence[str]) -> str:
    """Return the array that is meant: the one that is named, or the only one."""
    chosen = items[0] if len(items) == 1 and not file.item else file.item
    if items.count(chosen) == 1:
        return chosen
    plain = file.plain_name
    if items.count(chosen) > 1:
        raise InputError(
            f"{plain}: holds {items.count(chosen)} arrays named {chosen!r}; rename one"
        )
    missing = f"has no array {file.item!r}" if file.item else f"holds {len(items)} arrays"
    raise InputError(
        f"{plain}: {missing}; name the one with the {role}, as in {plain}#NAME, where NAME is one "
        f"of {', '.join(items) or 'none'}"
    )


# Arrays whose bytes lie in a row.


class RawArray:
    """An array whose bytes lie in a row in a file, from ``offset`` on.

    They are read, not mapped: reading a mapped file that another process has made shorter kills
    this one (SIGBUS), and reading takes no longer.
    """

    chunks = None
    item = ""

    def __init__(
        self, file: File, offset: int, shape: Sequence[int], dtype: Any, *, fortran: bool = False
    ) -> None:
        import numpy as np

        self._file, self._offset, self._fortran = file, offset, fortran
        self.shape = tuple(shape)
        self._bfloat16 = dtype == "bfloat16"
        self._stored = np.dtype("<u2" if self._bfloat16 else dtype)
        self.dtype = np.dtype(np.float32) if self._bfloat16 else self._stored
        self.end = offset + math.prod(self.shape) * self._stored.itemsize

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        import numpy as np

        axis, (start, stop, _) = len(where) - 1, where[-1].indices(self.shape[len(where) - 1])
        shape = self.shape
        if self._fortran:
            shape, axis = shape[::-1], len(shape) - 1 - axis
        runs, inner = math.prod(shape[:axis]), math.prod(shape[axis + 1 :])
        made = np.empty((*shape[:axis], stop - start, *shape[axis + 1 :]), self._stored)
        rows = made.reshape(runs, -1).view(np.uint8) if made.size else made[:0]
        step = self._stored.itemsize * inner
        with self._file.open() as opened:
            for run, row in enumerate(rows):
                opened.seek(self._offset + (run * shape[axis] + start) * step)
                _fill(opened, memoryview(row))
        if self._bfloat16:
            made = (made.astype(np.uint32) << 16).view(np.float32)
        return made.T if self._fortran else made


def _fill(opened: Any, buffer: memoryview) -> None:
    while buffer:
        count = opened.readinto(buffer)
        if not count:
            raise EOFError("the file has become shorter")
        buffer = buffer[count:]


def _npy_header(opened: Any) -> tuple[tuple[int, ...], bool, Any]:
    from numpy.lib import format as npy

    version = npy.read_magic(opened)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is not known")
    # That of 3.0 has names of fields in UTF-8, but whatever has fields is refused.
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(opened)
    _check_sizes(shape)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, not numbers")
    return shape, fortran, dtype


def _check_sizes(sizes: Sequence[Any]) -> None:
    if not all(type(n) is int and n >= 0 for n in sizes):
        raise ValueError(f"its header has {list(sizes)} where sizes must be")


def _open_npy(file: File, role: str, rules: Rules) -> Array:  # noqa: ARG001
    if file.item:
        choose_item(file, role, [])
    with file.open() as opened:
        shape, fortran, dtype = _npy_header(opened)
        made = RawArray(file, opened.tell(), shape, dtype, fortran=fortran)
    _check_end(file, made.end, f"its array of shape {shape} and dtype {dtype}")
    return made


def _check_end(file: File, end: int, what: str) -> None:
    size = file.size()
    if size < end:
        raise ValueError(f"{what} takes {end:,} bytes, but the file has only {size:,}")
    if size > end:
        raise InputError(
            f"{file.plain_name}: {size - end:,} bytes follow {what}, which would be left out "
            "(several arrays saved into one file?); save each array in a file of its own"
        )


class _NpzMember:
    """One array of an archive: it is read whole, so that its checksum is verified."""

    def __init__(self, file: File, role: str, rules: Rules) -> None:  # noqa: ARG002
        self._file = file
        with file.open() as opened, zipfile.ZipFile(opened) as archive:
            items = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
            self.item = choose_item(file, role, items)
            self._member = f"{self.item}.npy"
            with archive.open(self._member) as member:
                self.shape, _, self.dtype = _npy_header(member)
        self.chunks = tuple((n,) for n in self.shape)

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        from numpy.lib import format as npy

        with self._file.open() as opened, zipfile.ZipFile(opened) as archive:  # noqa: SIM117
            with archive.open(self._member) as member:
                whole = npy.read_array(member, allow_pickle=False)
                if member.read(1):  # the checksum is compared at the end
                    raise InputError(
                        f"{self._file.plain_name}: bytes follow the array; save it again"
                    )
        return whole[where]


_SAFETENSORS = {
    **{f"F{8 * n}": f"<f{n}" for n in (2, 4, 8)},
    **{f"I{8 * n}": f"<i{n}" for n in (1, 2, 4, 8)},
    **{f"U{8 * n}": f"<u{n}" for n in (1, 2, 4, 8)},
    "BF16": "bfloat16",
}


def _open_safetensors(file: File, role: str, rules: Rules) -> Array:  # noqa: ARG001
    # The library maps files, local ones only (see RawArray); the format is a length, a header in
    # JSON, then the arrays' bytes.
    with file.open() as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > file.size() - 8:
            raise ValueError("its header is longer than the file")
        header = _safetensors_header(opened.read(length))
    start, end = 8 + length, 0
    for places in sorted(told["data_offsets"] for told in header.values()):
        if places != [end, max([end, *places])]:
            raise ValueError(f"the bytes {places} of an array do not follow those before, to {end}")
        end = places[1]
    _check_end(file, start + end, "it")
    item = choose_item(file, role, list(header))
    told = header[item]
    if told["dtype"] not in _SAFETENSORS:
        raise InputError(f"{file.name}: has dtype {told['dtype']}, which is not read; convert it")
    first, end = told["data_offsets"]
    made = RawArray(file, start + first, told["shape"], _SAFETENSORS[told["dtype"]])
    if made.end != start + end:
        raise ValueError("its shape does not fit the bytes that it has")
    made.item = item
    return made


def _safetensors_header(text: bytes) -> dict[str, Any]:
    """Return what a header tells of each array."""
    header = json.loads(text)
    told = header if isinstance(header, dict) else {"": header}
    told.pop("__metadata__", None)
    kinds = {"dtype": str, "shape": list, "data_offsets": list}
    for one in told.values():
        if not isinstance(one, dict) or not all(isinstance(one.get(k), kinds[k]) for k in kinds):
            raise ValueError(f"its header is damaged: {one} describes no array")
        _check_sizes(one["shape"])
        _check_sizes(one["data_offsets"])
    return told


# Arrays in chunks, with attributes.


class _Attributed:
    """An array with attributes of the CF conventions, as netCDF and xarray write them: decoded.

    What is packed becomes float64, so that scores differ wherever the stored numbers do.
    """

    def __init__(self, file: File, role: str, source: Array, rules: Rules, fill: Any) -> None:
        import numpy as np

        self._name, self._source, self.shape = file.name, source, tuple(source.shape)
        self.chunks, self._role = source.chunks, role
        self.item = str(getattr(source, "name", None) or "").strip("/")
        self.address = getattr(source, "address", "")
        stored = np.dtype(source.dtype)
        real = stored.kind in "iuf"  # no other type is accepted, which is told later
        attributes = {key: source.attrs[key] for key in _CF if real and key in source.attrs}
        self._scale = _coefficient(file, "scale_factor", attributes.get("scale_factor", 1))
        self._offset = _coefficient(file, "add_offset", attributes.get("add_offset", 0))
        self._packed = self._scale != 1 or self._offset != 0
        meant = [str(source.attrs.get(key, "")) for key in ("units", "dtype")]
        if any(map(_NO_NUMBERS.search, meant)) and (role == TARGETS or _SINCE.search(meant[0])):
            told = " ".join(filter(None, meant))
            kind = "booleans" if meant[1] == "bool" else "times"
            raise InputError(f"{file.name}: holds {kind} ({told}), which are no {role}")
        if "_Unsigned" in attributes or (self._packed and role == TARGETS):
            told = ", ".join(f"{key} {value}" for key, value in attributes.items())
            raise InputError(f"{file.name}: has the attributes {told}; decode it first")
        fills = {key: value for key, value in attributes.items() if key in _CF[:2]}
        # In Zarr's version 2 xarray has no other place for _FillValue, but Zarr writes 0 unasked.
        if real and fill is not None and (self._packed or "_ARRAY_DIMENSIONS" in source.attrs):
            fills["fill_value"] = fill
        values = [_fill_values(file, key, given, stored) for key, given in fills.items()]
        missing = np.concatenate([np.empty(0, stored), *values])
        if role == TARGETS and real:
            missing = missing[missing != rules.ignore_index]
        self._in_doubt = fills.pop("fill_value", 1) == 0 and 0 in missing
        self._missing = missing
        self.dtype = np.dtype(np.float64) if self._packed else stored

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        import numpy as np

        part = np.asarray(self._source[where])
        missing = np.isin(part, self._missing) if self._missing.size else np.False_
        if missing.any():
            self._refuse_missing(part, missing)
        if self._packed:
            part = part.astype(self.dtype) * self._scale + self._offset
        return np.where(missing, self.dtype.type("nan"), part) if missing.any() else part

    def _refuse_missing(self, part: Array, missing: Array) -> None:
        zeros = int((part == 0).sum())
        if self._in_doubt and zeros:
            raise InputError(
                f"{self._name}: {zeros} {self._role} are 0, which is also the fill_value of this "
                "array of Zarr's version 2, so that xarray takes them for missing; if they are "
                "not, set fill_value to null in its .zarray"
            )
        if self._role != SCORES:
            raise InputError(
                f"{self._name}: {int(missing.sum())} {self._role} are missing (their value is that "
                f"of _FillValue or missing_value, {part[missing].flat[0]}); fill them in (labels "
                "may be left out by --ignore-index)"
            )


_SINCE = re.compile(r"\bsince\b")
# Of labels: what times, their differences and booleans are written with, though stored as integers.
_NO_NUMBERS = re.compile(
    r"\bsince\b|^(days|hours|minutes|(milli|micro|nano)?seconds|(datetime|timedelta)64.*|bool)$"
)
_CF = ("_FillValue", "missing_value", "scale_factor", "add_offset", "_Unsigned")


def _coefficient(file: File, key: str, given: Any) -> float:
    import numpy as np

    with suppress(TypeError, ValueError):
        value = float(np.squeeze(given))
        if math.isfinite(value) and (value or key != "scale_factor"):
            return value
    raise InputError(
        f"{file.name}: has {key} {given}; it must be one finite number, and scale_factor not 0"
    )


def _fill_values(file: File, key: str, given: Any, dtype: Any) -> Array:
    """Return the values of an attribute in the type in which they are stored in the array."""
    import numpy as np

    values = given
    with suppress(TypeError, ValueError, OverflowError, struct.error):
        if isinstance(given, str):  # xarray's floats in Zarr's version 3, or Zarr's own
            spelled = given in ("NaN", "Infinity", "-Infinity")
            values = given if spelled else struct.unpack("<d", b64decode(given, validate=True))
        values = np.ravel(np.asarray(values, float if isinstance(given, str) else None))
        with np.errstate(all="ignore"):
            cast = values.astype(dtype)
        rounding = 0 if dtype.kind in "iu" else 1e-3
        if np.allclose(cast.astype(float), values.astype(float), rounding, 0, equal_nan=True):
            return cast[cast == cast]
    raise InputError(
        f"{file.name}: has {key} {given}, which is no value of its dtype {dtype}; correct it"
    )


def _open_zarr(file: File, role: str, rules: Rules) -> Array:
    zarr = require("zarr", file.name)
    storage = zarr.storage
    archive = file.path.lower().endswith(".zip")
    names = _names_in(file) if archive else []
    top = _top_folder(names)
    if file.filesystem is None and not archive:
        store: Any = file.path
    elif file.filesystem is None and not top:
        store = storage.ZipStore(file.path, mode="r", read_only=True)
    else:
        fs, path = file.filesystem, file.path
        if archive:
            fs, path = require("fsspec", file.name).filesystem("zip", fo=file.open()), top
        store = storage.FsspecStore.from_mapper(fs.get_mapper(path), read_only=True)
    opened = zarr.open(store, mode="r")
    if not hasattr(opened, "dtype"):
        path, group = file.item.strip("/"), opened
        opened = _array_at(zarr, store, path) if path else None
        if opened is None:
            path = choose_item(file, role, _arrays_in(zarr, store, group))
            opened = zarr.open_array(store, path=path, mode="r")  # not as consolidated once
    elif file.item:
        choose_item(file, role, [])
    if file.store and opened.shards and not file.gives_parts(f"/{opened.path}/zarr.json"):
        raise InputError(
            f"{file.name}: its server gives out no parts of files, which a sharded store needs; "
            "download the store first"
        )
    if opened.metadata.zarr_format == 3:  # which Zarr takes, whatever is newer
        other = posixpath.join(opened.path, ".zarray")
        if posixpath.join(top, other) in names if archive else file.exists(f"/{other}"):
            raise InputError(
                f"{file.name}: the array is described twice, by zarr.json (version 3) and .zarray "
                "(version 2) in one folder; delete the one that is out of date"
            )
    return _zarr_array(file, opened, role, rules)


def _names_in(file: File) -> list[str]:
    with file.open() as opened, zipfile.ZipFile(opened) as archive:
        return archive.namelist()


def _top_folder(names: list[str]) -> str:
    """Return the folder of an archive that its store is in, if it was zipped with it."""
    top = names[0].partition("/")[0] if names else ""
    whole = all(name.startswith(f"{top}/") for name in names)
    told = any(f"{top}/{name}" in names for name in ("zarr.json", ".zarray", ".zgroup"))
    return top if whole and told else ""


def _array_at(zarr: Any, store: Any, path: str) -> Array | None:
    try:
        return zarr.open_array(store, path=path, mode="r")
    except (FileNotFoundError, KeyError, ValueError):  # nothing is there, or a group
        return None


def _arrays_in(zarr: Any, store: Any, opened: Array) -> list[str]:
    """List a group's arrays: those that are there, and those that it tells of.

    What was consolidated once need not be what is there; but web servers list nothing.
    """
    groups = [opened]
    if opened.metadata.consolidated_metadata is not None:
        with suppress(Exception):
            groups.append(zarr.open_group(store, mode="r", use_consolidated=False))
    found = {p for g in groups for p, one in g.members(max_depth=None) if hasattr(one, "dtype")}
    return sorted(found)


def _zarr_array(file: File, opened: Array, role: str, rules: Rules) -> Array:
    import numpy as np

    fill = opened.fill_value if opened.metadata.zarr_format == 2 else None
    source = opened
    if rules.refuse_unwritten(role) and np.dtype(opened.dtype).kind in "iuf":
        source = _WrittenZarr(file.name, role, opened)
    return _Attributed(file, role, source, rules, fill)


def _unwritten(name: str, role: str, what: str) -> InputError:
    return InputError(
        f"{name}: {what} were never written, and would be read as {role} of the store's fill "
        "value; write them, or accept it by --unwritten-chunks fill"
    )


class _WrittenZarr:
    """A Zarr array whose chunks must have been written, those inside a shard too.

    Zarr reads what isn't there as the fill value. Here that is an unlikely number; where it is
    found, another one tells whether it was stored or filled in.
    """

    def __init__(self, name: str, role: str, source: Array) -> None:
        import numpy as np
        import zarr

        self._name, self._role, self.name = name, role, source.name
        self.shape, self.chunks, self.attrs = source.shape, source.chunks, source.attrs
        self.dtype = np.dtype(source.dtype)
        limits = np.iinfo if self.dtype.kind in "iu" else np.finfo
        top = limits(self.dtype).max
        self._filled = [
            zarr.Array(
                zarr.AsyncArray(
                    metadata=replace(source.metadata, fill_value=self.dtype.type(value)),
                    store_path=source.store_path,
                )
            )
            for value in (top, top // 2)
        ]

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        part = self._filled[0][where]
        if (part == self._filled[0].fill_value).any():
            count = int((part != self._filled[1][where]).sum())
            if count:
                raise _unwritten(self._name, self._role, f"{count:,} values")
        return part


class _Hdf5Dataset:
    """A dataset whose file is opened for each read: what is open is not read anew if it changes."""

    def __init__(self, file: File, item: str, source: Array) -> None:
        self._file, self._item = file, item
        self.name = f"/{item}"
        # The same, whatever links lead to it.
        self.address = require("h5py.h5o", file.name).get_info(source.id).addr
        self.shape, self.dtype, self.chunks = source.shape, source.dtype, source.chunks
        self.attrs = dict(source.attrs)

    def __getitem__(self, where: tuple[slice, ...]) -> Array:
        with _hdf5_file(self._file) as opened:
            return opened[self._item][where]


@contextmanager
def _hdf5_file(file: File) -> Iterator[Any]:
    h5py = require("h5py", file.name)
    with ExitStack() as stack:
        place = file.path if file.filesystem is None else stack.enter_context(file.open())
        try:
            opened = h5py.File(place, "r")
        except OSError as error:
            with file.open() as start:
                if start.read(3) != b"CDF":
                    raise
            message = f"{file.name}: is of NetCDF 3, which is not HDF5; convert it to 4"
            raise InputError(message) from error
        yield stack.enter_context(opened)


def _open_hdf5(file: File, role: str, rules: Rules) -> Array:
    found: list[str] = []
    with _hdf5_file(file) as opened:
        opened.visititems(lambda name, one: found.append(name) if hasattr(one, "shape") else None)
        item = file.item.strip("/")
        if not hasattr(item and opened.get(item), "shape"):  # links are not visited
            item = choose_item(replace(file, item=item), role, found)
        if opened[item].file.filename != opened.filename:
            raise _elsewhere(file)
        _check_written(file, opened[item], role, rules)
        return _Attributed(file, role, _Hdf5Dataset(file, item, opened[item]), rules, None)


def _elsewhere(file: File) -> InputError:
    return InputError(
        f"{file.name}: its values are in other files, and would be read as the fill value where "
        "these are missing; give these, or copy it into a file of its own"
    )


def _check_written(file: File, source: Array, role: str, rules: Rules) -> None:
    if source.shape is None:
        raise InputError(f"{file.name}: has no shape (it is empty); name another array")
    if source.is_virtual or source.external:
        raise _elsewhere(file)
    if not rules.refuse_unwritten(role) or not source.size:
        return
    chunks = [math.ceil(n / c) for n, c in zip(source.shape, source.chunks or (), strict=False)]
    wanted = math.prod(chunks) if source.chunks else 1
    got = source.id.get_num_chunks() if source.chunks else bool(source.id.get_storage_size())
    if got < wanted:
        raise _unwritten(file.name, role, f"{wanted - got:,} of its {wanted:,} chunks")


def _open_parquet(file: File, role: str, rules: Rules) -> Array:  # noqa: ARG001
    from mml_arrayapi.evaluation.parquet import ParquetColumns

    return ParquetColumns(file, role)


FORMATS: dict[str, Callable[[File, str, Rules], Array]] = {
    ".npy": _open_npy,
    ".npz": _NpzMember,
    ".parquet": _open_parquet,
    ".pq": _open_parquet,
    ".h5": _open_hdf5,
    ".hdf5": _open_hdf5,
    ".nc": _open_hdf5,
    ".safetensors": _open_safetensors,
}
