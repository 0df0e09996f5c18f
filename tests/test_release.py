"""What is published: one version everywhere, and a README whose links work on any page."""

import re
import tomllib

import pytest

from mml_arrayapi import __version__
from tests.tree import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
README = (ROOT / "README.md").read_text("utf-8")
SOURCE = PROJECT["urls"]["Source"]


def test_the_citation_has_the_version_and_the_address():
    lines = (ROOT / "CITATION.cff").read_text("utf-8").splitlines()
    assert f"version: {__version__}" in lines
    assert f'repository-code: "{SOURCE}"' in lines


def test_every_link_of_the_readme_is_absolute():
    """It is the page on PyPI, too."""
    for link in re.findall(r"\]\(([^)\s]+)\)", README):
        assert link.startswith(("https://", "#")), link
        if link.startswith("#"):
            assert f"## {link[1:].capitalize()}\n" in README


@pytest.mark.parametrize("page", ["README.md", *(p.name for p in (ROOT / "docs").glob("*.md"))])
def test_links_to_the_repository_lead_to_files(page):
    text = (ROOT / ("" if page == "README.md" else "docs") / page).read_text("utf-8")
    for path in re.findall(rf"{re.escape(SOURCE)}/(?:blob|tree)/main/([^)#\s]+)", text):
        assert (ROOT / path).exists(), path


def test_every_address_of_the_project_is_one_place():
    assert set(PROJECT["urls"]) == {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    inside = [url for name, url in PROJECT["urls"].items() if name != "Documentation"]
    assert all(url.startswith(SOURCE) for url in inside)


def test_the_extras_in_the_readme_are_those_there_are():
    table = README.partition("| extra | installs |")[2].partition("\n\n")[0]
    named = set(re.findall(r"`([a-z0-9]+)`", table.replace("`mml-arrayapi", "")))
    assert named == set(PROJECT["optional-dependencies"])


def test_the_workflows_run_sessions_that_exist():
    """``nox -s workflows`` checks the rest of them, by actionlint."""
    defined = set(re.findall(r"^def (\w+)\(session\)", (ROOT / "noxfile.py").read_text(), re.M))
    named = set()
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        text = path.read_text("utf-8")
        for words in re.findall(r"nox -s ([a-z]+)|session: \[(.+)\]", text):
            named |= set(re.findall(r"[a-z]+", " ".join(words)))
    assert named == defined
