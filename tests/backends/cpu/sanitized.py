"""What test_sanitizers.py runs under sanitizers: every type, exponent and layout on exact buffers."""

import importlib.util
import itertools
import sys

import numpy as np

spec = importlib.util.spec_from_file_location("_baseline", sys.argv[1])
native = importlib.util.module_from_spec(spec)
spec.loader.exec_module(native)
native.accept((np.ndarray,), None, np.empty, (np.float64, np.float32, np.float16))
native.set_limit(lambda _: 3)
rng = np.random.default_rng(0)
LAYOUTS = (
    np.ascontiguousarray,
    np.asfortranarray,
    lambda x: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    lambda x: np.repeat(x, 3, 1)[:, ::3],
)
count = 0
for dtype, p, (n, c), layout in itertools.product(
    ("f8", "f4", "f2"),
    (1, 2, 1.5),
    ((1, 1), (3, 2), (9, 7), (70, 8), (65, 9), (20, 15), (5, 16), (6, 33), (3, 1001), (0, 4)),
    LAYOUTS,
):
    x, y = layout(rng.normal(size=(n, c)).astype(dtype)), rng.integers(0, c, n).astype("i1")
    weight = rng.random(c)
    rows = [np.empty(n, kind) for kind in ("u1", "i4", "i8")]
    stands = (np.empty((n, min(c, 3)), np.int64), *rows)
    given = (np.empty(n, dtype), stands, 0.5)
    side_by_side = np.ascontiguousarray(x)
    stood = native.standings(side_by_side, y, None, (p, 0.5, "none", None, -1, "nan"), *given)
    assert (stood is None) == bool((y < 0).any())
    for reduction, given in itertools.product(("none", "mean"), (None, weight)):
        how, grad = (p, 0.5, reduction, 3, -1, "nan"), np.empty_like(x)
        loss = native.loss_and_grad(x, y, given, how, grad)
        assert np.array_equal(loss, native.loss(x, y, given, how), equal_nan=True)
        if p == 1:
            bits, again = np.empty(native.row_bytes(x, how) * n, np.uint8), np.empty_like(x)
            native.loss(x, y, given, how, None, bits)
            native.grad(x, y, given, how, again, None, bits)
            assert np.array_equal(grad, again, equal_nan=True)
        count += 1
for dtype, p, sizes, layout in itertools.product(
    ("f8", "f4", "f2"), (1, 2), ((1, 2), (7, 8, 9), (33, 16), (1001, 3)), LAYOUTS
):
    pieces = tuple(layout(rng.normal(size=(70, c)).astype(dtype)) for c in sizes)
    y, how = rng.integers(0, sum(sizes), 70), (p, 0.5, "none", 3, -1, "nan")
    whole = native.loss(np.concatenate(pieces, 1), y, None, how)
    assert np.array_equal(native.loss(pieces, y, None, how), whole)
x, y = rng.normal(size=(5000, 100)).astype("f4"), rng.integers(0, 100, 5000)
for _ in range(20):  # on three threads
    native.loss_and_grad(x, y, None, (2, 1.0, "mean", None, -1, "auto"), np.empty_like(x))
for dtype in ("f8", "f4"):
    values = rng.normal(size=300).astype(dtype)
    values[:9] = (
        np.finfo(dtype).max,
        -np.finfo(dtype).max,
        *[np.finfo(dtype).smallest_subnormal] * 7,
    )
    assert native.exact_sums(values, np.arange(300) % 7, np.empty((7, 70), "u4")) is not None
print("served", count)
