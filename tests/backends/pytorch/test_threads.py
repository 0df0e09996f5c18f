"""The kernels for tensors run on threads beside those of PyTorch: the same bits, interrupts, forks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mml_arrayapi import multi_margin_loss

torch = pytest.importorskip("torch")
engine = pytest.importorskip("mml_arrayapi.backends.pytorch.cpu")
pytestmark = [
    pytest.mark.skipif(engine.native is None, reason=f"torch-cpu: {engine.cpu.reason()}"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork and no signals on this system"),
]


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads", "fresh_compiler")
@pytest.mark.parametrize("p", [1, 2, 1.5])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_bits_are_those_of_one_thread(p, compiled):
    x = torch.randn(20_000, 50, requires_grad=True)
    y = torch.randint(0, 50, (20_000,))
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        function = (
            torch.compile(multi_margin_loss, fullgraph=True, backend="aot_eager")
            if compiled
            else multi_margin_loss
        )
        loss = function(x, y, p=p)
        found.append((loss, *torch.autograd.grad(loss, x)))
    for loss, grad in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(grad, found[0][1])


@pytest.mark.usefixtures("two_threads")
def test_a_long_call_is_interrupted():
    x, y = torch.randn(400_000, 100), torch.zeros(400_000, dtype=torch.int64)
    pressed = []

    def press():
        time.sleep(0.15)
        pressed.append(time.monotonic())
        signal.raise_signal(signal.SIGINT)  # the main thread gets it

    def call_often():
        for _ in range(100):
            multi_margin_loss(x, y, p=1.37)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        call_often()
    thread.join()
    assert time.monotonic() - pressed[0] < 2


BEGIN = """
import os, signal, torch
from mml_arrayapi import multi_margin_loss
torch.set_num_threads(2)
x, y = torch.randn(60_000, 100), torch.zeros(60_000, dtype=torch.int64)
torch.add(x, 1)  # on PyTorch's threads
expected = multi_margin_loss(x, y, p=1.37)
children = []
"""
FORKED = """
for _ in range(3):
    child = os.fork()
    if not child:
        os._exit(7 if torch.equal(multi_margin_loss(x, y, p=1.37), expected) else 1)
    children.append(child)
"""
FORKED_WITHIN = """
def fork(*_):
    child = os.fork()
    if child:
        children.append(child)
signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.03)
me = os.getpid()
try:
    while not children:
        loss = multi_margin_loss(x, y, p=1.37)
        if os.getpid() != me:  # between two calls: the next one is whole
            os._exit(7 if torch.equal(multi_margin_loss(x, y, p=1.37), expected) else 1)
except RuntimeError as error:
    assert os.getpid() != me and "forked" in str(error)
    os._exit(7)
assert os.getpid() == me and torch.equal(loss, expected)
"""
END = """
print({os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children})
"""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", [FORKED, FORKED_WITHIN], ids=["between calls", "within a call"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(how):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", BEGIN + how + END],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.stdout.strip() == "{7}", done.stderr
