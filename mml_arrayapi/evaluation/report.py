"""An evaluation as one HTML page: figures, plots and tables, nothing loaded from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from mml_arrayapi._version import __version__
from mml_arrayapi.evaluation.metrics import BAR, ClassFigures, Evaluation

ROWS = 1000  # classes in the table; of more, those of highest mean loss
COLUMNS = 60  # classes, or groups of them, in the plot
BARS = 64  # bars of the histogram
WIDTH, HEIGHT, LEFT, BELOW = 860, 260, 64, 40

STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5d6b7a; --line: #d7dde4; --blue: #2f6db5;
  --red: #c2502e; --green: #2e8b62 }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); max-width: 900px;
  margin: 2rem auto; padding: 0 1rem; background: #fff }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.1rem; margin-top: 2rem }
p, figcaption { color: var(--soft); margin: .3rem 0 }
.figures { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
.figures div { border: 1px solid var(--line); border-radius: 8px; padding: .7rem 1rem; flex: 1 }
.figures b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums }
.figures span { color: var(--soft); font-size: .85rem }
figure { margin: 0 } svg { width: 100%; height: auto; font: 12px system-ui, sans-serif }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .25rem .6rem; border-bottom: 1px solid var(--line) }
th { color: var(--soft); font-weight: 600 } th:first-child, td:first-child { text-align: left }
"""


def to_html(figures: Evaluation, logits: str, targets: str) -> str:
    """Return the page.

    Parameters
    ----------
    figures : Evaluation
        What to show.
    logits, targets : str
        What was evaluated, as the reader should see it named.

    Returns
    -------
    str
        HTML with inline SVG; it opens without a network.
    """
    classes = [(c, f) for c, f in enumerate(figures.classes) if f.count]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>Evaluation of {escape(logits)}</title><style>{STYLE}</style></head><body>",
        "<h1>Multi-class hinge loss</h1>",
        f"<p>Scores {escape(logits)}, targets {escape(targets)}</p>",
        f"<p>p = {figures.p:g}, margin = {figures.margin:g}; kernel {escape(figures.kernel)}; "
        f"mml_arrayapi {__version__}</p>",
        "<div class='figures'>",
        _figure(f"{figures.loss:.6g}", f"loss ({figures.reduction})"),
        _figure(_percent(figures.accuracy), "accuracy: target has the highest score"),
        _figure(_percent(figures.inside_margin), "inside the margin: another class within it"),
        _figure(f"{figures.samples:,}", f"samples in {len(figures.classes):,} classes"),
        "</div>",
        "<h2>How far the target's score lies above the highest other</h2>",
        f"<figure>{_histogram(figures)}<figcaption>Left of 0 another class wins; between 0 and the "
        "margin the target wins, but costs something. Counts beyond the plot are in its outermost "
        f"bars. {_undefined(figures)}</figcaption></figure>",
        "<h2>Mean loss by class</h2>",
        f"<figure>{_class_plot(classes)}</figure>",
        "<h2>Classes</h2>",
        _table(classes),
        f"<p>The loss to all digits: {figures.loss!r}.</p>",
        "</body></html>",
    ]
    return "\n".join(parts)


def _figure(value: str, label: str) -> str:
    return f"<div><b>{value}</b><span>{label}</span></div>"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.2f} %"


def _undefined(figures: Evaluation) -> str:
    if not figures.undefined:
        return ""
    return f"{figures.undefined:,} samples are in no bar: a score is NaN, or two are infinite."


def _histogram(figures: Evaluation) -> str:
    """Draw the histogram between the bars that hold all but a thousandth of the samples."""
    bars = figures.histogram
    total, low, high = sum(bars), 0, len(bars)
    cut = total / 2000
    while low < high and sum(bars[: low + 1]) <= cut:
        low += 1
    while high > low and sum(bars[high - 1 :]) <= cut:
        high -= 1
    low, high = min(low, len(bars) // 2 - BAR), max(high, len(bars) // 2 + 2 * BAR)
    width = -(-(high - low) // BARS)
    high = low + -(-(high - low) // width) * width
    counts = [sum(bars[i : i + width]) for i in range(low, high, width)]
    if counts:
        counts[0] += sum(bars[:low])
        counts[-1] += sum(bars[high:])
    scale = figures.unit / BAR
    start, stop = (low - len(bars) // 2) * scale, (high - len(bars) // 2) * scale
    colours = []
    for i in range(len(counts)):
        middle = start + (i + 0.5) * width * scale
        wins = "var(--blue)" if middle < figures.margin else "var(--green)"
        colours.append("var(--red)" if middle < 0 else wins)
    lines = [(0.0, "0"), (figures.margin, "margin")] if figures.margin else [(0.0, "0")]
    return _plot(counts, colours, (start, stop), lines, "samples")


def _class_plot(classes: Sequence[tuple[int, ClassFigures]]) -> str:
    """Draw the classes' mean losses; many classes are grouped in order, by their samples' mean."""
    finite = [(c, f) for c, f in classes if math.isfinite(f.loss)]
    if not finite:
        return "<p>No class has a finite mean loss.</p>"
    step = -(-len(finite) // COLUMNS)
    groups = [finite[i : i + step] for i in range(0, len(finite), step)]
    means = [sum(f.loss * f.count for _, f in g) / sum(f.count for _, f in g) for g in groups]
    labels = [str(g[0][0]) if step == 1 else f"{g[0][0]}-{g[-1][0]}" for g in groups]
    return _plot(means, ["var(--blue)"] * len(means), labels, [], "mean loss")


def _plot(
    values: Sequence[float],
    colours: Sequence[str],
    axis: tuple[float, float] | Sequence[str],
    lines: Sequence[tuple[float, str]],
    label: str,
) -> str:
    """Draw bars; ``axis`` is the range of numbers below them, or their names."""
    top = max([*values, 0]) or 1
    bottom = min([*values, 0])
    room, tall = WIDTH - LEFT - 10, HEIGHT - BELOW - 24
    each = room / max(1, len(values))

    def y(value: float) -> float:
        return 24 + tall * (top - value) / (top - bottom)

    made = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{label}'>"]
    made.append(_text(LEFT, 14, label, "start"))
    for tick in _ticks(bottom, top):
        made.append(
            f"<line x1='{LEFT}' x2='{WIDTH - 10}' y1='{y(tick):.1f}' y2='{y(tick):.1f}' "
            "stroke='var(--line)'/>"
        )
        made.append(_text(LEFT - 6, y(tick) + 4, f"{tick:,g}", "end"))
    for i, (value, colour) in enumerate(zip(values, colours, strict=True)):
        high, low = y(max(value, 0)), y(min(value, 0))
        made.append(
            f"<rect x='{LEFT + i * each + 0.5:.1f}' y='{high:.1f}' width='{max(1, each - 1):.1f}' "
            f"height='{max(low - high, 0):.1f}' fill='{colour}'><title>{value:,g}</title></rect>"
        )
    if isinstance(axis[0], str):
        skip = -(-len(axis) // 15)
        made += [
            _text(LEFT + (i + 0.5) * each, HEIGHT - 18, str(axis[i]), "middle")
            for i in range(0, len(axis), skip)
        ]
        made.append(_text(LEFT + room / 2, HEIGHT - 2, "class", "middle"))
        return "".join([*made, "</svg>"])
    start, stop = float(axis[0]), float(axis[1])
    for tick in _ticks(start, stop):
        x = LEFT + room * (tick - start) / (stop - start)
        made.append(_text(x, HEIGHT - 18, f"{tick:g}", "middle"))
    for value, name in lines:
        x = LEFT + room * (value - start) / (stop - start)
        made.append(
            f"<line x1='{x:.1f}' x2='{x:.1f}' y1='18' y2='{24 + tall}' stroke='var(--ink)' "
            "stroke-dasharray='4 3'/>"
        )
        made.append(_text(x + 4, 16, name, "start"))
    return "".join([*made, "</svg>"])


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two others, about six of them."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' fill='var(--soft)'>"
        f"{escape(text)}</text>"
    )


def _table(classes: Sequence[tuple[int, ClassFigures]]) -> str:
    note = ""
    if len(classes) > ROWS:
        worst = sorted(classes, key=lambda item: -item[1].loss)[:ROWS]
        note = f"<p>The {ROWS:,} classes of highest mean loss, of {len(classes):,}.</p>"
        classes = worst
    rows = [
        f"<tr><td>{c}</td><td>{f.count:,}</td><td>{f.loss:.6g}</td><td>{_percent(f.accuracy)}</td>"
        f"<td>{_percent(f.inside_margin)}</td></tr>"
        for c, f in classes
    ]
    names = ("class", "samples", "mean loss", "accuracy", "inside the margin")
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"{note}<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
