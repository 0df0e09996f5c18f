"""The kernels for tensors run on threads beside those of PyTorch: the same bits, interrupts, forks."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mml_arrayapi import InvalidTargetError, LossAccumulator, multi_margin_loss

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


@pytest.fixture
def another_thread_compiles():
    """Within the test, for which PyTorch's flag, the process's, says that something compiles."""
    inside, leave = threading.Event(), threading.Event()

    def wait(graph, _):
        inside.set()
        leave.wait(60)
        return graph.forward

    def compile_something():
        torch.compile(lambda z: z * 2, backend=wait)(torch.ones(3))

    thread = threading.Thread(target=compile_something)
    thread.start()
    assert inside.wait(60)
    assert torch.compiler.is_compiling()
    yield
    leave.set()
    thread.join()


def _everything(x, y, backend):
    """What depends on whether something compiles: checks, and derivatives of every kind."""

    def loss(scores):
        return multi_margin_loss(scores, y, p=1.5, backend=backend)

    for check_target in ("auto", "raise"):
        with pytest.raises(InvalidTargetError, match=r"target\[2\] is 99"):
            multi_margin_loss(x, y + torch.tensor([0, 0, 97]), check_target=check_target)
    accumulator = LossAccumulator()
    accumulator.update(x, y)
    freed = x.clone()
    freed.untyped_storage().resize_(0)
    with pytest.raises(TypeError, match="whose storage was freed or shrunk"):
        multi_margin_loss(freed, y, backend=backend)
    broken = x.clone()
    broken[0, 0] = float("nan")
    return (
        torch.tensor(accumulator.compute()),
        torch.func.jvp(loss, (x,), (x,))[1],
        *(torch.func.hessian(loss)(scores) for scores in (x, broken)),
        torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x])),
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # the compiler's own
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", [None, "generic"])
def test_calls_while_another_thread_compiles(backend, request):
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    wanted = _everything(x, y, backend)
    request.getfixturevalue("another_thread_compiles")
    for one, other in zip(_everything(x, y, backend), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


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
