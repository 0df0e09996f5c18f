"""Makes a checkout importable: the folders ``backends`` and ``conformance`` stand beside this one.

In an installed copy they are inside the package, and nothing happens here. (Appending the checkout
to the package's ``__path__`` would make ``mml_arrayapi.setup`` and ``mml_arrayapi.tests`` of the
files beside it.)
"""

import os.path
import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location

PACKAGE = os.path.dirname(__file__)
CHECKOUT = os.path.dirname(PACKAGE)
FOLDERS = {
    f"mml_arrayapi.{name}": os.path.join(CHECKOUT, name) for name in ("backends", "conformance")
}


class Finder:
    """Finds the sub-packages that stand beside the package."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG004
        """Return where a sub-package is; see :meth:`importlib.abc.MetaPathFinder.find_spec`."""
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return spec_from_file_location(
            name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
        )


if not os.path.exists(os.path.join(PACKAGE, "backends")) and os.path.isfile(
    os.path.join(CHECKOUT, "pyproject.toml")
):
    sys.meta_path.append(Finder)
