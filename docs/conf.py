"""The documentation site: ``sphinx-build -W docs docs/_build/html``."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
SOURCE = PROJECT["urls"]["Source"]

project = "mml_arrayapi"
author = "The mml_arrayapi developers"
copyright = f"2026, {author}"
release = re.search(
    r'__version__ = "(.+)"', (ROOT / "mml_arrayapi" / "_version.py").read_text("utf-8")
)[1]

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
suppress_warnings = ["myst.xref_missing_html"]

html_theme = "pydata_sphinx_theme"
html_title = f"mml_arrayapi {release}"
html_show_sourcelink = False
html_sidebars = {page: [] for page in ("index", "api", "pytorch", "changelog")}
html_theme_options = {
    "icon_links": [{"name": "Source", "url": SOURCE, "icon": "fa-brands fa-github"}],
    "header_links_before_dropdown": 7,
    "navbar_persistent": ["search-button"],
    "navigation_with_keys": False,
    "show_prev_next": False,
}


INCLUDED = {name: f"{name.upper()}.md" for name in ("changelog", "contributing", "releasing")}


def read_page(app, docname, source):  # noqa: ARG001 (Sphinx calls it by position)
    """Show files of the repository's root as pages, and link to others in the repository."""
    above = "../" * (docname.count("/") + 1)
    if docname in INCLUDED:
        text = (ROOT / INCLUDED[docname]).read_text("utf-8")
        source[0] = re.sub(r"\]\((?!https?:|#)", f"]({above}", text).replace("](../docs/", "](")
    source[0] = source[0].replace("\n\n```\n", "\n```\n")  # an example ends with an empty line
    source[0] = re.sub(
        rf"\]\({re.escape(above)}(?!\.\.)([^)#\s]+)",
        lambda link: f"]({address(link[1])}",
        source[0],
    )


def address(path):
    """Return the page of a file outside this folder, or its address in the repository."""
    page = {f: f"{name}.md" for name, f in INCLUDED.items()}.get(path)
    return f"/{page}" if page else f"{SOURCE}/blob/main/{path}"


def setup(app):
    """Register what stands above with Sphinx."""
    app.connect("source-read", read_page)
