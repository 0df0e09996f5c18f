from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from tests.backends.cuda.conftest import builds  # noqa: F401 - a fixture


def compile_whole(function, **options):
    """Compile a function whole, as Inductor would, but for the machine code: that takes seconds."""
    import torch

    return torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition", **options)


@contextmanager
def graph_operators_ran():
    """The operators of compiled graphs that run in the block, in order."""
    from torch.profiler import ProfilerActivity, profile

    names = []
    with profile(activities=[ProfilerActivity.CPU]) as found:
        yield names
    events = sorted(found.events(), key=lambda event: event.time_range.start)
    start = "mml_arrayapi::graph_"
    names += [one.name.removeprefix(start) for one in events if one.name.startswith(start)]


FORWARD, BACKWARD = "multi_margin_loss", "multi_margin_loss_backward"


@pytest.fixture
def kernels_ran(monkeypatch):
    """The names of the C++ functions that Python has had compute something, in order."""
    engine = pytest.importorskip("mml_arrayapi.backends.pytorch.cpu")
    native, names = engine.native, []
    if native is None:
        pytest.skip(f"torch-cpu: {engine.cpu.reason()}")

    def recorded(name):
        def run(*arguments):
            result = getattr(native, name)(*arguments)
            if result is not None:
                names.append(name)
            return result

        return run

    functions = {name: recorded(name) for name in ("loss", "grad", "loss_and_grad")}
    monkeypatch.setattr(engine, "native", SimpleNamespace(bits_size=native.bits_size, **functions))
    return names
