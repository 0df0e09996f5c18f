"""The built-in kernels, in order. What stands here knows one library each, and is loaded late."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mml_arrayapi.kernel import Kernel


def _nothing_missing() -> str | None:
    return None


def _cpu_kernels_missing() -> str | None:
    from mml_arrayapi.backends import cpu

    return cpu.reason()


class LazyKernel(NamedTuple):
    """A kernel that is loaded when it is needed.

    Attributes
    ----------
    name, library : str
        The kernel's.
    requires : tuple of str
        The modules that must be installed for it.
    load : callable
        Imports the kernel.
    missing : callable
        ``missing()``: what else is missing, in words, or None. It imports no array library.
    """

    name: str
    library: str
    requires: tuple[str, ...]
    load: Callable[[], Kernel]
    missing: Callable[[], str | None] = _nothing_missing


def _numpy_cpu() -> Kernel:
    from mml_arrayapi.backends.cpu.numpy import KERNEL

    return KERNEL


def _torch_cpu() -> Kernel:
    from mml_arrayapi.backends.pytorch.cpu import KERNEL

    return KERNEL


def _torch_cuda() -> Kernel:
    from mml_arrayapi.backends.pytorch.cuda import KERNEL

    return KERNEL


def _cuda_missing() -> str | None:
    """Tell what PyTorch's CUDA kernels lack; cuda.bindings is no array library."""
    try:
        from mml_arrayapi.backends.cuda.driver import missing

        return missing()
    except Exception as error:  # noqa: BLE001 - another build of CUDA, or half of one, raises anything
        return f"cannot be imported: {error}"


def _cupy_cuda() -> Kernel:
    from mml_arrayapi.backends.cuda.cupy import KERNEL

    return KERNEL


def _jax_jit() -> Kernel:
    from mml_arrayapi.backends.jax import KERNEL

    return KERNEL


def _dask_blocks() -> Kernel:
    from mml_arrayapi.backends.dask.graph import KERNEL

    return KERNEL


KERNELS = (
    LazyKernel("numpy-cpu", "numpy", ("numpy",), _numpy_cpu, _cpu_kernels_missing),
    LazyKernel("torch-cpu", "torch", ("torch",), _torch_cpu, _cpu_kernels_missing),
    LazyKernel("torch-cuda", "torch", ("torch",), _torch_cuda, _cuda_missing),
    LazyKernel("cupy-cuda", "cupy", ("cupy",), _cupy_cuda),
    LazyKernel("jax-jit", "jax", ("jax",), _jax_jit),
    LazyKernel("dask-blocks", "dask", ("dask", "numpy"), _dask_blocks),
)
