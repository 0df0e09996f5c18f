from types import SimpleNamespace

import pytest

from tests.backends.cuda.conftest import builds  # noqa: F401 - a fixture


def compile_whole(function, **options):
    """Compile a function whole, as Inductor would, but for the machine code: that takes seconds."""
    import torch

    return torch.compile(function, fullgraph=True, backend="aot_eager_decomp_partition", **options)


@pytest.fixture
def kernels_ran(monkeypatch):
    """The names of the C++ functions that have computed something, in order."""
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
