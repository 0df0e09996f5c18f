"""Where files are: paths, URLs and patterns, their order, and whether they have changed."""

from __future__ import annotations

import glob
import hashlib
import os
import posixpath
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any
from uuid import uuid4

from mml_arrayapi.evaluation.errors import InputError, one_line, require
from mml_arrayapi.evaluation.names import natural

ZARR_MARKERS = ("zarr.json", ".zarray", ".zgroup")
CACHES = ("simplecache", "filecache", "blockcache")
# Of what fsspec tells; a web server may lead to another address each time.
VOLATILE = ("name", "ino", "nlink", "mode", "uid", "gid", "islink", "url")
VALIDATORS = {"ETag", "Content-MD5", "Digest", "Last-Modified"}  # of a web server's file
TABLES = {
    "_delta_log": "Delta",
    ".hoodie": "Hudi",
    "metadata/v[0-9]*.metadata.json": "Iceberg",
    "metadata/[0-9][0-9][0-9][0-9][0-9]-*.metadata.json": "Iceberg",
}
URL = re.compile(r"[A-Za-z0-9+.-]+(://|::)")
PART_OF = re.compile(r"(?:[0-9][-_. ]?|-)of[-_. ]?([0-9]+)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class File:
    """A file, or a folder that is one store, or a part of it.

    Attributes
    ----------
    filesystem
        fsspec's; None for the local one.
    path : str
        As the file system has it; local ones are absolute, since workers run in other folders.
    item : str
        Which of several arrays or columns is meant: what followed a ``#``.
    name : str
        As it was given, for messages.
    store : bool
        Whether it is a folder that holds a Zarr store.
    root : str
        The folder in which a pattern found it (hive partitions are named below), or nothing.
    archive : str
        What follows the first ``::`` of a chained URL, such as the archive that the file is in.
    pattern : str
        The pattern, or the folder, by which it was found, as it was given; or nothing.
    """

    filesystem: Any
    path: str
    item: str
    name: str
    store: bool = False
    root: str = ""
    archive: str = ""
    pattern: str = ""

    @property
    def where(self) -> str:
        """The absolute path or URL, with ``#item``."""
        fs = self.filesystem
        place = self.path if fs is None else fs.unstrip_protocol(self.path)
        place += f"::{self.archive}" if self.archive else ""
        return f"{place}#{self.item}" if self.item else place

    def identity(self, columns: tuple[str, ...]) -> tuple[Any, str]:
        """Return what names of the same have in common, and what of the file is meant.

        Links, and ways to write an item or an address, make no difference.
        """
        item = posixpath.normpath("/" + self.item.strip("/")).strip("/")
        item = str(columns) if columns else item
        if self.filesystem is not None:
            original = replace(self, item="")._original()
            if original.filesystem is None:
                return original.identity(())[0], item
            place = original.where.rstrip("/")
        elif self.store:
            place = os.path.realpath(self.path)
        else:
            status = os.stat(self.path)
            return (status.st_dev, status.st_ino), item
        if self.store:
            place, item = f"{place}/{item}".rstrip("/"), ""
        if web := re.search("https?://.*", place, re.DOTALL):  # perhaps at the end of a chain
            url = require("yarl", self.name).URL
            # str() leaves out the usual port and dots, human_repr() needless percent signs.
            place = place[: web.start()] + url(str(url(web[0]))).human_repr()
        return place, item

    def _original(self) -> File:
        """Return the file of which this is a copy in a cache of fsspec, or else this one."""
        if not _is_cache(self.filesystem):
            return self
        fs, rest = self.filesystem.inner.fs, _archive(self.archive.partition("::")[2])
        return replace(self, filesystem=None if _is_local(fs) else fs, archive=rest)._original()

    @property
    def plain_name(self) -> str:
        """The name without ``#item``."""
        return self.name.removesuffix(f"#{self.item}") if self.item else self.name

    def exists(self, below: str = "") -> bool:
        """Whether there is something at this path, or below it."""
        there = os.path.exists if self.filesystem is None else self.filesystem.exists
        return bool(there(self.path + below))

    def open(self) -> Any:
        """Open the file for reading bytes."""
        if self.filesystem is None:
            return open(self.path, "rb", buffering=0)
        return self.filesystem.open(self.path, "rb")

    def gives_parts(self, below: str = "") -> bool:
        """Whether its server gives out parts of the file, or of one below it, as not all do."""
        fs = self.filesystem
        if fs is None or "http" not in fs.protocol:
            return True
        return len(fs.cat_file(self.path + below, start=0, end=1)) == 1

    def size(self) -> int:
        """Return the number of bytes."""
        with self.open() as opened:  # a web server need not tell it
            return int(opened.seek(0, os.SEEK_END))

    def version(self, below: str = "") -> str:
        """Return what changes when the file does, or any file of the store (or below a part of it).

        Size and times of a local file; of a remote one all that its file system tells, such as an
        ETag.
        """
        path = f"{self.path}/{below}" if below else self.path
        if self.filesystem is not None:
            version = _remote_version(self.filesystem, path, self.store)
            # What is in an archive is listed once, and says nothing of the archive.
            return f"{version} {_version_of(self.archive)}" if self.archive else version
        if not os.path.isdir(path):
            return _local_version(path)
        told = hashlib.sha256()
        for folder, folders, names in _walk(path):
            folders.sort()
            for name in sorted(names):
                file = os.path.join(folder, name)
                told.update(os.fsencode(f"{os.path.relpath(file, path)} {_local_version(file)}\n"))
        return told.hexdigest()


def _version_of(url: str) -> str:
    file = _file(url, "", url)
    return file.version() if file.exists() else ""


def _local_version(path: str) -> str:
    # The time of the last change of name or owner too: copying with times kept doesn't fool it.
    status = os.stat(path)
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _remote_version(fs: Any, path: str, store: bool) -> str:
    fs.invalidate_cache()
    # Lists of web servers, if any, tell names only, and some may not be seen: there the store's own
    # description has to do.
    below = {}
    if store and "http" not in fs.protocol:
        with suppress(PermissionError):
            below = fs.find(path, detail=True)
    told = [below[name] for name in sorted(below)]
    if not told:
        markers = [f"{path}/{marker}" for marker in ZARR_MARKERS] if store else []
        told = [fs.info(one) for one in markers if fs.exists(one)] or [fs.info(path)]
    copied = getattr(fs, "inner", fs).storage_options.get("evaluation")
    if copied and not any(VALIDATORS & one.keys() for one in told):
        return f"{copied} {os.getpid()}"  # no other evaluation or process has this copy
    kept = [sorted((k, str(v)) for k, v in one.items() if k not in VOLATILE) for one in told]
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def find(given: str) -> list[File]:
    """Find what a path, a URL or a pattern stands for, in natural order (2 before 10).

    Parameters
    ----------
    given : str
        With ``#item`` or without. A folder that is no Zarr store is searched for Parquet files.

    Returns
    -------
    list of File

    Raises
    ------
    InputError
        There is none.
    """
    if not given:
        raise InputError("'': the path is empty; give that of a file")
    failures = []
    for path, item in _splits(given):
        try:
            found, why = _expand(_file(path, item, given))
            if found:
                fs = _seekable(found[0])
                return [replace(one, filesystem=fs) for one in found]
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  (no network, no permission, no such archive ...)
            failures.append(error)
    if failures:
        raise InputError(
            f"{given}: cannot be found ({one_line(failures[0])}); check the path, and your access "
            "to it"
        ) from failures[0]
    raise InputError(f"{given}: {why}; check the path")


def _splits(given: str) -> Iterator[tuple[str, str]]:
    """Yield the ways to read a name with a #, which names of files and of columns may have too."""
    if "#" not in given or not re.search("(?i)https?://", given):  # where it is never the file's
        yield given, ""
    elif given.endswith("#"):
        yield given[:-1], ""
    for sign in re.finditer("#(?=.)", given):
        yield given[: sign.start()], given[sign.end() :]


def _file(path: str, item: str, name: str) -> File:
    if os.path.lexists(path) or not URL.match(path):
        return File(None, os.path.abspath(path), item, name)
    core = require("fsspec.core", name)
    path = re.sub(r"(^|::)[\w+.-]+://", lambda scheme: scheme[0].lower(), path)  # as HTTP://
    try:
        # Else a cache of an earlier evaluation would be taken, whatever has changed since.
        caches = [one for one in path.split("::")[:-1] if one in CACHES]
        fs, inner = core.url_to_fs(path, **{one: {"skip_instance_cache": True} for one in caches})
    except (ImportError, ValueError) as error:  # no package for it; no such protocol
        raise InputError(f"{name}: {one_line(error)}") from error
    if _is_local(fs):
        return File(None, inner, item, name)
    fs.invalidate_cache()  # files may have come since this process listed them
    archive = _archive(path.partition("::")[2])
    return File(_safe_for_threads(fs), inner, item, name, archive=archive)


def _safe_for_threads(fs: Any) -> Any:
    from mml_arrayapi.evaluation.turns import OneAtATime

    # A cache says of itself what is true of the file system behind it.
    return fs if fs.async_impl and not _is_cache(fs) else OneAtATime(fs)


def _is_cache(fs: Any) -> bool:
    kinds = getattr(fs, "protocol", ())
    return bool({*CACHES} & {*([kinds] if isinstance(kinds, str) else kinds)})


def lies_in(path: str, folder: str) -> bool:
    """Whether a path is that of a folder, or below it; both are real paths, or URLs."""
    return path == folder or path.startswith((f"{folder}{os.sep}", f"{folder}/"))


def _is_local(fs: Any) -> bool:
    return getattr(fs, "protocol", "") in ("file", ("file", "local"))


def _archive(url: str) -> str:
    """Return what stands behind a URL's ``::`` in one form."""
    path = url.removeprefix("file://")
    return path if not path or URL.match(path) else os.path.realpath(path)


def _seekable(file: File) -> Any:
    """Return a file system that gives out parts of files, which not every web server does."""
    fs = file.filesystem
    if fs is None or "http" not in fs.protocol:
        return fs
    if file.store:
        markers = [f"{file.path}/{marker}" for marker in ZARR_MARKERS if file.exists(f"/{marker}")]
        if all(VALIDATORS & fs.info(marker).keys() for marker in markers):
            return fs
        raise InputError(
            f"{file.name}: its server tells neither ETag nor Last-Modified, so that nobody would "
            "notice a change during the evaluation; download the store first"
        )
    # What is not to be recognised after a change is copied too, before any of it is read. fsspec
    # seeks in no file whose length it isn't told, or that is said to come whole.
    told = fs.info(file.path)
    seekable = told.get("size") and told.get("partial", True)
    if seekable and VALIDATORS & told.keys() and file.gives_parts():
        return fs
    # Copies on this machine. No other evaluation, in workers neither, may take them for its own.
    copies = require("fsspec", file.name).filesystem(
        "simplecache", fs=fs, evaluation=uuid4().hex, skip_instance_cache=True
    )
    return _safe_for_threads(copies)


def _expand(file: File) -> tuple[list[File], str]:
    """Return what a name stands for, and where that is nothing, why."""
    fs, path = file.filesystem, file.path
    if _is_store(file):
        return [replace(file, store=True)], ""
    if file.exists():
        if not _is_folder(fs, path):
            return [file], ""
        if any(file.exists(f"/{marker}") for marker in ZARR_MARKERS):
            return [replace(file, store=True)], ""
        found = _glob(fs, f"{glob.escape(path)}/**") if fs is None else fs.find(path)
        found = [
            name
            for name in found
            if name.lower().endswith((".parquet", ".pq"))
            and (fs is not None or not os.path.isdir(name))
        ]
        # What begins with _ or . is a writer's own (Spark, Hive, Delta).
        found = [name for name in found if not re.search(r"/[._]", _below(name, path))]
        why, root = "the folder is no Zarr store and holds no .parquet files", path
    else:
        _refuse_silence(file)
        found, root = _glob(fs, path), _fixed(path)
        why = "no file matches it" if glob.has_magic(path) else "there is no such file"
    found.sort(key=lambda name: (natural(name), name))  # x-01 and x-1 are one number
    _refuse_mixtures(file, found, root)
    for one in found:
        if fs is None and not os.path.exists(one):
            return [], f"{one} is a link to what does not exist"
    made = []
    for one in found:
        part = replace(file, path=one, name=_shown(file, one), root=root, pattern=file.name)
        part = replace(part, store=_is_store(part))
        if part.store or fs is not None or not os.path.isdir(one):
            made.append(part)
            continue
        inner, why = _expand(part)  # a folder of that name, as Spark writes it
        if not inner:
            return [], f"in {part.name}, {why}"
        made += [replace(each, root=root, pattern=file.name) for each in inner]
    return made, why


def _refuse_mixtures(file: File, found: list[str], root: str) -> None:
    """Refuse files of several wholes, and of tables of which only the log tells what counts."""
    split = os.path.split if file.filesystem is None else posixpath.split
    wholes: dict[str, int] = {}  # by folder
    tables = set()
    for name in found:
        place, last = split(name)
        for whole in map(int, PART_OF.findall(last)[-1:]):
            if wholes.setdefault(place, whole) != whole:
                raise InputError(
                    f"{file.name}: stands for parts of {wholes[place]} and parts of {whole} "
                    "files, by their names; give a pattern for those of one data set"
                )
        if last.lower().endswith((".parquet", ".pq")):
            tables |= {*_folders(place, root, split)}
    for place, (log, kind) in product(sorted(tables), TABLES.items()):
        with suppress(OSError):  # it may not be allowed to look there
            if _glob(file.filesystem, f"{glob.escape(place)}/{log}"):
                raise InputError(
                    f"{file.name}: holds files of a table of {kind}, {place}, whose log tells "
                    "which of them still count; write its rows to a folder of their own"
                )


def _folders(place: str, root: str, split: Callable[[str], tuple[str, str]]) -> Iterator[str]:
    """Yield the folders that may hold a table's log: up to the one that was searched, at least.

    No partition holds one, and the folder ``data`` may lie beside it.
    """
    while True:
        above, name = split(place)
        if "=" not in name:
            yield place
            if name == "data":
                yield above
            if len(place) <= len(root) or above == place:  # at the top
                return
        place = above


def _is_folder(fs: Any, path: str) -> bool:
    if fs is None:
        return os.path.isdir(path)
    with suppress(PermissionError):  # who may read an object need not be allowed to list others
        return bool(fs.isdir(path))
    return bool(fs.info(path)["type"] == "directory")


def _refuse_silence(file: File) -> None:
    """Tell a web server that doesn't answer from one that has no such file."""
    if file.filesystem is None or "http" not in file.filesystem.protocol:
        return
    try:
        file.filesystem.cat_file(file.path, start=0, end=1)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(
            f"{file.name}: the server does not answer ({one_line(error)}); check the address"
        ) from error


def _is_store(file: File) -> bool:
    # Looking costs requests: not where the name says that it is a file.
    if file.filesystem is not None and not re.search(r"(\.zarr|/[^./]*)/?$", file.path):
        return False
    return any(file.exists(f"/{marker}") for marker in ZARR_MARKERS)


def _glob(fs: Any, pattern: str) -> list[str]:
    if fs is None:
        _try(pattern)
        return glob.glob(pattern, recursive=True)
    found = fs.glob(pattern)
    if re.search(r"(^|/)\.", pattern):
        return list(found)
    # As on this machine, a * stands for no dot at the beginning.
    root = _fixed(pattern)
    return [name for name in found if "/." not in _below(name, root)]


def _try(pattern: str) -> None:
    """Raise the OSError of what may not be looked at: glob would pass over it."""
    if not glob.has_magic(pattern):
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(pattern)
    parts = pattern.split(os.sep)
    for k, part in enumerate(parts):
        if not glob.has_magic(os.sep.join(parts[: k + 1])):
            continue
        for place in glob.glob(os.sep.join(parts[:k]) + os.sep, recursive=True):
            if part != "**":
                look = os.listdir if glob.has_magic(part) else os.stat
                look(os.path.join(place, os.curdir))
                continue
            for _, folders, _ in _walk(place):
                folders[:] = [name for name in folders if not name.startswith(".")]


def _walk(top: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk through folders as os.walk() does, through links too; raise what stands in the way.

    A link that leads back to a folder that it is in would be followed without end.
    """
    above: dict[str, tuple[tuple[int, int], ...]] = {}  # of each folder, it and those it is in
    for folder, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        status = os.stat(os.path.join(folder, os.curdir))
        this = status.st_dev, status.st_ino
        others = above.get(os.path.dirname(folder), ())
        if this in others:
            raise InputError(
                f"{folder}: is a link back to a folder that it is in; remove it, or give what is "
                "in the folders one by one"
            )
        above[folder.rstrip(os.sep)] = *others, this
        yield folder, folders, names


def _raise(error: OSError) -> None:
    raise error


def _fixed(pattern: str) -> str:
    """Return the folder in which a pattern begins to stand for names."""
    return re.split(r"[*?\[]", pattern)[0].rpartition("/")[0]


def _below(name: str, folder: str) -> str:
    """Return what of a name stands below a folder, from the slash on."""
    return "/" + name[len(folder) :].lstrip("/")


def _shown(file: File, path: str) -> str:
    """Return a found file's name in the form in which the pattern was given."""
    name = path if file.filesystem is None else file.filesystem.unstrip_protocol(path)
    name += f"::{file.archive}" if file.archive else ""
    given = file.name.partition("#")[0]
    if file.filesystem is None and "://" not in given and not os.path.isabs(given):
        name = os.path.relpath(path)
    return f"{name}#{file.item}" if file.item else name
