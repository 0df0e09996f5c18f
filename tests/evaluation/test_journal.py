"""The journal: resuming, damage, locks."""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock
from zlib import crc32

import numpy as np
import pytest

import mml_arrayapi as mml
from mml_arrayapi.evaluation import journal, run
from mml_arrayapi.evaluation.journal import NAME
from tests.evaluation.writers import zarr_file


def damage(path, start, data):
    with open(path, "r+b") as file:
        file.seek(start)
        file.write(data)


class Killed(Exception):
    pass


def stop_after(pieces):
    def progress(done, rows):
        nonlocal pieces
        pieces -= 1
        if not pieces:
            raise Killed

    return progress


def test_resuming_gives_the_same_bits(files, wanted):
    for _ in range(3):
        with pytest.raises(Killed):
            mml.evaluate(
                "x.npy", "y.npy", chunk_size=60, checkpoint="ck", progress=stop_after(2), workers=1
            )
    lines = (files / "ck" / NAME).read_text().splitlines()
    assert len(lines) == 1 + 6
    steps = []
    figures = mml.evaluate(
        "x.npy",
        "y.npy",
        chunk_size=60,
        checkpoint="ck",
        progress=lambda done, _: steps.append(done),
    )
    assert figures == wanted
    assert len(steps) == 6
    steps.clear()
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted


@pytest.mark.parametrize(
    "torn", [b"", b"{", b"00000000 {}", b"00000000 {} more", b"\xff\xfe garbage"]
)
def test_a_torn_last_line_is_dropped(files, wanted, torn):
    with pytest.raises(Killed):
        mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck", progress=stop_after(3))
    journal = files / "ck" / NAME
    journal.write_bytes(journal.read_bytes()[:-9] + torn)
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted
    assert mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck") == wanted


def test_a_damaged_journal_is_refused(files, capsys, fails, command):
    assert command("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60) == 0
    capsys.readouterr()
    damage(files / "ck" / NAME, 700, b"#")
    line = fails("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60)
    assert re.search(rf"ck/{NAME}: line \d is damaged; remove the journal", line)


@pytest.mark.parametrize(
    "record",
    [
        '{"of":"OF","batch":99,"state":STATE}',
        '{"of":"OF","batch":-1,"state":STATE}',
        '{"of":"OF","batch":"0","state":STATE}',
        '{"of":"OF","batch":[0],"state":STATE}',
        '{"of":"OF","state":STATE}',
        '{"of":"OF","batch":0}',
        '{"of":"OF","batch":0,"state":{}}',
        '{"of":"OF","batch":0,"state":null}',
        '{"batch":0,"state":STATE}',
        "[1,2]",
        "3",
    ],
)
def test_a_journal_whose_records_make_no_sense_is_refused(files, record, fails, command, capsys):
    """Their checksums are right: somebody has written them."""
    assert command("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60) == 0
    capsys.readouterr()
    first, second, *_ = (files / "ck" / NAME).read_bytes().splitlines(keepends=True)
    told = json.loads(second[9:])
    text = record.replace("STATE", json.dumps(told["state"])).replace("OF", told["of"]).encode()
    whole = first + b"%08x %s\n" % (crc32(text), text)
    (files / "ck" / NAME).write_bytes(whole)
    line = fails("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60)
    assert (
        f"ck/{NAME}: record 2 is damaged; remove the journal, and evaluate from the start" in line
    )
    assert (files / "ck" / NAME).read_bytes() == whole


@pytest.mark.parametrize("text", [b"my notes", b"my notes\n", b"one\ntwo", b"{}\n", b"12345678-"])
def test_a_file_that_is_no_journal_stays_as_it_is(files, text, fails):
    (files / "ck").mkdir()
    (files / "ck" / NAME).write_bytes(text)
    line = fails("x.npy", "y.npy", "--checkpoint", "ck")
    assert f"ck/{NAME}: line 1 is damaged; remove the journal, and evaluate from the start" in line
    assert (files / "ck" / NAME).read_bytes() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--p", 2), "was begun with p 1.0, but this run has 2.0; use the same, or another folder"),
        (("--margin", 2), "was begun with margin 1.0, but this run has 2.0"),
        (("--weight", "1,1,1,1,1,2"), "was begun with weight None, but this run has"),
        (("--chunk-size", 61), "was begun with chunk size 60, but this run has 61"),
        (
            ("--backend", "generic"),
            "was begun with kernel numpy-cpu, but this run has generic",
        ),
    ],
)
def test_another_journal_is_refused(files, capsys, options, message, fails, command):
    assert command("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60) == 0
    capsys.readouterr()
    arguments = ("x.npy", "y.npy", "--checkpoint", "ck", "--chunk-size", 60, *options)
    assert message in fails(*arguments)


def test_a_changed_file_is_refused(arrays, files, capsys, fails, command):
    assert command("x.npy", "y.npy", "--checkpoint", "ck") == 0
    capsys.readouterr()
    np.save("y.npy", arrays[1][::-1])
    line = fails("x.npy", "y.npy", "--checkpoint", "ck")
    assert "y.npy as targets); give the same files, unchanged, or another folder" in line


def test_other_inputs_are_named(arrays, files, capsys, fails, command):
    np.save("w.npy", np.ones(len(arrays[1])))
    assert command("x.npy", "y.npy", "--checkpoint", "one") == 0
    more = "x.npy", "y.npy", "--sample-weight", "w.npy"
    assert command(*more, "--checkpoint", "two") == 0
    capsys.readouterr()
    assert "w.npy as sample weights); give" in fails(*more, "--checkpoint", "one")
    line = fails("x.npy", "y.npy", "--checkpoint", "two")
    assert "other inputs (then also: " in line
    assert "w.npy as sample weights); give" in line
    np.save("part-1.npy", arrays[0][:350])
    np.save("part-2.npy", arrays[0][350:])
    at = {"chunk_size": 700, "checkpoint": "three"}
    mml.evaluate(["part-1.npy", "part-2.npy"], "y.npy", **at)
    with pytest.raises(mml.InputError, match=r"other inputs \(now: in another order\)"):
        mml.evaluate(["part-2.npy", "part-1.npy"], "y.npy", **at)
    os.rename("part-1.npy", "part-0.npy")
    with pytest.raises(mml.InputError, match=r"part-0.npy as scores"):
        mml.evaluate(["part-0.npy", "part-2.npy"], "y.npy", **at)


SLOW = """
import time
import mml_arrayapi as mml
mml.evaluate("x.npy", "y.npy", chunk_size=7, checkpoint="ck", workers=1,
             progress=lambda *_: time.sleep(0.02))
"""


def test_kill_9_of_the_client_and_resume(files, wanted):
    process = subprocess.Popen([sys.executable, "-c", SLOW])
    journal = files / "ck" / NAME
    deadline = time.monotonic() + 60
    while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert journal.read_bytes().count(b"\n") < 101
    steps = []
    figures = mml.evaluate(
        "x.npy", "y.npy", chunk_size=7, checkpoint="ck", progress=lambda done, _: steps.append(done)
    )
    assert figures == wanted
    assert 0 < len(steps) < 100


# One at a time.


AT_ONCE = """
import sys
import mml_arrayapi as mml
try:
    print(mml.evaluate("x.npy", "y.npy", chunk_size=7, checkpoint="ck").loss)
except mml.InputError as error:
    print(error)
"""


def test_runs_that_start_at_once(files, wanted):
    runs = [
        subprocess.Popen([sys.executable, "-c", AT_ONCE], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [run.communicate()[0].strip() for run in runs]
    lost = [line for line in said if line != repr(wanted.loss)]
    assert len(lost) < 4
    assert all("journal.jsonl: is in use by another evaluation; wait" in line for line in lost)
    assert (files / "ck" / NAME).read_bytes().count(b'"version"') == 1
    assert mml.evaluate("x.npy", "y.npy", chunk_size=7, checkpoint="ck") == wanted


def test_a_journal_in_use_is_refused(files, wanted):
    messages = []

    def again(done, rows):
        if not messages:
            with pytest.raises(mml.InputError, match="is in use by another evaluation") as caught:
                mml.evaluate("x.npy", "y.npy", chunk_size=60, checkpoint="ck")
            messages.append(caught)

    options = {"chunk_size": 60, "checkpoint": "ck"}
    assert mml.evaluate("x.npy", "y.npy", progress=again, **options) == wanted
    assert messages
    assert mml.evaluate("x.npy", "y.npy", **options) == wanted


def test_a_file_system_without_locks(files, fails, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(journal, "flock", flock)
    line = fails("x.npy", "y.npy", "--checkpoint", "ck")
    assert "journal.jsonl: cannot be locked (No locks available); give a folder on another" in line


def test_a_journal_that_cannot_be_read(files, fails, monkeypatch):
    (files / "ck").mkdir()
    os.symlink(os.devnull, files / "ck" / NAME)
    assert "journal.jsonl: is no file; give another" in fails(
        "x.npy", "y.npy", "--checkpoint", "ck"
    )
    os.unlink(files / "ck" / NAME)
    opened = Path.open

    def broken(path, *arguments, **options):
        file = opened(path, *arguments, **options)
        if path.name != NAME:
            return file
        file.close()
        return SimpleNamespace(
            fileno=lambda: os.open(files / "ck" / NAME, os.O_RDWR),
            seek=mock.Mock(side_effect=OSError(errno.EIO, "Input/output error")),
            close=lambda: None,
        )

    monkeypatch.setattr(journal, "flock", None)
    monkeypatch.setattr(Path, "open", broken)
    line = fails("x.npy", "y.npy", "--checkpoint", "ck")
    assert "journal.jsonl: cannot be read (Input/output error); give another folder" in line


@pytest.mark.parametrize(
    "folder", ["x.zarr", "x.zarr/ck", "x.zarr/c/..", "link", "file://{}/x.zarr"]
)
def test_a_checkpoint_in_a_store_that_is_read(files, arrays, fails, folder):
    zarr_file("x.zarr", arrays[0])
    os.symlink("x.zarr", "link")
    before = sorted(os.listdir("x.zarr"))
    line = fails("x.zarr", "y.npy", "--checkpoint", folder.format(files))
    assert "lies in x.zarr, which this run reads and would change; give another folder" in line
    assert sorted(os.listdir("x.zarr")) == before
    assert mml.evaluate("x.zarr", "y.npy", checkpoint="x.zarr-ck").samples == 700


def test_a_journal_of_an_older_version_is_refused(files, fails):
    (files / "ck").mkdir()
    (files / "ck" / NAME).write_text("")
    text = b'{"p":1}'
    (files / "ck" / NAME).write_bytes(b"%08x %s\n" % (crc32(text), text))
    line = fails("x.npy", "y.npy", "--checkpoint", "ck")
    assert "journal.jsonl: the first line is damaged; remove the journal, and evaluate" in line


@pytest.mark.filterwarnings("ignore")  # of sessions that were never opened
def test_a_remote_checkpoint_that_cannot_be_reached(files, fails, monkeypatch):
    pytest.importorskip("s3fs")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{one.getsockname()[1]}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{place}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for url in ("s3://bucket/ck", f"http://{place}/ck"):
        line = fails("x.npy", "y.npy", "--checkpoint", url)
        assert url in line
        assert "cannot be written (" in line or "cannot be read (" in line


def test_another_version_of_the_library(files, monkeypatch):
    mml.evaluate("x.npy", "y.npy", checkpoint="ck")
    monkeypatch.setattr(run, "__version__", "0.0.0")
    with pytest.raises(
        mml.InputError, match=r"was begun with mml_arrayapi \d.*but this run has 0.0.0"
    ):
        mml.evaluate("x.npy", "y.npy", checkpoint="ck")


def test_a_checkpoint_at_a_url_of_this_machine_is_a_folder(files, wanted):
    folder = f"file://{files}/ck"
    assert mml.evaluate("x.npy", "y.npy", checkpoint=folder, chunk_size=100) == wanted
    assert (files / "ck" / "journal.jsonl").exists()


def test_a_torn_line_of_a_remote_checkpoint_is_dropped(files, wanted):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    ours = {"checkpoint": "memory://torn", "chunk_size": 100}
    assert mml.evaluate("x.npy", "y.npy", **ours) == wanted
    names = sorted(memory.glob("memory://torn/*.json"))
    for name in names[1:]:  # batches need not end in order
        whole = memory.cat_file(name)
        memory.pipe_file(name, whole[:-5])
        assert mml.evaluate("x.npy", "y.npy", **ours) == wanted
        assert memory.cat_file(name) == whole
    memory.pipe_file(names[2], whole[:-5] + b"\n")
    with pytest.raises(
        mml.InputError, match=r"^memory://.*: is damaged; remove this file, and run"
    ):
        mml.evaluate("x.npy", "y.npy", **ours)
    memory.rm(names[2])
    assert mml.evaluate("x.npy", "y.npy", **ours) == wanted
    memory.pipe_file(names[0], b"{")
    message = r"^memory://torn: journal-0+.json is damaged; remove the journal, and evaluate"
    with pytest.raises(mml.InputError, match=message):
        mml.evaluate("x.npy", "y.npy", **ours)


def test_a_remote_checkpoint_whose_name_has_brackets(files, wanted):
    pytest.importorskip("fsspec")
    ours = {"checkpoint": "memory://ck[1]", "chunk_size": 100}
    assert mml.evaluate("x.npy", "y.npy", **ours) == wanted
    done = []
    ours["progress"] = lambda *count: done.append(count)
    assert mml.evaluate("x.npy", "y.npy", **ours) == wanted
    assert not done
    with pytest.raises(mml.InputError, match=r"was begun with p 1\.0, but this run has 2\.0"):
        mml.evaluate("x.npy", "y.npy", p=2, **ours)


def test_two_runs_that_begin_at_once_in_a_remote_folder(files, monkeypatch):
    """Each reads an empty folder, then writes."""
    fsspec = pytest.importorskip("fsspec")
    ours = {"checkpoint": "memory://race", "chunk_size": 100}
    with pytest.raises(Killed):
        mml.evaluate("x.npy", "y.npy", progress=stop_after(3), **ours)
    memory = fsspec.filesystem("memory")
    names = sorted(memory.glob("memory://race/*.json"))
    first = {name: memory.cat_file(name) for name in names}
    memory.rm("/race", recursive=True)
    with pytest.raises(Killed):
        mml.evaluate("x.npy", "y.npy", p=2, progress=stop_after(1), **ours)
    for name in names[2:]:
        memory.pipe_file(name, first[name])
    with pytest.raises(mml.InputError, match="is of another evaluation, begun here at the same"):
        mml.evaluate("x.npy", "y.npy", p=2, **ours)
    memory.rm("/race", recursive=True)
    written = journal._Remote.append

    def overtaken(self, number, line):
        written(self, number, line)
        if number == 0:
            self._fs.pipe_file(names[0], first[names[0]])

    monkeypatch.setattr(journal._Remote, "append", overtaken)
    with pytest.raises(mml.InputError, match=r"was begun with p 1\.0, but this run has 2\.0"):
        mml.evaluate("x.npy", "y.npy", p=2, **ours)
