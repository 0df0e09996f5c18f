"""A small array API library on top of NumPy, made so that single parts of it can be broken."""

import operator
from types import ModuleType

import array_api_compat.numpy as np

_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "lt", "le", "gt", "ge",
              "eq", "ne", "and_", "or_", "xor")  # fmt: skip
_FUNCTIONS = ("any", "all", "argmax", "astype", "broadcast_to", "expand_dims", "isnan", "max", "min",
              "ones_like", "permute_dims", "reshape", "squeeze", "stack", "sum", "where",
              "full_like", "zeros_like")  # fmt: skip
_CREATION = ("arange", "asarray", "full", "ones", "zeros")
_CONSTANTS = ("bool", "float32", "float64", "float16", "int8", "int16", "int32", "int64", "uint8",
              "uint16", "uint32", "uint64", "complex64", "complex128", "isdtype", "finfo", "iinfo",
              "__array_namespace_info__")  # fmt: skip


class Array:
    """A NumPy array, ``a``, in a namespace and on a device."""

    def __init__(self, a, xp, device="cpu"):
        self.a, self.xp, self.device = a, xp, device

    def __array_namespace__(self, api_version=None):
        return self.xp

    dtype = property(lambda self: self.a.dtype)
    shape = property(lambda self: self.a.shape)
    ndim = property(lambda self: self.a.ndim)
    size = property(lambda self: self.a.size)
    flags = property(lambda self: self.a.flags)

    def tolist(self):
        return self.a.tolist()

    def __getitem__(self, place):
        return type(self)(np.asarray(self.a[place]), self.xp, self.device)

    def __bool__(self):
        return bool(self.a)

    def __int__(self):
        return int(self.a)

    def __float__(self):
        return float(self.a)

    def __index__(self):
        return self.a.__index__()

    def __invert__(self):
        return type(self)(~self.a, self.xp, self.device)

    def __neg__(self):
        return type(self)(-self.a, self.xp, self.device)


def _operator(name):
    function = getattr(operator, name)
    bare = name.rstrip("_")

    def forward(self, other):
        return self.xp.call(self.xp.changes.get(name, function), self, other)

    def reflected(self, other):
        return self.xp.call(self.xp.changes.get(name, function), other, self)

    setattr(Array, f"__{bare}__", forward)
    setattr(Array, f"__r{bare}__", reflected)


for _name in _OPERATORS:
    _operator(_name)
Array.__hash__ = object.__hash__


class ReadableArray(Array):
    """One that NumPy can read, as accumulators must."""

    def __array__(self, dtype=None, copy=None):
        return self.a


class LazyArray(Array):
    """The same, but its values can be had by ``compute()`` only."""

    def _no_value(self, *_):
        raise TypeError("the values of a lazy array are not known yet")

    __bool__ = __int__ = __float__ = __index__ = _no_value

    def compute(self):
        return Array(self.a, self.xp, self.device)


class ComputingArray(Array):
    """A lazy array that computes whenever its value is needed, as Dask's and Cubed's do."""

    def compute(self):
        return Array(self.a, self.xp, self.device)


class Namespace(ModuleType):
    """An array API namespace.

    ``changes`` replaces functions by name: each new one takes and returns NumPy arrays. A function
    replaced by None is missing. Operators go by their names in the module ``operator``.
    """

    def __init__(self, name, kind=Array, **changes):
        super().__init__(name)
        self.kind, self.changes = kind, changes
        for constant in _CONSTANTS:
            setattr(self, constant, getattr(np, constant))
        for function in (*_FUNCTIONS, *_CREATION):
            chosen = changes.get(function, getattr(np, function))
            if chosen is not None:
                setattr(self, function, self._wrapped(chosen))

    def _wrapped(self, function):
        return lambda *args, **keywords: self.call(function, *args, **keywords)

    def call(self, function, *args, **keywords):
        """Call a function of NumPy arrays with arrays of ours."""
        device = keywords.get("device") or next(
            (a.device for a in args if isinstance(a, Array)), "cpu"
        )
        result = function(
            *map(_bare, args), **{k: _bare(v) for k, v in keywords.items() if k != "device"}
        )
        if isinstance(result, Array):  # a change that says the device, or the kind, itself
            return result
        return self.kind(np.asarray(result), self, device)


def _bare(value):
    return value.a if isinstance(value, Array) else value
