"""All checks, in the order in which reports list them."""

from __future__ import annotations

from mml_arrayapi.conformance import (  # noqa: F401 (importing a file registers its checks)
    checks_values,
    checks_shapes,  # isort: skip
    checks_types,
    checks_gradient,  # isort: skip
    checks_targets,
    checks_arguments,  # isort: skip
    checks_arrays,  # isort: skip
)
from mml_arrayapi.conformance.suite import Check, registered


def all_checks() -> tuple[Check, ...]:
    """List every check, to be parametrised by a test suite.

    Returns
    -------
    tuple of Check
        Each is called with a :class:`Context` and returns a :class:`Result`.

    Examples
    --------
    >>> from mml_arrayapi.conformance import Context, all_checks
    >>> check = all_checks()[0]
    >>> check(Context("numpy")).state
    'pass'
    """
    return registered()
