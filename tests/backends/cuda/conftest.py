import fcntl
import os
from functools import cache
from shutil import which

import pytest

from mml_arrayapi.backends.cuda import plan as cuda_plan


@pytest.fixture(scope="session")
def builds(tmp_path_factory):
    """``builds((scalar, power))``: the library with that variant, compiled when first asked for."""
    if which("g++") is None:
        pytest.skip("the emulator needs g++")
    emulator = pytest.importorskip(
        "tests.backends.cuda.emulator", reason="the emulator needs ml_dtypes"
    )
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # all workers' own
    folder = folder / "emulated"
    folder.mkdir(exist_ok=True)

    @cache
    def build(variant):
        done = folder / "{}_{}.so".format(*variant)
        with open(done.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                flags = emulator.SANITIZERS if variant in emulator.SANITIZED else ()
                place = folder / "{}_{}".format(*variant)
                emulator.build(place, *variant, cuda_plan.source(), flags).rename(done)
        return done

    return build
