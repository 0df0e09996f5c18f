"""The errors of an evaluation, and how a library's own message is quoted in them."""

from __future__ import annotations

import errno
from importlib import import_module
from typing import Any

ADVICE = {
    errno.EEXIST: "something else has this name: give another",
    errno.ENOTDIR: "a part of the path is no folder: give another",
    errno.EMFILE: "allow this process more open files (ulimit -n), or use fewer --workers",
    errno.ENFILE: "close other programs: the machine has no room for more open files",
}


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


def require(module: str, what: str) -> Any:
    """Import a module that is no dependency of the bare package.

    Parameters
    ----------
    module : str
        Its name.
    what : str
        What needs it, to begin the message with.

    Raises
    ------
    InputError
        It cannot be imported; the message names the extra that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or module
        raise InputError(
            f"{what}: needs {missing}, which cannot be imported; "
            "pip install 'mml_arrayapi[evaluate]' (in a clone: pip install '.[evaluate]')"
        ) from error
    except Exception as error:
        raise InputError(
            f"{what}: needs {module}, which cannot be imported ({one_line(error)}); mend it, or "
            "install it again"
        ) from error


def on_a_line(text: str) -> str:
    """Write out what would break a line, or command a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def one_line(error: BaseException) -> str:
    """Return an error's message on one line; of a long one its beginning and its end."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:100]} ... {text[-100:]}"


def advice(error: BaseException, otherwise: str) -> str:
    """Return an error's message on one line, in parentheses, and what to do about it."""
    what = otherwise
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            what = "check your access to it"
        elif isinstance(cause, OSError):
            what = ADVICE.get(cause.errno or 0, what)
        cause = cause.__cause__ or cause.__context__
    return f"({getattr(error, 'strerror', None) or one_line(error)}); {what}"
