"""Every example in the docstrings, the README and the documentation runs as it is printed."""

import doctest
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
import warnings
from importlib.util import find_spec

import numpy as np
import pytest

import mml_arrayapi
from mml_arrayapi import cli, registry
from tests.tree import ROOT, sources

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = {page: page.relative_to(ROOT).as_posix() for page in PAGES}
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
IMPORT = re.compile(r"^(?:>>> )? *(?:import|from) (\w+)", re.MULTILINE)


@pytest.fixture(autouse=True)
def registrations():
    """Forget the kernels that examples register."""
    with registry.isolated(built_in_kernels=True):
        yield


@pytest.mark.parametrize("name", [n for n in sources() if not n.endswith(".__main__")])
def test_docstrings(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name}: {error}")
    assert module.__doc__, name
    assert doctest.testmod(module, optionflags=FLAGS).failed == 0


def blocks(page, *languages):
    """The fenced blocks of a page that are in one of the languages."""
    found = BLOCK.findall(page.read_text("utf-8"))
    return [code for language, code in found if language in languages]


def libraries_or_skip(code):
    for name in IMPORT.findall(code):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


@pytest.mark.parametrize("page", PAGES, ids=NAMES.get)
def test_pages(page):
    text = page.read_text("utf-8")
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), f"{NAMES[page]} links to {link}"
    if page.name != "gpu-chunks.md":  # which says that it is not run
        assert not blocks(page, "py", "pycon", "python3"), "only blocks of python are run"
    libraries_or_skip("\n".join(code for code in blocks(page, "python") if ">>>" in code))
    examples = doctest.testfile(
        str(page), module_relative=False, optionflags=FLAGS, encoding="utf-8"
    )
    assert examples.failed == 0


def programs():
    """The pages with Python that is no doctest."""
    return [page for page in PAGES if any(">>>" not in code for code in blocks(page, "python"))]


@pytest.mark.parametrize("page", programs(), ids=NAMES.get)
def test_programs(page, monkeypatch, tmp_path):
    """They run from top to bottom, as one program per page."""
    monkeypatch.chdir(tmp_path)
    code = "\n".join(code for code in blocks(page, "python") if ">>>" not in code)
    libraries_or_skip(code)
    if "init_process_group" in code:
        run_alone(tmp_path, code, "-m", "torch.distributed.run", "--standalone", *TWO_PROCESSES)
    elif "__main__" in code:
        run_alone(tmp_path, code)
    else:  # here, where the libraries have been imported already
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.filterwarnings("error", category=DeprecationWarning, module="__main__")
            exec(compile(code, NAMES[page], "exec"), {"__name__": "__main__"})


TWO_PROCESSES = ("--nproc-per-node", "2")


def run_alone(folder, code, *words):
    """Run a program in a process of its own."""
    program = folder / "program.py"
    program.write_text(code, "utf-8")
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", *words, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def shell_commands():
    """Every command line of the pages, without the prompt and with lines that go on joined."""
    for page in PAGES:
        for code in blocks(page, "bash", "console"):
            for line in code.replace("\\\n", " ").splitlines():
                yield pytest.param(line.removeprefix("$ "), id=f"{NAMES[page]}: {line}"[:90])


@pytest.mark.parametrize("line", list(shell_commands()))
def test_commands_exist_with_their_options(line):
    """Their words are understood."""
    commands = [shlex.split(part, comments=True) for part in line.split("&&")]
    for command in filter(None, commands):
        words = [word for word in command if "=" not in word or word.startswith("-")]
        name = words[0].rpartition("/")[2]
        if name == "mml-arrayapi":
            assert cli.parser().parse_args(words[1:])
        elif any((ROOT / word).is_file() for word in words[:2]):
            pass  # a script of ours
        elif name not in KNOWN:
            pytest.fail(f"{line!r}: is {name} a command?")


KNOWN = {
    ".",
    "cd",
    "eval",
    "git",
    "nox",
    "pip",
    "pre-commit",
    "pytest",
    "python",
    "python3.11",
    "ruff",
    "torchrun",
}

OURS = ("mml-arrayapi", "pytest --pyargs")


@pytest.mark.parametrize(
    "line", [line for line in shell_commands() if line.values[0].startswith(OURS)]
)
def test_our_commands_run(line, someones_folder):
    """As they are printed. Those that install, build or lint are what .ci/run and nox do.

    Of the conformance checks two do: all of them run in tests/conformance.
    """
    libraries_or_skip("import array_api_strict\nimport matplotlib")
    words = shlex.split(line)
    if "pytest" in words:
        words += ["-k", "kink or reference"]
    elif "conformance" in words and not {"--check", "--backend"} & {*words}:
        words += ["--check", "gradient is 0 at the kink", "--check", "float64 reference agrees"]
    module = "mml_arrayapi" if words[0] == "mml-arrayapi" else words[0]
    done = subprocess.run(
        [sys.executable, "-m", module, *words[1:]],
        cwd=someones_folder,
        env={**os.environ, "PYTHONPATH": str(someones_folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def someones_folder(tmp_path_factory):
    """With what the pages speak of: an array library, a package with a kernel, and files."""
    folder = tmp_path_factory.mktemp("someone")
    (folder / "my_library.py").write_text(
        "import sys, array_api_strict\nsys.modules[__name__] = array_api_strict\n"
    )
    example = next(code for code in blocks(ROOT / "CONTRIBUTING.md", "python") if ">>>" in code)
    source = "".join(e.source for e in doctest.DocTestParser().get_examples(example)[:5])
    kernel = 'KERNEL = mml.Kernel("my-kernel", "numpy", refuses, loss, loss_and_grad)\n'
    (folder / "my_package.py").write_text(source + kernel)
    about = folder / "my_package-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (about / "entry_points.txt").write_text(
        "[mml_arrayapi.backends]\nnumpy.mine = my_package:KERNEL\n"
    )
    scores = np.random.default_rng(0).standard_normal((100, 5))
    np.save(folder / "logits.npy", scores)
    np.save(folder / "labels.npy", scores.argmax(1))
    return folder


def test_every_public_function_has_an_example():
    for name in mml_arrayapi.__all__:
        value = getattr(mml_arrayapi, name)
        if inspect.isfunction(value) and name != "unregister_kernel":  # register_kernel's has both
            assert ">>>" in value.__doc__, name
