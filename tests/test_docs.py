"""Every example in the docstrings, the README and the documentation runs as it is printed."""

import doctest
import importlib
import inspect
import re

import pytest

import mml_arrayapi
from mml_arrayapi import registry
from tests.tree import ROOT, sources

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_pages(page):
    text = page.read_text()
    examples = doctest.testfile(
        str(page), module_relative=False, optionflags=FLAGS, encoding="utf-8"
    )
    assert examples.failed == 0
    for link in LINK.findall(text):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_every_public_function_has_an_example():
    for name in mml_arrayapi.__all__:
        value = getattr(mml_arrayapi, name)
        if inspect.isfunction(value) and name != "unregister_kernel":  # register_kernel's has both
            assert ">>>" in value.__doc__, name
