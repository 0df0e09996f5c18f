"""What ``pytest --pyargs mml_arrayapi.conformance`` collects; the plugin makes the tests of it."""

from typing import Any

import pytest

from mml_arrayapi.conformance.suite import PASS


def test_conformance(mml_conformance: Any) -> None:
    """Run one check with one dtype and kernel."""
    check, context = mml_conformance
    result = check(context)
    if result.failed:
        pytest.fail(str(result), pytrace=False)
    if result.state != PASS:
        pytest.skip(f"{result.state}: {result.reason}")
