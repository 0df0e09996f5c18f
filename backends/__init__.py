"""The built-in kernels, in order. Each file here knows one library; none is loaded before need."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mml_arrayapi.kernel import Kernel


class Offer(NamedTuple):
    """A kernel that may be loaded.

    Attributes
    ----------
    name, library : str
        As the kernel's.
    requires : tuple of str
        The modules that must be installed for it.
    load : callable
        Imports the kernel.
    """

    name: str
    library: str
    requires: tuple[str, ...]
    load: Callable[[], Kernel]


# Plain import statements: torch.compile follows them, import_module() it does not.
def _numpy_numba() -> Kernel:
    from mml_arrayapi.backends.numpy_fused import KERNEL

    return KERNEL


def _torch_cpu_numba() -> Kernel:
    from mml_arrayapi.backends.torch_cpu import KERNEL

    return KERNEL


def _torch_cuda() -> Kernel:
    from mml_arrayapi.backends.torch_cuda import KERNEL

    return KERNEL


def _cupy_cuda() -> Kernel:
    from mml_arrayapi.backends.cupy_cuda import KERNEL

    return KERNEL


def _dask_blocks() -> Kernel:
    from mml_arrayapi.backends.dask.graph import KERNEL

    return KERNEL


OFFERS = (
    Offer("numpy-numba", "numpy", ("numpy", "numba"), _numpy_numba),
    Offer("torch-cpu-numba", "torch", ("torch", "numba"), _torch_cpu_numba),
    Offer("torch-cuda", "torch", ("torch", "cuda.bindings"), _torch_cuda),
    Offer("cupy-cuda", "cupy", ("cupy",), _cupy_cuda),
    Offer("dask-blocks", "dask", ("dask", "numpy"), _dask_blocks),
)
