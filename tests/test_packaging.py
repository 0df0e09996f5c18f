"""Wheel, sdist and tree hold the same files; nothing called "backends" lands at the top level."""

import importlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import mml_arrayapi

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "mml_arrayapi": "mml_arrayapi",
    "backends": "mml_arrayapi/backends",
    "conformance": "mml_arrayapi/conformance",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel built from it."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as tar, zipfile.ZipFile(wheel) as archive:
        inside = {name.partition("/")[2] for name in tar.getnames()}
        return inside, set(archive.namelist())


def tree():
    """Every file of the packages in the working tree: {path: path once installed}."""
    files = {}
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                inner = path.relative_to(ROOT / folder).as_posix()
                files[f"{folder}/{inner}"] = f"{package}/{inner}"
    return files


def test_the_wheel_holds_the_tree(built):
    _, wheel = built
    installed = {name for name in wheel if ".dist-info/" not in name}
    assert installed == set(tree().values())
    assert "mml_arrayapi/py.typed" in wheel
    assert "mml_arrayapi/backends/margin_loss.cu" in wheel
    assert {name.partition("/")[0] for name in installed} == {"mml_arrayapi"}


def test_the_sdist_holds_the_tree(built):
    sdist, _ = built
    assert set(tree()) <= sdist
    assert {"README.md", "LICENSE", "pyproject.toml"} <= sdist


def test_version_stands_in_one_place():
    from importlib.metadata import version

    assert mml_arrayapi.__version__ == version("mml_arrayapi")


def test_public_names():
    assert mml_arrayapi.__all__ == sorted(mml_arrayapi.__all__)
    assert set(mml_arrayapi.__all__) == {
        "Evaluation",
        "InputError",
        "InvalidTargetError",
        "Kernel",
        "LossAccumulator",
        "Problem",
        "WorkerError",
        "__version__",
        "evaluate",
        "explain",
        "list_backends",
        "multi_margin_loss",
        "multi_margin_loss_and_grad",
        "register_kernel",
        "unregister_kernel",
        "use_backend",
    }
    for name in mml_arrayapi.__all__:
        value = getattr(mml_arrayapi, name)
        assert name == "__version__" or value.__doc__, name


def test_no_top_level_package_is_left_over():
    for name in ("backends", "conformance"):
        module = importlib.import_module(f"mml_arrayapi.{name}")
        assert module.__name__ == f"mml_arrayapi.{name}"
