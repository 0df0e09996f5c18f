"""The smallest array library: lists of numbers with a shape and a dtype, and a namespace."""

import math
import sys

float64, int64 = "float64", "int64"


class Array:
    def __init__(self, values, shape, dtype):
        self.values, self.shape, self.dtype = values, shape, dtype
        self.ndim = len(shape)

    def __array_namespace__(self, *, api_version=None):
        return sys.modules[__name__]

    def __float__(self):
        return float(self.values[0])


def asarray(values):
    rows = values if isinstance(values[0], list) else None
    flat = [v for row in rows for v in row] if rows else list(values)
    shape = (len(rows), len(rows[0])) if rows else (len(flat),)
    return Array(flat, shape, int64 if all(isinstance(v, int) for v in flat) else float64)


def isdtype(dtype, kind):
    return {"real floating": float64, "integral": int64}[kind] == dtype


class finfo:
    bits = 64

    def __init__(self, dtype):
        assert dtype == float64


nan = math.nan
