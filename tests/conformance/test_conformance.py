"""Every installed library through all conformance checks; the command and its reports."""

import argparse
import contextlib
import inspect
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

import mml_arrayapi
from mml_arrayapi import libraries
from mml_arrayapi.conformance import Context, Result, all_checks, capabilities, report
from mml_arrayapi.conformance.command import add_arguments
from mml_arrayapi.conformance.page import as_html
from mml_arrayapi.conformance.suite import FAIL, NOT_RUN, PASS, UNSUPPORTED

ALL = ("float32", "float64", "float16", "bfloat16")

# A library (as --xp says it), or a state of it -> the dtypes to test and what makes the context.
CONFIGURATIONS = {
    "numpy": (ALL, {"backend": "numpy-cpu"}),
    "numpy generic": (ALL, {"backend": "generic"}),
    "torch": (ALL, {"backend": "torch-cpu"}),
    "torch generic": (ALL, {"backend": "generic"}),
    "dask": (("float32",), {"backend": "dask-blocks"}),
    "jax": (("float32",), {}),
    "jax x64": (("float64",), {}),
    "array_api_strict": (ALL, {}),
    "array_api_strict 2022.12": (("float32",), {}),
    "array_api_strict 2023.12": (("float32",), {}),
    "array_api_strict 2024.12": (("float32",), {}),
    "array_api_strict static shapes": (("float32",), {}),
    "array_api_strict device1": (("float32",), {"device": "device1"}),
    "array_api_strict no_float64": (ALL, {"device": "no_float64"}),
    "array_api_strict no_x64": (("float32",), {"device": "no_x64"}),
}

# JAX compiles every operation for every shape, half a minute in all: float64 goes through the
# checks that differ by dtype only, 16-bit types through these.
BRIEFLY = (
    "intermediate results do not overflow",
    "small gradients keep their precision",
    "weight is used in the computing precision",
    "results have the dtype of input",
)

# The same for checks that take minutes, or most of one and would find nothing new.
TOO_LONG = {
    **dict.fromkeys(
        (name for name in CONFIGURATIONS if re.match("array_api_strict .|dask|jax", name)),
        ("any three options work together",),
    ),
    **dict.fromkeys(
        ("jax", "jax x64"), ("any two options work together", "any three options work together")
    ),
}


@contextlib.contextmanager
def state_of(configuration):
    """Put the library into the state that a configuration names."""
    name, _, state = configuration.partition(" ")
    module = pytest.importorskip(name)
    if state == "x64":
        module.config.update("jax_enable_x64", True)
        try:
            yield name
        finally:
            module.config.update("jax_enable_x64", False)
    elif state == "static shapes":
        with module.ArrayAPIStrictFlags(boolean_indexing=False, data_dependent_shapes=False):
            yield name
    elif state.startswith("20"):
        with module.ArrayAPIStrictFlags(api_version=state):
            yield name
    else:
        yield name


def cases():
    for configuration, (dtypes, _) in CONFIGURATIONS.items():
        for check in all_checks():
            if configuration == "jax x64" and not check.every_dtype:
                continue
            if check.name in TOO_LONG.get(configuration, ()):
                continue
            for dtype in dtypes if check.every_dtype else dtypes[:1]:
                yield configuration, check, dtype
            if configuration == "jax" and check.name in BRIEFLY:
                yield configuration, check, "float16"
                yield configuration, check, "bfloat16"


@pytest.mark.parametrize(
    ("configuration", "check", "dtype"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}-{case[2]}") for case in cases()],
)
def test_libraries(configuration, check, dtype, record_property):
    with state_of(configuration) as name:
        context = Context(name, dtype=dtype, **CONFIGURATIONS[configuration][1])
        result = check(context)
    # docs/make_conformance_results.py makes its page of what --junitxml writes.
    record_property("configuration", configuration)
    record_property("result", json.dumps(asdict(result)))
    if result.state in (NOT_RUN, UNSUPPORTED):
        pytest.skip(result.reason)
    assert result.state == PASS, str(result)


def command(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = parser.parse_args(words)
    return arguments.run(arguments)


QUICK = ("--check", "gradient rows sum to 0", "--check", "read only inputs are accepted")
BROKEN = "tests.conformance.broken.counts_from_1"


def test_a_good_library_gives_0(capsys):
    assert command("--xp", "numpy", "--xp", "array_api_strict", *QUICK) == 0
    output = capsys.readouterr().out
    assert "pass         gradient rows sum to 0  [float32 float64 float16]" in output
    assert (
        "not run      read only inputs are accepted  [float32]  array_api_strict offers" in output
    )


def test_a_bad_library_gives_1_with_a_snippet_and_a_command(capsys):
    check = "float64 reference agrees"
    assert command("--xp", BROKEN, "--dtype", "float32", "--seed", "7", "--check", check) == 1
    output = capsys.readouterr().out
    again = f"mml-arrayapi conformance --xp {BROKEN} --backend generic --dtype float32 --seed 7 --check '{check}'"
    assert f"again: {again}" in output
    assert command("--xp", BROKEN, "--dtype", "float32", "--seed", "7", "--check", check) == 1
    assert (
        capsys.readouterr().out.split("FAIL:")[1].split("\nagain")[0] in output
    )  # the same numbers


def test_the_snippet_shows_the_failure(capsys):
    check = next(check for check in all_checks() if check.name == "float64 reference agrees")
    result = check(Context(BROKEN))
    exec(result.snippet, {})
    shown = capsys.readouterr().out
    assert shown
    assert result.reason
    assert len(result.snippet.splitlines()) <= 8


def test_nothing_passed_is_no_success(capsys):
    assert command("--xp", "array_api_strict", "--check", "read only inputs are accepted") == 1
    capsys.readouterr()


def test_expected_failures(capsys):
    check = "float64 reference agrees"
    words = (
        "--xp",
        BROKEN,
        "--dtype",
        "float32",
        "--check",
        check,
        "--check",
        "no classes is an error",
    )
    assert command(*words, "--expect", f"{check}=arange is wrong") == 0
    assert f"expected failure  {check}  [float32]  arange is wrong (p=1" in capsys.readouterr().out
    assert command("--xp", "numpy", *QUICK, "--expect", "gradient rows sum to 0=it is bad") == 1
    assert "was expected to fail (it is bad), but passes" in capsys.readouterr().out


def test_a_module_that_leaves_gives_2(tmp_path, monkeypatch, capsys):
    (tmp_path / "it_leaves.py").write_text("raise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert command("--xp", "it_leaves") == 2
    assert "--xp it_leaves: cannot be imported, or makes no arrays: SystemExit: 3" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--xp", "no_such_library"), "--xp no_such_library: cannot be imported: No module named"),
        (("--xp", "math"), "--xp math: math is no array API namespace"),
        (("--xp", "array_api_strict", "--device", "moon"), "no device 'moon'; there are: "),
        (
            ("--xp", "numpy", "--check", "nonsense"),
            "--check: no check is named 'nonsense'; known are",
        ),
        (("--xp", "numpy", "--expect", "nonsense"), "--expect: 'nonsense' is not CHECK=REASON"),
        (("--xp", "numpy", "--backend", "nonsense"), "--xp numpy: backend: no kernel is named"),
        (
            ("--xp", "numpy", "--backend", "torch-cpu"),
            "takes arrays of torch, but input is of numpy",
        ),
        (("--xp", ".numpy"), "--xp .numpy: cannot be imported, or makes no arrays: TypeError"),
        (("--xp", "numpy", "--expect", "nonsense=x"), "no check is named 'nonsense'"),
        (
            ("--xp", "numpy", "--json", "/no/such/folder/x.json"),
            "cannot write /no/such/folder/x.json",
        ),
        (
            ("--xp", "numpy", "--json", "same", "--markdown", "./same"),
            "cannot write same: --report, --json and --markdown must be different files",
        ),
    ],
)
def test_bad_input_gives_2_and_one_line(words, message, capsys):
    assert command(*words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_reports(tmp_path, capsys):
    html, stored, text = (tmp_path / name for name in ("r.html", "r.json", "r.md"))
    words = ("--xp", BROKEN, "--xp", "numpy", "--check", "float64 reference agrees", *QUICK)
    assert (
        command(*words, "--report", str(html), "--json", str(stored), "--markdown", str(text)) == 1
    )
    capsys.readouterr()

    head, runs = report.from_json(json.loads(stored.read_text()))
    assert [run.title for run in runs] == [
        "tests generic",
        f"numpy {runs[1].version} numpy-cpu",
        f"numpy {runs[1].version} generic",
    ]
    assert runs[0].counts()[FAIL] == 7  # the gradient's rows, and disagreement, too
    assert head["mml_arrayapi"]
    assert report.as_markdown(head, runs) == text.read_text("utf-8")
    assert as_html(head, runs) == html.read_text("utf-8")

    page = html.read_text("utf-8")
    assert "http" not in page  # nothing from elsewhere
    assert '<span class="dot FAIL"' in page
    markdown = text.read_text("utf-8")
    assert "| float64 reference agrees | **FAIL** (1, 2, 3) | pass | pass |" in markdown
    assert (
        "```python\nimport mml_arrayapi as mml\nimport tests.conformance.broken.counts_from_1 as xp"
        in markdown
    )


def test_other_json_is_refused():
    with pytest.raises(ValueError, match="not a conformance report of version 1"):
        report.from_json({"format": "something"})


def test_what_is_not_passed_stands_for_the_dtypes():
    def results(*states):
        return [Result("c", "t", "float32", state) for state in states]

    assert report.worst(results(PASS, UNSUPPORTED)) == PASS
    assert report.worst(results(UNSUPPORTED)) == UNSUPPORTED
    assert report.worst(results(PASS, NOT_RUN)) == NOT_RUN
    assert report.worst(results(NOT_RUN, FAIL, PASS)) == FAIL


def test_capabilities():
    told = capabilities.capabilities(
        [Context("array_api_strict"), Context("array_api_strict", dtype="float16")]
    )
    assert told["dtypes_missing"] == ["float16", "bfloat16"]
    assert told["functions_missing"] == []
    assert told["kernels"] == {"float32": {"runs": "generic", "why_not": {}}}
    assert told["values"] == "at hand: a target out of range raises"
    without = capabilities.capabilities([Context("array_api_strict", device="no_float64")])
    assert without["instead"] == ["no float64: sums are kept accurate by adding blocks in float32"]


def test_every_function_that_is_used_is_named(monkeypatch):
    import array_api_strict

    used = set()

    class Watched:
        __name__ = "array_api_strict"

        def __getattr__(self, name):
            used.add(name)
            return getattr(array_api_strict, name)

    row = libraries.plain("array_api_strict", Watched(), lambda _: libraries.HOST)
    runs = {"runs": lambda _: True}  # so that the sums of runs are seen too
    monkeypatch.setitem(libraries._by_module, "array_api_strict", replace(row, **runs))
    xp = array_api_strict
    weight = xp.ones(70, dtype=xp.float32)
    for p in (1, 2, 2.5):
        input, target = xp.zeros((70, 70), dtype=xp.float32), xp.arange(70)
        options = {"p": p, "weight": weight, "ignore_index": 3, "backend": "generic"}
        mml_arrayapi.multi_margin_loss_and_grad(input, target, **options)
    functions = {name for name in used if inspect.isroutine(getattr(xp, name, None))}
    assert {"arange", "where", "concat"} <= functions
    assert functions <= set(capabilities.functions_needed())


def test_the_module_is_the_command():
    words = [sys.executable, "-m", "mml_arrayapi.conformance", "--xp", "array_api_strict"]
    done = subprocess.run(
        [*words, "--check", "no classes is an error"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "1 pass" in done.stdout


def test_numpy_without_compiled_kernels_runs_on_the_generic_code():
    program = """
import sys
sys.modules["mml_arrayapi.backends.cpu._baseline"] = None
from mml_arrayapi.conformance import Context, all_checks
check = next(check for check in all_checks() if check.name == "gradient rows sum to 0")
result = check(Context("numpy"))
assert result.state == "pass", result
from mml_arrayapi.conformance.capabilities import capabilities
print(capabilities([Context("numpy")])["kernels"])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "'runs': 'generic'" in done.stdout
    assert "no compiled kernels" in done.stdout or "are not built" in done.stdout


@pytest.mark.skipif(
    not os.path.exists("/dev/full"), reason="there is no device that is always full"
)
def test_a_report_that_cannot_be_written(tmp_path, capsys):
    stored = tmp_path / "r.json"
    words = ("--xp", "numpy", "--check", "float64 reference agrees", *QUICK)
    assert command(*words, "--report", "/dev/full", "--json", str(stored)) == 2
    assert "error: cannot write /dev/full: No space left on device" in capsys.readouterr().err
    assert json.loads(stored.read_text())


@pytest.mark.parametrize("dtype", ["flaot32", "int64", None])
def test_only_real_floating_dtypes_are_checked(dtype):
    with pytest.raises(ValueError, match=f"dtype must be one of float32, .*, but is {dtype!r}"):
        Context("numpy", dtype=dtype)
