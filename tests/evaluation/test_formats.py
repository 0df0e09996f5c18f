"""Every format and every place where data is kept: read right, with the same bits."""

import base64
import gc
import io
import json
import os
import shutil
import zipfile
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest

import mml_arrayapi as mml
from tests.evaluation.writers import parquet

N, C = 700, 6


# Parquet as others write it.


@pytest.mark.parametrize("where", ["part", "row group"])
def test_tables_without_rows(arrays, files, wanted, where):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    scores, target = arrays
    table = pa.table({"logits": list(scores), "label": target})
    os.mkdir("folder")
    if where == "part":
        pq.write_table(table.slice(0, 0), "folder/part-0.parquet")
        pq.write_table(table, "folder/part-1.parquet")
    else:
        with pq.ParquetWriter("folder/part-0.parquet", table.schema) as writer:
            for part in (
                table.slice(0, 0),
                table.slice(0, 300),
                table.slice(0, 0),
                table.slice(300),
            ):
                writer.write_table(part)
    assert mml.evaluate("folder", "folder", chunk_size=100) == wanted
    pq.write_table(table.slice(0, 0), "none.parquet")
    with pytest.raises(
        mml.InputError, match=r"none.parquet: has no rows, so that the number of cl"
    ):
        mml.evaluate("none.parquet", "none.parquet")


def test_hive_partitions(arrays, files):
    ds = pytest.importorskip("pyarrow.dataset")
    pa = pytest.importorskip("pyarrow")
    scores, target = arrays
    table = pa.table({"logits": list(scores), "label": target})
    part = ds.partitioning(pa.schema([("label", pa.int64())]), flavor="hive")
    ds.write_dataset(table, "hive", format="parquet", partitioning=part)
    with open("hive/_SUCCESS", "w"):
        pass
    order = np.argsort(target, kind="stable")
    figures = mml.evaluate("hive", "hive#label")
    assert figures == mml.evaluate(scores[order], target[order])
    assert figures == mml.evaluate("hive", "hive")
    with pytest.raises(mml.InputError, match="the order of its 6 files is in doubt"):
        mml.evaluate("hive", "y.npy")


def test_a_null_partition(arrays, files, wanted):
    for i, g in enumerate(("1", "__HIVE_DEFAULT_PARTITION__")):
        os.makedirs(f"hive/g={g}")
        half = slice(0, 350) if i == 0 else slice(350, N)
        parquet(f"hive/g={g}/0.parquet", logits=list(arrays[0][half]), label=arrays[1][half])
    assert mml.evaluate("hive", "hive") == wanted
    with pytest.raises(mml.InputError, match="column 'g' has empty values"):
        mml.evaluate("hive", "hive#g")


@pytest.mark.parametrize("store", ["run.v1", "q.zarr/sub.group"])
def test_remote_stores_with_dots_in_their_names(arrays, files, wanted, store):
    zarr = pytest.importorskip("zarr")
    url = f"memory://dots/{store}"
    group = zarr.open_group(zarr.storage.FsspecStore.from_url(url), mode="w")
    for name, array in zip("xy", arrays, strict=True):
        group.create_array(name, data=array, fill_value=-1)
    assert mml.evaluate(f"{url}#x", f"{url}/y") == wanted
    assert mml.evaluate(f"{url}/x", f"{url}#y") == wanted


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe(files, fails):
    os.mkfifo("p.npy")
    assert "p.npy: is no regular file, but a pipe or a device; copy it" in fails("p.npy", "y.npy")


def test_tensors_vectors_and_enums(arrays, files, wanted):
    pa = pytest.importorskip("pyarrow")
    scores, target = arrays
    kind = pa.fixed_shape_tensor(pa.float32(), (C,))
    flat = pa.FixedSizeListArray.from_arrays(pa.array(scores.reshape(-1)), C)
    parquet("tensor.parquet", logits=pa.ExtensionArray.from_storage(kind, flat))
    assert mml.evaluate("tensor.parquet", "y.npy", chunk_size=100) == wanted
    images = scores[:, :, None] * np.asarray([1, 2, 3], np.float32)  # in memory (N, 3, C)
    kind = pa.fixed_shape_tensor(pa.float32(), (3, C), permutation=[1, 0])
    flat = pa.array(np.ascontiguousarray(images.transpose(0, 2, 1)).reshape(-1))
    flat = pa.FixedSizeListArray.from_arrays(flat, 3 * C)
    parquet("permuted.parquet", logits=pa.ExtensionArray.from_storage(kind, flat))
    labels = np.repeat(target[:, None], 3, axis=1)
    assert mml.evaluate("permuted.parquet", labels, axis=1) == mml.evaluate(images, labels, axis=1)

    fields = [("type", pa.int8()), ("size", pa.int32())]
    fields += [("indices", pa.list_(pa.int32())), ("values", pa.list_(pa.float64()))]
    vectors = []
    for i, row in enumerate(scores.astype(float).tolist()):
        sparse = i % 3 == 0
        if sparse:
            row = row[:2] + [0.0] * (C - 2)
        told = {"size": C, "indices": [0, 1], "values": row[:2]} if sparse else {"values": row}
        vectors.append({"type": int(not sparse), **told})
    plain = scores.astype(float)
    plain[::3, 2:] = 0
    parquet("spark.parquet", rawPrediction=pa.array(vectors, pa.struct(fields)))
    assert mml.evaluate("spark.parquet", "y.npy") == mml.evaluate(plain, target)


def encrypted_parquet(path, footer, **columns):
    """Write a column called label encrypted, and the footer or not."""
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    encryption = pytest.importorskip("pyarrow.parquet.encryption")

    class Keys(encryption.KmsClient):
        def wrap_key(self, key, name):
            return base64.b64encode(key)

    told = encryption.EncryptionConfiguration(
        footer_key="f", column_keys={"k": ["label"]}, plaintext_footer=not footer
    )
    factory = encryption.CryptoFactory(lambda _: Keys())
    made = factory.file_encryption_properties(encryption.KmsConnectionConfig(), told)
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema, encryption_properties=made) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("footer", [True, False], ids=["footer", "column"])
def test_encrypted_parquet(arrays, files, fails, wanted, footer):
    encrypted_parquet("e.parquet", footer, logits=list(arrays[0]), label=arrays[1])
    assert "e.parquet#label: is encrypted; decrypt it first\n" in fails("x.npy", "e.parquet#label")
    if footer:
        assert "e.parquet: is encrypted; decrypt it first\n" in fails("e.parquet", "y.npy")
    else:
        assert mml.evaluate("e.parquet", "y.npy") == wanted


def test_enums_of_polars(arrays, files, wanted):
    polars = pytest.importorskip("polars")
    scores, target = arrays
    names = polars.Enum([f"class {c};" for c in (3, 1, 2, 0, 5, 4)])
    labels = polars.Series([names.categories[c] for c in target.tolist()], dtype=names)
    frame = polars.DataFrame({"logits": scores, "label": labels})
    frame.write_parquet("enum.parquet", row_group_size=100)
    assert mml.evaluate("enum.parquet", "enum.parquet", chunk_size=50) == wanted
    frame.with_columns(frame["label"].cast(polars.String)).write_parquet("text.parquet")
    with pytest.raises(mml.InputError, match="targets must be integers, but are object"):
        mml.evaluate("text.parquet", "text.parquet#label")


# Zarr, HDF5, safetensors.


def test_zarr_in_a_zip_and_in_groups(arrays, files, wanted):
    zarr = pytest.importorskip("zarr")
    for store in ("s.zarr", zarr.storage.ZipStore("s.zarr.zip", mode="w")):
        group = zarr.open_group(store, mode="w")
        for name, array in (("run/logits", arrays[0]), ("run/labels", arrays[1])):
            made = group.create_array(
                name, shape=array.shape, chunks=(90, *array.shape[1:]), dtype=array.dtype
            )
            made[...] = array
        group.create_array("other", shape=(3,), dtype="f4")
        if store != "s.zarr":
            store.close()
    for path in ("s.zarr", "s.zarr.zip"):
        assert mml.evaluate(f"{path}#run/logits", f"{path}#run/labels", chunk_size=100) == wanted
    assert mml.evaluate("s.zarr/run/logits", "s.zarr/run/labels") == wanted
    with pytest.raises(mml.InputError, match=r"holds 3 arrays; name .* one of (.*, )?run/l"):
        mml.evaluate("s.zarr", "y.npy")
    with pytest.raises(mml.InputError, match=r"s.zarr.zip: has no array 'run'; name the one with"):
        mml.evaluate("s.zarr.zip#run", "y.npy")
    shutil.make_archive("top.zarr", "zip", base_dir="s.zarr")  # as "zip -r" does it, from above
    fsspec = pytest.importorskip("fsspec")
    with open("top.zarr.zip", "rb") as file:
        fsspec.filesystem("memory").pipe("/top.zarr.zip", file.read())
    for path in ("top.zarr.zip", "memory://top.zarr.zip"):
        assert mml.evaluate(f"{path}#run/logits", f"{path}#run/labels") == wanted
    opened = zarr.open("s.zarr")["run"]
    assert mml.evaluate(opened["logits"], opened["labels"]) == wanted


def test_a_type_in_an_hdf5_file_is_no_array(arrays, files, fails, wanted):
    h5py = pytest.importorskip("h5py")
    for name, array in zip("xy", arrays, strict=True):
        with h5py.File(f"{name}.h5", "w") as file:
            file["values"], file["kind"] = array, array.dtype
    assert mml.evaluate("x.h5", "y.h5") == wanted
    assert "has no array 'kind'" in fails("x.h5#kind", "y.h5")


def test_hdf5(arrays, files, wanted):
    h5py = pytest.importorskip("h5py")
    with h5py.File("s.h5", "w") as file:
        file.create_dataset(
            "run/logits", data=arrays[0], chunks=(64, 3), compression="gzip", fletcher32=True
        )
        file.create_dataset("run/labels", data=arrays[1])
    for size in (10, 100, None):
        assert mml.evaluate("s.h5#run/logits", "s.h5#/run/labels", chunk_size=size) == wanted
    with h5py.File("s.h5") as file:
        assert mml.evaluate(file["run/logits"], file["run/labels"]) == wanted
    with h5py.File("s.h5") as file:
        place = file["run/logits"].id.get_chunk_info(3).byte_offset
    with open("s.h5", "r+b") as file:
        file.seek(place + 20)
        file.write(b"\x00\x01\x02\x03")
    with pytest.raises(mml.InputError, match=r"s.h5.*cannot be read \("):
        mml.evaluate("s.h5#run/logits", "s.h5#run/labels")


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "bfloat16"])
def test_safetensors(arrays, files, fails, dtype):
    numpy = pytest.importorskip("safetensors.numpy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    scores, target = arrays[0].astype(kind), arrays[1].astype(np.int32)
    numpy.save_file({"a": np.zeros(3), "logits": scores, "y": target}, "s.safetensors", {"k": "v"})
    wanted = mml.evaluate(scores.astype(np.float32) if dtype == "bfloat16" else scores, target)
    for size in (7, None):
        assert mml.evaluate("s.safetensors#logits", "s.safetensors#y", chunk_size=size) == wanted
    assert mml.evaluate(scores, target) == wanted
    with open("s.safetensors", "ab") as file:
        file.write(b"more")
    assert "s.safetensors: 4 bytes follow it" in fails("s.safetensors#logits", "y.npy")
    with open("s.safetensors", "r+b") as file:
        file.truncate(2000)
    assert "s.safetensors#logits: cannot be read (it takes" in fails(
        "s.safetensors#logits", "y.npy"
    )


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", [">f4", "<f8"])
def test_npy_of_either_order(arrays, files, order, dtype):
    scores = np.asarray(arrays[0], dtype=dtype, order=order)
    np.save("s.npy", scores)
    np.save("t.npy", scores.T)
    np.save("b.npy", np.moveaxis(scores.reshape(70, 10, C), 2, 1))
    np.save("z.npy", arrays[1].reshape(70, 10))
    wanted = mml.evaluate(scores, arrays[1])
    for size in (9, None):
        assert mml.evaluate("s.npy", "y.npy", chunk_size=size) == wanted
        assert mml.evaluate("t.npy", "y.npy", axis=0, chunk_size=size) == wanted
        assert mml.evaluate("b.npy", "z.npy", axis=1, chunk_size=size) == wanted


@pytest.mark.parametrize("version", [1, 2, 3, 4])
def test_npy_of_every_version(arrays, files, fails, wanted, version):
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({N}, {C}), }}\n".encode()
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    whole = b"\x93NUMPY" + bytes([version, 0]) + length + text + arrays[0].tobytes()
    Path("v.npy").write_bytes(whole)
    with zipfile.ZipFile("v.npz", "w") as archive:
        archive.writestr("v.npy", whole)
    for path in ("v.npy", "v.npz"):
        if version < 4:
            assert mml.evaluate(path, "y.npy") == wanted
        else:
            assert f"{path}: cannot be read (version (4, 0) of the format is not known)" in fails(
                path, "y.npy"
            )


def test_a_format_of_another_package(arrays, files, wanted, monkeypatch):
    from importlib.metadata import EntryPoint

    from mml_arrayapi.evaluation import formats

    class Text:
        chunks = None

        def __init__(self, file, role, rules):
            with file.open() as opened:
                self._array = np.asarray(json.loads(opened.read()), dtype=np.float32)
            self.shape, self.dtype = self._array.shape, self._array.dtype

        def __getitem__(self, where):
            return self._array[where]

    monkeypatch.setattr(EntryPoint, "load", lambda self: Text)
    found = EntryPoint("json", "somewhere:Text", formats.ENTRY_POINTS)
    monkeypatch.setattr(formats, "_plugins", lambda: {".json": found})
    with open("x.json", "w") as file:
        json.dump(arrays[0].astype(float).tolist(), file)
    assert mml.evaluate("x.json", "y.npy") == wanted


# Read once.


def test_archives_are_read_once(arrays, files, wanted, monkeypatch):
    for i in range(8):
        part = slice(i * 88, i * 88 + 88)
        np.savez_compressed(f"part-{i}.npz", arrays[0][part])
    np.savez_compressed("y.npz", arrays[1])
    reads = []
    from numpy.lib import format as npy

    read = npy.read_array
    monkeypatch.setattr(npy, "read_array", lambda *a, **k: reads.append(1) or read(*a, **k))
    assert mml.evaluate("part-*.npz", "y.npz", chunk_size=5) == wanted
    assert len(reads) == 9


@pytest.mark.parametrize("kind", ["zarr", "parquet", "hdf5"])
def test_labels_in_one_chunk_are_decoded_once(arrays, files, wanted, monkeypatch, kind):
    from mml_arrayapi.evaluation import formats
    from mml_arrayapi.evaluation import parquet as tables

    owner, name = formats._Attributed, "__getitem__"
    if kind == "zarr":
        zarr = pytest.importorskip("zarr")
        zarr.create_array(store="labels", data=arrays[1], chunks=(N,))
    elif kind == "parquet":
        parquet("labels.parquet", rows=N, y=arrays[1])
        owner, name = tables.ParquetColumns, "_table"
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File("labels.h5", "w") as file:
            file.create_dataset("y", data=arrays[1], chunks=(N,))
    path = {"zarr": "labels", "parquet": "labels.parquet", "hdf5": "labels.h5"}[kind]
    reads = []
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, *w: reads.append(1) or original(self, *w))
    assert mml.evaluate("x.npy", path, chunk_size=5, workers=4) == wanted
    assert len(reads) == 1


@pytest.mark.parametrize("size", [None, 10, 150, N])
def test_producers_of_dask_arrays_run_once(arrays, wanted, size):
    da = pytest.importorskip("dask.array")
    calls = []

    def produce(block):
        calls.append(block.shape)
        return block

    scores, target = (da.from_array(a, chunks=175) for a in arrays)
    both = da.concatenate([scores, target[:, None].astype(np.float32)], axis=1)
    both = both.rechunk((175, C + 1)).map_blocks(
        produce, dtype=np.float32, meta=np.empty((0, 0), np.float32)
    )
    for labels in (target, target.rechunk(50), both[:, C].astype(np.int64)):
        calls.clear()
        assert mml.evaluate(both[:, :C], labels, chunk_size=size) == wanted
        assert len(calls) == 4


# Places.


def close_sessions(kind):
    """Have fsspec's sessions collected here, where the warning that they are open is expected."""
    kind.clear_instance_cache()
    gc.collect()


def write_everything(fs, folder, arrays):
    zarr = pytest.importorskip("zarr")
    scores, target = arrays
    for name, array in (("x", scores), ("y", target)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        fs.pipe_file(f"{folder}/{name}.npy", buffer.getvalue())
    for i in range(12):
        buffer = io.BytesIO()
        np.save(buffer, np.array_split(scores, 12)[i])
        fs.pipe_file(f"{folder}/part-{i}.npy", buffer.getvalue())
    store = zarr.storage.FsspecStore.from_mapper(fs.get_mapper(f"{folder}/s.zarr"))
    group = zarr.open_group(store, mode="w")
    for name, array in (("logits", scores), ("labels", target)):
        made = group.create_array(
            name, shape=array.shape, chunks=(90, *array.shape[1:]), dtype=array.dtype
        )
        made[...] = array
    parquet("p.parquet", logits=list(scores), label=target)
    fs.put_file("p.parquet", f"{folder}/table/part-0.parquet")


def read_everything(url, wanted):
    assert mml.evaluate(f"{url}/x.npy", f"{url}/y.npy", chunk_size=300) == wanted
    figures = mml.evaluate(f"{url}/part-*.npy", "y.npy")
    assert figures == wanted
    assert figures.pairing[11]["scores"]["name"].endswith("/run/part-11.npy")
    assert mml.evaluate(f"{url}/s.zarr#logits", f"{url}/s.zarr#labels", chunk_size=100) == wanted
    assert mml.evaluate(f"{url}/table", f"{url}/table/part-0.parquet") == wanted
    with pytest.raises(mml.InputError, match=r"no-\*.npy: no file matches it; check the path"):
        mml.evaluate(f"{url}/no-*.npy", "y.npy")


def resume_there(url, wanted):
    """Stop, and go on from a checkpoint folder there."""

    class Stop(Exception):
        pass

    calls = []

    def stop(done, rows):
        calls.append(done)
        if len(calls) == 3:
            raise Stop

    options = {"chunk_size": 100, "checkpoint": f"{url}/ck", "workers": 1}
    with pytest.raises(Stop):
        mml.evaluate("x.npy", "y.npy", progress=stop, **options)
    calls.clear()
    assert mml.evaluate("x.npy", "y.npy", progress=lambda *_: calls.append(1), **options) == wanted
    assert len(calls) == 4
    with pytest.raises(mml.InputError, match=r"was begun with p 1.0, but this run has 2.0"):
        mml.evaluate("x.npy", "y.npy", p=2, **options)


def test_memory(arrays, files, wanted):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    try:
        write_everything(fs, "/run", arrays)
        read_everything("memory://run", wanted)
        resume_there("memory://run", wanted)
    finally:
        fs.store.clear()


def test_local_urls(files, wanted):
    pytest.importorskip("fsspec")
    assert mml.evaluate(f"file://{files}/x.npy", f"file://{files}/*y.npy") == wanted
    resume_there(f"file://{files}", wanted)


def test_other_urls_in_one_line(files, fails):
    pytest.importorskip("fsspec")
    assert "gs://b/x.npy: " in (line := fails("gs://b/x.npy", "y.npy"))
    assert "gcsfs" in line or "cannot be" in line
    assert "nothing://x.npy: Protocol not known: nothing" in fails("nothing://x.npy", "y.npy")


@pytest.fixture
def bucket(monkeypatch):
    """A bucket on a server of this machine."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import s3fs

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    urlopen(
        f"http://{host}:{port}/moto-api/reset", data=b""
    ).close()  # else it keeps the last one's
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    s3fs.S3FileSystem.clear_instance_cache()
    fs = s3fs.S3FileSystem()
    fs.mkdir("bucket")
    yield fs
    close_sessions(s3fs.S3FileSystem)
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_s3(arrays, files, wanted, bucket):
    write_everything(bucket, "bucket/run", arrays)
    read_everything("s3://bucket/run", wanted)
    resume_there("s3://bucket/run", wanted)

    bucket.ls("bucket/run/table")
    other = type(bucket)(skip_instance_cache=True)  # as of another program
    other.put_file("p.parquet", "bucket/run/table/part-1.parquet")
    pattern = "s3://bucket/run/table/*.parquet"
    assert mml.evaluate(pattern, pattern).samples == 2 * N

    def change(done, rows):
        buffer = io.BytesIO()
        np.save(buffer, arrays[0] * 2)
        bucket.pipe_file("bucket/run/x.npy", buffer.getvalue())

    with pytest.raises(mml.InputError, match=r"run/x.npy: the file has changed since"):
        mml.evaluate("s3://bucket/run/x.npy", "y.npy", chunk_size=100, workers=1, progress=change)
    with pytest.raises(mml.InputError, match=r"s3://misspelt/ck: .*bucket does not exist"):
        mml.evaluate("x.npy", "y.npy", checkpoint="s3://misspelt/ck")
    with pytest.raises(mml.InputError, match=r"s3://none/x.npy: "):
        mml.evaluate("s3://none/x.npy", "y.npy")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_question_marks_in_names_and_versions_on_s3(arrays, files, wanted, bucket):
    data = Path("x.npy").read_bytes()
    bucket.pipe({f"bucket/{name}.npy": data for name in ("x?", "a?b/x", "z?v=1")})
    bucket.pipe({"bucket/xx.npy": b"", "bucket/q1.npy": data})
    for name in ("x?", "a?b/x", "z?v=1", "z?v*", "q?"):
        assert mml.evaluate(f"s3://bucket/{name}.npy", "y.npy") == wanted
    bucket.make_bucket_versioned("bucket", True)
    versions = [
        bucket.call_s3("put_object", Bucket="bucket", Key="v.npy", Body=body)["VersionId"]
        for body in (data, b"newer")
    ]
    assert mml.evaluate(f"s3://bucket/v.npy?versionId={versions[0]}", "y.npy") == wanted


def test_question_marks_in_names(arrays, files, wanted):
    fsspec = pytest.importorskip("fsspec")
    os.rename("x.npy", "x?.npy")
    fsspec.filesystem("memory").pipe_file("/x?.npy", Path("x?.npy").read_bytes())
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("x?.npy")
    for name in ("x?.npy", "memory://x?.npy", "zip://x?.npy::a.zip"):
        assert mml.evaluate(name, "y.npy") == wanted
    fsspec.filesystem("memory").rm("/x?.npy")


def test_a_zip_archive_of_arrays(arrays, files, wanted):
    """What fsspec reads, is read: here, members of an archive."""
    pytest.importorskip("fsspec")
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("x.npy", "part-0.npy")
    assert mml.evaluate("zip://*.npy::a.zip", "y.npy") == wanted


def test_netcdf_3(files, fails):
    with open("x.nc", "wb") as file:
        file.write(b"CDF\x01" + bytes(60))
    assert "x.nc: is of NetCDF 3, which is not HDF5; convert it to 4" in fails("x.nc", "y.npy")


def test_objects_that_may_be_read_but_not_listed(arrays, files, wanted, fails):
    """As many public ones are."""
    fsspec = pytest.importorskip("fsspec")
    memory = pytest.importorskip("fsspec.implementations.memory").MemoryFileSystem

    class Unlisted(memory):
        protocol, store, pseudo_dirs = "unlisted", {}, [""]
        denied = ()

        @classmethod
        def _strip_protocol(cls, path):
            return super()._strip_protocol(path.replace("unlisted://", "memory://"))

        def ls(self, path, **_):
            raise PermissionError("Access Denied")

        find = isdir = glob = ls

        def _open(self, path, *arguments, **options):
            if any(name in path for name in Unlisted.denied):
                raise PermissionError("Access Denied")
            return super()._open(path, *arguments, **options)

    fsspec.register_implementation("unlisted", Unlisted, clobber=True)
    fs = fsspec.filesystem("unlisted")
    for name in ("x.npy", "y.npy"):
        fs.pipe(f"/{name}", Path(name).read_bytes())
    assert mml.evaluate("unlisted://x.npy", "unlisted://y.npy") == wanted
    assert "unlisted://*.npy: cannot be found (Access Denied); check" in fails(
        "unlisted://*.npy", "y.npy"
    )
    Unlisted.denied = ("x.npy",)
    line = fails("unlisted://x.npy", "y.npy")
    assert "unlisted://x.npy: cannot be read (Access Denied); check your access to it" in line


def test_weights_in_a_column_of_integers(arrays, files):
    parquet("w.parquet", weight=np.arange(N), other=np.arange(N) * 2)
    figures = mml.evaluate("x.npy", "y.npy", sample_weight="w.parquet")
    assert figures == mml.evaluate("x.npy", "y.npy", sample_weight=np.arange(N))
    parquet("w.parquet", count=np.arange(N))
    with pytest.raises(mml.InputError, match="cannot tell which columns hold the sample weights"):
        mml.evaluate("x.npy", "y.npy", sample_weight="w.parquet")


def test_progress_that_counts_as_false(arrays):
    class Log(list):
        def __call__(self, done, rows):
            self.append((done, rows))

    log = Log()
    mml.evaluate(*arrays, progress=log, chunk_size=350, workers=1)
    assert log == [(350, N), (N, N)]
    assert mml.evaluate(*arrays, progress=False).samples == N


@pytest.mark.parametrize("n_classes", [3, 9])
def test_parquet_with_the_classes_in_rows(files, n_classes):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    scores = np.random.default_rng(1).standard_normal((n_classes, 5))
    target = np.arange(5) % n_classes
    table = pa.table({"logits": list(scores)})
    pq.write_table(table, "t.parquet", row_group_size=2)
    wanted = mml.evaluate(scores, target, axis=0)
    assert mml.evaluate("t.parquet", target, axis=0) == wanted
    assert mml.evaluate("t.parquet", target, axis=0, chunk_size=2) == wanted


def test_parts_in_different_byte_orders(arrays, files, wanted):
    np.save("part-1.npy", arrays[0][:300].astype(">f4"))
    np.save("part-2.npy", arrays[0][300:])
    assert mml.evaluate("part-*.npy", "y.npy") == wanted
    assert mml.evaluate(["part-1.npy", "part-2.npy"], "y.npy", chunk_size=90) == wanted
