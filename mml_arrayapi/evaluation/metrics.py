"""What is counted of samples: exact, mergeable in any order, and small where classes are many."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from mml_arrayapi.exact_sum import UNIT, ExactSum, exact_sums, shifted, weighted
from mml_arrayapi.loss import sample_losses
from mml_arrayapi.validation import raise_invalid_target

if TYPE_CHECKING:
    import numpy as np

ROWS = 2**16  # rows counted together: what is kept of each is about 100 bytes
BLOCK = 2**23  # scores looked at together: a kernel may need several times their memory
STEPS = 5  # bits of a lead that the histogram keeps: 32 bins from each power of 2 to the next
WORST = 20  # samples that are kept as the worst, and as the first that are NaN
SHOWN_SCORES = 3  # highest scores that are kept of each of the worst samples
PAIRS = 500_000  # different confusions that are kept
KINDS = 6  # rows of counts: samples, right, inside the margin; losses NaN, infinite, -infinite
INSIDE, RIGHT = 1, 2  # of a sample: another class is within the margin; the target leads


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
    ignore_index : int or None
        The label of samples that are left out.
    """

    p: float = 1.0
    margin: float = 1.0
    weight: Any = None
    backend: str | None = None
    ignore_index: int | None = None

    @property
    def unit(self) -> float:
        """The unit of the histogram: the margin, or 1 where that is 0."""
        return abs(self.margin) or 1.0


class Sample(NamedTuple):
    """One of the worst samples; they sort by loss, then by position.

    Attributes
    ----------
    cost : float
        Minus the loss.
    sample : int
        Its place among all samples.
    target : int
        Its class.
    score : float
        The target's score.
    highest : tuple of (int, float)
        The classes of the highest scores, and these.
    """

    cost: float
    sample: int
    target: int
    score: float
    highest: tuple[tuple[int, float], ...]


class _Looks(NamedTuple):
    """What is seen of each sample.

    Attributes
    ----------
    losses : numpy array of float32 or float64, shape (N,)
        The losses.
    highest : numpy array of int64, shape (N, up to 3)
        The classes of the highest scores: NaN first, of equal scores the lower class.
    kinds : numpy array of uint8, shape (N,)
        ``INSIDE`` and ``RIGHT``, added up. A lead is the target's score less the highest other; of
        a sample with a NaN it is NaN, and neither right nor wrong.
    bins : numpy array of int32, shape (N,)
        The lead's bin: the leading bits of its float64, in units of the margin. So bins are as fine
        as the numbers in them, and no range has to be known beforehand. Bin ``b`` is from
        :func:`bin_start` of ``b`` up to that of the next; beyond both infinities is NaN.
    confused : numpy array of int64, shape (N,)
        ``target * C + class`` where the lead over that class, the highest other one, is <= 0; else
        -1.
    """

    losses: np.ndarray
    highest: np.ndarray
    kinds: np.ndarray
    bins: np.ndarray
    confused: np.ndarray


class MetricState:
    """Counts and exact sums over samples, by class of the target.

    Attributes
    ----------
    classes : numpy array of int64, shape (K,)
        The classes that have samples, in order.
    counts : numpy array of int64, shape (6, K)
        Per class: samples; those whose target has the highest score; those with another class
        within the margin; losses that are NaN, infinite, minus infinite.
    sums : numpy array of int, shape (1, K) or (4, K)
        Per class, the sum of the finite losses in units of ``2 ** -UNIT``. With sample weights, of
        the losses times these, and then the sums of the weights for the first three of the counts.
    histogram : Counter
        How far the target's score lies above the highest other score: how many by bin.
    confusions : Counter or None
        How many samples by ``target * C + class of the highest score``, where that is another;
        None if there are more than half a million different ones.
    worst : list of Sample
        The samples of highest loss, NaN left out.
    nan : list of int
        The places of the first samples whose loss is NaN.
    ignored : int
        How many samples were left out.
    """

    __slots__ = (
        "classes",
        "confusions",
        "counts",
        "histogram",
        "ignored",
        "n_classes",
        "nan",
        "sums",
        "worst",
    )

    def __init__(self, n_classes: int, *, weighted: bool = False) -> None:
        import numpy as np

        self.n_classes = n_classes
        self.classes = np.arange(0)
        self.counts = np.zeros((KINDS, 0), dtype=np.int64)
        self.sums = np.zeros((4 if weighted else 1, 0), dtype=object)
        self.histogram: Counter[int] = Counter()
        self.confusions: Counter[int] | None = Counter()
        self.worst: list[Sample] = []
        self.nan: list[int] = []
        self.ignored = 0

    @property
    def weighted(self) -> bool:
        """Whether the samples have weights."""
        return len(self.sums) > 1

    @property
    def unit(self) -> int:
        """How many bits a sum of weights is shifted by, to be in the units of a sum of losses."""
        return 0 if self.weighted else UNIT

    def merge(self, other: MetricState) -> None:
        """Add what another state holds."""
        where = self._places(other.classes)
        self.counts[:, where] += other.counts
        self.sums[:, where] += other.sums
        self.histogram.update(other.histogram)
        if self.confusions is not None and other.confusions is not None:
            self.confusions.update(other.confusions)
            if len(self.confusions) > PAIRS:
                self.confusions = None
        else:
            self.confusions = None
        self.worst = sorted(self.worst + other.worst)[:WORST]
        self.nan = sorted(self.nan + other.nan)[:WORST]
        self.ignored += other.ignored

    def _places(self, classes: np.ndarray) -> Any:
        """Return where classes stand here; make room for those that don't yet."""
        import numpy as np

        if len(classes) == len(self.classes) and (classes == self.classes).all():
            return slice(None)
        # Both are sorted: np.union1d(), which doesn't know, takes four times as long.
        union = np.sort(np.concatenate([self.classes, classes]), kind="stable")
        union = union[np.diff(union, prepend=-1) > 0]
        if len(union) > len(self.classes):
            old = np.searchsorted(union, self.classes)
            for name in ("counts", "sums"):
                rows = getattr(self, name)
                wider = np.zeros((len(rows), len(union)), rows.dtype)
                wider[:, old] = rows
                setattr(self, name, wider)
            self.classes = union
        return np.searchsorted(self.classes, classes)

    def state(self) -> dict[str, Any]:
        """Return the state as plain JSON."""
        return {
            "n_classes": self.n_classes,
            "classes": self.classes.tolist(),
            "counts": self.counts.tolist(),
            "sums": [[_hex(value) for value in sums] for sums in self.sums.tolist()],
            "histogram": _pairs(self.histogram),
            "confusions": None if self.confusions is None else _pairs(self.confusions),
            "worst": [
                [*map(_exact, s[:-1]), [[c, _exact(v)] for c, v in s[-1]]] for s in self.worst
            ],
            "nan": self.nan,
            "ignored": self.ignored,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> MetricState:
        """Make the state that :meth:`state` described."""
        import numpy as np

        made = cls(state["n_classes"])
        made.classes = np.asarray(state["classes"], dtype=np.int64)
        made.counts = np.asarray(state["counts"], dtype=np.int64).reshape(KINDS, -1)
        sums = [[_unhex(text) for text in row] for row in state["sums"]]
        made.sums = np.asarray(sums, dtype=object).reshape(len(sums), -1)
        made.histogram = Counter(dict(zip(*state["histogram"], strict=True)))
        pairs = state["confusions"]
        made.confusions = None if pairs is None else Counter(dict(zip(*pairs, strict=True)))
        made.worst = [
            Sample(float(cost), i, c, float(score), tuple((k, float(v)) for k, v in highest))
            for cost, i, c, score, highest in state["worst"]
        ]
        made.nan, made.ignored = state["nan"], state["ignored"]
        return made

    def total(self, kind: int = 0) -> tuple[int, int]:
        """Return how many samples there are of a kind of count, and their weight in units."""
        count = int(self.counts[kind].sum())
        return count, int(self.sums[1 + kind].sum()) if self.weighted else count


def counted(
    scores: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray | None,
    loss: Loss,
    first: int = 0,
) -> MetricState:
    """Count samples.

    Parameters
    ----------
    scores : numpy array, shape (N, C), real floating
        The scores.
    target : numpy array, shape (N,), any integer dtype
        Each sample's class.
    weights : numpy array, shape (N,), or None
        Each sample's weight.
    loss : Loss
        The loss's parameters.
    first : int
        The place of the first one among all samples.

    Returns
    -------
    MetricState

    Raises
    ------
    InvalidTargetError
        A target is out of range; its position is counted within ``target``.
    """
    import numpy as np

    keep, n = None, len(target)
    if loss.ignore_index is not None:
        ignored = target == loss.ignore_index
        if ignored.any():
            keep = np.flatnonzero(~ignored)
            target = np.where(ignored, 0, target)
    if n and not (target.min() >= 0 and target.max() < scores.shape[1]):
        raise_invalid_target(target, scores.shape[1])
    # A selection is a copy: of no more rows than are looked at together.
    step = ROWS if keep is None else min(ROWS, _block(scores))
    made = None
    for start in range(0, n if keep is None else len(keep), step):
        rows: Any = slice(start, min(start + step, n))
        places = np.arange(rows.start, rows.stop) if keep is None else keep[rows]
        rows = rows if keep is None else places
        weight = None if weights is None else weights[rows]
        classes = target[rows].astype(np.int64, copy=False)
        block = _count(scores[rows], classes, weight, loss, places + first)
        if made is None:
            made = block
        else:
            made.merge(block)
    made = made or MetricState(scores.shape[1], weighted=weights is not None)
    made.ignored = 0 if keep is None else n - len(keep)
    return made


def _hex(units: int) -> str:
    return str(ExactSum(units).state()[0])


def _unhex(text: str) -> int:
    return ExactSum.from_state([text, 0, 0, 0, 0]).total


def _pairs(counter: Counter[int]) -> list[list[int]]:
    return [list(counter.keys()), list(counter.values())]


def _exact(value: Any) -> Any:
    """JSON knows no infinities."""
    return repr(value) if isinstance(value, float) and not math.isfinite(value) else value


def _count(
    scores: np.ndarray,
    target: np.ndarray,
    weights: np.ndarray | None,
    loss: Loss,
    places: np.ndarray,
) -> MetricState:
    import numpy as np

    losses, highest, kinds, bins, confused = _look_at(scores, target, loss)
    made = MetricState(scores.shape[1], weighted=weights is not None)
    made.classes, groups = _classes(target, scores.shape[1])
    n = len(made.classes)
    values, others = (losses, []) if weights is None else weighted(losses, weights)
    finite, nan = np.isfinite(values), np.isnan(values)
    # One count of all combinations is quicker than one of each.
    every = np.bincount(groups * 4 + kinds, minlength=4 * n).reshape(n, 4)
    made.counts = np.zeros((KINDS, n), np.int64)
    right, inside = every[:, RIGHT:], every[:, INSIDE::2]
    made.counts[:3] = every.sum(axis=1), right.sum(axis=1), inside.sum(axis=1)
    if not finite.all():
        for row, odd in enumerate((nan, values == math.inf, values == -math.inf), 3):
            made.counts[row] = np.bincount(groups[odd], minlength=n)
    kept = slice(None) if finite.all() else finite
    sums = [exact_sums(values[kept], groups[kept], n)]
    for where, more, shift in others:
        for i, total in enumerate(exact_sums(more, groups[where], n) if len(where) else ()):
            sums[0][i] += shifted(total, shift)
    if weights is not None:
        chosen = [kinds & kind == kind for kind in (0, RIGHT, INSIDE)]
        sums += [exact_sums(weights[which], groups[which], n) for which in chosen]
    made.sums = np.asarray(sums, dtype=object)
    found = _frequencies(bins)
    made.histogram = Counter({b: k for b, k in found.items() if abs(b) <= 0x7FF << STEPS})
    if nan.any():
        made.nan = places[np.flatnonzero(nan)[:WORST]].tolist()
        losses = np.where(nan, math.nan, losses)  # weight 0 times an infinite loss
    made.confusions = _frequencies(confused[confused >= 0])
    rows = _worst(losses)
    shown = highest[rows]
    own, best = scores[rows, target[rows]], scores[rows[:, None], shown]
    pairs = map(zip, shown.tolist(), best.tolist())
    columns = -losses[rows], places[rows], target[rows], own
    lists = (column.tolist() for column in columns)
    made.worst = [
        Sample._make((*row, tuple(pair))) for *row, pair in zip(*lists, pairs, strict=True)
    ]
    return made


def _classes(target: np.ndarray, n_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the classes that have samples, and each sample's place among them."""
    import numpy as np

    if n_classes > len(target):
        return np.unique(target, return_inverse=True)
    there = np.bincount(target, minlength=n_classes) > 0
    classes = np.flatnonzero(there)
    return classes, target if len(classes) == n_classes else (np.cumsum(there) - 1)[target]


def _frequencies(values: np.ndarray) -> Counter[int]:
    """Count how often each of some integers occurs."""
    import numpy as np

    lowest = int(values.min()) if len(values) else 0
    if len(values) and int(values.max()) - lowest < 4 * len(values):
        counts = np.bincount(values - lowest)
        kept = np.flatnonzero(counts)
        counts = counts[kept]
        kept += lowest
        return Counter(dict(zip(kept.tolist(), counts.tolist(), strict=True)))
    return Counter(values.tolist())


def _worst(losses: np.ndarray) -> np.ndarray:
    """Return the rows of the highest losses, NaN left out."""
    import numpy as np

    bound = -math.inf
    if (group := len(losses) // (8 * WORST)) > 1:
        # The least of the 20 highest maxima of groups: a bound that costs one look at each loss.
        highest = losses[: len(losses) // group * group].reshape(-1, group).max(axis=1)
        bound = np.sort(np.where(np.isnan(highest), -math.inf, highest))[-WORST]
    rows = np.flatnonzero(losses >= bound)
    return rows[np.argsort(-losses[rows], kind="stable")[:WORST]]


def bin_start(number: int) -> float:
    """Return where a bin of the histogram begins, in units of the margin."""
    import numpy as np

    if number < 0:
        return -bin_start(-number)
    return float(np.int64(number << (52 - STEPS)).view(np.float64))


def _block(scores: np.ndarray) -> int:
    """Return how many rows are looked at together."""
    return max(64, BLOCK // int(scores.shape[1]))


def _look_at(scores: np.ndarray, target: np.ndarray, loss: Loss) -> _Looks:
    """Look at each sample."""
    import numpy as np

    n, n_classes = scores.shape
    dtype = np.dtype("f8" if scores.dtype.itemsize == 8 else "f4")
    highest = np.empty((n, min(SHOWN_SCORES, n_classes)), np.int64)
    rows = (np.empty(n, kind) for kind in (np.uint8, np.int32, np.int64))
    looks = _Looks(np.empty(n, dtype), highest, *rows)
    for start in range(0, n, step := _block(scores)):
        part = slice(start, start + step)
        # Contiguous: each row is summed in the same order, however its file stores it.
        block = np.ascontiguousarray(scores[part], dtype=dtype)
        _look_at_block(block, target[part], loss, _Looks(*(look[part] for look in looks)))
    return looks


def _look_at_block(scores: np.ndarray, target: np.ndarray, loss: Loss, looks: _Looks) -> None:
    """Look at samples whose scores are contiguous, in the computing precision."""
    import numpy as np

    from mml_arrayapi.backends import cpu

    ours, stood = loss.backend == "numpy-cpu", False
    if cpu.native is not None:
        # Of our own kernel the losses too, in the same pass: a row is then read from memory once.
        losses, weight = (looks.losses, loss.weight) if ours else (None, None)
        how = (loss.p, loss.margin, "none", None, -1, "nan")
        arrays = scores, target, weight, how, losses, looks[1:], loss.unit
        stood = cpu.native.standings(*arrays) is not None
    parameters = loss._asdict() | {"ignore_index": None, "check_target": "nan"}
    with np.errstate(invalid="ignore", over="ignore"):  # infinite scores: NaN, as it should be
        if not (stood and ours):
            looks.losses[...] = sample_losses(scores, target, **parameters)
        if not stood:
            _stand(scores, target, loss, looks)


def _stand(scores: np.ndarray, target: np.ndarray, loss: Loss, looks: _Looks) -> None:
    """Write all but the losses."""
    import numpy as np

    rows, highest = np.arange(len(scores)), looks.highest
    keys = (scores + 0.0).view(f"i{scores.itemsize}")  # -0.0 is 0.0
    keys ^= (keys >> 63) & np.iinfo(keys.dtype).max  # integers of the scores' order
    keys[np.isnan(scores)] = np.iinfo(keys.dtype).max
    for column in highest.T:  # NaN first, of equal scores the lower class
        column[:] = keys.argmax(axis=1)
        keys[rows, column] = np.iinfo(keys.dtype).min
    own = scores[rows, target]
    if scores.shape[1] == 1:  # there is no other, however low the score
        inside = np.isnan(own)
        lead, rival = np.where(inside, own, math.inf), target
    else:
        rival = np.where(highest[:, 0] == target, highest[:, 1], highest[:, 0])
        other = scores[rows, rival]
        lead = own - other
        # In the loss's own order of operations; a sample with a NaN counts as inside.
        margin = own.dtype.type(loss.margin)
        distance = (other + margin) - own if np.isinf(margin) else (other - own) + margin
        inside = ~(distance <= 0)
    looks.kinds[...] = inside * INSIDE + (lead > 0) * RIGHT
    looks.confused[...] = np.where(lead <= 0, target * scores.shape[1] + rival, -1)
    with np.errstate(over="ignore", under="ignore"):
        told: Any = (lead / np.float64(loss.unit)).view(np.int64)
    sign = told >> 63
    told &= np.iinfo(np.int64).max
    # Integers of the floats' order; shifting rounds down.
    looks.bins[...] = ((told ^ sign) - sign) >> (52 - STEPS)


def count_batch(
    batch: Any, axis: int, loss: Loss, n_classes: int, samples_per_row: int
) -> MetricState:
    """Read a batch and count it.

    Parameters
    ----------
    batch : Batch
        The rows; in place of each :class:`ShardSlice` a NumPy array may stand.
    axis : int
        The classes' axis in the scores.
    loss : Loss
        The loss's parameters.
    n_classes, samples_per_row : int
        The number of classes, and of samples in each row.

    Returns
    -------
    MetricState
    """
    import numpy as np

    from mml_arrayapi.evaluation.inputs import refuse_subclass
    from mml_arrayapi.validation import InvalidTargetError

    def read(part: Any, role: str, rows_axis: int) -> np.ndarray:
        array = part.read(rows_axis) if hasattr(part, "read") else part
        refuse_subclass(role, array)
        return np.asarray(array)

    scores = read(batch.scores[0], "scores", 0 if axis else 1)
    target = np.concatenate([read(part, "targets", 0) for part in batch.targets])
    weights = None
    if batch.weights:
        parts, at = [], batch.start
        for part in batch.weights:
            rows = read(part, "sample weights", 0)
            if loss.ignore_index is not None:  # of such samples any will do
                labels = target[at - batch.start :][: len(rows)]
                rows = np.where(labels == loss.ignore_index, 0, rows)
            parts.append(_checked(rows, *_place(part, at)))
            at += len(rows)
        weights = np.concatenate(parts).reshape(-1)
    rows = np.moveaxis(scores, axis, -1).reshape(-1, n_classes)
    try:
        return counted(rows, target.reshape(-1), weights, loss, batch.start * samples_per_row)
    except InvalidTargetError as error:
        first, *others = (int(i) for i in np.unravel_index(error.position[0], target.shape))
        position = (first + batch.start, *others)
        raise InvalidTargetError(position, error.value, error.n_classes) from None


def _place(part: Any, at: int) -> tuple[str, int]:
    """Return the name of what weights are of, and the first row there; of arrays, of all rows."""
    shard = getattr(part, "shard", None)
    return (shard.name, part.start) if shard and shard.version else ("sample weights", at)


def _checked(weights: np.ndarray, name: str, start: int) -> np.ndarray:
    """Return weights as float64; refuse what is no weight."""
    import numpy as np

    from mml_arrayapi.evaluation.errors import InputError

    bad = np.argwhere(~((weights >= 0) & (weights < math.inf)))
    if len(bad):
        first = tuple(int(i) for i in bad[0])
        where = ", ".join(map(str, (first[0] + start, *first[1:])))
        raise InputError(
            f"{name}: [{where}] is {weights[first]}; accepted as sample weights are finite numbers "
            ">= 0"
        )
    return weights.astype(np.float64)
