"""Write ``conformance-results.md``: what the conformance checks find, library by library.

    python docs/make_conformance_results.py            the libraries we support, and what is broken
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
from dataclasses import replace
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
PAGE = TOP / "docs" / "conformance-results.md"
MARK = "\n<!-- other libraries -->\n"

sys.path.insert(0, str(TOP))  # for tests.conformance.broken

from mml_arrayapi import libraries as libraries_of_the_package  # noqa: E402
from mml_arrayapi import registry  # noqa: E402
from mml_arrayapi.conformance import Context, all_checks  # noqa: E402
from mml_arrayapi.conformance.report import as_markdown, from_json, header  # noqa: E402
from tests.conformance.broken import kernels, libraries  # noqa: E402

STRICT = "array_api_strict"
# Title, options, environment: each library as it comes, and what else two of them can be.
SUPPORTED = (
    # JAX compiles for every shape and parameter: one dtype takes minutes.
    *(
        (name, ("--xp", name, *(("--dtype", "float32") if name == "jax" else ())), {})
        for name in libraries_of_the_package.SUPPORTED
    ),
    ("jax, x64", ("--xp", "jax", "--dtype", "float64"), {"JAX_ENABLE_X64": "1"}),
    (f"{STRICT}, no_float64", ("--xp", STRICT, "--device", "no_float64"), {}),
)

SINGLE = ("--dtype", "float32")
WITHOUT_THREADS = tuple(
    word
    for check in all_checks()
    if check.name != "threads do not disturb each other"
    for word in ("--check", check.name)
)
# What pip installs, the module, the options, and what its authors would need to do.
OTHERS = (
    (
        ("ndonnx",),
        "ndonnx",
        (*SINGLE, *WITHOUT_THREADS),
        "Nothing is left to do for eager arrays. `Info.dtypes()` requires the keyword `kind`, "
        "which the standard makes optional; we pass it. Reading a value back costs some ten "
        "milliseconds, so the checks take minutes; the one of threads was left out, as it had not "
        "ended after five.",
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
        SINGLE,
        "Nothing is left to do. Its arrays compute in `bool()`, so targets are not looked at "
        "unless `check_target='raise'` asks for it; a kernel that checks them block by block, as "
        "`backends/dask_blocks.py` does for Dask, would give errors at compute time, and spare "
        "the plans of some twenty operations a call: the checks take minutes.",
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


def supported(folder):
    """Run the checks on the libraries that are installed here."""
    runs, absent = [], []
    for title, words, environment in SUPPORTED:
        print(title, flush=True)
        found, problem = run(sys.executable, words, environment, folder)
        runs += [replace(one, library=title, device=None) for one in found]
        absent += [f"- {title}: not run ({problem})"] if problem else []
    return "\n".join([as_markdown(header(), runs), *absent])


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
    """Run every check on everything that is broken on purpose; say which found it."""
    rows = ["| broken on purpose | found by the check that claims it | and by others |",
            "|---|---|---|"]  # fmt: skip
    for fault, (name, dtype) in kernels.FAULTS.items():
        registry.register_kernel(kernels.kernel(fault, libraries.SOUND.__name__))
        context = Context(libraries.SOUND, dtype=dtype, backend=kernels.name_of(fault))
        rows.append(_found(f"kernel: {fault}", name, dtype, context))
    for xp, (name, dtype) in libraries.LIBRARIES.items():
        title = f"library: {xp.__name__.replace('_', ' ')}"
        rows.append(_found(title, name, dtype, Context(xp, dtype=dtype)))
    return "\n".join(rows)


def _found(title, name, dtype, context):
    failed = [check.name for check in all_checks() if check(context).failed]
    claimed = f"{name} [{dtype}]" if name in failed else "**no**"
    return f"| {title} | {claimed} | {len(failed) - (name in failed)} |"


def main():
    """Write the page."""
    old = PAGE.read_text("utf-8") if PAGE.exists() else MARK
    with tempfile.TemporaryDirectory() as folder:
        ours = supported(folder)
        theirs = others(folder) if "--others" in sys.argv[1:] else old.partition(MARK)[2]
    page = f"""\
# What the conformance checks find

Written by `docs/make_conformance_results.py`; what the words mean is in
[conformance.md](conformance.md). A number in brackets is that of the reason below the table.

## Libraries we support

{ours}

## Broken on purpose

The checks are tested on kernels and libraries with one fault each (`tests/conformance/broken`).

{broken()}

## Libraries that nobody here tuned for
{MARK}"""
    PAGE.write_text(f"{page}\n{theirs.strip()}\n", "utf-8")
    print(f"written: {PAGE.relative_to(TOP)}")


if __name__ == "__main__":
    main()
