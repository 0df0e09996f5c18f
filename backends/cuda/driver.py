"""NVRTC and the CUDA driver through ``cuda.bindings``: compile, load, launch. No array library."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any

from cuda.bindings import driver, nvrtc

from mml_arrayapi.backends.cuda import plan as cuda_plan

_functions: dict[tuple[int, int, int, str], dict[str, Any]] = {}  # by device and variant
_lock = threading.Lock()


def compile_variant(
    scalar: int, power: int, kernels: str, architecture: str, more: tuple[str, ...] = ()
) -> bytes:
    """Compile one variant of the kernels.

    Parameters
    ----------
    scalar, power, kernels
        As in :func:`mml_arrayapi.backends.cuda.plan.defines`.
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
    options += cuda_plan.defines(scalar, power, kernels)
    encoded = [option.encode() for option in options]
    source = cuda_plan.source().encode()
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


class _Block(threading.local):
    """A thread's memory for the arguments of a launch; the driver has copied it on return."""

    def __init__(self) -> None:
        size = 8 * cuda_plan.FIELDS
        memory = ctypes.create_string_buffer(size)
        first = ctypes.addressof(memory)
        self.pointers = (ctypes.c_void_p * cuda_plan.FIELDS)(*range(first, first + size, 8))
        self.parts = memoryview(memory).cast("B"), ctypes.addressof(self.pointers), False


_block = _Block()


def launch(
    plan: cuda_plan.Plan,
    addresses: tuple[int, ...],
    device: int,
    stream: int,
    architecture: Callable[[int], str],
) -> None:
    """Launch a plan's kernels, in order, on a stream of the current device.

    The first launch of a variant compiles and loads it
    (which can't happen while a CUDA graph is captured); the code is kept per device.

    Parameters
    ----------
    plan : Plan
        What :func:`mml_arrayapi.backends.cuda.plan.plan` says.
    addresses : tuple of int
        As in :data:`mml_arrayapi.backends.cuda.plan.ADDRESSES`.
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
    memory, parameters, has_context = _block.parts
    if not has_context:
        _ensure_context(device)
    variant = (device, plan.scalar, plan.power, plan.kernels)
    functions = _functions.get(variant)
    if functions is None:
        functions = _load(variant, architecture(device))
    cuda_plan.pack_into(memory, addresses, plan)
    for step in plan.launches:
        answer = driver.cuLaunchKernel(
            functions[step.name], step.grid, 1, 1, step.block, 1, 1, step.shared, stream,
            parameters, 0,
        )  # fmt: skip
        _done(answer)


def _ensure_context(device: int) -> None:
    """Give a new thread the context that the CUDA runtime would give it at its first need.

    Autograd's threads may come here before anything has needed one: their memory comes from the
    allocator's cache.
    """
    if int(_done(driver.cuCtxGetCurrent())) == 0:
        number = _done(driver.cuDeviceGet(device))
        _done(driver.cuCtxSetCurrent(_done(driver.cuDevicePrimaryCtxRetain(number))))
    _block.parts = (*_block.parts[:2], True)


def _load(variant: tuple[int, int, int, str], architecture: str) -> dict[str, Any]:
    _, scalar, power, kernels = variant
    with _lock:
        if variant not in _functions:
            module = _done(
                driver.cuModuleLoadData(compile_variant(scalar, power, kernels, architecture))
            )
            names = [f"{kernels}_{operation}" for operation in cuda_plan.operations(power)]
            _functions[variant] = {
                name: _done(driver.cuModuleGetFunction(module, name.encode()))
                for name in (*names, "finish")
            }
    return _functions[variant]


def _done(answer: tuple[Any, ...]) -> Any:
    """Return what a call gives beside its status, and raise if the status is an error."""
    status, *values = answer
    if int(status) != 0:
        raise RuntimeError(f"CUDA: {status!s}")
    return values[0] if values else None
