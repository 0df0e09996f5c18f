"""Large calls on PyTorch's own threads: forks, interrupts, threads that don't start."""

import shutil
import subprocess
import sys

import pytest

from tests.backends.cpu.test_threads import NO_THREADS
from tests.tree import run_python

pytest.importorskip("torch")
engine = pytest.importorskip("mml_arrayapi.backends.pytorch.cpu")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="threads are counted as on Linux"),
    pytest.mark.skipif(engine.native is None, reason=f"torch-cpu: {engine.cpu.reason()}"),
    pytest.mark.skipif(not engine.GRAPH_OPERATORS, reason="PyTorch before 2.10"),
]

START = """
import os, signal, sys, threading, time
import torch
from mml_arrayapi import multi_margin_loss
threads = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn({rows}, 100, generator=torch.Generator().manual_seed(0))
y = torch.zeros({rows}, dtype=torch.int64)
call = lambda: multi_margin_loss(x, y, p={p}).item()
"""


def run(code, rows=20_000, p=1, **environment):
    wanted = {"MML_ARRAYAPI_NUM_THREADS": "3", "OMP_NUM_THREADS": "3", **environment}
    code = START.format(rows=rows, p=p) + code
    return run_python(code, flags=("-W", "ignore"), **wanted).split()


def test_no_threads_but_pytorchs():
    printed = run("torch.relu(x); before = threads(); first = call(); print(threads() - before)")
    assert printed == ["0"]


def test_the_same_bits_as_on_our_own_threads_and_alone():
    code = "print(call().hex(), multi_margin_loss(x.numpy(), y.numpy()).item().hex())"
    printed = run(code) + run(code, MML_ARRAYAPI_NUM_THREADS="1")
    assert len(printed) == 4
    assert len(set(printed)) == 1


def test_a_forked_child_has_threads_of_its_own():
    code = """
torch.relu(x)
expected, read, write = call(), *os.pipe()
if not os.fork():
    before = threads()
    os.write(write, f"{call() == expected} {threads() - before}".encode())
    os._exit(0)
os.wait()
print(os.read(read, 99).decode(), call() == expected)
"""
    assert run(code) == ["True", "2", "True"]


def test_a_signal_handler_that_forks_within_a_call():
    code = """
children = []
def fork(*_):
    child = os.fork()
    if child:
        children.append(child)
signal.signal(signal.SIGALRM, fork)
expected, me = call(), os.getpid()
signal.setitimer(signal.ITIMER_REAL, 0.03)
try:
    loss = call()
except RuntimeError as error:
    assert os.getpid() != me and "forked" in str(error)
    os._exit(7)
assert os.getpid() == me and loss == expected
print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""
    assert run(code, rows=60_000, p=1.37) == ["7"]


def test_an_interrupt_ends_a_call_soon():
    code = """
signal.signal(signal.SIGINT, signal.default_int_handler)
begin = time.perf_counter()
expected = call()
takes, interrupted = time.perf_counter() - begin, 0
for k in range(8):
    timer = threading.Timer(takes * (k + 1) / 12, lambda: os.kill(os.getpid(), signal.SIGINT))
    try:
        timer.start()
        call()
        timer.join()
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted, call() == expected)
"""
    interrupted, same = run(code, rows=60_000, p=1.37)
    assert int(interrupted) >= 4
    assert same == "True"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc")
def test_threads_that_cannot_be_started_are_done_without(tmp_path):
    # OpenMP ends the process there: "libgomp: Thread creation failed".
    (tmp_path / "none.c").write_text(NO_THREADS)
    library = tmp_path / "none.so"
    subprocess.run(["gcc", "-shared", "-fPIC", tmp_path / "none.c", "-o", library], check=True)
    code = "print(call().hex(), threads())"
    preloaded = {"LD_PRELOAD": str(library), "OPENBLAS_NUM_THREADS": "1"}
    assert run(code, **preloaded) == [run(code)[0], "1"]
