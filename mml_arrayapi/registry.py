"""The registry of kernels: what there is, which one runs, and why not the others.

A *kernel* computes the loss for the arrays of one library. The generic implementation, written
against the array API standard, runs for every library and comes last. This module imports no
array library: kernels are loaded when the first array of their library is seen.

The choice is a function of the call, of what is registered and of what is asked for; it never
depends on what the process has done before. Precedence: the ``backend=`` argument, then
:func:`use_backend`, then the environment variable ``MML_ARRAYAPI_BACKEND`` (read when the package
is imported), then the order of the kernels: third-party kernels directly before the one that
their ``before`` names, the built-in ones, the other third-party ones (those given to
:func:`register_kernel`, then those of plugins), the generic implementation.

``torch.compile`` traces through :func:`choose` and :func:`direct_kernels`. What these two read is
therefore replaced as a whole, never changed in place, and the library's row in the table of
libraries has loaded the kernels before (:func:`load`), since a trace can't enter a lock.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mml_arrayapi import backends as built_in
from mml_arrayapi import formula, overrides
from mml_arrayapi.kernel import Array, Kernel, Problem, Unusable
from mml_arrayapi.libraries import library_of
from mml_arrayapi.validation import check_targets, in_words, same_shape

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINTS = "mml_arrayapi.backends"
BEING_LOADED = "is being loaded"


def _never_refuses(problem: Problem) -> str | None:  # noqa: ARG001
    return None


def _generic_loss(problem: Problem) -> Array:
    run = library_of("input", problem.input).loss or formula.loss
    return run(check_targets(problem))


def _generic_loss_and_grad(problem: Problem, grad_output: Array | None) -> tuple[Array, Array]:
    run = library_of("input", problem.input).loss_and_grad or formula.loss_and_grad
    return run(check_targets(problem), grad_output)


GENERIC = Kernel(
    name="generic",
    library="*",
    refuses=_never_refuses,
    loss=_generic_loss,
    loss_and_grad=_generic_loss_and_grad,
    supports=frozenset({"ignore_index"}),
)


@dataclass(slots=True)
class _Registry:
    """What is registered, and what has been loaded of it."""

    lazy: tuple[built_in.LazyKernel, ...] = ()
    plugins: tuple[EntryPoint, ...] | None = ()  # None: not read yet
    registered: tuple[Kernel, ...] = ()
    loaded: dict[str, Kernel] = field(default_factory=dict)  # by entry's name; a broken one refuses
    broken: dict[str, str] = field(default_factory=dict)  # entry's name: why it could not be loaded
    orders: dict[str, tuple[Kernel, ...]] = field(default_factory=dict)  # by library
    # No dict: torch.compile can't check that the keys of one still are the same types.
    direct: tuple[tuple[type, tuple[Callable[..., Array | None], ...]], ...] = ()


_BUILT_IN = frozenset((GENERIC.name, *(lazy.name for lazy in built_in.KERNELS)))
_lock = threading.RLock()
_threads = threading.local()
_registry = _Registry(built_in.KERNELS, None)


def _begin_anew() -> None:
    """In a forked child no thread will release the lock that another held in the parent."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def register_kernel(kernel: Kernel) -> None:
    """Add a kernel.

    Parameters
    ----------
    kernel : Kernel
        Its ``library`` is the top-level name of the namespace of the arrays it takes.

    Raises
    ------
    TypeError
        Not a :class:`Kernel`.
    ValueError
        There is a kernel of that name, or no namespace can have the library's.

    Notes
    -----
    A package that should be found without being imported declares an entry point in the group
    ``mml_arrayapi.backends`` instead: its name is the library's, or ``library.anything``, and it
    points to a :class:`Kernel`. It is loaded when an array of that library is first seen.

    Examples
    --------
    >>> from mml_arrayapi import Kernel, register_kernel, unregister_kernel
    >>> register_kernel(Kernel("mine", "numpy", lambda problem: "not today", print, print))
    >>> unregister_kernel("mine")
    """
    if not isinstance(kernel, Kernel):
        raise TypeError(f"kernel must be a Kernel, but is of type {type(kernel).__name__}")
    if (why := _no_library(kernel.library)) is not None:
        raise ValueError(f"kernel {kernel.name!r}: {why}")
    with _lock:
        if kernel.name in _known():
            raise ValueError(f"a kernel named {kernel.name!r} is registered already")
        _registry.registered = (*_registry.registered, kernel)
        _reorder()


def unregister_kernel(name: str) -> None:
    """Remove a kernel that :func:`register_kernel` added.

    Parameters
    ----------
    name : str
        The kernel's name.

    Raises
    ------
    ValueError
        The program has registered no kernel of that name.
    """
    with _lock:
        names = [kernel.name for kernel in _registry.registered]
        if name not in names:
            raise ValueError(
                f"name must be that of a kernel which the program has registered "
                f"({', '.join(names) or 'so far none'}), but is {name!r}"
            )
        _registry.registered = tuple(k for k in _registry.registered if k.name != name)
        _reorder()


@contextmanager
def isolated(*, built_in_kernels: bool = False) -> Iterator[None]:
    """Put an empty registry in this one's place within a ``with`` block: for tests.

    Parameters
    ----------
    built_in_kernels : bool, default False
        Whether the built-in kernels are in it. Plugins never are.
    """
    global _registry
    outer = _registry
    _registry = _Registry(built_in.KERNELS if built_in_kernels else ())
    try:
        yield
    finally:
        _registry = outer


def use_backend(name: str) -> overrides.Block:
    """Make one kernel run within a ``with`` block.

    The block belongs to its context: other threads, other asyncio tasks, and whatever runs while
    the generator that holds the block is suspended, don't see it. (A generator that serves as a
    context manager or a pytest fixture holds it for others, who do.)

    Parameters
    ----------
    name : str
        A kernel's name; ``"generic"`` forbids all specialised kernels. Arrays of another library
        than the kernel's are not affected.

    Returns
    -------
    context manager
        For one block. It may also decorate a function, but no generator and no coroutine.

    Raises
    ------
    TypeError, ValueError
        No kernel of that name is known; or, in a call, the kernel refuses the arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import explain, use_backend
    >>> with use_backend("generic"):
    ...     explain(np.zeros((2, 3)), np.asarray([0, 1])).kernel
    'generic'
    """
    if name is None:
        raise TypeError(f"use_backend must be given a kernel's name, but got None; {_list()}")
    check_name(name, "use_backend")
    return overrides.Block(name)


def check_name(name: str | None, source: str = "backend") -> None:
    """Check that a kernel of that name is known, installed or not.

    Parameters
    ----------
    name : str or None
        None asks for no kernel.
    source : str
        Who asks, for the message.

    Raises
    ------
    TypeError
        Neither None nor a string.
    ValueError
        No kernel is named so.
    """
    if name is None:
        return
    if not isinstance(name, str):  # first: an array compared with a string is an array
        accepted = "a kernel's name" if source == "use_backend" else "None or a kernel's name"
        raise TypeError(f"{source} must be {accepted}, but is {in_words(name)}; {_list()}")
    if name != "generic":
        _library_of_kernel(name, source)


def direct_kernels(input: Array) -> tuple[Callable[..., Array | None], ...]:
    """Return what may be tried for an input before its arguments are checked.

    Parameters
    ----------
    input : array
        Any object.

    Returns
    -------
    tuple of callable
        See :attr:`Kernel.direct`. Nothing where a kernel is asked for by name, or the library's
        kernels have not been loaded yet.
    """
    if overrides.open_names or overrides.environment is not None:
        return ()
    of_input = type(input)
    if of_input.__module__ in ("torch", "torch.nn.parameter"):
        import torch  # is there, and this costs a tenth of library_of()'s 2 microseconds

        # torch.compile traces a first call again where something else breaks the graph, and must
        # then go the same way: so this doesn't depend on what is loaded already.
        if torch.compiler.is_compiling():
            # Not library_of(): each name that it reads is looked at again in every compiled call,
            # which took 20 of 60 microseconds.
            from mml_arrayapi.backends.pytorch import library  # noqa: F401
    for kind, functions in _registry.direct:
        if kind is of_input:
            return functions
    return ()


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
    name, source = overrides.asked_for(backend)
    if name is not None and (asked := _asked_kernel(problem, name, source)) is not None:
        return asked
    for kernel in kernels_of(problem.library):
        if _refusal(kernel, problem) is None:
            return kernel
    return GENERIC


def run(problem: Problem, backend: str | None, operation: str, *arguments: Any) -> Any:
    """Run a problem on the kernel that :func:`choose` chooses.

    A kernel may find out only while it runs that it can't. Then the generic implementation runs.

    Parameters
    ----------
    problem, backend
        As in :func:`choose`.
    operation : {"loss", "loss_and_grad"}
        What is called of the kernel.
    *arguments
        Of the operation, after the problem.

    Returns
    -------
    array or tuple of arrays

    Raises
    ------
    ValueError
        The kernel asked for is unknown, refuses, or turned out to be unusable.
    """
    return run_on(choose(problem, backend), problem, backend, operation, *arguments)[0]


def run_on(
    kernel: Kernel, problem: Problem, backend: str | None, operation: str, *arguments: Any
) -> tuple[Any, str]:
    """Do what :func:`run` does, on a kernel that has been chosen.

    Returns
    -------
    result : array or tuple of arrays
    name : str
        That of the kernel that ran.
    """
    if kernel is GENERIC:
        return getattr(GENERIC, operation)(problem, *arguments), GENERIC.name
    name, source = overrides.asked_for(backend)
    result = None
    try:
        result = getattr(kernel, operation)(problem, *arguments)
        reason = _refusal(kernel, problem) if kernel.name == name else None
    except Unusable as error:
        reason = str(error) or "it gives no reason"
    if reason is not None and kernel.name == name:
        raise ValueError(_cannot_run(name, source, reason))
    if reason is not None:
        return getattr(GENERIC, operation)(problem, *arguments), GENERIC.name
    if kernel.name not in _BUILT_IN:
        result = _checked_result(kernel, problem, operation, result)
    return result, kernel.name


def _checked_result(kernel: Kernel, problem: Problem, operation: str, result: Any) -> Any:
    """Return a kernel's result; refuse what a caller could not be given."""
    dtype, target, reduction = problem.input.dtype, problem.target, problem.reduction
    if operation == "loss":
        return _checked_loss(kernel, result, dtype, target, reduction)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(
            f"kernel {kernel.name!r}: loss_and_grad must return a loss and a gradient, a tuple of "
            f"two arrays, but returned {in_words(result)}"
        )
    loss, grad = result
    loss = _checked_loss(kernel, loss, dtype, target, reduction)
    _check_array(kernel, "gradient", grad, dtype, tuple(problem.input.shape), target)
    return loss, grad


def _checked_loss(kernel: Kernel, loss: Any, dtype: Any, target: Array, reduction: str) -> Any:
    """Return a loss; refuse what is none. A mean may be a plain number."""
    shape = tuple(target.shape) if reduction == "none" else ()
    if reduction != "none" and type(loss) in (int, float):
        library = library_of("target", target)
        loss = library.namespace.asarray(loss, dtype=dtype, device=library.device(target))
    _check_array(kernel, "loss", loss, dtype, shape, target)
    return loss


def _check_array(
    kernel: Kernel, what: str, array: Any, dtype: Any, shape: tuple[Any, ...], beside: Array
) -> None:
    """Refuse what is no array of the kernel's library, a dtype, a shape and another's device."""
    devices: tuple[Any, Any] = None, None
    try:
        fits = same_shape(tuple(array.shape), shape) and bool(array.dtype == dtype)
        library = library_of("input", array)
        if fits and library.name == kernel.library and library.unsupported_layout(array) is None:
            devices = library.device_key(array), library.device_key(beside)
            if None in devices or devices[0] == devices[1]:
                return
    except (AttributeError, TypeError, ValueError):
        pass
    if None not in devices:
        raise TypeError(
            f"kernel {kernel.name!r}: the {what} must be on the device of input, {devices[1]}, but "
            f"is on {devices[0]}"
        )
    told = in_words(array)
    if hasattr(array, "shape") and hasattr(array, "dtype"):
        told = f"a {type(array).__qualname__} of {array.dtype} and shape {array.shape}"
    raise TypeError(
        f"kernel {kernel.name!r}: the {what} must be an array of {kernel.library}, of {dtype} and "
        f"shape {shape}, but is {told}"
    )


def _cannot_run(name: str, source: str, reason: str) -> str:
    return f"{source}: kernel {name!r} cannot run this call: {reason}; {_list()}"


def _refusal(kernel: Kernel, problem: Problem) -> str | None:
    """Tell why a kernel doesn't get a problem, or None."""
    if problem.ignore_index is not None and "ignore_index" not in kernel.supports:
        return "it does not support ignore_index"
    if kernel.name in _BUILT_IN:  # whatever is raised there comes from a signal's handler
        return kernel.refuses(problem)
    try:
        reason = kernel.refuses(problem)
    except Exception as error:  # noqa: BLE001 - a kernel nobody asked for must not end a call
        return f"its refuses() raised {_told(error)}"
    if reason is None:
        return None
    if isinstance(reason, str):
        return reason or "it gives no reason"
    return f"its refuses() returned {in_words(reason)}; None says that it takes the call"


def _told(error: BaseException) -> str:
    """Return an error's kind and message, if it has one that can be printed."""
    kind, message = type(error).__name__, ""
    with suppress(Exception):
        message = str(error)
    return f"{kind}: {message}" if message else kind


def _asked_kernel(problem: Problem, name: str, source: str) -> Kernel | None:
    """Return the kernel asked for; None where it is of another library and not the caller's own."""
    if name == "generic":
        return GENERIC
    for kernel in kernels_of(problem.library):
        if kernel.name == name:
            reason = _refusal(kernel, problem)
            if reason is None:
                return kernel
            raise ValueError(_cannot_run(name, source, reason))
    library = _library_of_kernel(name, source)
    for kernel in kernels_of(problem.library):
        inner = _on_chunks(kernel, problem, name, library)
        if inner is not None:
            return inner
    if source != "backend":
        return None
    raise ValueError(
        f"backend: kernel {name!r} takes arrays of {library}, but input is of "
        f"{problem.library}; {_list()}"
    )


def _on_chunks(kernel: Kernel, problem: Problem, name: str, library: str) -> Kernel | None:
    """Return what takes the named kernel on every chunk, if this kernel can."""
    if kernel.on_chunks is None or _refusal(kernel, problem) is not None:
        return None
    if kernel.name in _BUILT_IN:
        return kernel.on_chunks(problem, name, library)
    try:
        return kernel.on_chunks(problem, name, library)
    except Exception:  # noqa: BLE001 - nobody has asked for this one
        return None


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which kernel runs, and why not the others.

    Attributes
    ----------
    kernel : str
        Name of the kernel that runs.
    considered : tuple of (str, str or None)
        Each kernel's name, in the order in which they are asked, with the reason why it doesn't
        run; None for the one that does.
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
    considered: list[tuple[str, str | None]] = []
    first = False
    for kernel in (*kernels_of(problem.library), GENERIC):
        why = None
        if kernel.name == chosen.name and not first:
            first = True
        else:
            why = _refusal(kernel, problem)
            if why is None:
                why = f"{chosen.name} {'comes first' if first else 'was asked for'}"
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
        Whether it can be loaded and what it needs is there.
    reason : str
        Where it comes from, or why it is not available.
    """

    name: str
    library: str
    available: bool
    reason: str


def list_backends() -> tuple[Backend, ...]:
    """List the kernels there are, available or not, and why.

    Imports no array library by itself. Plugins are imported, since only they know the names of
    their kernels.

    Returns
    -------
    tuple of Backend
        The names are those that ``backend=`` takes.

    Examples
    --------
    >>> from mml_arrayapi import list_backends
    >>> list_backends()[-1].name
    'generic'
    """
    found = [_status(lazy) for lazy in _registry.lazy]
    registered = _registry.registered
    found += [Backend(k.name, k.library, True, "registered by the program") for k in registered]
    for plugin in _plugins():
        kernel = _loaded_plugin(plugin)
        why = _registry.broken.get(_key(plugin))
        if _key(plugin) not in _registry.loaded:
            why = BEING_LOADED
        reason = why or f"plugin {plugin.value}"
        found.append(Backend(kernel.name, kernel.library, why is None, reason))
    found.append(Backend("generic", "*", True, "the array API implementation"))
    return tuple(found)


def _status(lazy: built_in.LazyKernel) -> Backend:
    missing = [name for name in lazy.requires if not _installed(name)]
    why = f"not installed: {', '.join(missing)}" if missing else None
    why = why or _registry.broken.get(lazy.name) or _missing(lazy)
    return Backend(lazy.name, lazy.library, why is None, why or "built in")


def _missing(lazy: built_in.LazyKernel) -> str | None:
    try:
        return lazy.missing()
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - it imports what may raise anything
        return f"cannot be imported: {_told(error)}"


def _installed(module: str) -> bool:
    try:
        spec = find_spec(module)
    except Exception:  # noqa: BLE001 - no parent package; a finder of the program's own
        return False
    return spec is not None and spec.origin is not None  # else any folder of that name


def kernels_of(library: str) -> tuple[Kernel, ...]:
    """Return the kernels of a library, but the generic one, in the order in which they are asked.

    Parameters
    ----------
    library : str
        The library's short name.

    Returns
    -------
    tuple of Kernel
    """
    kernels = _registry.orders.get(library)
    return load(library) if kernels is None else kernels


def load(library: str) -> tuple[Kernel, ...]:
    """Load the kernels of a library, built-in ones and plugins.

    Parameters
    ----------
    library : str
        The library's short name.

    Returns
    -------
    tuple of Kernel
        As :func:`kernels_of`.
    """
    found = {}
    for lazy in _registry.lazy:
        if lazy.library == library:
            found[lazy.name] = _registry.loaded.get(lazy.name) or _loaded_built_in(lazy)
    for plugin in _plugins():
        if _library(plugin) == library:
            found[_key(plugin)] = _loaded_plugin(plugin)
    with _lock:
        if found.keys() <= _registry.loaded.keys():  # else some are still being imported
            _reorder(library)
        return _order(library, found)


def _reorder(*new: str) -> None:
    """Bring the kernels of the libraries that are loaded, and of new ones, into order."""
    loaded = _registry.loaded
    orders = {library: _order(library, loaded) for library in (*_registry.orders, *new)}
    direct: dict[type, tuple[Callable[..., Array | None], ...]] = {}
    for kernels in orders.values():
        for kernel in kernels:
            if not kernel.direct and kernel.loss is not _never:
                break  # what comes after it must wait for its refusal
            for kind, function in kernel.direct.items():
                direct[kind] = (*direct.get(kind, ()), _guarded(kernel, function))
            if kernel.name not in _BUILT_IN:
                break  # None, or no function for a type, needn't mean that it refuses
    _registry.orders, _registry.direct = orders, tuple(direct.items())


def _guarded(kernel: Kernel, direct: Callable[..., Array | None]) -> Callable[..., Array | None]:
    """Keep from a kernel's direct function what it doesn't support, and let it be unusable."""
    if kernel.name in _BUILT_IN:
        return direct

    def guarded(input: Array, target: Array, weight: Array | None, options: Any) -> Array | None:
        if options[3] is not None and "ignore_index" not in kernel.supports:
            return None
        try:
            loss = direct(input, target, weight, options)
        except Unusable:  # the road with words runs the generic implementation
            return None
        if loss is not None:
            scores = library_of("input", input).under_autocast
            dtype = input.dtype if scores is None else scores(input).dtype
            loss = _checked_loss(kernel, loss, dtype, target, options[2])
        return loss

    return guarded


def _order(library: str, loaded: Mapping[str, Kernel]) -> tuple[Kernel, ...]:
    order = [loaded[lazy.name] for lazy in _registry.lazy if lazy.library == library]
    others = [kernel for kernel in _registry.registered if kernel.library == library]
    others += [loaded[_key(plugin)] for plugin in _plugins() if _library(plugin) == library]
    order += [kernel for kernel in others if kernel.before is None]
    waiting = [kernel for kernel in others if kernel.before is not None]
    while waiting:  # a kernel may name one that is placed after it
        names = [kernel.name for kernel in order]
        found = next((kernel for kernel in waiting if kernel.before in names), None)
        if found is None:
            return (*order, *waiting)  # before "generic", or before what isn't there
        order.insert(names.index(found.before), found)  # type: ignore[arg-type]
        waiting.remove(found)
    return tuple(order)


def _plugins() -> tuple[EntryPoint, ...]:
    if _registry.plugins is None:
        # Not at the top: it was 23 of the 70 ms that importing the package took.
        from importlib.metadata import entry_points

        try:
            found = list(entry_points(group=ENTRY_POINTS))
        except Exception:  # noqa: BLE001 - some package's file is damaged: the others count
            found = list(_readable_entry_points())
        _registry.plugins = tuple(found)
    return _registry.plugins


def _readable_entry_points() -> Iterator[EntryPoint]:
    from importlib.metadata import distributions

    for distribution in distributions():
        with suppress(Exception):
            yield from distribution.entry_points.select(group=ENTRY_POINTS)


def _library(plugin: EntryPoint) -> str:
    return plugin.name.partition(".")[0] or f"{plugin.name!r}"


def _key(plugin: EntryPoint) -> str:
    return f"{plugin.name} = {plugin.value}"  # two plugins may give their entries the same name


def _loaded_plugin(plugin: EntryPoint) -> Kernel:
    key = _key(plugin)
    # What can't be loaded is listed by its entry's name, unless that is a kernel's.
    entry = plugin.name if plugin.name and plugin.name not in _known(but=key) else key.strip()
    return _loaded(key, entry, _library(plugin), plugin.load)


def _loaded_built_in(lazy: built_in.LazyKernel) -> Kernel:
    with _signals_wait():
        if (why := _missing(lazy)) is not None:  # such as: no compiler built it
            _keep(lazy.name, _unusable(lazy.name, lazy.library, why))
        return _loaded(lazy.name, lazy.name, lazy.library, lazy.load)


def _loading() -> set[str]:
    """Return the keys of what this thread is loading."""
    keys: set[str] = _threads.__dict__.setdefault("loading", set())
    return keys


def _loaded(key: str, entry: str, library: str, load: Callable[[], Any]) -> Kernel:
    """Load a kernel; what can't be loaded becomes a kernel that refuses with the reason.

    No lock is held meanwhile: another thread may import a module that asks for this kernel. Threads
    that load the same one wait for each other in ``import``, which knows how to end a deadlock.
    """
    if key in _registry.loaded:
        return _registry.loaded[key]
    if key in _loading():  # it asks for itself
        return _unusable(entry, library, BEING_LOADED)
    _loading().add(key)
    try:
        kernel, why = load(), None
    except KeyboardInterrupt:  # the next call tries again
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may raise anything
        if _is_unfinished(key, error):
            return _unusable(entry, library, BEING_LOADED)
        kernel, why = None, f"cannot be imported: {_told(error)}"
    finally:
        _loading().discard(key)
    with _lock:
        if key in _registry.loaded:  # another thread was quicker
            return _registry.loaded[key]
        why = why or _misfit(kernel, key, library)
        if why is not None:
            _registry.broken = {**_registry.broken, key: why}
            kernel = _unusable(entry, library, why)
        _keep(key, kernel)
        return _registry.loaded[key]


def _is_unfinished(key: str, error: BaseException) -> bool:
    """Tell whether a plugin's module is just being imported: the next call may find it whole."""
    module = sys.modules.get(key.partition(" = ")[2].partition(":")[0].strip())
    spec = getattr(module, "__spec__", None)
    return getattr(spec, "_initializing", False) or type(error).__name__ == "_DeadlockError"


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Let Ctrl-C and other signals wait until the end of a ``with`` block, in which kernels load.

    What a handler raises would be taken for the kernel's failure, and PyTorch's operators can't be
    registered a second time.
    """
    came: list[Any] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        for number in signal.valid_signals():
            handler = signal.getsignal(number)
            if callable(handler):
                with suppress(ValueError):  # in a sub-interpreter, which gets no signals
                    signal.signal(number, lambda *arguments: came.append(arguments))
                    handlers[number] = handler
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in came:
            handlers[number](number, frame)


def _keep(key: str, kernel: Any) -> None:
    with _lock:
        _registry.loaded = {**_registry.loaded, key: kernel}


def _unusable(name: str, library: str, reason: str) -> Kernel:
    return Kernel(name, library, partial(_refuse, reason), _never, _never)


def _misfit(kernel: Any, key: str, library: str) -> str | None:
    """Tell why what an entry point gave is not a kernel that can be used, or None."""
    if not isinstance(kernel, Kernel):
        return f"the entry point gives an object of type {type(kernel).__name__}, not a Kernel"
    try:
        if not all(hasattr(kernel, one.name) for one in fields(Kernel)):
            return "the entry point gives a Kernel that was never initialised"
    except Exception as error:  # noqa: BLE001 - a subclass's own
        return f"the entry point gives a Kernel whose fields cannot be read: {_told(error)}"
    if (why := _no_library(kernel.library)) is not None:
        return why
    if kernel.library != library:
        return f"the kernel is for {kernel.library}, the entry point's name says {library}"
    if kernel.name in _known(but=key):
        return f"there is another kernel named {kernel.name!r}"
    return None


def _no_library(name: str) -> str | None:
    """Tell why no namespace has a name, or None; a kernel of such a library would never run."""
    if name.isidentifier():
        return None
    return (
        f"library must be the top-level name of a namespace, such as 'numpy' or 'jax', but is "
        f"{name!r}"
    )


def _refuse(reason: str, problem: Problem) -> str:  # noqa: ARG001
    return reason


def _never(*_: Any) -> Any:
    raise AssertionError("a kernel that refuses was run")


def _library_of_kernel(name: str, source: str) -> str:
    known = _known()
    if name not in known:
        for plugin in _plugins():  # a plugin's kernel may be named otherwise than its entry
            _loaded_plugin(plugin)
        known = _known()
    if name not in known:
        raise ValueError(f"{source}: no kernel is named {name!r}; {_list()}")
    return known[name]


def _known(but: str | None = None) -> dict[str, str]:
    """Every kernel's name, with its library; but that of one which is being loaded, by its key."""
    names = {lazy.name: lazy.library for lazy in _registry.lazy if lazy.name != but}
    names |= {kernel.name: kernel.library for kernel in _registry.registered}
    loaded = _registry.loaded.items()
    names |= {kernel.name: kernel.library for key, kernel in loaded if key != but}
    return names | {"generic": "*"}


def _list() -> str:
    return f"known kernels are {', '.join(_known())}"
