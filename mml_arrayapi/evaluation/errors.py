"""The errors of an evaluation, and how a library's own message is quoted in them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


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
    except ImportError as error:
        missing = error.name or module
        raise InputError(
            f"{what}: needs {missing}, which cannot be imported; "
            "pip install 'mml_arrayapi[evaluate]' (in a clone: pip install '.[evaluate]')"
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
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, PermissionError):
        cause = cause.__cause__ or cause.__context__
    what = otherwise if cause is None else "check your access to it"
    return f"({getattr(error, 'strerror', None) or one_line(error)}); {what}"
