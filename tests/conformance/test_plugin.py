"""The checks as a pytest plugin, in a test session of its own as another project would run it."""

from importlib.metadata import entry_points

import pytest

from mml_arrayapi.conformance import all_checks, plugin
from tests.conformance.broken import counts_from_1

pytest.importorskip("array_api_strict")  # here and above: a session forgets what it imports first

pytest_plugins = ["pytester"]

BROKEN = counts_from_1.__name__
WRONG = "float64_reference_agrees"
RIGHT = "no_classes_is_an_error"


@pytest.fixture
def session(pytester):
    """Run the checks of a library as another project does; return the result."""

    def run(*words, xp=BROKEN, select=f"{WRONG} or {RIGHT}"):
        library = ["--mml-xp", xp] if xp else []
        common = [
            "-rsxf",
            "-p",
            "no:randomly",
            "-p",
            "no:cacheprovider",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:unraisableexception",  # of what other tests of this process have left behind
        ]
        return pytester.runpytest_inprocess(
            "--pyargs", "mml_arrayapi.conformance", *common, "-k", select, *library, *words
        )

    return run


def test_results_and_ids(session):
    result = session("-v")
    result.assert_outcomes(
        passed=1, failed=3, skipped=1, deselected=result.parseoutcomes()["deselected"]
    )
    result.stdout.fnmatch_lines(
        [
            f"*::test_conformance[[]{WRONG}-generic-float32] FAILED*",
            f"*::test_conformance[[]{RIGHT}-generic-float32] PASSED*",
            "FAIL: float64 reference agrees [[]float32]",
            "*import mml_arrayapi as mml",
            "again: mml-arrayapi conformance --xp tests.conformance.broken.counts_from_1 *",
            "SKIPPED*unsupported: tests has no bfloat16 here*",
        ]
    )
    assert "plugin.py" not in result.stdout.str()  # a failure shows the library's, not our, lines


def test_every_check_has_a_test_of_its_own(session):
    result = session("--collect-only", "-q", select="float32")
    ids = [line.partition("[")[2] for line in result.outlines if "test_conformance[" in line]
    assert sorted(i.partition("-")[0] for i in ids) == sorted(
        check.function.__name__ for check in all_checks()
    )


@pytest.mark.parametrize("line", ["float64 reference agrees", f"{WRONG}  # issue 17"])
def test_expected_failures_by_check(session, tmp_path, line):
    (tmp_path / "known").write_text(f"# known\n\n{line}\n")
    result = session("--mml-xfail", tmp_path / "known")
    result.assert_outcomes(
        passed=1, xfailed=3, skipped=1, deselected=result.parseoutcomes()["deselected"]
    )
    assert "issue 17" in result.stdout.str() or "#" not in line


def test_expected_failures_by_id(session, tmp_path):
    prefix = "mml_arrayapi/conformance/test_conformance.py::test_conformance"
    (tmp_path / "known").write_text(f"{prefix}[{WRONG}-generic-float32]\n{WRONG}-generic-float64\n")
    assert session("--mml-xfail", tmp_path / "known").parseoutcomes()["xfailed"] == 2


def test_an_expected_failure_that_passes_is_a_failure(session, tmp_path):
    (tmp_path / "known").write_text(RIGHT)
    result = session("--mml-xfail", tmp_path / "known", select=RIGHT)
    assert result.parseoutcomes()["failed"] == 1
    assert "XPASS(strict)" in result.stdout.str()


def test_skips(session, tmp_path):
    (tmp_path / "known").write_text(f"{WRONG} # crashes\n")
    result = session("--mml-skip", tmp_path / "known")
    assert "failed" not in result.parseoutcomes()
    assert "crashes" in result.stdout.str()


@pytest.mark.parametrize(
    ("words", "xp", "message"),
    [
        ((), None, "name the array library under test: --mml-xp NAMESPACE"),
        ((), "no_such_library", "--mml-xp no_such_library: cannot be imported: No module named"),
        ((), "math", "--mml-xp math: math is no array API namespace"),
        (("--mml-device", "moon"), "array_api_strict", "no device 'moon'; there are: "),
        (("--mml-xfail", "missing"), BROKEN, "--mml-xfail: cannot read missing: No such file"),
        (("--mml-skip", "wrong"), BROKEN, "--mml-skip: wrong, line 1: no test is named 'nonsense'"),
        (("--mml-skip", "utf16"), BROKEN, "--mml-skip: cannot read utf16: 'utf-8' codec can't"),
        ((), "raises", "--mml-xp raises: cannot be imported, or makes no arrays: RuntimeError: no"),
        ((), "leaves", "--mml-xp leaves: cannot be imported, or makes no arrays: SystemExit: 3"),
    ],
    ids=[
        "no library",
        "not installed",
        "no namespace",
        "no device",
        "no file",
        "no such check",
        "utf-16",
        "raises",
        "exits",
    ],
)
def test_bad_options_are_errors_in_words(session, pytester, words, xp, message):
    (pytester.path / "wrong").write_text("nonsense # really\n", "utf-8-sig")
    (pytester.path / "utf16").write_text("nonsense # really\n", "utf-16")
    (pytester.path / "raises.py").write_text("raise RuntimeError('no')\n")
    (pytester.path / "leaves.py").write_text("raise SystemExit(3)\n")
    pytester.syspathinsert()
    result = session(*words, xp=xp)
    assert result.ret == pytest.ExitCode.INTERRUPTED
    assert message in result.stdout.str()
    assert "Traceback" not in result.stdout.str()


def test_a_device(session):
    result = session("--mml-device", "no_float64", xp="array_api_strict", select=WRONG)
    result.assert_outcomes(passed=1, skipped=3, deselected=result.parseoutcomes()["deselected"])


def test_the_entry_point():
    (entry,) = entry_points(group="pytest11", name="mml_arrayapi")
    assert entry.load() is plugin


def test_under_xdist(pytester):
    pytest.importorskip("xdist")
    result = pytester.runpytest_subprocess(
        "--pyargs", "mml_arrayapi.conformance", "--mml-xp", "numpy", "-n", "2", "-k", WRONG
    )
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] >= 3


def test_the_plugin_does_nothing_unasked(pytester, monkeypatch):
    pytester.makepyfile(
        """
        import sys

        def test_nothing_is_imported(pytestconfig):
            assert pytestconfig.getoption("--mml-xp") is None
            assert not {"numpy", "torch", "dask", "jax"} & set(sys.modules)
        """
    )
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other plugins import NumPy
    result = pytester.runpytest_subprocess("-p", "mml_arrayapi.conformance.plugin")
    result.assert_outcomes(passed=1)
