from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shutil import which

import pytest
from mml_arrayapi.backends import cuda_launch


@pytest.fixture(scope="session")
def builds(tmp_path_factory) -> dict[tuple[int, int], Future[Path]]:
    """All variants of the CUDA source for the emulator, compiled two at a time in the background."""
    if which("g++") is None:
        pytest.skip("the emulator needs g++")
    emulator = pytest.importorskip("tests.gpu.emulator", reason="the emulator needs ml_dtypes")
    folder = tmp_path_factory.mktemp("emulated")
    pool = ThreadPoolExecutor(2)

    def build(variant):
        flags = emulator.SANITIZERS if variant in emulator.SANITIZED else ()
        return emulator.build(folder, *variant, cuda_launch.source(), flags)

    ordered = sorted(emulator.VARIANTS, key=lambda variant: variant in emulator.SANITIZED)
    return {variant: pool.submit(build, variant) for variant in ordered}
