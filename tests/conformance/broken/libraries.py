"""Array libraries with one part broken each."""

import array_api_compat.numpy as np

from tests.conformance.broken.arrays import (
    Array,
    ComputingArray,
    LazyArray,
    Namespace,
    ReadableArray,
)


def _narrow_targets(x, dtype, **keywords):
    if np.isdtype(x.dtype, "integral") and dtype == np.int64:
        return np.astype(np.astype(x, np.int32), dtype)
    return np.astype(x, dtype, **keywords)


def _sum_one_by_one(x, axis=None, dtype=None, keepdims=False):
    if axis is None or x.shape[axis] == 0:
        return _sum_one_by_one(np.reshape(x, (-1,)), 0, dtype) if x.size else np.sum(x, dtype=dtype)
    x = np.cumsum(x, axis=axis, dtype=np.float32)
    last = np.take(x, [x.shape[axis] - 1], axis=axis)
    return np.astype(last if keepdims else np.squeeze(last, axis=axis), dtype or x.dtype)


def _sum_in_float16(x, axis=None, dtype=None, keepdims=False):
    total = np.sum(np.astype(x, np.float16), axis=axis, keepdims=keepdims)
    return np.astype(np.asarray(total), dtype or x.dtype)


def _where_into_its_argument(condition, x, y):
    if x.shape == condition.shape and x.flags.writeable:
        np.copyto(x, y, where=~condition)
        return x
    return np.where(condition, x, y)


def _power_of_integers(x, exponent):
    return x ** round(exponent)


def _zero_is_not_zero(x, y):
    return (x != y) | (x == 0)


def arange_from_1(stop, dtype=None):
    return np.arange(1, stop + 1, dtype=dtype)


def _where_on_the_gpu(condition, x, y):
    return Array(np.where(condition, x, y), ON_ANOTHER_DEVICE, "gpu")


def _astype_to_float64(x, dtype, **keywords):
    wider = np.float64 if dtype in (np.float16, np.float32) else dtype
    return np.astype(x, wider, **keywords)


def _sum_without_nan(x, axis=None, dtype=None, keepdims=False):
    return np.sum(np.where(np.isnan(x), 0, x), axis=axis, dtype=dtype, keepdims=keepdims)


ON_ANOTHER_DEVICE = Namespace("where_on_the_gpu", where=_where_on_the_gpu)

# A library -> the check that must find what is wrong with it, and the dtype.
LIBRARIES = {
    Namespace("finds_no_nan", isnan=lambda x: np.zeros(x.shape, dtype=bool)): (
        "nan score makes its loss and gradient row nan", "float32"),
    Namespace("sums_without_nan", sum=_sum_without_nan): (
        "nan score makes its loss and gradient row nan", "float32"),
    Namespace("sums_in_float16", sum=_sum_in_float16): ("golden vectors agree", "float32"),
    Namespace("sums_one_by_one", sum=_sum_one_by_one): (
        "sums over the batch are accurate", "float32"),
    Namespace("narrows_integers", astype=_narrow_targets): (
        "check target nan makes nan of that sample", "float32"),
    Namespace("converts_to_float64", astype=_astype_to_float64): (
        "results have the dtype of input", "float32"),
    Namespace("writes_into_arguments", where=_where_into_its_argument): (
        "inputs are not changed", "float32"),
    Namespace("rounds_exponents", pow=_power_of_integers): (
        "p is any real number from 1", "float32"),
    Namespace("zero_is_not_zero", ne=_zero_is_not_zero): (
        "gradient is 0 at the kink", "float32"),
    Namespace("counts_from_1", arange=arange_from_1): ("golden vectors agree", "float32"),
    ON_ANOTHER_DEVICE: ("results are on the device of input", "float32"),
}  # fmt: skip

SOUND = Namespace("sound")
READABLE = Namespace("sound", ReadableArray)  # accumulators want to read
LAZY = Namespace("lazy", LazyArray)
EAGER_TO_COMPUTE = Namespace("eager_to_compute", ComputingArray)
WITHOUT_ANY = Namespace("without_any", any=None)
WITHOUT_ISNAN = Namespace("without_isnan", isnan=None)
