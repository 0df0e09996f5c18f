"""The journal of an evaluation: finished batches on disk, so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from glob import escape
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG
from typing import Any
from zlib import crc32

from mml_arrayapi.evaluation.errors import InputError, advice, one_line, require
from mml_arrayapi.evaluation.metrics import MetricState

try:
    from fcntl import LOCK_EX, LOCK_NB, flock
except ImportError:  # pragma: no cover
    flock = None  # type: ignore[assignment]  # Windows has no such locks

NAME = "journal.jsonl"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "oss"}
TORN = re.compile(rb"[0-9a-f]{0,8}|[0-9a-f]{8} ([{].*)?", re.DOTALL)  # the beginning of a line


class Journal:
    """An append-only file: a line that says what is evaluated, then one line per finished batch.

    Each line begins with the checksum of the rest. A torn last line, as a killed run leaves it, is
    dropped; any other damage is an error, and the file stays as it is. One run at a time may have
    it open. On a remote file system, where nothing can be appended, each line is a file of its own;
    there runs may write at once, if all write the same: each batch says what it is a batch of.

    Parameters
    ----------
    folder : str
        A folder, or the URL of one.
    about : dict
        What is evaluated, as plain JSON. A journal about something else is refused.
    n_batches : int
        How many batches there are.

    Attributes
    ----------
    finished : dict of int to MetricState
        The batches that the journal holds already, by number.
    """

    def __init__(self, folder: str, about: dict[str, Any], n_batches: int) -> None:
        path = local_path(folder)
        self._lines = _Remote(folder) if path is None else _Local(path)
        self.finished: dict[int, MetricState] = {}
        self._of = sha256(json.dumps(about).encode()).hexdigest()[:16]
        try:
            records = list(self._lines.read())
            if not records:
                self._append(0, about)
                records = [*self._lines.read()][:1]  # another run may have begun just now
            _compare(self._lines.path, records[0], json.loads(json.dumps(about)))
            self.finished.update(self._batches(records[1:], n_batches))
        except BaseException:
            self.close()
            raise

    def _batches(self, records: list[Any], n: int) -> Iterator[tuple[int, MetricState]]:
        for number, record in enumerate(records, start=2):
            try:
                batch, state = range(n)[record["batch"]], MetricState.from_state(record["state"])
                of = record["of"]
            except (ArithmeticError, LookupError, TypeError, ValueError):
                raise _damaged(self._lines.path, f"record {number}") from None
            if of != self._of:
                raise InputError(
                    f"{self._lines.path}: record {number} is of another evaluation, begun here at "
                    "the same time; give each a folder of its own"
                )
            if batch != record["batch"]:
                raise _damaged(self._lines.path, f"record {number}")
            yield batch, state

    def add(self, batch: int, state: MetricState) -> None:
        """Write down a finished batch; it is on disk when this returns."""
        self._append(batch + 1, {"of": self._of, "batch": batch, "state": state.state()})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def _append(self, number: int, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        try:
            self._lines.append(number, b"%08x %s\n" % (crc32(text), text))
        except Exception as error:
            raise cannot_write(self._lines.path, error) from error


def local_path(folder: str) -> Path | None:
    """Return the journal of a folder on this machine; None of one elsewhere."""
    folder = folder.removeprefix("file://")
    return None if "://" in folder else Path(folder) / NAME


class _Local:
    def __init__(self, path: Path) -> None:
        self.path = str(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        if not S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self.close()
            raise InputError(f"{self.path}: is no file; give another folder")
        try:
            if flock is not None:
                flock(self._file, LOCK_EX | LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise InputError(
                f"{self.path}: is in use by another evaluation; wait for it, or give another folder"
            ) from error
        except OSError as error:
            self.close()
            raise InputError(
                f"{self.path}: cannot be locked {advice(error, 'give a folder on another disk')}"
            ) from error

    def read(self) -> Iterator[dict[str, Any]]:
        try:
            self._file.seek(0)
            lines = self._file.read().splitlines(keepends=True)
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be read {advice(error, 'give another folder')}"
            ) from error
        length = 0
        for number, line in enumerate(lines, start=1):
            record = _record(line)
            if record is None and (number < len(lines) or not TORN.fullmatch(line)):
                raise _damaged(self.path, f"line {number}")
            if record is not None:
                length += len(line)
                yield record
        self._file.truncate(length)

    def append(self, number: int, line: bytes) -> None:  # noqa: ARG002
        while line:
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Remote:
    def __init__(self, folder: str) -> None:
        self.path = folder.rstrip("/")
        try:
            self._fs, self._folder = require("fsspec.core", folder).url_to_fs(self.path)
            self._fs.invalidate_cache()
            # Stores of objects have no folders: they would make a bucket of a misspelt name.
            if self._fs.unstrip_protocol("").partition(":")[0] not in OBJECT_STORES:
                self._fs.makedirs(self._folder, exist_ok=True)
        except InputError:
            raise
        except Exception as error:  # of a network: each file system has its own
            raise cannot_write(folder, error) from error

    def read(self) -> Iterator[dict[str, Any]]:
        try:
            names = sorted(self._fs.glob(f"{escape(self._folder)}/journal-*.json"))
            lines = {name: self._fs.cat_file(name) for name in names}
        except Exception as error:
            raise InputError(
                f"{self.path}: cannot be read ({one_line(error)}); check the path, and your access "
                "to it"
            ) from error
        for name, line in lines.items():
            record = _record(line)
            if record is not None:
                yield record
            elif name == names[0] and len(names) > 1:
                raise _damaged(self.path, os.path.basename(name))
            elif line.endswith(b"\n") or not TORN.fullmatch(line):  # else its batch is done again
                url = self._fs.unstrip_protocol(name)
                raise InputError(f"{url}: is damaged; remove this file, and run again")

    def append(self, number: int, line: bytes) -> None:
        # Fifteen digits: the names sort as the numbers do.
        self._fs.pipe_file(f"{self._folder}/journal-{number:015}.json", line)

    def close(self) -> None:
        pass


def _record(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, or None if it is not whole."""
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % crc32(text):
        return None
    record: dict[str, Any] = json.loads(text)
    return record


def _damaged(path: str, what: str) -> InputError:
    return InputError(f"{path}: {what} is damaged; remove the journal, and evaluate from the start")


def _compare(path: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    if not isinstance(old, dict) or "version" not in old:
        raise _damaged(path, "the first line")
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key == "inputs":
            before = old.get(key) or []
            now, then = _others(value, before), _others(before, value)
            told = f"now: {now}" if now else f"then also: {then}"
            if not now and not then:
                told = "now: in another order"
            raise InputError(
                f"{path}: was begun with other inputs ({told}); give the same files, unchanged, or "
                "another folder"
            )
        raise InputError(
            f"{path}: was begun with {key} {old.get(key)}, but this run has {value}; use the same, "
            "or another folder"
        )


def _others(some: list[Any], known: list[Any]) -> str:
    """Name the first of some inputs that are not among others."""
    return ", ".join([f"{one[1]} as {one[0]}" for one in some if one not in known][:3])


def check_writable(path: str) -> None:
    """Raise before any work if a file cannot be written afterwards.

    Parameters
    ----------
    path : str
        Where to.

    Raises
    ------
    InputError
        It cannot be written.
    """
    try:
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError("you may not write to it")
        if os.path.isdir(path):
            raise IsADirectoryError("it is a folder")
        if _is_plain(path):
            part = _part(os.path.realpath(path))
            os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o666))
            os.unlink(part)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_whole(path: str, text: str) -> None:
    """Write a file so that it is either there as a whole or not at all.

    A symbolic link stays one; the permissions are those of the file that was there, or as the
    process's umask has them.

    Parameters
    ----------
    path : str
        Where to.
    text : str
        What.

    Raises
    ------
    InputError
        It cannot be written.
    """
    is_plain = _is_plain(path)
    path = os.path.realpath(path) if is_plain else path
    part = _part(path) if is_plain else path
    try:
        # What was printed to the same place stays.
        with open(part, "w" if is_plain else "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if part != path:
                os.fsync(file.fileno())
        if part != path:
            if os.path.exists(path):
                os.chmod(part, os.stat(path).st_mode)
            os.replace(part, path)
    except BaseException as error:
        if part != path:
            Path(part).unlink(missing_ok=True)
        if isinstance(error, Exception):
            raise cannot_write(path, error) from error
        raise


def _is_plain(path: str) -> bool:  # not a pipe, a terminal, or what the process has open
    if os.path.abspath(path).startswith(("/dev/", "/proc/")):
        return False
    return os.path.isfile(path) or not os.path.exists(path)


def _part(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name[:200]}.{os.getpid()}.part")


def cannot_write(path: str, error: Exception) -> InputError:
    """Return the error that says so."""
    todo = "free some space, or choose another place"
    return InputError(f"{path}: cannot be written {advice(error, todo)}")
