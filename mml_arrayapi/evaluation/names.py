"""Names of files: their natural order, and which of two kinds belong together."""

from __future__ import annotations

import operator
import re
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, takewhile
from typing import Any

SIGNED = re.compile(r"(?:^|[^A-Za-z0-9)\]])-\d|\de[-+]?\d")  # \d: the digits of any script
DATE = re.compile(  # year, month, day; perhaps hour, minute, second
    r"(?<![0-9])(?:19|20)[0-9]{2}([-_.])(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12][0-9]|3[01])"
    r"(?:[-_.T:][0-9]{2}){0,3}(?![0-9])"
)
TOKEN = re.compile(r"\d+|[^\W\d_]+")  # numbers, and words of letters
PLACE = "*"  # stands for what differs, which is no token


def natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts numbers in names as numbers."""
    return [
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", name)
    ]


def cores(names: Sequence[str]) -> list[str]:
    """Return where names differ: without the beginning and the end that all share."""
    head = _head(names)
    rests = [name[head:] for name in names]
    tail = re.sub(r"^\d+", "", _common_end(rests))
    return [rest[: len(rest) - len(tail)] for rest in rests]


def _head(names: Sequence[str]) -> int:
    """Return how many characters of all names are the same, up to the last number in these."""
    return len(re.sub(r"\d+$", "", common_start(names)))


def common_start(names: Sequence[str]) -> str:
    """Return what all names begin with."""
    first, last = min(names), max(names)
    same = (a == b for a, b in zip(first, last, strict=False))
    return first[: sum(1 for _ in takewhile(bool, same))]


def _common_end(names: Sequence[str]) -> str:
    return common_start([name[::-1] for name in names])[::-1]


def numbered(names: Sequence[str]) -> bool:
    """Whether names differ in numbers only, so that their order is beyond doubt.

    Of several numbers none may ever fall, since nobody knows which goes round first; a date is one.
    Fractions of other lengths sort otherwise, and so do negative numbers and powers of ten.
    """
    head = _head(names)
    upto = [name[: head + len(core)] for name, core in zip(names, cores(names), strict=True)]
    if any(sign.end() > head for name in upto for sign in SIGNED.finditer(name)):
        return False
    names = [DATE.sub(lambda date: re.sub("[^0-9]", "", date[0]), name) for name in names]
    keys = [natural(core) for core in cores(names)]
    texts = {tuple(text for _, _, text in key) for key in keys}
    numbers = [tuple(number for _, number, _ in key) for key in keys]
    rising = all(list(column) == sorted(column) for column in zip(*numbers, strict=False))
    fractions = [re.findall(r"\d\.(\d+)", name) for name in names]
    even = len({tuple(map(len, one)) for one in fractions}) == 1
    return len(texts) == 1 and len(set(numbers)) == len(names) and rising and even


def correspond(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether equally many names of two kinds belong together one by one."""
    return any(a == b for a, b in _ways(first, second))


def in_another_order(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether names of two kinds belong together, but not as they stand."""
    ways = [*_ways(first, second)]
    return all(a != b for a, b in ways) and any(sorted(a) == sorted(b) for a, b in ways)


def _ways(first: Sequence[str], second: Sequence[str]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Yield the ways to compare names: for each, keys of both, each of which occurs once."""
    ways: list[tuple[list[Any], list[Any]]] = []
    parts, others = _Parts(first), _Parts(second)
    if not parts.turned(others):
        texts, their_texts = cores(first), cores(second)
        ours, theirs = ([natural(text) for text in one] for one in (texts, their_texts))
        ways += [(texts, their_texts), (ours, theirs), (_numbers(ours), _numbers(theirs))]
        if parts.mean_the_same_as(others):
            ways.append((parts.keys, others.keys))
    words, their_words = parts.words(others)
    if words:
        ways.append((parts.by_words(words), others.by_words(their_words)))
    for a, b in ways:
        if len(a) == len({str(key) for key in a}) == len({str(key) for key in b}) == len(b) > 0:
            yield a, b


def _numbers(keys: list[list[tuple[int, int, str]]]) -> list[int]:
    """Return numbers from 0 or 1 on, counted from 0; nothing for other keys."""
    numbers = [key[1][1] for key in keys if len(key) == 3 and not key[0][2] and not key[2][2]]
    return _from_0(numbers) if len(numbers) == len(keys) and _from_0(numbers) else []


def _from_0(numbers: list[int]) -> list[int]:
    """Return numbers that are 0, 1, ... or 1, 2, ... counted from 0; nothing for others."""
    found = sorted(set(numbers))
    if found not in ([*range(len(found))], [*range(1, len(found) + 1)]):
        return []
    return [number - found[0] for number in numbers]


class _Parts:
    """In which numbers and words names differ, and what stands beside each of these.

    So ``day2/scores/part-0`` is ``(2, 0)``, beside ``day``, ``scores`` and ``part``.

    Attributes
    ----------
    keys : list of tuple
        Of each name, the parts in which it differs; numbers are counted from 0 where they are all
        from 1 on. Nothing for names of unlike depth.
    pattern : list of str
        The words, numbers and folders that all names share, and a mark for each of these parts.
    """

    def __init__(self, names: Sequence[str]) -> None:
        levels = [unicodedata.normalize("NFC", name).split("/") for name in names]
        self.pattern: list[str] = []
        self._columns: list[list[Any]] = []
        if len({len(one) for one in levels}) == 1:
            for level in zip(*levels, strict=True):
                self._add(level)
        self.keys = list(zip(*self._columns, strict=True))

    def _add(self, texts: Sequence[str]) -> None:
        """Add one level of the paths."""
        tokens = [TOKEN.findall(text) for text in texts]
        kinds = {tuple(token.isdecimal() for token in one) for one in tokens}
        if len(set(texts)) == 1:
            self.pattern.append(f"{texts[0]}/")
        elif len(kinds) > 1 or () in kinds:  # of unlike build: one part
            self._add_differing(texts)
        else:
            for column in zip(*tokens, strict=True):
                self._add_differing(column)

    def _add_differing(self, texts: Sequence[str]) -> None:
        if len(set(texts)) == 1:
            self.pattern += TOKEN.findall(texts[0])
        elif all(text.isdecimal() for text in texts):
            numbers = [int(text) for text in texts]
            self.pattern.append(PLACE)
            self._columns.append(_from_0(numbers) or numbers)
        else:
            head = common_start(texts)
            rests = [text[len(head) :] for text in texts]
            tail = _common_end(rests)
            self.pattern += [*TOKEN.findall(head), PLACE, *TOKEN.findall(tail)]
            self._columns.append([rest[: len(rest) - len(tail)] for rest in rests])

    def _between(self, other: _Parts, *, whole: bool = False) -> list[set[str]]:
        """Return what stands before, between and behind the parts, of what both names have.

        But for words beside one that only one of them has, such as ``val`` in ``val_scores`` and
        ``val_labels``: these belong to the kind. ``whole``: with them.
        """
        same = [a == b and a[-1] == "/" for a, b in zip(self.pattern, other.pattern, strict=False)]
        start = [*same, False].index(False)  # the folders that all lie in say nothing
        ours, theirs = (_tokens(one.pattern[start:]) for one in (self, other))
        kinds = set() if whole else _beside_own(ours, theirs) & _beside_own(theirs, ours)
        found: list[set[str]] = [set()]
        for token in ours:
            if token == PLACE:
                found.append(set())
            elif token in theirs and token not in kinds:
                found[-1].add(token)
        return found

    def _before(self, other: _Parts) -> list[set[str]]:
        """Return all that stands before each part, of what both names have."""
        return [*accumulate(self._between(other)[:-1], operator.or_)]

    def turned(self, other: _Parts) -> bool:
        """Whether something stands before the parts of one and behind those of the other.

        So ``2024-01-02`` and ``02-01-2024`` have the same day in one order, or not, in the other.
        """
        if len(self._columns) < 2 or len(other._columns) < 2:
            return False
        (before, *_, behind), (first, *_, last) = self._between(other), other._between(self)
        return bool((before - first) & (last - behind) or (behind - last) & (first - before))

    def words(self, other: _Parts) -> tuple[list[Any], list[Any]]:
        """Return the words before each part, here and in the other, if these tell them apart."""
        for whole in (True, False):
            ours, theirs = (
                one._between(another, whole=whole)[:-1]
                for one, another in ((self, other), (other, self))
            )
            for common in (set(), ours[0] & theirs[0] if ours and theirs else set()):
                found = [[sorted(one - common) for one in names] for names in (ours, theirs)]
                named = all(re.search(r"[^\W\d]", " ".join(one)) for one in found[0])
                distinct = len({str(one) for one in found[0]}) == len(found[0])
                if named and distinct and sorted(found[0]) == sorted(found[1]):
                    return found[0], found[1]
        return [], []

    def by_words(self, words: list[Any]) -> list[tuple[Any, ...]]:
        """Return the keys with their parts in the order of the words before these."""
        order = sorted(range(len(words)), key=words.__getitem__)
        return [tuple(key[i] for i in order) for key in self.keys]

    def mean_the_same_as(self, other: _Parts) -> bool:
        """Whether the parts of both, one by one, stand beside the same.

        One word, for the kind of file, may be another; or a folder be in one of them only. But the
        words that both have stand before the same parts. Else the parts may stand for other things,
        as in ``1/seed2`` and ``1/fold2``, or ``train-0-test-1`` and ``test-1-train-0``.
        """
        if len(self._columns) != len(other._columns):
            return False
        if len(self._columns) == 1:
            return True
        if self._before(other) != other._before(self):
            return False
        if len(_unlike(self.pattern, other.pattern)) <= 1:
            return True
        own = [
            {token for token in one.pattern if token[-1] == "/" and token not in another.pattern}
            for one, another in ((self, other), (other, self))
        ]
        rests = [
            [token for token in one.pattern if token not in folders]
            for one, folders in zip((self, other), own, strict=True)
        ]
        return max(map(len, own)) == 1 and len(_unlike(*rests)) <= 1


def _tokens(pattern: Sequence[str]) -> list[str]:
    return [token for one in pattern for token in ([PLACE] if one == PLACE else TOKEN.findall(one))]


def _beside_own(tokens: Sequence[str], others: Sequence[str]) -> set[str]:
    """Return the words that stand beside a token which the others have not."""
    pairs = [*pairwise(tokens), *pairwise(tokens[::-1])]
    return {word for word, own in pairs if own not in (PLACE, *others) and word.isalpha()}


def _unlike(first: Sequence[str], second: Sequence[str]) -> set[tuple[str, str]]:
    """Return what stands beside the parts of one pattern, and of the other another token."""
    beside = []
    for pattern in (first, second):
        padded = ["", *pattern, ""]
        places = [i for i, token in enumerate(padded) if token == PLACE]
        beside.append([padded[i + step] for i in places for step in (-1, 1)])
    return {(a, b) for a, b in zip(*beside, strict=True) if a != b}
