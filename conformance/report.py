"""The report: runs of the checks on one or more libraries, as JSON and as Markdown."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from mml_arrayapi._version import __version__
from mml_arrayapi.conformance.suite import (
    EXPECTED,
    FAIL,
    MISSING,
    NOT_RUN,
    PASS,
    STATES,
    UNSUPPORTED,
    Result,
)

_WORST_FIRST = (FAIL, EXPECTED, MISSING, NOT_RUN, PASS, UNSUPPORTED)


@dataclass(frozen=True, slots=True)
class Run:
    """All results of one library.

    Attributes
    ----------
    library, version : str
        As it calls itself.
    device, backend : str or None
        What was asked for.
    dtypes : list of str
        The dtypes under test.
    seed : int
        Of the random numbers.
    capabilities : dict
        See :func:`mml_arrayapi.conformance.capabilities.capabilities`.
    results : list of Result
        One per check and dtype.
    """

    library: str
    version: str
    device: str | None
    backend: str | None
    dtypes: list[str]
    seed: int
    capabilities: dict[str, Any]
    results: list[Result]

    @property
    def title(self) -> str:
        """Library, version, and the device and kernel if they were chosen."""
        return " ".join(filter(None, (self.library, self.version, self.device, self.backend)))

    @property
    def seconds(self) -> float:
        """How long the checks took."""
        return sum(result.seconds for result in self.results)

    def counts(self) -> dict[str, int]:
        """Count the results by state."""
        found = Counter(result.state for result in self.results)
        return {state: found[state] for state in STATES}

    def cell(self, check: str) -> list[Result]:
        """Return the results of one check, one per dtype."""
        return [result for result in self.results if result.check == check]

    def warnings(self) -> list[str]:
        """List what the library warned of, once each."""
        return list(dict.fromkeys(text for result in self.results for text in result.warnings))


def header() -> dict[str, str]:
    """Say with what, where and when a report was made.

    Returns
    -------
    dict of str
    """
    return {
        "mml_arrayapi": __version__,
        "array-api-compat": metadata.version("array-api-compat"),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def summary(state_counts: dict[str, int]) -> str:
    """Write counts in words: "90 pass, 2 not run"."""
    return ", ".join(f"{n} {state}" for state, n in state_counts.items() if n)


def worst(results: Iterable[Result]) -> str:
    """Return the state that stands for several dtypes: what is not passed goes first.

    A dtype that the library lacks counts only where there is no other.
    """
    states = {result.state for result in results}
    return next((state for state in _WORST_FIRST if state in states), NOT_RUN)


def checks_of(runs: Sequence[Run]) -> dict[str, list[str]]:
    """List the checks of all runs by topic, in their order."""
    topics: dict[str, list[str]] = {}
    for result in (result for run in runs for result in run.results):
        names = topics.setdefault(result.topic, [])
        if result.check not in names:
            names.append(result.check)
    return topics


def as_json(head: dict[str, str], runs: Sequence[Run]) -> dict[str, Any]:
    """Return the report as plain values, to be stored and compared.

    Parameters
    ----------
    head : dict
        See :func:`header`.
    runs : sequence of Run
        The libraries.

    Returns
    -------
    dict
    """
    return {
        "format": "mml-conformance-report",
        "version": 1,
        "header": head,
        "runs": [{**asdict(run), "counts": run.counts()} for run in runs],
    }


def from_json(report: dict[str, Any]) -> tuple[dict[str, str], list[Run]]:
    """Take the header and the runs out of a stored report.

    Parameters
    ----------
    report : dict
        What :func:`as_json` returned.

    Returns
    -------
    header : dict
    runs : list of Run

    Raises
    ------
    ValueError
        It is another format or version.
    """
    if (report.get("format"), report.get("version")) != ("mml-conformance-report", 1):
        raise ValueError("not a conformance report of version 1")
    runs = []
    for stored in report["runs"]:
        fields = {name: value for name, value in stored.items() if name != "counts"}
        fields["results"] = [
            Result(**{**result, "warnings": tuple(result["warnings"])})
            for result in stored["results"]
        ]
        runs.append(Run(**fields))
    return report["header"], runs


def as_markdown(head: dict[str, str], runs: Sequence[Run]) -> str:
    """Write the report as Markdown, to be pasted.

    Parameters
    ----------
    head : dict
        See :func:`header`.
    runs : sequence of Run
        The libraries.

    Returns
    -------
    str
    """
    lines = [" · ".join(f"{name} {value}" for name, value in head.items()), ""]
    lines += _table("", runs, [("", [(run.title) for run in runs])])
    reasons: dict[str, int] = {}
    rows = [("**dtypes**", [", ".join(_floats_of(run)) for run in runs])]
    rows += [("**kernel**", [", ".join(kernels_of(run)) for run in runs])]
    rows += [("**in all**", [summary(run.counts()) for run in runs])]
    for topic, checks in checks_of(runs).items():
        rows.append((f"**{topic}**", [""] * len(runs)))
        rows += [(name, [_cell(run.cell(name), reasons) for run in runs]) for name in checks]
    lines += [_row(name, cells) for name, cells in rows]
    if reasons:
        lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    for run in runs:
        lines += [""] + [f"- {run.title}: {text}" for text in remarks(run)]
    for result in (result for run in runs for result in run.results if result.failed):
        lines += ["", f"**FAIL: {result.check} [{result.dtype}]**: {result.reason}", ""]
        lines += ["```python", result.snippet, "```", "", f"Again: `{result.command}`"]
    return "\n".join(lines) + "\n"


def kernels_of(run: Run) -> list[str]:
    """Name the kernels that ran, each once."""
    ran = (kernel["runs"] for kernel in run.capabilities["kernels"].values())
    return list(dict.fromkeys(name for name in ran if name))


def remarks(run: Run) -> list[str]:
    """Say in words what a library lacks, what was done instead, and what it warned of."""
    told = run.capabilities
    found = [f"target values are {told['values']}"]
    if told["functions_missing"]:
        found.append(f"functions missing: {', '.join(told['functions_missing'])}")
    if told["dtypes_missing"]:
        found.append(f"dtypes missing: {', '.join(told['dtypes_missing'])}")
    found += told["instead"]
    found += [f"warned: {text}" for text in run.warnings()]
    return found


def _floats_of(run: Run) -> list[str]:
    return [name for name in run.dtypes if name in run.capabilities["dtypes"]]


def _table(corner: str, runs: Sequence[Run], head: list[tuple[str, list[str]]]) -> list[str]:
    lines = [_row(corner or name, cells) for name, cells in head]
    return [*lines, "|" + "---|" * (len(runs) + 1)]


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"


def _cell(results: Sequence[Result], reasons: dict[str, int]) -> str:
    """Write a state, with the numbers of the reasons for it."""
    if not results:
        return ""
    state = worst(results)
    if state == PASS:
        return state
    why = dict.fromkeys(result.reason for result in results if result.state == state)
    marks = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in why if reason]
    return f"{'**FAIL**' if state == FAIL else state} ({', '.join(marks)})"
