"""The CUDA source under the SIMT emulator: every variant, sanitizers, and mutants of the source."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mml_arrayapi.backends.cuda import plan as cuda_plan

emulator = pytest.importorskip(
    "tests.backends.cuda.emulator", reason="the emulator needs ml_dtypes"
)

ROOT = Path(__file__).parents[3]
POWERS = {1: (1.0,), 2: (2.0,), 0: (1.5, 3.0)}

# What is changed, the text, its replacement, the kernels that show it. Each text stands in the
# source exactly once.
MUTANTS = [
    (
        "block sum without its first barrier",
        "= (double)value;\n    __syncthreads();",
        "= (double)value;",
        "wide",
    ),
    (
        "block sum without its second barrier",
        "    __syncthreads();  // before shared is used again\n",
        "",
        "wide",
    ),
    (
        "tile read before it is whole",
        "tile_load(a, first, here * classes, tile);\n            __syncwarp();",
        "tile_load(a, first, here * classes, tile);",
        "tiles",
    ),
    (
        "tile stored before it is whole",
        "        __syncwarp();\n        if (OP == LOSS_GRAD ||",
        "        if (OP == LOSS_GRAD ||",
        "tiles",
    ),
    (
        "tile overwritten while it is stored",
        "here * classes, tile, classes);\n            __syncwarp();\n        }\n    }",
        "here * classes, tile, classes);\n        }\n    }",
        "tiles",
    ),
    ("dropped tail", "r.edges = classes - r.body * V +", "r.edges = r.head +", "rows"),
    (
        "dropped tail of a tile's load",
        "i < n; i += 32)\n",
        "i < n - n % PIECE; i += 32)\n",
        "tiles",
    ),
    (
        "dropped tail of a tile's store",
        "i < n; i += 32) to[i]",
        "i < n - n % V; i += 32) to[i]",
        "tiles",
    ),
    (
        "mask off by one bit",
        "% UNIT_VECTORS) * V + e) & 1",
        "% UNIT_VECTORS) * V + e + 1) & 1",
        "rows",
    ),
    (
        "mask off by one unit",
        "bits[u] = mask[start / UNIT_VECTORS + u * lanes];",
        "bits[u] = mask[start / UNIT_VECTORS];",
        "rows",
    ),
    ("edge's mask off by one bit", "edge_bits >> edge & 1", "edge_bits >> (edge + 1) & 1", "rows"),
    (
        "edges' bits of one lane alone",
        "bits = lane_sum(bits, lanes < 32 ? lanes : 32);",
        "",
        "rows",
    ),
    (
        "target's vector not left out",
        "if (k >= end || k == r.own) continue;\n                Real z",
        "if (k >= end) continue;\n                Real z",
        "rows",
    ),
    (
        "target's vector not among the edges",
        "r.body * V + (r.own < r.body ? V : 0)",
        "r.body * V",
        "rows",
    ),
    ("target's class not left out of the edges", "if ((int)j == r.y) z = -1;", "", "rows"),
    ("target's class not left out of a tile", "if (j == y) z = -1;", "", "tiles"),
    ("active at the kink", "return !(z <= 0);", "return !(z < 0);", "rows"),
    ("NaN dropped", "return !(z <= 0);", "return z > 0;", "rows"),
    ("margin lost", "(z[e] - r.pivot) + a.margin", "z[e] + (a.margin - r.pivot)", "rows"),
    (
        "narrowed before the check",
        "y < 0 || y >= a.classes",
        "(int)y < 0 || (int)y >= a.classes",
        "rows",
    ),
    (
        "range looked at before the ignored",
        "if (a.ignoring && y ==",
        "if (a.ignoring && y >= 0 && y < a.classes && y ==",
        "rows",
    ),
    ("grid too small not strided", "first += stride, part += stride", "first += parts", "rows"),
    ("bad target not reported", "if (r.y == BAD && a.flag) atomicMin(a.flag, r.row);", "", "rows"),
    ("weight forgotten", "scale *= load_weight(a, y);", "", "rows"),
    (
        "ignored rows counted",
        "kept += class_of(a, load_target(a, row)) != IGNORED;",
        "kept += 1;",
        "rows",
    ),
    (
        "ignored row's gradient left as it was",
        "else if (r.y == IGNORED) fill_row(a, r, to_scalar(0));",
        "",
        "rows",
    ),
    (
        "gradient left where the weight is NaN",
        "loss != loss || (OP == LOSS_GRAD && r.y >= 0 && r.scale != r.scale)",
        "sums.loss != sums.loss",
        "rows",
    ),
    (
        "gradient left where the upstream gradient is NaN",
        "loss != loss || (OP == LOSS_GRAD && r.y >= 0 && r.scale != r.scale)",
        "loss != loss",
        "rows",
    ),
    (
        "bits kept where the upstream gradient is NaN",
        "count == NO_VALUE || (r.y >= 0 && r.scale != r.scale)",
        "count == NO_VALUE",
        "rows",
    ),
    (
        "a tile's gradient left where the weight is NaN",
        "loss != loss || (OP == LOSS_GRAD && y >= 0 && scale != scale)",
        "total != total",
        "tiles",
    ),
    (
        "a tile's gradient left where the upstream gradient is NaN",
        "loss != loss || (OP == LOSS_GRAD && y >= 0 && scale != scale)",
        "loss != loss",
        "tiles",
    ),
    (
        "a tile's bits kept where the upstream gradient is NaN",
        "bits == TILE_NO_VALUE || (y >= 0 && scale != scale)",
        "bits == TILE_NO_VALUE",
        "tiles",
    ),
    ("an overflowing sum kept", "if (infinite) sums.loss = again.loss;", "", "rows"),
    (
        "a tile's overflowing sum kept",
        "if (infinite && y >= 0) {",
        "if (infinite && y < 0) {",
        "tiles",
    ),
    (
        "sums made again without the edges",
        "edges && edge < r.edges",
        "!edges && edge < r.edges",
        "rows",
    ),
    (
        "sums made again with the target's class",
        "if ((int)j != r.y) add_score",
        "add_score",
        "rows",
    ),
    (
        "every part of a row begins at its begin",
        "segment * (u32)a.span : 0;\n        u32 end",
        "0 * segment : 0;\n        u32 end",
        "split",
    ),
    ("every part of a row has the edges", "y >= 0 && segment == 0;", "y >= 0;", "split"),
    (
        "half of a row's parts",
        "for (i64 i = r.lane; i < a.splits; i += 32)",
        "for (i64 i = r.lane; i < a.splits - 1; i += 32)",
        "split",
    ),
    (
        "a part's mask from the row's begin",
        "segment * (u32)a.span : 0;\n        const u32 most",
        "0 * segment : 0;\n        const u32 most",
        "split",
    ),
]


def variant_id(variant):
    names = {number: name for name, number in cuda_plan.SCALARS.items()}
    return f"{names[variant[0]]}-p{variant[1] or 'any'}"


@pytest.mark.parametrize(
    "variant", [v for v in emulator.VARIANTS if v not in emulator.SANITIZED], ids=variant_id
)
def test_equals_float64_reference(builds, variant):
    scalar, power = variant
    machine = emulator.Machine(builds(variant))
    part = emulator.VARIANTS.index(variant) % 3
    assert emulator.run(machine, scalar, POWERS[power], part, 3) > 40


@pytest.mark.parametrize("variant", emulator.SANITIZED, ids=variant_id)
def test_equals_float64_reference_under_sanitizers(builds, variant):
    done = _sanitized(builds(variant), variant)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 120


# One number of classes read by 1, 2 and 4 elements for each size; those of 16 bytes are permuted.
TILES = [(32, 1, n) for n in (1, 10, 16, 31)]
TILES += [(17, 1, 10), (16, 2, 8), (64, 1, 10), (64, 0, 5), (64, 2, 24)]


@pytest.mark.parametrize(
    ("scalar", "power", "classes"), TILES, ids=[f"{variant_id(t)}-{t[2]}-classes" for t in TILES]
)
def test_tiles_whose_number_of_classes_the_compiler_knows(tmp_path, scalar, power, classes):
    flags = ("-DLAYOUT=1", f"-DCLASSES={classes}")
    library = emulator.build(tmp_path, scalar, power, cuda_plan.source(), flags)
    machine = emulator.Machine(library)
    for i, case in enumerate(emulator.tile_cases(scalar, classes)):
        emulator.check(machine, scalar, POWERS[power][0], case, bool(i % 2))


@pytest.fixture(scope="module")
def tile_places(tmp_path_factory):
    """Per size of a number: the functions of the source that lay out a tile in shared memory."""
    exported = """
        extern "C" unsigned place_of(unsigned i, unsigned classes) { return place(i, classes); }
        extern "C" int width_of(int classes) { return at_once(classes); }
    """
    folder = tmp_path_factory.mktemp("places")

    def places(scalar, text=None):
        text = (text or cuda_plan.source()) + exported
        library = emulator.build(folder / str(hash(text)), scalar, 1, text, ("-DLAYOUT=1",))
        return emulator.Machine(library).library

    return places


def conflicts(words):
    """Return how often a bank is asked twice at once, over the parts in which a warp is served.

    ``words`` are the addresses of each lane's access, in words of 4 bytes.
    """
    lanes = 32 * 4 // (4 * len(words[0]))  # 128 bytes at a time
    worst = 1
    for first in range(0, 32, lanes):
        asked = {word for lane in words[first : first + lanes] for word in lane}
        banks = [word % 32 for word in asked]
        worst = max(worst, *(banks.count(bank) for bank in banks))
    return worst


def tile_conflicts(library, size, classes):
    """The worst access to a tile: rows by threads, and 16 bytes by lanes."""
    piece, width = 16 // size, library.width_of(classes)

    def access(i, n):
        first = library.place_of(i, classes)
        assert [library.place_of(i + e, classes) for e in range(n)] == [*range(first, first + n)]
        return [first * size // 4 + w for w in range(n * size // 4)]

    rows = [
        [access(lane * classes + j, width) for lane in range(32)] for j in range(0, classes, width)
    ]
    pieces = [
        [access((first + lane) * piece, piece) for lane in range(32)]
        for first in range(0, 32 * classes // piece - 31, 32)
    ]
    return max(map(conflicts, rows + pieces))


@pytest.mark.parametrize("scalar", [32, 64], ids=["4 bytes", "8 bytes"])
def test_tiles_have_no_bank_conflicts(tile_places, scalar):
    library, size = tile_places(scalar), cuda_plan.ITEMSIZE[scalar]
    for classes in range(1, 32):
        places = {library.place_of(i, classes) for i in range(32 * classes)}
        assert places == set(range(32 * classes)), f"{classes} classes: places are taken twice"
        assert tile_conflicts(library, size, classes) == 1, f"{classes} classes"


def test_the_simulation_sees_bank_conflicts(tile_places):
    library = tile_places(32, _mutate("/ PIECE >> 3 & swap", "/ PIECE >> 3 & swap & 0"))
    assert tile_conflicts(library, 4, 8) == 2
    assert tile_conflicts(library, 4, 16) == 4
    assert tile_conflicts(library, 4, 10) == 1


def test_sanitizer_sees_an_overrun(tmp_path):
    text = _mutate("i < n; i += 32) to[i]", "i <= n; i += 32) to[i]")
    done = _sanitized(emulator.build(tmp_path, 32, 1, text, emulator.SANITIZERS), (32, 1))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    folder = tmp_path_factory.mktemp("mutants")
    pool = ThreadPoolExecutor(2)

    def build(number: int, old: str, new: str, kernels: str) -> Path:
        flags = ("-O0", f"-DLAYOUT={cuda_plan.LAYOUTS[kernels]}")
        return emulator.build(folder / str(number), 32, 1, _mutate(old, new), flags)

    return {what: pool.submit(build, i, *how) for i, (what, *how) in enumerate(MUTANTS)}


@pytest.mark.parametrize(
    ("what", "kernels"), [(m[0], m[3]) for m in MUTANTS], ids=[m[0] for m in MUTANTS]
)
def test_mutant_is_caught(mutants, what, kernels):
    machine = emulator.Machine(mutants[what].result())
    with pytest.raises(AssertionError, match="Case"):
        emulator.run(machine, 32, (1.0,), kernels=kernels)


def _mutate(old: str, new: str) -> str:
    text = cuda_plan.source()
    assert text.count(old) == 1, f"{text.count(old)} times in the source: {old!r}"
    return text.replace(old, new)


def _sanitized(library: Path, variant: tuple[int, int]) -> subprocess.CompletedProcess[str]:
    scalar, power = variant
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return subprocess.run(
        [sys.executable, "-m", emulator.__name__, str(library), str(scalar),
         *map(str, POWERS[power][:1])],
        cwd=ROOT,
        env={**os.environ, "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
