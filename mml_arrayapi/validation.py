"""Every check of an argument, in order, and every message.

Checks run in this order: reduction, p, margin, ignore_index, check_target, backend, the rank of
weight, the shape and axis of input, the shape of target, the size of weight, the dtypes of input,
target and weight, library and device, grad_output; the values of target come last. All but the
last look at shapes and dtypes only.
"""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

from mml_arrayapi.kernel import Options, Problem
from mml_arrayapi.libraries import HOST, LAZY, TRACED, Library, library_of, widest

Array = Any

REDUCTIONS = ("none", "mean", "sum")
CHECKS = ("auto", "raise", "nan")
REAL, INTEGER = "real floating", "integral"  # as isdtype() has them
SHOWN = 80  # characters of a value in a message


class InvalidTargetError(IndexError, ValueError):
    """A target is no class of the input.

    Attributes
    ----------
    position : tuple of int
        Where in ``target`` the first such value stands; of a Dask array, the first in a chunk.
    value : int
        The value.
    n_classes : int
        The number of classes; accepted are 0 to ``n_classes - 1``.

    Examples
    --------
    >>> import numpy as np
    >>> from mml_arrayapi import InvalidTargetError, multi_margin_loss
    >>> try:
    ...     multi_margin_loss(np.zeros((2, 3)), np.asarray([0, 3]))
    ... except InvalidTargetError as error:
    ...     print(error)
    target[1] is 3, but input has 3 classes: accepted are 0 to 2; subtract 1 if labels begin at 1
    """

    def __init__(self, position: tuple[int, ...], value: int, n_classes: int) -> None:
        self.position = position
        self.value = value
        self.n_classes = n_classes
        place = f"target[{', '.join(map(str, position))}]" if position else "target"
        hint = "; subtract 1 if labels begin at 1" if value == n_classes else ""
        super().__init__(
            f"{place} is {value}, but input has {n_classes} "
            f"{'class' if n_classes == 1 else 'classes'}: accepted are 0 to {n_classes - 1}{hint}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.position, self.value, self.n_classes)


def check_options(options: Options) -> Options:
    """Check the arguments that are no arrays (but ``axis``, which needs one).

    Parameters
    ----------
    options : tuple
        As the caller gave them: p, margin, reduction, ignore_index, axis, check_target.

    Returns
    -------
    tuple
        The same, with ``p`` and ``margin`` as floats, and plain strings.

    Raises
    ------
    TypeError, ValueError
        With the argument's name, what was given, and what is accepted.
    """
    p, margin, reduction, ignore_index, axis, mode = options
    p, margin = check_parameters(reduction, p, margin)
    ignore_index = check_ignore_index(ignore_index)
    if not isinstance(mode, str) or mode not in CHECKS:
        raise ValueError(f"check_target must be one of {_listed(CHECKS)}, but is {in_words(mode)}")
    # Kernels take no subclasses of str, such as NumPy's and an Enum's.
    reduction, mode = REDUCTIONS[REDUCTIONS.index(reduction)], CHECKS[CHECKS.index(mode)]
    return p, margin, reduction, ignore_index, axis, mode


def check_ignore_index(ignore_index: Any) -> int | None:
    """Check ``ignore_index``.

    Parameters
    ----------
    ignore_index : int or None
        As the caller gave it.

    Returns
    -------
    int or None

    Raises
    ------
    TypeError
        Something else.
    """
    if ignore_index is None:
        return None
    if not is_number(ignore_index, numbers.Integral):
        raise TypeError(
            f"ignore_index must be None or an integer, but is {in_words(ignore_index)}"
            f"{_static('ignore_index', ignore_index)}"
        )
    return ignore_index if _is_symbol(ignore_index) else int(ignore_index)


def check_arrays(input: Array, target: Array, weight: Array | None, options: Options) -> Problem:
    """Check the arrays of a call, and put one-sample spellings into the usual shape.

    Parameters
    ----------
    input, target, weight
        As in :func:`mml_arrayapi.multi_margin_loss`.
    options : tuple
        What :func:`check_options` returned.

    Returns
    -------
    Problem

    Raises
    ------
    TypeError, ValueError
        With the argument's name, what was given, and what is accepted.
    """
    weight_shape, weight_library = (None, None) if weight is None else _seen_weight(weight)
    shape, library = _seen("input", input)
    p, margin, reduction, ignore_index, axis, check_target = options
    shape, axis, n_classes = _classes(shape, axis)
    batch = shape[:axis] + shape[axis + 1 :]
    given, target_library = _seen("target", target)
    target = target_library.widened(target)
    if not same_shape(given, batch) and not (batch in ((), (1,)) and given in ((), (1,))):
        raise ValueError(
            f"target must have input's shape without the classes' axis, {batch}, but has shape "
            f"{given} (input has shape {shape}, the classes are at axis {axis})"
            f"{_hint(given, batch, shape)}"
        )
    if weight_shape is not None and not same_shape(weight_shape, (n_classes,)):
        raise ValueError(
            f"weight must have one element per class, shape ({n_classes},), but has shape "
            f"{weight_shape}"
        )
    _check_dtype("input", library, input, REAL)
    _check_dtype("target", target_library, target, INTEGER)
    if weight_library is not None:
        _check_dtype("weight", weight_library, weight, REAL)
    _check_together("target", target, target_library, input, library)
    if weight_library is not None:
        _check_together("weight", weight, weight_library, input, library)
        weight = _native(weight)
    input, target = _native(input), _native(target)
    if library.under_autocast is not None:
        input = library.under_autocast(input)
    if len(shape) != input.ndim:
        input = of_one_element(input, 1)
    if len(given) != len(batch):
        target = of_one_element(target, len(batch))
    mode = _resolve(check_target, library, target)
    parameters = (p, margin, reduction, axis, mode, ignore_index)
    return Problem(library.namespace, library.name, input, target, weight, *parameters)


def check_parameters(reduction: str, p: Any, margin: Any) -> tuple[float, float]:
    """Check the parameters that are no arrays.

    Parameters
    ----------
    reduction, p, margin
        As in :func:`mml_arrayapi.multi_margin_loss`.

    Returns
    -------
    p, margin : float

    Raises
    ------
    TypeError, ValueError
        With the argument's name, what was given, and what is accepted.
    """
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be a string, but is {in_words(reduction)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {_listed(REDUCTIONS)}, but is {reduction!r}")
    p = _real_number("p", p)
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be a finite real number >= 1, but is {p!r}")
    margin = _real_number("margin", margin)
    if not -math.inf < margin < math.inf:
        raise ValueError(f"margin must be a finite real number, but is {margin!r}")
    return p, margin


def check_grad_output(problem: Problem, target_shape: tuple[Any, ...], grad_output: Array) -> Array:
    """Check ``grad_output`` against the loss's shape, and give it the problem's batch shape.

    Parameters
    ----------
    problem : Problem
        The checked call.
    target_shape : tuple
        The shape of ``target`` as the caller gave it.
    grad_output : array
        The gradient of something for the loss.

    Returns
    -------
    array
        ``grad_output``, of shape ``(*batch)`` or ``()``.

    Raises
    ------
    TypeError, ValueError
        Wrong shape, dtype, library or device.
    """
    wanted = tuple(target_shape) if problem.reduction == "none" else ()
    shape, library = _seen("grad_output", grad_output)
    if not same_shape(shape, wanted):
        raise ValueError(
            f"grad_output must have the loss's shape, {wanted}, but has shape {shape} "
            f"(reduction is {problem.reduction!r})"
        )
    _check_dtype("grad_output", library, grad_output, REAL)
    input_library = library_of("input", problem.input)
    _check_together("grad_output", grad_output, library, problem.input, input_library)
    grad_output = _native(grad_output)
    if problem.reduction == "none" and not same_shape(shape, problem.target.shape):
        return of_one_element(grad_output, problem.target.ndim)
    return grad_output


def of_one_element(array: Array, ndim: int) -> Array:
    """Return an array of one element with another number of axes, 0 or 1.

    By indexing: the query planner of Dask has no reshape.
    """
    return array[None] if ndim else array[0, ...]


def check_targets(problem: Problem) -> Problem:
    """Do what ``check_target`` says; for a lazy library the computation does it.

    Parameters
    ----------
    problem : Problem
        The checked call.

    Returns
    -------
    Problem
        The same.

    Raises
    ------
    InvalidTargetError
        With the first offending position.
    """
    library, target = library_of("input", problem.input), problem.target
    if problem.check_target != "raise" or library.compute is not None or 0 in target.shape:
        return problem
    n_classes, ignored = problem.input.shape[problem.axis], problem.ignore_index
    if ignored is not None or not library.in_range(target, n_classes):
        raise_invalid_target(library.on_host(target), n_classes, ignored)
    return problem


def raise_invalid_target(target: Array, n_classes: int, ignore_index: int | None = None) -> None:
    """Raise if a target is out of range. The values must be concrete.

    Parameters
    ----------
    target : array of integers
        Class indices.
    n_classes : int
        The number of classes.
    ignore_index : int, optional
        A value that is accepted all the same.

    Raises
    ------
    InvalidTargetError
        With the first offending position.
    """
    library = library_of("target", target)
    xp = library.namespace
    if 0 in target.shape:
        return
    accepted = target
    if ignore_index is not None:
        info = xp.iinfo(target.dtype)
        if info.min <= ignore_index <= info.max:
            accepted = xp.where(target == ignore_index, xp.zeros_like(target), target)
    if library.in_range(accepted, n_classes):
        return
    signed = xp.astype(accepted, widest(xp, target)[0], copy=False)
    bad = (signed < 0) | (signed >= n_classes)
    flat = int(xp.argmax(xp.astype(xp.reshape(bad, (-1,)), xp.int8)))
    value = int(xp.reshape(target, (-1,))[flat])
    position: list[int] = []
    for n in reversed(target.shape):
        flat, place = divmod(flat, n)
        position.insert(0, place)
    raise InvalidTargetError(tuple(position), value, n_classes)


def check_weight(weight: Array) -> None:
    """Check a weight whose scores are not known yet.

    Parameters
    ----------
    weight : array
        As the caller gave it.

    Raises
    ------
    TypeError, ValueError
        With what was given, and what is accepted.
    """
    shape, library = _seen_weight(weight)
    if shape[0] == 0:
        raise ValueError("weight must have one element per class, but has shape (0,)")
    _check_dtype("weight", library, weight, REAL)


def check_sample_weight(sample_weight: Array) -> None:
    """Check factors for samples, but for their shape and values.

    Parameters
    ----------
    sample_weight : array
        As the caller gave it.

    Raises
    ------
    TypeError, ValueError
        With what was given, and what is accepted.
    """
    _, library = _seen("sample_weight", sample_weight)
    if not any(_is_of_kind(library, sample_weight, kind) for kind in (REAL, INTEGER)):
        raise TypeError(
            f"sample_weight must have a real dtype, but has dtype {sample_weight.dtype}"
        )
    check_readable("sample_weight", sample_weight)


def check_readable(argument: str, array: Array) -> None:
    """Check that an array's values can be read.

    Parameters
    ----------
    argument : str
        The argument's name.
    array : array
        As the caller gave it.

    Raises
    ------
    TypeError
        No array, or one that is not accepted.
    ValueError
        The values can't be read.
    """
    if _seen(argument, array)[1].value_access(array) == TRACED:
        raise ValueError(
            f"{argument} must have values that can be read, but is being traced (jit, grad, vmap, "
            "compile) or holds none itself (meta and fake tensors, tensors that hold others)"
        )


def _seen_weight(weight: Array) -> tuple[tuple[Any, ...], Library]:
    shape, library = _seen("weight", weight)
    if len(shape) != 1:
        raise ValueError(f"weight must have shape (C,), but has shape {shape}")
    return shape, library


def _classes(shape: tuple[int, ...], axis: int) -> tuple[tuple[int, ...], int, int]:
    """Return input's shape (a 0-d input counts as one class), the axis from 0, and C."""
    shape = shape or (1,)
    # The first test is for speed: one of an abstract class takes ten times as long.
    if type(axis) is not int and not is_number(axis, numbers.Integral):
        raise TypeError(f"axis must be an integer, but is {in_words(axis)}{_static('axis', axis)}")
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"axis must lie between {-len(shape)} and {len(shape) - 1} for input of shape "
            f"{shape}, but is {in_words(axis)}"
        )
    axis = int(axis) % len(shape)
    n_classes = shape[axis]
    if n_classes == 0:
        raise ValueError(f"input must have at least one class, but has shape {shape}")
    if n_classes is None or n_classes != n_classes:  # Dask says NaN
        raise ValueError(
            f"input must have a known number of classes, but its shape {shape} is unknown at "
            f"axis {axis}"
        )
    return shape, axis, n_classes


def _check_dtype(argument: str, library: Library, array: Array, kind: str) -> None:
    if not _is_of_kind(library, array, kind):
        wanted = "a real floating dtype (float16, bfloat16, float32 or float64)"
        if kind == INTEGER:
            wanted = "an integer dtype"
        dtype = getattr(array, "dtype", None)
        raise TypeError(f"{argument} must have {wanted}, but has dtype {dtype}")


def _is_of_kind(library: Library, array: Array, kind: str) -> bool:
    """Tell whether an array's dtype is of a kind; real ones have 16, 32 or 64 bits."""
    xp = library.namespace
    dtype = getattr(array, "dtype", None)
    # Outside of the try, which would take an error of a signal's handler for the dtype's.
    if type(dtype).__hash__ is not None and library.kinds.get(dtype) == kind:
        return True
    try:
        if kind == REAL and getattr(dtype, "name", None) == "bfloat16":
            return True  # a dtype that ml_dtypes adds to NumPy, in whatever byte order
        return xp.isdtype(dtype, kind) and (kind != REAL or xp.finfo(dtype).bits in (16, 32, 64))
    except Exception:  # noqa: BLE001 (libraries have dtypes that their own isdtype() fails at)
        return False


def _native(array: Array) -> Array:
    """Return an array in the machine's byte order; NumPy also has the other."""
    dtype = array.dtype
    return array if getattr(dtype, "isnative", True) else array.astype(dtype.newbyteorder("="))


def _check_together(
    argument: str, array: Array, library: Library, input: Array, input_library: Library
) -> None:
    """Check that an array lies in the library and on the device of input."""
    if library.name != input_library.name:
        if input_library.name == "dask" and library.name == "numpy":
            return
        raise TypeError(
            f"{argument} must come from the same library as input, but {argument} is of "
            f"{library.name} and input is of {input_library.name}"
            f"{_conversion(argument, library, input_library)}"
        )
    ours, theirs = library.device_key(array), library.device_key(input)
    if ours is not None and theirs is not None and ours != theirs:
        raise TypeError(
            f"{argument} must be on the same device as input, but {argument} is on {ours} and "
            f"input is on {theirs}"
        )


def _resolve(check_target: str, library: Library, target: Array) -> str:
    """Decide whether targets out of range raise or give NaN."""
    if check_target == "nan":
        return "nan"
    value_access = library.value_access(target)
    if check_target == "auto":
        return "raise" if value_access in (HOST, LAZY) else "nan"
    if value_access == TRACED:
        raise ValueError(
            "check_target='raise' needs the values of target, but target is being traced (jit, "
            "vmap, compile, meta or fake tensors, tensors that hold others) and has none to read; "
            "accepted here are 'auto' and 'nan'"
        )
    return "raise"


def _conversion(argument: str, library: Library, input_library: Library) -> str:
    """Say how an array of NumPy, whose arrays every library takes, is converted."""
    if library.name != "numpy":
        return ""
    name = input_library.namespace.__name__.removeprefix("array_api_compat.")
    return f"; convert it by {name}.asarray({argument})"


def shape_of(argument: str, array: Array) -> tuple[Any, ...]:
    """Return an array's shape.

    Parameters
    ----------
    argument : str
        The argument's name, for the message.
    array : array
        Any object.

    Returns
    -------
    tuple

    Raises
    ------
    TypeError
        It is no array, or none that can be computed with: masked, sparse ...
    """
    return _seen(argument, array)[0]


def _seen(argument: str, array: Array) -> tuple[tuple[Any, ...], Library]:
    """Return an array's shape and its library, or raise."""
    try:
        shape = array.shape
        # No call here, in which a signal's handler might raise something else.
        if not isinstance(shape, tuple):
            shape = tuple(shape)
    except Exception:  # noqa: BLE001 (each library has its own for arrays that have no shape)
        raise TypeError(f"{argument} must be an array, but is {in_words(array)}") from None
    shape = tuple(shape)
    library = library_of(argument, array)
    if (form := library.unsupported_layout(array)) is not None:
        raise TypeError(f"{argument} must be a dense array, but is {form}")
    return shape, library


def _hint(given: tuple[Any, ...], batch: tuple[Any, ...], shape: tuple[Any, ...]) -> str:
    """Say what to do about targets of a common wrong shape."""
    if given == shape and batch:
        return "; of one-hot targets take the argmax over the classes' axis"
    if tuple(n for n in given if n != 1) == tuple(n for n in batch if n != 1):
        return f"; call target.reshape({batch})"
    return ""


def same_shape(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Compare shapes; a length that isn't known yet (None, or Dask's NaN) fits any."""
    if a == b:
        return True
    return len(a) == len(b) and all(
        m == n or m is None or n is None or m != m or n != n for m, n in zip(a, b, strict=True)
    )


def _real_number(argument: str, value: float) -> float:
    if type(value) is float:
        return value
    if type(value) is not int and not is_number(value, numbers.Real):
        raise TypeError(
            f"{argument} must be a real number, but is {in_words(value)}{_static(argument, value)}"
        )
    try:
        return float(value)
    except OverflowError:
        raise ValueError(
            f"{argument} must be a finite real number, but is too large for a float"
        ) from None


def is_number(value: object, kind: type) -> bool:
    """Tell whether a value is a number of a kind; Python counts bools, NumPy durations as numbers.

    Parameters
    ----------
    value : object
        Anything.
    kind : type
        ``numbers.Integral`` or ``numbers.Real``.

    Returns
    -------
    bool
    """
    if isinstance(value, kind):
        return not (isinstance(value, bool) or type(value).__name__ == "timedelta64")
    return _is_symbol(value, kind) or _is_traced_scalar(value, kind)


def _is_symbol(value: object, kind: type = numbers.Integral) -> bool:
    """Tell whether a value is made of the sizes that torch.export keeps as symbols."""
    names = ("SymInt",) if kind is numbers.Integral else ("SymInt", "SymFloat")
    return type(value).__name__ in names and type(value).__module__ == "torch"


def _is_traced_scalar(value: Any, kind: type) -> bool:
    """Tell whether a value may be a scalar of NumPy's: torch.compile takes these for arrays."""
    if type(value).__name__ != "ndarray" or value.shape != () or "torch" not in sys.modules:
        return False
    from mml_arrayapi.backends.pytorch.state import is_compiling

    return is_compiling() and is_number(value.item(), kind)


def _static(argument: str, value: object) -> str:
    """Say how a number that JAX traces, or holds in an array, can be given as one."""
    if not type(value).__module__.startswith("jax"):
        return ""
    if type(value).__name__ == "_DimExpr":
        return "; a size that is exported as a symbol has no value yet"
    convert = "int()" if argument in ("ignore_index", "axis") else "float()"
    return (
        f"; under jax.jit name it in static_argnames=({argument!r},), else call {convert}; the "
        f"loss can't be differentiated by it"
    )


def in_words(value: object) -> str:
    """Show a value and its type, shortened, whatever it is.

    Parameters
    ----------
    value : object
        Anything.

    Returns
    -------
    str
    """
    try:
        shown = " ".join(repr(value).split())
    except Exception:  # noqa: BLE001 (an object need not have a repr() that works)
        shown = "an object"
    shown = shown if len(shown) <= SHOWN else f"{shown[: SHOWN - 3]}..."
    return f"{shown} of type {type(value).__name__}"


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
