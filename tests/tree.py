"""The package in the working tree: its files, its modules, and interpreters of their own for tests."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Each top-level folder of the package, and where it is once installed.
FOLDERS = {
    "mml_arrayapi": "mml_arrayapi",
    "backends": "mml_arrayapi/backends",
    "conformance": "mml_arrayapi/conformance",
}

BUILT = (".pyc", ".so", ".pyd", ".nbc", ".nbi")


def files():
    """Every file of the package: {path in the working tree: path once installed}."""
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            if path.is_file() and path.suffix not in BUILT:
                inner = path.relative_to(ROOT / folder).as_posix()
                found[f"{folder}/{inner}"] = f"{package}/{inner}"
    return found


def sources():
    """Every Python module of the package: {dotted name: source file}, packages by their own name."""
    return {
        installed.removesuffix(".py").replace("/", ".").removesuffix(".__init__"): ROOT / path
        for path, installed in files().items()
        if installed.endswith(".py")
    }


def run_python(code, *, flags=(), path=(), cwd=None, **environment):
    """Run code in a fresh interpreter, with further directories on its path; return what it prints."""
    extra = [str(p) for p in path] + [os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in extra if p)}
    result = subprocess.run(
        [sys.executable, *flags, "-c", code],
        env=os.environ | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
