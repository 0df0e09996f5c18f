"""The report, the comparison, the progress bar, and where things are written."""

import json
import math
import os
import re
import stat
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation import errors, report
from mml_arrayapi.evaluation.journal import write_whole
from mml_arrayapi.evaluation.report import to_html

N, C = 700, 6


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text, self.scripts = [], [], "", ""
        self.source = text
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        if self.lasttag == "script":
            self.scripts += data
        self.text += data

    @property
    def data(self):
        """What the table's script shows."""
        return json.loads(re.search(r"const DATA = (\[.*?\]), PAGE", self.scripts, re.DOTALL)[1])


def test_the_report_is_one_page_that_loads_nothing(arrays, files, wanted, command):
    os.rename("x.npy", "<x>.npy")
    names = [f"<class {c}>" for c in "abcdef"]
    with open("names.json", "w") as file:
        json.dump(names, file)
    assert command("<x>.npy", "y.npy", "--report", "r.html", "--class-names", "names.json") == 0
    with open("r.html", encoding="utf-8") as file:
        text = file.read()
    page = Page(text)
    assert [link for link in page.links if not link.startswith("#")] == []
    assert "http" not in text
    assert "url(" not in text.replace("url(#", "")
    assert page.tags.count("svg") == text.count('<svg role="img" aria-label="') == 2
    ids = re.findall(r'<[^>]*\bid="([^"]*)"', text)
    assert len(set(ids)) == len(ids)
    used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text)
    assert {a or b for a, b in used} <= set(ids)
    assert "prefers-color-scheme: dark" in text
    assert "var(--ink)" in text[text.index("<svg") :]
    assert "Multi-class hinge loss of <x>.npy" in page.text
    assert "<x>.npy rows 0 to 699 with y.npy rows 0 to 699" in page.text
    assert "mml-arrayapi" in page.text
    assert repr(wanted.loss) in page.text
    assert f"{100 * wanted.accuracy:.3f} %" in page.text
    worst = wanted.worst[0]
    assert f"{names[worst.target]}: {worst.score:.6g}" in page.text
    target, other, count = wanted.confusions[0]
    assert re.search(rf"{names[target]}\s*{names[other]}\s*{count}\s", page.text)
    assert [row[0] for row in page.data] == names
    assert [row[2] for row in page.data] == [one.loss for one in wanted.classes]


@pytest.mark.parametrize("n_classes", [1000, 100_000])
def test_many_classes_stay_readable(n_classes):
    rng = np.random.default_rng(0)
    target = rng.integers(0, n_classes, 300)
    scores = rng.standard_normal((300, n_classes), dtype=np.float32)
    scores[7] = np.nan
    figures = mml.evaluate(scores, target)
    text = to_html(figures, "x")
    page = Page(text)
    assert len(text) < 400_000
    assert len(page.data) == len(set(target.tolist()))
    assert page.data[0][2] == "NaN"  # first what has no number
    assert page.tags.count("tr") < 260
    assert "Not drawn: 1 class without a finite mean loss; see the table." in page.text
    assert "1 of 300: scores (1)" in " ".join(page.text.split())


@pytest.mark.parametrize(
    "figures",
    [
        lambda: mml.evaluate(np.zeros((0, 3)), np.zeros(0, int)),
        lambda: mml.evaluate(np.full((4, 2), np.nan), np.zeros(4, int), margin=0),
        lambda: mml.evaluate(np.full((4, 2), np.inf), np.zeros(4, int)),
        lambda: mml.evaluate(np.eye(200), np.arange(200), weight=-np.ones(200), margin=-3),
        lambda: mml.evaluate(np.eye(1500) * 1e30, np.arange(1500)),
        lambda: mml.evaluate(np.eye(3) * 1e308, np.arange(3), p=1.01),
        lambda: mml.evaluate(np.eye(3) * 1e-300, np.arange(3), margin=1e-300),
        lambda: mml.evaluate(np.zeros((3, 1)), np.zeros(3, int)),
        lambda: mml.evaluate(np.zeros((3, 4)), np.zeros(3, int), ignore_index=0),
    ],
    ids=["empty", "nan", "inf", "negative", "many", "huge", "tiny", "one", "ignored"],
)
def test_odd_evaluations_have_a_report_too(figures):
    page = Page(to_html(figures(), "x"))
    assert "Multi-class hinge loss" in page.text
    assert ("another class wins (red)" in page.text) == ('aria-label="Histogram' in page.source)
    assert " 1 classes" not in page.text


@pytest.mark.parametrize("scores", [[[np.nan, 1], [2, 1]], [[np.inf, np.inf], [2, 1]], []])
def test_no_confusions_are_no_praise(scores):
    scores = np.asarray(scores, float).reshape(-1, 2)
    page = to_html(mml.evaluate(scores, np.zeros(len(scores), int)), "")
    assert "each target has the highest score" not in page
    assert "Samples with a NaN among their scores" in page
    assert "each target has the highest" in to_html(mml.evaluate(np.eye(2), np.arange(2)), "")


def test_long_names_of_classes_can_be_told_apart():
    names = [f"a class of plants {kind}" for kind in ("with leaves", "with needles", "of the sea")]
    figures = mml.evaluate(np.eye(3), np.arange(3), class_names=names)
    source = to_html(figures, "x")
    for shown in ("\u2026ts with leaves", "\u2026ts with needles", "\u2026ts of the sea"):
        assert shown in source
    worst = source[source.index("<h2>Worst samples") :]
    assert f'<bdi title="{names[0]}">\u2026lass of plants with leaves</bdi>: 1' in worst


@pytest.mark.parametrize(
    ("names", "most", "short"),
    [
        (["ab", "abc"], 3, ["ab", "abc"]),
        (["a class of x", "a class of yz"], 6, ["\u2026of x", "\u2026of yz"]),
        (["x of many words", "y of many words"], 7, ["x o\u2026rds", "y o\u2026rds"]),
        (["abcdefgh 1 of ten", "abcdefgh 2 of ten"], 9, ["\u20261 of ten", "\u20262 of ten"]),
        (["one long name"], 7, ["one\u2026ame"]),
        (["", "a longer name"], 4, ["", "a \u2026e"]),
    ],
)
def test_short_names(names, most, short):
    n = len(names)
    figures = mml.evaluate(np.eye(n), np.arange(n), class_names=names)
    made = figures.short_names([*range(n), 0], most)
    assert made == dict(enumerate(short))
    assert all(len(name) <= most for name in made.values())


def test_comparison(arrays, files, command, fails, capsys):
    np.save("old.npy", arrays[0] * np.float32(0.5))
    assert command("old.npy", "y.npy", "--json") == 0
    with open("old.json", "w") as file:
        file.write(capsys.readouterr().out)
    before = mml.evaluate("old.npy", "y.npy")
    assert command("x.npy", "y.npy", "--compare", "old.json", "--report", "r.html") == 0
    out = capsys.readouterr().out
    assert re.search(rf"\nloss +\S+ +{before.loss:.6g} +[+-]0\.\d+\n", out)
    with open("r.html") as file:
        page = Page(file.read())
    assert f"{before.loss:.6g} before" in page.text
    assert [row[5] for row in page.data] == [one.loss for one in before.classes]
    other = mml.evaluate(np.eye(7), np.arange(7)).to_json()
    with open("other.json", "w") as file:
        json.dump(other, file)
    assert command("x.npy", "y.npy", "--compare", "other.json", "--report", "r.html") == 0
    assert re.search(r"\nclasses +6 +7\n", capsys.readouterr().out)
    with open("r.html") as file:
        page = Page(file.read())
    assert "7 in 7 classes before" in page.text
    assert "The figures before are of other classes" in page.text
    assert {len(row) for row in page.data} == {5}
    told = before.to_json()
    odd = [{k: told[k] for k in told if k != "samples"}]
    wrong = {"samples": ("700", True, -1), "n_classes": (-1, 6.0), "loss": (True, "0.5", None)}
    wrong |= {"class_names": (["a"], "abcde", [1] * 6)}
    for name, values in (
        wrong | {"accuracy": (1.5, "-Infinity"), "inside_margin": (-0.1,)}
    ).items():
        odd += [{**told, name: value} for value in values]
    odd.append({**told, "classes": {"0": {**told["classes"]["0"], "accuracy": 2}}})
    odd += [{**told, "classes": {c: told["classes"]["0"]}} for c in ("a", "-1", "6", "01", " 2")]
    for text in ("{}", "[]", "no", '{"schema": 1}', "[" * 10**5, *map(json.dumps, odd)):
        with open("bad.json", "w") as file:
            file.write(text)
        assert "bad.json: holds no figures to compare with" in fails(
            "x.npy", "y.npy", "--compare", "bad.json"
        )
    for name, value in (("reduction", "sum"), ("p", 2), ("margin", 0.5)):
        line = fails("x.npy", "y.npy", "--compare", "old.json", f"--{name}", value)
        assert f"old.json: was made with {name} {told[name]}, but this run has {value}" in line
        assert f"; compare runs with the same {name}" in line
    np.save("w.npy", np.ones(len(arrays[0])))
    for option, value, message in (
        ("--weight", "1,2,1,1,1,1", "weight None, but this run has [1.0, 2.0, 1.0, 1.0, 1.0, 1.0]"),
        ("--ignore-index", 0, "ignore_index None, but this run has 0"),
        ("--sample-weight", "w.npy", "weighted False, but this run has True"),
    ):
        line = fails("x.npy", "y.npy", "--compare", "old.json", option, value)
        assert f"old.json: was made with {message}; compare runs with the same " in line
    assert "--compare: JSON has no room for it; give --report, or no --json" in fails(
        "x.npy", "y.npy", "--compare", "old.json", "--json"
    )
    with open("bom.json", "w", encoding="utf-8-sig") as file:
        json.dump(told, file)
    assert command("x.npy", "y.npy", "--compare", "bom.json") == 0


def test_comparison_of_classes_by_name(files, command, capsys):
    scores, target = np.asarray([[2.0, 0, 0], [0, 2.0, 0], [0, 2.0, 0]]), np.asarray([0, 1, 0])
    swapped = [1, 0, 2]

    def compare(before_names, names):
        """Return the losses before that the page shows, by name; None where it shows none."""
        before = mml.evaluate(scores, target, class_names=before_names)
        now = mml.evaluate(scores[:, swapped], np.asarray(swapped)[target], class_names=names)
        page = Page(to_html(now, "x", before.to_json()))
        assert ("The figures before are of other classes" in page.text) == (len(page.data[0]) < 6)
        return {row[0]: row[5:] for row in page.data}

    first = mml.evaluate(scores, target).classes
    assert compare(["cat", "dog", "fox"], ["dog", "cat", "fox"]) == {
        "dog": [first[1].loss],
        "cat": [first[0].loss],
    }
    # Names without an order in common, or none: by number, as far as the numbers can be the same.
    assert compare(["cat", "dog", "fox"], ["ape", "cat", "fox"])["ape"] == [None]
    assert compare(["cat", "cat", "fox"], ["cat", "fox", "cat"])["cat"] == []
    assert compare(["cat", "cat", "fox"], ["cat", "cat", "fox"])["cat"] != []
    assert compare(None, ["dog", "cat", "fox"])["dog"] == [first[0].loss]


def test_comparison_of_sums_over_other_samples(files, command, capsys):
    assert command("x.npy", "y.npy", "--reduction", "sum", "--json") == 0
    with open("old.json", "w") as file:
        file.write(capsys.readouterr().out)
    for name in ("x", "y"):
        np.save(f"few-{name}.npy", np.load(f"{name}.npy")[:300])
    options = ("--reduction", "sum", "--compare", "old.json", "--report", "r.html")
    assert command("few-x.npy", "few-y.npy", *options) == 0
    assert re.search(r"\nsamples +300 +700\n", capsys.readouterr().out)
    with open("r.html") as file:
        source = file.read()
    card = source[source.index("loss (sum)") : source.index("accuracy: target has")]
    assert " before" in card
    assert "better" not in card
    assert "worse" not in card


def test_class_names(arrays, files, fails, command, capsys):
    with open("names", "w") as file:
        file.write("\n".join("abcdef") + "\n")
    assert command("x.npy", "y.npy", "--class-names", "names") == 0
    assert re.search(r"\n +a +\d+", capsys.readouterr().out)
    with open("names", "a") as file:
        file.write("g\n")
    for path, message in (
        ("names", "names: has 7 names, but the scores have 6 classes"),
        ("none", "none: the names of the classes cannot be read ("),
        ("x.npy", "x.npy: the names of the classes cannot be read ("),
    ):
        assert message in fails("x.npy", "y.npy", "--class-names", path)
    with pytest.raises(mml.InputError, match="class_names: must be a list of names, one per class"):
        mml.evaluate(*arrays, class_names=[1, 2])


def test_any_names_of_classes(files, command, capsys):
    names = ("a", "\u2028b\f", "", "$^^$ \u4e2d \U0001f600", "c\x85", "e")
    texts = {"names": "\r\n".join(names) + "\n", "names.JSON": json.dumps(names)}
    for path, text in texts.items():
        with open(path, "w", encoding="utf-8-sig", newline="") as file:
            file.write(text)
        assert mml.evaluate("x.npy", "y.npy", class_names=path).class_names == names
        assert command("x.npy", "y.npy", "--class-names", path, "--report", "r.html") == 0
    with open("r.html", encoding="utf-8") as file:
        assert "$^^$ \u4e2d" in Page(file.read()).text
    assert capsys.readouterr().err == ""
    surrogate = mml.evaluate("x.npy", "y.npy", class_names=[*names[1:], "\udc80"])
    assert surrogate.name(5) == "\\udc80"


# Where the report is written.


def test_a_report_that_cannot_be_written_is_found_before_the_work(files, fails, monkeypatch):
    os.mkdir("folder")
    monkeypatch.setattr(mml.evaluation.command, "evaluate", lambda *a, **k: pytest.fail("worked"))
    for path, message in (
        ("no/r.html", "no/r.html: cannot be written (No such file or directory); free some space"),
        ("folder", "folder: cannot be written (it is a folder)"),
    ):
        assert message in fails("x.npy", "y.npy", "--report", path)
    assert sorted(os.listdir()) == ["folder", "x.npy", "y.npy"]


@pytest.mark.parametrize(
    "report", ["x.npy", "y.npy", "w.npy", "c.npz", "names", "old.json", "ck/journal.jsonl", "link"]
)
def test_a_report_is_written_over_nothing_that_is_used(files, fails, monkeypatch, report):
    monkeypatch.setattr(mml.evaluation.command, "evaluate", lambda *a, **k: pytest.fail("worked"))
    with open("old.json", "w") as file:
        json.dump(mml.evaluate("x.npy", "y.npy").to_json(), file)
    for name in ("w.npy", "names", "c.npz"):
        with open(name, "w") as file:
            file.write("text")
    os.mkdir("ck")
    os.symlink("x.npy", "link")
    options = ("--sample-weight", "w.npy", "--weight", "c.npz#w", "--class-names", "names")
    options += ("--compare", "old.json", "--checkpoint", "ck")
    line = fails("x*.npy", "y.npy", *options, "--report", report)
    assert f"--report {report}: would overwrite " in line
    options = (*options[:-1], f"file://{os.getcwd()}/ck")
    assert fails("x*.npy", "y.npy", *options, "--report", report) == line
    assert ", which this run uses; give another file" in line


def test_a_report_within_a_store_that_is_read(arrays, files, fails):
    zarr = pytest.importorskip("zarr")
    zarr.save("x.zarr", arrays[0])
    line = fails("x.zarr", "y.npy", "--report", "x.zarr/zarr.json")
    assert "--report x.zarr/zarr.json: would overwrite " in line
    line = fails("x.npy", "y.npy", "--checkpoint", "out/ck", "--report", "out")
    assert "--report out: would overwrite " in line


def test_a_missing_library_of_the_report_is_found_before_the_work(files, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails("x.npy", "y.npy", "--report", "r.html")
    assert (
        "--report: needs matplotlib, which cannot be imported; pip install 'mml_arrayapi[ev" in line
    )


@pytest.mark.parametrize(
    ("setting", "value"), [("text.usetex", True), ("font.family", "no such font")]
)
def test_settings_of_the_users_plots_do_not_count(files, command, setting, value):
    import matplotlib

    assert command("x.npy", "y.npy", "--report", "plain.html") == 0
    with matplotlib.rc_context({setting: value}):
        assert command("x.npy", "y.npy", "--report", "other.html") == 0
    pages = [Path(name).read_text(encoding="utf-8") for name in ("plain.html", "other.html")]
    plain, other = (page[page.index("<svg") : page.rindex("</svg>")] for page in pages)
    assert plain == other


def test_a_library_of_the_report_that_does_not_work(monkeypatch):
    def broken(module):
        raise ValueError(f"{module} finds no backend")

    monkeypatch.setattr(errors, "import_module", broken)
    with pytest.raises(mml.InputError, match=r"needs jinja2, .* \(jinja2 finds no backend\); mend"):
        report.check_libraries()


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="there is no /dev/stdout")
@pytest.mark.parametrize("to", ["file", "pipe"])
def test_a_report_to_the_standard_output_follows_the_figures(files, to):
    program = [sys.executable, "-m", "mml_arrayapi", "evaluate", "x.npy", "y.npy"]
    program += ["--report", "/dev/stdout"]
    with open("out.txt", "w") as file:
        out = subprocess.run(program, stdout=file if to == "file" else subprocess.PIPE, check=True)
    text = Path("out.txt").read_text(encoding="utf-8") if to == "file" else out.stdout.decode()
    assert text.startswith("samples")
    assert text.rstrip().endswith("</html>")
    assert text.count("<html") == 1


def test_what_is_beyond_the_plot_is_counted(rng):
    scores = rng.standard_cauchy((200_000, 4))
    figures = mml.evaluate(scores, rng.integers(0, 4, 200_000))
    bars = figures.bars()
    width = min(stop - start for start, stop, _ in bars)
    wider = [n for start, stop, n in bars if stop - start > 1.001 * width]
    assert len(wider) > 7
    text = to_html(figures, "")
    told = re.search("Beyond the plot: (.*?)[.] ?<", text.replace("\n", " ")).group(1)
    numbers = [int(part.split()[0].replace(",", "")) for part in told.split("; ")]
    assert sum(numbers) == sum(wider)
    assert f"{len(wider) - 6} range" in told


@pytest.mark.parametrize("largest", [1e-307, 1e-300, 1e280, 1e307, 1.7e308])
def test_the_histogram_of_leads_of_any_size(largest):
    scores = np.zeros((1000, 2))
    scores[:, 0] = np.linspace(-1, 1, 1000) * largest
    figures = mml.evaluate(scores, np.zeros(1000, int))
    bars = figures.bars()
    width = bars[0][1] - bars[0][0]
    assert 32 < 2 * (largest / width) <= 64
    for start, stop, count in bars:
        assert stop - start == width
        assert count == np.sum((scores[:, 0] >= start) & (scores[:, 0] < stop))
    assert sum(count for _, _, count in bars) == 1000
    assert 'aria-label="Histogram' in (text := to_html(figures, ""))
    assert "Beyond the plot" not in text


@pytest.mark.parametrize("margin", [1.0, 0.0, -2.5, 1e300, 1e-310, 3e-5])
@pytest.mark.parametrize("scale", [1, 1e-310, 1e150, 1e307])
def test_bars_never_overlap(margin, scale):
    scores = np.random.default_rng(0).standard_normal((50, 3)) * scale
    scores[:4] = [
        [np.inf, 0, 0], [-np.inf, 0, 0], [1.79e308, -1e307, 0], [-1.7976e308, 0, 0]
    ]  # fmt: skip
    for rows in (1, 2, 3, 4, 50):
        figures = mml.evaluate(scores[:rows], np.zeros(rows, int), margin=margin)
        bars = figures.bars()
        assert all(start < stop for start, stop, _ in bars)
        assert all(one[1] <= other[0] for one, other in pairwise(bars))
        assert sum(count for *_, count in bars) + figures.undefined == rows


def test_leads_near_the_largest_number():
    scores = np.asarray([[0.0, 0], [5e307, 0], [1.2e308, 0], [1.79e308, 0], [np.inf, 0]])
    scores = np.concatenate([np.zeros((9999, 2)), scores])
    wide = [bar for bar in mml.evaluate(scores, np.zeros(10004, int)).bars() if bar[0] > 0]
    assert wide == [(2.0**1022, 2.0**1023, 1), (2.0**1023, math.inf, 3)]


def test_tiny_losses_are_drawn():
    scores = np.asarray([[1e-310, 0, 3e-310], [2e-310, 0, 0]])
    text = to_html(mml.evaluate(scores, np.asarray([0, 1]), margin=0.0), "")
    assert "mean loss x inf" not in text
    assert "mean loss" in text


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_the_umask(files, mask):
    before = os.umask(mask)
    try:
        write_whole("r.html", "text")
        assert stat.S_IMODE(os.stat("r.html").st_mode) == 0o666 & ~mask
        os.chmod("r.html", 0o640)
        write_whole("r.html", "more")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("r.html").st_mode) == 0o640


def test_a_symbolic_link_stays_one(files, command):
    def report():
        assert command("x.npy", "y.npy", "--report", "r.html") == 0

    os.mkdir("elsewhere")
    os.symlink("elsewhere/r.html", "r.html")
    for write in (lambda: write_whole("r.html", "before"), report):
        write()
        assert os.path.islink("r.html")
        assert os.listdir("elsewhere") == ["r.html"]
    write_whole(os.devnull, "text")


def test_names_that_are_not_utf8(arrays, files, command, capsysbinary):
    name = os.fsdecode(b"caf\xe9.npy")
    os.rename("x.npy", name)
    assert command(name, "y.npy", "--report", "r.html", "--checkpoint", "ck") == 0
    assert b"caf\\udce9.npy rows" in capsysbinary.readouterr().out
    with open("r.html", encoding="utf-8") as file:
        assert "caf\\udce9.npy" in file.read()
    assert command("caf*.npy", "y.npy", "--json", "--checkpoint", "ck") == 0
    assert (
        json.loads(capsysbinary.readouterr().out)["pairing"][0]["scores"]["name"]
        == "caf\\udce9.npy"
    )


def test_samples_that_are_nan_in_a_file_whose_name_is_not_utf8(arrays, files, command):
    name, scores = os.fsdecode(b"caf\xe9.npy"), arrays[0].copy()
    scores[3, 1] = np.nan
    np.save(name, scores)
    assert command(name, "y.npy", "--report", "r.html") == 0
    assert "caf\\udce9.npy" in Path("r.html").read_text("utf-8")


def test_what_was_begun_to_be_written_is_removed(files, monkeypatch):
    with pytest.raises(mml.InputError, match=r"r.html: cannot be written \('utf-8' codec can't"):
        write_whole("r.html", "\udcff")
    monkeypatch.setattr(os, "fsync", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_whole("r.html", "text")
    assert sorted(os.listdir()) == ["x.npy", "y.npy"]


# The progress bar.


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_progress_bar_fits_the_terminal(files, command, capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    assert command("x.npy", "y.npy", "--chunk-size", 100) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "700 of 700 rows" in shown
    assert max(map(len, re.split(r"[\r\n]", shown))) <= columns


def test_no_bar_in_a_pipe(files, command, capsys):
    assert command("x.npy", "y.npy") == 0
    assert capsys.readouterr().err == ""
    mml.evaluate("x.npy", "y.npy", progress=True)
    assert capsys.readouterr().err == ""


def test_the_bar_of_a_notebook_is_that_of_ipython(files, wanted, monkeypatch):
    from types import ModuleType

    shown = []

    class ProgressBar:
        """As IPython has it."""

        def __init__(self, total):
            self.total = total

        def display(self):
            shown.append("display")

        def __setattr__(self, name, value):
            shown.append((name, value))

    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: type("Shell", (), {"kernel": None})()
    display.ProgressBar = ProgressBar
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    assert mml.evaluate("x.npy", "y.npy", progress=True, chunk_size=350, workers=1) == wanted
    assert shown == [("total", N), "display", ("progress", 350), ("progress", N)]


# A bare installation.


BARE = """
import sys
for name in {missing}:
    sys.modules[name] = None
from mml_arrayapi.cli import main
sys.exit(main(["evaluate", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        (["numpy"], ["x.npy", "y.npy"], "evaluate: needs numpy"),
        (["fsspec", "fsspec.core"], ["s3://b/x.npy", "y.npy"], "s3://b/x.npy: needs fsspec"),
        (["pyarrow", "pyarrow.dataset"], ["x.parquet", "y.npy"], "x.parquet: needs pyarrow"),
        (["h5py"], ["x.h5", "y.npy"], "x.h5: needs h5py"),
        (["zarr"], ["x.zarr.zip", "y.npy"], "x.zarr.zip: needs zarr"),
        (["distributed"], ["x.npy", "y.npy", "--scheduler", "processes"], "processes: needs dist"),
    ],
    ids=lambda v: str(v[0]) if isinstance(v, list) else "",
)
def test_what_is_missing_is_one_sentence(files, monkeypatch, fails, missing, arguments, message):
    for name in ("x.parquet", "x.h5", "x.zarr.zip"):
        with open(name, "w") as file:
            file.write("text")
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    line = fails(*arguments)
    assert message in line
    assert "pip install 'mml_arrayapi[evaluate]'" in line


def test_numpy_alone_suffices_for_npy(files, wanted):
    missing = ["fsspec", "fsspec.core", "dask", "distributed", "rich", "jinja2", "pyarrow", "zarr"]
    code = BARE.format(missing=missing)
    arguments = [sys.executable, "-c", code, "x.npy", "y.npy"]
    made = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert repr(wanted.loss) in made.stdout


def test_classes_sort_by_infinite_losses(files):
    scores = np.zeros((300, 300))
    scores[0, 1], scores[1, 0], scores[2, 5] = math.inf, -math.inf, math.nan
    page = to_html(mml.evaluate(scores, np.arange(300)), "")
    rows = re.search(r"const DATA = (\[.*?\]), PAGE", page, re.DOTALL)
    losses = [row[2] for row in json.loads(rows[1])]
    assert losses[:2] == ["NaN", "Infinity"]
    assert losses[2:] == sorted(losses[2:], reverse=True)


def test_ties_are_no_wins(files):
    figures = mml.evaluate(np.zeros((100, 4)), np.arange(100) % 4)
    assert figures.accuracy == 0
    assert figures.bars() == [(0.0, 1.0, 100)]
    assert "in a tie, another class wins (red)" in " ".join(to_html(figures, "").split())


def test_names_that_would_command_a_terminal(files):
    names = ["a\nb", "\x1b[31mred", "c\u2028d"]
    figures = mml.evaluate(np.eye(3), np.arange(3), class_names=names)
    assert "a\\nb" in (text := str(figures))
    assert "\\x1b[31mred" in text
    assert "c\\u2028d" in text
    assert figures.class_names == tuple(names)


def test_nothing_has_no_rows(files):
    text = str(mml.evaluate(np.zeros((0, 3)), np.zeros(0, int)))
    assert "no rows" in text or "rows 0 to -1" not in text
