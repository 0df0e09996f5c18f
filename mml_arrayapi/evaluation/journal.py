"""The journal of an evaluation: finished pieces on disk, so that a killed run can be resumed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any
from zlib import crc32

from mml_arrayapi.evaluation.inputs import InputError
from mml_arrayapi.evaluation.metrics import Tally

NAME = "journal.jsonl"


class Journal:
    """An append-only file: a line that says what is evaluated, then one line per finished piece.

    Each line begins with the checksum of the rest. A torn last line, as a killed run leaves it, is
    dropped; any other damage is an error.

    Parameters
    ----------
    folder : str
        Where the journal is, or will be.
    about : dict
        What is evaluated, as plain JSON. A journal about something else is refused.

    Attributes
    ----------
    finished : dict of int to Tally
        The pieces that the journal holds already, by number.
    """

    def __init__(self, folder: str, about: dict[str, Any]) -> None:
        self.path = Path(folder) / NAME
        self.finished: dict[int, Tally] = {}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            records, length = _read(self.path)
            if records:
                _compare(self.path, records[0], json.loads(json.dumps(about)))
            self._file = self.path.open("ab", buffering=0)
            self._file.truncate(length)
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        if not records:
            self._append(about)
        for record in records[1:]:
            self.finished[record["piece"]] = Tally.from_state(record["tally"])

    def add(self, piece: int, tally: Tally) -> None:
        """Write down a finished piece; it is on disk when this returns."""
        self._append({"piece": piece, "tally": tally.state()})

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        text = json.dumps(record, separators=(",", ":")).encode()
        line = b"%08x %s\n" % (crc32(text), text)
        try:
            while line:
                line = line[self._file.write(line) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            self.close()
            raise _cannot_write(self.path, error) from error


def _read(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the journal's records, and the length of what is whole."""
    if not path.exists():
        return [], 0
    content = path.read_bytes()
    records, length = [], 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        whole = line.endswith(b"\n") and checksum == b"%08x" % crc32(text)
        if not whole and number < len(lines):
            raise InputError(
                f"{path}: line {number} is damaged; remove the file, and evaluate from the start"
            )
        if whole:
            records.append(json.loads(text))
            length += len(line)
    return records, length


def _compare(path: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if old.get(key) == value:
            continue
        if key == "inputs":
            before = old.get(key) or []
            changed = [one[0] for one in value if one not in before] or ["fewer files"]
            raise InputError(
                f"{path}: was begun with other inputs (now: {', '.join(changed[:3])}); give the "
                "same files, unchanged, or another folder"
            )
        raise InputError(
            f"{path}: was begun with {key} {old.get(key)}, but this run has {value}; use the same, "
            "or another folder"
        )


def write_whole(path: str, text: str) -> None:
    """Write a file so that it is either there as a whole or not at all.

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
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=Path(path).parent, prefix=".", suffix=".part", delete=False
        ) as file:
            temporary = file.name
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise _cannot_write(path, error) from error


def _cannot_write(path: Any, error: OSError) -> InputError:
    return InputError(
        f"{path}: cannot be written ({error.strerror or error}); free some space, or choose "
        "another place"
    )
