"""Conformance checks: whether the loss keeps the contract with the arrays of some library.

``python -m mml_arrayapi.conformance --xp my_library`` runs all of them; a test suite takes them
from :func:`all_checks`. Needs neither pytest nor NumPy.
"""

from mml_arrayapi.conformance.checks import all_checks
from mml_arrayapi.conformance.context import Context
from mml_arrayapi.conformance.suite import Check, Result

__all__ = ["Check", "Context", "Result", "all_checks"]
