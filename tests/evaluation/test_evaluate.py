"""Evaluation of files: every format, any cut, bad input, resuming, the report."""

import copy
import errno
import json
import math
import os
import pickle
import re
import sys
import threading
from fractions import Fraction

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation.errors import advice
from mml_arrayapi.evaluation.inputs import Dataset
from mml_arrayapi.loss import sample_losses

N, C = 700, 6


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
    n = 200
    scores, target = (array[:n] for array in arrays)
    figures = {
        str(mml.evaluate(x, target, chunk_size=size, workers=w, backend=backend).to_json())
        for x in (scores, np.asfortranarray(scores))
        for size, w in ((1, 2), (7, 3), (n, 1), (n - 1, 2), (None, None))
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


@pytest.mark.parametrize("size", [33, None])
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
@pytest.mark.filterwarnings("ignore:The data type:Warning:zarr")  # of its own categories
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


def test_table_and_json(files, wanted, capsys, command):
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


def test_options_reach_the_figures(arrays, files, capsys, command):
    np.save("w.npy", np.arange(1.0, 1 + C))
    options = ("--p", 2, "--margin", 0.25, "--reduction", "sum", "--json", "--chunk-size", 13)
    for weight in ("w.npy", "1,2,3,4,5,6"):
        assert command("x.npy", "y.npy", *options, "--weight", weight, "--workers", 1) == 0
        keywords = {"p": 2, "margin": 0.25, "reduction": "sum", "weight": np.arange(1.0, 1 + C)}
        figures = mml.evaluate(*arrays, **keywords)
        same_json(capsys.readouterr().out, figures)


def test_processes(files, wanted):
    assert (
        mml.evaluate("x.npy", "y.npy", chunk_size=400, scheduler="processes", workers=1) == wanted
    )


def test_many_classes_are_shortened():
    rng = np.random.default_rng(0)
    figures = mml.evaluate(rng.standard_normal((300, 100)), rng.integers(0, 50, 300))
    text = str(figures)
    assert "the 20 classes of highest mean loss, of 100" in text
    assert len(text.splitlines()) == 8 + 20 + 1
    assert len(figures.to_json()["classes"]) <= 50


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
            "yy.npy: targets must have shape (N,) beside scores of shape (700, 6)",
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
        (
            ("x.npy", "y.npy", "--chunk-size", 10**400, "--workers", 10**25),
            "workers must be at most",
        ),
        (("x.npy", "y.npy", "--timeout", "nan"), "timeout must be positive, but is nan"),
        (
            ("x.npy", "y.npy", "--report", ""),
            "--report must be a path that is not empty, but is ''",
        ),
        (("x.npy", "y.npy", "--compare", ""), "--compare must be a path that is not empty, but is"),
        (
            ("x.npy", "y.npy", "--checkpoint", ""),
            "checkpoint must be a path that is not empty, but",
        ),
        (
            ("x.npy", "y.npy", "--class-names", ""),
            "class_names must be a path that is not empty, b",
        ),
        (("x.npy", "y.npy", "--sample-weight", ""), "'': the path is empty; give that of a file"),
        (
            ("x.npy", "", "--weight", ""),
            "--weight '': must be numbers with commas between them, or",
        ),
        (("x.npy", "y.npy", "--backend", "no"), "backend: no kernel is named 'no'; known kernels"),
        (("x.npy", "y.npy", "--report", "no/r.html"), "no/r.html: cannot be written (No such file"),
        (
            ("x.npy", "y.npy", "--checkpoint", "x.npy"),
            "cannot be written (File exists); something else has this name: give another",
        ),
        (
            ("x.npy", "y.npy", "--checkpoint", "x.npy/folder"),
            "cannot be written (Not a directory); a part of the path is no folder: give another",
        ),
    ]


@pytest.mark.parametrize(("arguments", "message"), bad_inputs(), ids=lambda v: str(v)[:40])
def test_bad_input_is_one_line_that_says_what_to_do(arrays, files, arguments, message, fails):
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
    assert message in fails(*arguments)
    assert sorted(os.listdir()) == before  # nothing half-written


@pytest.mark.parametrize("version", [2, 3])
def test_a_corrupt_chunk_is_named(arrays, files, version, fails):
    zarr_store("x.zarr", arrays[0], version, 90)
    chunk = "x.zarr/1.0" if version == 2 else "x.zarr/c/1/0"
    damage(chunk, 0, bytes(64))
    line = fails("x.zarr", "y.npy", "--chunk-size", 90)
    assert "x.zarr: rows 90 to 179 cannot be read (" in line
    assert line.endswith("write or copy it again\n")


def test_bad_parquet(arrays, files, fails):
    scores = arrays[0]
    parquet("bad.parquet", logits=[list(map(float, row)) for row in scores[:-1]] + [[1.0]])
    assert "bad.parquet: lists of column 'logits' have different lengths" in fails(
        "bad.parquet", "y.npy"
    )
    parquet("null.parquet", a=[1.0, None], b=[1.0, 2.0], y=[0, 1])
    assert "column 'a' has empty values; fill or drop" in fails("null.parquet#a,b", "null.parquet")
    parquet("two.parquet", a=[1.0], y=[0], z=[1])
    assert "cannot tell which columns hold the targets; name them" in fails(
        "two.parquet#a", "two.parquet"
    )
    assert "has no column 'q'; its columns are a, y, z" in fails("two.parquet#q", "two.parquet#y")
    with open("two.parquet", "r+b") as file:
        file.truncate(40)
    assert "two.parquet: cannot be read (" in fails("two.parquet", "y.npy")
    os.mkdir(folder := "a folder with a long name " * 5)
    with open(f"{folder}/p.parquet", "wb") as file:
        file.write(bytes(100))
    line = fails(f"{folder}/p.parquet", "y.npy")  # Arrow names the file twice, and the cause last
    assert "p.parquet: cannot be read (Error creating dataset. Could not read schema from" in line
    assert "... " in line
    assert "this is not a parquet file.); write or copy it again\n" in line


def test_a_missing_reader_is_named(files, monkeypatch, fails):
    monkeypatch.setitem(sys.modules, "pyarrow.dataset", None)
    with open("x.parquet", "w") as file:
        file.write("PAR1")
    assert "pip install 'mml_arrayapi[evaluate]'" in fails("x.parquet", "y.npy")


@pytest.mark.parametrize("what", ["--checkpoint", "--report"])
def test_a_full_disk(files, capsys, what, command):
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
    with pytest.raises(mml.InputError, match="checkpoint must be a path that is not e"):
        mml.evaluate(scores, target, checkpoint=True)


def test_a_file_that_is_removed_meanwhile(files, fails, monkeypatch):
    def remove(self):
        os.remove("x.npy")
        check(self)

    check = Dataset.check_versions
    monkeypatch.setattr(Dataset, "check_versions", remove)
    assert "x.npy: the file has changed since the evaluation began" in fails("x.npy", "y.npy")


@pytest.mark.parametrize(
    "again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy]
)
@pytest.mark.parametrize(
    "target", [[0, 1, 2], [0, 0, 1], [-1, -1, -1]], ids=["all", "some", "none"]
)
def test_a_copy_is_equal_though_figures_are_nan(again, target):
    scores = np.asarray([[1.0, 0.5, 0.0], [0.0, np.nan, 1.0], [0.0, 1.0, 0.5]])
    figures = mml.evaluate(scores, np.asarray(target), ignore_index=-1)
    made = again(figures)
    assert made == figures
    assert hash(made) == hash(figures)
    assert made.to_json() == figures.to_json()
    assert made != mml.evaluate(scores, np.asarray(target), ignore_index=-1, p=2)


def test_labels_that_are_no_numbers_are_not_to_be_converted():
    """What dates become would be taken for classes."""
    for target in (np.arange(3).astype("M8[D]"), np.asarray(["a", "b", "c"]), np.arange(3) * 1j):
        message = f"targets must be integers, but are {re.escape(str(target.dtype))}; number the cl"
        with pytest.raises(mml.InputError, match=message):
            mml.evaluate(np.eye(3), target)


@pytest.mark.parametrize("lazy", [False, True])
def test_threads_that_do_not_start(files, command, capsys, monkeypatch, lazy):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    if not lazy:
        assert command("x.npy", "y.npy") == 1
        assert "(can't start new thread); give fewer --workers, or allow" in capsys.readouterr().err
        return
    da = pytest.importorskip("dask.array")
    with pytest.raises(mml.WorkerError, match="not as many threads can be started"):
        mml.evaluate(da.zeros((4, 3)), np.zeros(4, int))


def test_too_many_open_files():
    told = advice(OSError(errno.EMFILE, "Too many open files"), "write it again")
    assert told.startswith("(Too many open files); allow this process more open files (ulimit -n)")
