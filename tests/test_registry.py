"""Choice of kernels: precedence, explain, use_backend, plugins, and what importing imports."""

import asyncio
import contextlib
import contextvars
import gc
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import types
import weakref
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest

from mml_arrayapi import (
    Kernel,
    explain,
    list_backends,
    multi_margin_loss,
    multi_margin_loss_and_grad,
    overrides,
    register_kernel,
    registry,
    unregister_kernel,
    use_backend,
)
from mml_arrayapi.backends import LazyKernel
from mml_arrayapi.kernel import Unusable
from tests.tree import run_python

X, T = np.zeros((2, 3), np.float32), np.array([0, 1])
PLUGIN = Path(__file__).parent / "plugin"


def fixed(name, value=42.0, refuses=None, library="numpy", **fields):
    return Kernel(
        name, library, lambda _: refuses, lambda _: np.float32(value),
        lambda p, _: (np.float32(value), p.input), **fields,
    )  # fmt: skip


@pytest.fixture
def empty(monkeypatch):
    """A registry without built-in kernels and plugins."""
    monkeypatch.setattr(overrides, "environment", None)
    with registry.isolated():
        yield


@pytest.fixture
def plugins(empty, monkeypatch):
    """Plugins given by the test, as ``plugins(name=value, ...)`` of entry points."""

    def install(**entries):
        made = [
            EntryPoint(k.replace("__", "."), v, registry.ENTRY_POINTS) for k, v in entries.items()
        ]
        monkeypatch.setattr(registry._registry, "plugins", tuple(made))

    return install


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Make a module of some source, which can be imported by the name that is returned."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source):
        (tmp_path / f"{name}.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


def names(**options):
    return [name for name, _ in explain(X, T, **options).considered]


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
def test_a_kernel_registered_later_is_seen_and_one_removed_is_not():
    assert explain(X, T).kernel == "generic"
    register_kernel(fixed("late"))
    assert explain(X, T).kernel == "late"
    unregister_kernel("late")
    assert explain(X, T).kernel == "generic"
    register_kernel(fixed("late"))
    assert explain(X, T).kernel == "late"


@pytest.mark.usefixtures("empty")
def test_what_cannot_be_unregistered():
    message = r"name must be that of a kernel which the program has registered \({}\), but is 'x'"
    with pytest.raises(ValueError, match=message.format("so far none")):
        unregister_kernel("x")
    register_kernel(fixed("a"))
    register_kernel(fixed("b"))
    with pytest.raises(ValueError, match=message.format("a, b")):
        unregister_kernel("x")
    with pytest.raises(ValueError, match="but is 'generic'"):
        unregister_kernel("generic")


def test_the_documented_precedence(monkeypatch):
    """Third-party ones with ``before``, the built-in ones, the other third-party ones, generic."""
    monkeypatch.setattr(overrides, "environment", None)
    with registry.isolated(built_in_kernels=True):
        assert names() == ["numpy-cpu", "generic"]
        register_kernel(fixed("plain"))
        register_kernel(fixed("one", before="numpy-cpu", refuses="no"))
        register_kernel(fixed("two", before="numpy-cpu", refuses="no"))
        register_kernel(fixed("early", before="two", refuses="no"))
        register_kernel(fixed("lost", before="not there"))
        register_kernel(fixed("last", before="generic"))
        order = ["one", "early", "two", "numpy-cpu", "plain", "lost", "last", "generic"]
        assert names() == order


@pytest.mark.usefixtures("empty")
def test_a_kernel_may_name_one_that_is_registered_later():
    register_kernel(fixed("a", before="b"))
    register_kernel(fixed("c", before="a"))
    register_kernel(fixed("b"))
    assert names() == ["c", "a", "b", "generic"]


@pytest.mark.usefixtures("empty")
def test_two_kernels_that_name_each_other():
    register_kernel(fixed("a", before="b"))
    register_kernel(fixed("b", before="a"))
    assert names() == ["a", "b", "generic"]


@pytest.mark.usefixtures("empty")
def test_calls_and_questions_change_nothing():
    """The same call gets the same kernel the first and the two-thousandth time."""
    register_kernel(fixed("a", 1.0))
    before = registry._registry
    kernels = set()
    for _ in range(2000):
        kernels.add((explain(X, T).kernel, float(multi_margin_loss(X, T))))
        list_backends()
    assert kernels == {("a", 1.0)}
    assert registry._registry is before


def test_order_of_say(empty, monkeypatch):
    for i, name in enumerate(("a", "b", "c", "d")):
        register_kernel(fixed(name, float(i)))
    assert multi_margin_loss(X, T) == 0
    monkeypatch.setattr(overrides, "environment", "b")
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
def test_a_kernel_never_gets_a_feature_that_it_does_not_list():
    register_kernel(fixed("plain", 1.0))
    register_kernel(fixed("able", 2.0, supports=frozenset({"ignore_index"})))
    assert multi_margin_loss(X, T) == 1
    assert multi_margin_loss(X, T, ignore_index=5) == 2
    assert multi_margin_loss_and_grad(X, T, ignore_index=5)[0] == 2
    assert explain(X, T, ignore_index=5).considered[0] == (
        "plain",
        "it does not support ignore_index",
    )
    with pytest.raises(
        ValueError, match="'plain' cannot run this call: it does not support ignore"
    ):
        multi_margin_loss(X, T, ignore_index=5, backend="plain")


@pytest.mark.usefixtures("empty")
def test_a_kernel_whose_refusal_raises():
    def refuses(problem):
        raise OSError("no such device")

    register_kernel(Kernel("broken", "numpy", refuses, print, print))
    assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    reason = "its refuses() raised OSError: no such device"
    assert explain(X, T).considered[0] == ("broken", reason)
    with pytest.raises(ValueError, match="cannot run this call: its refuses"):
        multi_margin_loss(X, T, backend="broken")


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("finds_out", ["raises", "refuses afterwards"])
def test_a_kernel_that_finds_out_while_it_runs(monkeypatch, finds_out):
    """It is nobody's error but of those who ask for it by name."""
    reasons = []

    def fail(*arguments):
        if finds_out == "raises":
            raise Unusable("no driver")
        reasons.append("no driver")
        loss, grad = multi_margin_loss_and_grad(X, T, backend="generic")
        return (loss, grad) if len(arguments) > 1 else loss

    kernel = Kernel("late", "numpy", lambda _: reasons[0] if reasons else None, fail, fail)
    register_kernel(kernel)
    wanted = multi_margin_loss(X, T, backend="generic")
    assert multi_margin_loss_and_grad(X, T)[0] == wanted
    message = "kernel 'late' cannot run this call: no driver; known kernels are "
    for function in (multi_margin_loss, multi_margin_loss_and_grad):
        reasons.clear()
        with pytest.raises(ValueError, match=f"^backend: {message}"):
            function(X, T, backend="late")
        reasons.clear()
        with use_backend("late"), pytest.raises(ValueError, match=f"^use_backend: {message}"):
            function(X, T)
        reasons.clear()
        monkeypatch.setattr(overrides, "environment", "late")
        with pytest.raises(ValueError, match=f"^MML_ARRAYAPI_BACKEND: {message}"):
            function(X, T)
        monkeypatch.setattr(overrides, "environment", None)


@pytest.mark.usefixtures("empty")
def test_the_direct_way_of_the_first_kernel():
    calls = []

    def direct(input, target, weight, options):
        calls.append((weight, options))
        return 7.0 if options[0] == 1 else None

    register_kernel(fixed("a", 1.0, direct={np.ndarray: direct}))
    explain(X, T)
    assert multi_margin_loss(X, T) == 7
    assert calls == [(None, (1, 1.0, "mean", None, -1, "auto"))]
    assert multi_margin_loss(X, T, p=2) == 1
    with pytest.raises(ValueError, match="p must be"):
        multi_margin_loss(X, T, p=0)
    with use_backend("generic"):
        assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    assert multi_margin_loss(X, T, backend="generic") == pytest.approx(2 / 3)
    register_kernel(fixed("b", 2.0, before="a"))
    assert multi_margin_loss(X, T) == 2  # not a's direct way: b comes first
    unregister_kernel("b")
    assert multi_margin_loss(X, T) == 7


class TestUseBackendBelongsToItsContext:
    @pytest.fixture(autouse=True)
    def kernel(self, empty):
        register_kernel(fixed("a"))

    def test_threads(self):
        seen = []
        with use_backend("generic"):
            thread = threading.Thread(target=lambda: seen.append(explain(X, T).kernel))
            thread.start()
            thread.join()
            assert explain(X, T).kernel == "generic"
        assert seen == ["a"]

    def test_asyncio_tasks(self):
        seen = []

        async def work(name, before, after):
            await before.wait()
            with use_backend(name):
                seen.append(explain(X, T).kernel)
                after.set()
                await asyncio.sleep(0.001)
                seen.append(explain(X, T).kernel)

        async def both():
            first, second, third = asyncio.Event(), asyncio.Event(), asyncio.Event()
            first.set()
            await asyncio.gather(work("generic", first, second), work("a", second, third))
            return explain(X, T).kernel

        assert asyncio.run(both()) == "a"
        assert sorted(seen) == ["a", "a", "generic", "generic"]
        assert explain(X, T).kernel == "a"
        assert overrides.open_names == ()

    def test_tasks_started_within_a_block_inherit_it(self):
        async def kernel():
            return explain(X, T).kernel

        async def main():
            with use_backend("generic"):
                return await asyncio.gather(kernel(), kernel())

        assert asyncio.run(main()) == ["generic", "generic"]

    @pytest.mark.parametrize("first_closed", [0, 1])
    def test_suspended_generators(self, first_closed):
        def generator(name):
            with use_backend(name):
                while True:
                    yield explain(X, T).kernel

        both = generator("generic"), generator("a")
        assert [next(g) for g in both] == ["generic", "a"]
        assert explain(X, T).kernel == "a"
        assert [next(g) for g in both] == ["generic", "a"]
        both[first_closed].close()
        assert next(both[1 - first_closed]) == ("a", "generic")[first_closed]
        both[1 - first_closed].close()
        assert overrides.open_names == ()
        assert overrides._blocks.get() == ()

    def test_a_block_that_has_ended_counts_in_no_task_that_began_within_it(self):
        async def task():
            seen = []
            for _ in range(4):
                await asyncio.sleep(0)
                seen.append(explain(X, T).kernel)
            return seen

        async def main():
            with use_backend("generic"):
                running = asyncio.create_task(task())
                await asyncio.sleep(0)
            with use_backend("generic"):  # another's, which opens the list of open names again
                return await running

        assert asyncio.run(main()) == ["a"] * 4

    def test_async_generators(self):
        async def generator(name):
            with use_backend(name):
                while True:
                    yield explain(X, T).kernel

        async def main():
            g = generator("generic")
            seen = [await anext(g), explain(X, T).kernel, await anext(g)]
            await g.aclose()
            return seen

        assert asyncio.run(main()) == ["generic", "a", "generic"]

    def test_a_generator_that_is_resumed_within_a_block(self):
        def generator():
            with use_backend("generic"):
                while True:
                    with use_backend("a"):
                        inner = explain(X, T).kernel
                    yield explain(X, T).kernel, inner

        def outer():
            yield explain(X, T).kernel
            yield from generator()

        g = outer()
        assert next(g) == "a"
        for _ in range(2):
            with use_backend("a"):
                assert next(g) == ("generic", "a")
                assert explain(X, T).kernel == "a"
        with use_backend("generic"):
            assert next(g) == ("generic", "a")
            with use_backend("a"):
                assert next(g) == ("generic", "a")
            assert explain(X, T).kernel == "generic"
        g.close()
        assert overrides.open_names == ()

    def test_blocks_that_others_make_belong_to_the_generator_that_enters_them(self):
        def plain():
            return use_backend("generic")

        @contextlib.contextmanager
        def managed():
            with use_backend("generic"):
                yield

        def stacked():
            stack = contextlib.ExitStack()
            stack.enter_context(use_backend("generic"))
            return stack

        def generator(block):
            with block():
                yield explain(X, T).kernel

        def with_a_stack():
            with contextlib.ExitStack() as stack:
                stack.enter_context(plain())
                yield explain(X, T).kernel

        for g in (generator(plain), generator(managed), with_a_stack()):
            assert next(g) == "generic"
            assert explain(X, T).kernel == "a"
            g.close()
        with stacked():
            assert explain(X, T).kernel == "generic"

    @pytest.mark.parametrize("first", ["outer", "inner"])
    def test_a_generator_that_resumes_another(self, first):
        def outer():
            with use_backend("a"):
                yield
                seen.append(next(other))
                seen.append(explain(X, T).kernel)
                yield

        def inner():
            with use_backend("generic"):
                while True:
                    yield explain(X, T).kernel

        seen, one, other = [], outer(), inner()
        for generator in (one, other) if first == "outer" else (other, one):
            next(generator)
        next(one)
        assert seen == ["generic", "a"]
        one.close()
        other.close()
        assert overrides.open_names == ()

    def test_nested_generators_seen_from_a_thread_with_a_copy_of_the_context(self):
        def inner():
            with use_backend("generic"):
                context, seen = contextvars.copy_context(), []
                work = lambda: seen.append(context.run(explain, X, T).kernel)  # noqa: E731
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                yield seen[0]

        def outer():
            with use_backend("a"):
                yield from inner()

        assert list(outer()) == ["generic"]

    def test_blocks_that_a_generator_expression_opens_for_its_function(self):
        with contextlib.ExitStack() as stack:

            def opened():
                stack.enter_context(use_backend("generic"))
                return True

            assert all(function() for function in (opened,))
            assert explain(X, T).kernel == "generic"
        assert explain(X, T).kernel == "a"

    def test_a_block_that_a_method_leaves_open(self):
        class Helper:
            def __enter__(self):
                self.block = use_backend("generic")
                self.block.__enter__()

            def __exit__(self, *_):
                self.block.__exit__()

        def generator():
            with Helper():
                while True:
                    yield explain(X, T).kernel

        g = generator()
        for _ in range(2):
            assert next(g) == "generic"
            assert explain(X, T).kernel == "a"
        g.close()
        with Helper():
            assert explain(X, T).kernel == "generic"
        assert overrides.open_names == ()
        assert explain(X, T).kernel == "a"

    def test_a_block_is_entered_once(self):
        block = use_backend("generic")
        with (
            block,
            pytest.raises(RuntimeError, match="use_backend: a block can be entered only once"),
        ):
            block.__enter__()
        with pytest.raises(RuntimeError, match="entered only once; call it anew"), block:
            pass
        with pytest.raises(RuntimeError, match="use_backend: this block is not open"):
            block.__exit__(None, None, None)
        assert overrides.open_names == ()

    def test_decorated_functions_keep_nothing_of_where_they_were_made(self):
        class Large:
            pass

        def make():
            large = Large()

            @use_backend("generic")
            def function():
                return explain(X, T).kernel

            return function, weakref.ref(large)

        function, large = make()
        gc.collect()
        assert large() is None
        assert function() == "generic"

        def generator():
            @use_backend("generic")
            def function():
                return explain(X, T).kernel

            yield function

        assert next(generator())() == "generic"

    def test_a_generator_that_is_dropped(self):
        def generator():
            with use_backend("generic"):
                yield

        g = generator()
        next(g)
        del g
        assert overrides.open_names == ()
        assert explain(X, T).kernel == "a"

    def test_context_managers_made_of_it(self):
        @contextlib.contextmanager
        def generic_only():
            with use_backend("generic"):
                yield

        with generic_only():
            assert explain(X, T).kernel == "generic"
        with contextlib.ExitStack() as stack:
            stack.enter_context(generic_only())
            stack.enter_context(use_backend("generic"))
            assert explain(X, T).kernel == "generic"
        assert explain(X, T).kernel == "a"

    def test_generators_and_coroutines_cannot_be_decorated(self):
        def generator():
            yield

        async def coroutine():
            pass

        async def asynchronous():
            yield

        for function in (generator, coroutine, asynchronous, partial(generator)):
            with pytest.raises(
                TypeError, match=r"no generator and no coroutine \(.*\); open a with"
            ):
                use_backend("generic")(function)

    def test_as_a_decorator(self):
        @use_backend("generic")
        def kernel():
            return explain(X, T).kernel

        assert [kernel(), explain(X, T).kernel, kernel()] == ["generic", "a", "generic"]

    @pytest.fixture
    def generic_only(self, kernel):
        with use_backend("generic"):
            yield

    @pytest.mark.usefixtures("generic_only")
    def test_pytest_fixtures_made_of_it(self):
        assert explain(X, T).kernel == "generic"

    def test_a_block_that_ends_with_an_error(self):
        with pytest.raises(RuntimeError), use_backend("generic"):
            raise RuntimeError
        assert explain(X, T).kernel == "a"


@pytest.mark.usefixtures("empty")
def test_asking_for_a_kernel_that_cannot_run():
    register_kernel(fixed("refusing", refuses="it is Tuesday"))
    message = r"kernel 'refusing' cannot run this call: it is Tuesday; known kernels are refusing, generic"
    with pytest.raises(ValueError, match=f"^backend: {message}"):
        multi_margin_loss(X, T, backend="refusing")
    with use_backend("refusing"), pytest.raises(ValueError, match=f"^use_backend: {message}"):
        multi_margin_loss(X, T)


def test_unknown_names(empty, monkeypatch):
    message = r"no kernel is named '{}'; known kernels are generic"
    for name in ("x", ""):
        with pytest.raises(ValueError, match=f"^backend: {message.format(name)}"):
            multi_margin_loss(X, T, backend=name)
        with pytest.raises(ValueError, match=f"^use_backend: {message.format(name)}"):
            use_backend(name)
    monkeypatch.setattr(overrides, "environment", "x")
    with pytest.raises(ValueError, match=f"^MML_ARRAYAPI_BACKEND: {message.format('x')}"):
        multi_margin_loss(X, T)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("name", [0, [], False, b"generic", ("generic",), np.arange(2)], ids=repr)
@pytest.mark.parametrize("function", [multi_margin_loss, multi_margin_loss_and_grad, explain])
def test_names_that_are_no_strings(function, name):
    kind = type(name).__name__
    with pytest.raises(TypeError) as error:
        function(X, T, backend=name)
    message = f"a kernel's name, but is {name!r} of type {kind}; known kernels are generic"
    assert str(error.value) == f"backend must be None or {message}"
    with pytest.raises(TypeError) as error:
        use_backend(name)
    assert str(error.value) == f"use_backend must be {message}"


@pytest.mark.usefixtures("empty")
def test_use_backend_wants_a_name():
    with pytest.raises(TypeError, match="use_backend must be given a kernel's name, but got None"):
        use_backend(None)


def test_the_name_is_checked_after_the_other_options_and_before_the_arrays():
    with pytest.raises(ValueError, match="check_target must be"):
        multi_margin_loss(X, T, backend="x", check_target="x")
    with pytest.raises(ValueError, match="backend: no kernel is named"):
        multi_margin_loss(3, T, backend="x", weight=np.zeros((2, 2)))


def test_a_kernel_of_another_library(empty, monkeypatch):
    register_kernel(fixed("theirs", library="torch"))
    with pytest.raises(
        ValueError, match="backend: kernel 'theirs' takes arrays of torch, but input is of numpy; "
    ):
        multi_margin_loss(X, T, backend="theirs")
    with use_backend("theirs"):  # said for torch's arrays; NumPy's are not concerned
        assert explain(X, T).kernel == "generic"
    monkeypatch.setattr(overrides, "environment", "theirs")
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


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, "name must be a string that is not empty, but is ''"),
        ({"name": 3}, "name must be a string that is not empty, but is 3"),
        ({"library": None}, "library must be a string that is not empty, but is None"),
        ({"refuses": None}, "refuses must be callable, but is None"),
        ({"loss": 1}, "loss must be callable, but is 1"),
        ({"loss_and_grad": "x"}, "loss_and_grad must be callable, but is 'x'"),
        ({"before": 1}, "before must be None or a kernel's name, but is 1"),
        ({"supports": "ignore_index"}, "supports must be a frozenset of strings, but is 'ignore"),
        ({"supports": {1}}, r"supports must be a frozenset of strings, but is \{1\}"),
        ({"direct": [1]}, r"direct must be a mapping of types to callables, but is \[1\]"),
        ({"direct": {"a": print}}, "direct must be a mapping of types to callables, but is {'a'"),
        ({"direct": {int: 1}}, "direct must be a mapping of types to callables, but is {<class"),
        ({"on_chunks": 1}, "on_chunks must be None or callable, but is 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_kernel_with_a_wrong_field(fields, message):
    usual = {
        "name": "a",
        "library": "numpy",
        "refuses": print,
        "loss": print,
        "loss_and_grad": print,
    }
    with pytest.raises(TypeError, match=message):
        Kernel(**(usual | fields))


def test_the_generic_kernel_can_be_pickled():
    assert pickle.loads(pickle.dumps(registry.GENERIC)) == registry.GENERIC


def test_a_loader_that_fails_refuses_with_the_reason(empty, monkeypatch):
    def load():
        raise ImportError("libfoo.so.3 is missing")

    lazy = LazyKernel("broken", "numpy", ("numpy",), load)
    absent = LazyKernel("absent", "nowhere", ("no_such_module.sub",), load)
    lacking = LazyKernel("lacking", "nowhere", (), load, lambda: "no compiler was found")
    monkeypatch.setattr(registry._registry, "lazy", (lazy, absent, lacking))
    reason = "cannot be imported: ImportError: libfoo.so.3 is missing"
    assert explain(X, T).considered[0] == ("broken", reason)
    with pytest.raises(ValueError, match=r"libfoo\.so\.3 is missing"):
        multi_margin_loss(X, T, backend="broken")
    rows = {b.name: b for b in list_backends()}
    assert not rows["broken"].available
    assert rows["broken"].reason == reason
    assert rows["absent"].reason == "not installed: no_such_module.sub"
    assert rows["lacking"].reason == "no compiler was found"
    assert rows["generic"].available
    with pytest.raises(AssertionError, match="a kernel that refuses was run"):
        registry.kernels_of("numpy")[0].loss(None)


def test_backends_lists_every_built_in_kernel():
    listed = [b.name for b in list_backends()]
    assert listed[-1] == "generic"
    assert {"numpy-cpu", "torch-cpu", "torch-cuda", "cupy-cuda", "dask-blocks"} <= set(listed)


GOOD = """
from mml_arrayapi import Kernel
KERNEL = Kernel({name!r}, "numpy", lambda p: None, lambda p: 7.0, lambda p, g: (7.0, p.input))
"""
FAILURES = {
    "OSError": "raise OSError('libcuda.so: bad ELF header')",
    "SystemExit": "raise SystemExit('this machine is not licensed')",
    "RuntimeError": "raise RuntimeError",
    "SyntaxError": "this is no Python",
    "PanicException": "class PanicException(BaseException): pass\nraise PanicException",
    "AttributeError": "KERNELS = 1",
    "GeneratorExit": "raise GeneratorExit",
    "MemoryError": "raise MemoryError",
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_plugin_that_raises_anything_ends_no_call(plugins, module, kind):
    plugins(numpy__bad=f"{module('bad_plugin', FAILURES[kind])}:KERNEL")
    assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    (name, reason), _ = explain(X, T).considered
    assert name == "numpy.bad"
    assert reason.startswith(f"cannot be imported: {kind}")
    assert not reason.endswith(": ")
    row = list_backends()[0]
    assert (row.name, row.available, row.reason) == ("numpy.bad", False, reason)
    with pytest.raises(ValueError, match="cannot run this call: cannot be imported"):
        multi_margin_loss(X, T, backend="numpy.bad")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("math:pi", "the entry point gives an object of type float, not a Kernel"),
        ("doubled:KERNEL", "there is another kernel named 'mine'"),
        ("elsewhere:KERNEL", "the kernel is for torch, the entry point's name says numpy"),
    ],
)
def test_a_plugin_that_does_not_fit(plugins, module, value, reason):
    register_kernel(fixed("mine", 1.0))
    module("doubled", GOOD.format(name="mine"))
    module("elsewhere", GOOD.format(name="x").replace('"numpy"', '"torch"'))
    plugins(numpy__other=value)
    assert multi_margin_loss(X, T) == 1
    assert explain(X, T).considered[1] == ("numpy.other", reason)
    assert [(b.name, b.available) for b in list_backends()] == [
        ("mine", True), ("numpy.other", False), ("generic", True),
    ]  # fmt: skip


def test_two_plugins_with_the_same_kernel(plugins, module):
    module("first_plugin", GOOD.format(name="twin"))
    module("second_plugin", GOOD.format(name="twin"))
    plugins(numpy__a="first_plugin:KERNEL", numpy__b="second_plugin:KERNEL")
    assert names() == ["twin", "numpy.b", "generic"]
    with pytest.raises(ValueError, match="a kernel named 'twin' is registered already"):
        register_kernel(fixed("twin"))


def test_the_list_has_the_names_that_backend_takes(plugins, module):
    plugins(numpy__entry=f"{module('named_plugin', GOOD.format(name='real-name'))}:KERNEL")
    listed = [b.name for b in list_backends()]
    assert listed == ["real-name", "generic"]
    for name in listed:
        assert explain(X, T, backend=name).kernel == name


def test_a_plugin_that_registers_and_computes_while_it_loads(plugins, module):
    source = (
        GOOD.format(name="mine")
        + """
import numpy as np
import mml_arrayapi as mml
mml.register_kernel(Kernel("second", "numpy", *[lambda *_: None] * 3))
before = mml.explain(np.zeros((1, 2)), np.asarray([0])).considered, mml.list_backends()
"""
    )
    plugins(numpy=f"{module('busy_plugin', source)}:KERNEL")
    assert names() == ["second", "mine", "generic"]
    assert sys.modules["busy_plugin"].before[0][1] == ("numpy", "is being loaded")


def test_kernels_registered_by_many_threads_while_a_plugin_loads(plugins, module):
    source = "import time; time.sleep(0.05)\n" + GOOD.format(name="slow")
    plugins(numpy=f"{module('slow_plugin', source)}:KERNEL")
    start = threading.Barrier(9)
    kinds = []

    def register(i):
        start.wait()
        register_kernel(fixed(f"k{i}"))
        list_backends()

    def call():
        start.wait()
        kinds.append(explain(X, T).kernel)

    threads = [threading.Thread(target=register, args=(i,)) for i in range(8)]
    threads.append(threading.Thread(target=call))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(names()) == {"slow", "generic", *(f"k{i}" for i in range(8))}
    assert kinds[0] in names()


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
    assert run_python(code, MML_ARRAYAPI_BACKEND="") == run_python(code)  # as if it were not set


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
import tiny_arrays
x, t = tiny_arrays.asarray([[0.1, 0.2, 0.4, 0.8]]), tiny_arrays.asarray([3])
loss = float(mml.multi_margin_loss(x, t))
considered = mml.explain(x, t).considered
named = float(mml.multi_margin_loss(x, t, backend="tiny-loops"))
listed = [[b.name, b.available, b.reason] for b in mml.list_backends() if b.library == "tiny_arrays"]
refused = mml.explain(x, t, reduction="sum").considered[0][1]
print(json.dumps([before, listed, loss, considered, named, refused]))
"""
    before, listed, loss, considered, named, refused = json.loads(
        run_python(code, path=[plugin_path])
    )
    assert not before
    assert listed == [["tiny-loops", True, "plugin tiny_arrays.kernel:KERNEL"]]
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


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("", "it gives no reason"),
        (False, "its refuses() returned False of type bool; None says that it takes the call"),
        (
            T,
            "its refuses() returned array([0, 1]) of type ndarray; None says that it takes the call",
        ),
    ],
)
def test_a_refusal_without_words_is_one(reason, shown):
    with registry.isolated():
        kernel = Kernel("speechless", "numpy", lambda _: reason, print, print, before="numpy-cpu")
        register_kernel(kernel)
        told = explain(X, T)
    assert dict(told.considered)["speechless"] == shown
    assert told.kernel != "speechless"


def test_an_interrupted_plugin_is_loaded_by_the_next_call(plugins, module):
    source = """
import sys
if not hasattr(sys, "was_interrupted"):
    sys.was_interrupted = True
    raise KeyboardInterrupt
""" + GOOD.format(name="mine")
    plugins(numpy=f"{module('interrupted_plugin', source)}:KERNEL", numpy__b="math:pi")
    try:
        with pytest.raises(KeyboardInterrupt):
            multi_margin_loss(X, T)
    finally:
        del sys.was_interrupted
    sys.was_interrupted = True
    try:
        assert names() == ["mine", "numpy.b", "generic"]
        assert multi_margin_loss(X, T) == 7
    finally:
        del sys.was_interrupted


INTERRUPTED = """
import signal, sys
def handler(*_):
    raise RAISED
signal.signal(NUMBER, handler)
class Finder:
    def find_spec(self, name, *_):
        if name == MODULE and self in sys.meta_path:
            sys.meta_path.remove(self)
            signal.raise_signal(NUMBER)
sys.meta_path.insert(0, Finder())
import numpy, torch, mml_arrayapi as mml
class Timeout(Exception): pass
x, y = LIBRARY.zeros((2, 3)), LIBRARY.asarray([0, 1])
try:
    mml.multi_margin_loss(x, y)
except (KeyboardInterrupt, SystemExit, Timeout) as error:
    print(type(error).__name__)
mml.multi_margin_loss(x, y)
print(mml.explain(x, y).considered[0])
"""


@pytest.mark.parametrize("raised", ["KeyboardInterrupt", "SystemExit", "Timeout"])
@pytest.mark.parametrize("name", ["pytorch", "pytorch.autograd", "pytorch.cpu", "cpu.numpy"])
def test_signals_while_the_kernels_load_disable_none(name, raised):
    pytest.importorskip("torch")
    number = "signal.SIGINT" if raised == "KeyboardInterrupt" else "signal.SIGTERM"
    library = "numpy" if "numpy" in name else "torch"
    code = INTERRUPTED.replace("RAISED", raised).replace("NUMBER", number)
    code = code.replace("MODULE", repr(f"mml_arrayapi.backends.{name}"))
    made = run_python(code.replace("LIBRARY", library)).splitlines()
    assert made[0] == raised
    kernel = f"{library}-cpu"
    (status,) = (b for b in list_backends() if b.name == kernel)
    assert made[1] == str((kernel, None if status.available else status.reason))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers")
def test_what_a_signals_handler_raises_is_raised():
    class Timeout(Exception):
        pass

    def handler(*_):
        raise Timeout

    def call():
        signal.setitimer(signal.ITIMER_REAL, 50e-6)
        for _ in range(100):
            multi_margin_loss(X, T)
            multi_margin_loss_and_grad(X, T)
            explain(X, T)

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for _ in range(200):
            with pytest.raises(Timeout):
                call()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# The functions that may be tried before the checks.


def quick(name, answer, **words):
    loss, both = lambda _: answer, lambda p, _: (answer, p.input)
    return Kernel(name, "numpy", lambda _: None, loss, both, **words)


@pytest.mark.usefixtures("empty")
def test_after_a_direct_function_that_declines_comes_its_own_kernel():
    register_kernel(quick("mine", 1.0, direct={np.ndarray: lambda *_: None}))
    register_kernel(quick("other", 2.0, direct={np.ndarray: lambda *_: 3.0}))
    for _ in range(2):
        assert multi_margin_loss(X, T) == 1
        assert explain(X, T).kernel == "mine"


@pytest.mark.usefixtures("empty")
def test_a_type_without_a_direct_function_gets_the_kernel():
    register_kernel(quick("mine", 1.0, direct={np.memmap: lambda *_: 5.0}))
    register_kernel(quick("other", 2.0, direct={np.ndarray: lambda *_: 3.0}))
    for _ in range(2):
        assert multi_margin_loss(X, T) == 1


@pytest.mark.usefixtures("empty")
def test_a_direct_function_gets_only_what_its_kernel_supports():
    register_kernel(quick("mine", 1.0, direct={np.ndarray: lambda *_: 1.0}))
    assert [multi_margin_loss(X, T) for _ in range(2)] == [1, 1]
    assert multi_margin_loss(X, T, ignore_index=5) == pytest.approx(2 / 3)
    features = frozenset({"ignore_index"})
    register_kernel(
        quick("able", 2.0, direct={np.ndarray: lambda *_: 2.0}, supports=features, before="mine")
    )
    assert multi_margin_loss(X, T, ignore_index=5) == 2


@pytest.mark.usefixtures("empty")
def test_a_direct_function_may_find_that_it_is_unusable():
    def unusable(*_):
        raise Unusable("no memory")

    kernel = Kernel(
        "mine", "numpy", lambda _: None, unusable, unusable, direct={np.ndarray: unusable}
    )
    register_kernel(kernel)
    for _ in range(2):
        assert multi_margin_loss(X, T) == pytest.approx(2 / 3)


def test_plugins_of_one_name(plugins, module):
    for i in (1, 2):
        module(f"same_{i}", GOOD.format(name="numpy.fast").replace("7.0", f"{i}.0"))
    plugins(numpy__fast="same_1:KERNEL", numpy__b="same_2:KERNEL")
    register_kernel(fixed("numpy.fast", 9.0))
    assert names() == ["numpy.fast", "numpy.fast = same_1:KERNEL", "numpy.b", "generic"]
    assert multi_margin_loss(X, T, backend="numpy.fast") == 9
    reasons = dict(explain(X, T).considered[1:3])
    assert set(reasons.values()) == {"there is another kernel named 'numpy.fast'"}


def test_a_plugin_called_generic(plugins, module):
    plugins(generic=f"{module('claims', GOOD.format(name='generic'))}:KERNEL")
    assert [b.name for b in list_backends() if b.available] == ["generic"]


def test_on_chunks_of_another_kernel_that_raises():
    da = pytest.importorskip("dask.array")
    never = lambda *_: 1 / 0  # noqa: E731
    kernel = Kernel(
        "theirs", "dask", lambda _: None, never, never, before="dask-blocks", on_chunks=never
    )
    register_kernel(kernel)
    try:
        loss = multi_margin_loss(da.from_array(X), T, backend="numpy-cpu", check_target="nan")
        assert explain(da.from_array(X), T, backend="numpy-cpu").kernel == "dask-blocks"
        assert loss.ndim == 0
    finally:
        unregister_kernel("theirs")


# A broken accelerator, or package, that a call has not asked for.

BROKEN_CUDA = {
    "no version": "",
    "no function": "__version__ = '13.0.0'",
    "raises": "raise OSError('libcuda.so.1: wrong ELF class')",
    "exits": "raise SystemExit(3)",
    "has no words": "class Mute(Exception):\n def __str__(self): return 1 / 0\nraise Mute",
}
CALLS = """
import numpy as np
import mml_arrayapi as mml
x, y = np.zeros((2, 3)), np.array([0, 1])
if TENSORS:
    import torch, mml_arrayapi.pytorch
    tensors = torch.asarray(x), torch.asarray(y)
    assert mml.multi_margin_loss(*tensors).item() == mml.multi_margin_loss(x, y)
    assert mml.explain(*tensors).kernel in ("torch-cpu", "generic")
print(next(b for b in mml.list_backends() if b.name == "torch-cuda"))
print(mml.multi_margin_loss(x, y), mml.explain(x, y).kernel)
"""


@pytest.mark.parametrize("what", BROKEN_CUDA)
def test_half_a_cuda(tmp_path, what):
    pytest.importorskip("torch")
    for name, source in (
        ("", ""),
        ("bindings", BROKEN_CUDA[what]),
        ("bindings/driver", None),
        ("bindings/nvrtc", None),
    ):
        path = tmp_path / "cuda" / (f"{name}/__init__.py" if source is not None else f"{name}.py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source or "")
    tensors = what.startswith("no ")  # PyTorch imports it too, and has no patience with the others
    code = CALLS.replace("TENSORS", str(tensors))
    cuda, of_arrays = run_python(code, path=[tmp_path]).splitlines()
    assert of_arrays.split()[1] in ("numpy-cpu", "generic")
    assert "available=False" in cuda
    assert "cannot be imported" in cuda or "no CUDA driver" in cuda


@pytest.mark.parametrize(
    "text", [b"[console_scripts]\nbroken line\n", b"[\xff\xfe]\n"], ids=["a line", "the encoding"]
)
def test_a_damaged_list_of_entry_points_of_another_package(tmp_path, text):
    folder = tmp_path / "broken-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_bytes(text)
    code = """
import numpy as np, mml_arrayapi as mml
print(mml.multi_margin_loss(np.zeros((2, 3)), np.array([0, 1])))
print([b.name for b in mml.list_backends()])
"""
    loss, listed = run_python(code, path=[tmp_path, PLUGIN]).splitlines()
    assert float(loss) == pytest.approx(2 / 3)
    assert "generic" in listed
    assert listed == run_python(code, path=[PLUGIN]).splitlines()[1]


def test_an_entry_point_without_a_library(plugins):
    plugins(__a="math:pi")
    assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    broken, _ = list_backends()
    assert (broken.name, broken.available) == (".a", False)


@pytest.mark.parametrize("library", ["*", "jax.numpy", "my-arrays", " numpy"])
def test_a_library_that_no_namespace_has(plugins, library):
    told = (
        f"library must be the top-level name of a namespace, .* but is {re.escape(repr(library))}"
    )
    with pytest.raises(ValueError, match=f"kernel 'a': {told}"):
        register_kernel(fixed("a", library=library))
    assert not any(one.name == "a" for one in list_backends())


def test_an_entry_point_for_every_library(plugins, monkeypatch):
    module = types.ModuleType("for_every_library")
    module.KERNEL = fixed("everywhere", library="*")
    monkeypatch.setitem(sys.modules, "for_every_library", module)
    plugins(**{"*.everywhere": "for_every_library:KERNEL"})
    assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    listed = next(one for one in list_backends() if "everywhere" in one.name)
    assert not listed.available
    assert listed.reason.startswith("library must be the top-level name of a namespace")


def test_unusable_without_a_reason():
    def run(*_):
        raise Unusable

    register_kernel(Kernel("mute", "numpy", lambda _: None, run, run))
    told = "kernel 'mute' cannot run this call: it gives no reason; "
    with pytest.raises(ValueError, match=told):
        multi_margin_loss(X, T, backend="mute")


def test_errors_whose_words_raise(plugins, module):
    source = "class Mute(Exception):\n def __str__(self): return 1 / 0\nraise Mute"
    plugins(numpy=f"{module('mute', source)}:KERNEL")
    assert multi_margin_loss(X, T) == pytest.approx(2 / 3)
    assert list_backends()[0].reason == "cannot be imported: Mute"

    class Mute(Exception):
        def __str__(self):
            raise ZeroDivisionError

    def refuses(_):
        raise Mute

    register_kernel(Kernel("raises", "numpy", refuses, print, print))
    register_kernel(Kernel("gives", "numpy", lambda _: Mute(), print, print))
    assert dict(explain(X, T).considered) == {
        "numpy": "cannot be imported: Mute",
        "raises": "its refuses() raised Mute",
        "gives": "its refuses() returned Mute() of type Mute; None says that it takes the call",
        "generic": None,
    }


def test_a_finder_of_the_programs_own(monkeypatch):
    class Refusing:
        def find_spec(self, name, *_):
            if name in ("cupy", "jax"):
                raise ImportError(f"{name} is not allowed here")

    monkeypatch.setattr(sys, "meta_path", [Refusing(), *sys.meta_path])
    for name in ("cupy", "jax"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    found = {b.name: b for b in list_backends()}
    assert found["jax-jit"].reason == "not installed: jax"


def test_a_folder_is_not_a_library(tmp_path):
    (tmp_path / "cupy").mkdir()
    code = (
        "import mml_arrayapi as mml; print([b for b in mml.list_backends() if b.library == 'cupy'])"
    )
    assert "not installed: cupy" in run_python(code, path=[tmp_path], cwd=tmp_path)


@pytest.mark.usefixtures("empty")
def test_a_kernel_that_returns_something_else():
    register_kernel(Kernel("odd", "numpy", lambda _: None, lambda _: 1.5, lambda *_: 1.5))
    assert multi_margin_loss(X, T) == 1.5
    assert multi_margin_loss(X, T).dtype == X.dtype
    swapped = multi_margin_loss(X.astype(X.dtype.newbyteorder()), T)
    assert (swapped, swapped.dtype.isnative) == (1.5, False)
    with pytest.raises(TypeError, match=r"kernel 'odd': the loss must be an array of numpy, of fl"):
        multi_margin_loss(X, T, reduction="none")
    with pytest.raises(
        TypeError, match="'odd': loss_and_grad must return a loss and a gradient, a"
    ):
        multi_margin_loss_and_grad(X, T)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize(
    ("loss", "grad", "reduction", "told"),
    [
        (None, X, "mean", "the loss must be an array of numpy, of float32 and shape (), but is None"),
        ("", X, "sum", "the loss must be an array of numpy, of float32 and shape (), but is ''"),
        (True, X, "sum", "of numpy, of float32 and shape (), but is True of type bool"),
        ([1.0], X, "mean", "but is [1.0]"),
        (X[0], X, "mean", "shape (), but is a ndarray of float32 and shape (3,)"),
        (np.float16(0), X, "mean", "shape (), but is a float16 of float16 and shape ()"),
        (np.zeros(4, "f4"), X, "none", f"shape {T.shape}, but is a ndarray of float32 and shape (4,)"),
        (X[:, 0], X.T, "none", f"the gradient must be an array of numpy, of float32 and "
         f"shape {X.shape}, but is a ndarray of float32 and shape {X.T.shape}"),
        (X[:, 0], None, "none", "the gradient must be an array of numpy"),
        (X[0, 0], X.tolist(), "mean", "the gradient must be an array of numpy"),
    ],
)  # fmt: skip
def test_a_kernel_whose_results_do_not_fit(loss, grad, reduction, told):
    kernel = Kernel("odd", "numpy", lambda _: None, lambda _: loss, lambda *_: (loss, grad))
    register_kernel(kernel)
    calls = [multi_margin_loss_and_grad]
    if not told.startswith("the gradient"):
        calls.append(multi_margin_loss)
    for call in calls:
        with pytest.raises(TypeError, match=r"^kernel 'odd': the ") as info:
            call(X, T, reduction=reduction)
        assert told in str(info.value)
    if loss is not None and multi_margin_loss in calls:
        unregister_kernel("odd")
        register_kernel(replace(kernel, direct={np.ndarray: lambda *_: loss}))
        with pytest.raises(TypeError, match=re.escape(told)):
            multi_margin_loss(X, T, reduction=reduction)


@pytest.mark.usefixtures("empty")
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_kernel_whose_results_are_on_another_device(what):
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("device1")
    x, y = (xp.asarray(array, device=device) for array in (X, T))
    loss = xp.zeros((), dtype=x.dtype, device=None if what == "loss" else device)
    grad = xp.zeros_like(x, device=xp.Device("CPU_DEVICE"))
    register_kernel(
        Kernel("odd", "array_api_strict", lambda _: None, lambda _: loss, lambda *_: (loss, grad))
    )
    told = (
        f"kernel 'odd': the {what} must be on the device of input, .*device1.*, but is on .*CPU_DEV"
    )
    with pytest.raises(TypeError, match=told):
        multi_margin_loss_and_grad(x, y, check_target="nan")
    if what == "loss":
        with pytest.raises(TypeError, match=told):
            multi_margin_loss(x, y, check_target="nan")


@pytest.mark.usefixtures("empty")
def test_a_number_for_a_mean_goes_to_the_device_of_the_scores():
    xp = pytest.importorskip("array_api_strict")
    device = xp.Device("device1")
    x, y = (xp.asarray(array, device=device) for array in (X, T))
    register_kernel(Kernel("odd", "array_api_strict", lambda _: None, lambda _: 1.5, print))
    loss = multi_margin_loss(x, y, check_target="nan")
    assert (float(loss), loss.device) == (1.5, device)


@pytest.mark.usefixtures("empty")
def test_a_kernel_that_returns_tensors_for_arrays():
    torch = pytest.importorskip("torch")
    register_kernel(Kernel("odd", "numpy", lambda _: None, lambda _: torch.zeros(()), print))
    with pytest.raises(
        TypeError, match=r"the loss must be an array of numpy, .* but is a Tensor of"
    ):
        multi_margin_loss(X, T)


@pytest.mark.parametrize("entry", ["numpy-cpu", "generic", "torch.numpy-cpu", ""])
def test_a_broken_plugin_takes_no_kernels_name(tmp_path, entry):
    folder = tmp_path / "pz-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: pz\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        f"[mml_arrayapi.backends]\n{entry} = pz:K\n{entry} = pz:L\nnumpy.half = pz:HALF\n"
        "numpy.hidden = pz:HIDDEN\n"
    )
    (tmp_path / "pz.py").write_text(
        "from mml_arrayapi import Kernel\n"
        "K = Kernel('fast', 'cubed', lambda p: None, lambda p: 1.0, lambda p, g: (1, 2))\n"
        "HALF = object.__new__(Kernel)\n"
        "class Hidden(Kernel):\n"
        "    def __getattribute__(self, name): raise RuntimeError('hands off')\n"
        "HIDDEN = object.__new__(Hidden)\n"
    )
    code = """
import numpy as np, mml_arrayapi as mml
x, y = np.eye(3), np.arange(3)
for _ in range(2):
    assert mml.multi_margin_loss(x, y, backend="generic") == mml.multi_margin_loss(x, y) == 0
    names = [b.name for b in mml.list_backends()]
    assert len(set(names)) == len(names), names
    reasons = {b.name: b.reason for b in mml.list_backends()}
    assert "never initialised" in reasons["numpy.half"], reasons
    assert "cannot be read: RuntimeError: hands off" in reasons["numpy.hidden"], reasons
    for name in names:
        try:
            mml.multi_margin_loss(x, y, backend=name)
        except ValueError as error:
            assert f"kernel {name!r}" in str(error), error
"""
    assert run_python(code, path=[tmp_path]) == ""


def test_a_plugin_that_imports_what_another_thread_imports(tmp_path):
    """The one waits for the plugin, the plugin for what the one imports."""
    pytest.importorskip("torch")
    folder = tmp_path / "slow-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: slow\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[mml_arrayapi.backends]\ntorch.slow = slow:KERNEL\n")
    (tmp_path / "slow.py").write_text(
        "import time; time.sleep(1)\nimport mml_arrayapi.pytorch\n"
        "KERNEL = mml_arrayapi.Kernel('slow', 'torch', lambda _: 'never', print, print)\n"
    )
    code = """
import threading, time, faulthandler
faulthandler.dump_traceback_later(60, exit=True)
import torch, mml_arrayapi as mml
thread = threading.Thread(target=mml.list_backends)
thread.start()
time.sleep(0.3)
print(mml.multi_margin_loss(torch.zeros(2, 3), torch.tensor([0, 1])).item())
thread.join()
print([b.available for b in mml.list_backends() if b.name == "slow"])
"""
    loss, available = run_python(code, path=[tmp_path]).splitlines()
    assert float(loss) == pytest.approx(2 / 3)
    assert available == "[True]"


USER = "import time; time.sleep(0.5)\nimport numpy as np, mml_arrayapi as mml\nmml.explain(X, T)\n"
IMPORTS = {
    "a thread": "threading.Thread(target=lambda: __import__('user')).start(); time.sleep(0.2)",
    "the plugin": "import circular",
}


@pytest.mark.parametrize("first", IMPORTS)
def test_a_plugin_whose_module_is_just_being_imported(tmp_path, first):
    """It serves the next call, whatever came first."""
    folder = tmp_path / "circular-1.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: circular\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text(
        "[mml_arrayapi.backends]\nnumpy.circular = circular:KERNEL\n"
    )
    arrays = "np.zeros((2, 3)), np.array([0, 1])"
    (tmp_path / "user.py").write_text(USER.replace("X, T", arrays))
    (tmp_path / "circular.py").write_text(
        f"import numpy as np, mml_arrayapi as mml\nmml.explain({arrays})\nimport user\n"
        "KERNEL = mml.Kernel('circular', 'numpy', lambda _: None, lambda _: np.float64(7), print,"
        " before='numpy-cpu')\n"
    )
    code = f"""
import faulthandler, threading, time
faulthandler.dump_traceback_later(60, exit=True)
import numpy as np, mml_arrayapi as mml
{IMPORTS[first]}
mml.explain({arrays})
time.sleep(1)
print(mml.explain({arrays}).kernel, [b.available for b in mml.list_backends() if b.name == "circular"])
"""
    assert run_python(code, path=[tmp_path]) == "circular [True]"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_while_the_lock_is_held():
    code = """
import os, signal, threading, time, warnings
warnings.simplefilter("ignore")
import numpy as np, mml_arrayapi as mml
from mml_arrayapi import registry
held = threading.Event()
def hold():
    with registry._lock:
        held.set()
        time.sleep(2)
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    signal.alarm(60)
    loss = mml.multi_margin_loss(np.zeros((2, 3)), np.array([0, 1]))
    os._exit(0 if abs(loss - 2 / 3) < 1e-6 else 1)
print(os.waitpid(child, 0)[1])
"""
    assert run_python(code) == "0"
