"""The golden vectors: exact results, in a small file that another language could read as well."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Golden:
    """One golden vector; ``golden.json`` describes its fields and how it is made.

    Attributes
    ----------
    name : str
        What it is about.
    dtypes : list of str
        The dtypes that hold its scores exactly.
    p, margin : float
        The parameters.
    weight : list of C floats, or None
        One per class.
    target : list of N ints
        The classes.
    input : N lists of C floats
        The scores.
    losses, loss_scales : list of N floats
        The losses, and by what unit roundoffs are to be multiplied to bound their error.
    sum, sum_scale, mean, mean_scale : float
        The same for the reductions.
    grad, grad_scales : N lists of C floats
        The same for the gradient of the sum.
    """

    name: str
    dtypes: list[str]
    p: float
    margin: float
    weight: list[float] | None
    target: list[int]
    input: list[list[float]]
    losses: list[float]
    loss_scales: list[float]
    sum: float
    sum_scale: float
    mean: float
    mean_scale: float
    grad: list[list[float]]
    grad_scales: list[list[float]]


_NOT_HEXADECIMAL = ("name", "dtypes", "target")


@cache
def golden_vectors() -> tuple[Golden, ...]:
    """Read the golden vectors from the file in this package.

    Returns
    -------
    tuple of Golden

    Examples
    --------
    >>> from mml_arrayapi.conformance.golden import golden_vectors
    >>> golden_vectors()[1].losses
    [0.125, 2.0]
    """
    text = files("mml_arrayapi.conformance").joinpath("golden.json").read_text("ascii")
    return tuple(
        Golden(**{k: v if k in _NOT_HEXADECIMAL else _floats(v) for k, v in vector.items()})
        for vector in json.loads(text)["vectors"]
    )


def _floats(value: Any) -> Any:
    if isinstance(value, list):
        return [_floats(v) for v in value]
    return None if value is None else float.fromhex(value)
