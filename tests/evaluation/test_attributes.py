"""Attributes of Zarr and HDF5: packed, missing and doubtful values are decoded, or refused."""

import json
import struct
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest

import mml_arrayapi as mml
from tests.evaluation.writers import hdf5_file, zarr_file

STORES = pytest.mark.parametrize(
    ("path", "write"), [("s.zarr", zarr_file), ("s.h5", hdf5_file)], ids=["zarr", "hdf5"]
)


def encoded(value):
    """As xarray writes a float in Zarr's version 3."""
    return b64encode(struct.pack("<d", value)).decode()


# Packed.


@STORES
@pytest.mark.parametrize(
    "attributes",
    [
        {"scale_factor": 0.001},
        {"add_offset": -3.3},
        {"scale_factor": 10, "add_offset": 0.1},
        {"scale_factor": [0.5]},
    ],
    ids=lambda attributes: "-".join(attributes),
)
@pytest.mark.parametrize("dtype", ["i2", ">i4", "u1", "f2", "f4", "f8"])
def test_packed_scores_are_unpacked(arrays, files, path, write, attributes, dtype):
    packed = np.round(arrays[0] * 10 + 100).astype(dtype)
    packed[5, 2] = 99
    write(path, packed, attributes={**attributes, "_FillValue": 99.0})
    scale = np.squeeze(attributes.get("scale_factor", 1))
    plain = packed.astype(np.float64) * scale + attributes.get("add_offset", 0)
    plain[packed == 99] = np.nan
    figures = mml.evaluate(path, "y.npy")
    assert figures == mml.evaluate(plain, arrays[1])
    assert (path, 5) in figures.nan_samples


@STORES
def test_packed_weights_are_unpacked(arrays, files, path, write):
    packed = np.arange(len(arrays[1]), dtype="f4")
    write(path, packed, attributes={"scale_factor": 0.25, "add_offset": 1.0})
    weights = packed * 0.25 + 1
    figures = mml.evaluate("x.npy", "y.npy", sample_weight=path)
    assert figures == mml.evaluate(*arrays, sample_weight=weights)
    assert figures != mml.evaluate(*arrays, sample_weight=packed)


@STORES
@pytest.mark.parametrize("key", ["scale_factor", "add_offset"])
@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), "a lot", [1.0, 2.0]], ids=str)
def test_what_cannot_be_unpacked(arrays, files, fails, path, write, key, value):
    write(path, arrays[0], attributes={key: value})
    if (key, value) == ("add_offset", 0):
        assert mml.evaluate(path, "y.npy") == mml.evaluate(*arrays)
    else:
        assert f"{path}: has {key} " in (line := fails(path, "y.npy"))
        assert "; it must be one finite number, and scale_factor not 0" in line


@STORES
def test_packed_labels_are_refused(arrays, files, fails, path, write):
    write(path, arrays[1], attributes={"add_offset": 1})
    assert "has the attributes add_offset 1; decode it first" in fails("x.npy", path)


# Missing.


@STORES
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("fill", [1e4, -9999.9, 0.1, 0, 1e20, float("inf")])
@pytest.mark.parametrize("key", ["_FillValue", "missing_value"])
def test_missing_scores_are_nan(arrays, files, fails, path, write, dtype, fill, key):
    scores = arrays[0].astype(dtype)
    if dtype == "f2" and fill == 1e20:
        write(path, scores, attributes={key: fill})
        assert f"{path}: has {key} 1e+20, which is no value of its dtype float16; correct" in fails(
            path, "y.npy"
        )
        return
    scores[7, 0] = fill
    write(path, scores, attributes={key: fill})
    scores[7, 0] = np.nan
    figures = mml.evaluate(path, "y.npy")
    assert figures == mml.evaluate(scores, arrays[1])
    assert figures.nan_samples == ((path, 7),)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    ("spelled", "fill"),
    [
        ("NaN", np.nan),
        ("Infinity", np.inf),
        ("-Infinity", -np.inf),
        (encoded(np.nan), np.nan),
        (encoded(-9999.9), -9999.9),
        (encoded(1e20), 1e20),
    ],
    ids=["NaN", "Infinity", "-Infinity", "base64 NaN", "base64 -9999.9", "base64 1e20"],
)
def test_fill_values_as_text(arrays, files, spelled, fill, dtype):
    scores = arrays[0].astype(dtype)
    scores[7, 0] = fill
    zarr_file("s.zarr", scores, attributes={"_FillValue": spelled})
    scores[7, 0] = np.nan
    assert mml.evaluate("s.zarr", "y.npy") == mml.evaluate(scores, arrays[1])


@STORES
@pytest.mark.parametrize(
    ("dtype", "fill"),
    [
        ("f4", "nonsense"),
        ("f4", "AAAA"),
        ("f4", "nan"),
        ("f4", 1e39),
        ("f4", 1e-60),
        ("f8", [1.0, "x"]),
        ("i1", 255),
        ("i8", 2.5),
        ("i8", "NaN"),
        ("i8", 2**70),
        ("u8", -1),
    ],
    ids=str,
)
def test_fill_values_that_are_none(arrays, files, fails, path, write, dtype, fill):
    array = arrays[0 if dtype.startswith("f") else 1].astype(dtype)
    fill = str(fill) if write is hdf5_file and fill in (2**70, [1.0, "x"]) else fill
    write(path, array, attributes={"_FillValue": fill})
    line = fails(path, "y.npy") if array.ndim == 2 else fails("x.npy", path)
    assert f"which is no value of its dtype {array.dtype}; correct it" in line


@STORES
def test_missing_labels_and_weights_are_errors(arrays, files, fails, path, write):
    write(path, arrays[1], attributes={"_FillValue": 3})
    count = int((arrays[1] == 3).sum())
    told = f"{path}: {count} %s are missing (their value is that of _FillValue or missing_value, 3)"
    assert told % "targets" in fails("x.npy", path)
    assert told % "sample weights" in fails("x.npy", "y.npy", "--sample-weight", path)
    assert told % "class weights" in fails("x.npy", "y.npy", "--weight", path)
    assert mml.evaluate("x.npy", path, ignore_index=3).ignored == count
    assert "are missing" in fails("x.npy", path, "--ignore-index", "300")


# Zarr's version 2, where xarray's _FillValue is the array's own fill_value.


def written_by_xarray(path, array, fill, attributes=(("_ARRAY_DIMENSIONS", ["sample"]),)):
    zarr_file(path, array, zarr_format=2, fill_value=None, attributes=dict(attributes))
    description = json.loads(Path(path, ".zarray").read_text())
    Path(path, ".zarray").write_text(json.dumps({**description, "fill_value": fill}))


@pytest.mark.parametrize("fill", [-9999.9, 1e20, "NaN", None])
@pytest.mark.parametrize("adopted", [False, True], ids=["file", "array"])
def test_missing_scores_of_xarray(arrays, files, fill, adopted):
    zarr = pytest.importorskip("zarr")
    scores = arrays[0].copy()
    scores[7, 0] = np.nan if fill is None else fill
    written_by_xarray("s.zarr", scores, fill)
    scores[7, 0] = np.nan
    given = zarr.open("s.zarr") if adopted else "s.zarr"
    assert mml.evaluate(given, "y.npy") == mml.evaluate(scores, arrays[1])
    written_by_xarray("plain.zarr", scores, fill, ())  # by anything else
    assert mml.evaluate("plain.zarr", "y.npy") == mml.evaluate(scores, arrays[1])


def test_a_fill_value_is_none_without_xarray(arrays, files):
    scores = arrays[0].copy()
    scores[7, 0] = -9999.5
    written_by_xarray("s.zarr", scores, -9999.5, ())
    assert mml.evaluate("s.zarr", "y.npy") == mml.evaluate(scores, arrays[1])


def test_missing_labels_of_xarray(arrays, files, fails):
    labels = arrays[1].copy()
    labels[3] = -1
    written_by_xarray("y.zarr", labels, -1)
    assert "y.zarr: 1 targets are missing (their value is that of _Fi" in fails("x.npy", "y.zarr")
    assert mml.evaluate("x.npy", "y.zarr", ignore_index=-1).ignored == 1
    written_by_xarray("none.zarr", arrays[1], -1)
    assert mml.evaluate("x.npy", "none.zarr") == mml.evaluate(*arrays)


def test_zeros_that_xarray_takes_for_missing(arrays, files, fails):
    """Zarr writes the fill value 0 unasked: whether zeros are meant cannot be told."""
    told = "which is also the fill_value of this array of Zarr's version 2, so that xarray takes"
    scores = arrays[0].copy()
    written_by_xarray("x.zarr", scores, 0.0)
    assert mml.evaluate("x.zarr", "y.npy") == mml.evaluate(*arrays)
    scores[7, :2] = 0
    written_by_xarray("x0.zarr", scores, 0.0)
    assert f"x0.zarr: 2 scores are 0, {told}" in fails("x0.zarr", "y.npy")
    written_by_xarray("packed.zarr", scores, 0.0, {"scale_factor": 2}.items())
    assert f"packed.zarr: 2 scores are 0, {told}" in fails("packed.zarr", "y.npy")
    written_by_xarray("y.zarr", arrays[1], 0)
    zeros = int((arrays[1] == 0).sum())
    assert f"y.zarr: {zeros} targets are 0, {told}" in fails("x.npy", "y.zarr")
    assert mml.evaluate("x.npy", "y.zarr", ignore_index=0).ignored == zeros
    for path, array in (("null.zarr", scores), ("ynull.zarr", arrays[1])):
        written_by_xarray(path, array, None)
    assert mml.evaluate("null.zarr", "ynull.zarr") == mml.evaluate(scores, arrays[1])
