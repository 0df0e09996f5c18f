"""The CPU kernels: which build of them this machine runs, or why there is none.

The kernels are compiled when the package is installed, on x86-64 three times: ``_baseline`` runs
on every processor, ``_x86_64_v3`` on those with AVX2, ``_x86_64_v4`` on those with AVX-512. The
best one that the processor can run is taken, or the one that the environment variable
``MML_ARRAYAPI_CPU_KERNELS`` names (``baseline``, ``x86_64_v3``, ``x86_64_v4``).
"""

from __future__ import annotations

import math
import os
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mml_arrayapi.backends import threads

ENVIRONMENT = "MML_ARRAYAPI_CPU_KERNELS"
MAX_DIMS = 16
MAX_CLASSES = 2**31 - 65  # places in a row are 32 bits wide
BUILDS = ("baseline", "x86_64_v3", "x86_64_v4")

_ELF = b"\x7fELF\x02\x01"  # 64 bits, little-endian
_SECTIONS = (40, 48), (58, 60), (60, 62)  # in its head: where their list begins, its sizes
_HERE = Path(__file__).parent
_SOURCES = (
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


def _load() -> tuple[Any, str | None]:
    """Return the extension module, or None with the reason."""
    asked = os.environ.get(ENVIRONMENT)
    if asked and asked not in BUILDS:
        return None, f"{ENVIRONMENT} must be one of {', '.join(BUILDS)}, but is {asked!r}"
    try:
        module = _import("baseline")
        if asked and not module.supports(asked):
            return None, f"{ENVIRONMENT} is {asked!r}, which this processor cannot run"
        module = _import(asked) if asked else _best(module)
    except ImportError as error:
        return None, _why_missing(error)
    stale = _stale(module)
    return (None, stale) if stale else (module, None)


def _best(baseline: Any) -> Any:
    """Return the widest build that this processor runs, of those that are there and whole.

    Each is optional when the package is built: GCC before 11 makes the baseline alone.
    """
    for build in reversed(BUILDS):
        if baseline.supports(build):
            with suppress(ImportError):
                return _import(build)
    return baseline


def _import(build: str) -> Any:
    """Import a build. To load a file that was cut off would end the process by a signal."""
    name = f"{__name__}._{build}"
    spec = find_spec(name)
    if spec is not None and spec.origin is not None and _is_cut_off(Path(spec.origin)):
        raise ImportError(f"{spec.origin} is not whole")
    return import_module(name)


def _is_cut_off(path: Path) -> bool:
    """Tell whether a 64-bit ELF file ends before its list of sections does, which stands last."""
    with suppress(OSError), path.open("rb") as file:
        head, size = file.read(64), os.fstat(file.fileno()).st_size
        start, each, count = (int.from_bytes(head[a:b], "little") for a, b in _SECTIONS)
        return head[:6] == _ELF and size < start + each * count
    return False


def _why_missing(error: ImportError) -> str:
    if (_HERE / "margin_loss.cpp").exists():
        return (
            f"the kernels of this checkout are not built ({error}): run `pip install -e .` in it, "
            "which needs gcc or clang"
        )
    if not _HERE.is_dir():
        return (
            f"Python loads no compiled kernels out of an archive ({_HERE}): install mml_arrayapi, "
            "or unpack it"
        )
    if not isinstance(error, ModuleNotFoundError):
        return f"the compiled kernels cannot be loaded ({error}): install mml_arrayapi again"
    return (
        f"this installation has no compiled kernels ({error}): they are made where there is gcc or "
        "clang; install one of them, then mml_arrayapi again, with pip's --no-cache-dir"
    )


def _stale(module: Any) -> str | None:
    """Tell that a checkout's library was built from other sources than stand beside it."""
    if not (_HERE / "margin_loss.cpp").exists():
        return None
    import hashlib

    digest = hashlib.sha256()
    for name in _SOURCES:
        digest.update((_HERE / name).read_bytes().replace(b"\r\n", b"\n"))
    if digest.hexdigest() == module.source_hash():
        return None
    return (
        "the kernels of this checkout were built from other sources: run `pip install -e .` again"
    )


native, _reason = _load()
if native is not None:
    native.set_limit(threads.number_of_threads)


def too_large(shape: tuple[int, ...], axis: int) -> str | None:
    """Tell why no kernel takes an input of such a shape, or None."""
    if len(shape) > MAX_DIMS:
        return f"input has {len(shape)} axes, the kernel takes {MAX_DIMS}"
    if shape[axis] > MAX_CLASSES:
        return f"input has {shape[axis]} classes, the kernel takes {MAX_CLASSES}"
    return None


def axes_in_memory(strides: tuple[int, ...]) -> list[int]:
    """Return the axes from the longest step to the shortest; those that repeat come first.

    A gradient whose axes lie in this order is walked as the scores are: so the loss, summed on the
    way, has the bits that it has without a gradient.
    """
    return sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]) or -math.inf)


def build() -> str | None:
    """Name the build that runs; None where there are no CPU kernels."""
    return None if native is None else native.__name__.rpartition("._")[2]


def reason() -> str | None:
    """Tell why there are no CPU kernels; None where there are."""
    return _reason
