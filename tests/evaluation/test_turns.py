"""File systems that share a position, or an opened file, between threads."""

import os
import sys
import tarfile

import fsspec
import numpy as np
import pytest
import zarr

import mml_arrayapi as mml
from mml_arrayapi.evaluation.turns import OneAtATime


@pytest.fixture
def quick_switches():
    """Let threads take turns between any two steps."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture
def archive(files, arrays):
    """All files in an archive: whole, in parts, and as a store."""
    for i, (x, y) in enumerate(zip(*(np.array_split(a, 6) for a in arrays), strict=True)):
        np.save(f"x-{i}.npy", x)
        np.save(f"y-{i}.npy", y)
    group = zarr.open_group("x.zarr", mode="w", zarr_format=2)
    group.create_array("x", data=arrays[0], chunks=(50, arrays[0].shape[1]), compressors=None)
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        with tarfile.open(f"all.{suffix}", mode) as tar:
            for name in sorted(name for name in os.listdir() if ".tar" not in name):
                tar.add(name)


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
@pytest.mark.parametrize("scores", ["x.npy", "x-*.npy", "x.zarr#x"])
@pytest.mark.usefixtures("archive", "quick_switches")
def test_tar(wanted, scores, suffix):
    scores, _, item = scores.partition("#")
    scores, labels = (f"tar://{name}::all.{suffix}" for name in (scores, "y.npy"))
    scores += "#x" if item else ""
    for _ in range(5):
        assert mml.evaluate(scores, labels, chunk_size=50, workers=4) == wanted


@pytest.mark.usefixtures("archive")
def test_tar_in_processes_and_by_a_cache(wanted):
    arguments = "tar://x-*.npy::all.tar", "simplecache::tar://y.npy::all.tar"
    assert mml.evaluate(*arguments, chunk_size=50, workers=4) == wanted
    assert mml.evaluate(*arguments, chunk_size=50, scheduler="processes", workers=2) == wanted


@pytest.mark.usefixtures("files", "quick_switches")
def test_memory(wanted):
    memory = fsspec.filesystem("memory")
    for name in ("x.npy", "y.npy"):
        with open(name, "rb") as file:
            memory.pipe(f"/turns/{name}", file.read())
    for _ in range(5):
        figures = mml.evaluate(
            "memory://turns/x.npy", "memory://turns/y.npy", chunk_size=3, workers=4
        )
        assert figures == wanted


def test_a_part_reads_like_a_file(tmp_path):
    content = bytes(range(200))
    memory = fsspec.filesystem("memory")
    memory.pipe("/turns/part", content)
    one, other = (OneAtATime(memory).open("/turns/part") for _ in range(2))
    assert (one.read(3), other.read(2), one.read(3)) == (content[:3], content[:2], content[3:6])
    assert other.seek(0, os.SEEK_END) == 200
    assert (other.read(), one.seek(-10, os.SEEK_END), one.read()) == (b"", 190, content[190:])
    assert (one.seek(5), one.seek(4, os.SEEK_CUR), one.tell()) == (5, 9, 9)
    assert one.readable()
    assert one.seekable()
    one.close()
    other.close()
    assert one.closed
