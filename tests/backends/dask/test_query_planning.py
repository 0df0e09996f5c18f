"""Dask's other arrays, those of its query planner: the same tests, in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import dask.array as da
import numpy as np
import pytest

HERE = Path(__file__).parent
PLANNED = "DASK_ARRAY__QUERY_PLANNING"
NOT_THERE = (
    "unknown",  # boolean masks as indices, and compute_chunk_sizes()
    "three_rows",  # the same
    "chunks_of_other",  # sets an array's _meta
    "rechunked",  # looks at layers of a high-level graph, as do the next
    "by_reference",
    "task",
)

pytestmark = pytest.mark.skipif(
    not (Path(da.__file__).parent / "_array_expr").exists(),
    reason="this Dask has one kind of arrays only",
)


@pytest.mark.skipif(da.array_expr_enabled(), reason="this is that process")
@pytest.mark.parametrize("file", ["test_dask.py", "test_chunks.py", "test_graph.py"])
def test_the_same_tests_pass(file):
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"),
            *("-k", " and ".join(f"not {name}" for name in NOT_THERE), str(HERE / file)),
        ],
        env={**os.environ, PLANNED: "True"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


PROGRAM = """
import dask.array as da, numpy as np
import mml_arrayapi as mml
assert da.array_expr_enabled()
x = da.from_array(np.zeros((12, 6), np.float32), chunks=(4, 6))
y = da.from_array(np.arange(12) % 6, chunks=4)
bare = len(x.sum().optimize().__dask_graph__())
loss = mml.multi_margin_loss(x, y)
assert loss.shape == () and loss.dtype == np.float32 and type(loss._meta) is np.ndarray
assert len(loss.optimize().__dask_graph__()) <= 1.1 * bare + 3
grad = mml.multi_margin_loss_and_grad(x, y)[1]
assert type(grad) is type(x) and grad.chunks == x.chunks
assert len(grad.optimize().__dask_graph__()) <= 2 * 3 + 6
print(mml.explain(x, y).kernel, float(loss), float(mml.multi_margin_loss(x, y, backend="generic")))
"""


def test_graphs_are_as_small():
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env={**os.environ, PLANNED: "True"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    value = 5 / 6
    assert run.stdout.split() == ["dask-blocks", *[str(float(np.float32(value)))] * 2]
