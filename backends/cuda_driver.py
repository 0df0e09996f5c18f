"""NVRTC and the CUDA driver through ``cuda.bindings``: compile, load, launch. No array library."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver, nvrtc
from mml_arrayapi.backends import cuda_launch

_functions: dict[tuple[int, int, int, str], int] = {}
_lock = threading.Lock()


def compile_variant(
    scalar: int, power: int, kernels: str, architecture: str, more: tuple[str, ...] = ()
) -> bytes:
    """Compile one variant of the kernels.

    Parameters
    ----------
    scalar, power, kernels
        As in :func:`mml_arrayapi.backends.cuda_launch.defines`.
    architecture : str
        Such as ``"sm_90"``: given explicitly, since NVRTC's own default is older than the device.
    more : tuple of str
        Further compiler options.

    Returns
    -------
    bytes
        Machine code (cubin).

    Raises
    ------
    RuntimeError
        With the compiler's log.
    """
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *more]
    options += cuda_launch.defines(scalar, power, kernels)
    encoded = [option.encode() for option in options]
    source = cuda_launch.source().encode()
    program = _done(nvrtc.nvrtcCreateProgram(source, b"margin_loss.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.decode(errors='replace')}")
        code: bytes = b" " * _done(nvrtc.nvrtcGetCUBINSize(program))
        _done(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def launch(
    launches: list[cuda_launch.Launch],
    scalar: int,
    power: int,
    kernels: str,
    device: int,
    stream: int,
    architecture: Callable[[int], str],
) -> None:
    """Launch kernels, in order, on a stream of the current device.

    The device's context must be current. The first launch of a variant compiles and loads it
    (which can't happen while a CUDA graph is captured); the code is kept per device.

    Parameters
    ----------
    launches : list of Launch
        What :func:`mml_arrayapi.backends.cuda_launch.launches` says.
    scalar, power, kernels
        The variant.
    device : int
        The device's number.
    stream : int
        The stream's handle.
    architecture : callable
        ``architecture(device)`` is such as ``"sm_90"``.

    Raises
    ------
    RuntimeError
        What NVRTC or the driver reports.
    """
    for step in launches:
        function = _functions.get((device, scalar, power, kernels + step.name))
        if function is None:
            _load(device, scalar, power, kernels, architecture(device))
            function = _functions[device, scalar, power, kernels + step.name]
        packed = cuda_launch.pack(scalar, step)
        block = ctypes.create_string_buffer(packed, len(packed))
        pointers = _POINTERS(*cuda_launch.pointers(ctypes.addressof(block)))
        _done(
            driver.cuLaunchKernel(
                function, step.grid, 1, 1, step.block, 1, 1, step.shared, stream,
                ctypes.addressof(pointers), 0,
            )
        )  # fmt: skip


_POINTERS = ctypes.c_void_p * len(cuda_launch.FIELDS)


def _load(device: int, scalar: int, power: int, kernels: str, architecture: str) -> None:
    with _lock:
        if (device, scalar, power, kernels + "finish") in _functions:
            return
        code = compile_variant(scalar, power, kernels, architecture)
        module = _done(driver.cuModuleLoadData(code))
        names = [f"{kernels}_{operation}" for operation in cuda_launch.operations(power)]
        for name in (*names, "finish"):  # "finish" last: it says that all are there
            function = _done(driver.cuModuleGetFunction(module, name.encode()))
            _functions[device, scalar, power, kernels + name] = function


def _done(answer: tuple[Any, ...]) -> Any:
    """Return what a call gives beside its status, and raise if the status is an error."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!s}")
    return values[0] if values else None
