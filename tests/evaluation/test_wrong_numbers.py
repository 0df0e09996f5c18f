"""What once gave a wrong number with exit code 0 is read right, or refused in one line."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

import mml_arrayapi as mml
from tests.evaluation.writers import hdf5_file, parquet, zarr_file

N, C = 700, 6


def parts(name, array, n, numbers=None):
    """Save an array as so many files, numbered from 0."""
    for i, part in enumerate(np.array_split(array, n)):
        np.save(f"{name}-{i if numbers is None else numbers[i]}.npy", part)


def halves(array, names):
    """Save the halves of an array under two names."""
    for name, half in zip(names, np.array_split(array, 2), strict=True):
        os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
        np.save(f"{name}.npy", half)


# The order of files.


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("given", ["data", "data/**/*.parquet", "."])
def test_links_that_lead_back(files, fails, given):
    """They were followed 40 levels deep, two of them practically for ever."""
    os.makedirs("data/inner")
    parquet("data/p.parquet", logits=[[1.0, 2.0]], label=[1])
    os.symlink("..", "data/inner/up")
    os.symlink(".", "data/same")
    line = fails(given, given)
    assert re.search(
        r"data/(same|inner/up): is a link back to a folder that it is in; remove", line
    )
    os.unlink("data/inner/up")
    os.unlink("data/same")
    os.symlink("../../data", "data/inner/up")
    assert "up: is a link back to a folder that it is in" in fails(given, given)
    os.unlink("data/inner/up")
    os.makedirs("elsewhere/deep")
    os.symlink("../elsewhere", "data/good")
    assert mml.evaluate("data", "data").samples == 1


def test_numbers_in_names_are_numbers(arrays, files, wanted):
    parts("part", arrays[0], 12)
    parts("label", arrays[1], 12)
    for logits, targets in (
        ("part-*.npy", "y.npy"),
        ("x.npy", "label-*.npy"),
        ("part-*.npy", "label-*.npy"),
    ):
        figures = mml.evaluate(logits, targets, chunk_size=50)
        assert figures == wanted
    assert [line["scores"]["name"] for line in figures.pairing] == [
        f"part-{i}.npy" for i in range(12)
    ]
    assert figures.pairing[11]["targets"][0]["name"] == "label-11.npy"


@pytest.mark.parametrize(
    "names",
    [
        ("jan", "feb", "mar"),
        ("1", "01", "2"),
        ("a1", "b2", "c3"),
        ("rank0-step0", "rank0-step1", "rank1-step0"),  # written step by step?
        ("0.5", "0.25", "0.75"),
        ("1001-00-01", "1001-01-00", "1001-01-01"),  # no date
    ],
    ids="-".join,
)
def test_an_order_in_doubt_is_refused(arrays, files, fails, names):
    parts("part", arrays[0], 3, names)
    assert "the order of its 3 files is in doubt" in fails("part-*.npy", "y.npy")
    parts("label", arrays[1], 3, names)
    if names[0] == "jan":  # files of the same names belong together, in whatever order
        assert (
            mml.evaluate("part-*.npy", "label-*.npy").accuracy
            == mml.evaluate("x.npy", "y.npy").accuracy
        )


def test_numbers_that_do_not_vary_leave_no_doubt(arrays, files, wanted):
    parts("part", arrays[0], 3, ("v1.2-rank4-0.25", "v1.2-rank4-0.50", "v1.2-rank4-0.75"))
    assert mml.evaluate("part-*.npy", "y.npy") == wanted
    parts("shard", arrays[0], 3, ("2-of-12", "3-of-12", "10-of-12"))
    assert mml.evaluate("shard-*.npy", "y.npy") == wanted


@pytest.mark.parametrize(
    "names",
    [
        ("0-100", "100-200", "200-300"),  # no number falls: every way to read them is one order
        ("00000-tid-6053-u-3-c000", "00001-tid-6053-u-4-c000", "00002-tid-6053-u-5-c000"),
        ("epoch-1-step-9", "epoch-1-step-10", "epoch-2-step-11"),
        ("2024-01-31", "2024-02-01", "2025-01-01"),
        ("2024-01-31T22-00-00", "2024-01-31T23-00-00", "2024-02-01T00-00-00"),
    ],
    ids=" ".join,
)
def test_numbers_that_rise_together_leave_no_doubt(arrays, files, wanted, names):
    parts("part", arrays[0], 3, names)
    assert mml.evaluate("part-*.npy", "y.npy") == wanted


def test_wholes_in_other_places_of_a_path(arrays, files, wanted):
    x, y = arrays
    os.makedirs("fold-2-of-5")
    parts("fold-2-of-5/logits", x, 2, ["00000-of-00002", "00001-of-00002"])
    parts("fold-2-of-5/labels", y, 2, ["00000-of-00002", "00001-of-00002"])
    assert mml.evaluate("fold-2-of-5/logits-*.npy", "fold-2-of-5/labels-*.npy") == wanted
    for folder, part, n in (("de", slice(0, 300), 2), ("en", slice(300, None), 3)):
        os.makedirs(f"table/{folder}")
        for i, rows in enumerate(np.array_split(np.arange(N)[part], n)):
            path = f"table/{folder}/train-{i}-of-{n}.parquet"
            parquet(path, logits=list(x[rows]), label=y[rows])
    assert mml.evaluate("table", "table") == wanted


def test_parts_of_different_wholes(arrays, files, fails, wanted):
    for name, array in (("part", arrays[0]), ("label", arrays[1])):
        for n in (2, 3):
            parts(name, array, n, [f"0000{i}-of-0000{n}" for i in range(n)])
    line = fails("part-*.npy", "label-*.npy")
    assert "part-*.npy: stands for parts of 2 and parts of 3 files, by their names; give a" in line
    assert mml.evaluate("part-*-of-00003.npy", "label-*-of-00003.npy") == wanted


@pytest.mark.parametrize(
    "form", ["{}_of_{}", "{}of{}", "A{}of{}", "{}-Of-{}", "{}.of.{}", "{} of {}"]
)
def test_parts_of_different_wholes_in_other_forms(arrays, files, fails, wanted, form):
    for name, array in (("part", arrays[0]), ("label", arrays[1])):
        for n in (2, 3):
            parts(name, array, n, [form.format(i, n) for i in range(n)])
    assert "stands for parts of 2 and parts of 3 files" in fails("part-*.npy", "label-*.npy")
    two = form.format("*", 2)
    assert mml.evaluate(f"part-{two}.npy", f"label-{two}.npy") == wanted


@pytest.mark.parametrize(
    ("sizes", "other"),
    [((2, 3), (3, 2)), ((1, 2), (2, 1)), ((1, 4), (4, 1)), ((2, 2, 2), (2, 3, 1))],
)
def test_patterns_of_lists_that_stand_for_different_numbers_of_files(files, fails, sizes, other):
    x, y = np.eye(C, dtype="f4"), np.arange(C)
    patterns = {}
    for role, numbers, array in (("x", sizes, x), ("y", other, y)):
        for k, n in enumerate(numbers):
            patterns.setdefault(role, []).append(f"{role}{'abc'[k]}-*.npy")
            parts(f"{role}{'abc'[k]}", np.concatenate([array] * n), n)
    with pytest.raises(mml.InputError, match="so that it is in doubt which belong together"):
        mml.evaluate(patterns["x"], patterns["y"])
    in_order = sorted(name for name in os.listdir() if name.startswith("y") and "-" in name)
    assert mml.evaluate(patterns["x"], in_order).accuracy == 1


def test_labels_may_serve_two_patterns_of_scores(arrays, files):
    for name, array in (("a", arrays[0]), ("b", arrays[0]), ("label", arrays[1])):
        parts(name, array, 3)
    twice = mml.evaluate(["a-*.npy", "b-*.npy"], ["label-*.npy", "label-*.npy"])
    assert twice.accuracy == mml.evaluate(*arrays).accuracy
    assert twice.samples == 2 * N


TABLE_LOGS = {
    "Delta": "table/_delta_log/00000000000000000000.json",
    "Hudi": "table/.hoodie/hoodie.properties",
    "Iceberg": "table/metadata/v1.metadata.json",
}


@pytest.mark.parametrize("kind", TABLE_LOGS)
@pytest.mark.parametrize(
    "inner", ["", "data", "data/day=1", "day=1/hour=2", "2024/01/05", "data/0101/0110", "k=1/aB"]
)
@pytest.mark.parametrize("scheme", ["", "file://", "memory://"])
def test_tables_of_which_only_a_log_tells_what_counts(files, fails, kind, inner, scheme):
    fsspec = pytest.importorskip("fsspec")
    folder = f"table/{inner}".rstrip("/")
    os.makedirs(folder)
    parquet(f"{folder}/part-0.parquet", logits=[[1.0, 2.0]], label=[1])
    parquet(f"{folder}/part-1.parquet", logits=[[2.0, 1.0]], label=[1])
    good = mml.evaluate(folder, folder)
    assert good.samples == 2
    assert mml.evaluate("table", "table").samples == 2
    os.makedirs(os.path.dirname(TABLE_LOGS[kind]))
    Path(TABLE_LOGS[kind]).write_text("{}")
    top = str(files) if scheme == "file://" else ""
    if scheme == "memory://":
        memory = fsspec.filesystem("memory")
        memory.put("table", "/table", recursive=True)
    spelled = ["table", "table/**/*.parquet"]
    if inner.count("/") < 2 and not inner.endswith(
        "B"
    ):  # of other folders, those above don't count
        spelled += [folder, f"{folder}/*.parquet", f"{folder}/part-[01].parquet"]
    for given in spelled:
        url = f"{scheme}{top}/{given}" if scheme else given
        assert f"holds files of a table of {kind}, " in fails(url, url)
    url = f"{scheme}{top}/{folder}/part-0.parquet" if scheme else f"{folder}/part-0.parquet"
    assert mml.evaluate(url, url).samples == 1  # a file that is named is read
    if scheme == "memory://":
        memory.rm("/table", recursive=True)


def test_what_is_no_table(files):
    os.makedirs("project/data")
    os.makedirs("project/metadata")
    parquet("project/data/p.parquet", logits=[[1.0, 2.0]], label=[1])
    Path("project/metadata/run.metadata.json").write_text("{}")
    assert mml.evaluate("project/data", "project/data").samples == 1


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_folder_above_which_may_not_be_looked_into(files):
    os.makedirs("team/data")
    parquet("team/data/p.parquet", logits=[[1.0, 2.0]], label=[1])
    os.chmod("team", 0o100)
    try:
        assert mml.evaluate("team/data", "team/data").samples == 1
    finally:
        os.chmod("team", 0o700)


@pytest.mark.parametrize(
    "given", ["data", "data/**/*.parquet", "data/*/p.parquet", "data/b/p.parquet"]
)
def test_folders_that_may_not_be_listed(files, monkeypatch, given):
    for name, label in (("a", 0), ("b", 1)):
        os.makedirs(f"data/{name}")
        parquet(f"data/{name}/p.parquet", logits=[[5.0, 0.0]], label=[label])
    assert mml.evaluate("data", "data").samples == 2
    closed = os.path.abspath("data/b")

    def refusing(function, lists):
        def wrapped(path=".", *args, **kwargs):
            place = os.path.normpath(os.path.abspath(path))
            looks_in = place == closed and (lists or str(path).endswith("."))
            if looks_in or place.startswith(closed + os.sep):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return wrapped

    for name in ("scandir", "listdir", "stat", "lstat"):  # as it is for users that are not root
        function = getattr(os, name)
        monkeypatch.setattr(os, name, refusing(function, "stat" not in name))
    with pytest.raises(mml.InputError, match=f"{re.escape(given)}: cannot be found .*your access"):
        mml.evaluate(given, given)


def test_labelled_arrays_are_not_paired_by_position():
    pd, xr = pytest.importorskip("pandas"), pytest.importorskip("xarray")
    x, y = np.eye(4) * 5, np.arange(4)
    coords = {"s": [3, 2, 1, 0]}
    for logits, targets, role in (
        (xr.DataArray(x, dims=("s", "c"), coords=coords), y, "scores"),
        (x, xr.DataArray(y, dims="s", coords=coords), "targets"),
        (x, pd.Series(y, index=coords["s"]), "targets"),
    ):
        with pytest.raises(TypeError, match=f"{role} must be arrays without labels"):
            mml.evaluate(logits, targets)


def test_each_partition_is_not_looked_at(files, monkeypatch):
    from mml_arrayapi.evaluation import files as module

    for day in range(9):
        os.makedirs(f"table/year=2024/day={day}")
        parquet(f"table/year=2024/day={day}/p.parquet", logits=[[1.0, 2.0]], label=[1])
    asked = []
    original = module._glob
    monkeypatch.setattr(
        module, "_glob", lambda fs, pattern: asked.append(pattern) or original(fs, pattern)
    )
    assert mml.evaluate("table", "table").samples == 9
    assert len(asked) < 20


def test_a_list_is_an_order(arrays, files, wanted):
    parts("part", arrays[0], 3, ("jan", "feb", "mar"))
    assert mml.evaluate([f"part-{m}.npy" for m in ("jan", "feb", "mar")], "y.npy") == wanted


@pytest.mark.parametrize("listed", ["logits", "targets", "sample_weight"])
def test_a_list_in_another_order_than_a_pattern_beside_it(arrays, files, listed):
    given = {"logits": "part-*.npy", "targets": "label-*.npy", "sample_weight": "w-*.npy"}
    weights = np.ones(N)
    for name, array in (("part", arrays[0]), ("label", arrays[1]), ("w", weights)):
        parts(name, array, 12)
    wanted = mml.evaluate(**given)
    numbered = [given[listed].replace("*", str(i)) for i in range(12)]
    assert mml.evaluate(**given | {listed: numbered}) == wanted
    with pytest.raises(mml.InputError, match="it is in doubt which belong together"):
        mml.evaluate(**given | {listed: sorted(numbered)})


def test_lists_with_the_same_names_in_another_order(arrays, files, wanted):
    parts("part", arrays[0], 12)
    parts("label", arrays[1], 12)
    scores = [f"part-{i}.npy" for i in range(12)]
    labels = [f"label-{i}.npy" for i in range(12)]
    assert mml.evaluate(scores, labels) == mml.evaluate(sorted(scores), sorted(labels)) == wanted
    told = r"label-0.npy: the targets are those of the scores .* in another order \(0, 1, 10 beside 0, 1, 2\)"
    with pytest.raises(mml.InputError, match=told):
        mml.evaluate(scores, sorted(labels))


@pytest.mark.parametrize("labels", [["t01", "t00"], ["t2", "t1"], ["b", "a"]], ids="-".join)
def test_lists_with_the_same_numbers_in_another_order(arrays, files, labels):
    scores = ["sa", "sb"] if labels[0] == "b" else ["s0", "s1"]
    halves(arrays[0], scores)
    halves(arrays[1], sorted(labels))
    scores, labels = ([f"{name}.npy" for name in names] for names in (scores, labels))
    mml.evaluate(scores, sorted(labels))
    with pytest.raises(mml.InputError, match="by name, but in another order"):
        mml.evaluate(scores, labels)


FOLDERS = (
    "cifar10",
    "cifar10V2_new",
    "bba",
)  # folders of several files, whose names all folders share


@pytest.fixture
def three_folders(files, arrays):
    """Three folders of two files each, of scores, labels and weights, and as one table."""
    sizes = 0, 100, 200, 300, 400, 550, N
    for k, (start, stop) in enumerate(pairwise(sizes)):
        folder = FOLDERS[k // 2]
        os.makedirs(f"x/{folder}", exist_ok=True)
        rows = slice(start, stop)
        for name, array in (("x", arrays[0]), ("y", arrays[1]), ("w", np.ones(N))):
            os.makedirs(f"{name}/{folder}", exist_ok=True)
            np.save(f"{name}/{folder}/part-{k % 2}.npy", array[rows])
            os.makedirs(f"{folder}/{name}", exist_ok=True)
            np.save(f"{folder}/{name}/part-{k % 2}.npy", array[rows])
        os.makedirs(f"t/{folder}", exist_ok=True)
        path = f"t/{folder}/part-{k % 2}.parquet"
        parquet(path, logits=list(arrays[0][rows]), label=arrays[1][rows])


SPELLED = {
    "patterns": lambda kind, order: [f"{kind}/{one}/*.npy" for one in order],
    "kind below": lambda kind, order: [f"{one}/{kind}/*.npy" for one in order],
    "files": lambda kind, order: [f"{kind}/{one}/part-{i}.npy" for one in order for i in (0, 1)],
    "kind in between": lambda kind, order: [
        f"{one}/{kind}/part-{i}.npy" for one in order for i in (0, 1)
    ],
    "folders": lambda kind, order: [f"t/{one}" for one in order],
    "tables": lambda kind, order: [f"t/{one}/*.parquet" for one in order],
}


@pytest.mark.parametrize("scores", SPELLED)
@pytest.mark.parametrize("labels", SPELLED)
def test_folders_in_another_order(three_folders, wanted, scores, labels):
    give_scores, give_labels = SPELLED[scores], SPELLED[labels]
    assert mml.evaluate(give_scores("x", FOLDERS), give_labels("y", FOLDERS)) == wanted
    swapped = FOLDERS[1], FOLDERS[0], FOLDERS[2]  # as many rows in each
    told = "but in another order|it is in doubt which belong together"
    with pytest.raises(mml.InputError, match=told):
        mml.evaluate(give_scores("x", FOLDERS), give_labels("y", swapped))
    with pytest.raises(mml.InputError, match=told):
        mml.evaluate(give_scores("x", swapped), give_labels("y", FOLDERS))
    both = give_scores("x", swapped), give_labels("y", swapped)
    assert mml.evaluate(*both).loss == wanted.loss
    if "t/" in give_labels("y", FOLDERS)[0]:
        return
    weighted = mml.evaluate(*both, sample_weight=give_labels("w", swapped))
    assert weighted.loss == wanted.loss
    with pytest.raises(mml.InputError, match=told):
        mml.evaluate(*both, sample_weight=give_labels("w", FOLDERS))


@pytest.mark.parametrize(
    "order", [[(2, 0), (2, 1), (1, 0), (1, 1)], [(1, 1), (1, 0), (2, 1), (2, 0)]]
)
@pytest.mark.parametrize("form", ["day{}/{}/part-{}.npy", "day{}/{}-{}.npy", "day{}-{}-x{}.npy"])
def test_numbers_on_both_sides_of_the_kind(arrays, files, wanted, form, order):
    days = [(1, 0), (1, 1), (2, 0), (2, 1)]
    for kind, array in zip("xy", arrays, strict=True):
        for (day, part), rows in zip(days, np.split(array, 4), strict=True):
            path = form.format(day, kind, part)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            np.save(path, rows)
    scores = [form.format(day, "x", part) for day, part in days]
    assert mml.evaluate(scores, [form.format(day, "y", part) for day, part in days]) == wanted
    pattern = form.replace("{}", "*", 1).replace("{}", "{kind}", 1).replace("{}", "*")
    assert mml.evaluate(pattern.format(kind="x"), pattern.format(kind="y")) == wanted
    with pytest.raises(mml.InputError, match="by name, but in another order"):
        mml.evaluate(scores, [form.format(day, "y", part) for day, part in order])


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ("x/fold{}/seed{}.npy", "y/seed{1}/fold{0}.npy"),
        ("x-day{}-part{}.npy", "part{1}-day{0}-y.npy"),
        ("x/r{}_c{}.npy", "y/c{1}_r{0}.npy"),
        ("x/r{}-of-2-c{}.npy", "y/c{1}-r{0}-of-2.npy"),
        ("x/s{}/{}.npy", "y/{1}-s{0}.npy"),
        ("x/{}r_{}c.npy", "y/{1}c_{0}r.npy"),
        ("x/m{}_1/s{}.npy", "y/s{1}_1/m{0}.npy"),
    ],
)
@pytest.mark.parametrize("values", ["12", "ab"])
def test_parts_of_names_that_stand_in_another_order(arrays, files, wanted, scores, labels, values):
    """Only a list says what belongs together, since the right files stand at other places."""
    given = [(a, b) for a in values for b in values]
    for form, array in ((scores, arrays[0]), (labels, arrays[1])):
        for pair, rows in zip(given, np.split(array, 4), strict=True):
            path = form.format(*pair)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            np.save(path, rows)
    lists = [[form.format(*pair) for pair in given] for form in (scores, labels)]
    assert mml.evaluate(*lists) == wanted
    patterns = [re.sub(r"\{[01]?\}", "[12ab]", form) for form in (scores, labels)]
    with pytest.raises(mml.InputError, match="it is in doubt which belong together"):
        mml.evaluate(*patterns)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ("x/imagenet_logits.npy x/imagenetV2_logits.npy", "y/imagenet.npy y/imagenetV2.npy"),
        ("x/a/p0.npy x/b/p0.npy", "y/a/p1.npy y/b/p1.npy"),
        ("x/\u00e9.npy x/f.npy", "y/e\u0301.npy y/f.npy"),
        ("x/0.npy ./x/1.npy", "y/0.npy y/1.npy"),
        ("run1/x/s-1.npy run2/x/s-1.npy", "run1/y/l-1.npy run2/y/l-1.npy"),
    ],
)
def test_lists_in_another_order_whatever_the_names(arrays, files, wanted, scores, labels):
    scores, labels = scores.split(), labels.split()
    for names, array in ((scores, arrays[0]), (labels, arrays[1])):
        for name, half in zip(names, np.array_split(array, 2), strict=True):
            os.makedirs(os.path.dirname(name), exist_ok=True)
            np.save(name, half)
    assert mml.evaluate(scores, labels) == wanted
    with pytest.raises(mml.InputError, match="by name, but in another order"):
        mml.evaluate(scores, labels[::-1])
    with pytest.raises(mml.InputError, match="by name, but in another order"):
        mml.evaluate(scores[::-1], [os.path.abspath(name) for name in labels])


MOVED = [  # the word for the kind stands at another place
    ("rank{}_x_step{}.npy", "rank{}_step{:05}_y.npy"),
    ("rank{}_step{}_x.npy", "rank{}_y_step{}.npy"),
    ("s{}-x/day{}.npy", "s{}/day{}_y.npy"),
    ("rank{}/step{}-x.npy", "rank{}/y-step{}.npy"),
    ("val_x/rank{}_step{}.npy", "rank{}_step{}_val_y.npy"),
    ("val_x_rank{}_step{}.npy", "rank{}/val_y/step{}.npy"),
]


@pytest.mark.parametrize(("scores", "labels"), MOVED)
def test_the_word_for_the_kind_at_another_place(arrays, files, wanted, scores, labels):
    given = [(a, b) for a in (0, 1) for b in (2, 10)]
    for form, array in ((scores, arrays[0]), (labels, arrays[1])):
        for pair, rows in zip(given, np.split(array, 4), strict=True):
            path = form.format(*pair)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            np.save(path, rows)
    patterns = [re.sub(r"\{[^}]*\}", "*", form) for form in (scores, labels)]
    assert mml.evaluate(*patterns) == wanted
    x, y = ([form.format(*pair) for pair in given] for form in (scores, labels))
    assert mml.evaluate(x, y) == wanted
    for wrong in (y[::-1], [*y[2:], *y[:2]], [y[1], y[0], y[3], y[2]]):
        with pytest.raises(mml.InputError, match="by name, but in another order"):
            mml.evaluate(x, wrong)


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ("fold{}_seed{}-x.npy", "y-seed{1}_fold{0}.npy"),
        ("fold{}_seed{}-x.npy", "y/seed{1}/fold{0}.npy"),
        ("x_lr-0.{}_wd-0.{}.npy", "y_wd-0.{1}_lr-0.{0}.npy"),
        ("x_train_fold{}_test_fold{}.npy", "y_test_fold{1}_train_fold{0}.npy"),
        ("x_train-2024-01-0{}_test-2024-01-0{}.npy", "y_test-2024-01-0{1}_train-2024-01-0{0}.npy"),
        ("x_seed_0.{}_split_0.{}.npy", "split_0.{1}-y_seed_0.{0}.npy"),
        ("x/teacher/seed{}/student/seed{}.npy", "y/student/seed{1}/teacher/seed{0}.npy"),
        ("x_cifar_src_n={}_tgt_n={}.npy", "y_cifar_tgt_n={1}_src_n={0}.npy"),
    ],
)
def test_parts_that_the_words_before_them_name(arrays, files, wanted, scores, labels):
    given = [(a, b) for a in (1, 2) for b in (1, 2)]
    for pair, x, y in zip(given, *(np.split(a, 4) for a in arrays), strict=True):
        for form, rows in ((scores, x), (labels, y)):
            path = form.format(*pair)
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            np.save(path, rows)
    x, y = ([form.format(*pair) for pair in given] for form in (scores, labels))
    assert mml.evaluate(x, y) == wanted
    with pytest.raises(mml.InputError, match="by name, but in another order"):
        mml.evaluate(x, sorted(y))
    with pytest.raises(mml.InputError, match=r"which belong together|in another order"):
        mml.evaluate(*(re.sub(r"\{.\}|\{\}", "*", form) for form in (scores, labels)))


@pytest.mark.parametrize(
    ("scores", "labels"),
    [
        ("x-2024-01-02.npy x-2024-02-01.npy", "y-02-01-2024.npy y-01-02-2024.npy"),
        ("x/2024/01-02.npy x/2024/02-01.npy", "y/02-01/2024.npy y/01-02/2024.npy"),
    ],
)
def test_dates_that_are_written_in_two_orders(arrays, files, wanted, scores, labels):
    """Nobody knows whether the day or the month stands first."""
    for names, array in ((scores, arrays[0]), (labels, arrays[1])):
        halves(array, [name.removesuffix(".npy") for name in names.split()])
    assert mml.evaluate(scores.split(), labels.split()) == wanted
    places = ("x*", "y*") if "/" not in scores else ("x/*/*", "y/*/*")
    with pytest.raises(mml.InputError, match="it is in doubt which belong together"):
        mml.evaluate(*places)


@pytest.mark.parametrize("zero", "\u0660\u0966\uff10")  # Arabic, Devanagari, full width
def test_digits_of_any_script(arrays, files, wanted, zero):
    digits = {ord("0") + i: ord(zero) + i for i in range(10)}
    parts("part", arrays[0], 12, [str(i).translate(digits) for i in range(12)])
    assert mml.evaluate("part-*.npy", "y.npy") == wanted


def test_a_list_of_files_in_folders_beside_a_pattern(arrays, files, wanted):
    for name, x, y in zip(("abd", "dog"), *(np.split(a, 2) for a in arrays), strict=True):
        os.makedirs(f"ls/{name}")
        np.save(f"ls/{name}/x.npy", x)
        np.save(f"ls/{name}/y.npy", y)
    assert mml.evaluate("ls/*/x.npy", ["ls/abd/y.npy", "ls/dog/y.npy"]) == wanted
    with pytest.raises(mml.InputError, match=r"belong together|in another order"):
        mml.evaluate("ls/*/x.npy", ["ls/dog/y.npy", "ls/abd/y.npy"])


@pytest.mark.parametrize("names", ["s_-5 s_-10", "s_1e-3 s_1e-4", "s=-1 s=-2", "-1 -2"])
def test_numbers_with_a_sign_are_no_order(arrays, files, fails, names):
    halves(arrays[0], [f"d/{name}" for name in names.split()])
    assert "the order of its 2 files is in doubt" in fails("d/*.npy", "y.npy")


@pytest.mark.parametrize("names", ["part-1 part-2", "a1b2e4-1 a1b2e4-2", "x(1)-1 x(1)-2"])
def test_numbers_behind_a_hyphen_are_an_order(arrays, files, wanted, names):
    halves(arrays[0], [f"d/{name}" for name in names.split()])
    assert mml.evaluate("d/*.npy", "y.npy") == wanted


def test_a_list_of_folders_beside_a_pattern_of_folders(arrays, files, wanted):
    for i, (x, y) in enumerate(zip(*(np.array_split(a, 3) for a in arrays), strict=True)):
        os.makedirs(f"c/{i}")
        np.save(f"c/{i}/x.npy", x)
        np.save(f"c/{i}/y.npy", y)
    folders = [f"c/{i}/x.npy" for i in range(3)]
    assert mml.evaluate(folders, "c/*/y.npy") == wanted
    with pytest.raises(mml.InputError, match="it is in doubt which belong together"):
        mml.evaluate(folders[::-1], "c/*/y.npy")


@pytest.mark.parametrize("numbers", [(0, 1, 3), ("b", "c", "d")], ids=str)
def test_names_that_do_not_correspond_are_refused(arrays, files, fails, numbers):
    rows = N // 3 * 3
    parts("part", arrays[0][:rows], 3, (0, 1, 2) if numbers[0] == 0 else ("a", "b", "c"))
    parts("label", arrays[1][:rows], 3, numbers)
    assert "it is in doubt which belong together" in fails("part-*.npy", "label-*.npy")


def test_numbers_that_begin_elsewhere_correspond(arrays, files, wanted):
    parts("part", arrays[0], 3)
    parts("label", arrays[1], 3, ("001", "002", "003"))
    assert mml.evaluate("part-*.npy", "label-*.npy") == wanted


def test_what_was_paired_is_printed(arrays, files, command, capsys):
    parts("part", arrays[0], 10)
    assert command("part-*.npy", "y.npy") == 0
    out = capsys.readouterr().out
    assert "read           part-0.npy rows 0 to 69 with y.npy rows 0 to 69\n" in out
    assert "... 4 more ...\n" in out
    assert "part-9.npy rows 0 to 69 with y.npy rows 630 to 699\n" in out


# What is in a file.


@pytest.mark.parametrize("which", ["x.npy", "y.npy"])
def test_a_second_array_in_a_file(arrays, files, fails, which):
    with open(which, "ab") as file:
        np.save(file, np.zeros(3))
    line = fails("x.npy", "y.npy")
    assert f"{which}: 152 bytes follow its array of shape (700," in line


def test_bytes_after_the_array_in_an_archive(arrays, files, fails):
    import io
    import zipfile

    buffer = io.BytesIO()
    np.save(buffer, arrays[1])
    with zipfile.ZipFile("y.npz", "w") as archive:
        archive.writestr("y.npy", buffer.getvalue() + b"more")
    assert "y.npz: bytes follow the array; save it again" in fails("x.npy", "y.npz")


def test_a_damaged_archive(arrays, files, fails):
    np.savez("x.npz", arrays[0])
    with open("x.npz", "r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x01\x02")
    assert "x.npz: rows 0 to 699 cannot be read (Bad CRC-32" in fails("x.npz", "y.npy")


class Meters(np.ndarray):
    pass


@pytest.mark.parametrize(
    "make", [np.ma.masked_array, lambda a: a.view(Meters)], ids=["mask", "unit"]
)
def test_subclasses_of_arrays_are_refused(arrays, make):
    scores, target = arrays
    with pytest.raises(TypeError, match="targets must be plain arrays, but are of type M"):
        mml.evaluate(scores, make(target))
    with pytest.raises(TypeError, match="scores must be plain arrays, but are of type M"):
        mml.evaluate([make(scores)], target)


class Sparse:
    """As scipy's matrices: NumPy makes an object of it."""

    shape, dtype = (3, 3), np.dtype("f4")

    def toarray(self):
        return np.eye(3, dtype="f4")


def test_sparse_matrices_are_refused():
    matrix = Sparse()
    with pytest.raises(
        TypeError, match=r"scores must be dense, but are of type Sparse; give their"
    ):
        mml.evaluate(matrix, np.arange(3))
    assert mml.evaluate(matrix.toarray(), np.arange(3)).accuracy == 1


def masked_later(block):
    return np.ma.masked_array(block, mask=True)


def test_masked_weights_are_refused(files):
    da = pytest.importorskip("dask.array")
    plain = np.ones(6)
    for weight in (
        np.ma.masked_equal(plain, 0),
        da.from_array(np.ma.masked_equal(plain, 1)),
        da.from_array(plain, chunks=3).map_blocks(masked_later, meta=np.empty(0)),
    ):
        with pytest.raises(TypeError, match=r"must be a dense array, but is a (masked|Dask) array"):
            mml.evaluate("x.npy", "y.npy", weight=weight)
    wanted = mml.evaluate("x.npy", "y.npy", weight=plain)
    assert mml.evaluate("x.npy", "y.npy", weight=list(plain)) == wanted
    assert mml.evaluate("x.npy", "y.npy", weight=da.from_array(plain, chunks=3)) == wanted


def test_masked_chunks_of_dask_are_refused(arrays):
    da = pytest.importorskip("dask.array")
    scores, target = (da.from_array(a, chunks=100) for a in arrays)
    with pytest.raises(TypeError, match="targets must be plain arrays, but are of type Masked"):
        mml.evaluate(scores, da.ma.masked_equal(target, 2))


# Files that change.


def rewrite_at(call, act):
    """Do something when a batch is finished."""
    calls = []

    def progress(done, rows):
        calls.append(done)
        if len(calls) == call:
            act()

    return progress


CHANGES = {
    "in place": lambda: np.lib.format.open_memmap("x.npy", mode="r+").__setitem__(
        slice(600, 700), 9
    ),
    "replaced": lambda: (
        np.save("z.npy", np.zeros((N, C), np.float32)),
        os.replace("z.npy", "x.npy"),
    ),
    "times kept": lambda: (
        (status := os.stat("x.npy")),
        np.save("x.npy", np.zeros((N, C), np.float32)),
        os.utime("x.npy", ns=(status.st_atime_ns, status.st_mtime_ns)),
    ),
    "labels": lambda: np.save("y.npy", np.zeros(N, int)),
    "truncated": lambda: os.truncate("x.npy", 5000),
    "removed": lambda: os.remove("x.npy"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_in_mid_run(files, change):
    with pytest.raises(mml.InputError, match=r"[xy]\.npy: .*(has changed|cannot be (read|found))"):
        mml.evaluate(
            "x.npy", "y.npy", chunk_size=10, workers=1, progress=rewrite_at(3, CHANGES[change])
        )


def test_a_file_that_changes_after_it_was_read(arrays, files):
    parts("part", arrays[0], 3)
    change = rewrite_at(20, lambda: np.save("part-0.npy", arrays[0][:234]))
    with pytest.raises(mml.InputError, match=r"part-0\.npy: the file has changed"):
        mml.evaluate("part-*.npy", "y.npy", chunk_size=10, workers=1, progress=change)


@pytest.mark.parametrize("when", ["run", "resume"])
def test_a_zarr_store_that_is_rewritten(arrays, files, when):
    zarr = pytest.importorskip("zarr")
    store = zarr.create_array(store="x.zarr", data=arrays[0], chunks=(50, C))

    class Stop(Exception):
        pass

    def change():
        if when == "resume":
            raise Stop
        store[600:700] = 0

    options = {"checkpoint": "ck", "chunk_size": 50, "workers": 1}
    with pytest.raises((mml.InputError, Stop), match=r"x\.zarr: the file has changed|"):
        mml.evaluate("x.zarr", "y.npy", progress=rewrite_at(3, change), **options)
    if when == "resume":
        store[600:700] = 0
    with pytest.raises(mml.InputError, match=r"begun with other inputs \(now: .*x\.zarr as"):
        mml.evaluate("x.zarr", "y.npy", **options)


# Zarr stores and HDF5 files.


@pytest.mark.parametrize("layout", ["plain", "sharded", "version 2", "hdf5"])
@pytest.mark.parametrize("what", ["labels", "scores"])
def test_chunks_that_were_never_written(arrays, files, fails, layout, what):
    array = arrays[1] if what == "labels" else arrays[0]
    path = "s.h5" if layout == "hdf5" else "s.zarr"
    if layout == "hdf5":
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w") as file:
            made = file.create_dataset("d", array.shape, array.dtype, chunks=(50, *array.shape[1:]))
            made[:650] = array[:650]
    else:
        zarr = pytest.importorskip("zarr")
        options = {"sharded": {"shards": (100, *array.shape[1:])}, "version 2": {"zarr_format": 2}}
        made = zarr.create_array(
            store=path, shape=array.shape, dtype=array.dtype, chunks=(50, *array.shape[1:]),
            fill_value=0, **options.get(layout, {}),
        )  # fmt: skip
        made[:650] = array[:650]
    filled = array.copy()
    filled[650:] = 0
    pair = ("x.npy", path) if what == "labels" else (path, "y.npy")
    plain = (arrays[0], filled) if what == "labels" else (filled, arrays[1])
    if what == "labels":
        assert "never written, and would be read as targets of the store's fill value" in fails(
            *pair
        )
    else:
        assert mml.evaluate(*pair) == mml.evaluate(*plain)
    assert "were never written" in fails(*pair, "--unwritten-chunks", "error")
    assert mml.evaluate(*pair, unwritten_chunks="fill") == mml.evaluate(*plain)


def test_all_chunks_are_there(arrays, files, wanted):
    zarr_file("x.zarr", arrays[0], shards=(200, C))
    zarr_file("y.zarr", arrays[1], shards=(200,), chunks=(50,), config={"write_empty_chunks": True})
    assert mml.evaluate("x.zarr", "y.zarr", unwritten_chunks="error", chunk_size=30) == wanted


# Parquet.


def by_class(scores, names):
    return {name: scores[:, i] for i, name in enumerate(names)}


def test_several_columns_for_one_number_a_sample(arrays, files, fails):
    one_hot = np.eye(C, dtype=int)[arrays[1]]
    parquet("y.parquet", **{f"y{i}": one_hot[:, i] for i in range(C)})
    np.save("x.npy", arrays[0])
    np.save("y.npy", arrays[1])
    told = "y.parquet: {} must be in one column, but 6 are named: y0, y1, y2, y3, y4, y5"
    assert told.format("targets") in fails("x.npy", "y.parquet#y*")
    options = {"--sample-weight": "sample weights", "--weight": "class weights"}
    for option, role in options.items():
        assert told.format(role) in fails("x.npy", "y.npy", option, "y.parquet#y*")


def test_integers_that_only_a_float_could_hold_are_no_scores(files, fails):
    parquet("x.parquet", a=np.zeros(4, np.int64), b=np.zeros(4, np.uint64))
    np.save("y.npy", np.zeros(4, np.int64))
    assert "scores must be float16, float32 or float64" in fails("x.parquet#a,b", "y.npy")


def test_parts_with_columns_in_another_order(arrays, files, wanted):
    names = [f"c{i}" for i in range(C)]
    scores, target = arrays
    os.mkdir("folder")
    parquet("folder/0.parquet", **by_class(scores[:300], names), y=target[:300])
    rest = by_class(scores[300:], names)
    parquet("folder/1.parquet", y=target[300:], **{name: rest[name] for name in reversed(names)})
    with pytest.raises(mml.InputError, match="cannot tell which columns hold the scores"):
        mml.evaluate("folder", "folder")  # in the second part they do not count upwards
    item = ",".join(names)
    figures = mml.evaluate(f"folder#{item}", "folder#y")
    assert figures == wanted
    assert figures.pairing[1]["scores"]["columns"] == names


def test_parts_whose_columns_differ(arrays, files, fails):
    scores, target = arrays
    os.mkdir("folder")
    parquet(
        "folder/0.parquet", **by_class(scores[:300], [f"c{i}" for i in range(C)]), y=target[:300]
    )
    parquet(
        "folder/1.parquet", **by_class(scores[300:], [f"d{i}" for i in range(C)]), y=target[300:]
    )
    line = fails("folder", "folder")
    assert "1.parquet: d0, d1, d2, d3, d4, d5 would be read of it, but c0, c1" in line
    assert "name what to read, as in folder/1.parquet#NAME (columns of scores in the order" in line


EXTRA = ["prob", "loss", "label_float", "__index_level_0__", "c6.5"]


@pytest.mark.parametrize("extra", EXTRA)
def test_an_extra_float_is_no_class(arrays, files, fails, wanted, extra):
    scores, target = arrays
    names = [f"c{i}" for i in range(C)]
    parquet("p.parquet", **by_class(scores, names), **{extra: scores[:, 0]}, y=target)
    line = fails("p.parquet", "p.parquet")
    assert "cannot tell which columns hold the scores; name them" in line
    assert mml.evaluate("p.parquet#c?", "p.parquet") == wanted
    assert mml.evaluate(f"p.parquet#{','.join(names)}", "p.parquet") == wanted


@pytest.mark.parametrize(
    "columns",
    [
        {"embedding": "scores"},
        {"features": "scores"},
        {"softmax": "scores"},
        {"bbox": "scores"},
        {"first": "scores", "second": "scores"},
        {"x": "scores", "p": "float"},
        {"cat": "float", "dog": "float"},
        {"c0": "float", "c1": "float", "c10": "float", "c2": "float"},
        {"c0": "float"},
    ],
    ids=lambda v: "-".join(v),
)
def test_scores_in_doubt_are_not_guessed(arrays, files, fails, columns):
    scores, target = arrays
    made = {"scores": list(scores), "float": scores[:, 0]}
    parquet("p.parquet", **{name: made[kind] for name, kind in columns.items()}, label=target)
    assert "cannot tell which columns hold the scores; name them, as in" in fails(
        "p.parquet", "p.parquet"
    )


def test_the_only_ones_are_guessed_and_told(arrays, files, wanted):
    scores, target = arrays
    parquet(
        "p.parquet",
        logits=list(scores),
        embedding=list(scores[:, :3]),
        label=target,
        p=scores[:, 0],
    )
    figures = mml.evaluate("p.parquet", "p.parquet")
    assert figures == wanted
    assert "p.parquet [logits] rows 0 to 699 with p.parquet [label]" in str(figures)


NO_LABELS = [
    "id",
    "index",
    "__index_level_0__",
    "row",
    "epoch",
    "step",
    "date",
    "best",
    "answer_len",
]


@pytest.mark.parametrize("column", NO_LABELS)
def test_an_index_is_no_label(arrays, files, fails, column):
    parquet("p.parquet", logits=list(arrays[0]), **{column: arrays[1]})
    assert "cannot tell which columns hold the targets" in fails("p.parquet", "p.parquet")


def test_names_with_commas_and_dots(arrays, files, wanted):
    scores, target = arrays
    names = ["a,b", "a.b", 'say "hi"', "c", "d#e", "f"]
    parquet("p.parquet", **by_class(scores, names), **{"the, label": target})
    item = '"a,b",a.b,"say ""hi""",c,d#e,f'
    assert mml.evaluate(f"p.parquet#{item}", "p.parquet#the, label") == wanted


def test_checksums_of_pages_are_verified(arrays, files, fails):
    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    table = pa.table(by_class(arrays[0], [f"c{i}" for i in range(C)]))
    pq.write_table(
        table, "p.parquet", compression="none", use_dictionary=False, write_page_checksum=True
    )
    with open("p.parquet", "r+b") as file:
        file.seek(1000)
        file.write(b"\x01")
    assert "p.parquet: rows 0 to 699 cannot be read (" in fails("p.parquet", "y.npy")


# Odd inputs.


def test_the_same_scores_twice(arrays, files, fails):
    parts("part", arrays[0], 2)
    with pytest.raises(mml.InputError, match=r"part-1\.npy: is given twice; its samples would"):
        mml.evaluate(["part-*.npy", "part-1.npy"], "y.npy")
    half = np.split(arrays[0], 2)
    assert mml.evaluate(half * 2, ["y.npy", "y.npy"]).samples == 2 * N  # labels may serve twice


def test_class_weights_in_files(files, fails, wanted):
    np.save("w-0.npy", np.arange(C, dtype="f4"))
    np.save("w-1.npy", np.arange(C))
    np.save("none.npy", np.float64(1))
    np.save("two.npy", np.ones((C, 2)))
    np.save("text.npy", np.asarray(["a"] * C))
    np.savez("both.npz", a=np.ones(C), b=np.ones(C))
    os.mkdir("folder")
    for i in range(2):
        parquet(f"folder/{i}.parquet", w=np.ones(C))
    for given, message in (
        ("w-*.npy", "w-*.npy: stands for 2 files, but the class weights must be in one"),
        ("folder", "folder: stands for 2 files, but the class weights must be in one"),
        ("none.npy", "none.npy: class weights must have shape (C,), but have shape ()"),
        ("two.npy", "two.npy: class weights must have shape (C,), but have shape (6, 2)"),
        ("text.npy", "text.npy: class weights must be real numbers, but are <U1"),
        ("both.npz", "both.npz: holds 2 arrays; name the one with the class weights"),
        ("1,2,3,4,", "--weight '1,2,3,4,': must be numbers with commas between them, or a file"),
        ("1,,3", "--weight '1,,3': must be numbers with commas between them, or a file"),
        ("gone.npy", "gone.npy: there is no such file"),
    ):
        assert message in fails("x.npy", "y.npy", "--weight", given)
    weighted = mml.evaluate("x.npy", "y.npy", weight=np.arange(C, dtype=float))
    assert weighted != wanted


@pytest.mark.parametrize("name", ["link.npy", "link*.npy"])
def test_a_link_to_nothing(files, fails, name):
    os.symlink("gone.npy", "link.npy")
    assert "link.npy is a link to what does not exist; check the path" in fails(name, "y.npy")


def test_a_zarr_store_with_links_that_is_rewritten(arrays, files):
    store = zarr_file("x.zarr", arrays[0])
    os.rename("x.zarr/c", "chunks")
    os.symlink("../chunks", "x.zarr/c")

    def change():
        store[600:700] = 1

    with pytest.raises(mml.InputError, match=r"x\.zarr: the file has changed"):
        mml.evaluate("x.zarr", "y.npy", chunk_size=50, workers=1, progress=rewrite_at(3, change))


def test_an_empty_path_is_not_this_folder(arrays, files, fails):
    parquet("p.parquet", logits=list(arrays[0]), label=arrays[1])
    assert "'': the path is empty; give that of a file" in fails("", "y.npy")
    assert "'': the path is empty" in fails("x.npy", "")
    with pytest.raises(TypeError, match="targets must be a path, an array, or a list of those, bu"):
        mml.evaluate("x.npy", None)


def test_an_item_where_there_is_one_array(files, fails):
    assert "x.npy: has no array 'logits'" in fails("x.npy#logits", "y.npy")


def test_members_of_archives_that_are_no_arrays_or_two(arrays, files, fails, wanted):
    import zipfile

    with zipfile.ZipFile("x.npz", "w") as archive:
        archive.write("x.npy")
        archive.writestr("readme.txt", "text")
        assert archive.namelist() == ["x.npy", "readme.txt"]
    assert mml.evaluate("x.npz", "y.npy") == wanted
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile("x.npz", "a") as archive:
        archive.write("y.npy", "x.npy")
    assert "x.npz: holds 2 arrays named 'x'; rename one" in fails("x.npz#x", "y.npy")


def test_labels_of_several_integer_types(arrays, files, wanted):
    target = arrays[1]
    for kinds in (("i1", "u4"), (">i2", "<i8"), ("u1", "u8")):
        for i, kind in enumerate(kinds):
            np.save(f"label-{i}.npy", target[350 * i : 350 * i + 350].astype(kind))
        assert mml.evaluate("x.npy", "label-*.npy") == wanted
    np.save("label-0.npy", target[:350].astype("i1"))  # as floats, as NumPy joins them, they round
    with pytest.raises(mml.InputError, match="targets: no integer type holds those of int8 and ui"):
        mml.evaluate("x.npy", "label-*.npy")


@pytest.mark.parametrize("kind", ["f8", "U3", "?", "M8[s]", "O", "c8"])
def test_labels_that_are_no_integers(arrays, files, fails, kind):
    np.save("z.npy", arrays[1].astype(kind), allow_pickle=True)
    assert "z.npy: " in fails("x.npy", "z.npy")


@pytest.mark.parametrize("known", [False, True])
def test_periods_are_no_labels(files, known):
    """They are stored as integers, and seen as these until pandas has told Arrow of its types."""
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    days = pd.period_range("1970-01-01", periods=3, freq="D")
    pd.DataFrame({"when": days}).to_parquet("when.parquet")
    program = "import mml_arrayapi, numpy, sys\n" + "import pandas.core.arrays.arrow\n" * known
    program += "try: print(mml_arrayapi.evaluate(numpy.eye(3), sys.argv[1]))\n"
    program += "except mml_arrayapi.InputError as error: print(error)\n"
    for name, message in (
        ("when.parquet", "cannot tell which columns hold the targets"),
        ("when.parquet#when", "column 'when' is of the extension type pandas.period, whose"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, name], capture_output=True, text=True, check=True
        )
        assert message in done.stdout


@pytest.mark.parametrize("name", ["ray.data.arrow_tensor", "geoarrow.point"])
@pytest.mark.parametrize("fixed", [False, True])
def test_lists_whose_meaning_an_extension_type_tells(files, fails, name, fixed):
    """Whether the program knows the type or not."""
    pa = pytest.importorskip("pyarrow")

    class Points(pa.ExtensionType):
        def __init__(self):
            super().__init__(pa.list_(pa.float64(), 2) if fixed else pa.list_(pa.float64()), name)

        def __arrow_ext_serialize__(self):
            return b"[2, 1]"

        @classmethod
        def __arrow_ext_deserialize__(cls, storage, serialized):
            return cls()

    kind = Points()
    stored = pa.array([[1.0, 2.0], [2.0, 1.0]], kind.storage_type)
    parquet("p.parquet", logits=pa.ExtensionArray.from_storage(kind, stored))
    np.save("two.npy", np.arange(2))
    told = f"column 'logits' is of the extension type {name}, whose meaning is not known here"
    assert told in fails("p.parquet#logits", "two.npy")
    assert "p.parquet: " in fails("p.parquet", "two.npy")
    pa.register_extension_type(kind)
    try:
        assert told in fails("p.parquet#logits", "two.npy")
    finally:
        pa.unregister_extension_type(name)


@pytest.mark.parametrize("rows", [N, 10, 0])
def test_parquet_files_that_were_joined(arrays, files, fails, wanted, rows):
    """The last one's footer tells of pages by their place, where the first one's lie."""
    for name, count in (("first", N), ("last", rows)):
        parquet(f"{name}.parquet", label=arrays[1][:count][::-1].copy() if count else [])
    with open("both.parquet", "wb") as both:
        for name in ("first", "last"):
            with open(f"{name}.parquet", "rb") as one:
                both.write(one.read())
    told = "both.parquet: holds several Parquet files, one after another, of which only one"
    assert told in fails("x.npy", "both.parquet#label")


def test_joined_parquet_files_of_which_the_first_is_smaller(arrays, files, fails):
    parquet("a.parquet", label=arrays[1], logits=[[1.0] * C] * N)
    parquet("b.parquet", label=arrays[1], logits=list(arrays[0]))
    Path("ab.parquet").write_bytes(Path("a.parquet").read_bytes() + Path("b.parquet").read_bytes())
    assert "ab.parquet: holds several Parquet files" in fails("x.npy", "ab.parquet#label")


def test_texts_that_look_like_the_end_of_a_parquet_file(arrays, files, wanted):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = ["PAR1PAR1" * (1 + i % 5) for i in range(N)]
    table = pa.table({"text": texts, "logits": list(arrays[0]), "label": arrays[1]})
    for dictionary in (False, True):
        options = {"compression": "none", "use_dictionary": dictionary, "write_page_index": True}
        pq.write_table(table, "p.parquet", **options)
        assert mml.evaluate("p.parquet", "p.parquet") == wanted


def test_parquet_files_with_indices_behind_the_pages(arrays, files, wanted):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for groups in (50, N):
        table = pa.table({"logits": list(arrays[0]), "label": arrays[1]})
        pq.write_table(table, "p.parquet", row_group_size=groups, write_page_index=True)
        assert mml.evaluate("p.parquet", "p.parquet") == wanted


def test_a_partition_that_stands_twice_in_a_path(arrays, files, fails):
    os.makedirs("t/label=0/label=1")
    parquet("t/label=0/label=1/p.parquet", logits=list(arrays[0]))
    assert "two folders of its path are partitions 'label'; rename one" in fails("t", "t#label")
    np.save("label.npy", arrays[1])
    assert mml.evaluate("t#logits", "label.npy") == mml.evaluate(*arrays)


@pytest.mark.filterwarnings("ignore")  # Zarr's own
@pytest.mark.parametrize("inner", ["", "/group/labels"])
@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_an_array_that_is_described_twice(arrays, files, fails, wanted, inner, scheme):
    zarr, fsspec = pytest.importorskip("zarr"), pytest.importorskip("fsspec")
    url = f"{scheme}twice{len(inner)}.zarr"
    fs = fsspec.filesystem("memory" if scheme else "file")
    for version, labels in ((2, np.roll(arrays[1], 1)), (3, arrays[1])):
        zarr.create_array(f"v{version}", data=labels, zarr_format=version, fill_value=9)
        fs.put(f"v{version}/", f"{url}{inner}/", recursive=True)
        if inner:
            told = {"zarr_format": version, "node_type": "group", "attributes": {}}
            name = ".zgroup" if version == 2 else "zarr.json"
            fs.pipe(f"{url}/{name}", json.dumps(told).encode())
        if version == 2:
            mml.evaluate("x.npy", f"{url}#{inner}" if inner else url)
    told = "the array is described twice, by zarr.json (version 3) and .zarray (version 2)"
    assert told in fails("x.npy", f"{url}#{inner}" if inner else url)
    if not scheme:
        for top in (files, url):
            shutil.make_archive("zipped.zarr", "zip", top, url if top == files else None)
            assert told in fails(
                "x.npy", f"zipped.zarr.zip#{inner}" if inner else "zipped.zarr.zip"
            )


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore")  # consolidated metadata is not in Zarr's specification
def test_consolidated_metadata_that_is_stale(arrays, files, wanted, version):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group("s.zarr", mode="w", zarr_format=version)
    for name, array in (("x", arrays[0]), ("y", arrays[1])):
        made = group.create_array(
            name, shape=(600, *array.shape[1:]), chunks=(100, *array.shape[1:]), dtype=array.dtype,
            fill_value=9,
        )  # fmt: skip
        made[...] = array[:600]
    zarr.consolidate_metadata("s.zarr")
    for name, array in (("x", arrays[0]), ("y", arrays[1])):
        made = zarr.open_array(f"s.zarr/{name}", mode="r+")
        made.resize(array.shape)
        made[600:] = array[600:]
    assert mml.evaluate("s.zarr#x", "s.zarr#y") == wanted


@pytest.mark.parametrize("dtype", [bool, str])
@pytest.mark.filterwarnings("ignore")
def test_labels_of_zarr_that_are_no_numbers(arrays, files, fails, dtype):
    zarr_file("y.zarr", arrays[1].astype(dtype), fill_value=dtype())
    assert "y.zarr: targets must be integers, but are" in fails("x.npy", "y.zarr")


@pytest.mark.parametrize("path", ["r.npy", "r.npz", "r.h5", "r.zarr"])
@pytest.mark.filterwarnings("ignore")  # records are not in Zarr's specification
def test_records(arrays, files, fails, path):
    records = np.zeros(N, [("label", "i8"), ("share", "f4")])
    if path == "r.zarr":
        pytest.importorskip("zarr").create_array(path, data=records)
    elif path == "r.h5":
        hdf5_file(path, records)
    else:
        (np.save if path == "r.npy" else np.savez)(path, records)
    message = f"{path}: holds records with the fields label, share, not numbers; write the "
    assert f"{message}targets as an array of their own" in fails("x.npy", path)
    assert f"{message}scores as an array of their own" in fails(path, "y.npy")
    assert f"{message}sample weights" in fails("x.npy", "y.npy", "--sample-weight", path)
    with pytest.raises(mml.InputError, match="targets: holds records with the fields label, share"):
        mml.evaluate(arrays[0], records)


def test_links_and_layouts_of_hdf5(arrays, files, fails, wanted):
    h5py = pytest.importorskip("h5py")
    scores, target = arrays
    with h5py.File("s.h5", "w") as file:
        file["x"] = scores.astype(">f4")
        file["link"], file["nothing"] = h5py.SoftLink("/x"), h5py.SoftLink("/none")
        compact = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        compact.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple((N,))
        made = h5py.h5d.create(file.id, b"y", h5py.h5t.NATIVE_INT64, space, compact)
        made.write(h5py.h5s.ALL, h5py.h5s.ALL, target)
        file["empty"] = h5py.Empty("f4")
    for name in ("x", "link"):
        assert mml.evaluate(f"s.h5#{name}", "s.h5#y", chunk_size=300) == wanted
    assert "s.h5: has no array 'nothing'" in fails("s.h5#nothing", "y.npy")
    assert "s.h5#empty: has no shape (it is empty)" in fails("s.h5#empty", "y.npy")
    with (
        h5py.File("s.h5") as file,
        pytest.raises(mml.InputError, match="scores: has no shape"),
    ):
        mml.evaluate(file["empty"], target)


@pytest.mark.parametrize("kind", ["virtual", "external", "link", "link to a folder", "gone"])
@pytest.mark.parametrize("option", [[], ["--unwritten-chunks", "fill"]], ids=["plain", "fill"])
def test_values_in_other_files_of_hdf5(arrays, files, fails, kind, option):
    """Whether those change or become shorter is not seen."""
    h5py = pytest.importorskip("h5py")
    scores, target = arrays
    with h5py.File("other.h5", "w") as file:
        file["folder/x"] = scores
    with h5py.File("s.h5", "w") as file:
        layout = h5py.VirtualLayout((N, C), "f4")
        layout[:] = h5py.VirtualSource("other.h5", "folder/x", shape=(N, C))
        file.create_virtual_dataset("virtual", layout)
        external = [("x.bin", 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("external", scores.shape, "f4", external=external)[...] = scores
        file["link"] = h5py.ExternalLink("other.h5", "folder/x")
        file["folder"] = h5py.ExternalLink("other.h5", "folder")
        file["soft"] = h5py.SoftLink("/folder/x")
        file["gone"] = h5py.ExternalLink("gone.h5", "x")
    item = "soft" if kind == "link to a folder" else kind
    line = fails(f"s.h5#{item}", "y.npy", *option)
    if kind == "gone":
        assert "s.h5: has no array 'gone'" in line
        return
    assert f"s.h5#{item}: its values are in other files, and would be read as the fill" in line
    if kind in ("virtual", "external"):
        with (
            h5py.File("s.h5") as file,
            pytest.raises(mml.InputError, match="scores: its values are in other files"),
        ):
            mml.evaluate(file[kind], target)


def test_an_integer_among_the_columns_of_scores(arrays, files, fails):
    names = [f"c{i}" for i in range(C)]
    parquet("p.parquet", **by_class(arrays[0], names), count=arrays[1])
    line = fails("p.parquet#c*", "y.npy")
    assert "p.parquet: some of its columns are floats, some are not: c0 (float), " in line


def odd_columns():
    import decimal

    pa = pytest.importorskip("pyarrow")
    numbers = list(range(N))
    return {
        "null": (pa.array([None, *numbers[1:]]), "column 'y' has empty values; fill or drop"),
        "decimal": (pa.array(map(decimal.Decimal, numbers), pa.decimal128(9, 0)), "but are object"),
        "time": (pa.array(numbers, pa.timestamp("us")), "but are datetime64[us]"),
        "duration": (pa.array(numbers, pa.duration("us")), "but are timedelta64[us]"),
        "text": (pa.array(map(str, numbers)).dictionary_encode(), "but are object"),
        "bool": (pa.array([True] * N), "but are bool"),
    }


@pytest.mark.parametrize("kind", ["null", "decimal", "time", "duration", "text", "bool"])
def test_columns_that_are_no_labels(files, fails, kind):
    column, message = odd_columns()[kind]
    parquet("p.parquet", y=column)
    assert message in fails("x.npy", "p.parquet#y")


@pytest.mark.parametrize("kind", ["null list", "null score", "nested", "integers"])
def test_columns_that_are_no_scores(arrays, files, fails, kind):
    rows = arrays[0].tolist()
    made = {
        "null list": [None, *rows[1:]],
        "null score": [[None] * C, *rows[1:]],
        "nested": [[row] for row in rows],
        "integers": [[1] * C] * N,
    }
    parquet("p.parquet", x=made[kind])
    assert "p.parquet" in fails("p.parquet#x", "y.npy")


@pytest.mark.parametrize("row", [0, 699], ids=["first row", "last row"])
def test_tensors_with_empty_values(arrays, files, fails, row):
    pa = pytest.importorskip("pyarrow")
    numbers = arrays[0].reshape(-1).tolist()
    numbers[row * C + 2] = None
    kind = pa.fixed_shape_tensor(pa.float32(), (C,))
    storage = pa.FixedSizeListArray.from_arrays(pa.array(numbers, pa.float32()), C)
    parquet("p.parquet", x=pa.ExtensionArray.from_storage(kind, storage))
    assert "column 'x': lists hold empty values; fill or drop them" in fails("p.parquet#x", "y.npy")


SPARSE = {"type": 0, "size": C, "indices": [0, 2], "values": [1.0, 2.0]}
DENSE = {"type": 1, "size": None, "indices": None, "values": [0.5] * C}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, ""),
        ({"indices": [], "values": []}, ""),
        ({"indices": [-1, 2]}, "indices are not one for each value, ascending from 0 to 5 at most"),
        ({"indices": [0, C]}, "indices are not one for each value"),
        ({"indices": [2, 2]}, "indices are not one for each value"),
        ({"indices": [2, 0]}, "indices are not one for each value"),
        ({"indices": [2]}, "indices are not one for each value"),
        ({"indices": None}, "lists hold empty values"),
        ({"indices": [0, None]}, "lists hold empty values"),
        ({"values": None}, "lists hold empty values"),
        ({"values": [1.0, None]}, "lists hold empty values"),
        ({"size": None}, "has vectors of different sizes"),
        ({"size": C + 1}, "has vectors of different sizes"),
        ({"type": None}, "has vectors whose type is neither 0 nor 1"),
        ({"type": 2}, "has vectors whose type is neither 0 nor 1"),
        ({**DENSE, "values": None}, "lists hold empty values"),
        ({**DENSE, "values": [None] * C}, "lists hold empty values"),
        ({**DENSE, "values": [0.5]}, "has vectors of different sizes"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_vectors_of_spark(files, fails, row, message):
    pa = pytest.importorskip("pyarrow")
    fields = [("type", pa.int8()), ("size", pa.int32())]
    fields += [("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
    kind = pa.struct(fields)
    np.save("y.npy", np.arange(4))
    parquet("p.parquet", x=pa.array([SPARSE | row, DENSE, SPARSE, DENSE], kind))
    if message:
        assert "column 'x'" in (line := fails("p.parquet#x", "y.npy"))
        assert message in line
        return
    plain = np.asarray([[1, 0, 2, 0, 0, 0], [0.5] * C] * 2)
    if row:
        plain[0] = 0
    assert mml.evaluate("p.parquet#x", "y.npy") == mml.evaluate(plain, np.arange(4))
    parquet("p.parquet", x=pa.array([SPARSE | row | {"size": None}], kind))
    assert "has vectors of different sizes" in fails("p.parquet#x", "y.npy")


def test_a_column_that_is_there_twice(arrays, files, fails):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = [pa.array(arrays[0].tolist()), pa.array(["a"] * N), pa.array(["b"] * N)]
    pq.write_table(pa.Table.from_arrays(columns, ["logits", "note", "note"]), "d.parquet")
    line = fails("d.parquet#logits", "y.npy")
    assert "d.parquet#logits: has several columns of one name; rename them" in line


@pytest.mark.parametrize("item", ["c*,c1", "c1,c1", "c1,c*"])
def test_a_column_twice(arrays, files, fails, item):
    parquet("p.parquet", **by_class(arrays[0], [f"c{i}" for i in range(C)]))
    assert f"p.parquet#{item}: column 'c1' is named twice" in fails(f"p.parquet#{item}", "y.npy")


@pytest.mark.parametrize("targets", ["hive", "hive#label", "hive/*/*.parquet#label"])
def test_a_partition_that_is_a_column_too(arrays, files, fails, wanted, targets):
    scores, target = arrays
    os.makedirs("hive/label=3")
    parquet("hive/label=3/0.parquet", logits=list(scores), label=target.astype("i4"))
    line = fails("hive", targets)
    assert "0.parquet" in line
    assert "has a column 'label', and is in a folder of the partition label=3; drop one" in line
    assert mml.evaluate("hive", "hive/label=3/0.parquet") == wanted
    assert mml.evaluate("hive#logits", "y.npy") == wanted


def test_what_spark_leaves_beside_its_parts(arrays, files, wanted):
    os.mkdir("folder")
    for i in (10, 2):
        rows = slice(0, 350) if i == 2 else slice(350, N)
        parquet(f"folder/part-{i}.parquet", logits=list(arrays[0][rows]), label=arrays[1][rows])
    for name in ("_SUCCESS", "_metadata", ".part-2.parquet.crc", "_temporary.parquet"):
        open(f"folder/{name}", "w").close()
    for folder in ("folder", "folder/"):
        assert mml.evaluate(folder, folder) == wanted


def test_hidden_files_of_other_file_systems(arrays, files, wanted):
    fsspec = pytest.importorskip("fsspec")
    os.mkdir("folder")
    for name, rows in (("part-0", slice(0, 350)), ("part-1", slice(350, N)), ("_tmp", slice(0, 9))):
        parquet(f"folder/{name}.parquet", logits=list(arrays[0][rows]), label=arrays[1][rows])
    shutil.copy("folder/_tmp.parquet", "folder/.part-9.parquet")
    for archive, inner in (("folder.zip", ""), ("inner.zip", "inner/")):
        with zipfile.ZipFile(archive, "w") as opened:
            for name in os.listdir("folder"):
                opened.write(f"folder/{name}", inner + name)
    memory = fsspec.filesystem("memory")
    memory.put("folder", "/hidden", recursive=True)
    for place in (
        *("folder", "folder/", "zip://::folder.zip", "zip://inner::inner.zip"),
        *("zip://inner/::inner.zip", "memory://hidden", "memory://hidden/"),
        *("folder/*part-*.parquet", "memory://hidden/*part-*.parquet", "zip://*part*::folder.zip"),
        *("memory://hidd*/*part-*", "zip://in*/*part*::inner.zip", "memory://hidden/**/p*"),
    ):
        assert mml.evaluate(place, place) == wanted, place
    for place in ("folder/.part*", "memory://hidden/.part*", "zip://.part*::folder.zip"):
        assert mml.evaluate(place, place).samples == 9
    memory.rm("/hidden", recursive=True)


def test_names_with_odd_characters(arrays, files, wanted):
    os.mkdir("a b#c%20[1]")
    np.save("a b#c%20[1]/x 1.npy", arrays[0])
    np.savez("a b#c%20[1]/h#.npz", k=arrays[0], j=arrays[0])
    np.save("x[1].npy", arrays[0])
    np.save("x1.npy", arrays[0][:3])
    os.symlink("x.npy", "link.npy")
    for path in ("a b#c%20[1]/x 1.npy", "a b#c%20[1]/h#.npz#k", "x[1].npy", "link.npy"):
        assert mml.evaluate(path, "y.npy") == wanted


def test_options_of_the_wrong_type(files):
    for options, message in (
        ({"workers": 1.5}, "workers must be an integer, but is 1.5"),
        ({"chunk_size": "10"}, "chunk_size must be an integer, but is '10'"),
        ({"axis": None}, "axis must be an integer, but is None"),
        ({"timeout": "3"}, "timeout must be a number, but is '3'"),
        ({"progress": 1}, "progress must be a callable, True or False, but is 1"),
    ):
        with pytest.raises(TypeError, match=message):
            mml.evaluate("x.npy", "y.npy", **options)


@pytest.mark.parametrize(
    ("shape", "places", "message"),
    [
        ([N, C], [0, 16800], ""),
        ([N, C], [-8, 16792], "its header has [-8, 16792] where sizes must be"),
        ([N, C], [8, 16808], "the bytes [8, 16808] of an array do not follow those before, to 0"),
        ([N, C], [16800, 0], "the bytes [16800, 0] of an array do not follow those before"),
        ([N, C], [0.0, 16800.0], "its header has [0.0, 16800.0] where sizes must be"),
        ([N, C], [0, 16800, 16800], "the bytes [0, 16800, 16800] of an array"),
        ([N, C], [], "the bytes [] of an array do not follow those before, to 0"),
        ([-N, -C], [0, 16800], "its header has [-700, -6] where sizes must be"),
        ([N, C - 1], [0, 16800], "its shape does not fit the bytes that it has"),
    ],
    ids=str,
)
def test_safetensors_by_hand(arrays, files, fails, wanted, shape, places, message):
    safetensors("s.safetensors", arrays[0], x={"shape": shape, "data_offsets": places})
    if message:
        assert f"s.safetensors: cannot be read ({message}" in fails("s.safetensors", "y.npy")
    else:
        assert mml.evaluate("s.safetensors", "y.npy") == wanted


def safetensors(path, array, **told):
    write_safetensors(path, array, {name: {"dtype": "F32", **one} for name, one in told.items()})


def write_safetensors(path, array, header):
    text = json.dumps(header).encode()
    Path(path).write_bytes(len(text).to_bytes(8, "little") + text + array.tobytes())


WHOLE = {"dtype": "F32", "shape": [N, C], "data_offsets": [0, 16800]}


@pytest.mark.parametrize(
    "header",
    [
        *(None, [1], "x", {"x": None}, {"x": [1]}, {"x": "x"}, {"x": WHOLE, "z": None}),
        *({"x": {key: WHOLE[key] for key in WHOLE if key != gone}} for gone in WHOLE),
        *({"x": WHOLE | {key: None}} for key in WHOLE),
        {"x": WHOLE | {"dtype": ["F32"]}},
    ],
    ids=str,
)
def test_safetensors_whose_header_describes_no_arrays(arrays, files, fails, header):
    write_safetensors("s.safetensors", arrays[0], header)
    line = fails("s.safetensors#x", "y.npy")
    assert "s.safetensors#x: cannot be read (its header is damaged: " in line
    assert line.endswith(" describes no array); write or copy it again\n")


@pytest.mark.parametrize("second", [[0, 16800], [8400, 16800], [16000, 16800]], ids=str)
def test_safetensors_that_overlap(arrays, files, fails, second):
    first = {"shape": [N, C], "data_offsets": [0, 16800]}
    other = {"shape": [(second[1] - second[0]) // 4], "data_offsets": second}
    safetensors("s.safetensors", arrays[0], x=first, other=other)
    assert f"the bytes {second} of an array do not follow those before, to 16800" in fails(
        "s.safetensors#x", "y.npy"
    )


def test_npy_with_a_negative_shape(arrays, files, fails):
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (-700, -6), }".ljust(117) + "\n"
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()
    Path("n.npy").write_bytes(header + arrays[0].tobytes())
    assert "n.npy: cannot be read (its header has [-700, -6] where" in fails("n.npy", "y.npy")


def test_names_with_a_number_sign(arrays, files, fails):
    """A # may be part of a file's name, local or remote, and of a pattern."""
    import fsspec

    half = len(arrays[0]) // 2
    for name, array in {
        "run#1.npy": arrays[0],
        "part#1-0.npy": arrays[0][:half],
        "part#1-1.npy": arrays[0][half:],
    }.items():
        np.save(name, array)
        fsspec.filesystem("memory").pipe_file(f"/sign/{name}", Path(name).read_bytes())
    np.savez("box#1.npz", x=arrays[0])
    wanted = mml.evaluate("x.npy", "y.npy")
    for folder in ("", f"file://{files}/", "memory://sign/"):
        assert mml.evaluate(f"{folder}run#1.npy", "y.npy") == wanted
        assert mml.evaluate(f"{folder}part#1-*.npy", "y.npy") == wanted
        assert f"{folder}run#2.npy: there is no such file" in fails(f"{folder}run#2.npy", "y.npy")
    assert mml.evaluate("box#1.npz#x", "y.npy") == wanted
    assert "box#1.npz: has no array 'z'" in fails("box#1.npz#z", "y.npy")


# Lists of patterns, links, archives.


@pytest.fixture
def folders(arrays, files):
    """Scores and labels in folders a and b: the names of the former are in no order."""
    for letter, half in (("a", slice(0, 350)), ("b", slice(350, N))):
        os.mkdir(letter)
        parts(f"{letter}/x", arrays[0][half], 2, ("dog", "cat"))
        parts(f"{letter}/y", arrays[1][half], 2)
        parts(f"{letter}/z", arrays[0][half], 2)


@pytest.mark.parametrize("targets", ["y.npy", ["a/y-*.npy", "b/y-*.npy"]], ids=["one", "patterns"])
@pytest.mark.parametrize(
    "scores", [["a/x-*.npy", "b/x-*.npy"], ["a/x-*.npy", "b/x-dog.npy"]], ids=str
)
def test_each_pattern_of_a_list_is_looked_at(folders, fails, scores, targets):
    with pytest.raises(mml.InputError, match="in doubt"):
        mml.evaluate(scores, targets)


def test_patterns_beside_lists(folders, wanted):
    patterns, listed = ["a/z-*.npy", "b/z-*.npy"], [f"{f}/z-{i}.npy" for f in "ab" for i in (0, 1)]
    labels = ["a/y-*.npy", "b/y-*.npy"]
    for scores in (patterns, listed, ["a/z-*.npy", "b/z-0.npy", "b/z-1.npy"]):
        assert mml.evaluate(scores, labels, chunk_size=50) == wanted
        assert mml.evaluate(scores, "y.npy", chunk_size=50) == wanted
    in_order = ["a/y-0.npy", "a/y-1.npy"]
    with pytest.raises(
        mml.InputError,
        match=r"x-cat.npy to x-dog.npy: .* not, file by file, those of y-0.npy to y-1",
    ):
        mml.evaluate("a/x-*.npy", in_order)


def test_equal_numbers_are_told_apart_by_their_text(arrays, files, wanted):
    for names in (("1", "01"), ("01", "1")):
        for name, array in (("part", arrays[0]), ("label", arrays[1])):
            parts(name, array, 2, names)
        pairing = mml.evaluate("part-*.npy", "label-*.npy").pairing
        for line in pairing:
            assert line["targets"][0]["name"] == line["scores"]["name"].replace("part", "label")


def test_the_same_under_another_name(arrays, files, fails):
    os.symlink("x.npy", "link.npy")
    os.link("x.npy", "hard.npy")
    for name in ("link.npy", "hard.npy"):
        with pytest.raises(mml.InputError, match=f"{name}: is given twice, as x.npy too"):
            mml.evaluate(["x.npy", name], ["y.npy", "y.npy"])
    os.mkdir("p")
    columns = [f"c{i}" for i in range(C)]
    parquet("p/part-0.parquet", **by_class(arrays[0], columns))
    with pytest.raises(mml.InputError, match="is given twice"):
        mml.evaluate(["p", "p#c*"], ["y.npy", "y.npy"])
    os.symlink("part-0.parquet", "p/latest.parquet")
    assert "is given twice" in fails("p", "y.npy")


def test_the_same_through_a_cache(arrays, files):
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://cached.npy", "wb") as file:
        np.save(file, arrays[0])
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.write("x.npy")
    here = os.path.abspath("x.npy")
    for names in (
        ("memory://cached.npy", "simplecache::memory://cached.npy"),
        ("filecache::memory://cached.npy", "simplecache::memory://cached.npy"),
        ("simplecache::memory://cached.n*", "memory://c*d.npy"),
        ("x.npy", f"simplecache::file://{here}"),
        (f"filecache::file://{here}", f"file://{here}"),
        ("zip://x.npy::x.zip", "simplecache::zip://x.npy::x.zip"),
        ("simplecache::zip://*.npy::x.zip", f"zip://x.npy::file://{os.path.abspath('x.zip')}"),
    ):
        with pytest.raises(mml.InputError, match=r"is given twice, as .* too; its samples would"):
            mml.evaluate([*names], ["y.npy", "y.npy"])
    fsspec.filesystem("memory").rm("/cached.npy")


def test_the_same_array_by_two_names(arrays, files):
    zarr = pytest.importorskip("zarr")
    zarr.open_group("s.zarr", mode="w")
    zarr_file("s.zarr/x", arrays[0])
    hdf5_file("x.h5", arrays[0])
    for names in (["s.zarr#x", "s.zarr/x"], ["x.h5#data", "x.h5#/data"]):
        with pytest.raises(mml.InputError, match="is given twice"):
            mml.evaluate(names, ["y.npy", "y.npy"])


def test_members_of_two_archives(arrays, files, wanted):
    for i, half in enumerate((slice(0, 350), slice(350, N))):
        np.save("half.npy", arrays[0][half])
        with zipfile.ZipFile(f"{i}.zip", "w") as archive:
            archive.write("half.npy")
    names = [f"zip://half.npy::{i}.zip" for i in (0, 1)]
    figures = mml.evaluate(names, "y.npy")
    assert figures == wanted
    figures = mml.evaluate([f"zip://h*.npy::{i}.zip" for i in (0, 1)], "y.npy")
    found = [f"zip://half.npy::{os.path.abspath(f'{i}.zip')}" for i in (0, 1)]
    assert [line["scores"]["name"] for line in figures.pairing] == found
    with pytest.raises(mml.InputError, match="is given twice"):
        mml.evaluate([names[0], names[0]], "y.npy")

    def rewrite(*_):
        os.utime("1.zip")

    with pytest.raises(mml.InputError, match="the file has changed since"):
        mml.evaluate(names, "y.npy", progress=rewrite)


def test_suffixes_in_capitals(arrays, files, wanted):
    os.mkdir("p")
    for i, name in enumerate(("part-0.parquet", "part-1.PARQUET", "part-2.pq")):
        part = (np.array_split(array, 3)[i] for array in arrays)
        parquet(f"p/{name}", **dict(zip(("logits", "label"), map(list, part), strict=True)))
    assert mml.evaluate("p", "p") == wanted


def test_a_partition_is_no_label(arrays, files, fails):
    for rank in (0, 1):
        os.makedirs(f"hive/rank={rank}")
        names = [f"class {y}" for y in arrays[1]]
        parquet(f"hive/rank={rank}/part-0.parquet", logits=list(arrays[0]), label=names)
    assert "cannot tell which columns hold the targets" in fails("hive", "hive")


# Which kernel runs.


@pytest.mark.parametrize("scheduler", ["threads", "processes"])
@pytest.mark.filterwarnings("ignore")  # of distributed
def test_the_kernel_is_the_callers(arrays, files, scheduler):
    rng = np.random.default_rng(5)
    x, y = rng.standard_normal((1000, 200)).astype("f4"), rng.integers(0, 200, 1000)
    named = mml.evaluate(x, y, backend="generic")
    with mml.use_backend("generic"):
        block = mml.evaluate(x, y, scheduler=scheduler)
    assert block.kernel == "generic"
    assert block == named
    lazy = [pytest.importorskip("dask.array").from_array(a, chunks=100) for a in (x, y)]
    with mml.use_backend("generic"):
        assert mml.evaluate(*lazy).loss == named.loss


def test_a_weighted_loss_beyond_float64(files):
    x = np.asarray([[1e300, 0], [0, 0]])
    figures = mml.evaluate(x, np.asarray([1, 0]), sample_weight=np.asarray([1e10, 1e10]))
    assert figures.loss == mml.evaluate(x, np.asarray([1, 0])).loss
    with_infinity = mml.evaluate(x, np.asarray([1, 0]), sample_weight=np.asarray([1e10, 0.0]))
    assert with_infinity.loss == 5e299


def test_classes_of_the_highest_scores_are_different_ones(files):
    x = np.asarray([[-math.inf, 1.0, -math.inf, -math.inf]])
    highest = mml.evaluate(x, np.asarray([1])).worst[0].highest
    assert [c for c, _ in highest] == [1, 0, 2]


def test_patterns_of_one_folder_are_looked_at_by_themselves(arrays, files, wanted):
    for letter, half in (("a", slice(0, 350)), ("b", slice(350, N))):
        parts(letter, arrays[0][half], 2)
    assert mml.evaluate(["a-*.npy", "b-*.npy"], "y.npy", chunk_size=50) == wanted
    assert mml.evaluate(["a-*.npy", "b-*.npy"], arrays[1], chunk_size=50).loss == wanted.loss


@pytest.mark.parametrize(
    ("scores", "labels", "fit"),
    [((0, 1, 2), (1, 2, 3), True), ((0, 1, 2), (10, 11, 12), False), ((0, 1, 2), (2, 3, 4), False)],
    ids=["from 0 and 1", "from 10", "from 2"],
)
def test_numbers_that_begin_elsewhere(arrays, files, fails, scores, labels, fit):
    parts("part", arrays[0], 3, scores)
    parts("label", arrays[1], 3, labels)
    if fit:
        assert mml.evaluate("part-*.npy", "label-*.npy").samples == N
    else:
        assert "in doubt which belong together" in fails("part-*.npy", "label-*.npy")


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_items_within_archives(arrays, files, wanted, archive):
    np.savez("m.npz", logits=arrays[0], labels=arrays[1])
    parquet("p.parquet", **by_class(arrays[0], [f"c{i}" for i in range(C)]))
    if archive == "zip":
        with zipfile.ZipFile("a.zip", "w") as made:
            made.write("m.npz")
            made.write("p.parquet")
    else:
        with tarfile.open("a.tar", "w") as made:
            made.add("m.npz")
            made.add("p.parquet")
    chain = f"::a.{archive}"
    member = f"{archive}://m.npz{chain}"
    assert mml.evaluate(f"{member}#logits", f"{member}#labels") == wanted
    assert mml.evaluate(f"{archive}://p.parquet{chain}#c*", "y.npy") == wanted
    same = f"{archive}://m.npz::file://{os.path.abspath(f'a.{archive}')}#logits"
    with pytest.raises(mml.InputError, match="is given twice"):
        mml.evaluate([f"{member}#logits", same], ["y.npy", "y.npy"])


def test_the_only_array_by_its_name_too(arrays, files):
    zarr = pytest.importorskip("zarr")
    np.savez("x.npz", logits=arrays[0])
    hdf5_file("x.h5", arrays[0])
    zarr.open_group("s.zarr", mode="w").create_group("run")
    zarr_file("s.zarr/run/x", arrays[0])
    for names in (["x.npz", "x.npz#logits"], ["x.h5#data", "x.h5"], ["s.zarr", "s.zarr#run/x"]):
        with pytest.raises(mml.InputError, match=r"is given twice, as .* too"):
            mml.evaluate(names, ["y.npy", "y.npy"])


@pytest.mark.parametrize("cache", ["simplecache", "filecache"])
def test_caches_are_not_those_of_the_evaluation_before(arrays, files, wanted, cache):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put_file("x.npy", "/cached/x.npy")
    url = f"{cache}::memory://cached/x.npy"
    assert mml.evaluate(url, "y.npy") == wanted
    np.save("x.npy", arrays[0] * 2)
    memory.put_file("x.npy", "/cached/x.npy")
    assert mml.evaluate(url, "y.npy").loss == mml.evaluate(arrays[0] * 2, arrays[1]).loss


def test_a_column_that_is_a_partition_too_is_no_matter_if_it_is_not_read(arrays, files, fails):
    for label in (0, 1):
        os.makedirs(f"hive/label={label}/user=12345678901/x=__HIVE_DEFAULT_PARTITION__")
        path = f"hive/label={label}/user=12345678901/x=__HIVE_DEFAULT_PARTITION__/0.parquet"
        parquet(path, logits=list(arrays[0]), label=arrays[1], truth=arrays[1])
    assert mml.evaluate("hive", "hive#truth").samples == 2 * N
    assert "has a column 'label', and is in a folder of the partition label=0" in fails(
        "hive", "hive#label"
    )


def test_negative_partitions_beside_a_null_one(arrays, files, wanted):
    for label in range(-1, C):
        os.makedirs(f"hive/label={label}/x=__HIVE_DEFAULT_PARTITION__")
        rows = arrays[1] == label if label >= 0 else slice(0, 3)
        logits = list(arrays[0][rows])
        parquet(f"hive/label={label}/x=__HIVE_DEFAULT_PARTITION__/0.parquet", logits=logits)
    figures = mml.evaluate("hive", "hive#label", ignore_index=-1)
    assert (figures.samples, figures.ignored) == (N, 3)
    assert figures.loss == wanted.loss


# What is paired and read must be beyond doubt, whatever the numbers in the names.

SMALL = np.eye(2, dtype=np.float32)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(["p-0-val", "p-1-test"], ["g-0-test", "g-1-val"]), (["s1_a", "s2_b"], ["l1_b", "l2_a"])],
    ids=["numbers first", "numbers in between"],
)
def test_names_that_contradict_each_other(files, fails, ours, theirs):
    for names, values in ((ours, SMALL), (theirs, np.asarray([0, 1]))):
        for name in names:
            np.save(f"{name}.npy", values)
    line = fails(f"{ours[0][0]}*-*.npy" if "-" in ours[0] else "s*.npy", f"{theirs[0][0]}*.npy")
    assert "it is in doubt which belong together" in line


@pytest.mark.parametrize("labels", [["dog", "cat"], [0.0, 1.0], None], ids=["text", "floats", "no"])
@pytest.mark.parametrize("other", ["prediction", "length"])
def test_no_other_integers_are_taken_for_labels(files, fails, labels, other):
    columns = {"logits": SMALL.tolist(), other: [0, 1]}
    parquet("p.parquet", **columns, **({} if labels is None else {"label": labels}))
    assert "cannot tell which columns hold the targets" in fails("p.parquet", "p.parquet")
    assert mml.evaluate("p.parquet", f"p.parquet#{other}").accuracy == 1


def test_enums_of_other_categories(files, fails):
    pl = pytest.importorskip("polars")
    os.mkdir("enums")
    for part, categories in enumerate((["cat", "dog"], ["dog", "cat"])):
        label = pl.Series(["cat", "dog"], dtype=pl.Enum(categories))
        pl.DataFrame({"logits": SMALL.tolist(), "label": label}).write_parquet(
            f"enums/part-{part}.parquet"
        )
    line = fails("enums", "enums")
    assert "part-1.parquet: the categories of its enum are ['dog', 'cat'], but those of" in line


@pytest.mark.parametrize("kind", ["scores", "targets", "weights"])
def test_parts_of_which_other_columns_would_be_read(files, fails, kind):
    os.mkdir("c")
    names = {"scores": ["logits", "confidence"], "targets": ["label", "kind"]}
    names["weights"] = ["share", "temperature"]
    for i in range(2):
        parquet(
            f"c/{i}.parquet",
            **{names["scores"][i if kind == "scores" else 0]: SMALL.tolist()},
            **{names["targets"][i if kind == "targets" else 0]: [0, 1]},
        )
        parquet(f"w-{i}.parquet", **{names["weights"][i if kind == "weights" else 0]: [1.0, 1.0]})
    line = fails("c", "c", "--sample-weight", "w-*.parquet")
    first, second = names[kind]
    assert f"1.parquet: {second} would be read of it, but {first} of" in line


def test_archives_of_which_other_arrays_would_be_read(files, fails):
    for i, name in enumerate(("logits", "embeddings")):
        np.savez(f"a-{i}.npz", **{name: SMALL})
        np.save(f"b-{i}.npy", np.asarray([0, 1]))
    assert "a-1.npz: embeddings would be read of it, but logits of" in fails("a-*.npz", "b-*.npy")
    figures = mml.evaluate(["a-0.npz#logits", "a-1.npz#embeddings"], "b-*.npy")
    assert figures.accuracy == 1


def test_zarr_groups_that_were_consolidated_once(files, fails):
    zarr = pytest.importorskip("zarr")
    group = zarr.open_group("g.zarr", mode="w", zarr_format=2)
    group.create_array("a", shape=(4, 2), dtype="f4")[:] = 1
    zarr.consolidate_metadata("g.zarr")
    group = zarr.open_group("g.zarr", mode="a", zarr_format=2, use_consolidated=False)
    group.create_array("logits", shape=(4, 2), dtype="f4")[:] = SMALL[[0, 1, 0, 1]]
    np.save("t.npy", [0, 1, 0, 1])
    assert "holds 2 arrays; name the one" in fails("g.zarr", "t.npy")
    assert mml.evaluate("g.zarr#logits", "t.npy") == mml.evaluate("g.zarr/logits", "t.npy")
    assert "has no array 'none'" in fails("g.zarr#none", "t.npy")


@pytest.mark.parametrize("write", [zarr_file, hdf5_file], ids=["zarr", "hdf5"])
@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"units": "days since 2000-01-01"}, "times (days since 2000-01-01)"),
        ({"units": "seconds"}, "times (seconds)"),
        ({"units": "days", "dtype": "timedelta64[ns]"}, "times (days timedelta64[ns])"),
        ({"dtype": "datetime64[s]"}, "times (datetime64[s])"),
        ({"dtype": "bool"}, "booleans (bool)"),
    ],
)
def test_times_and_booleans_are_no_labels(files, fails, write, attributes, message):
    name = {zarr_file: "t.zarr", hdf5_file: "t.h5"}[write]
    write(name, np.zeros(100, int), attributes=attributes)
    np.save("s.npy", np.repeat(SMALL, 50, axis=0))
    assert f"{name}: holds {message}, which are no targets" in fails("s.npy", name)


@pytest.mark.parametrize("write", [zarr_file, hdf5_file], ids=["zarr", "hdf5"])
def test_other_units_and_dtypes(files, write):
    name = {zarr_file: "t.zarr", hdf5_file: "t.h5"}[write]
    write(name, np.ones(100, int), attributes={"units": "1", "dtype": "int8"})
    np.save("s.npy", np.repeat(SMALL, 50, axis=0))
    assert mml.evaluate("s.npy", name).samples == 100
    scores = "s" + name[1:]
    write(scores, np.repeat(SMALL, 50, axis=0), attributes={"units": "seconds"})
    assert mml.evaluate(scores, name).samples == 100


def test_an_empty_row_group_in_the_middle(files):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    kind = pa.list_(pa.float32())
    table = pa.table({"logits": pa.array(SMALL[[0, 1, 0]].tolist(), kind), "label": [0, 1, 0]})
    with pq.ParquetWriter("g.parquet", table.schema) as writer:
        for part in (table, table.slice(0, 0), table):
            writer.write_table(part)
    for size in (None, 2):
        figures = mml.evaluate("g.parquet", "g.parquet", chunk_size=size)
        assert (figures.samples, figures.accuracy) == (6, 1)


def test_a_column_that_says_it_holds_weights(files):
    for names in (["weight"], ["temperature", "sample_weight"], ["temperature"]):
        parquet("w.parquet", **{name: [1.0, 3.0] for name in names})
        figures = mml.evaluate(SMALL, np.asarray([0, 0]), sample_weight="w.parquet")
        assert figures.accuracy == 0.25


def test_folders_called_like_files(files, fails):
    os.makedirs("out/a-1.parquet")
    parquet("out/a-1.parquet/part-0.parquet", logits=SMALL.tolist(), label=[0, 1])
    for name in ("out", "out/*.parquet", "out/a-1.parquet"):
        assert mml.evaluate(name, name).samples == 2
    os.mkdir("out/a-2.parquet")
    line = fails("out/*.parquet", "out/*.parquet")
    assert "in out/a-2.parquet, the folder is no Zarr store and holds no .parquet files" in line


def test_names_that_would_command_a_terminal(files, wanted, fails, command, capsys):
    name = "a\nb\x1b(Bred\u202e.npy"
    os.rename("x.npy", name)
    told = r"a\nb\x1b(Bred\u202e.npy"
    assert command(name, "y.npy") == 0
    assert f"{told} rows 0 to 699 with y.npy" in capsys.readouterr().out
    assert f"no{told}: there is no such file" in fails(f"no{name}", "y.npy")
    assert mml.evaluate(name, "y.npy").pairing[0]["scores"]["name"] == name


@pytest.mark.parametrize("kind", ["zarr", "npz"])
def test_headers_with_more_classes_than_memory_holds(files, fails, kind):
    np.save("t.npy", [0, 1, 0, 1])
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array("wide.zarr", shape=(4, 2**40), chunks=(4, 1000), dtype="f4")
    else:
        header = str({"descr": "<f4", "fortran_order": False, "shape": (4, 2**40)}).encode()
        with zipfile.ZipFile("wide.npz", "w") as archive:
            magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
            archive.writestr("a.npy", magic + header + bytes(100))
    line = fails(f"wide.{kind}", "t.npy")
    assert f"wide.{kind}: there is not enough memory for a batch" in line


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--class-names", "[" * 100_000, "the names of the classes cannot be read"),
        (
            "--compare",
            json.dumps({"schema": 2, "loss": 10**400, "classes": {}}),
            "holds no figures to compare with (OverflowError",
        ),
    ],
    ids=["names", "figures"],
)
def test_json_that_python_cannot_hold(files, fails, option, text, message):
    Path("big.json").write_text(text)
    assert message in fails("x.npy", "y.npy", option, "big.json")


def frames(index, other, **columns):
    """Scores and labels as pandas writes them, with an index each."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    told = {"index_columns": ["key"], "columns": [], "column_indexes": []}
    scores = np.eye(4, dtype="f4")[[0, 1, 2, 3, 0, 1]]
    for path, keys, rest in (
        ("s.parquet", index, {f"c{k}": scores[:, k] for k in range(4)}),
        ("t.parquet", other, {"label": [0, 1, 2, 3, 0, 1]}),
    ):
        table = pa.table({**rest, "key": keys})
        table = table.replace_schema_metadata({"pandas": json.dumps(told)})
        pq.write_table(table, path, row_group_size=4 if path[0] == "s" else 3)


@pytest.mark.parametrize("index", [list("abcdef"), [7, 5, 3, 1, 0, 2]], ids=["text", "numbers"])
def test_indices_of_pandas_that_contradict_the_order(files, fails, index):
    frames(index, index)
    assert mml.evaluate("s.parquet", "t.parquet").accuracy == 1
    assert mml.evaluate("s.parquet", np.asarray([0, 1, 2, 3, 0, 1])).accuracy == 1
    frames(index, [*index[:4], index[5], index[4]])
    line = fails("s.parquet", "t.parquet")
    assert f"t.parquet: row 4 of its targets has the pandas index {index[5]!r}, " in line
    assert "so that it is in doubt which belong together; sort both alike, or write" in line


def test_an_index_that_is_damaged(files, fails):
    pq = pytest.importorskip("pyarrow.parquet")
    frames([7, 5, 3, 1, 0, 2], [7, 5, 3, 1, 0, 2])
    options = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pq.read_table("t.parquet"), "t.parquet", **options)
    key = pq.ParquetFile("t.parquet").metadata.row_group(0).column(1)
    with open("t.parquet", "r+b") as file:
        file.seek(key.data_page_offset + key.total_compressed_size - 1)
        file.write(b"\x01")
    line = fails("s.parquet", "t.parquet")
    assert "t.parquet: its pandas index cannot be read (" in line
    assert line.endswith("; write or copy it again\n")


def test_indices_of_other_types_are_compared_by_value(files, fails):
    pa = pytest.importorskip("pyarrow")
    frames([1, 2, 3, 4, 5, 6], pa.array([1, 2, 3, 4, 5, 6], pa.int32()))
    assert mml.evaluate("s.parquet", "t.parquet").accuracy == 1
    frames([1, 2, 3, 4, 5, 6], list("abcdef"))
    assert "row 0 of its targets has the pandas index 'a', that of the scores 1," in fails(
        "s.parquet", "t.parquet"
    )


def by_pandas(path, index, columns):
    """Write a table as pandas does: with an index in columns, or one that is a range."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    if isinstance(index, range):
        one = {"kind": "range", "name": None}
        kept = [{**one, "start": index.start, "stop": index.stop, "step": index.step}]
        levels = {}
    else:
        levels = index if isinstance(index, dict) else {"__index_level_0__": index}
        kept = list(levels)
    told = {"index_columns": kept, "columns": [], "column_indexes": []}
    table = pa.table({**columns, **levels})
    pq.write_table(
        table.replace_schema_metadata({"pandas": json.dumps(told)}), path, row_group_size=4
    )


SIX = range(6)
EYE = np.eye(4, dtype="f4")[[0, 1, 2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("ours", "theirs", "at"),
    [
        (
            SIX,
            range(5, -1, -1),
            "row 0 of its targets has the pandas index 5, that of the scores 0",
        ),
        (
            range(5, -1, -1),
            SIX,
            "row 0 of its targets has the pandas index 0, that of the scores 5",
        ),
        (SIX, [0, 1, 2, 3, 5, 4], "row 4 of its targets has the pandas index 5, that of the sc"),
        (range(2, 8), range(3, 9), "row 0 of its targets has the pandas index 3, that of the sc"),
        (range(2, 8), [2, 3, 4, 5, 6, 8], "row 5 of its targets has the pandas index 8, that of"),
        ({"id": [*"abcdef"]}, [*"abcdfe"], "row 4 of its targets has the pandas index 'f', that"),
        (
            {"a": [*"xxxyyy"], "b": [1, 2, 3] * 2},
            {"a": [*"xxxyyy"], "b": [1, 2, 3, 1, 3, 2]},
            "row 4 of its targets has the pandas index ('y', 3), that of the scores ('y', 2)",
        ),
        ({"a": [*"xxxyyy"], "b": [1, 2, 3] * 2}, [*"xxxyyy"], "row 0 of its targets has"),
        (SIX, SIX, ""),
        (SIX, range(1, 7), ""),  # another table's rows, or numbered from 1
        (SIX, [3, 1, 2, 9, 8, 7], ""),  # a random part of a larger table
        (SIX, [0, 1, 2, 3, 4, 5], ""),
        (SIX, [*"abcdef"], ""),
        (SIX, [0, 1, 2, 3, 4, 4], ""),
        (range(2, 8), [2, 3, 4, 5, 6, 7], ""),
        ({"id": [*"abcdef"]}, [*"abcdef"], ""),
        (None, range(5, -1, -1), ""),
    ],
)
def test_indices_that_pandas_keeps_in_any_form(files, fails, ours, theirs, at):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    scores = {f"c{k}": EYE[:, k] for k in range(4)}
    if ours is None:
        pq.write_table(pa.table(scores), "s.parquet")
    else:
        by_pandas("s.parquet", ours, scores)
    by_pandas("t.parquet", theirs, {"label": [0, 1, 2, 3, 0, 1]})
    if at:
        assert f"t.parquet#label: {at}" in fails("s.parquet", "t.parquet#label")
    else:
        assert mml.evaluate("s.parquet", "t.parquet#label").accuracy == 1


def test_parts_are_numbered_anew_or_go_on(files, fails):
    scores, labels = {f"c{k}": EYE[:3, k] for k in range(4)}, {"label": [0, 1, 2]}
    for parts in ((range(3), range(3)), (range(3), range(3, 6))):
        for i, rows in enumerate(parts):
            by_pandas(f"s-{i}.parquet", rows, scores)
        by_pandas("t.parquet", SIX, {"label": [0, 1, 2, 0, 1, 2]})
        assert mml.evaluate("s-*.parquet", "t.parquet").accuracy == 1
    by_pandas("t.parquet", range(3, -3, -1), {"label": [0, 1, 2, 0, 1, 2]})
    assert "row 0 of its targets has the pandas index 3" in fails("s-*.parquet", "t.parquet")
    by_pandas("t-0.parquet", range(3, 6), labels)
    by_pandas("t-1.parquet", range(3), labels)
    assert (
        "t-0.parquet: row 0 of its targets has the pandas index 3, that of the scores 0"
        in fails("s-*.parquet", "t-*.parquet")
    )


@pytest.mark.parametrize(
    "told",
    [
        [{"kind": "range", "start": "a", "stop": 6, "step": 1}],
        [{"kind": "range", "start": 0, "stop": 6, "step": 0}],
        [{"kind": "range", "start": 0, "stop": 7, "step": 1}],
        [{"kind": "range"}],
        [{"kind": "range", "start": 5, "stop": -1, "step": -1}, 3],
        ["gone"],
        [],
    ],
)
def test_what_pandas_says_of_its_index_may_be_damaged(files, told):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    by_pandas("s.parquet", range(5, -1, -1), {f"c{k}": EYE[:, k] for k in range(4)})
    table = pa.table({"label": [0, 1, 2, 3, 0, 1]})
    pq.write_table(
        table.replace_schema_metadata({"pandas": json.dumps({"index_columns": told})}), "t.parquet"
    )
    assert mml.evaluate("s.parquet", "t.parquet").accuracy == 1


@pytest.mark.parametrize("other", ["soft", "hard", "group/x", "./x"])
def test_links_within_an_hdf5_file_lead_to_one_array(arrays, files, fails, other):
    h5py = pytest.importorskip("h5py")
    with h5py.File("f.h5", "w") as file:
        file["x"], file["y"] = arrays[0], arrays[0]
        file["soft"] = h5py.SoftLink("/x")
        file["hard"] = file["x"]
        file.create_group("group")["x"] = h5py.SoftLink("/x")
    with pytest.raises(mml.InputError, match=r"is given twice, as f\.h5#x too; its samples would"):
        mml.evaluate(["f.h5#x", f"f.h5#{other}"], ["y.npy", "y.npy"])
    assert mml.evaluate(["f.h5#x", "f.h5#y"], ["y.npy", "y.npy"]).samples == 2 * N
