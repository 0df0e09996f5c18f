"""What is counted: weights, ignored samples, confusions, the worst samples, the histogram."""

import json
import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.backends import cpu
from mml_arrayapi.evaluation.metrics import Loss, MetricState, bin_start, counted
from mml_arrayapi.loss import sample_losses

N, C = 700, 6


@pytest.fixture(scope="module")
def losses(arrays):
    return sample_losses(*arrays, p=1, margin=1.0, check_target="raise")


def leads(scores, target):
    own = scores[np.arange(len(target)), target]
    others = np.where(np.arange(scores.shape[1]) == target[:, None], -np.inf, scores)
    return own - others.max(axis=1), others.argmax(axis=1)


def test_sample_weights(arrays, losses):
    rng = np.random.default_rng(1)
    weights = rng.random(N)
    weights[::7] = 0
    figures = mml.evaluate(*arrays, sample_weight=weights, chunk_size=50)
    products = [Fraction(float(a)) for a in losses.astype(np.float64) * weights]
    exact = [Fraction(float(w)) for w in weights]
    assert figures.loss == float(sum(products) / sum(exact))
    total = mml.evaluate(*arrays, sample_weight=weights, reduction="sum")
    assert total.loss == float(sum(products))
    lead, _ = leads(*arrays)
    assert figures.accuracy == float(
        sum(w for w, x in zip(exact, lead, strict=True) if x > 0) / sum(exact)
    )
    assert figures.samples == N
    for c, one in enumerate(figures.classes):
        mine = np.flatnonzero(arrays[1] == c)
        assert one.count == len(mine)
        assert one.loss == float(sum(products[i] for i in mine) / sum(exact[i] for i in mine))
    ours = mml.LossAccumulator()
    ours.update(*arrays, sample_weight=weights)
    assert ours.compute() == figures.loss
    for size in (33, None):
        assert mml.evaluate(*arrays, sample_weight=weights, chunk_size=size) == figures


def test_weights_of_one_are_none(arrays, files, wanted):
    np.save("w.npy", np.ones(N, np.float32))
    figures = mml.evaluate("x.npy", "y.npy", sample_weight="w.npy", checkpoint="ck", chunk_size=100)
    assert figures == wanted
    assert "with y.npy rows 0 to 699 with w.npy rows 0 to 699" in str(figures)
    again = mml.evaluate("x.npy", "y.npy", sample_weight="w.npy", checkpoint="ck", chunk_size=100)
    assert again == wanted


def test_weight_0_times_an_infinite_loss_is_nan_wherever_it_is_told():
    scores = np.asarray([[0, 1.0], [0, np.inf], [3, 0]])
    figures = mml.evaluate(scores, np.zeros(3, int), sample_weight=np.asarray([1.0, 0, 1]))
    assert math.isnan(figures.loss)
    assert figures.nan_samples == (("scores", 1),)
    assert "loss is NaN    1 samples, first scores row 1\n" in str(figures)
    assert [sample.row for sample in figures.worst] == [0, 2]


@pytest.mark.parametrize("margin", [1.0, -1.0, 1e300])
def test_one_class_is_right_however_low_its_score(margin):
    scores = np.asarray([[-np.inf], [np.inf], [3], [np.nan]], np.float32)
    for part, share in ((scores[:3], 1), (scores, 0.75)):
        figures = mml.evaluate(part, np.zeros(len(part), int), margin=margin)
        assert (figures.accuracy, figures.inside_margin) == (share, 1 - share)
    assert figures.nan == figures.undefined == 1


def test_weights_that_are_none(arrays, files, fails):
    for value in (-1, np.nan, np.inf):
        weights = np.ones(N)
        weights[77] = value
        np.save("w.npy", weights)
        line = fails("x.npy", "y.npy", "--sample-weight", "w.npy", "--chunk-size", 30)
        assert f"w.npy: [77] is {float(value)}; accepted as sample weights are finite numb" in line
    for i, part in enumerate(np.array_split(weights, 10)):
        np.save(f"w-{i}.npy", part)
    assert "w-1.npy: [7] is inf; accepted as sample weights are" in fails(
        "x.npy", "y.npy", "--sample-weight", "w-*.npy"
    )
    with pytest.raises(mml.InputError, match=r"^sample weights: \[77\] is inf; accepted"):
        mml.evaluate("x.npy", "y.npy", sample_weight=weights, chunk_size=30)
    np.save("w.npy", np.ones(3))
    assert "w.npy: has 3 sample weights, but x.npy has 700 samples" in fails(
        "x.npy", "y.npy", "--sample-weight", "w.npy"
    )
    assert "sample weights must be real numbers, but are complex" in fails(
        "x.npy", "y.npy", "--sample-weight", save("c.npy", np.ones(N, complex))
    )
    assert math.isnan(mml.evaluate("x.npy", "y.npy", sample_weight=np.zeros(N)).loss)


def save(path, array):
    np.save(path, array)
    return path


@pytest.mark.parametrize(
    ("label", "dtype"), [(-100, "int64"), (-1, "int16"), (2, "int64"), (255, "uint8")]
)
def test_ignored_samples_leave_no_trace(arrays, label, dtype):
    scores, target = arrays[0].copy(), arrays[1].astype(dtype)
    target[::3] = label
    scores[::3, 1] = np.nan
    kept = target != label
    if label == 2:
        scores[~kept, 1] = np.nan
    wanted = mml.evaluate(scores[kept], target[kept])
    for size in (40, None):
        figures = mml.evaluate(scores, target, ignore_index=label, chunk_size=size)
        assert (figures.loss, figures.classes) == (wanted.loss, wanted.classes)
        assert figures.histogram == wanted.histogram
        assert figures.confusions == wanted.confusions
        assert figures.ignored == N - kept.sum()
    first = np.flatnonzero(kept)[[s.row for s in wanted.worst]]
    assert [s.row for s in figures.worst] == first.tolist()


def test_the_weight_of_an_ignored_sample_may_be_anything(arrays):
    scores, target = arrays[0], arrays[1].copy()
    target[::3] = -100
    weights = np.linspace(1.0, 2.0, N)
    wanted = mml.evaluate(scores, target, ignore_index=-100, sample_weight=weights)
    weights[::3], weights[3] = np.nan, -1.0
    options = {"ignore_index": -100, "sample_weight": weights}
    assert mml.evaluate(scores, target, chunk_size=50, **options) == wanted
    weights[1] = np.nan
    with pytest.raises(mml.InputError, match=r"sample weights: \[1\] is nan"):
        mml.evaluate(scores, target, **options)


def test_the_position_of_a_bad_label_counts_ignored_ones(arrays):
    target = arrays[1].copy()
    target[:100] = -100
    target[333] = 9
    with pytest.raises(mml.InvalidTargetError, match=r"target\[333\] is 9"):
        mml.evaluate(arrays[0], target, ignore_index=-100, chunk_size=50)
    with pytest.raises(mml.InvalidTargetError, match=r"target\[0\] is -100"):
        mml.evaluate(arrays[0], target)
    assert mml.evaluate(arrays[0], np.full(N, -1), ignore_index=-1).ignored == N
    with pytest.raises(TypeError, match="ignore_index must be None or an integer, but is"):
        mml.evaluate(*arrays, ignore_index=1.5)


def test_confusions(arrays):
    lead, rival = leads(*arrays)
    wrong = lead <= 0
    counted = Counter(zip(arrays[1][wrong].tolist(), rival[wrong].tolist(), strict=True))
    figures = mml.evaluate(*arrays, chunk_size=30)
    assert {(t, o): n for t, o, n in figures.confusions} == counted
    assert [n for *_, n in figures.confusions] == sorted(counted.values(), reverse=True)
    tie = mml.evaluate(np.zeros((2, 3)), np.asarray([0, 2]))
    assert tie.confusions == ((0, 1, 1), (2, 0, 1))  # a tie is lost to the first of the others


@pytest.mark.parametrize("kernels", [True, False], ids=["with kernels", "without"])
@pytest.mark.parametrize("n_classes", [2, 16, 17, 5000])
def test_the_highest_other_score_of_few_and_of_many_classes(n_classes, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(cpu, "native", None)
    rng = np.random.default_rng(0)
    target = rng.integers(0, n_classes, 90)
    target[:2] = 0, n_classes - 1
    scores = rng.integers(-3, 4, (90, n_classes)).astype(np.float32)  # many ties
    scores[np.arange(0, 90, 2), target[::2]] = 5
    scores[7, n_classes - 1], scores[9, 0], scores[11, 1] = np.nan, np.inf, -np.inf
    with np.errstate(invalid="ignore"):
        lead, rival = leads(scores, target)
    figures = mml.evaluate(scores, target, chunk_size=70, backend=None if kernels else "generic")
    assert figures.accuracy == np.mean(lead > 0)
    wrong = lead <= 0
    counted = Counter(zip(target[wrong].tolist(), rival[wrong].tolist(), strict=True))
    first = sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:50]
    assert figures.confusions == tuple((t, o, n) for (t, o), n in first)
    assert figures.undefined == 90 - np.sum(~np.isnan(lead))
    for one in figures.worst:
        order = np.argsort(-scores[one.row], kind="stable")[:3].tolist()
        assert [(c, s) for c, s in one.highest] == [(c, scores[one.row, c]) for c in order]


def test_too_many_confusions_are_not_kept(monkeypatch):
    from mml_arrayapi.evaluation import metrics

    monkeypatch.setattr(metrics, "PAIRS", 10)
    scores = np.random.default_rng(0).standard_normal((300, 20))
    for size in (1, 7, None):
        assert mml.evaluate(scores, np.arange(300) % 20, chunk_size=size).confusions is None


def test_the_worst_samples(arrays, files, losses):
    order = sorted(range(N), key=lambda i: (-losses[i], i))[:20]
    for size in (37, None):
        figures = mml.evaluate("x.npy", "y.npy", chunk_size=size)
        assert [s.row for s in figures.worst] == order
    first = figures.worst[0]
    assert first.loss == losses[order[0]]
    assert first.target == arrays[1][order[0]]
    assert first.score == arrays[0][order[0], first.target]
    scores = arrays[0][order[0]].astype(float)
    assert first.highest == tuple((c, scores[c]) for c in np.argsort(-scores)[:3].tolist())
    same = mml.evaluate(np.zeros((100, 3)), np.zeros(100, int), chunk_size=7)
    assert [s.row for s in same.worst] == list(range(20))


def test_worst_and_nan_in_files_of_their_own(arrays, files):
    scores = arrays[0].copy()
    scores[[3, 410, 411]] = np.nan
    for i in range(7):
        np.save(f"part-{i}.npy", scores[i * 100 : i * 100 + 100].reshape(10, 10, C))
    figures = mml.evaluate("part-*.npy", arrays[1].reshape(70, 10))
    assert figures.nan == 3
    assert figures.nan_samples == (("part-0.npy", 0), ("part-4.npy", 1), ("part-4.npy", 1))
    assert figures.nan_by_file == (("part-0.npy", 1), ("part-4.npy", 2))
    for one in figures.worst:
        row, within = one.position
        assert one.file == f"part-{row // 10}.npy"
        assert one.row == row % 10
        assert one.score == scores[row * 10 + within, one.target]
    assert "loss is NaN    3 samples, first part-0.npy row 0" in str(figures)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30, 1e300])
@pytest.mark.parametrize("margin", [1.0, 0.3, -2.5, 0.0])
def test_the_histogram_fits_the_data(scale, margin):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((N, C)) * scale
    scores[5, 0], scores[6, 1] = np.inf, -np.inf
    scores[7] = np.inf
    target = rng.integers(1, C, N)
    figures = mml.evaluate(scores, target, margin=margin)
    with np.errstate(invalid="ignore"):
        lead, _ = leads(scores, target)
    bars = figures.bars()
    assert sum(count for *_, count in bars) == N - 1
    assert figures.undefined == 1
    unit = abs(margin) or 1.0
    for start, stop, count in bars:
        inside = (lead / unit >= start / unit) & ((lead / unit < stop / unit) | (stop == np.inf))
        assert count == inside.sum(), (start, stop)
    assert sum(1 for start, stop, count in bars if count > N / 200) >= 8


def test_values_on_the_edge_of_a_bar():
    scores = np.zeros((6, 2))
    scores[:, 0] = [-1, -0.5, -0.0, 0.0, 0.5, 1]
    bars = mml.evaluate(scores, np.zeros(6, int)).bars()
    assert [(start, count) for start, _, count in bars] == [
        (-1, 1),
        (-0.5, 1),
        (0, 2),
        (0.5, 1),
        (1, 1),
    ]
    assert bin_start(0) == 0
    assert bin_start(-5) == -bin_start(5)


def test_the_state_survives_json():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((500, 40))
    scores[3, 2], scores[4, 5], scores[9, 1] = np.nan, np.inf, -np.inf
    target = rng.integers(5, 30, 500)
    from mml_arrayapi.evaluation.metrics import Loss

    for weights in (None, rng.random(500)):
        state = counted(scores, target, weights, Loss())
        told = json.loads(json.dumps(state.state(), allow_nan=False))
        assert len(told["classes"]) == 25
        assert MetricState.from_state(told).state() == state.state()


def test_many_classes_cost_what_is_there():
    import pickle

    from mml_arrayapi.evaluation.metrics import Loss

    scores = np.zeros((42, 100_000), np.float32)
    state = counted(scores, np.arange(42), None, Loss())
    assert len(pickle.dumps(state)) < 20_000
    assert len(json.dumps(state.state())) < 20_000


def test_a_short_repr_and_html(arrays):
    figures = mml.evaluate(*arrays, class_names=["<a>", "b", "c", "d", "e", "f"])
    assert repr(figures) == (
        f"<Evaluation: mean loss {figures.loss:.6g}, accuracy {100 * figures.accuracy:.3f} %, "
        "700 samples, 6 classes>"
    )
    html = figures._repr_html_()
    assert html.startswith("<table>")
    assert "47.143 %" in html
    assert "\n    <a>" in str(figures)


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "not compiled"])
@pytest.mark.parametrize("margin", [1e39, -1e39])
def test_an_infinite_margin_outweighs_infinite_distances(margin, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(cpu, "native", None)
    largest = np.finfo(np.float32).max
    scores = np.asarray([[largest, -largest], [-largest, largest]], np.float32)
    backend = None if compiled else "generic"
    figures = mml.evaluate(scores, np.zeros(2, int), margin=margin, backend=backend)
    wanted = (math.inf, 1.0) if margin > 0 else (0.0, 0.0)
    assert (figures.loss, figures.inside_margin) == wanted


@pytest.mark.parametrize("margin", [1.0, 1e300])
def test_bars_of_infinite_leads_are_not_empty(margin):
    scores = np.asarray([[0, np.inf], [np.inf, 0], [0, 1.0]])
    bars = mml.evaluate(scores, np.zeros(3, int), margin=margin).bars()
    assert sum(count for _, _, count in bars) == 3
    assert all(start < stop for start, stop, _ in bars)


@pytest.mark.skipif(cpu.native is None, reason="no CPU kernels")
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("n_classes", [1, 2, 6, 90])
def test_counts_are_the_same_without_compiled_kernels(dtype, n_classes, monkeypatch):
    rng = np.random.default_rng(3)
    scores = rng.integers(-3, 4, (400, n_classes)).astype(dtype)
    scores[rng.random(scores.shape) < 0.02] = np.nan
    scores[::9][rng.random(scores[::9].shape) < 0.3] = np.inf
    target, weights = rng.integers(0, n_classes, 400), rng.random(400)
    loss = Loss(2.0, -0.5, rng.random(n_classes), "generic")
    states = []
    for native in (cpu.native, None):
        monkeypatch.setattr(cpu, "native", native)
        states.append(counted(scores, target, weights, loss))
    assert json.dumps(states[0].state()) == json.dumps(states[1].state())
