"""An evaluation as one HTML page, and its comparison with another one."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from mml_arrayapi._version import __version__
from mml_arrayapi.evaluation import page
from mml_arrayapi.evaluation.errors import InputError, require
from mml_arrayapi.evaluation.figures import SCHEMA, Evaluation, as_json, percent

ROWS = 200  # classes that the table shows at once
COLUMNS = 60  # classes in the plot by class; of more, the sorted curve is drawn
POINTS = 400  # of that curve
SHARES = ("accuracy", "inside_margin")


def check_libraries() -> None:
    """Raise an :class:`InputError` if what the report needs can't be imported."""
    for module in ("jinja2", "matplotlib", "matplotlib.style", "matplotlib.backends.backend_svg"):
        require(module, "--report")


def read_figures(path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Read what ``--json`` has written.

    Parameters
    ----------
    path : str
        The file.
    options : dict
        On what the figures to compare with it depend, by the names of their attributes.

    Raises
    ------
    InputError
        It is something else, or was made with other options.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            told = json.load(file)
        if told["schema"] != SCHEMA:
            raise ValueError(  # noqa: TRY301
                f"its schema is {told['schema']}, not {SCHEMA}"
            )
        for figures in (told, *told["classes"].values()):
            for name in ("loss", *SHARES):
                figures[name] = _figure(name, figures[name])
        for name in ("samples", "n_classes"):
            if type(told[name]) is not int or told[name] < 0:
                raise ValueError(f"{name} is {told[name]!r}")  # noqa: TRY301
        for c in told["classes"]:
            if str(int(c)) != c or not 0 <= int(c) < told["n_classes"]:
                raise ValueError(f"there is a class {c!r}")  # noqa: TRY301
        names = told["class_names"]
        if names is not None and [*map(type, names)] != [str] * told["n_classes"]:
            raise ValueError("class_names is no list of one name per class")  # noqa: TRY301
        made = {name: told[name] for name in options}
    except (
        OSError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise InputError(
            f"{path}: holds no figures to compare with ({type(error).__name__}: {error}); write it "
            "by `mml-arrayapi evaluate ... --json > FILE`"
        ) from error
    for name, value in as_json(options).items():
        if made[name] != value:
            both = (made[name], value)
            before, now = (reprlib.repr(v) if isinstance(v, list) else v for v in both)
            raise InputError(
                f"{path}: was made with {name} {before}, but this run has {now}; compare runs with "
                f"the same {name}"
            )
    return dict(told)


def _figure(name: str, value: Any) -> float:
    if type(value) not in (int, float) and value not in ("NaN", "Infinity", "-Infinity"):
        raise TypeError(f"{name} is {value!r}")
    made = float(value)
    if name in SHARES and (made < 0 or made > 1):
        raise ValueError(f"{name} is {value!r}")
    return made


def comparison(figures: Evaluation, before: dict[str, Any], name: str) -> str:
    """Return a small table of figures beside those of another evaluation.

    Parameters
    ----------
    figures : Evaluation
        The new ones.
    before : dict
        What :func:`read_figures` returned.
    name : str
        What to call the old ones.
    """
    lines = [f"{'':<15}{'now':>15}{'before':>15}{'change':>15}   before: {name}"]
    for key, new, old, change, _ in _changes(figures, before):
        lines.append(f"{key.replace('_', ' '):<15}{new:>15}{old:>15}{change:>15}")
    for key, count in (("samples", figures.samples), ("n_classes", len(figures.classes))):
        if before[key] != count:
            lines.append(f"{key.removeprefix('n_'):<15}{count:>15,}{before[key]:>15,}")
    return "\n".join(lines)


def _losses_before(figures: Evaluation, before: dict[str, Any]) -> dict[int, Any] | None:
    """Return the losses before of the classes that there are now; None where that is in doubt."""
    losses = {int(c): as_json(told["loss"]) for c, told in before["classes"].items()}
    now, names = figures.class_names, before["class_names"]
    if now is None or names is None or [*now] == names:
        return losses if len(figures.classes) == before["n_classes"] else None
    if len({*now}) != len(now) or len({*names}) != len(names):
        return None
    numbers = {name: c for c, name in enumerate(names)}
    found = {c: losses.get(numbers.get(name, -1)) for c, name in enumerate(now)}
    return {c: loss for c, loss in found.items() if loss is not None}


def _changes(figures: Evaluation, before: dict[str, Any] | None) -> Iterator[list[str]]:
    """Yield each figure's name, itself, the one before, the change, and what to think of that."""
    for key in ("loss", *SHARES):
        new = getattr(figures, key)
        shown = percent if key in SHARES else "{:.6g}".format
        if before is None:
            yield [key, shown(new), "", "", ""]
            continue
        old = before[key]
        better = (new > old) == (key == "accuracy")
        style = ("better" if better else "worse") if new > old or new < old else ""
        if key == "loss" and figures.reduction == "sum" and figures.samples != before["samples"]:
            style = ""  # of more samples the sum is larger
        change = f"{100 * (new - old):+.3f} %" if key in SHARES else f"{new - old:+.6g}"
        change = "-" if math.isnan(new - old) else change
        yield [key, shown(new), shown(old), change, style]


def to_html(figures: Evaluation, command: str, before: dict[str, Any] | None = None) -> str:
    """Return the page.

    Parameters
    ----------
    figures : Evaluation
        What to show.
    command : str
        How they were made.
    before : dict, optional
        Figures to compare with: what :func:`read_figures` returned.

    Returns
    -------
    str
        HTML with inline SVG; it opens without a network.
    """
    classes = [(c, f) for c, f in enumerate(figures.classes) if f.count]
    old = None if before is None else _losses_before(figures, before)
    columns = 5 if old is None else 6
    data = []
    for c, f in classes:
        row = [figures.name(c), f.count, *map(as_json, (f.loss, f.accuracy, f.inside_margin))]
        data.append([*row, (old or {}).get(c)][:columns])
    if len(data) > ROWS:  # those without a number first, then those of highest loss
        data.sort(key=lambda row: (row[2] == "NaN", float(row[2])), reverse=True)
    histogram, beyond = _histogram(figures)
    by_class, note = _by_class(figures, classes)
    headings = ("class", "samples", "mean loss", "accuracy", "inside the margin", "loss before")
    return page.render(
        __package__,
        "report.html",
        f=figures,
        title=_title(figures),
        date=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        version=__version__,
        cards=_cards(figures, before),
        histogram=histogram,
        beyond=beyond,
        by_class=by_class,
        by_class_note=note,
        headings=headings[:columns],
        rows=[[_cell(v, i) for i, v in enumerate(row)] for row in data[:ROWS]],
        table_note=f"{min(ROWS, len(data)):,} of {_classes(len(data))}",
        other_classes=before is not None and old is None,
        pairs=figures.pairs(1000),
        short=_short_names(figures),
        command=command,
        data=data,
        page=ROWS,
        percent_columns=[3, 4],
    )


def _short_names(figures: Evaluation) -> dict[int, str]:
    """Return the names of classes in the tables of confusions and of the worst samples."""
    confused = [c for pair in figures.confusions or () for c in pair[:2]]
    worst = [c for s in figures.worst for c in (s.target, *(one for one, _ in s.highest))]
    return figures.short_names([*confused, *worst], 28)


def _title(figures: Evaluation) -> str:
    names = list(dict.fromkeys(line["scores"]["name"] for line in figures.pairing))
    more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def _cards(figures: Evaluation, before: dict[str, Any] | None) -> list[Any]:
    labels = {
        "loss": f"loss ({figures.reduction})",
        "accuracy": "accuracy: target has the highest score",
        "inside_margin": "inside the margin: another class within",
    }
    cards: list[Any] = [
        (new, labels[key], old, (change, style))
        for key, new, old, change, style in _changes(figures, before)
    ]
    old = "" if before is None else f"{before['samples']:,}"
    if before is not None and before["n_classes"] != len(figures.classes):
        old += f" in {_classes(before['n_classes'])}"
    samples = f"samples in {_classes(len(figures.classes))}"
    cards.append((f"{figures.samples:,}", samples, old, ("", "")))
    return cards


def _classes(n: int) -> str:
    return f"{n:,} class{'' if n == 1 else 'es'}"


def _cell(value: Any, column: int) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,}" if column == 1 else percent(value) if column in (3, 4) else f"{value:.6g}"


def _histogram(figures: Evaluation) -> tuple[Any, str]:
    bars = figures.bars()
    finite = [bar for bar in bars if math.isfinite(bar[1] - bar[0])]
    if not finite:
        return "", _beyond(figures, bars)
    width = min(stop - start for start, stop, _ in finite)
    shown = [bar for bar in finite if math.isclose(bar[1] - bar[0], width, rel_tol=1e-6)]
    (width, *starts), scale = _scaled([width, *(start for start, _, _ in shown)])

    def draw(axes: Any) -> None:
        colours = [
            page.BAD if start < 0 else page.MIDDLE if start < figures.margin else page.GOOD
            for start, _, _ in shown
        ]
        counts = [count for _, _, count in shown]
        axes.bar(starts, counts, width * 0.94, align="edge", color=colours)
        if 0 in starts and (ties := dict(figures.histogram).get(0, 0)):
            axes.bar(0, ties, width * 0.94, align="edge", color=page.BAD)
        for place, name in ((0.0, "0"), (figures.margin, "margin")):
            if starts[0] <= place * scale <= starts[-1] + width:
                axes.axvline(place * scale, color=page.INK, linewidth=0.8, linestyle="--")
                axes.text(
                    place * scale, 1.01, name, transform=axes.get_xaxis_transform(), ha="center"
                )
        axes.set_ylabel("samples")
        axes.set_xlabel(
            "score of the target less the highest other" + ("" if scale == 1 else f" x {scale:g}")
        )

    label = "Histogram of the target's score less the highest other"
    svg = page.plot(draw, "leads", label)
    return svg, _beyond(figures, [bar for bar in bars if bar not in shown])


def _beyond(figures: Evaluation, bars: list[Any]) -> str:
    """Return what the plot does not show, in words."""
    ends = bars[:3] + bars[3:][-3:]
    told = [f"{n:,} from {start:.4g} to {stop:.4g}" for start, stop, n in ends]
    if left := len(bars) - len(ends):
        samples = sum(n for _, _, n in bars[3:-3])
        told.insert(3, f"{samples:,} in {left:,} range{'' if left == 1 else 's'} between these")
    note = f"Beyond the plot: {'; '.join(told)}." if told else ""
    if figures.undefined:
        note += f" {figures.undefined:,} are in no bar: a score is NaN, or two are infinite."
    return note


def _scaled(values: list[float]) -> tuple[list[float], float]:
    """Bring values into a range in which the arithmetic of a plot does not overflow."""
    top = max(map(abs, values), default=0.0)
    size = 0 if not top or 1e-290 < top < 1e290 else math.frexp(top)[1]
    scale = 2.0 ** max(-1000, min(1000, -size))
    return [value * scale for value in values], scale


def _by_class(figures: Evaluation, classes: list[Any]) -> tuple[Any, str]:
    finite = [(c, f) for c, f in classes if math.isfinite(f.loss)]
    left = len(classes) - len(finite)
    note = f"Not drawn: {_classes(left)} without a finite mean loss; see the table." if left else ""
    if not finite:
        return "", note or "There are no samples."
    losses, scale = _scaled([f.loss for _, f in finite])

    def draw(axes: Any) -> None:
        axes.set_ylabel("mean loss" + ("" if scale == 1 else f" x {scale:g}"))
        if len(finite) <= COLUMNS:
            axes.bar(range(len(losses)), losses, color=page.OTHER)
            names = [*figures.short_names([c for c, _ in finite], 16).values()]
            crowded = len(names) > 20 or max(map(len, names)) * len(names) > 110
            axes.set_xticks(range(len(names)), names, rotation=90 if crowded else 0)
            axes.set_xlim(-0.6, len(names) - 0.4)
            axes.set_ylim(bottom=None if min(losses) < 0 else 0)
            return
        ordered = sorted(losses, reverse=True)
        ranks = [*range(0, len(losses), max(1, len(losses) // POINTS)), len(losses) - 1]
        axes.fill_between([r + 1 for r in ranks], [ordered[r] for r in ranks], color=page.OTHER)
        axes.set_xlabel("classes, from the highest mean loss to the lowest")
        axes.set_xlim(1, len(losses))
        axes.set_ylim(bottom=min(0, ordered[-1]))

    return page.plot(draw, "classes", "Mean loss by class"), note
