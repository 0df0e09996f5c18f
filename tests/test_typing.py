"""Type checkers find wrong calls in a project that uses the package, and accept right ones."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

DOWNSTREAM = """
from fractions import Fraction

import numpy as np

import mml_arrayapi as mml
from mml_arrayapi.typing import Array, CheckTarget, Reduction


class Strange:
    ndim = 2
    shape = (2, 3)
    dtype = "float32"

    def __array_namespace__(self, *, api_version: str | None = None) -> object: ...


def losses(x: Array, y: Array, reduction: Reduction, mode: CheckTarget) -> float:
    return float(mml.multi_margin_loss(x, y, p=2, reduction=reduction, check_target=mode))


x, y, w = np.zeros((2, 3), np.float32), np.zeros(2, np.int64), np.ones(3)
losses(x, y, "sum", "raise")
loss, grad = mml.multi_margin_loss_and_grad(x, y, weight=w, ignore_index=-1, axis=-1, grad_output=w)
mml.multi_margin_loss(Strange(), y, backend="generic", margin=0.5)
mml.multi_margin_loss(x, y, p=Fraction(3, 2), margin=np.float32(1), ignore_index=np.int64(-100))
kernel: str = mml.explain(x, y, axis=np.int8(1)).kernel
accumulator = mml.LossAccumulator(weight=w)
accumulator.update(x, y)
with mml.use_backend("generic"):
    total: float = accumulator.compute("sum")

mml.multi_margin_loss("nonsense", y)  # wrong
mml.multi_margin_loss(x, 3)  # wrong
mml.multi_margin_loss([[0.0, 1.0]], y)  # wrong
mml.multi_margin_loss(None, y)  # wrong
mml.multi_margin_loss(x, y, reduction="men")  # wrong
mml.multi_margin_loss_and_grad(x, y, check_target="maybe")  # wrong
mml.multi_margin_loss_and_grad(x, y, grad_output=1.0)  # wrong
mml.explain(x, y, reduction="men")  # wrong
mml.multi_margin_loss(x, y, weight=2.0)  # wrong
mml.multi_margin_loss(x, y, p="2")  # wrong
mml.multi_margin_loss(x, y, ignore_index=0.5)  # wrong
mml.multi_margin_loss(x, y, 2)  # wrong
mml.multi_margin_loss(x, y, backend=3)  # wrong
mml.LossAccumulator(weight="w")  # wrong
accumulator.update("nonsense", y)  # wrong
accumulator.compute("none")  # wrong
mml.nothing  # wrong
"""
CHECKERS = {
    "mypy": ("--strict", "--follow-imports=silent", "--no-error-summary", "--cache-dir={cache}"),
    "pyright": ("--pythonpath", sys.executable),
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_wrong_calls_are_found(checker, installed, tmp_path):
    if find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    project = tmp_path / "project.py"
    project.write_text(DOWNSTREAM)
    options = [option.format(cache=tmp_path / "cache") for option in CHECKERS[checker]]
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{installed}"]}}')
    done = subprocess.run(
        [sys.executable, "-m", checker, *options, project.name],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if "error" in line and "project.py:" in line]
    found = {int(line.split("project.py:")[1].split(":")[0]) for line in lines}
    wanted = {i for i, line in enumerate(DOWNSTREAM.splitlines(), 1) if "# wrong" in line}
    assert found == wanted, done.stdout + done.stderr
