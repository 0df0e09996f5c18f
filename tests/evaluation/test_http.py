"""Files on web servers: with and without byte ranges, with and without lists of folders."""

import gc
import io
import os
import re
import socket
import tempfile
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation.files import File
from tests.evaluation.writers import parquet, zarr_file

C = 6

pytestmark = [
    # Arrow leaves it to the collector to close copies of files, fsspec its sessions.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Server(SimpleHTTPRequestHandler):
    """As python -m http.server: with lists, without ranges."""

    def log_message(self, *_):
        pass


class Ranges(Server):
    """As nginx: with ranges, without lists."""

    def list_directory(self, path):
        self.send_error(404)

    def send_head(self):
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        path = self.translate_path(self.path)
        if not asked or not os.path.isfile(path):
            return super().send_head()
        size = os.path.getsize(path)
        first, last = asked.groups()
        start = int(first) if first else size - int(last)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            return self.send_error(416)
        self.send_response(206)
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Last-Modified", self.date_time_string(os.path.getmtime(path)))
        self.end_headers()
        with open(path, "rb") as file:
            return io.BytesIO(file.read()[start:stop])


@pytest.fixture
def serve(files):
    """Serve the working directory; return its URL."""
    pytest.importorskip("aiohttp")
    started = []

    def start(handler):
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(files)))
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        started.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()
    kind = pytest.importorskip("fsspec.implementations.http").HTTPFileSystem
    kind.clear_instance_cache()
    gc.collect()


SERVERS = pytest.mark.parametrize("handler", [Server, Ranges], ids=["lists", "ranges"])


@SERVERS
def test_files(arrays, files, wanted, serve, handler):
    url = serve(handler)
    np.savez("both.npz", logits=arrays[0], labels=arrays[1])
    parquet("p.parquet", logits=list(arrays[0]), label=arrays[1])
    assert mml.evaluate(f"{url}/x.npy", f"{url}/y.npy#", chunk_size=300) == wanted
    assert mml.evaluate(f"{url}/both.npz#logits", f"{url}/both.npz#labels") == wanted
    capitals = url.replace("http", "HTTP")
    assert mml.evaluate(f"{capitals}/x.npy", f"simplecache::{capitals}/y.npy#") == wanted
    with pytest.raises(mml.InputError, match="twice"):
        mml.evaluate([f"{url}/x.npy", f"{capitals}/x.npy"], ["y.npy", "y.npy"])
    assert mml.evaluate(f"{url}/p.parquet", f"{url}/p.parquet?version=1") == wanted


@SERVERS
@pytest.mark.parametrize("version", [2, 3])
def test_zarr_stores(arrays, files, wanted, serve, handler, version):
    zarr = pytest.importorskip("zarr")
    zarr.open_group("s.zarr", mode="w", zarr_format=version)
    zarr_file("s.zarr/x", arrays[0], zarr_format=version)
    zarr_file("s.zarr/y", arrays[1], zarr_format=version)
    url = serve(handler)
    assert mml.evaluate(f"{url}/s.zarr#x", f"{url}/s.zarr#y", chunk_size=100) == wanted
    assert mml.evaluate(f"{url}/s.zarr/x", f"{url}/s.zarr/y/") == wanted
    os.remove("s.zarr/y/0" if version == 2 else "s.zarr/y/c/0")
    with pytest.raises(mml.InputError, match=r"s.zarr/y: 100 values were never written"):
        mml.evaluate(f"{url}/s.zarr/x", f"{url}/s.zarr/y")


@SERVERS
@pytest.mark.parametrize("item", ["/x", "#x"])
def test_shards_of_zarr(arrays, files, fails, wanted, serve, handler, item):
    zarr = pytest.importorskip("zarr")
    zarr.open_group("s.zarr", mode="w")
    zarr_file("s.zarr/x", arrays[0], shards=(200, C))
    scores = f"{serve(handler)}/s.zarr{item}"
    if handler is Ranges:
        assert mml.evaluate(scores, "y.npy") == wanted
        return
    assert (
        f"s.zarr{item}: its server gives out no parts of files, which a sharded store needs; "
        "download the store first" in fails(scores, "y.npy")
    )


def test_a_store_that_is_rewritten(arrays, files, serve):
    zarr_file("x.zarr", arrays[0])
    os.utime("x.zarr/zarr.json", (0, 0))  # servers tell whole seconds
    url = serve(Server)

    def rewrite(*_):
        zarr_file("x.zarr", arrays[0].astype("f8"), overwrite=True)

    with pytest.raises(mml.InputError, match=r"x.zarr: the file has changed since"):
        mml.evaluate(f"{url}/x.zarr", "y.npy", progress=rewrite)


class Silent(Ranges):
    """With ranges, and nothing that tells of changes."""

    def send_header(self, keyword, value):
        if keyword != "Last-Modified":
            super().send_header(keyword, value)


def test_a_file_of_whose_changes_nothing_tells_is_copied_once(arrays, files, wanted, serve):
    url = serve(Silent)

    def replace(*_):
        np.save("x.npy", arrays[0] + 1)

    figures = mml.evaluate(f"{url}/x.npy", f"{url}/y.npy", chunk_size=50, progress=replace)
    assert figures == wanted


class Endless(Ranges):
    """With ranges, and without lengths."""

    def send_header(self, keyword, value):
        if keyword != "Content-Length":
            super().send_header(keyword, value)


class Modest(Ranges):
    """With ranges, of which it says that it has none."""

    def end_headers(self):
        self.send_header("Accept-Ranges", "none")
        super().end_headers()


@pytest.mark.parametrize("handler", [Endless, Modest])
def test_servers_in_whose_files_fsspec_does_not_seek(handler, arrays, files, wanted, serve):
    url = serve(handler)
    parquet("x.parquet", logits=list(arrays[0]))
    for name in ("x.npy", "x.parquet"):
        assert mml.evaluate(f"{url}/{name}", f"{url}/y.npy", chunk_size=50) == wanted


@pytest.mark.parametrize("handler", [Server, Ranges, Endless, Modest, Silent])
@pytest.mark.parametrize("name", ["x.npy", "x.parquet", "x.h5"])
def test_empty_files_are_said_to_be_empty(name, handler, files, serve):
    with open(name, "w"):
        pass
    with pytest.raises(mml.InputError, match=rf"{name}: the file is empty"):
        mml.evaluate(f"{serve(handler)}/{name}", "y.npy")


def test_a_checkpoint_of_a_file_of_whose_changes_nothing_tells(arrays, files, serve):
    url = serve(Silent)
    ours = {"chunk_size": 50, "checkpoint": "ck"}
    mml.evaluate(f"{url}/x.npy", f"{url}/y.npy", **ours)
    with pytest.raises(mml.InputError, match="was begun with other inputs"):
        mml.evaluate(f"{url}/x.npy", f"{url}/y.npy", **ours)


def test_a_store_of_whose_changes_nothing_tells(arrays, files, serve):
    zarr_file("x.zarr", arrays[0])
    with pytest.raises(
        mml.InputError, match=r"x\.zarr: its server tells neither ETag nor Last-Mod"
    ):
        mml.evaluate(f"{serve(Silent)}/x.zarr", "y.npy")


def test_a_server_that_leads_to_another_address_each_time(arrays, files, wanted, serve):
    count = iter(range(10**6))

    class Signed(Ranges):
        def send_head(self):
            if "?" in self.path:
                return super().send_head()
            self.send_response(302)
            self.send_header("Location", f"{self.path}?signature={next(count)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None

    url = serve(Signed)
    assert mml.evaluate(f"{url}/x.npy", f"{url}/y.npy", chunk_size=100) == wanted


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("/x.npy", "/./x.npy"),
        ("/x.npy", "/none/../x.npy"),
        ("/x.npy", "/%78.npy"),
        ("/x.npy", "/x.npy?"),
        ("/x.npy?a=b", "/x.npy?a=%62"),
        ("/a b,c=1.npy", "/a%20b%2Cc%3D1.npy"),
        ("/s.zarr#a b", "/s.zarr/./a%20b/"),
        ("/a.zip", "/./a.zip"),
    ],
)
def test_addresses_of_the_same(arrays, files, serve, first, second):
    zarr = pytest.importorskip("zarr")
    np.save("a b,c=1.npy", arrays[0])
    zarr.open_group("s.zarr", mode="w")
    zarr_file("s.zarr/a b", arrays[0])
    with zipfile.ZipFile("a.zip", "w") as archive:
        archive.write("x.npy")
    url = ("zip://x.npy::" if first.endswith("zip") else "") + serve(Ranges)
    url = url.replace("127.0.0.1", "localhost")
    for other in (url, url.replace("localhost", "LOCALHOST")):
        with pytest.raises(mml.InputError, match=r"is given twice, as .* too; its samples would"):
            mml.evaluate([url + first, other + second], ["y.npy", "y.npy"])


def test_the_usual_port():
    http = pytest.importorskip("fsspec.implementations.http").HTTPFileSystem()
    urls = ("http://h/x.npy", "http://h:80/x.npy", "http://h:443/x.npy")
    first, usual, other = (File(http, url, "", url).identity(()) for url in urls)
    assert first == usual != other


def test_queries_make_other_files(arrays, files, serve):
    url = serve(Ranges)
    figures = mml.evaluate([f"{url}/x.npy?v=1", f"{url}/x.npy?v=2"], ["y.npy", "y.npy"])
    assert figures.samples == 2 * len(arrays[0])


def test_patterns_and_folders(arrays, files, wanted, serve):
    url = serve(Server)
    os.mkdir("table")
    for i in range(12):
        part = np.array_split(arrays[0], 12)[i]
        np.save(f"part-{i}.npy", part)
        parquet(f"table/{i}.parquet", logits=list(part))
    assert mml.evaluate(f"{url}/part-*.npy", f"{url}/y.npy", chunk_size=300) == wanted
    assert mml.evaluate(f"{url}/table/*.parquet", f"{url}/y.npy") == wanted


def test_copies_are_of_one_evaluation(arrays, files, wanted, serve, monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    os.mkdir("copies")
    url = serve(Server)
    assert mml.evaluate(f"{url}/x.npy", f"{url}/y.npy") == wanted
    np.save("y.npy", (arrays[1] + 1) % C)
    changed = mml.evaluate(*arrays[:1], "y.npy")
    assert mml.evaluate(f"{url}/x.npy", f"{url}/y.npy") == changed
    gc.collect()
    assert os.listdir("copies") == []


@SERVERS
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.npy", "none.npy: there is no such file; check the path"),
        ("none.zarr", "none.zarr: there is no such file; check the path"),
        ("none-*.npy", "none-*.npy: no file matches it; check the path"),
    ],
)
def test_nothing_there(files, fails, serve, handler, name, message):
    assert message in fails(f"{serve(handler)}/{name}", "y.npy")


@pytest.mark.parametrize("name", ["x.npy", "s.zarr", "x-*.npy", "folder"])
def test_no_answer(files, fails, serve, name):
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{one.getsockname()[1]}"
    line = fails(f"http://{place}/{name}", "y.npy")
    assert f"{place}/{name}: the server does not answer (Cannot connect to host {place}" in line
