"""Arrays of files that are open already are read batch by batch, where the work is done."""

import threading
from contextlib import ExitStack

import numpy as np
import pytest

import mml_arrayapi as mml
from tests.evaluation.writers import hdf5_file, zarr_file

C = 6


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


def test_a_dataset_whose_file_is_closed(arrays, files):
    h5py = pytest.importorskip("h5py")
    hdf5_file("x.h5", arrays[0])
    with h5py.File("x.h5") as file:
        closed = file["data"]
    for given in ((closed, arrays[1]), (arrays[0], closed)):
        with pytest.raises(
            mml.InputError,
            match=r"(scores|targets): the array tells no shape \(.*\); give one whose file is open",
        ):
            mml.evaluate(*given)


def test_views_of_datasets(arrays, files, wanted):
    """They would be read without the dataset's attributes, and its missing chunks."""
    h5py = pytest.importorskip("h5py")
    hdf5_file("y.h5", arrays[1])
    with h5py.File("y.h5") as file:
        view = file["data"].astype("i4")
        with pytest.raises(
            TypeError, match="targets must be a dataset of h5py itself, but are of type AsTypeView"
        ):
            mml.evaluate(arrays[0], view)
        assert mml.evaluate(arrays[0], view[...]) == wanted


@pytest.mark.parametrize("scheduler", ["threads", "cluster"])
@pytest.mark.parametrize(
    ("which", "change"),
    [
        (0, lambda b: b[:-1]),
        (0, lambda b: np.concatenate([b, b])),
        (0, lambda b: np.concatenate([b, b], axis=1)),
        (0, lambda b: b * 1j),
        (0, lambda b: b.astype("i4")),
        (1, lambda b: b[:-1]),
        (1, lambda b: b + 0.5),
        (1, lambda b: b > 0),
        (1, lambda b: b.astype(object)),
        (2, lambda b: b * 1j),
        (2, lambda b: b[:1]),
    ],
    ids=[
        "short",
        "long",
        "wide",
        "complex",
        "integer",
        "few-labels",
        "float-labels",
        "bool-labels",
        "objects",
        "complex-weights",
        "one-weight",
    ],
)
@pytest.mark.filterwarnings("ignore")  # of distributed
def test_chunks_other_than_declared(arrays, which, change, scheduler):
    da = pytest.importorskip("dask.array")
    lazy = [da.from_array(array, chunks=100) for array in (*arrays, np.ones(len(arrays[0])))]
    lazy[0] = lazy[0].rechunk({1: -1})
    lazy[which] = lazy[which].map_blocks(change, dtype=lazy[which].dtype, meta=lazy[which]._meta)
    with ExitStack() as stack:
        if scheduler == "cluster":
            distributed = pytest.importorskip("distributed")
            options = {"processes": False, "dashboard_address": None, "set_as_default": False}
            scheduler = stack.enter_context(distributed.Client(**options))
        role = ("scores", "targets", "sample weights")[which]
        stack.enter_context(
            pytest.raises(mml.InputError, match=f"{role}: Dask was told of a chunk")
        )
        mml.evaluate(*lazy[:2], sample_weight=lazy[2], scheduler=scheduler)


@pytest.mark.parametrize(
    ("which", "make"),
    [
        (0, "builtins.list"),
        (1, "pandas.Series"),  # whose labels the pairing would ignore
        (0, "pandas.DataFrame"),
        (0, "xarray.DataArray"),
        (0, "scipy.sparse.csr_matrix"),
        (1, "torch.asarray"),
    ],
)
def test_chunks_that_are_no_numpy_arrays(arrays, which, make):
    da = pytest.importorskip("dask.array")
    module, _, name = make.rpartition(".")
    change = getattr(pytest.importorskip(module), name)
    lazy = [da.from_array(array, chunks=(100, C)[: array.ndim]) for array in arrays]
    lazy[which] = lazy[which].map_blocks(change, dtype=lazy[which].dtype, meta=lazy[which]._meta)
    role, kind = ("scores", "targets")[which], type(change(arrays[which][:1])).__name__
    with pytest.raises(
        mml.InputError,
        match=f"{role}: a chunk of the Dask array is of type {kind}; chunks must be NumPy arrays, "
        r"as map_blocks\(np.asarray\) makes them",
    ):
        mml.evaluate(*lazy)


def test_an_array_that_lies_about_its_dtype(arrays):
    class Liar(Recorder):
        def __getitem__(self, where):
            return super().__getitem__(where).astype(np.float64)

    with pytest.raises(mml.InputError, match=r"they have dtype float64, not int64"):
        mml.evaluate(arrays[0], Liar(arrays[1]))
    with pytest.raises(mml.InputError, match=r"they have dtype float64, not float32"):
        mml.evaluate(Liar(arrays[0]), arrays[1])


def test_what_has_a_shape_and_is_no_array(arrays):
    dask = pytest.importorskip("dask")
    with pytest.raises(TypeError, match=r"scores must be a path, an array, .* of type Delayed"):
        mml.evaluate(dask.delayed(lambda: arrays[0])(), arrays[1])
