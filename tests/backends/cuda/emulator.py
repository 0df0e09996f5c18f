"""Run the CUDA source on a CPU: compile it with g++ under simt.h, launch, compare with float64.

As a program, ``python -m tests.backends.cuda.emulator LIBRARY SCALAR PART PARTS P...`` runs cases on
a compiled library and exits with 1 at the first that is wrong. The tests start it so with AddressSanitizer preloaded,
which a library loaded into an ordinary Python could not use.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.backends.cuda.plan import Plan
from tests.reference import losses_and_grad

HERE = Path(__file__).parent
DTYPES = {64: np.float64, 32: np.float32, 16: np.float16, 17: ml_dtypes.bfloat16}
HALF_ULP = {64: 1e-15, 32: 2**-24, 16: 2**-11, 17: 2**-8}
SMALLEST = {64: 0.0, 32: 2.0**-149, 16: 2.0**-24, 17: 2.0**-133}
# Every element type and power is checked, those in SANITIZED with AddressSanitizer and UBSan.
VARIANTS = [(scalar, power) for scalar in (32, 16, 17, 64) for power in (1, 2, 0)]
SANITIZED = [(64, 1), (16, 0), (17, 1)]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O0")

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


def build(folder: Path, scalar: int, power: int, text: str, flags: tuple[str, ...] = ()) -> Path:
    """Compile the source text for one element type and power; return the library's path."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"kernels_{scalar}_{power}.cpp"
    source.write_text(text)
    library = source.with_suffix(".so")
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
    command += ["-Wno-unknown-pragmas", *flags, f"-DSCALAR={scalar}", f"-DPOWER={power}"]
    command += ["-include", str(HERE / "simt.h"), str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return library


class Machine:
    """A compiled library that carries out launches."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library))

    def launch(self, plan: Plan, addresses: tuple[int, ...], backwards: bool = False) -> None:
        packed = cuda_plan.pack(addresses, plan)
        for step in plan.launches:
            kernel = getattr(self.library, step.name)
            wrong = kernel(step.grid, step.block, step.shared, packed, int(backwards))
            if wrong:
                raise AssertionError(f"{step.name}: threads wait for others that never come")


class Memory:
    """Arrays with nothing before and behind them, so that AddressSanitizer sees every overrun."""

    def __init__(self) -> None:
        self.addresses: list[int] = []

    def array(self, shape: Any, dtype: Any, fill: Any = None, skip: int = 0) -> np.ndarray:
        """Allocate an array that begins ``skip`` elements behind a 16-byte boundary."""
        dtype = np.dtype(dtype)
        size = (int(np.prod(shape)) + skip) * dtype.itemsize
        address = libc.malloc(max(size, 1))
        self.addresses.append(address)
        raw = np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8)
        raw[...] = 0xA5  # a result that nobody writes is not mistaken for one
        array = raw.view(dtype)[skip:].reshape(shape)
        if fill is not None:
            array[...] = fill
        return array

    def close(self) -> None:
        for address in self.addresses:
            libc.free(address)


@dataclass(frozen=True)
class Case:
    rows: int
    classes: int
    reduction: str = "mean"
    weight: str | None = None  # "own": of the scores' type, "wide": of the computing precision
    target: str = "int64"
    target_stride: int = 1
    bad: tuple[tuple[int, int], ...] = ()  # (row, target): out of range
    special: tuple[tuple[int, int, float], ...] = ()  # (row, class or -1 for the target's, score)
    pad: int = 0  # elements between rows
    skip: int = 0  # elements before the first row
    margin: float = 1.0
    ignore_index: int | None = None
    ignored: tuple[int, ...] = ()  # rows whose target is ignore_index
    weights: tuple[tuple[int, float], ...] = ()  # (row, the weight of its target's class)
    scale: float = 1.0  # of the scores
    low_target: bool = False  # the target's score is minus the scale, the others are 0 or 1
    grid: int | None = None  # instead of the geometry's own
    multiprocessors: int = 1  # few long rows are split over these
    upstream: str | None = "own"
    upstreams: tuple[tuple[int, float], ...] = ()  # (row, the gradient for its loss)
    exact: bool = True  # scores are multiples of 1/8
    large: bool = False  # scores beside which the margin is less than a digit
    seed: int = 0


def cases(scalar: int) -> Iterator[Case]:
    v = 16 // cuda_plan.ITEMSIZE[scalar]
    wide = cuda_plan.WIDE_VECTORS * v
    for i, classes in enumerate((1, 2, 3, 10, 16, 31, 32, 33, 64, 100, 8 * v + 3)):
        rows = (300, 33, 5, 131)[i % 4]
        reduction = ("mean", "none", "sum")[i % 3]
        weight = (None, "own", "wide")[i % 3]
        yield Case(rows, classes, reduction, weight, grid=(None, 2)[i % 2], seed=i)
        skip = i % (v - 1) + 1 if v > 1 else 0
        yield Case(rows // 4 + 1, classes, reduction, skip=skip, pad=i % 5, seed=i + 20)
    for classes in (1000, 1027, 40 * 8 * v - 1):
        yield Case(5, classes, weight="wide", grid=1)
        yield Case(3, classes, "none", pad=v, skip=v - 1, exact=False)
    if scalar in (32, 64):
        for classes in (7, 40, 83):
            yield Case(3, classes, "none", large=True)
    yield Case(3, wide, weight="own", grid=2)
    yield Case(2, wide + v // 2 + 1, "none", upstream=None)
    yield Case(4, 2 * wide + 5, "sum", pad=1, skip=1, exact=False, grid=3)
    yield Case(1, 9 * wide + 1, exact=False)
    for rows, classes, many in ((3, 5 * wide, 2), (2, 9 * wide + 5, 5), (1, 4 * wide + 1, 99)):
        yield Case(rows, classes, weight="own", multiprocessors=many)
        yield Case(rows, classes, "none", multiprocessors=many, skip=1, pad=3)
        yield Case(rows, classes, "sum", multiprocessors=many, special=((0, 9, np.nan),))
        yield Case(rows, classes, multiprocessors=many, bad=((rows - 1, -1),), ignore_index=5)
        yield Case(rows, classes, multiprocessors=many, ignore_index=-100, ignored=(0,), grid=2)
    for reduction in ("none", "mean", "sum"):
        yield Case(0, 5, reduction)
        yield Case(0, 100, reduction)
        yield Case(0, wide, reduction)
    yield Case(300, 10, skip=1, grid=1)  # a warp's tiles come in by elements and leave by vectors
    for classes in (7, 40, wide):
        yield from _faults(scalar, classes)
        yield Case(5, classes, margin=-0.5)
        yield Case(3, classes, "none", upstream="broadcast", target="uint8", target_stride=3)
        yield Case(3, classes, target="int16", upstream=None, target_stride=2)
        yield Case(3, classes, "sum", target="uint32", upstream="wide")
        rows = 4 if classes == wide else 40
        for target, value in (
            ("int64", 2**32),
            ("int64", -1),
            ("uint64", 2**64 - 1),
            ("uint32", 2**32 - 1),
            ("int32", -(2**31)),
            ("int16", -3),
            ("uint16", 2**16 - 1),
            ("int8", -128),
            ("int64", classes),
        ):
            bad = ((rows - 3, value), (rows - 1, value))
            yield Case(rows, classes, "none", target=target, bad=bad)
        yield Case(rows, classes, "sum", target="uint8", bad=((2, 255),) if classes < 255 else ())
        for j in (0, classes // 2, classes - 1, -1):
            for score in (np.nan, np.inf, -np.inf):
                yield Case(3, classes, "none", special=((1, j, score),))
        yield Case(2, classes, "none", special=((1, -1, -np.inf), (1, 0, -np.inf)), seed=3)
        yield Case(2, classes, "none", special=((1, -1, np.inf), (1, 1, np.inf)), seed=4)


def tile_cases(scalar: int, classes: int) -> Iterator[Case]:
    """Return cases with one small number of classes."""
    for i, reduction in enumerate(("none", "mean", "sum")):
        yield Case(300, classes, reduction, "wide", grid=2, seed=i)
        yield Case(33, classes, reduction, skip=1, pad=i, upstream="wide", seed=i)
        yield Case(97, classes, reduction, target="uint16", bad=((40, 60000),), seed=i)
        yield Case(40, classes, reduction, special=((3, -1, np.nan), (4, 0, np.inf)), seed=i)
    yield Case(0, classes)
    yield from _faults(scalar, classes)


def _faults(scalar: int, classes: int) -> Iterator[Case]:
    """Ignored rows, sums that leave the computing precision, rows that are NaN by a weight."""
    for reduction in ("none", "mean", "sum") if classes < 100 else ("mean",):
        for target, index in (("int64", -100), ("int64", 3), ("uint8", 255), ("uint64", 2**64 - 1)):
            yield Case(9, classes, reduction, target=target, ignore_index=index, ignored=(0, 5, 8))
        yield Case(4, classes, reduction, "own", ignore_index=-1, ignored=(0, 1, 2, 3))
        yield Case(4, classes, reduction, ignore_index=-1, ignored=(2,), special=((2, 0, np.nan),))
        yield Case(4, classes, reduction, target="uint8", ignore_index=-1)  # matches nothing
        yield Case(4, classes, reduction, ignore_index=2**70)
        largest = float(ml_dtypes.finfo(DTYPES[scalar]).max)
        yield Case(5, classes, reduction, scale=largest / 4, low_target=True)
        yield Case(
            5, classes, reduction, "own", weights=((1, 0.0),), scale=largest / 4,
            low_target=True,
        )  # fmt: skip
        for value in (np.nan, np.inf, 0.0):
            yield Case(3, classes, reduction, "wide", weights=((1, value),))
            yield Case(
                4, classes, "none", margin=-2, upstreams=((1, value), (2, value), (3, value)),
                ignore_index=-1, ignored=(2,),
            )  # fmt: skip
        yield Case(
            3,
            classes,
            reduction,
            "own",
            weights=((1, 0.0),),
            special=((1, classes - 1, np.inf),),
            seed=2,
        )
    if scalar != 64:
        for margin in (1e39, -1e39, 1e300, -1e300):
            yield Case(3, classes, "none", margin=margin)
            yield Case(1, classes, margin=margin)
            # Scores whose difference is infinite too, with the sign that isn't the margin's.
            own = math.copysign(largest, margin)
            special = ((0, 0, -own), (0, -1, own), (1, classes - 1, -own), (1, -1, own))
            yield Case(3, classes, "none", margin=margin, special=special)


def close(
    what: str, got: np.ndarray, wanted: np.ndarray, scalar: int, loose: float, absolute: float = 0.0
) -> None:
    """Compare: one rounding to the element type, and ``loose`` for the arithmetic before it."""
    got = got.astype(np.float64)
    largest = float(ml_dtypes.finfo(DTYPES[scalar]).max)
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = np.where(
            np.abs(wanted) > largest * (1 + HALF_ULP[scalar]), np.sign(wanted) * np.inf, wanted
        )
        error = np.abs(got - wanted)
        bound = (HALF_ULP[scalar] + loose) * np.abs(wanted) + SMALLEST[scalar] + absolute
        same = (got == wanted) | (np.isnan(got) & np.isnan(wanted)) | (error <= bound)
    if not same.all():
        where = tuple(int(i) for i in np.argwhere(~same)[0])
        raise AssertionError(f"{what}{list(where)} is {got[where]}, not {wanted[where]}")


def geometry_of(scalar: int, case: Case) -> cuda_plan.Geometry:
    shape = cuda_plan.geometry(scalar, case.rows, case.classes, case.multiprocessors)
    return shape if case.grid is None else shape._replace(grid=case.grid)


def check(machine: Machine, scalar: int, p: float, case: Case, backwards: bool) -> None:
    """Run every operation on a case, and compare with the reference."""
    if p > 1 and case.scale > 1 and case.weights:
        return  # 0 times a power that is infinite in the computing precision alone
    memory = Memory()
    try:
        _check(machine, scalar, p, case, backwards, memory)
    except AssertionError as error:
        raise AssertionError(f"{error}\n  {case}, p={p}, scalar={scalar}") from None
    finally:
        memory.close()


def _check(
    machine: Machine, scalar: int, p: float, case: Case, backwards: bool, memory: Memory
) -> None:
    random = np.random.default_rng(case.seed)
    dtype, real = DTYPES[scalar], np.float64 if scalar == 64 else np.float32
    rows, classes, stride = case.rows, case.classes, case.classes + case.pad
    # The last row has no padding behind it.
    extent = (rows - 1) * stride + classes if rows else 0
    data = memory.array(extent, dtype, skip=case.skip)
    scores = np.lib.stride_tricks.as_strided(
        data, (rows, classes), (stride * data.itemsize, data.itemsize)
    )
    drawn = random.standard_normal((rows, classes)) * 2
    scores[...] = np.round(drawn * 8) / 8 if case.exact else drawn
    if case.large:
        scores[...] = np.round(drawn) * 2 + 2.0 ** (53 if scalar == 64 else 24)
    target = [int(y) for y in random.integers(0, min(classes, 100), rows)]
    target = [(y + 1) % classes if y == case.ignore_index else y for y in target]
    for i, j, value in case.special:
        scores[i, target[i] if j < 0 else j] = value
    for i, value in (*case.bad, *((i, case.ignore_index) for i in case.ignored)):
        target[i] = value
    if case.low_target:
        scores[...] = random.integers(0, 2, (rows, classes))
        scores[np.arange(rows), target] = -1
    scores[...] *= dtype(case.scale)
    targets = memory.array((max(rows * case.target_stride, 1),), case.target, 0)
    targets[: rows * case.target_stride : case.target_stride] = np.asarray(target, case.target)
    weight = None
    if case.weight:
        weight = memory.array((classes,), dtype if case.weight == "own" else real)
        weight[...] = random.standard_normal(classes)
        for i, value in case.weights:
            weight[target[i]] = value

    upstream, given, stride_of_it = _upstream(memory, random, case, dtype, real)
    call = cuda_plan.Call(
        scalar, rows, classes, stride, case.target_stride,
        np.dtype(case.target).itemsize * (1 if case.target.startswith("int") else -1),
        case.weight == "wide", stride_of_it, case.upstream == "wide", data.ctypes.data % 16 == 0,
        p, case.margin, case.reduction, case.ignore_index, case.multiprocessors,
    )  # fmt: skip
    shape = geometry_of(scalar, case)

    kept = rows - len(case.ignored)
    per_row = upstream / kept if case.reduction == "mean" and kept else upstream
    beyond = abs(case.margin) > float(np.finfo(real).max)
    margin = case.margin * math.inf if beyond else case.margin
    losses, grads = losses_and_grad(
        scores, target, p=p, margin=margin, weight=weight, ignore_index=case.ignore_index
    )
    with np.errstate(invalid="ignore"):  # no class is active: 0, even times infinity
        idle = (grads == 0) & ~np.isnan(per_row[:, None])
        idle[list(case.ignored)] = True
        grads = np.where(idle, 0, grads * per_row[:, None])
    wanted = losses
    with np.errstate(over="ignore", invalid="ignore"):
        if case.reduction == "sum":
            wanted = np.sum(losses, keepdims=True)
        elif case.reduction == "mean":
            wanted = np.sum(losses / kept, keepdims=True) if kept else np.array([np.nan])
    loose = 4e-15 if scalar == 64 else 1e-6
    # Where x_j - x_y + margin itself is rounded, an element near the kink has few digits left.
    near_kink = 0.0 if case.exact or not rows else loose * float(np.max(np.abs(grads)))
    if weight is not None and case.reduction != "none":
        loose *= 100  # weights of both signs: terms cancel
    first_bad = min((i for i, _ in case.bad), default=cuda_plan.FAR)

    inputs = {"scores": data, "target": targets, "weight": weight, "upstream": given}
    operations = ["loss", "loss_grad", "grad"] + ["loss_mask"] * (p == 1)
    for operation in operations:
        plan = cuda_plan.make_plan(call, operation, shape)
        loss = memory.array(rows if case.reduction == "none" else 1, dtype)
        grad = memory.array((rows, classes), dtype)
        flag = memory.array(1, np.int64, cuda_plan.FAR)
        buffers = {
            "loss": loss,
            "scratch": memory.array(plan.scratch, np.float64),
            "mask": memory.array(plan.mask, np.uint8),
            "grad": grad,
            "flag": flag,
        }
        if operation == "grad":
            del buffers["loss"]
        machine.launch(plan, _addresses(inputs | buffers), backwards)
        if operation != "grad":
            close("loss", loss, wanted, scalar, loose)
        assert int(flag[0]) == first_bad, f"flag is {flag[0]}, not {first_bad}"
        if operation == "loss_mask":
            plan = cuda_plan.make_plan(call, "grad_mask", shape)
            again = {
                "scores": None,
                "scratch": memory.array(plan.scratch, np.float64),
                "mask": buffers["mask"],
                "grad": grad,
            }
            machine.launch(plan, _addresses(inputs | again), backwards)
        if operation != "loss":
            close("grad", grad, grads, scalar, loose, near_kink)


def _addresses(arrays: dict[str, np.ndarray | None]) -> tuple[int, ...]:
    found = (arrays.get(name) for name in cuda_plan.ADDRESSES)
    return tuple(0 if a is None or not a.size else a.ctypes.data for a in found)


def _upstream(
    memory: Memory, random: np.random.Generator, case: Case, dtype: Any, real: Any
) -> tuple[np.ndarray, np.ndarray | None, int]:
    """The gradient for the loss: in float64 per row, as the array that is passed, its stride."""
    if case.upstream is None:
        return np.ones(case.rows), None, 0
    each = case.reduction == "none" and case.upstream == "own"
    kind = real if case.upstream == "wide" else dtype
    values = memory.array(max(case.rows, 1) if each else 1, kind)
    values[...] = random.standard_normal(values.shape)
    for i, value in case.upstreams:
        values[i] = value
    per_row = np.broadcast_to(values.astype(np.float64), (max(case.rows, 1),))[: case.rows]
    return per_row, values, int(each)


def run(
    machine: Machine,
    scalar: int,
    powers: tuple[float, ...],
    part: int = 0,
    parts: int = 1,
    kernels: str | None = None,
) -> int:
    """Check every ``parts``-th case, beginning with number ``part``, for each power in turn.

    With ``kernels``, only the cases that these kernels serve.
    """
    chosen = [
        case for case in cases(scalar) if kernels in (None, geometry_of(scalar, case).kernels)
    ][part::parts]
    for p, (i, case) in itertools.product(powers, enumerate(chosen)):
        check(machine, scalar, p, replace(case, seed=case.seed + 100 * int(p)), bool(i % 2))
    return len(powers) * len(chosen)


if __name__ == "__main__":
    library, scalar, *powers = sys.argv[1:]
    number = run(Machine(Path(library)), int(scalar), tuple(map(float, powers)))
    print(f"{number} cases")
