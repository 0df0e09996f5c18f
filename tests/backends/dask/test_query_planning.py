"""Dask's other arrays, those of the query planner: the same tests, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.dask.conftest import EXPRESSIONS

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")


@pytest.mark.skipif(dask.__version__ < "2026", reason="the query planner of older Dask lacks more")
@pytest.mark.skipif(EXPRESSIONS, reason="this is the process with query planning")
def test_the_same_tests_pass_with_query_planning():
    """A process has arrays of one kind: the choice is made when dask.array is imported."""
    here = Path(__file__).parent
    files = [here / f"test_{name}.py" for name in ("dask", "chunks", "graph", "evaluation")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    made = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"),
            *("-k", "not apart", *files),
        ],
        env={**environment, "DASK_ARRAY__QUERY_PLANNING": "True"},
        cwd=here.parents[2],
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stdout[-10_000:]
    assert " passed" in made.stdout
