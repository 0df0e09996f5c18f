"""Arrays of files that are open already are read batch by batch, where the work is done."""

import threading
from contextlib import ExitStack

import pytest

import mml_arrayapi as mml
from tests.evaluation.writers import hdf5_file, zarr_file


class Recorder:
    """An array that knows when it is read, and by whom."""

    def __init__(self, array):
        self._array, self.shape, self.dtype = array, array.shape, array.dtype
        self.reads = []

    def __getitem__(self, where):
        part = self._array[where]
        self.reads.append((len(part), threading.current_thread()))
        return part


def test_rows_are_read_by_the_workers(arrays, wanted):
    recorders = [Recorder(array) for array in arrays]
    seen = []

    def progress(*_):
        seen.append(len(recorders[0].reads))

    options = {"chunk_size": 100, "workers": 1, "progress": progress}
    assert mml.evaluate(*recorders, **options) == wanted
    assert seen[0] < 7  # not all of them before the first was counted
    for one in recorders:
        assert [rows for rows, _ in one.reads] == [100] * 7
        assert threading.main_thread() not in [thread for _, thread in one.reads]


@pytest.fixture(params=["zarr", "hdf5"])
def opened(arrays, files, request):
    """Scores, labels, and labels of which some are missing."""
    library = pytest.importorskip("zarr" if request.param == "zarr" else "h5py")
    write = zarr_file if request.param == "zarr" else hdf5_file
    write("x", arrays[0])
    write("y", arrays[1])
    write("z", arrays[1], attributes={"_FillValue": 3})
    if request.param == "zarr":
        yield [library.open(name) for name in "xyz"]
    else:
        with library.File("x") as x, library.File("y") as y, library.File("z") as z:
            yield [file["data"] for file in (x, y, z)]


@pytest.mark.parametrize("where", ["threads", "cluster"])
@pytest.mark.filterwarnings("ignore")  # of distributed
def test_open_files(opened, wanted, where):
    x, y, z = opened
    with ExitStack() as stack:
        options = {"chunk_size": 100}
        if where == "cluster":
            distributed = pytest.importorskip("distributed")
            local = distributed.LocalCluster(1, processes=False, dashboard_address=None)
            options["scheduler"] = stack.enter_context(local)
        assert mml.evaluate(x, y, **options) == wanted
        with pytest.raises(mml.InputError, match=r"targets: .* targets are missing"):
            mml.evaluate(x, z, **options)
