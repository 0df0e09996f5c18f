"""File systems of fsspec that only one thread at a time may read."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from typing import Any

from fsspec import AbstractFileSystem

_turn = threading.RLock()  # for all: two file systems may read one archive


class OneAtATime(AbstractFileSystem):  # type: ignore[misc]
    """A file system of which one thread at a time reads.

    Those that aren't written for asyncio may share one position in an archive (``tar``), or one
    opened file (``memory``), between all that is opened: threads would read one another's rows.

    Parameters
    ----------
    inner
        A file system of fsspec.
    """

    cachable = False

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.protocol, self.root_marker = inner.protocol, inner.root_marker
        self._strip_protocol, self._parent = inner._strip_protocol, inner._parent

    def __reduce__(self) -> tuple[Any, ...]:
        return OneAtATime, (self.inner,)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:  # noqa: D102
        with _turn:
            opened = self.inner.open(path, mode, **options)
        # A copy on this machine, opened anew, has a position of its own.
        own = type(opened) is io.BufferedReader and type(opened.raw) is io.FileIO
        return opened if own else _Part(opened)


def _in_turn(name: str) -> Callable[..., Any]:
    def call(self: OneAtATime, *args: Any, **kwargs: Any) -> Any:
        with _turn:
            return getattr(self.inner, name)(*args, **kwargs)

    return call


for _name in (
    *("ls", "info", "exists", "isdir", "isfile", "find", "glob", "cat_file", "get_file"),
    *("unstrip_protocol", "invalidate_cache", "created", "modified", "size"),
):
    setattr(OneAtATime, _name, _in_turn(_name))


class _Part(io.RawIOBase):
    """An opened file with a position of its own."""

    def __init__(self, opened: Any) -> None:
        self._opened, self._at = opened, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        with _turn:
            self._opened.seek(self._at)
            read = self._opened.read(len(room))
        room[: len(read)] = read
        self._at += len(read)
        return len(read)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _turn:
            if whence == os.SEEK_END:
                offset += self._opened.seek(0, os.SEEK_END)
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        with _turn:
            if not self.closed:
                self._opened.close()
        super().close()
