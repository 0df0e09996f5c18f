"""All checks, in the order in which reports list them."""

from __future__ import annotations

from mml_arrayapi.conformance import (
    checks_arguments,
    checks_arrays,
    checks_combinations,
    checks_gradient,
    checks_limits,
    checks_shapes,
    checks_targets,
    checks_types,
    checks_values,
)
from mml_arrayapi.conformance.suite import Check, registered

_TOPICS = (
    checks_values.TOPIC,
    checks_gradient.TOPIC,
    checks_types.TOPIC,
    checks_limits.LIMITS,
    checks_limits.IGNORED,
    checks_shapes.TOPIC,
    checks_targets.TOPIC,
    checks_arguments.TOPIC,
    checks_arrays.TOPIC,
    checks_limits.LAYOUTS,
    checks_combinations.TOPIC,
    checks_arrays.AGREEMENT,
)


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
    return tuple(sorted(registered(), key=lambda check: _TOPICS.index(check.topic)))
