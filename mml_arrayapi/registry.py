"""The registry of kernels: what there is, which one runs, and why not the others.

A *kernel* computes the loss for the arrays of one library. The generic implementation, written
against the array API standard, runs for every library and comes last. This module imports no
array library: kernels are loaded when the first array of their library is seen.

Order of say: the ``backend=`` argument, then :func:`use_backend`, then the environment variable
``MML_ARRAYAPI_BACKEND`` (read when the package is imported: looking into ``os.environ`` costs a
microsecond, a third of a small call), then the order of registration (the built-in kernels, those
given to :func:`register_kernel`, those of installed plugins), then the generic implementation.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from typing import Any

from mml_arrayapi import backends as built_in
from mml_arrayapi import formula
from mml_arrayapi.kernel import Array, Kernel, Problem, _never_waits
from mml_arrayapi.validation import settle_targets

ENTRY_POINTS = "mml_arrayapi.backends"
ENVIRONMENT = "MML_ARRAYAPI_BACKEND"
LARGE = 2**22  # elements of a job from which on compiling a kernel for it pays


def _generic_loss(problem: Problem) -> Array:
    return formula.loss(settle_targets(problem))


def _generic_loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    return formula.loss_and_grad(settle_targets(problem), grad_output)


GENERIC = Kernel(
    name="generic",
    library="*",
    refuses=lambda _: None,
    loss=_generic_loss,
    loss_and_grad=_generic_loss_and_grad,
)


class _ThreadState(threading.local):
    forced: str | None = None  # what use_backend() says in this thread


_state = _ThreadState()
_environment = os.environ.get(ENVIRONMENT) or None
# Read here, not in a call: reading them breaks torch.compile(fullgraph=True).
_plugins: tuple[EntryPoint, ...] = tuple(entry_points(group=ENTRY_POINTS))
_registered: list[Kernel] = []
_loaded: dict[str, tuple[Kernel, ...]] = {}  # library -> its kernels, in order
_shortcuts: dict[type, Callable[..., Array | None]] = {}
_lock = threading.RLock()


def register_kernel(kernel: Kernel) -> None:
    """Offer a kernel; it comes after those that are registered already.

    Parameters
    ----------
    kernel : Kernel
        Its ``library`` is the top-level name of the namespace of the arrays it takes.

    Raises
    ------
    TypeError
        Not a :class:`Kernel`.
    ValueError
        A kernel of that name is registered already.

    Notes
    -----
    A package that should be found without being imported declares an entry point in the group
    ``mml_arrayapi.backends`` instead: its name is the library's, or ``library.anything``, and it
    points to a :class:`Kernel`. It is loaded when an array of that library is first seen.
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must be a Kernel, but is of type {type(kernel).__name__}")
    with _lock:
        if kernel.name in _known():
            raise ValueError(f"a kernel named {kernel.name!r} is registered already")
        _registered.append(kernel)
        _loaded.pop(kernel.library, None)
        _shortcuts.clear()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Make one kernel run within a ``with`` block, in this thread.

    Parameters
    ----------
    name : str
        A kernel's name; ``"generic"`` forbids all specialised kernels. Arrays of another library
        than the kernel's are not affected.

    Raises
    ------
    ValueError
        No kernel of that name is known; or, in a call, the kernel refuses the arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import explain, use_backend
    >>> with use_backend("generic"):
    ...     explain(np.zeros((2, 3)), np.asarray([0, 1])).kernel
    'generic'
    """
    _library_of_kernel(name, "use_backend")
    before = _state.forced
    _state.forced = name
    try:
        yield
    finally:
        _state.forced = before


def choose(problem: Problem, backend: str | None) -> Kernel:
    """Choose the kernel that runs a problem.

    Parameters
    ----------
    problem : Problem
        The checked call.
    backend : str or None
        The caller's ``backend=``.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError
        The kernel asked for is unknown or refuses.
    """
    asked = _asked_for(problem, backend)
    if asked is not None:
        return asked
    for kernel in _kernels_of(problem.library):
        if kernel.refuses(problem) is None and kernel.waits(problem) is None:
            if kernel.shortcut is not None:
                _shortcuts[type(problem.input)] = kernel.shortcut
            return kernel
    return GENERIC


def choose_for_job(problem: Problem, backend: str | None, elements: float) -> Kernel:
    """Choose the kernel for a job that is cut into many problems.

    The choice depends on nothing that this process has done before (unlike :func:`choose`, which
    waits until compiling pays), so the same job gives the same bits again, wherever its parts run.

    Parameters
    ----------
    problem : Problem
        One of them.
    backend : str or None
        The caller's ``backend=``.
    elements : float
        The size of the input of all of them together.

    Returns
    -------
    Kernel

    Raises
    ------
    ValueError
        The kernel asked for is unknown or refuses.
    """
    asked = _asked_for(problem, backend)
    if asked is not None:
        return asked
    for kernel in _kernels_of(problem.library):
        if kernel.refuses(problem) is None:
            return kernel if elements >= LARGE or kernel.waits is _never_waits else GENERIC
    return GENERIC


def shortcut_for(input: Array) -> Callable[..., Array | None] | None:
    """Return the shortcut of the kernel that last ran an input of this type, if any may be taken.

    Parameters
    ----------
    input : array
        Any object.

    Returns
    -------
    callable or None
        See :class:`Kernel`; None where a kernel is asked for by name.
    """
    # Where the environment names a kernel, choose() has filled in none.
    return _shortcuts.get(type(input)) if _state.forced is None else None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which kernel runs, and why not the others.

    Attributes
    ----------
    kernel : str
        Name of the kernel that runs.
    considered : tuple of (str, str or None)
        Each kernel's name, in the order of say, with the reason why it doesn't run; None for the
        one that does.
    """

    kernel: str
    considered: tuple[tuple[str, str | None], ...]

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.considered)
        return "\n".join(f"{name:<{width}}  {why or 'runs'}" for name, why in self.considered)


def explain(problem: Problem, backend: str | None) -> Explanation:
    """Tell which kernel :func:`choose` chooses, and why not the others.

    Parameters
    ----------
    problem, backend
        As in :func:`choose`.

    Returns
    -------
    Explanation
    """
    chosen = choose(problem, backend)
    asked = bool(backend or _state.forced or _environment)
    considered: list[tuple[str, str | None]] = []
    earlier = True
    for kernel in (*_kernels_of(problem.library), GENERIC):
        why = None
        if kernel.name == chosen.name:
            earlier = False
        elif (why := kernel.refuses(problem)) is None:
            why = None if asked else kernel.waits(problem)
            place = "was asked for" if earlier else "comes first"
            why = why or f"{chosen.name} {place}"
        considered.append((kernel.name, why))
    return Explanation(chosen.name, tuple(considered))


@dataclass(frozen=True, slots=True)
class Backend:
    """One line of :func:`list_backends`.

    Attributes
    ----------
    name, library : str
        The kernel's name, and the library whose arrays it takes ("*": every one).
    available : bool
        Whether what it needs is installed.
    reason : str
        Where it comes from, or why it is not available.
    """

    name: str
    library: str
    available: bool
    reason: str


def list_backends() -> tuple[Backend, ...]:
    """List the kernels there are, available or not, and why. Imports no array library.

    Returns
    -------
    tuple of Backend

    Examples
    --------
    >>> from mml_arrayapi import list_backends
    >>> list_backends()[-1].name
    'generic'
    """
    found = [_status_of_offer(offer) for offer in built_in.OFFERS]
    found += [Backend(k.name, k.library, True, "registered by the program") for k in _registered]
    for plugin in _plugins:
        found.append(Backend(plugin.name, _library(plugin), True, f"plugin {plugin.value}"))
    found.append(Backend("generic", "*", True, "the array API implementation"))
    return tuple(found)


def _status_of_offer(offer: built_in.Offer) -> Backend:
    missing = [name for name in offer.requires if not _installed(name)]
    if missing:
        return Backend(offer.name, offer.library, False, f"not installed: {', '.join(missing)}")
    for kernel in _loaded.get(offer.library, ()):
        if kernel.name == offer.name and kernel.loss is _never:
            return Backend(offer.name, offer.library, False, str(kernel.refuses(None)))  # type: ignore[arg-type]
    return Backend(offer.name, offer.library, True, "built in")


def _installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package isn't there either
        return False


def _kernels_of(library: str) -> tuple[Kernel, ...]:
    kernels = _loaded.get(library)
    if kernels is None:
        kernels = _load(library)
    return kernels


def _load(library: str) -> tuple[Kernel, ...]:
    # No lock: torch.compile(fullgraph=True) can't enter one, and the first call may be compiled.
    # Two threads that load at once do the same work twice.
    offers = [offer for offer in built_in.OFFERS if offer.library == library]
    kernels = [_attempt(offer.name, library, offer.load) for offer in offers]
    kernels += [kernel for kernel in _registered if kernel.library == library]
    for plugin in _plugins:
        if _library(plugin) == library:
            kernels.append(_attempt(plugin.name, library, plugin.load))
    _loaded[library] = tuple(kernels)
    return _loaded[library]


def _attempt(name: str, library: str, load: Callable[[], Any]) -> Kernel:
    """Load a kernel; what can't be imported becomes a kernel that refuses with the reason."""
    try:
        kernel = load()
    except ImportError as error:
        reason = f"cannot be imported: {error}"
        return Kernel(name, library, lambda _: reason, _never, _never)
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"entry point {name!r} of the group {ENTRY_POINTS!r} must point to a Kernel, but "
            f"points to an object of type {type(kernel).__name__}"
        )
    return kernel


def _never(*_: Any) -> Any:
    raise AssertionError("a kernel that refuses was run")


def _library(plugin: EntryPoint) -> str:
    return plugin.name.partition(".")[0]


def _asked_for(problem: Problem, backend: str | None) -> Kernel | None:
    """Return the kernel asked for by name, by whoever has the say."""
    name = backend or _state.forced or _environment
    return None if name is None else _forced(problem, backend, name)


def _forced(problem: Problem, backend: str | None, name: str) -> Kernel | None:
    """Return the kernel asked for; None where it is of another library and not the caller's own."""
    if name == "generic":
        return GENERIC
    source = "backend" if backend else "use_backend" if _state.forced else ENVIRONMENT
    for kernel in _kernels_of(problem.library):
        if kernel.name == name:
            reason = kernel.refuses(problem)
            if reason is None:
                return kernel
            raise ValueError(f"{source}: kernel {name!r} cannot run this call: {reason}; {_list()}")
    library = _library_of_kernel(name, source)
    for kernel in _kernels_of(problem.library):
        inner = kernel.on_chunks and kernel.on_chunks(problem, name, library)
        if inner is not None:
            return inner
    if backend is None:
        return None
    raise ValueError(
        f"backend: kernel {name!r} takes arrays of {library}, but input is of "
        f"{problem.library}; {_list()}"
    )


def _library_of_kernel(name: str, source: str) -> str:
    known = _known()
    if name not in known:
        for plugin in _plugins:  # a plugin's kernel may be named otherwise than its entry
            _kernels_of(_library(plugin))
        known = _known()
    if name not in known:
        raise ValueError(f"{source}: no kernel is named {name!r}; {_list()}")
    return known[name]


def _known() -> dict[str, str]:
    """Every kernel's name, with its library."""
    names = {offer.name: offer.library for offer in built_in.OFFERS}
    names |= {kernel.name: kernel.library for kernel in _registered}
    for kernels in _loaded.values():
        names |= {kernel.name: kernel.library for kernel in kernels}
    return names | {"generic": "*"}


def _list() -> str:
    return f"known kernels are {', '.join(_known())}"
