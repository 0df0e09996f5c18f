"""The command ``mml-arrayapi conformance``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from mml_arrayapi.conformance.capabilities import capabilities
from mml_arrayapi.conformance.checks import all_checks
from mml_arrayapi.conformance.context import DTYPES, Context
from mml_arrayapi.conformance.page import as_html
from mml_arrayapi.conformance.report import Run, as_json, as_markdown, header, summary
from mml_arrayapi.conformance.suite import PASS, STATES, UNSUPPORTED, Check, Result
from mml_arrayapi.console import complain

OK, FAILED, BAD_INPUT = 0, 1, 2

_DESCRIPTION = """\
Check that the loss keeps its contract with the arrays of a library.

The exit code is 0 where something passed and nothing failed, else 1, and 2 for bad input."""
_EXAMPLE = """\
example: mml-arrayapi conformance --xp array_api_strict --dtype float32 --report report.html"""


def add_parser(commands: Any) -> None:
    """Add the command ``conformance``.

    Parameters
    ----------
    commands : argparse sub-parsers
        Of ``mml-arrayapi``.
    """
    add_arguments(
        commands.add_parser(
            "conformance",
            help="check the contract with the arrays of any library",
            description=_DESCRIPTION,
            epilog=_EXAMPLE,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options, and the function that runs the command.

    Parameters
    ----------
    parser : argparse.ArgumentParser
        Of the command.
    """
    add = parser.add_argument
    add("--xp", action="append", required=True, metavar="NAMESPACE",
        help="module of an array API namespace, or numpy, torch, cupy, dask, jax, "
             "array_api_strict; may be given again, to compare")  # fmt: skip
    add("--device", help="where arrays are made, as the library prints it")
    add("--dtype", action="append", choices=DTYPES, help="may be given again; default all")
    add("--backend", metavar="KERNEL",
        help="this kernel only; default each that can run, and the generic code")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random numbers; default 0")
    add("--check", action="append", metavar="NAME", help="this check only; may be given again")
    add("--expect", action="append", default=[], metavar="CHECK=REASON",
        help="a check that is known to fail, and why")  # fmt: skip
    add("--report", type=Path, metavar="FILE", help="write an HTML page")
    add("--json", type=Path, metavar="FILE", help="write JSON")
    add("--markdown", type=Path, metavar="FILE", help="write Markdown")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command.

    Parameters
    ----------
    arguments : argparse.Namespace
        The parsed options.

    Returns
    -------
    int
        The exit code.
    """
    try:
        checks = _checks(arguments.check)
        expected = _expected(arguments.expect)
        _writable(arguments)
        libraries = contexts_of(arguments)
    except ValueError as error:
        complain(f"mml-arrayapi conformance: error: {error}")
        return BAD_INPUT
    runs = [_run(contexts, checks, expected) for contexts in libraries]
    if not _write(arguments, runs):
        return BAD_INPUT
    results = [result for one in runs for result in one.results]
    failed = any(result.failed for result in results)
    nothing = not any(result.state == PASS for result in results)
    return FAILED if failed or nothing else OK


def _write(arguments: argparse.Namespace, runs: list[Run]) -> bool:
    """Write the reports that were asked for; tell whether all could be."""
    head, whole = header(), True
    for path, text in (
        (arguments.report, as_html(head, runs)),
        (arguments.json, json.dumps(as_json(head, runs), indent=1) + "\n"),
        (arguments.markdown, as_markdown(head, runs)),
    ):
        if path is None:
            continue
        try:
            path.write_text(text, "utf-8")
            print(f"written: {path}")
        except OSError as error:
            whole = False
            why = error.strerror or str(error)
            complain(f"mml-arrayapi conformance: error: cannot write {path}: {why}")
    return whole


def _checks(names: Sequence[str] | None, option: str = "--check") -> list[Check]:
    known = {check.name: check for check in all_checks()}
    for name in names or ():
        if name not in known:
            raise ValueError(f"{option}: no check is named {name!r}; known are: {', '.join(known)}")
    return [known[name] for name in names or known]


def _expected(given: Sequence[str]) -> dict[str, str]:
    expected = {}
    for text in given:
        name, equals, reason = text.partition("=")
        if not (equals and reason.strip()):
            raise ValueError(f"--expect: {text!r} is not CHECK=REASON")
        expected[_checks([name], "--expect")[0].name] = reason.strip()
    return expected


def _writable(arguments: argparse.Namespace) -> None:
    """Look before a long run whether there is a place for what it is to write."""
    paths = [p for p in (arguments.report, arguments.json, arguments.markdown) if p is not None]
    for path in paths:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ValueError(f"cannot write {path}: not a file in a folder that exists")
    for first, second in combinations(paths, 2):
        if first.exists() and second.exists():
            same = first.is_file() and first.samefile(second)
        else:
            same = first.resolve() == second.resolve()
        if same:
            raise ValueError(
                f"cannot write {second}: --report, --json and --markdown must be different files"
            )


def contexts_of(arguments: argparse.Namespace) -> list[list[Context]]:
    """Make the contexts of each library and kernel, one per dtype.

    Parameters
    ----------
    arguments : argparse.Namespace
        ``xp`` (a list of names), ``device``, ``dtype`` (a list, or None for all), ``backend`` (None
        for each kernel that can run) and ``seed``.

    Returns
    -------
    list of list of Context

    Raises
    ------
    ValueError
        A library can't be imported, is no array API namespace, or has no such device.
    """
    names = list(dict.fromkeys(arguments.xp))
    dtypes = list(dict.fromkeys(arguments.dtype or DTYPES))
    found = []
    for name in names:
        try:
            first = Context(name, device=arguments.device)
            kernels = _kernels(first, arguments.backend)
            # Another library to agree with computes by its own choice.
            others = [n for n in names if n != name]
            for kernel in kernels:
                contexts = [_context(name, d, arguments, kernel, others) for d in dtypes]
                found.append(contexts)
        except ImportError as error:
            raise ValueError(f"--xp {name}: cannot be imported: {error}") from None
        except ValueError as error:
            raise ValueError(f"--xp {name}: {error}") from None
        except (Exception, SystemExit) as error:  # a module that is imported may raise anything
            why = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"--xp {name}: cannot be imported, or makes no arrays: {why}"
            ) from error
    return found


def _kernels(context: Context, asked: str | None) -> list[str]:
    """Name the kernels that can run a usual problem, the generic code last; or the one asked for.

    Raises
    ------
    ValueError
        That one is none of the library's.
    """
    x, y = context.array(context.scores()), context.integers(context.targets())
    known = [name for name, _ in context.kernel(x, y, check_target="nan").considered]
    if asked is not None:
        if asked not in known:
            context.kernel(x, y, backend=asked, check_target="nan")
        return [asked]
    found = []
    for name in known:
        try:
            context.kernel(x, y, backend=name, check_target="nan")
        except ValueError:  # it refuses; the report says why
            continue
        found.append(name)
    return found


def _context(
    name: str, dtype: str, arguments: argparse.Namespace, kernel: str, others: list[str]
) -> Context:
    device, seed = arguments.device, arguments.seed
    other = Context(others[0], device=device, dtype=dtype, backend="generic") if others else None
    return Context(name, device=device, dtype=dtype, seed=seed, backend=kernel, other=other)


def _run(contexts: list[Context], checks: list[Check], expected: dict[str, str]) -> Run:
    """Run the checks on one library, and print a line for each."""
    first = contexts[0]
    one = Run(
        library=first.library,
        version=first.version(),
        device=None if first.device is None else str(first.device),
        backend=first.backend,
        dtypes=[context.dtype for context in contexts],
        seed=first.seed,
        capabilities=capabilities(contexts),
        results=[],
    )
    print(f"{one.title}: {len(checks)} checks", flush=True)
    topic = ""
    for check in checks:
        if check.topic != topic:
            topic = check.topic
            print(f"  {topic}")
        chosen = contexts if check.every_dtype else contexts[:1]
        results = [check(context, expected) for context in chosen]
        one.results.extend(results)
        print("\n".join(_lines(results)), flush=True)
    for result in filter(lambda result: result.failed, one.results):
        print(f"\n{result}")
    print(f"{one.title}: {summary(one.counts())}, in {one.seconds:.1f} s\n")
    return one


def _lines(results: list[Result]) -> list[str]:
    """Write one line per state, with the dtypes; what the library lacks only if that is all."""
    lines = []
    for state in STATES:
        found = [result for result in results if result.state == state]
        if found and (state != UNSUPPORTED or len(found) == len(results)):
            dtypes = " ".join(result.dtype for result in found)
            reason = found[0].reason.split("\n")[0]
            lines.append(f"    {state:<11}  {found[0].check}  [{dtypes}]  {reason}".rstrip())
    return lines
