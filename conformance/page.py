"""The report as one HTML page that needs nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from string import Template

from mml_arrayapi.conformance.checks import all_checks
from mml_arrayapi.conformance.report import Run, checks_of, kernels_of, remarks, summary
from mml_arrayapi.conformance.suite import FAIL, PASS, STATES, UNSUPPORTED, Result

OPEN = 3  # failures shown unfolded; where one thing is wrong, many checks fail
_TITLE = "mml_arrayapi conformance"
_SHORT = {"float32": "f32", "float64": "f64", "float16": "f16", "bfloat16": "bf16"}


def as_html(head: dict[str, str], runs: Sequence[Run]) -> str:
    """Write the report as an HTML page.

    Parameters
    ----------
    head : dict
        See :func:`mml_arrayapi.conformance.report.header`.
    runs : sequence of Run
        The libraries.

    Returns
    -------
    str
    """
    style, _, body = _text("conformance", "page.html").partition("</style>\n")
    body = Template(body).substitute(
        head=" &middot; ".join(f"{escape(k)} {escape(v)}" for k, v in head.items()),
        cards="".join(map(_card, runs)),
        failures=_failures(runs),
        legend="".join(f"<span>{_dot(state, '')} {state}</span>" for state in STATES),
        columns="".join(f"<th>{escape(run.title)}</th>" for run in runs),
        rows=_rows(runs),
        reasons=_reasons(runs),
        capabilities="".join(map(_capabilities, runs)),
    )
    page = _text("evaluation", "base.html")  # for Jinja, which is not needed here
    parts = {"title": _TITLE, "style": style.removeprefix("<style>\n"), "body": body}
    for name, part in parts.items():
        page = page.replace(f"{{% block {name} %}}{{% endblock %}}", part)
    return page


def _text(package: str, name: str) -> str:
    return files(f"mml_arrayapi.{package}").joinpath(name).read_text("utf-8")


def _dot(state: str, text: str, title: str = "") -> str:
    hint = f' title="{escape(title)}"' if title else ""
    return f'<span class="dot {state.replace(" ", "-")}"{hint}>{escape(text) or "&nbsp;"}</span>'


def _card(run: Run) -> str:
    counts = run.counts()
    bar = "".join(
        f'<span class="{state.replace(" ", "-")}" style="flex: {n}"></span>'
        for state, n in counts.items()
        if n
    )
    verdict = f"{counts[FAIL]} failed" if counts[FAIL] else "no failure"
    return (
        f'<div class="card"><h3>{escape(run.title)}</h3>'
        f'<span class="verdict">{verdict}</span> <span class="soft">in {run.seconds:.1f} s, '
        f"kernel {escape(', '.join(kernels_of(run)) or 'none')}</span>"
        f'<div class="bar">{bar}</div><span class="soft">{summary(counts)}</span></div>'
    )


def _rows(runs: Sequence[Run]) -> str:
    clauses = {check.name: check.clause for check in all_checks()}
    lines = []
    for topic, checks in checks_of(runs).items():
        lines.append(f'<tr class="topic"><th>{escape(topic)}</th>{"<td></td>" * len(runs)}</tr>')
        for name in checks:
            cells = "".join(f"<td>{_cell(run.cell(name))}</td>" for run in runs)
            lines.append(
                f'<tr><th title="{escape(clauses.get(name, ""))}">{escape(name)}</th>{cells}</tr>'
            )
    return "\n".join(lines)


def _cell(results: Iterable[Result]) -> str:
    return "".join(
        _dot(r.state, _SHORT[r.dtype], f"{r.state}. {r.reason}".strip(". ")) for r in results
    )


def _failures(runs: Sequence[Run]) -> str:
    failed = [(run, result) for run in runs for result in run.results if result.failed]
    lines = [
        f"<details{' open' if i < OPEN else ''}><summary>{escape(run.title)}: "
        f"{escape(result.check)} [{result.dtype}]</summary><p>{escape(result.reason)}</p>"
        f"<pre>{escape(result.snippet)}</pre><pre>{escape(result.command)}</pre></details>"
        for i, (run, result) in enumerate(failed)
    ]
    return "<h2>Failures</h2>" + "\n".join(lines) if lines else ""


def _reasons(runs: Sequence[Run]) -> str:
    """Group what did not pass by library and reason."""
    blocks = []
    for run in runs:
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in run.results:
            if result.state not in (PASS, FAIL, UNSUPPORTED):
                grouped.setdefault((result.state, result.reason), []).append(result)
        items = "".join(
            f"<dt>{_dot(state, state)}</dt><dd>{_names(found)}"
            f'<br><span class="soft">{escape(reason)}</span></dd>'
            for (state, reason), found in grouped.items()
        )
        body = f"<dl>{items}</dl>" if items else "<p>Nothing.</p>"
        blocks.append(f"<details open><summary>{escape(run.title)}</summary>{body}</details>")
    return "\n".join(blocks)


def _names(results: Sequence[Result]) -> str:
    found: dict[str, list[str]] = {}
    for result in results:
        found.setdefault(result.check, []).append(result.dtype)
    return "; ".join(f"{escape(name)} [{', '.join(dtypes)}]" for name, dtypes in found.items())


def _capabilities(run: Run) -> str:
    told = run.capabilities
    pairs = [
        ("namespace", f"{told['namespace']}, array API {told['array_api_version']}"),
        ("dtypes", ", ".join(told["dtypes"])),
        *(("", text) for text in remarks(run)),
    ]
    for dtype, kernel in told["kernels"].items():
        why = "; ".join(f"not {name}: {text}" for name, text in kernel["why_not"].items())
        pairs.append((f"kernel, {dtype}", " — ".join(filter(None, (kernel["runs"], why)))))
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in pairs)
    title = f"{escape(run.title)}"
    return f"<details open><summary>{title}</summary><dl>{items}</dl></details>"
