"""Every example in the docstrings, the README and the documentation runs as it is printed."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import mml_arrayapi
from mml_arrayapi import registry

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)")


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """Forget the kernels that examples register."""
    monkeypatch.setattr(registry, "_registered", list(registry._registered))
    monkeypatch.setattr(registry, "_loaded", dict(registry._loaded))


def modules():
    names = ["mml_arrayapi"]
    for package in ("mml_arrayapi", "mml_arrayapi.backends", "mml_arrayapi.conformance"):
        path = importlib.import_module(package).__path__
        names += [f"{package}.{m.name}" for m in pkgutil.iter_modules(path) if m.name != "__main__"]
    return names


@pytest.mark.parametrize("name", modules())
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
        if inspect.isfunction(value) and name != "register_kernel":
            assert ">>>" in value.__doc__, name
