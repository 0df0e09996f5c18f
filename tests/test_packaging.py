"""Wheel, sdist and tree hold the same files; each can be used, from wherever it lies."""

import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from sysconfig import get_paths

import pytest

import mml_arrayapi
from tests.tree import ROOT, files, run_python, sources

SITE = get_paths()["purelib"]  # where array-api-compat and NumPy are
SOURCE = (".cpp", ".hpp", ".h")  # not needed once compiled

LOSS = """
import numpy
loss = mml_arrayapi.multi_margin_loss(numpy.asarray([[0.1, 0.2, 0.4, 0.8]]), numpy.asarray([3]))
assert abs(loss - 0.325) < 1e-6
print(mml_arrayapi.__file__)
"""


def alone(code, *path, **options):
    """Run code with the given folders and this environment's libraries, but not its own copy of ours.

    ``-S`` leaves out the .pth files, and with them an editable install.
    """
    return run_python(code, flags=("-S",), path=(*path, SITE), **options)


def test_the_wheel_holds_the_tree(dist):
    with zipfile.ZipFile(dist[1]) as wheel:
        names = [name for name in wheel.namelist() if ".dist-info/" not in name]
    assert set(names) == {name for name in files().values() if not name.endswith(SOURCE)}
    assert "mml_arrayapi/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {"mml_arrayapi"}


def test_the_sdist_holds_the_repository(sdist):
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not in a git checkout")
    inside = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    missing = {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()} - inside
    assert not missing
    assert not {name for name in inside if name.endswith((".pyc", ".so", ".pyd"))}


def test_the_sdist_can_be_tested(sdist, installed):
    """Its tests and documents are whole: in the unpacked sdist, against an installed copy."""
    code = """
import sys
import pytest
sys.path.remove("")  # as the command pytest has it, unlike "python -c"
everything = pytest.main(["-q", "-n0", "--collect-only", "-p", "no:cacheprovider"])
some = ["tests/test_docs.py", "tests/conformance/test_golden.py", "-k", "not commands_run and not programs"]
passed = pytest.main(["-q", "-n0", "-p", "no:cacheprovider", *some])
import mml_arrayapi
print(int(everything), int(passed), mml_arrayapi.__file__)
"""
    last = alone(code, installed, cwd=sdist).splitlines()[-1]
    assert last == f"0 0 {installed / 'mml_arrayapi' / '__init__.py'}"


def test_the_checkout_works_beside_an_installed_copy(installed):
    """In the repository's root, Python finds the checkout's package before the installed one."""
    out = alone(
        f"import mml_arrayapi, mml_arrayapi.backends as b, mml_arrayapi.cli{LOSS}",
        installed,
        cwd=ROOT,
    )
    assert Path(out) == ROOT / "mml_arrayapi" / "__init__.py"


def test_an_installed_copy_looks_only_inside_itself(installed, tmp_path):
    """Even where some other package has left a pyproject.toml beside it."""
    (installed / "pyproject.toml").touch()
    code = f"""
import sys
import mml_arrayapi
assert mml_arrayapi._checkout.Finder not in sys.meta_path
{LOSS}"""
    out = alone(code, installed, cwd=tmp_path)
    assert Path(out) == installed / "mml_arrayapi" / "__init__.py"


def test_an_installed_copy_writes_nothing_into_its_folder(installed, tmp_path):
    """A site-packages folder may be read-only."""
    before = {path: path.stat().st_mtime_ns for path in installed.rglob("*")}
    code = f"""
import mml_arrayapi
from mml_arrayapi import cli
assert cli.main(["backends"]) == 0
{LOSS}"""
    alone(code, installed, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")
    assert {path: path.stat().st_mtime_ns for path in installed.rglob("*")} == before


WITHOUT_COMPILER = """
import mml_arrayapi as mml
kernel = {kernel!r}
{arrays}
for _ in range(3):  # the first call loads the kernels, later ones take them directly
    print(float(mml.multi_margin_loss(x, y)))
    print(float(mml.multi_margin_loss_and_grad(x, y)[0]))
explanation = mml.explain(x, y)
assert explanation.kernel != kernel, explanation
listed = {{row.name: row for row in mml.list_backends()}}
assert not listed[kernel].available
assert dict(explanation.considered)[kernel] == listed[kernel].reason
print(listed[kernel].reason)
try:
    mml.multi_margin_loss(x, y, backend=kernel)
except ValueError as error:
    print(error)
try:
    mml.multi_margin_loss(x, y, p=0.5)
except ValueError as error:
    print(error)
"""
ARRAYS = {
    "numpy-cpu": "import numpy as np; x, y = np.asarray([[0.1, 0.2, 0.4, 0.8]]), np.asarray([3])",
    "torch-cpu": "import torch; x, y = torch.tensor([[0.1, 0.2, 0.4, 0.8]]), torch.tensor([3])",
}


@pytest.mark.parametrize("kernel", ARRAYS)
def test_without_compiled_kernels(kernel, installed, tmp_path):
    """Where there was no compiler, every call runs, and what is missing is said in the same words."""
    pytest.importorskip(kernel.partition("-")[0])
    code = WITHOUT_COMPILER.format(kernel=kernel, arrays=ARRAYS[kernel])
    *losses, reason, asked, wrong = alone(code, installed, cwd=tmp_path).splitlines()
    assert [float(loss) for loss in losses] == pytest.approx([0.325] * 6)
    assert "no compiled kernels" in reason
    assert asked.startswith(f"backend: kernel {kernel!r} cannot run this call: {reason}; ")
    assert wrong == "p must be a finite real number >= 1, but is 0.5"


def test_kernels_in_an_archive(installed, tmp_path):
    """Python imports a package out of a zip archive, but no extension modules."""
    pytest.importorskip("numpy")
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in installed.rglob("*.py"):
            made.write(path, path.relative_to(installed))
    code = """
import mml_arrayapi as mml, numpy as np
print(mml.multi_margin_loss(np.asarray([[0.1, 0.2, 0.4, 0.8]]), np.asarray([3])))
print(next(one.reason for one in mml.list_backends() if one.name == "numpy-cpu"))"""
    loss, reason = alone(code, archive, cwd=tmp_path).splitlines()
    assert float(loss) == pytest.approx(0.325)
    assert reason.startswith("Python loads no compiled kernels out of an archive (")


@pytest.mark.skipif(os.name == "nt", reason="the compiler is a script")
@pytest.mark.parametrize("flags", ["-ffast-math", "-Ofast -g", "-funsafe-math-optimizations"])
def test_flags_that_would_change_the_arithmetic(flags, tmp_path):
    """Linked with them, the library would make the whole process flush subnormal numbers."""
    pytest.importorskip("setuptools")
    compiler, log = tmp_path / "compiler", tmp_path / "log"
    compiler.write_text(
        f"#!{sys.executable}\nimport sys\nwords = sys.argv[1:]\n"
        f"open({str(log)!r}, 'a').write(' '.join(words) + chr(10))\n"
        "open(words[words.index('-o') + 1], 'w').close()\n"
    )
    compiler.chmod(0o755)
    folders = [f"--build-{name}={tmp_path / name}" for name in ("lib", "temp")]
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--force", *folders],
        cwd=ROOT,
        env=os.environ | {"CC": str(compiler), "CXX": str(compiler), "CXXFLAGS": flags},
        check=True,
    )
    lines = [line.split() for line in log.read_text("utf-8").splitlines()]
    compiled = [words for words in lines if "-c" in words]
    linked = [words for words in lines if "-c" not in words]
    assert len(compiled) >= 5 * len(linked) >= 5
    fast = flags.split()[0]
    for words in linked:
        assert fast not in words
        assert ("-g" in words) == ("-g" in flags.split())
    for words in compiled:
        assert words.index("-fno-fast-math") > words.index(fast)


@pytest.mark.parametrize("flags", [("-OO", "-X", "dev"), ("-I", "-W", "error")], ids=" ".join)
def test_under_the_flags_of_python(flags):
    """Without docstrings and asserts, with warnings as errors, with the current folder not on the path."""
    code = """
import numpy
from mml_arrayapi import cli, explain, multi_margin_loss
x, y = numpy.asarray([[0.1, 0.2, 0.4, 0.8]]), numpy.asarray([3])
assert_ = {True: None}
assert_[abs(multi_margin_loss(x, y) - 0.325) < 1e-6]
for words in (["--help"], ["demo", "--help"], ["evaluate", "--help"], ["conformance", "--help"]):
    try:
        cli.main(words)
    except SystemExit as error:
        assert_[error.code == 0]
assert_[cli.main(["backends"]) == 0]
assert_[cli.main(["conformance", "--xp", "numpy", "--dtype", "float32"]) == 0]
"""
    assert "generic" in run_python(code, flags=flags)


def test_the_oldest_releases_stand_in_two_places_that_agree():
    """What ``pyproject.toml`` accepts from is what ``constraints-floors.txt`` installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    groups = [project["dependencies"], *(extras[name] for name in extras if name != "docs")]
    wanted = {}
    for requirement in itertools.chain.from_iterable(groups):
        found = re.match(r"([\w.-]+)(?:\[.*?\])?>=([\w.]+)", requirement)
        assert found or requirement.startswith("mml_arrayapi["), requirement
        if found and not found[1].startswith(("cuda-", "cupy-", "nvidia-")):  # not tried: GPUs
            name, version = found.groups()
            assert wanted.setdefault(name, version) == version, f"{name} has two oldest releases"
    pinned = {
        "mypy",
        "ruff",
        "torch",
    }  # the first two check, and have no floor; PyTorch: see the file
    floors = {name: version for name, version in wanted.items() if name not in pinned}
    assert {k: v for k, v in constraints("constraints-floors.txt").items() if k in wanted} == floors


def constraints(name):
    """The versions in a file of constraints."""
    lines = (ROOT / name).read_text("utf-8").splitlines()
    pairs = (line.split("#")[0].split("==") for line in lines)
    return {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}


def test_no_module_reads_what_lies_beside_it_by_path():
    """In a zip there are no paths; importlib.resources reads there too.

    The two that ask for their path look whether they are in a checkout.
    """
    asking = {n for n, path in sources().items() if "__file__" in path.read_text("utf-8")}
    assert asking == {"mml_arrayapi._checkout", "mml_arrayapi.backends.cpu"}


def test_from_a_zip_of_the_wheel(dist, tmp_path):
    out = alone(
        """
import mml_arrayapi
from mml_arrayapi import cli
assert cli.main(["backends"]) == 0
from mml_arrayapi.conformance.golden import golden_vectors
assert golden_vectors()
assert cli.main(["conformance", "--xp", "numpy", "--dtype", "float32", "--check", "golden vectors agree",
                 "--report", "page.html"]) == 0
"""
        + LOSS,
        dist[1],
        cwd=tmp_path,
    )
    assert out.endswith(str(Path(dist[1].name) / "mml_arrayapi" / "__init__.py"))
    assert "<table" in (tmp_path / "page.html").read_text("utf-8")


def test_version_stands_in_one_place():
    from importlib.metadata import version

    assert mml_arrayapi.__version__ == version("mml_arrayapi")


def test_public_names():
    assert mml_arrayapi.__all__ == sorted(mml_arrayapi.__all__)
    assert set(mml_arrayapi.__all__) == {
        "Evaluation",
        "InputError",
        "InvalidTargetError",
        "Kernel",
        "LossAccumulator",
        "Problem",
        "WorkerError",
        "__version__",
        "evaluate",
        "explain",
        "list_backends",
        "multi_margin_loss",
        "multi_margin_loss_and_grad",
        "register_kernel",
        "unregister_kernel",
        "use_backend",
    }
    for name in mml_arrayapi.__all__:
        value = getattr(mml_arrayapi, name)
        assert name == "__version__" or value.__doc__, name
