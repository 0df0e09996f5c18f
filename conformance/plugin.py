"""The conformance checks as tests of another project: a pytest plugin.

``pytest --pyargs mml_arrayapi.conformance --mml-xp my_library`` runs every check with every dtype
and kernel. Needs nothing but pytest and the library.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

_Error = pytest.Collector.CollectError  # printed without a traceback


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, all of which begin with ``--mml-``."""
    add = parser.getgroup(
        "mml_arrayapi", "conformance of an array library (mml_arrayapi)"
    ).addoption
    add("--mml-xp", metavar="NAMESPACE",
        help="module of the namespace under test, or numpy, torch, cupy, dask, jax")  # fmt: skip
    add("--mml-device", metavar="DEVICE", help="where arrays are made, as the library prints it")
    add("--mml-xfail", metavar="FILE", type=Path,
        help="checks that are known to fail: on each line the name of a check or test, and a "
             "reason after ' # '")  # fmt: skip
    add("--mml-skip", metavar="FILE", type=Path,
        help="checks that are not run, in the same format")  # fmt: skip


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of every check, dtype and kernel."""
    if "mml_conformance" in metafunc.fixturenames:
        metafunc.parametrize("mml_conformance", _cases(metafunc.config))


def _cases(config: pytest.Config) -> list[Any]:
    from mml_arrayapi.conformance.checks import all_checks
    from mml_arrayapi.conformance.command import contexts_of
    from mml_arrayapi.conformance.suite import pairs

    name, device = config.getoption("--mml-xp"), config.getoption("--mml-device")
    if not name:
        raise _Error("name the array library under test: --mml-xp NAMESPACE")
    asked = argparse.Namespace(xp=[name], device=device, dtype=None, backend=None, seed=0)
    try:
        cases = {
            f"{check.function.__name__}-{context.backend}-{context.dtype}": (check, context)
            for contexts in contexts_of(asked)
            for check, context in pairs(all_checks(), contexts)
        }
    except ValueError as error:
        raise _Error(str(error).replace("--xp", "--mml-xp", 1)) from None
    marks: dict[str, list[Any]] = {case: [] for case in cases}
    for case, reason in _listed(config, "--mml-xfail", cases):
        marks[case].append(pytest.mark.xfail(reason=reason, strict=True))
    for case, reason in _listed(config, "--mml-skip", cases):
        marks[case].append(pytest.mark.skip(reason=reason))
    return [pytest.param(cases[case], id=case, marks=marks[case]) for case in cases]


def _listed(config: pytest.Config, option: str, cases: Iterable[str]) -> list[tuple[str, str]]:
    """Return the tests that a file names, with the reasons; a line that names none is an error."""
    path = config.getoption(option)
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise _Error(f"{option}: cannot read {path}: {why}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        name, _, reason = line.partition("#")
        name = name.strip()
        if not name:
            continue
        wanted = name.partition("[")[2].rstrip("]") or name.replace(" ", "_")
        named = [case for case in cases if case == wanted or case.partition("-")[0] == wanted]
        if not named:
            raise _Error(f"{option}: {path}, line {number}: no test is named {name!r}")
        found += [(case, reason.strip()) for case in named]
    return found
