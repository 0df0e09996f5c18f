"""NVRTC and the CUDA driver through ``cuda.bindings``: compile, load, launch. No array library."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import cuda.bindings
from cuda.bindings import driver, nvrtc

from mml_arrayapi.backends.cuda import plan as cuda_plan
from mml_arrayapi.backends.cuda.loaded import Functions, Loaded, in_words
from mml_arrayapi.backends.cuda.plan import Plan, Variant
from mml_arrayapi.kernel import Unusable


class CudaError(RuntimeError):
    """The driver or NVRTC returned an error, the ``status``."""

    def __init__(self, status: Any, where: str = "") -> None:
        super().__init__(f"{status!s}{where}")
        self.status = int(status)


def missing() -> str | None:
    """Tell what the machine lacks, whatever the device; None if nothing.

    Returns
    -------
    str or None
    """
    version = cuda.bindings.__version__
    extra = f"mml_arrayapi[cuda{version.partition('.')[0]}]"
    for what, call in (
        ("no CUDA driver", lambda: driver.cuInit(0)),
        (f"no NVRTC for cuda-bindings {version} (pip install '{extra}')", nvrtc.nvrtcVersion),
    ):
        try:
            _done(call())
        except Exception as error:  # noqa: BLE001 - the versions of cuda.bindings differ in kinds
            return f"{what}: {in_words(error)}"
    return None


def trouble(device: int, scalar: int, p: float, rows: int, classes: int) -> str | None:
    """Tell why the kernels for a problem can't run on a device; None if they can.

    The first need of a variant compiles and loads it. A failure is kept, and never raised.

    Parameters
    ----------
    device : int
        The device's number.
    scalar, p, rows, classes
        As in :class:`mml_arrayapi.backends.cuda.plan.Call`.

    Returns
    -------
    str or None
    """
    try:
        variant = cuda_plan.variant_for(scalar, p, rows, classes, multiprocessors(device))
        loaded.functions(device, variant)
    except Exception as error:  # noqa: BLE001 - a device's failure must not end a user's call
        return f"not usable on cuda:{device}: {in_words(error)}"
    return None


@cache
def multiprocessors(device: int) -> int:
    """Return how many multiprocessors a device has; raise ``Unusable`` if it doesn't say."""
    try:
        return _attribute(device, "MULTIPROCESSOR_COUNT")
    except Exception as error:
        raise Unusable(in_words(error)) from error


@cache
def capability(device: int) -> int:
    """Return a device's compute capability, such as 90 for 9.0."""
    major, minor = (_attribute(device, f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    return 10 * major + minor


def compile_variant(variant: Variant, target: str, more: tuple[str, ...] = ()) -> bytes:
    """Compile one variant of the kernels.

    Parameters
    ----------
    variant : Variant
        What to compile for.
    target : str
        Such as ``"sm_90"`` for machine code or ``"compute_90"`` for PTX: given explicitly, since
        NVRTC's own default is older than the device.
    more : tuple of str
        Further compiler options.

    Returns
    -------
    bytes
        Machine code (cubin), or PTX.

    Raises
    ------
    RuntimeError
        With the compiler's log.
    """
    options = (f"--gpu-architecture={target}", *cuda_plan.OPTIONS, *variant.defines(), *more)
    encoded = [option.encode() for option in options]
    source = cuda_plan.source().encode()
    program = _done(nvrtc.nvrtcCreateProgram(source, b"margin_loss.cu", 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(status) != 0:
            log = b" " * _done(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC: {log.rstrip(bytes(1)).decode(errors='replace').strip()}")
        size, get = (
            (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
            if target.startswith("sm_")
            else (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        )
        code: bytes = b" " * _done(size(program))
        _done(get(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


class _Memory(threading.local):
    """A thread's memory for the argument of a launch; the driver has copied it on return."""

    def __init__(self) -> None:
        memory = ctypes.create_string_buffer(8 * cuda_plan.FIELDS)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(memory))
        self.parts = memoryview(memory).cast("B"), ctypes.addressof(self.pointers)


_memory = _Memory()


def launch(plan: Plan, addresses: tuple[int, ...], device: int, stream: int) -> None:
    """Launch a plan's kernels, in order, on a stream of a device.

    The device need not be the current one. The first launch of a variant compiles and loads it,
    which can't happen while a CUDA graph is captured.

    Parameters
    ----------
    plan : Plan
        What :func:`mml_arrayapi.backends.cuda.plan.make_plan` says.
    addresses : tuple of int
        As in :data:`mml_arrayapi.backends.cuda.plan.ADDRESSES`.
    device : int
        The device's number.
    stream : int
        The stream's handle.

    Raises
    ------
    mml_arrayapi.kernel.Unusable
        NVRTC or the driver returned an error.
    """
    functions = loaded.functions(device, plan.variant)
    memory, parameters = _memory.parts
    cuda_plan.pack_into(memory, addresses, plan)
    try:
        context = _context(device)
        # A thread of autograd's may have no context yet, and PyTorch's idea of the current device
        # lags behind the driver's: a kernel runs in the context that is current.
        elsewhere = int(_done(driver.cuCtxGetCurrent())) != int(context)
        if elsewhere:
            _done(driver.cuCtxPushCurrent(context))
        try:
            for step in plan.launches:
                answer = driver.cuLaunchKernel(
                    functions[step.name], step.grid, 1, 1, step.block, 1, 1, step.shared, stream,
                    parameters, 0,
                )  # fmt: skip
                _done(answer, step.name)
        finally:
            if elsewhere:
                _done(driver.cuCtxPopCurrent())
    except CudaError as error:
        raise loaded.refuse(device, plan.variant, error) from error


@cache
def _context(device: int) -> Any:
    """Return a device's primary context, the one that the CUDA runtime and its libraries use."""
    return _done(driver.cuDevicePrimaryCtxRetain(_done(driver.cuDeviceGet(device))))


@cache
def _code(capability: int, variant: Variant) -> bytes:
    """Compile a variant, once for all devices of a capability."""
    return compile_variant(
        variant, cuda_plan.target_for(capability, _done(nvrtc.nvrtcGetSupportedArchs()))
    )


@cache
def _library(capability: int, variant: Variant) -> Any:
    return _done(driver.cuLibraryLoadData(_code(capability, variant), [], [], 0, [], [], 0))


def _load(device: int, variant: Variant) -> Functions:
    """Return a variant's kernels on a device."""
    library = _library(capability(device), variant)
    _done(driver.cuCtxPushCurrent(_context(device)))
    try:
        # It is here that the device gets the code, and may refuse it.
        return {
            name: _done(
                driver.cuKernelGetFunction(_done(driver.cuLibraryGetKernel(library, name.encode())))
            )
            for name in variant.names()
        }
    finally:
        _done(driver.cuCtxPopCurrent())


def _attribute(device: int, name: str) -> int:
    _done(driver.cuInit(0))
    attribute = getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
    return int(_done(driver.cuDeviceGetAttribute(attribute, _done(driver.cuDeviceGet(device)))))


def _done(answer: tuple[Any, ...], what: str = "") -> Any:
    """Return what a call gives beside its status, and raise if the status is an error."""
    status, *values = answer
    if int(status) != 0:
        raise CudaError(status, f" from {what}" if what else "")
    return values[0] if values else None


loaded = Loaded(_load)
