"""The kernels under the address, undefined-behaviour and thread sanitizers, built for the test."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from mml_arrayapi.backends import cpu

ROOT = Path(__file__).parents[3]
SOURCES = ROOT / "backends" / "cpu"
HERE = Path(__file__).parent
LEVELS = {"x86_64_v3": ["-march=x86-64-v3"], "x86_64_v4": ["-march=x86-64-v4"]}


def _library(compiler, name):
    path = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return path if os.path.isabs(path) else None


@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded, as on Linux")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.skipif(not (SOURCES / "module.cpp").exists(), reason="no sources of the kernels")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path):
    preload = _library("g++", "libasan.so")
    if preload is None:
        pytest.skip("no libasan")
    library = tmp_path / "_baseline.abi3.so"
    # The build that runs here: the widest vectors reach furthest. -O1 takes twice as long to compile.
    level = LEVELS.get(cpu.build(), [])
    flags = [
        *level,
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-O0",
        "-std=c++17",
    ]
    macros = ["-DPy_LIMITED_API=0x030b0000", '-DSOURCE_HASH="sanitized"']
    include = sysconfig.get_paths()["include"]
    subprocess.run(
        [
            "g++",
            *flags,
            *macros,
            "-ffp-contract=off",
            "-pthread",
            "-fPIC",
            "-shared",
            f"-I{include}",
        ]
        + [str(path) for path in sorted(SOURCES.glob("*.cpp"))]
        + ["-o", str(library)],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, str(HERE / "sanitized.py"), str(library)],
        env={
            **os.environ,
            "LD_PRELOAD": preload,
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split()[0] == "served"
