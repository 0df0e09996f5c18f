"""Write ``conformance-results.md``: what the conformance checks find, library by library.

    python docs/make_conformance_results.py            runs the tests of the libraries we support
    python docs/make_conformance_results.py FILE ...   takes what they found from the files of
                                                       earlier runs (pytest --junitxml=FILE)
    python docs/make_conformance_results.py --others   other libraries too, each in a new
                                                       virtual environment with the newest release

Run it from the top folder, with the tests' requirements installed. Without ``--others`` that part
of the page is kept as it is.
"""

import json
import os
import subprocess
import sys
import tempfile
import venv
from itertools import chain
from pathlib import Path
from xml.etree import ElementTree

TOP = Path(__file__).resolve().parent.parent
PAGE = TOP / "docs" / "conformance-results.md"
TESTS = TOP / "tests" / "conformance" / "test_conformance.py"
MARK = "\n<!-- other libraries -->\n"

sys.path.insert(0, str(TOP))  # for tests.conformance.broken

from mml_arrayapi.conformance import Context, Result, all_checks  # noqa: E402
from mml_arrayapi.conformance.capabilities import capabilities  # noqa: E402
from mml_arrayapi.conformance.report import Run, as_markdown, from_json, header  # noqa: E402
from tests.conformance.broken import combinations, libraries  # noqa: E402
from tests.conformance.test_conformance import CONFIGURATIONS, state_of  # noqa: E402

SINGLE = ("--dtype", "float32")


def without(*names):
    """Return the options that run every check but some."""
    left = [check.name for check in all_checks() if check.name not in names]
    return [word for name in left for word in ("--check", name)]


PAIRS = "any two options work together"

# What pip installs, the module, the options, and what its authors would need to do.
OTHERS = (
    (
        ("ndonnx",),
        "ndonnx",
        (*SINGLE, *without("threads do not disturb each other", PAIRS)),
        "Nothing is left to do for eager arrays. `Info.dtypes()` requires the keyword `kind`, "
        "which the standard makes optional; we pass it. Reading a value back costs some ten "
        "milliseconds, so the checks take minutes; those of threads and of any two options were "
        "left out, as they had not ended after five minutes and after two hours (73 of 78 pairs "
        "had passed). LossAccumulator can't read the arrays, which DLPack does not export.",
    ),
    (
        ("marray", "numpy"),
        "marray_numpy",
        SINGLE,
        "Nothing is left to do. `marray.masked_namespace(numpy)` makes a namespace that can't be "
        "imported by name: the two-line module of `docs/conformance.md` gives it one.",
    ),
    (
        ("cubed",),
        "cubed",
        (*SINGLE, *without("large inputs agree with small ones", PAIRS)),
        "Nothing is left to do. Its arrays compute in `bool()`, so targets are not looked at "
        "unless `check_target='raise'` asks for it; a kernel that checks them block by block, as "
        "`backends/dask/` does for Dask, would raise errors when computed, and spare the plans "
        "of some twenty operations a call: the checks take minutes. Those of large inputs and of "
        "any two options were left out: Cubed cuts arrays that are repeated into thousands of "
        "chunks, which take minutes to read (48 of 78 pairs had passed after an hour and a half).",
    ),
    (
        ("sparse",),
        "sparse",
        SINGLE,
        "`arange` (or any way to make the class indices) is missing, and everything fails for "
        "that. Scores are dense as a rule: a kernel that converts to NumPy would be the honest "
        "answer.",
    ),
    (
        ("blosc2",),
        "blosc2",
        SINGLE,
        "`reshape` takes 1-d arrays only, and `squeeze` does not take the lazy expressions that "
        "other functions return. Both are in the standard; the rest fails for them.",
    ),
)
MARRAY = """\
import sys, marray, numpy
sys.modules[__name__] = marray.masked_namespace(numpy)
"""


def run(python, words, environment, folder):
    """Run the command; return its runs, or the last line of what went wrong."""
    stored = Path(folder) / "run.json"
    stored.unlink(missing_ok=True)
    done = subprocess.run(
        [python, "-W", "ignore", "-m", "mml_arrayapi.conformance", *words, "--json", str(stored)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if not stored.exists():
        return [], done.stderr.strip().rpartition("\n")[2].partition("error: ")[2]
    return from_json(json.loads(stored.read_text()))[1], None


def supported(results):
    """Tell what the test run found on the libraries that are installed here."""
    runs, absent = [], []
    for configuration, (dtypes, options) in CONFIGURATIONS.items():
        found = results.get(configuration, [])
        if not found:
            absent.append(f"- {configuration}: not part of this run")
            continue
        with state_of(configuration) as name:
            contexts = [Context(name, dtype=dtype, **options) for dtype in dtypes]
            told, version = capabilities(contexts), contexts[0].version()
        state = configuration.partition(" ")[2] or None
        runs.append(Run(name, version, state, None, list(dtypes), 0, told, found))
    return "\n".join([as_markdown(header(), runs), *absent])


def results_of(paths):
    """Read the results out of files that pytest wrote, by configuration."""
    found = {}
    for case in chain.from_iterable(ElementTree.parse(path).iter("testcase") for path in paths):
        told = {item.get("name"): item.get("value") for item in case.iter("property")}
        if "result" in told:
            result = json.loads(told["result"])
            result["warnings"] = tuple(result["warnings"])
            found.setdefault(told["configuration"], []).append(Result(**result))
    return found


def test_run(folder):
    """Run the tests of the libraries; return the file with their results."""
    path = Path(folder) / "tests.xml"
    command = ("pytest", "-q", "-k", "test_libraries", f"--junitxml={path}", str(TESTS))
    subprocess.run([sys.executable, "-m", *command], cwd=TOP, check=False)  # failures are shown
    return path


def others(folder):
    """Run the checks on the newest releases of other libraries."""
    runs = []
    (Path(folder) / "marray_numpy.py").write_text(MARRAY)
    for packages, module, words, _ in OTHERS:
        print(packages[0], flush=True)
        home = Path(folder) / f"venv-{packages[0]}"
        venv.create(home, with_pip=True)
        python = str(home / "bin" / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", str(TOP), *packages], check=True)
        found, problem = run(python, ("--xp", module, *words), {}, folder)
        if problem:
            raise SystemExit(f"{packages[0]}: {problem}")
        runs += found
    return text_of_others(runs)


def text_of_others(runs):
    """Write their part of the page: the matrix, without the snippets, and what is to be done."""
    table = as_markdown(header(), runs).partition("\n**FAIL")[0].rstrip()
    advice = [f"- **{packages[0]}**: {text}" for packages, _, _, text in OTHERS]
    return "\n".join([table, "", "What their authors would need to do:", "", *advice])


def broken():
    """List everything that is broken on purpose, and the check that a test sees find it."""
    faults = {f"kernel: {fault}": claim for fault, claim in combinations.CLAIMS.items()}
    for xp, claim in libraries.LIBRARIES.items():
        faults[f"library: {xp.__name__.replace('_', ' ')}"] = claim
    rows = [f"| {fault} | {name} [{dtype}] |" for fault, (name, dtype) in faults.items()]
    return "\n".join(["| broken on purpose | found by |", "|---|---|", *rows])


def main():
    """Write the page."""
    old = PAGE.read_text("utf-8") if PAGE.exists() else MARK
    with tempfile.TemporaryDirectory() as folder:
        given = [Path(word) for word in sys.argv[1:] if not word.startswith("--")]
        ours = supported(results_of(given or [test_run(folder)]))
        theirs = others(folder) if "--others" in sys.argv[1:] else old.partition(MARK)[2]
    page = f"""\
# What the conformance checks find

Written by `docs/make_conformance_results.py`; the words are explained in
[Check an array library](conformance.md). A number in brackets stands for a reason below the table.
A cell is empty if that check does not run there: what does not depend on the dtype runs once.

## Libraries we support

{ours}

## Broken on purpose

The checks are tested on kernels and libraries with one fault each (`tests/conformance/broken`).
`tests/conformance/test_broken.py` fails if the check that is named here does not find the fault.

{broken()}

## Libraries that nobody here tuned for
{MARK}"""
    PAGE.write_text(f"{page}\n{theirs.strip()}\n", "utf-8")
    print(f"written: {PAGE.relative_to(TOP)}")


if __name__ == "__main__":
    main()
