"""What is known of evaluated samples: exact and mergeable while counting, then plain figures."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mml_arrayapi.exact_sum import ExactSum, exact_sums
from mml_arrayapi.loss import sample_losses
from mml_arrayapi.validation import raise_invalid_target

if TYPE_CHECKING:
    import numpy as np

TILE = 2**17  # scores looked at together: what is derived from them stays in the cache
ROWS = 2**18  # rows counted together: what is kept of each is about 100 bytes
BAR = 8  # bars of the histogram per unit
REACH = 64 * BAR  # bars on either side of zero; what lies beyond is counted in the outermost ones
SHOWN_CLASSES = 20


class Loss(NamedTuple):
    """The loss's parameters.

    Attributes
    ----------
    p, margin : float
        The exponent and the margin.
    weight : numpy array, shape (C,), or None
        One factor per class.
    backend : str or None
        The kernel that must run.
    """

    p: float = 1.0
    margin: float = 1.0
    weight: Any = None
    backend: str | None = None

    @property
    def unit(self) -> float:
        """The unit of the histogram: the margin, or 1 where that is 0."""
        return abs(self.margin) or 1.0


class Tally:
    """Counts and exact sums over samples, by class of the target.

    Attributes
    ----------
    counts : numpy array of int64, shape (6, C)
        Per class: samples; those whose target has the highest score; those with another class
        within the margin; losses that are NaN, infinite, minus infinite.
    sums : list of int
        Per class, the sum of the finite losses in units of ``2 ** -UNIT``.
    histogram : numpy array of int64
        How far the target's score lies above the highest other score, in bars of 1/8 unit; the
        last element counts those that are NaN.
    """

    __slots__ = ("counts", "histogram", "sums")

    def __init__(self, n_classes: int) -> None:
        import numpy as np

        self.counts = np.zeros((6, n_classes), dtype=np.int64)
        self.sums = [0] * n_classes
        self.histogram = np.zeros(2 * REACH + 1, dtype=np.int64)

    def add(self, scores: np.ndarray, target: np.ndarray, loss: Loss) -> None:
        """Add samples.

        Parameters
        ----------
        scores : numpy array, shape (N, C), real floating
            The scores.
        target : numpy array, shape (N,), any integer dtype
            Each sample's class.
        loss : Loss
            The loss's parameters.

        Raises
        ------
        InvalidTargetError
            A target is out of range; its position is counted within ``target``.
        """
        import numpy as np

        raise_invalid_target(target, scores.shape[1])
        for start in range(0, len(target), ROWS):
            part = slice(start, start + ROWS)
            self._add(scores[part], target[part].astype(np.int64), loss)

    def _add(self, scores: np.ndarray, target: np.ndarray, loss: Loss) -> None:
        import numpy as np

        n_classes = scores.shape[1]
        losses, lead, inside = _look_at(scores, target, loss)
        finite = np.isfinite(losses)
        values, groups = (losses, target) if finite.all() else (losses[finite], target[finite])
        for group, total in enumerate(exact_sums(values, groups, n_classes)):
            self.sums[group] += total
        chosen = (slice(None), lead > 0, inside, np.isnan(losses), losses == math.inf)
        for row, which in zip(self.counts, (*chosen, losses == -math.inf), strict=True):
            row += np.bincount(target[which], minlength=n_classes)
        defined = lead[~np.isnan(lead)].astype(np.float64)
        bars = np.clip(np.floor(defined * (BAR / loss.unit)), -REACH, REACH - 1)
        self.histogram += np.bincount(bars.astype(np.int64) + REACH, minlength=2 * REACH + 1)
        self.histogram[-1] += len(lead) - len(defined)

    def merge(self, other: Tally) -> None:
        """Add what another tally holds."""
        self.counts += other.counts
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.histogram += other.histogram

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON; classes and bars without samples are left out."""
        import numpy as np

        classes = np.flatnonzero(self.counts[0]).tolist()
        bars = np.flatnonzero(self.histogram).tolist()
        return {
            "n_classes": len(self.sums),
            "classes": {
                str(c): [ExactSum(self.sums[c]).state()[0], *self.counts[:, c].tolist()]
                for c in classes
            },
            "histogram": {str(bar): int(self.histogram[bar]) for bar in bars},
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tally:
        """Make the tally that :meth:`state` described."""
        made = cls(state["n_classes"])
        for name, (total, *counts) in state["classes"].items():
            made.sums[int(name)] = ExactSum.from_state([total, 0, 0, 0, 0]).total
            made.counts[:, int(name)] = counts
        for bar, count in state["histogram"].items():
            made.histogram[int(bar)] = count
        return made

    def evaluation(self, loss: Loss, reduction: str, kernel: str) -> Evaluation:
        """Return the figures."""
        classes = tuple(self._figures(c) for c in range(len(self.sums)))
        total = ExactSum()
        for c in range(len(self.sums)):
            total.merge(self._sum(c))
        samples, correct, inside = (int(n) for n in self.counts[:3].sum(axis=1))
        return Evaluation(
            loss=total.over(1 if reduction == "sum" else samples),
            reduction=reduction,
            samples=samples,
            accuracy=correct / samples if samples else math.nan,
            inside_margin=inside / samples if samples else math.nan,
            p=loss.p,
            margin=loss.margin,
            kernel=kernel,
            classes=classes,
            unit=loss.unit,
            histogram=tuple(self.histogram[:-1].tolist()),
            undefined=int(self.histogram[-1]),
        )

    def _sum(self, c: int) -> ExactSum:
        count, nan, plus, minus = (int(self.counts[i, c]) for i in (0, 3, 4, 5))
        return ExactSum(self.sums[c], count, nan, plus, minus)

    def _figures(self, c: int) -> ClassFigures:
        count, correct, inside = (int(n) for n in self.counts[:3, c])
        mean = self._sum(c).over(count)
        if not count:
            return ClassFigures(0, mean, math.nan, math.nan)
        return ClassFigures(count, mean, correct / count, inside / count)


def _look_at(
    scores: np.ndarray, target: np.ndarray, loss: Loss
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each sample's loss, lead (target's score less the highest other), inside the margin.

    The scores are walked in tiles, so that what is derived from them stays small. The tiles are
    C-contiguous, whatever the file's order, so that a row is always summed in the same order.
    """
    import numpy as np

    n, n_classes = scores.shape
    dtype = np.float64 if scores.dtype.itemsize == 8 else np.float32
    losses, lead = np.empty(n, dtype), np.empty(n, dtype)
    inside = np.empty(n, bool)
    step = max(1, TILE // n_classes)
    for start in range(0, n, step):
        part = slice(start, start + step)
        tile, own_class = np.ascontiguousarray(scores[part], dtype=dtype), target[part]
        with np.errstate(invalid="ignore"):  # two infinite scores: NaN, as it should be
            losses[part] = sample_losses(tile, own_class, **loss._asdict(), check_target="nan")
        rows = np.arange(len(tile))
        own = tile[rows, own_class]
        others = tile.copy()
        others[rows, own_class] = -math.inf
        highest = others.max(axis=1)
        with np.errstate(invalid="ignore"):
            lead[part] = own - highest
            # In the loss's own order of operations; a sample with a NaN counts as inside.
            inside[part] = ~((highest - own) + dtype(loss.margin) <= 0)
    return losses, lead, inside


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
class Evaluation:
    """The figures of an evaluation. Printed, it is a table.

    Attributes
    ----------
    loss : float
        The loss over all samples, correctly rounded from the exact sum of the samples' losses.
    reduction : {"mean", "sum"}
        What ``loss`` is.
    samples : int
        The number of samples.
    accuracy : float
        The share of samples whose target has the highest score of all. A tie for the highest
        score is no success, nor is a sample with a NaN among its scores.
    inside_margin : float
        The share of samples with another class within the margin of the target's score, or above
        it: those that cost something (for weights other than 0). Samples with a NaN count.
    p, margin : float
        The loss's parameters.
    kernel : str
        The kernel that ran (on the machine that asked, where there are several).
    classes : tuple of ClassFigures
        The figures by class of the target.
    unit : float
        The unit of the histogram: the margin, or 1 where that is 0.
    histogram : tuple of int
        How far the target's score lies above the highest other score: element ``i`` counts the
        samples from ``(i - n / 2) / 8`` units up to the next; the outermost two count all that
        lies beyond as well.
    undefined : int
        The samples that are not in the histogram, since a score is NaN or two are infinite.
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
    histogram: tuple[int, ...]
    undefined: int

    def to_json(self) -> dict[str, Any]:
        """Return the figures as plain JSON; NaN and infinities are strings.

        Returns
        -------
        dict
            The attributes; ``classes`` by name, without those that have no samples, and
            ``histogram`` as a list of ``[from, to, count]`` without the empty bars.
        """
        names = ("loss", "reduction", "samples", "accuracy", "inside_margin", "p", "margin")
        made: dict[str, Any] = {name: getattr(self, name) for name in (*names, "kernel")}
        made["n_classes"] = len(self.classes)
        made["classes"] = {
            str(c): {key: _plain(value) for key, value in asdict(figures).items()}
            for c, figures in enumerate(self.classes)
            if figures.count
        }
        made["histogram"] = [list(bar) for bar in self.bars()]
        made["undefined"] = self.undefined
        return {key: _plain(value) for key, value in made.items()}

    def bars(self, width: int = 1) -> list[tuple[float, float, int]]:
        """Return the bars of the histogram that are not empty.

        Parameters
        ----------
        width : int
            How many of the histogram's bars make one.

        Returns
        -------
        list of (float, float, int)
            From, to, and the count.
        """
        scale = self.unit / BAR
        found = []
        for i in range(0, len(self.histogram), width):
            count = sum(self.histogram[i : i + width])
            if count:
                found.append(((i - REACH) * scale, (i + width - REACH) * scale, count))
        return found

    def __str__(self) -> str:
        lines = [
            f"{'samples':<15}{self.samples:,} in {len(self.classes):,} classes",
            f"{'loss':<15}{self.loss!r} ({self.reduction}; p {self.p:g}, margin {self.margin:g})",
            f"{'accuracy':<15}{_percent(self.accuracy)}  (target has the highest score)",
            f"{'inside margin':<15}{_percent(self.inside_margin)}  "
            "(another class within the margin, or above)",
            f"{'kernel':<15}{self.kernel}",
            "",
            f"{'class':>7}{'samples':>15}{'mean loss':>13}{'accuracy':>11}{'inside':>11}",
        ]
        shown = self.shown_classes()
        lines += [
            f"{c:>7}{f.count:>15,}{f.loss:>13.6g}{_percent(f.accuracy):>11}"
            f"{_percent(f.inside_margin):>11}"
            for c, f in shown
        ]
        if len(shown) < len(self.classes):
            lines.append(f"the {len(shown)} classes of highest mean loss, of {len(self.classes):,}")
        return "\n".join(lines)

    def shown_classes(self) -> list[tuple[int, ClassFigures]]:
        """Return the classes that a table shows: all, or those of highest mean loss."""
        classes = list(enumerate(self.classes))
        if len(classes) <= SHOWN_CLASSES:
            return classes
        with_samples = [(c, f) for c, f in classes if f.count]
        return sorted(with_samples, key=lambda item: -_or_inf(item[1].loss))[:SHOWN_CLASSES]


def _or_inf(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.3f} %"


def _plain(value: Any) -> Any:
    """JSON knows no NaN and no infinities."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
