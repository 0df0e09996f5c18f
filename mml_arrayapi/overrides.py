"""What is asked for by name: the ``use_backend`` block, and the environment variable."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from inspect import CO_ASYNC_GENERATOR, CO_GENERATOR
from types import FrameType

from mml_arrayapi import overrides as this_module

ENVIRONMENT = "MML_ARRAYAPI_BACKEND"
# Read once: looking into os.environ takes a microsecond, as long as a small loss.
environment = os.environ.get(ENVIRONMENT) or None

# These resume a generator to open a block for others, and leave it suspended meanwhile.
_GENERATORS_FOR_OTHERS = ("contextlib", "_pytest.fixtures")


@dataclass(eq=False)
class _Block:
    """A block. One that has ended may still stand in the context that a task has copied."""

    name: str
    generator: FrameType | None  # the frame, where the block belongs to a generator alone
    open: bool = True


_blocks: ContextVar[tuple[_Block, ...]] = ContextVar("mml_arrayapi_use_backend", default=())
_lock = threading.Lock()
# Of the blocks open in any context. torch.compile can't read a ContextVar, but it recompiles when
# this changes.
open_names: tuple[str, ...] = ()


@contextmanager
def block(name: str, frame: FrameType) -> Iterator[None]:
    """Ask for a kernel within a ``with`` block.

    Parameters
    ----------
    name : str
        The kernel's name.
    frame : frame
        The caller's.
    """
    global open_names
    mine = _Block(name, _generator(frame))
    _blocks.set((*_blocks.get(), mine))
    with _lock:
        open_names = (*open_names, name)
    try:
        yield
    finally:
        mine.open = False
        _blocks.set(tuple(other for other in _blocks.get() if other is not mine))
        with _lock:
            at = open_names.index(name)
            open_names = open_names[:at] + open_names[at + 1 :]


def _generator(frame: FrameType) -> FrameType | None:
    if not frame.f_code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR):
        return None
    resumed_by = frame.f_back
    if resumed_by is not None and resumed_by.f_globals.get("__name__") in _GENERATORS_FOR_OTHERS:
        return None
    return frame


def in_context() -> str | None:
    """Return the name that the innermost open block of this context asks for.

    Returns
    -------
    str or None
    """
    for block in reversed(_blocks.get()):
        # The frame of a suspended generator has no caller.
        if block.open and (block.generator is None or block.generator.f_back is not None):
            return block.name
    return None


def __getattr__(name: str) -> str | None:
    """Give ``name_in_context``, what :func:`in_context` returns, as an attribute of the module.

    torch.compile can't read a ContextVar. It reads this once and takes it for a constant, but looks
    at it again before each call of the compiled code: so that each context has its own.
    """
    if name == "name_in_context":
        return in_context()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def asked_for(backend: str | None) -> tuple[str | None, str]:
    """Return the name of the kernel that is asked for, and who asks.

    Parameters
    ----------
    backend : str or None
        The caller's ``backend=``.

    Returns
    -------
    name : str or None
    source : {"backend", "use_backend", "MML_ARRAYAPI_BACKEND"}
    """
    if backend is not None:
        return backend, "backend"
    if open_names and (name := this_module.name_in_context) is not None:
        return name, "use_backend"
    return environment, ENVIRONMENT
