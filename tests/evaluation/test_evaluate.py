"""Evaluation of files: every format, any cut, bad input, resuming, the report."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from fractions import Fraction
from html.parser import HTMLParser

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation.command import add_parser
from mml_arrayapi.evaluation.journal import NAME
from mml_arrayapi.loss import sample_losses

N, C = 700, 6


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((N, C)).astype(np.float32)
    target = rng.integers(0, C, N)
    scores[np.arange(N), target] += 1
    return scores, target


@pytest.fixture
def files(arrays, tmp_path, monkeypatch):
    """The scores and targets as .npy files in the working directory."""
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", arrays[0])
    np.save("y.npy", arrays[1])
    return tmp_path


@pytest.fixture(scope="module")
def wanted(arrays):
    return mml.evaluate(*arrays)


def command(*arguments):
    """Run ``evaluate`` as the command line does; return the exit code."""
    parser = ArgumentParser()
    add_parser(parser.add_subparsers())
    parsed = parser.parse_args(["evaluate", *map(str, arguments)])
    return parsed.run(parsed)


def fails(capsys, *arguments, code=2):
    """Run a command that must fail with one line; return the line."""
    assert command(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("mml-arrayapi evaluate: error: ")
    return captured.err


def test_the_figures(arrays):
    scores, target = arrays
    weight = np.linspace(0.5, 2, C)
    figures = mml.evaluate(scores, target, p=2, margin=0.5, weight=weight, reduction="sum")
    losses = sample_losses(scores, target, p=2, margin=0.5, weight=weight, check_target="raise")
    assert figures.loss == math.fsum(losses)
    order = np.argsort(scores, axis=1)
    assert figures.accuracy == np.mean(order[:, -1] == target)
    assert figures.inside_margin == np.mean(losses > 0)
    assert figures.samples == N
    for c, one in enumerate(figures.classes):
        mine = target == c
        assert one.count == mine.sum()
        assert one.loss == float(sum(map(Fraction, losses[mine].tolist())) / int(mine.sum()))
        assert one.accuracy == np.mean(order[mine, -1] == c)
        assert one.inside_margin == np.mean(losses[mine] > 0)


def test_the_histogram(arrays):
    scores, target = arrays
    figures = mml.evaluate(scores, target, margin=0.5)
    own = scores[np.arange(N), target]
    others = np.where(np.arange(C) == target[:, None], -np.inf, scores).max(axis=1)
    assert sum(count for _, _, count in figures.bars()) == N
    for start, stop, count in figures.bars():
        lead = (own - others).astype(np.float64)
        assert count == np.sum((lead >= start) & (lead < stop))


def test_ties_nan_and_infinities():
    scores = np.zeros((4, 3))
    scores[1, 2] = np.nan
    scores[2] = [np.inf, 0, np.inf]
    scores[3, 0] = 1e9
    figures = mml.evaluate(scores, np.zeros(4, int))
    assert math.isnan(figures.loss)
    assert figures.accuracy == 0.25  # a tie is no success, nor is NaN
    assert figures.inside_margin == 0.75
    assert figures.undefined == 2
    assert figures.to_json()["loss"] == "NaN"
    assert json.loads(json.dumps(figures.to_json()), parse_constant=pytest.fail)


def test_no_samples_and_one_class():
    empty = mml.evaluate(np.zeros((0, 3)), np.zeros(0, int))
    assert math.isnan(empty.loss)
    assert math.isnan(empty.accuracy)
    assert "nan" in str(empty)
    assert mml.evaluate(np.zeros((0, 3)), np.zeros(0, int), reduction="sum").loss == 0
    single = mml.evaluate(np.zeros((5, 1)), np.zeros(5, int))
    assert (single.loss, single.accuracy, single.inside_margin) == (0, 1, 0)


@pytest.mark.parametrize("backend", ["generic", "numpy-cpu"])
def test_any_cut_gives_the_same_bits(arrays, backend):
    if not next(b for b in mml.list_backends() if b.name == backend).available:
        pytest.skip(f"{backend} is not there")
    scores, target = arrays
    figures = {
        str(mml.evaluate(x, target, chunk_size=n, workers=w, backend=backend).to_json())
        for x in (scores, np.asfortranarray(scores))
        for n, w in ((1, 2), (7, 3), (N, 1), (N - 1, 2), (None, None))
    }
    assert len(figures) == 1


def test_float16_scores():
    scores = np.asarray([[0, 300, 300], [0, 0, 0]], dtype=np.float16)
    assert mml.evaluate(scores, np.zeros(2, int), p=2).loss == pytest.approx(
        (2 * 301**2 / 3 + 2 / 3) / 2, rel=1e-6
    )


def test_dask_arrays(arrays, wanted):
    da = pytest.importorskip("dask.array")
    scores, target = (da.from_array(a, chunks=100) for a in arrays)
    assert mml.evaluate(scores, target, chunk_size=150) == wanted


def test_axes_and_batches(arrays, wanted):
    scores, target = arrays
    assert mml.evaluate(scores.T, target, axis=0) == wanted
    figures = mml.evaluate(
        np.moveaxis(scores.reshape(70, 10, C), 2, 1), target.reshape(70, 10), axis=1, chunk_size=9
    )
    assert figures == wanted
    bad = target.reshape(70, 10).copy()
    bad[33, 4] = C
    with pytest.raises(mml.InvalidTargetError, match=r"target\[33, 4\] is 6"):
        mml.evaluate(scores.reshape(70, 10, C), bad, chunk_size=9)


# Formats.


def zarr_store(path, array, version, rows):
    zarr = pytest.importorskip("zarr")
    chunks = (rows, *array.shape[1:])
    store = zarr.create_array(
        store=path, shape=array.shape, chunks=chunks, dtype=array.dtype, zarr_format=version
    )
    store[...] = array


def parquet(path, rows=150, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=rows)


@pytest.mark.parametrize("size", [1, 130, None])
def test_npz_and_patterns(arrays, files, wanted, size):
    scores, target = arrays
    np.savez("both.npz", logits=scores, labels=target)
    np.savez("one.npz", scores)
    for i in range(7):
        np.save(f"part-{i}.npy", scores[i * 100 : i * 100 + 100])
        np.save(f"label-{i}.npy", target[i * 100 : i * 100 + 100])
    for logits, targets in (
        ("both.npz#logits", "both.npz#labels"),
        ("one.npz", "y.npy"),
        ("part-*.npy", "y.npy"),
        ("part-*.npy", "label-?.npy"),
        ("x.npy", "label-*.npy"),
        (["x.npy"], files / "y.npy"),
    ):
        assert mml.evaluate(logits, targets, chunk_size=size) == wanted


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_zarr(arrays, files, wanted, version):
    zarr_store("x.zarr", arrays[0], version, 90)
    zarr_store("y.zarr", arrays[1], version, 110)
    for size in (10, 100, None):
        assert mml.evaluate("x.zarr", "y.zarr", chunk_size=size) == wanted
    zarr_store("group.zarr/logits", arrays[0], version, 90)
    import zarr

    zarr.open_group("group.zarr", mode="a", zarr_format=version)
    assert mml.evaluate("group.zarr", "y.zarr") == wanted
    assert mml.evaluate("group.zarr#logits", "y.zarr") == wanted


def test_parquet(arrays, files, wanted):
    pa = pytest.importorskip("pyarrow")
    scores, target = arrays
    parquet("list.parquet", logits=list(scores), label=target)
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), C)
    parquet("fixed.parquet", logits=fixed, label=target, id=np.arange(N))
    parquet("columns.parquet", **{f"c{i}": scores[:, i] for i in range(C)}, label=target)
    os.mkdir("folder")
    for i in range(2):
        half = slice(350 * i, 350 * i + 350)
        parquet(f"folder/part.{i}.parquet", logits=list(scores[half]), label=target[half])
    names = ",".join(f"c{i}" for i in range(C))
    for size in (10, 200, None):
        for logits, targets in (
            ("list.parquet", "list.parquet"),
            ("fixed.parquet", "fixed.parquet#label"),
            ("columns.parquet", "columns.parquet"),
            (f"columns.parquet#{names}", "y.npy"),
            ("folder", "folder"),
        ):
            assert mml.evaluate(logits, targets, chunk_size=size) == wanted


# The command.


PAIR = "x.npy rows 0 to 699 with y.npy rows 0 to 699"


def same_json(text, wanted):
    """Compare figures printed as JSON with those of arrays: all but the files' names."""
    told, wanted = json.loads(text, parse_constant=pytest.fail), wanted.to_json()
    for figures in (told, wanted):
        for name in ("pairing", "worst", "nan_samples", "nan_by_file"):
            figures.pop(name)
    assert told == wanted


def test_table_and_json(files, wanted, capsys):
    assert command("x.npy", "y.npy") == 0
    table = capsys.readouterr().out
    assert f"loss           {wanted.loss!r} (mean; p 1, margin 1)" in table
    assert f"accuracy       {100 * wanted.accuracy:.3f} %" in table
    assert f"read           {PAIR}\n" in table
    assert len(table.splitlines()) == 8 + C
    assert command("x.npy", "y.npy", "--json") == 0
    text = capsys.readouterr().out
    same_json(text, wanted)
    told = json.loads(text)
    assert told["schema"] == 2
    assert told["pairing"] == [
        {
            "rows": [0, N],
            "scores": {"name": "x.npy", "rows": [0, N]},
            "targets": [{"name": "y.npy", "rows": [0, N]}],
        }
    ]


def test_options_reach_the_figures(arrays, files, capsys):
    np.save("w.npy", np.arange(1.0, 1 + C))
    options = ("--p", 2, "--margin", 0.25, "--reduction", "sum", "--json", "--chunk-size", 13)
    for weight in ("w.npy", "1,2,3,4,5,6"):
        assert command("x.npy", "y.npy", *options, "--weight", weight, "--workers", 1) == 0
        keywords = {"p": 2, "margin": 0.25, "reduction": "sum", "weight": np.arange(1.0, 1 + C)}
        figures = mml.evaluate(*arrays, **keywords)
        same_json(capsys.readouterr().out, figures)


def test_processes(files, wanted):
    assert mml.evaluate("x.npy", "y.npy", chunk_size=400, scheduler="processes") == wanted


def test_many_classes_are_shortened():
    rng = np.random.default_rng(0)
    figures = mml.evaluate(rng.standard_normal((300, 100)), rng.integers(0, 50, 300))
    text = str(figures)
    assert "the 20 classes of highest mean loss, of 100" in text
    assert len(text.splitlines()) == 8 + 20 + 1
    assert len(figures.to_json()["classes"]) <= 50


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_progress_bar_fits_the_terminal(files, capsys, monkeypatch, columns):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    assert command("x.npy", "y.npy", "--chunk-size", 100) == 0
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    assert "700 of 700 rows" in shown
    assert max(map(len, re.split(r"[\r\n]", shown))) <= columns


def test_no_bar_in_a_pipe(files, capsys):
    assert command("x.npy", "y.npy") == 0
    assert capsys.readouterr().err == ""


# Bad input.


def damage(path, start, data):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


def bad_inputs():
    """Arguments, and what the message must say; files are made by the test."""
    return [
        (("nowhere.npy", "y.npy"), "nowhere.npy: there is no such file; check the path"),
        (("no-*.npy", "y.npy"), "no-*.npy: no file matches it; check the path"),
        (("folder", "y.npy"), "folder: the folder is no Zarr store and holds no .parquet files"),
        (("x.txt", "y.npy"), "x.txt: the format is not known; accepted are .npy, .npz, .parquet"),
        (("empty.npy", "y.npy"), "empty.npy: the file is empty; write or copy it again"),
        (("short.npy", "y.npy"), "short.npy: cannot be read (its array of shape (700, 6) and"),
        (("objects.npy", "y.npy"), "objects.npy: cannot be read (it holds Python objects, not"),
        (("pickle.npy", "y.npy"), "pickle.npy: cannot be read ("),
        (("cut.npz", "y.npy"), "cut.npz: cannot be read (File is not a zip file); write or copy"),
        (("both.npz", "y.npy"), "both.npz: holds 2 arrays; name the one with the scores, as in"),
        (("both.npz#c", "y.npy"), "both.npz: has no array 'c'; name the one with the scores"),
        (("y.npy", "y.npy"), "y.npy: scores must be float16, float32 or float64, but are int64"),
        (("x.npy", "x.npy"), "x.npy: targets must be integers, but are float32; convert them"),
        (("flat.npy", "y.npy"), "flat.npy: scores must have shape (N, C), but have shape (5,)"),
        (("none.npy", "y.npy"), "none.npy: scores must have at least one class, but have shape"),
        (
            ("x.npy", "yy.npy"),
            "yy.npy: targets must have shape (N) beside scores of shape (700, 6)",
        ),
        (
            ("x.npy", "few.npy"),
            "few.npy: has 3 targets, but x.npy has 700 samples; give files that",
        ),
        (("x.npy", "few*.npy"), "few1.npy: 2 file(s) have 6 targets, but 1 file(s) from x.npy on"),
        (("x*.npy", "y.npy"), "xx.npy: scores of shape (700, 3) and dtype float32 don't continue"),
        (("x.npy", "bad.npy"), "bad.npy: target[13] is 77, but input has 6 classes: accepted are"),
        (("x.npy", "y.npy", "--axis", 2), "x.npy: scores have 2 axes, but axis is 2"),
        (("x.npy", "y.npy", "--p", 0.5), "p must be a finite real number >= 1, but is 0.5"),
        (("x.npy", "y.npy", "--margin", "inf"), "margin must be a finite real number, but is inf"),
        (("x.npy", "y.npy", "--weight", "1,2"), "weight must have one element per class, shape (6"),
        (("x.npy", "y.npy", "--weight", "w"), "w: there is no such file; check the path"),
        (("x.npy", "y.npy", "--chunk-size", 0), "chunk_size must be positive, but is 0"),
        (("x.npy", "y.npy", "--backend", "no"), "backend: no kernel is named 'no'; known kernels"),
        (("x.npy", "y.npy", "--report", "no/r.html"), "no/r.html: cannot be written (No such file"),
        (("x.npy", "y.npy", "--checkpoint", "x.npy"), "x.npy/journal.jsonl: cannot be written ("),
    ]


@pytest.mark.parametrize(("arguments", "message"), bad_inputs(), ids=lambda v: str(v)[:40])
def test_bad_input_is_one_line_that_says_what_to_do(arrays, files, capsys, arguments, message):
    scores, target = arrays
    os.mkdir("folder")
    open("x.txt", "w").close()
    open("empty.npy", "w").close()
    with open("x.npy", "rb") as whole, open("short.npy", "wb") as short:
        short.write(whole.read(1000))
    np.save("objects.npy", np.asarray([None, {}], dtype=object), allow_pickle=True)
    with open("pickle.npy", "wb") as file:
        file.write(b"\x80\x04K\x01.")
    with open("cut.npz", "wb") as file:
        file.write(b"PK\x03\x04 and no more")
    np.savez("both.npz", a=scores, b=scores)
    np.save("flat.npy", np.zeros(5))
    np.save("none.npy", np.zeros((700, 0)))
    np.save("yy.npy", np.zeros((700, 2), int))
    np.save("few.npy", np.zeros(3, int))
    if arguments[1] == "few*.npy":
        os.rename("few.npy", "few1.npy")
        np.save("few2.npy", np.zeros(3, int))
    if arguments[0] == "x*.npy":
        np.save("xx.npy", np.zeros((700, 3), np.float32))
    bad = target.copy()
    bad[13] = 77
    np.save("bad.npy", bad)
    before = sorted(os.listdir())
    assert message in fails(capsys, *arguments)
    assert sorted(os.listdir()) == before  # nothing half-written


@pytest.mark.parametrize("version", [2, 3])
def test_a_corrupt_chunk_is_named(arrays, files, capsys, version):
    zarr_store("x.zarr", arrays[0], version, 90)
    chunk = "x.zarr/1.0" if version == 2 else "x.zarr/c/1/0"
    damage(chunk, 0, bytes(64))
    line = fails(capsys, "x.zarr", "y.npy", "--chunk-size", 90)
    assert "x.zarr: rows 90 to 179 cannot be read (" in line
    assert line.endswith("write or copy it again\n")


def test_bad_parquet(arrays, files, capsys):
    scores = arrays[0]
    parquet("bad.parquet", logits=[list(map(float, row)) for row in scores[:-1]] + [[1.0]])
    assert "bad.parquet: lists of column 'logits' have different lengths" in fails(
        capsys, "bad.parquet", "y.npy"
    )
    parquet("null.parquet", a=[1.0, None], b=[1.0, 2.0], y=[0, 1])
    assert "column 'a' has empty values; fill or drop" in fails(
        capsys, "null.parquet#a,b", "null.parquet"
    )
    parquet("two.parquet", a=[1.0], y=[0], z=[1])
    assert "cannot tell which columns hold the targets; name them" in fails(
        capsys, "two.parquet#a", "two.parquet"
    )
    assert "has no column 'q'; its columns are a, y, z" in fails(
        capsys, "two.parquet#q", "two.parquet#y"
    )
    with open("two.parquet", "r+b") as file:
        file.truncate(40)
    assert "two.parquet: cannot be read (" in fails(capsys, "two.parquet", "y.npy")


def test_a_missing_reader_is_named(files, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.dataset", None)
    with open("x.parquet", "w") as file:
        file.write("PAR1")
    assert "pip install 'mml_arrayapi[evaluate]'" in fails(capsys, "x.parquet", "y.npy")


@pytest.mark.parametrize("what", ["--checkpoint", "--report"])
def test_a_full_disk(files, capsys, what):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
    try:
        assert command("x.npy", "y.npy", what, "made") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    captured = capsys.readouterr()
    # Where only the report is lost, the figures are not.
    assert captured.out.startswith("samples ") == (what == "--report")
    assert re.search(
        r"made(/journal.jsonl)?: cannot be written \(File too large\); free some", captured.err
    )
    assert what == "--checkpoint" or sorted(os.listdir()) == ["x.npy", "y.npy"]


def test_the_functions_own_errors(arrays):
    scores, target = arrays
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', but is 'none'"):
        mml.evaluate(scores, target, reduction="none")
    with pytest.raises(TypeError, match="scores must be a path, an array, or a list of those, but"):
        mml.evaluate(1, target)
    with pytest.raises(mml.InputError, match="targets: the list is empty"):
        mml.evaluate(scores, [])
    with pytest.raises(mml.InputError, match="checkpoint: only files can be resumed"):
        mml.evaluate(scores, target, checkpoint="unused")


# Resuming.


class Killed(Exception):
    pass


def stop_after(pieces):
    def progress(done, rows):
        nonlocal pieces
        pieces -= 1
        if not pieces:
            raise Killed

    return progress


def test_resuming_gives_the_same_bits(files, wanted):
    for _ in range(3):
        with pytest.raises(Killed):
            mml.evaluate(
                "x.npy", "y.npy", chunk_size=60, checkpoint="ck", progress=stop_after(2), workers=1
            )
    lines = (files / "ck" / NAME).read_text().splitlines()
    assert len(lines) == 1 + 6
    steps = []
    figures = mml.evaluate(
        "x.npy",
        "y.npy",
        chunk_size=60,
        checkpoint="ck",
        progress=lambda done, _: steps.append(done),
    )
    assert figures == wanted
    assert len(steps) == 6
    steps.clear()
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted


@pytest.mark.parametrize("torn", [b"", b"{", b"00000000 {}", b"\xff\xfe garbage"])
def test_a_torn_last_line_is_dropped(files, wanted, torn):
    with pytest.raises(Killed):
        mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck", progress=stop_after(3))
    journal = files / "ck" / NAME
    journal.write_bytes(journal.read_bytes()[:-9] + torn)
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted


def test_a_damaged_journal_is_refused(files, capsys):
    assert command("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60) == 0
    capsys.readouterr()
    damage(files / "ck" / NAME, 700, b"#")
    line = fails(capsys, "x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60)
    assert re.search(rf"ck/{NAME}: line \d is damaged; remove the file", line)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--p", 2), "was begun with p 1.0, but this run has 2.0; use the same, or another folder"),
        (("--margin", 2), "was begun with margin 1.0, but this run has 2.0"),
        (("--weight", "1,1,1,1,1,2"), "was begun with weight None, but this run has"),
        (("--chunk-size", 61), "was begun with chunk size 60, but this run has 61"),
        (
            ("--backend", "generic"),
            "was begun with kernel numpy-cpu, but this run has generic",
        ),
    ],
)
def test_another_journal_is_refused(files, capsys, options, message):
    assert command("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60) == 0
    capsys.readouterr()
    arguments = ("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60, *options)
    assert message in fails(capsys, *arguments)


def test_a_changed_file_is_refused(arrays, files, capsys):
    assert command("x.npy", "y.npy", "--checkpoint", "ck") == 0
    capsys.readouterr()
    np.save("y.npy", arrays[1][::-1])
    line = fails(capsys, "x.npy", "y.npy", "--checkpoint", "ck")
    assert "y.npy); give the same files, unchanged, or another folder" in line


SLOW = """
import time
import mml_arrayapi as mml
mml.evaluate("x.npy", "y.npy", chunk_size=7, checkpoint="ck", workers=1,
             progress=lambda *_: time.sleep(0.02))
"""


def test_kill_9_of_the_client_and_resume(files, wanted):
    process = subprocess.Popen([sys.executable, "-c", SLOW])
    journal = files / "ck" / NAME
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.read_bytes().count(b"\n") < 101
    steps = []
    figures = mml.evaluate(
        "x.npy", "y.npy", chunk_size=7, checkpoint="ck", progress=lambda done, _: steps.append(done)
    )
    assert figures == wanted
    assert 0 < len(steps) < 100


# The report.


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_that_loads_nothing(files, wanted, capsys):
    os.rename("x.npy", "<x>.npy")
    assert command("<x>.npy", "y.npy", "--report", "r.html") == 0
    text = (files / "r.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    assert page.links == []
    assert "http" not in text
    assert "url(" not in text.replace("url(#", "")
    assert page.tags.count("svg") == 2
    assert "Multi-class hinge loss of <x>.npy" in page.text
    assert "<x>.npy rows 0 to 699 with y.npy rows 0 to 699" in page.text
    assert repr(wanted.loss) in page.text
    assert f"{100 * wanted.accuracy:.3f} %" in page.text
    assert not [name for name in os.listdir() if name.endswith(".part")]


@pytest.mark.parametrize(
    "figures",
    [
        lambda: mml.evaluate(np.zeros((0, 3)), np.zeros(0, int)),
        lambda: mml.evaluate(np.full((4, 2), np.nan), np.zeros(4, int), margin=0),
        lambda: mml.evaluate(np.eye(200), np.arange(200), weight=-np.ones(200), margin=-3),
        lambda: mml.evaluate(np.eye(1500) * 1e30, np.arange(1500)),
    ],
    ids=["empty", "nan", "negative", "many"],
)
def test_odd_evaluations_have_a_report_too(figures):
    from mml_arrayapi.evaluation.report import to_html

    page = Page()
    page.feed(to_html(figures(), "x"))
    assert "Multi-class hinge loss" in page.text
