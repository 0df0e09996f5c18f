"""Choice of kernels: order of say, explain, plugins, and what importing the package imports."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mml_arrayapi import (
    Kernel,
    explain,
    list_backends,
    multi_margin_loss,
    multi_margin_loss_and_grad,
    register_kernel,
    registry,
    use_backend,
)

X, T = np.zeros((2, 3), np.float32), np.array([0, 1])
PLUGIN = Path(__file__).parent / "plugin"


def fixed(name, value=42.0, refuses=None, library="numpy"):
    return Kernel(
        name, library, lambda _: refuses, lambda _: np.float32(value),
        lambda p, _: (np.float32(value), p.input),
    )  # fmt: skip


@pytest.fixture
def empty(monkeypatch):
    """A registry without built-in kernels and plugins, restored afterwards."""
    monkeypatch.setattr(registry.built_in, "OFFERS", ())
    monkeypatch.setattr(registry, "_plugins", ())
    monkeypatch.setattr(registry, "_registered", [])
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_environment", None)
    return registry


@pytest.mark.usefixtures("empty")
def test_order_of_registration():
    register_kernel(fixed("refusing", refuses="it is Tuesday"))
    register_kernel(fixed("first", 1.0))
    register_kernel(fixed("second", 2.0))
    assert multi_margin_loss(X, T) == 1
    assert multi_margin_loss_and_grad(X, T)[0] == 1
    explanation = explain(X, T)
    assert explanation.kernel == "first"
    assert explanation.considered == (
        ("refusing", "it is Tuesday"),
        ("first", None),
        ("second", "first comes first"),
        ("generic", "first comes first"),
    )
    assert str(explanation).splitlines()[:2] == ["refusing  it is Tuesday", "first     runs"]


@pytest.mark.usefixtures("empty")
def test_a_kernel_registered_later_is_seen():
    assert explain(X, T).kernel == "generic"
    register_kernel(fixed("late"))
    assert explain(X, T).kernel == "late"


def test_order_of_say(empty, monkeypatch):
    for i, name in enumerate(("a", "b", "c", "d")):
        register_kernel(fixed(name, float(i)))
    assert multi_margin_loss(X, T) == 0
    monkeypatch.setattr(empty, "_environment", "b")
    assert multi_margin_loss(X, T) == 1
    with use_backend("c"):
        assert multi_margin_loss(X, T) == 2
        assert multi_margin_loss(X, T, backend="d") == 3
        assert multi_margin_loss_and_grad(X, T, backend="d")[0] == 3
        with use_backend("generic"):
            assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
        assert multi_margin_loss(X, T) == 2
    assert multi_margin_loss(X, T) == 1
    assert explain(X, T, backend="c").considered[0] == ("a", "c was asked for")


@pytest.mark.usefixtures("empty")
def test_use_backend_holds_for_its_own_thread():
    register_kernel(fixed("a"))
    seen = []
    with use_backend("generic"):
        thread = threading.Thread(target=lambda: seen.append(explain(X, T).kernel))
        thread.start()
        thread.join()
        assert explain(X, T).kernel == "generic"
    assert seen == ["a"]


@pytest.mark.usefixtures("empty")
def test_asking_for_a_kernel_that_cannot_run():
    register_kernel(fixed("refusing", refuses="it is Tuesday"))
    message = r"kernel 'refusing' cannot run this call: it is Tuesday; known kernels are refusing, generic"
    with pytest.raises(ValueError, match=f"^backend: {message}"):
        multi_margin_loss(X, T, backend="refusing")
    with use_backend("refusing"), pytest.raises(ValueError, match=f"^use_backend: {message}"):
        multi_margin_loss(X, T)


def test_unknown_names(empty, monkeypatch):
    message = r"no kernel is named 'x'; known kernels are generic"
    with pytest.raises(ValueError, match=f"^backend: {message}"):
        multi_margin_loss(X, T, backend="x")
    with pytest.raises(ValueError, match=f"^use_backend: {message}"), use_backend("x"):
        pass
    monkeypatch.setattr(empty, "_environment", "x")
    with pytest.raises(ValueError, match=f"^MML_ARRAYAPI_BACKEND: {message}"):
        multi_margin_loss(X, T)


def test_a_kernel_of_another_library(empty, monkeypatch):
    register_kernel(fixed("theirs", library="torch"))
    with pytest.raises(
        ValueError, match="backend: kernel 'theirs' takes arrays of torch, but input is of numpy; "
    ):
        multi_margin_loss(X, T, backend="theirs")
    with use_backend("theirs"):  # said for torch's arrays; NumPy's are not concerned
        assert explain(X, T).kernel == "generic"
    monkeypatch.setattr(empty, "_environment", "theirs")
    assert explain(X, T).kernel == "generic"


@pytest.mark.usefixtures("empty")
def test_what_cannot_be_registered():
    register_kernel(fixed("a"))
    with pytest.raises(ValueError, match="a kernel named 'a' is registered already"):
        register_kernel(fixed("a", library="torch"))
    with pytest.raises(ValueError, match="a kernel named 'generic' is registered already"):
        register_kernel(fixed("generic"))
    with pytest.raises(TypeError, match="kernel must be a Kernel, but is of type int"):
        register_kernel(3)


def test_a_loader_that_fails_refuses_with_the_reason(empty, monkeypatch):
    def load():
        raise ImportError("libfoo.so.3 is missing")

    offer = registry.built_in.Offer("broken", "numpy", ("numpy",), load)
    other = registry.built_in.Offer("absent", "nowhere", ("no_such_module.sub",), load)
    monkeypatch.setattr(registry.built_in, "OFFERS", (offer, other))
    assert explain(X, T).considered[0] == ("broken", "cannot be imported: libfoo.so.3 is missing")
    with pytest.raises(ValueError, match=r"libfoo\.so\.3 is missing"):
        multi_margin_loss(X, T, backend="broken")
    rows = {b.name: b for b in list_backends()}
    assert not rows["broken"].available
    assert rows["broken"].reason == "cannot be imported: libfoo.so.3 is missing"
    assert rows["absent"].reason == "not installed: no_such_module.sub"
    assert rows["generic"].available
    with pytest.raises(AssertionError, match="a kernel that refuses was run"):
        empty._loaded["numpy"][0].loss(None)


def test_backends_lists_every_built_in_kernel():
    names = [b.name for b in list_backends()]
    assert names[-1] == "generic"
    assert {"numpy-numba", "torch-cpu-numba", "torch-cuda", "cupy-cuda", "dask-blocks"} <= set(
        names
    )


def run_python(code, *, path=(), **environment):
    """Run code in a fresh interpreter, with further directories on its path."""
    extra = [str(p) for p in path] + [os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in extra if p)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LIBRARIES = "('numpy', 'torch', 'jax', 'dask', 'cupy', 'numba', 'array_api_strict', 'distributed', 'rich', 'sklearn')"


def test_importing_the_package_imports_no_array_library():
    code = f"""
import sys
import mml_arrayapi, mml_arrayapi.cli
mml_arrayapi.list_backends()
print([name for name in {LIBRARIES} if name in sys.modules])
"""
    assert run_python(code) == "[]"


def test_a_call_imports_no_other_library():
    pytest.importorskip("array_api_strict")
    code = f"""
import sys
import array_api_strict as xp
import mml_arrayapi
mml_arrayapi.multi_margin_loss(xp.zeros((2, 3)), xp.asarray([0, 1]))
print([name for name in {LIBRARIES} if name in sys.modules])
"""
    assert run_python(code) == "['numpy', 'array_api_strict']"


def test_the_environment_variable():
    code = """
import numpy, mml_arrayapi
print(mml_arrayapi.explain(numpy.zeros((2, 3)), numpy.asarray([0, 1])).kernel)
"""
    assert run_python(code, MML_ARRAYAPI_BACKEND="generic") == "generic"


@pytest.fixture(scope="module")
def plugin_path(tmp_path_factory):
    """The plugin distribution as an installer would lay it out: its package and its metadata."""
    path = tmp_path_factory.mktemp("site")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(path),
            str(PLUGIN),
        ],
        check=True,
    )
    return path


def test_an_outside_package_brings_a_kernel_for_its_own_arrays(plugin_path):
    code = """
import json, sys
import mml_arrayapi as mml
import numpy
mml.multi_margin_loss(numpy.zeros((2, 3)), numpy.asarray([0, 1]))
before = "tiny_arrays" in sys.modules
listed = [b.reason for b in mml.list_backends() if b.library == "tiny_arrays"]
import tiny_arrays
x, t = tiny_arrays.asarray([[0.1, 0.2, 0.4, 0.8]]), tiny_arrays.asarray([3])
loss = float(mml.multi_margin_loss(x, t))
considered = mml.explain(x, t).considered
named = float(mml.multi_margin_loss(x, t, backend="tiny-loops"))
refused = mml.explain(x, t, reduction="sum").considered[0][1]
print(json.dumps([before, listed, loss, considered, named, refused]))
"""
    before, listed, loss, considered, named, refused = json.loads(
        run_python(code, path=[plugin_path])
    )
    assert not before
    assert listed == ["plugin tiny_arrays.kernel:KERNEL"]
    assert loss == named == pytest.approx(0.325)
    assert considered == [["tiny-loops", None], ["generic", "tiny-loops comes first"]]
    assert refused == "only the reduction 'mean' is there"


def test_use_backend_finds_a_plugins_kernel_by_name(plugin_path):
    code = """
import mml_arrayapi as mml
with mml.use_backend("tiny-loops"):
    print("found")
"""
    assert run_python(code, path=[plugin_path]) == "found"


def test_an_entry_point_to_something_else(empty, monkeypatch):
    from importlib.metadata import EntryPoint

    wrong = EntryPoint("numpy.wrong", "math:pi", registry.ENTRY_POINTS)
    monkeypatch.setattr(empty, "_plugins", (wrong,))
    with pytest.raises(
        TypeError,
        match=r"entry point 'numpy\.wrong' of the group 'mml_arrayapi\.backends' must point to a "
        r"Kernel, but points to an object of type float",
    ):
        multi_margin_loss(X, T)
