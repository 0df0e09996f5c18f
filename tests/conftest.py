"""One fixture, ``lib``, runs a test on every array library; those not installed are skipped by name."""

import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mml_arrayapi.libraries import LIBRARIES, SUPPORTED

# For the processes that tests start: they import what they run from "tests". At the end, so that an
# installed package is tested where there is one, and else the checkout's.
ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))


def pytest_configure(config):
    # xdist would begin with the files of many tests; those of few are the ones that compile for a
    # minute, and were left for the end, with one worker idle.
    config.option.loadscopereorder = False


@dataclass(frozen=True)
class Lib:
    """One array library, with what the tests need of it."""

    name: str
    xp: Any

    def array(self, values, dtype=None):
        """Make an array of this library; Dask arrays get several uneven chunks."""
        values = np.asarray(values)
        if self.name == "dask":
            values = values if dtype is None else values.astype(dtype)
            return self.xp.asarray(values, chunks=tuple(max(1, n // 2) for n in values.shape))
        if self.name == "jax":  # without x64, 64-bit arrays would be truncated with a warning
            narrow = {"float64": "float32", "int64": "int32", "uint64": "uint32"}
            dtype = narrow.get(str(dtype or values.dtype), dtype or values.dtype)
            return self.xp.asarray(values.astype(dtype))
        return (
            self.xp.asarray(values)
            if dtype is None
            else self.xp.asarray(values, dtype=self.dtype(dtype))
        )

    def dtype(self, name):
        return getattr(self.xp, name) if hasattr(self.xp, name) else np.dtype(name)

    def has(self, dtype):
        """Whether arrays of a dtype can be made, without truncation."""
        if self.name == "jax" and dtype in ("float64", "int64", "uint64"):
            return False
        return hasattr(np if self.name == "dask" else self.xp, dtype)

    def numpy(self, array):
        """Read an array back, 16-bit floats as float32."""
        if self.name == "cupy":
            return array.get()
        if self.name == "torch":
            array = array.detach()
            return (array.float() if array.dtype == self.xp.bfloat16 else array).numpy()
        result = np.asarray(array)
        return result.astype(np.float32) if result.dtype.name == "bfloat16" else result

    @property
    def on_gpu(self):
        """Whether its arrays are on a GPU. PyTorch's and Dask's are on the host in these tests."""
        return self.name == "cupy" or (
            self.name == "jax" and self.xp.zeros(1).device.platform == "gpu"
        )

    @property
    def raising(self):
        """The options with which a target out of range raises: on a GPU it must be asked for."""
        return {"check_target": "raise"} if self.on_gpu else {}

    def dtype_name(self, array):
        return str(array.dtype).rpartition(".")[2]


@pytest.fixture(params=SUPPORTED)
def lib(request):
    name = request.param
    try:
        xp = LIBRARIES[name]().namespace
    except ImportError as error:
        pytest.skip(f"{name} is not installed: {error}")
    if name == "cupy" and not xp.cuda.is_available():
        pytest.skip("cupy: no GPU")
    return Lib(name, xp)


@pytest.fixture
def rng():
    return np.random.default_rng(20261124)


@pytest.fixture
def fresh_compiler():
    """Forget what torch.compile has compiled: it gives up after 8 versions of one function."""
    torch = pytest.importorskip("torch")
    torch.compiler.reset()


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """The sdist, and the wheel that is built from it where there is no compiler.

    (Compiling the kernels takes minutes; ``.ci/installs`` does it.)
    """
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)],
        env=os.environ | {"CC": "false", "CXX": "false"},
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="session")
def sdist(dist, tmp_path_factory):
    """The folder that the sdist unpacks to."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(dist[0]) as tar:
        tar.extractall(folder, filter="data")
    (inside,) = folder.iterdir()
    return inside


@pytest.fixture(scope="session")
def installed(dist, tmp_path_factory):
    """A folder with the wheel in it, as a plain ``pip install .`` leaves it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(dist[1]) as wheel:
        wheel.extractall(folder)
    return folder


def pytest_make_parametrize_id(config, val, argname):
    """Say in a case's id what the case is; by itself, pytest calls the fourth shape "shape3"."""
    kinds = tuple | list | dict | type | slice | np.generic | np.ndarray
    if isinstance(val, kinds) or type(val).__name__ == "dtype":
        text = " ".join((val.__name__ if isinstance(val, type) else repr(val)).split())
        if " at 0x" not in text:  # the workers of pytest-xdist must come to the same ids
            return text if len(text) <= 80 else f"{text[:77]}..."
    return None
