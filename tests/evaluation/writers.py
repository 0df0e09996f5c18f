"""Files as other programs write them."""

import pytest


def parquet(path, rows=150, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, row_group_size=rows, write_page_checksum=True)


def zarr_file(path, array, **options):
    zarr = pytest.importorskip("zarr")
    attributes = options.pop("attributes", {})
    options = {"chunks": (100, *array.shape[1:]), "fill_value": 0, **options}
    store = zarr.create_array(store=path, shape=array.shape, dtype=array.dtype, **options)
    store[...] = array
    store.attrs.update(attributes)
    return store


def hdf5_file(path, array, **options):
    h5py = pytest.importorskip("h5py")
    with h5py.File(path, "w") as file:
        made = file.create_dataset("data", data=array, chunks=(100, *array.shape[1:]))
        made.attrs.update(options.pop("attributes", {}))
