"""The figures of an evaluation: plain numbers, printed as a table, as JSON, or in a notebook."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from heapq import nsmallest
from html import escape
from typing import Any

from mml_arrayapi.evaluation.errors import on_a_line
from mml_arrayapi.evaluation.inputs import Dataset, printable
from mml_arrayapi.evaluation.metrics import Loss, MetricState, bin_start
from mml_arrayapi.evaluation.names import common_start
from mml_arrayapi.exact_sum import ExactSum

SCHEMA = 2  # of to_json(); it changes when something is renamed, removed or means something else
SHOWN_CLASSES = 20
SHOWN_FILES = 6
SHOWN_CONFUSIONS = 50
BARS = 64  # bars of one width in the histogram
OUTSIDE = 1000  # at most one in so many samples lies outside these


@dataclass(frozen=True, slots=True)
class ClassFigures:
    """The figures of the samples whose target is one class.

    Attributes
    ----------
    count : int
        The number of samples.
    loss : float
        The mean of their losses.
    accuracy, inside_margin : float
        As in :class:`Evaluation`. All three are NaN for a class without samples.
    """

    count: int
    loss: float
    accuracy: float
    inside_margin: float


@dataclass(frozen=True, slots=True)
class WorstSample:
    """A sample with one of the highest losses.

    Attributes
    ----------
    loss : float
        Its loss.
    position : tuple of int
        Where it stands in the whole.
    file, row
        The file that it is in, and its row there.
    target, score
        Its class, and the score of that.
    highest : tuple of (int, float)
        The classes of the highest scores, and these.
    """

    loss: float
    position: tuple[int, ...]
    file: str
    row: int
    target: int
    score: float
    highest: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """The figures of an evaluation. Printed, it is a table.

    Attributes
    ----------
    loss : float
        The loss over all samples, correctly rounded from the exact sum of the samples' losses.
        With sample weights, that of the losses times these, over (for the mean) their sum.
    reduction : {"mean", "sum"}
        What ``loss`` is.
    samples, ignored : int
        The number of samples, and of those that were left out since their label is
        ``ignore_index``.
    accuracy : float
        The share of samples whose target has the highest score of all. A tie for the highest
        score is no success, nor is a sample with a NaN among its scores. Shares are of the sum of
        the sample weights, where there are any.
    inside_margin : float
        The share of samples with another class within the margin of the target's score, or above
        it: those that cost something (for weights other than 0). Samples with a NaN count.
    p, margin : float
        The loss's parameters.
    weight : tuple of float, or None
        The classes' weights.
    ignore_index : int or None
        The label of samples that were left out.
    weighted : bool
        Whether there were sample weights.
    kernel : str
        The kernel that ran (on the machine that asked, where there are several).
    classes : tuple of ClassFigures
        The figures by class of the target.
    unit : float
        The unit of the histogram: the margin, or 1 where that is 0.
    histogram : tuple of (int, int)
        How far the target's score lies above the highest other score, by bin; see :meth:`bars`.
    undefined : int
        The samples that are not in the histogram, since a score is NaN or two are infinite.
    nan : int
        The number of samples whose loss is NaN.
    nan_samples : tuple of (str, int)
        The files and rows of the first of them.
    nan_by_file : tuple of (str, int)
        The files that have any, and how many.
    confusions : tuple of (int, int, int) or None
        The most frequent pairs of a target and another class with the highest score, and how
        often; None if there are too many different ones to count.
    worst : tuple of WorstSample
        The samples of highest loss.
    pairing : list of dict
        Which rows of which files and columns were read together, in order.
    class_names : tuple of str or None
        The names of the classes.
    """

    loss: float
    reduction: str
    samples: int
    accuracy: float
    inside_margin: float
    p: float
    margin: float
    kernel: str
    classes: tuple[ClassFigures, ...]
    unit: float
    histogram: tuple[tuple[int, int], ...]
    undefined: int
    ignored: int
    nan: int
    confusions: tuple[tuple[int, int, int], ...] | None
    # How the same samples are named, and came to count, doesn't make other figures of them.
    weight: tuple[float, ...] | None = field(compare=False)
    ignore_index: int | None = field(compare=False)
    weighted: bool = field(compare=False)
    nan_samples: tuple[tuple[str, int], ...] = field(compare=False)
    nan_by_file: tuple[tuple[str, int], ...] = field(compare=False)
    worst: tuple[WorstSample, ...] = field(compare=False)
    pairing: list[dict[str, Any]] = field(compare=False)
    class_names: tuple[str, ...] | None = field(compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled, tuple(getattr(self, name) for name in self.__slots__)

    def name(self, c: int) -> str:
        """Return a class's name, or its number where it has none."""
        return str(c) if self.class_names is None else self.class_names[c]

    def short_names(self, classes: Sequence[int], most: int) -> dict[int, str]:
        """Return names of some classes by number, in at most so many characters.

        Of what all begin with, as much is left out as is too long; then the middle.
        """
        names = {c: on_a_line(self.name(c)) for c in dict.fromkeys(classes)}
        over = max(map(len, names.values()), default=0) - most
        if over > 0:
            drop = min(over + 1, len(common_start([*names.values()])))
            if drop > 1 and len(names) > 1:
                names = {c: "\u2026" + name[drop:] for c, name in names.items()}
        half = most // 2
        return {
            c: name if len(name) <= most else f"{name[:half]}\u2026{name[half + 1 - most :]}"
            for c, name in names.items()
        }

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON; NaN and infinities are strings.

        Returns
        -------
        dict
            The attributes, and ``schema``, the version of this form; ``classes`` by number, without
            those that have no samples, and ``histogram`` as a list of ``[from, to, count]``.
        """
        made = {"schema": SCHEMA, **{name: getattr(self, name) for name in self.__slots__}}
        made["n_classes"] = len(self.classes)
        made["classes"] = {str(c): asdict(f) for c, f in enumerate(self.classes) if f.count}
        made["histogram"] = self.bars()
        made["worst"] = [asdict(sample) for sample in self.worst]
        plain: dict[str, Any] = as_json(made)
        return plain

    def bars(self) -> list[tuple[float, float, int]]:
        """Return the histogram of how far the target's score lies above the highest other score.

        The bars that hold all but a thousandth of the samples have one width, the smallest power of
        2 times the unit for which 64 suffice; those outside are wider and wider.

        Returns
        -------
        list of (float, float, int)
            From, up to (not including), and the count; without empty bars.
        """
        made: dict[float, list[float]] = {}
        width, unit, most = self._bar_width(), self.unit, sys.float_info.max
        for number, count in self.histogram:
            edges = bin_start(number), bin_start(number + 1)
            start, stop = (min(max(edge, -most), most) for edge in edges)
            if max(abs(start), abs(stop)) / width <= BARS / 2:
                place = math.floor(start / width)
                start, stop = place * width, (place + 1) * width
            else:  # from one power of 2 to the next
                near = 2.0 ** (math.frexp(min(abs(start), abs(stop)))[1] - 1)
                start, stop = (near, near * 2) if number >= 0 else (-near * 2, -near)
            bar = made.setdefault(start, [stop, 0])
            bar[1] += count
        bars = []
        for start, (stop, n) in sorted(made.items()):
            first, last = (min(max(end * unit, -most), most) for end in (start, stop))
            bars.append((first, last, int(n)))
        if bars and bin_start(self.histogram[0][0]) == -math.inf:
            bars[0] = -math.inf, *bars[0][1:]
        if bars and not bin_start(self.histogram[-1][0] + 1) < math.inf:
            bars[-1] = bars[-1][0], math.inf, bars[-1][2]
        return bars

    def _bar_width(self) -> float:
        """Return the width of the bars, in units."""
        far = sorted((max(abs(bin_start(b)), abs(bin_start(b + 1))), n) for b, n in self.histogram)
        far = [(reach, count) for reach, count in far if reach < math.inf]
        left = sum(count for _, count in far) / OUTSIDE
        reach = ties = bin_start(1)
        while far and left >= 0:
            reach, count = far.pop()
            left -= count
        return 1.0 if reach == ties else 2.0 ** math.ceil(math.log2(reach / (BARS / 2)))

    def __repr__(self) -> str:
        return (
            f"<Evaluation: {self.reduction} loss {self.loss:.6g}, accuracy "
            f"{percent(self.accuracy)}, {self.samples:,} samples, {len(self.classes):,} classes>"
        )

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><th>{escape(k)}<td>{escape(v)}" for k, v in self._head())
        return f"<table>{rows}</table>"

    def __str__(self) -> str:
        lines = [f"{key:<15}{value}" for key, value in self._head()]
        shown = self.shown_classes()
        names = self.short_names([c for c, _ in shown], 30)
        width = max([7, *map(len, names.values())])
        lines += [
            "",
            f"{'class':>{width}}{'samples':>15}{'mean loss':>13}{'accuracy':>11}{'inside':>11}",
        ]
        lines += [
            f"{names[c]:>{width}}{f.count:>15,}{f.loss:>13.6g}{percent(f.accuracy):>11}"
            f"{percent(f.inside_margin):>11}"
            for c, f in shown
        ]
        if len(shown) < len(self.classes):
            lines.append(f"the {len(shown)} classes of highest mean loss, of {len(self.classes):,}")
        return "\n".join(lines)

    def _head(self) -> list[tuple[str, str]]:
        ignored = f" ({self.ignored:,} more ignored)" if self.ignored else ""
        made = [
            ("samples", f"{self.samples:,} in {len(self.classes):,} classes{ignored}"),
            ("loss", f"{self.loss!r} ({self.reduction}; p {self.p:g}, margin {self.margin:g})"),
            ("accuracy", f"{percent(self.accuracy)}  (target has the highest score)"),
            (
                "inside margin",
                f"{percent(self.inside_margin)}  (another class within the margin, or above)",
            ),
            ("kernel", self.kernel),
        ]
        if self.nan:
            first = ", ".join(f"{on_a_line(file)} row {row}" for file, row in self.nan_samples[:3])
            made.append(("loss is NaN", f"{self.nan:,} samples, first {first}"))
        return made + [("read" if not i else "", line) for i, line in enumerate(self.pairs())]

    def pairs(self, most: int = SHOWN_FILES) -> list[str]:
        """Return which files and columns were read together, in order: a line for each."""
        lines = [on_a_line(" with ".join(_pair(line))) for line in self.pairing]
        if len(lines) > most:
            lines[most - 1 : -1] = [f"... {len(lines) - most:,} more ..."]
        return lines

    def shown_classes(self) -> list[tuple[int, ClassFigures]]:
        """Return the classes that a table shows: all, or those of highest mean loss."""
        classes = list(enumerate(self.classes))
        if len(classes) <= SHOWN_CLASSES:
            return classes
        with_samples = [(c, f) for c, f in classes if f.count]
        return sorted(with_samples, key=lambda item: -_or_inf(item[1].loss))[:SHOWN_CLASSES]


def _unpickled(*values: Any) -> Evaluation:
    """Make an evaluation that equals the one it comes from: in tuples, one NaN equals itself."""
    return Evaluation(*map(_with_one_nan, values))


def _with_one_nan(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_with_one_nan, value))
    if isinstance(value, ClassFigures):
        return ClassFigures(*(_with_one_nan(getattr(value, name)) for name in value.__slots__))
    return math.nan if isinstance(value, float) and math.isnan(value) else value


def figures_of(
    state: MetricState,
    data: Dataset,
    loss: Loss,
    reduction: str,
    kernel: str,
    class_names: Sequence[str] | None,
    nan_by_file: dict[str, int],
) -> Evaluation:
    """Return the figures of all samples.

    Parameters
    ----------
    state : MetricState
        What was counted.
    data : Dataset
        What was evaluated.
    loss, reduction, kernel, class_names
        As in :class:`Evaluation`.
    nan_by_file : dict of str to int
        How many samples of which file have a loss of NaN.

    Returns
    -------
    Evaluation
    """
    units = int(state.sums[0].sum())
    total = ExactSum(units, *(int(state.counts[i].sum()) for i in (0, 3, 4, 5)))
    (samples, weight), (_, correct), (_, inside) = (state.total(kind) for kind in range(3))
    mean = total.over_units(weight << state.unit)
    return Evaluation(
        loss=total.over(1) if reduction == "sum" else mean,
        reduction=reduction,
        samples=samples,
        accuracy=_share(correct, weight),
        inside_margin=_share(inside, weight),
        p=loss.p,
        margin=loss.margin,
        weight=None if loss.weight is None else tuple(loss.weight.tolist()),
        ignore_index=loss.ignore_index,
        weighted=state.weighted,
        kernel=kernel,
        classes=_class_figures(state),
        unit=loss.unit,
        histogram=tuple(sorted(state.histogram.items())),
        undefined=samples - sum(state.histogram.values()),
        ignored=state.ignored,
        nan=int(state.counts[3].sum()),
        confusions=_confusions(state),
        nan_samples=tuple((printable(name), row) for name, row, _ in map(data.place, state.nan)),
        nan_by_file=tuple((printable(name), count) for name, count in nan_by_file.items()),
        worst=tuple(_worst(sample, data) for sample in state.worst),
        pairing=data.pairing(),
        class_names=None if class_names is None else tuple(map(printable, class_names)),
    )


def _confusions(state: MetricState) -> tuple[tuple[int, int, int], ...] | None:
    if state.confusions is None:
        return None
    pairs = nsmallest(SHOWN_CONFUSIONS, ((-n, pair) for pair, n in state.confusions.items()))
    return tuple((*divmod(pair, state.n_classes), -n) for n, pair in pairs)


def _worst(sample: Any, data: Dataset) -> WorstSample:
    file, row, position = data.place(sample.sample)
    cost = -sample.cost + 0.0  # no -0.0
    return WorstSample(
        cost, position, printable(file), row, sample.target, sample.score, sample.highest
    )


def _class_figures(state: MetricState) -> tuple[ClassFigures, ...]:
    count, right, inside, *odd = state.counts.tolist()
    sums, *of_weights = state.sums.tolist()
    shares = of_weights or (count, right, inside)
    unit = state.unit
    found = [
        ClassFigures(
            n,
            ExactSum(units, n, *strange).over_units(weight << unit),
            _share(right, weight),
            _share(inside, weight),
        )
        for n, units, strange, weight, right, inside in zip(
            count, sums, zip(*odd, strict=True), *shares, strict=True
        )
    ]
    made = [ClassFigures(0, math.nan, math.nan, math.nan)] * state.n_classes
    for c, figures in zip(state.classes.tolist(), found, strict=True):
        made[c] = figures
    return tuple(made)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def percent(share: float) -> str:
    """Return a share in percent."""
    return "-" if math.isnan(share) else f"{100 * share:.3f} %"


def _pair(line: dict[str, Any]) -> list[str]:
    """Return the files, columns and rows of one line of the pairing, as text."""
    made = []
    for told in (line["scores"], *line.get("targets", []), *line.get("sample weights", [])):
        columns = ", ".join(told.get("columns", []))
        start, stop = told["rows"]
        columns = f" [{columns if len(columns) < 60 else columns[:57] + '...'}]" if columns else ""
        rows = f"rows {start:,} to {stop - 1:,}" if stop > start else "no rows"
        made.append(f"{told['name']}{columns} {rows}")
    return made


def as_json(value: Any) -> Any:
    """Return what JSON knows: it has no NaN, no infinities and no tuples."""
    if isinstance(value, dict):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
