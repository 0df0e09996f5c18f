"""The command line: dispatch, ``backends`` and ``demo``. ``evaluate`` and ``conformance`` have theirs."""

import errno
import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from mml_arrayapi import __version__, cli, demo


def test_version_and_help(capsys):
    for flag, expected in (("--version", __version__), ("--help", "demo")):
        with pytest.raises(SystemExit) as info:
            cli.main([flag])
        assert info.value.code == 0
        assert expected in capsys.readouterr().out


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as info:
        cli.main([])
    assert info.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_as_a_module():
    result = subprocess.run(
        [sys.executable, "-m", "mml_arrayapi", "backends"],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["kernel", "arrays", "of", "available"]
    assert lines[-1].split()[:3] == ["generic", "*", "yes"]


@pytest.mark.parametrize("command", ["demo", "evaluate", "conformance", "backends"])
def test_help_has_an_example_that_is_understood(command, capsys):
    with pytest.raises(SystemExit) as info:
        cli.main([command, "--help"])
    assert info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    example = re.search(rf"[Ee]xamples?: mml-arrayapi ({command}[^;]*)", text)[1]
    assert cli.parser().parse_args(shlex.split(example))


def test_backends_on_a_terminal(monkeypatch, capsys):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert cli.main(["backends"]) == 0
    out = capsys.readouterr().out
    assert "\x1b[" in out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out).splitlines()
    assert max(map(len, lines)) <= 60
    assert ["generic", "*", "yes"] in [line.split()[:3] for line in lines]


def test_completion(tmp_path):
    pytest.importorskip("argcomplete")
    line = "mml-arrayapi con"
    completions = tmp_path / "completions"
    asked = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(completions),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    code = "from mml_arrayapi import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | asked, check=False)
    assert done.returncode == 0
    assert completions.read_text().split() == ["conformance"]


def test_interrupted(monkeypatch, capsys):
    def run(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_backends", run)
    assert cli.main(["backends"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder)
from mml_arrayapi.cli import main
sys.exit(main(["backends"]))
"""


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("module", ["evaluation", "evaluation.files", "conformance", "demo"])
def test_interrupted_while_modules_are_imported(module):
    code = INTERRUPTED.format(module=f"mml_arrayapi.{module}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


FULL = "/dev/full"


@pytest.mark.skipif(not os.path.exists(FULL), reason="there is no device that is always full")
@pytest.mark.parametrize("arguments", ["backends", "evaluate x.npy y.npy", "--help"])
def test_output_that_cannot_be_written(tmp_path, arguments):
    np.save(tmp_path / "x.npy", np.eye(3))
    np.save(tmp_path / "y.npy", np.arange(3))
    command = [sys.executable, "-m", "mml_arrayapi", *arguments.split()]
    with open(FULL, "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    message = "mml-arrayapi: error: the output cannot be written (No space left on device)\n"
    assert (done.returncode, done.stderr) == (2, message)
    read, write = os.pipe()
    os.close(read)  # as `| head` does
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141 or arguments == "--help"  # argparse looks away


@pytest.mark.skipif(os.name != "posix", reason="files have no limit")
@pytest.mark.parametrize("size", [0, 100, 9000])
def test_output_that_a_disk_takes_in_part(tmp_path, size):
    np.save(tmp_path / "x.npy", np.eye(300))
    np.save(tmp_path / "y.npy", np.arange(300))
    limited = f"""
import os, resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
command = "-B -m mml_arrayapi evaluate x.npy y.npy --json"
os.execv(sys.executable, [sys.executable, *command.split()])
"""
    with open(tmp_path / "out", "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", limited],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
        )
    message = "mml-arrayapi: error: the output cannot be written (File too large)\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_other_errors_of_the_system_are_not_taken_for_the_outputs(monkeypatch):
    for error in (OSError(errno.ENOSPC, "full", "a file"), OSError(errno.EPERM, "not allowed")):

        def run(_, error=error):
            raise error

        monkeypatch.setattr(cli, "_backends", run)
        with pytest.raises(OSError, match=error.strerror):
            cli.main(["backends"])


@pytest.mark.skipif(os.name != "posix", reason="there is no POSIX shell")
@pytest.mark.parametrize(
    "arguments", ["backends", "evaluate x.npy y.npy", "evaluate x.npy y.npy --json", "--help"]
)
def test_closed_output(tmp_path, arguments):
    np.save(tmp_path / "x.npy", np.eye(100))  # as JSON more than Python keeps back before it writes
    np.save(tmp_path / "y.npy", np.arange(100))
    command = f"{shlex.quote(sys.executable)} -m mml_arrayapi {arguments}"
    done = subprocess.run(f"{command} >&-", shell=True, capture_output=True, cwd=tmp_path)
    message = b"mml-arrayapi: error: the output cannot be written (Bad file descriptor)\n"
    assert (done.returncode, done.stderr) == (2, message)
    done = subprocess.run(f"{command} 2>&-", shell=True, stdout=subprocess.PIPE, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout


@pytest.mark.skipif(not os.path.exists(FULL), reason="there is no device that is always full")
def test_an_error_that_cannot_be_told():
    command = [sys.executable, "-m", "mml_arrayapi", "evaluate", "no-such-file.npy", "y.npy"]
    with open(FULL, "w") as full:
        assert subprocess.run(command, stderr=full, check=False).returncode == 2


def test_names_that_the_output_cannot_encode(tmp_path):
    np.save(tmp_path / "caf\xe9.npy", np.eye(1))
    np.save(tmp_path / "y.npy", np.zeros(1, int))
    (tmp_path / "names.json").write_text('["\\ud800"]')
    command = [sys.executable, "-m", "mml_arrayapi", "evaluate", "caf\xe9.npy", "y.npy"]
    command += ["--class-names", "names.json", "--report", "r.html"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert "caf\\xe9.npy rows 0 to 0" in done.stdout
    assert "\\ud800" in done.stdout
    assert "\\ud800" in (tmp_path / "r.html").read_text("utf-8")


def test_demo(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "STEPS", 20)
    # JAX would compile for seconds; the gate runs the whole demo.
    monkeypatch.setattr(demo, "SUPPORTED", ("numpy", "torch", "array_api_strict"))
    assert cli.main(["demo", "--output", str(tmp_path / "new" / "folder")]) == 0
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if "%" in line and "│" in line]
    assert len(rows) >= 1
    assert len({tuple(row.split("│")[3:6]) for row in rows}) == 1, "the libraries disagree"
    for row in rows:
        _, _, kernel, *_, faster, _ = (cell.strip() for cell in row.split("│"))
        assert (faster == "") == (kernel == "generic")
        assert faster == "" or float(faster.removesuffix(" x")) > 0
    assert f"All {len(rows)} libraries agree to the printed digits." in out
    assert "mml-arrayapi evaluate" in out
    logits = np.load(tmp_path / "new" / "folder" / "logits.npy")
    targets = np.load(tmp_path / "new" / "folder" / "targets.npy")
    assert logits.shape == (360, 10)
    assert logits.dtype == np.float32
    assert np.mean(logits.argmax(axis=1) == targets) > 0.8
    assert "360" in out.split("mml-arrayapi evaluate")[1]


def test_demo_says_when_libraries_disagree(capsys):
    one = demo.Result("generic", None, 1.0, 2.0, 0.5, 0.1, None)
    demo._print_agreement({"NumPy": one, "JAX": one._replace(test_loss=2.5)})
    assert capsys.readouterr().out == (
        "The libraries disagree: training and test loss are 1.00000 2.00000 or 1.00000 2.50000.\n"
    )


def test_demo_where_it_cannot_write(monkeypatch, tmp_path, capsys):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(demo, "STEPS", 1)
    monkeypatch.setattr(demo, "SUPPORTED", demo.SUPPORTED[:1])
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"demo: cannot write to {tmp_path / 'file'}: ")


def test_demo_without_what_it_needs(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["demo"]) == 2
    assert "install with: pip install 'mml_arrayapi[demo]'" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-1,2,-3e4"])
def test_negative_numbers_are_no_options(value):
    assert cli._joined(["evaluate", "x", "--margin", value, "y"]) == [
        *("evaluate", "x", f"--margin={value}", "y")
    ]


@pytest.mark.parametrize("given", [["x", "-1"], ["--json", "-h"], ["--margin", "--p"]], ids=str)
def test_what_is_no_negative_number_stays(given):
    assert cli._joined(given) == given


def test_a_negative_margin(tmp_path, capsys):
    np = pytest.importorskip("numpy")
    for name, values in (("x", np.eye(2)), ("y", np.asarray([0, 1]))):
        np.save(tmp_path / f"{name}.npy", values)
    files = [str(tmp_path / f"{name}.npy") for name in "xy"]
    assert cli.main(["evaluate", *files, "--margin", "-1e-3", "--weight", "-1,2"]) == 0
    assert cli.main(["evaluate", *files, "--weight", "-inf,2"]) == 0
    assert "margin -0.001" in capsys.readouterr().out
