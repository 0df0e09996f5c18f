"""The types of the public functions' arguments, for annotations and type checkers."""

from __future__ import annotations

from typing import Any, Literal, Protocol

Reduction = Literal["none", "mean", "sum"]
"""What ``reduction`` accepts."""

CheckTarget = Literal["auto", "raise", "nan"]
"""What ``check_target`` accepts."""


class Array(Protocol):
    """An array of any library that follows the Python array API standard.

    A type checker accepts the arrays of NumPy, PyTorch, CuPy, Dask, JAX and others, and refuses
    numbers, strings and lists. Whether the library follows the standard shows when it is called.
    """

    @property
    def ndim(self) -> int:
        """How many axes there are."""
        ...

    @property
    def shape(self) -> Any:
        """The length of each axis."""
        ...

    @property
    def dtype(self) -> Any:
        """The type of the elements."""
        ...
