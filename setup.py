"""Builds the CPU kernels; everything else stands in pyproject.toml.

On x86-64 they are built for every processor, for those with AVX2 and for those with AVX-512, each
as a module of its own with its own object files and hidden symbols: linked together, the linker
would keep one copy of a shared template, and processors without AVX2 would meet its instructions.
"""

from __future__ import annotations

import copy
import hashlib
import platform
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "backends/cpu"
SOURCES = (
    "dlpack.h",
    "job.cpp",
    "job.h",
    "lanes.h",
    "margin_loss.cpp",
    "margin_loss.h",
    "module.cpp",
    "operators.cpp",
    "operators.h",
    "pool.cpp",
    "pool.h",
)
# -g0: Python's own flags ask for debug information, 9 of 10 MB. -fno-fast-math: CXXFLAGS may ask
# for it, which takes NaN for a number.
FLAGS = [
    "-std=c++17", "-O2", "-g0", "-fno-fast-math", "-ffp-contract=off", "-fvisibility=hidden",
    "-pthread",
]  # fmt: skip
# With these GCC links code that lets the whole process take subnormal numbers for 0.
NOT_LINKED = {"-Ofast", "-ffast-math", "-funsafe-math-optimizations"}
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # has no stable ABI


def source_hash() -> str:
    """Hash what the kernels are built from; backends/cpu/__init__.py does the same."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update(Path(FOLDER, name).read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def extension(name: str, *flags: str) -> Extension:
    """Describe one build of the kernels."""
    limited = [] if FREE_THREADED else [("Py_LIMITED_API", "0x030b0000")]
    return Extension(
        f"mml_arrayapi.backends.cpu.{name}",
        [f"{FOLDER}/{source}" for source in SOURCES if source.endswith(".cpp")],
        depends=[f"{FOLDER}/{source}" for source in SOURCES],
        define_macros=[("MODULE", name), ("SOURCE_HASH", f'"{source_hash()}"'), *limited],
        extra_compile_args=[*FLAGS, *flags],
        py_limited_api=not FREE_THREADED,
        language="c++",
        optional=True,
    )


def extensions() -> list[Extension]:
    """List the builds for this machine's architecture."""
    machine = sysconfig.get_platform().rpartition("-")[2]
    if machine == "universal2":
        machine = platform.machine()
    if machine.lower() in ("x86_64", "amd64"):
        wide = "-mprefer-vector-width=512"
        return [
            extension("_x86_64_v4", "-march=x86-64-v4", wide),
            extension("_x86_64_v3", "-march=x86-64-v3"),
            # Processors without AVX2 are old and few: -O1 builds in two thirds of the time.
            extension("_baseline", "-O1"),
        ]
    return [extension("_baseline")]


class BuildKernels(build_ext):
    """Build each extension in its own folder; none where the compiler has no vector extensions."""

    def build_extensions(self) -> None:  # noqa: D102
        if self.compiler.compiler_type == "msvc":
            print("MSVC has no vector extensions: mml_arrayapi is installed without CPU kernels.")
            self.extensions = []
        for name in ("compiler_cxx", "linker_so", "linker_so_cxx", "linker_exe_cxx"):
            command = getattr(self.compiler, name, None) or ()
            setattr(self.compiler, name, [word for word in command if word not in NOT_LINKED])
        self.parallel = self.parallel or len(self.extensions) or None
        super().build_extensions()

    def build_extension(self, ext: Extension) -> None:  # noqa: D102
        command = copy.copy(self)  # extensions are built side by side
        command.build_temp = f"{self.build_temp}/{ext.name}"
        build_ext.build_extension(command, ext)


# A library that runs under several versions of Python says so in the wheel's name.
options = {} if FREE_THREADED else {"bdist_wheel": {"py_limited_api": "cp311"}}
wanted = extensions() if sys.implementation.name == "cpython" else []
setup(ext_modules=wanted, cmdclass={"build_ext": BuildKernels}, options=options)
