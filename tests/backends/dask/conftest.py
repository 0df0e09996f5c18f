"""What the tests of Dask share."""

import dask
import dask.array as da
import pytest

EXPRESSIONS = getattr(da, "array_expr_enabled", bool)()  # arrays of the query planner


@pytest.fixture(params=["128MiB", "1B"], ids=["together", "apart"])
def chunks_of_classes(request):
    """Whether one task takes all chunks of the same rows, or there are tasks for each."""
    with dask.config.set({"array.chunk-size": request.param}):
        yield
