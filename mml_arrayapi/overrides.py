"""What is asked for by name: the ``use_backend`` block, and the environment variable."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from inspect import (
    CO_ASYNC_GENERATOR,
    CO_GENERATOR,
    isasyncgenfunction,
    iscoroutinefunction,
    isgeneratorfunction,
)
from types import FrameType
from typing import ParamSpec, TypeVar

from mml_arrayapi import overrides as this_module

ENVIRONMENT = "MML_ARRAYAPI_BACKEND"
# Read once: looking into os.environ takes a microsecond, as long as a small loss.
environment = os.environ.get(ENVIRONMENT) or None

MANAGERS = ("contextlib", "_pytest.fixtures")  # resume generators in which blocks are others'

P = ParamSpec("P")
R = TypeVar("R")


class Block:
    """A ``with`` block, or a decorator, that asks for a kernel.

    One that has ended may still stand in the context that a task has copied.

    Parameters
    ----------
    name : str
        The kernel's name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.open: bool | None = None  # not yet
        self.generator: FrameType | None = None  # the frame, where the block is its alone
        self.around: tuple[Block, ...] = ()  # those of generators that slept when it was entered

    def __enter__(self) -> None:
        global open_names
        if self.open is not None:
            raise RuntimeError("use_backend: a block can be entered only once; call it anew")
        self.open, self.generator = True, _generator(sys._getframe(1))
        others = _blocks.get()
        self.around = tuple(block for block in others if not block.counts())
        _blocks.set((*others, self))
        with _lock:
            open_names = (*open_names, self.name)

    def __exit__(self, *_: object) -> None:
        global open_names
        if not self.open:
            raise RuntimeError("use_backend: this block is not open")
        self.open, self.generator, self.around = False, None, ()
        _blocks.set(tuple(other for other in _blocks.get() if other is not self))
        with _lock:
            at = open_names.index(self.name)
            open_names = open_names[:at] + open_names[at + 1 :]

    def counts(self) -> bool:
        """Tell whether it is open, and no generator that sleeps has it."""
        # The frame of a suspended generator has no caller.
        return bool(self.open) and (self.generator is None or self.generator.f_back is not None)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Return the function with a block of its own around each call.

        Raises
        ------
        TypeError
            It is a generator or a coroutine, whose call ends before its work begins.
        """
        tests = (isgeneratorfunction, iscoroutinefunction, isasyncgenfunction)
        if any(test(function) for test in tests):
            name = getattr(function, "__qualname__", repr(function))  # a partial has none
            raise TypeError(
                "use_backend can decorate a function, but no generator and no coroutine "
                f"({name}); open a with block in it"
            )

        @wraps(function)
        def within(*args: P.args, **kwargs: P.kwargs) -> R:
            with Block(self.name):
                return function(*args, **kwargs)

        return within


_blocks: ContextVar[tuple[Block, ...]] = ContextVar("mml_arrayapi_use_backend", default=())
_lock = threading.Lock()
# Of the blocks open in any context. torch.compile can't read a ContextVar, but it recompiles when
# this changes.
open_names: tuple[str, ...] = ()


def _generator(frame: FrameType | None) -> FrameType | None:
    """Return the innermost generator that runs where a block is entered, if one does.

    A block that outlives a function in it, such as an ``__enter__``, is still the generator's own.
    What contextlib resumes enters it for others: whoever has entered that.
    """
    while frame is not None and _module(frame) != "_pytest.fixtures":
        code, caller = frame.f_code, _module(frame.f_back)
        is_generator = code.co_flags & (CO_GENERATOR | CO_ASYNC_GENERATOR)
        # A generator expression is part of the function in which it is written.
        if is_generator and code.co_name != "<genexpr>" and caller not in MANAGERS:
            return frame
        frame = frame.f_back
    return None


def _module(frame: FrameType | None) -> str | None:
    return None if frame is None else frame.f_globals.get("__name__")


def in_context() -> str | None:
    """Return the name that the innermost open block of this context asks for.

    Returns
    -------
    str or None
    """
    innermost = None
    for block in _blocks.get():
        if block.counts() and (innermost is None or _is_within(block, innermost)):
            innermost = block
    return None if innermost is None else innermost.name


def _is_within(later: Block, earlier: Block) -> bool:
    """Tell which of two open blocks is the inner one: of generators, the one that runs deeper."""
    ours, theirs = later.generator, earlier.generator
    if ours is None or theirs is None or ours is theirs:
        # A generator that slept when a block was entered has been resumed within it.
        return earlier not in later.around
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not ours and frame is not theirs:
        frame = frame.f_back
    # Neither, in a thread that has a copy of the context.
    return frame is ours or (frame is None and earlier not in later.around)


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
