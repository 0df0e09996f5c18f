"""Few cases in which the values of any two, or any three, options meet."""

from __future__ import annotations

import random
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from itertools import combinations, product

Item = tuple[str, Hashable]  # an option and one of its values
Case = dict[str, Hashable]  # a value of every option

_TRIES = 16  # to choose each case from; more of them save a few cases in a hundred


def covering(
    values: Mapping[str, Sequence[Hashable]],
    hiding: Collection[Item],
    strength: int,
    rng: random.Random,
) -> list[Case]:
    """Choose cases in which all values of any ``strength`` options meet.

    Parameters
    ----------
    values : mapping of str to sequence
        The options, each with its values. One that stands there twice is taken more often.
    hiding : collection of (str, value)
        Values beside which the others have little effect, such as that all samples are ignored.
        What meets beside one of these counts only if it is part of it.
    strength : int
        How many options meet.
    rng : random.Random
        What is left open is chosen by it.

    Returns
    -------
    list of dict

    Examples
    --------
    >>> from random import Random
    >>> from mml_arrayapi.conformance.covering import covering
    >>> options = {"p": (1, 2), "axis": (0, 1), "reduction": ("mean", "sum")}
    >>> 4 <= len(covering(options, (), 2, Random(0))) < 8
    True
    """
    plain = {
        option: [value for value in several if (option, value) not in hiding]
        for option, several in values.items()
    }
    left = dict.fromkeys(  # a set would have another order in every process
        frozenset(zip(options, met, strict=True))
        for options in combinations(values, strength)
        for met in product(*(values[option] for option in options))
    )
    cases = []
    while left:
        first = dict(next(iter(left)))
        tried = [
            {option: first.get(option, rng.choice(plain[option])) for option in values}
            for _ in range(_TRIES)
        ]
        new = [[met for met in _shown(case, hiding, strength) if met in left] for case in tried]
        best = max(range(_TRIES), key=lambda i: len(new[i]))
        cases.append(tried[best])
        for met in new[best]:
            del left[met]
    return cases


def _shown(case: Case, hiding: Collection[Item], strength: int) -> Iterator[frozenset[Item]]:
    """List what meets in a case and isn't hidden."""
    hidden = [item for item in case.items() if item in hiding]
    others = [item for item in case.items() if item not in hiding]
    for met in combinations(others, strength - len(hidden)):
        yield frozenset((*hidden, *met))
