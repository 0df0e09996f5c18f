"""Pages of HTML that load nothing from elsewhere: Jinja templates on one base, plots as SVG."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from mml_arrayapi.evaluation.errors import require

# What a plot is drawn in, and what the page's style makes of it, in light and in dark.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--pass)",
    "#050505": "var(--expected)",
    "#060606": "var(--fail)",
    "#070707": "var(--missing)",
}
INK, SOFT, LINE, GOOD, MIDDLE, BAD, OTHER = COLOURS


def render(package: str, name: str, **context: Any) -> str:
    """Fill in a template; it may extend ``base.html``, which stands beside this module.

    Parameters
    ----------
    package : str
        Where the template is.
    name : str
        Its file's name.
    **context
        What it speaks of.

    Raises
    ------
    InputError
        Jinja2 is not installed.
    """
    jinja2 = require("jinja2", "a page of HTML")

    def load(template: str) -> str:
        place = "mml_arrayapi.evaluation" if template == "base.html" else package
        return files(place).joinpath(template).read_text("utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return str(environment.get_template(name).render(**context))


def plot(draw: Callable[[Any], None], name: str, label: str) -> Any:
    """Return what ``draw`` draws on matplotlib's axes, as SVG in the page's own colours.

    ``name`` tells its elements' ids from those of the page's other plots; ``label`` says what it
    shows to whoever cannot see it.
    """
    require("matplotlib", "a plot")
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    settings: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "mml_arrayapi",
        "font.size": 9,
        "text.parse_math": False,  # names of classes may have any characters
        "text.color": INK,
        "axes.edgecolor": LINE,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": SOFT,
        "grid.color": LINE,
        "axes.axisbelow": True,
    }
    # The user's own settings may ask for LaTeX, or for fonts that are not there.
    with style.context(["default", settings]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has fonts of its own
        figure = Figure(figsize=(9.0, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y")
        draw(axes)
        made = io.StringIO()
        figure.savefig(made, format="svg", transparent=True, metadata={"Date": None})
    text = made.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub("<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)

    def in_tag(tag: re.Match[str]) -> str:  # names of classes stand outside of tags
        made = re.sub(r'\s(xmlns(:xlink)?="[^"]*"|(width|height)="[^"]*pt")', "", tag[0])
        made = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", made)
        return re.sub("|".join(COLOURS), lambda found: COLOURS[found[0]], made)

    text = re.sub("<[^>]*>", in_tag, text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1))
