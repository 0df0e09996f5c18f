"""Evaluations of Dask arrays: exactly the figures of the whole arrays of NumPy, in any chunks."""

import dask.array as da
import numpy as np
import pytest

import mml_arrayapi as mml
from tests.backends.dask.conftest import EXPRESSIONS

N, C = 300, 7
HOW = {"p": 2, "ignore_index": -100}
CUTS = {
    "one": (N, C),
    "rows": (37, C),
    "classes": (N, 2),
    "both": (37, 3),
    "uneven": ((1, 0, 299), (0, 4, 3)),
}


def same(block):
    return block


def of_unknown_sizes(array):
    sizes = (tuple(np.nan for _ in array.chunks[0]), *array.chunks[1:])
    return array.map_blocks(same, chunks=sizes, dtype=array.dtype, meta=array._meta)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    scores, target = rng.standard_normal((N, C)).astype(np.float32), rng.integers(0, C, N)
    target[::5] = -100
    scores[5] = np.nan  # an ignored sample
    return scores, target, rng.random(N)


@pytest.fixture(scope="module")
def wanted(arrays):
    scores, target, weight = arrays
    return mml.evaluate(scores, target, sample_weight=weight, **HOW)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("chunk_size", [None, 50])
def test_chunks_change_no_bit(arrays, wanted, cut, chunk_size):
    scores, target, weight = arrays
    x = da.from_array(scores, chunks=CUTS[cut])
    y, w = da.from_array(target, chunks=41), da.from_array(weight, chunks=29)
    assert wanted.ignored == len(target[::5])
    for labels, each in ((y, w), (target, weight), (y, weight)):
        found = mml.evaluate(x, labels, sample_weight=each, chunk_size=chunk_size, **HOW)
        assert found == wanted


def test_arrays_that_were_chunked_anew(arrays, wanted):
    x, y, w = (da.from_array(array, chunks=50) for array in arrays)
    found = mml.evaluate(x.rechunk((37, 3)), y.rechunk(41), sample_weight=w.rechunk(29), **HOW)
    assert found == wanted


def test_unknown_sizes_are_asked_for(arrays, wanted):
    chunks = {"logits": (37, 3), "targets": 37, "sample_weight": 37}
    known = dict(zip(chunks, arrays, strict=True))
    known = {name: da.from_array(known[name], chunks=cut) for name, cut in chunks.items()}
    for name, array in known.items():
        lost = of_unknown_sizes(array)
        with pytest.raises(
            ValueError, match="sizes of the chunks are unknown; compute_chunk_sizes"
        ):
            mml.evaluate(**{**known, name: lost}, **HOW)
        if not EXPRESSIONS:  # has no compute_chunk_sizes() yet
            found = mml.evaluate(**{**known, name: lost.compute_chunk_sizes()}, **HOW)
            assert found == wanted
