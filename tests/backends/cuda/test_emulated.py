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

POWERS = {1: (1.0,), 2: (2.0,), 0: (1.5, 3.0)}

# What is changed, the text, its replacement. Each text stands in the source exactly once.
MUTANTS = [
    (
        "block sum without its first barrier",
        "= (double)value;\n    __syncthreads();",
        "= (double)value;",
    ),
    (
        "block sum without its second barrier",
        "    __syncthreads();  // before scratch is used again\n",
        "",
    ),
    (
        "tile read before it is whole",
        "tile_load(a, first, here * classes, tile);\n            __syncwarp();",
        "tile_load(a, first, here * classes, tile);",
    ),
    (
        "tile stored before it is whole",
        "        __syncwarp();\n        if (OP == LOSS_GRAD ||",
        "        if (OP == LOSS_GRAD ||",
    ),
    (
        "tile overwritten while it is stored",
        "here * classes, tile);\n            __syncwarp();\n        }\n    }",
        "here * classes, tile);\n        }\n    }",
    ),
    ("dropped tail", "return (u32)a.classes - s.body * V;", "return s.head;"),
    ("dropped tail of a tile's store", "i < n; i += 32) to[i]", "i < n - n % V; i += 32) to[i]"),
    (
        "dropped last vector",
        "s.body = ((u32)a.classes - s.head) / V;",
        "s.body = ((u32)a.classes - s.head - 1) / V;",
    ),
    ("mask off by one bit", "% UNIT_VECTORS) * V + e) & 1", "% UNIT_VECTORS) * V + e + 1) & 1"),
    (
        "mask off by one unit",
        "any ? mask[(i64)(unit + u) * lanes",
        "any ? mask[(i64)(unit) * lanes",
    ),
    ("edge's mask off by one bit", "byte >> (turn % UNIT) & 1", "byte >> (turn % UNIT + 1) & 1"),
    ("target's class not left out", "if (k == own) {", "if (k == own && y < 0) {"),
    ("target's class not left out of the edges", "if ((int)j == y) z = -1;", ""),
    ("active at the kink", "return !(z <= 0);", "return !(z < 0);"),
    ("NaN dropped", "return !(z <= 0);", "return z > 0;"),
    ("margin lost", "(z[e] - pivot) + margin", "z[e] + (margin - pivot)"),
    ("narrowed before the check", "y < 0 || y >= a.classes", "(int)y < 0 || (int)y >= a.classes"),
    ("grid too small not strided", "first += stride, row += stride", "first += a.rows"),
    ("bad target not reported", "if (a.flag) atomicMin(a.flag, row);", ""),
    ("weight forgotten", "Real scale = load_weight(a, y) *", "Real scale ="),
]


@pytest.mark.parametrize("variant", [v for v in emulator.VARIANTS if v not in emulator.SANITIZED])
def test_equals_float64_reference(builds, variant):
    scalar, power = variant
    machine = emulator.Machine(builds(variant))
    part = emulator.VARIANTS.index(variant) % 3
    assert emulator.run(machine, scalar, POWERS[power], part, 3) > 40


@pytest.mark.parametrize("variant", emulator.SANITIZED)
def test_equals_float64_reference_under_sanitizers(builds, variant):
    done = _sanitized(builds(variant), variant)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split()[0]) > 120


def test_sanitizer_sees_an_overrun(tmp_path):
    text = _mutate("i < n; i += 32) to[i]", "i <= n; i += 32) to[i]")
    done = _sanitized(emulator.build(tmp_path, 32, 1, text, emulator.SANITIZERS), (32, 1))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="session")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Path]]:
    folder = tmp_path_factory.mktemp("mutants")
    pool = ThreadPoolExecutor(2)
    return {
        what: pool.submit(emulator.build, folder / str(i), 32, 1, _mutate(old, new), ("-O0",))
        for i, (what, old, new) in enumerate(MUTANTS)
    }


@pytest.mark.parametrize("what", [what for what, *_ in MUTANTS])
def test_mutant_is_caught(mutants, what):
    machine = emulator.Machine(mutants[what].result())
    with pytest.raises(AssertionError, match="Case"):
        emulator.run(machine, 32, (1.0,), 0, 1)


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
        [sys.executable, emulator.__file__, str(library), str(scalar), "0", "1",
         *map(str, POWERS[power][:1])],
        env={**os.environ, "LD_PRELOAD": found.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
