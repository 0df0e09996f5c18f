"""Every module can be imported first and in every form; module-level imports run one way."""

import ast
import os
import re
import sys
from graphlib import TopologicalSorter

import pytest

from tests.tree import ROOT, run_python, sources

SOURCES = sources()
# Running this one is all that it is for: importing it runs the command line.
RUNNABLE = {name for name in SOURCES if name.endswith(".__main__")}
MODULES = sorted(SOURCES.keys() - RUNNABLE)
COMPILED = {
    f"mml_arrayapi.backends.cpu.{name}" for name in ("_baseline", "_x86_64_v3", "_x86_64_v4")
}

# The layers, from the bottom: a module imports those of its own layer and of the ones below.
# (What a function imports when it is called is not meant: that is how kernels are loaded late.)
CORE, PARTS, PUBLIC, CONFORMANCE, COMMANDS = range(5)
LAYERS = {
    # The list of built-in kernels, which the registry reads. It loads none of them.
    "mml_arrayapi.backends": CORE,
    "mml_arrayapi.backends.": PARTS,
    "mml_arrayapi.evaluation": PARTS,
    "mml_arrayapi.evaluation.": PARTS,
    "mml_arrayapi": PUBLIC,
    "mml_arrayapi.pytorch": PUBLIC,
    "mml_arrayapi.sklearn": PUBLIC,
    "mml_arrayapi.torchmetrics": PUBLIC,
    "mml_arrayapi.conformance": CONFORMANCE,
    "mml_arrayapi.conformance.": CONFORMANCE,
    "mml_arrayapi.demo": COMMANDS,
    "mml_arrayapi.cli": COMMANDS,
    "mml_arrayapi.__main__": COMMANDS,
}


def layer(name):
    """The layer of a module; those that the table doesn't name are the core."""
    inside = [prefix for prefix in LAYERS if prefix.endswith(".") and name.startswith(prefix)]
    return LAYERS.get(name, LAYERS[inside[0]] if inside else CORE)


def module_level(body):
    """The import statements that run when the module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from module_level(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ("body", "orelse", "finalbody"):
                yield from module_level(getattr(node, inner, []))
            for handler in getattr(node, "handlers", []):
                yield from module_level(handler.body)


def imported_by(name, source):
    """The modules of the package that a module imports, with the packages that hold them."""
    named = set()
    for node in module_level(ast.parse(source).body):
        if isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        else:
            assert node.level == 0, f"{name} has a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            named |= inner & SOURCES.keys()
            if not inner <= SOURCES.keys():
                named.add(node.module)
    found = named & SOURCES.keys()
    for target in list(found):
        parts = target.split(".")
        parents = {".".join(parts[:n]) for n in range(1, len(parts))}
        found |= {p for p in parents if not f"{name}.".startswith(f"{p}.")}
    return found - {name}


IMPORTS = {name: imported_by(name, path.read_text("utf-8")) for name, path in SOURCES.items()}


def test_imports_form_no_circle():
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError
    assert set(order) == set(SOURCES)


def test_imports_run_one_way():
    upward = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in sorted(targets)
        if layer(target) > layer(name)
    ]
    assert not upward


def test_the_folders_of_one_layer_do_not_import_each_other():
    def folder(name):
        return name.split(".")[1] if layer(name) == PARTS else None

    across = [
        f"{name} imports {target}"
        for name, targets in IMPORTS.items()
        for target in sorted(targets)
        if folder(name) and folder(target) and folder(name) != folder(target)
    ]
    assert not across


def test_the_reader_of_imports_sees_them_all():
    source = """
import mml_arrayapi.loss, os
from mml_arrayapi import kernel, Problem
if TYPE_CHECKING:
    from mml_arrayapi import cli
else:
    import mml_arrayapi.formula as f
try:
    from mml_arrayapi.conformance.suite import Check
except ImportError:
    import mml_arrayapi.demo
class A:
    import mml_arrayapi.registry
def late():
    import mml_arrayapi.accumulator
"""
    assert imported_by("mml_arrayapi.validation", source) == {
        "mml_arrayapi", "mml_arrayapi.loss", "mml_arrayapi.kernel", "mml_arrayapi.formula",
        "mml_arrayapi.conformance", "mml_arrayapi.conformance.suite", "mml_arrayapi.demo",
        "mml_arrayapi.registry",
    }  # fmt: skip


def test_importing_the_package_imports_little():
    """No library, and nothing of the standard library that takes long and most calls don't need."""
    code = """
import sys
before = set(sys.modules)
import mml_arrayapi
new = set(sys.modules) - before
print(sorted({name.partition(".")[0] for name in new} - set(sys.stdlib_module_names)))
print(sorted(new & {"importlib.metadata", "pathlib", "mml_arrayapi.evaluation", "mml_arrayapi.cli"}))
assert set(mml_arrayapi.__all__) <= set(dir(mml_arrayapi))
try:
    mml_arrayapi.nothing
except AttributeError as error:
    print(error)
"""
    # -S: without the site's .pth files, which import what they like
    folders = [str(ROOT), *(path for path in sys.path if path.endswith("site-packages"))]
    assert run_python(code, flags=("-S",), path=folders).splitlines() == [
        "['mml_arrayapi']",
        "[]",
        "module 'mml_arrayapi' has no attribute 'nothing'",
    ]


EVERY_FORM = """
import importlib, sys, types
name = NAME
parent, _, last = name.rpartition(".")
try:
    exec(f"import {name} as first")
except ImportError as error:
    if (error.name or "").startswith("mml_arrayapi"):
        raise
    print("needs", error.name)
    raise SystemExit
assert type(first) is types.ModuleType and first.__name__ == name, first
exec(f"import {name}")
assert eval(name) is first
if parent:
    exec(f"from {parent} import {last} as third")
    assert third is first
assert importlib.import_module(name) is sys.modules[name] is first
"""


# What takes long to import, and is none of ours: a fork of the process has it, and none of ours.
FORKS = """
import contextlib, importlib, os, sys, traceback, warnings
warnings.simplefilter("ignore")  # of forks where libraries have threads; the child only imports
for library in ("numpy", "torch", "jax", "dask.array", "distributed", "sklearn", "torchmetrics", "pyarrow"):
    with contextlib.suppress(ImportError):
        importlib.import_module(library)
import array_api_compat.torch  # PyTorch imports what it is asked for
for name in {names!r}:
    assert "mml_arrayapi" not in sys.modules
    print(flush=True, end="\\0" + name + "\\0")
    if not os.fork():
        try:
            exec({code!r}.replace("NAME", repr(name)))
        except BaseException as error:
            if not isinstance(error, SystemExit):
                print("failed:", traceback.format_exc())
        sys.stdout.flush()
        os._exit(0)
    os.wait()
"""


def in_processes(names, code):
    """What processes say that begin with none of our modules, one for each name: {name: output}."""
    if not hasattr(os, "fork"):
        return {name: run_python(code.replace("NAME", repr(name))) for name in names}
    _, *told = run_python(FORKS.format(names=names, code=code)).split("\0")
    return dict(zip(told[::2], map(str.strip, told[1::2]), strict=True))


@pytest.fixture(scope="module")
def every_form():
    return in_processes(MODULES, EVERY_FORM)


@pytest.mark.parametrize("name", MODULES)
def test_every_form_of_import(name, every_form):
    said = every_form[name]
    if said.startswith("needs "):
        pytest.skip(f"{name} {said}, which is not installed")
    assert not said


def test_every_order_of_imports():
    code = f"""
import importlib, random
for name in random.Random(NAME).sample({MODULES}, {len(MODULES)}):
    try:
        assert importlib.import_module(name).__name__ == name
    except ImportError as error:
        if (error.name or "").startswith("mml_arrayapi"):
            raise
import mml_arrayapi
for name in mml_arrayapi.__all__:
    getattr(mml_arrayapi, name)
assert callable(mml_arrayapi.evaluate)
"""
    seeds = ["first", "second", "third"]
    assert in_processes(seeds, code) == dict.fromkeys(seeds, "")


def test_what_tests_skip_for_is_no_module_of_ours_that_has_moved():
    """``importorskip`` would skip them for ever, with a reason that is not true."""
    skipped = re.compile(r"importorskip\(\s*[\"']((?:mml_arrayapi|tests)[\w.]*)[\"']")
    tests = {path: path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("*.py"))}
    helpers = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in tests}
    for path, text in tests.items():
        for name in skipped.findall(text):
            known = name in SOURCES or name in helpers or name in COMPILED
            assert known, f"{path.name} skips for {name}"
