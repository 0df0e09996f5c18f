"""What a check is, how one is run, and what can come of it."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from mml_arrayapi.conformance.context import Context, Fail, Missing, NotRun

PASS = "pass"
MISSING = "missing"  # the library lacks something that is needed
UNSUPPORTED = "unsupported"  # the library or device lacks the dtype
NOT_RUN = "not run"  # it can't be checked here
EXPECTED = "expected failure"
FAIL = "FAIL"
STATES = (PASS, MISSING, UNSUPPORTED, NOT_RUN, EXPECTED, FAIL)


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one check with one dtype.

    Attributes
    ----------
    check, topic, dtype : str
        Which check it was.
    state : str
        One of :data:`STATES`. Only "pass" means that the check was run and found nothing.
    reason : str
        In words, where the state is not "pass".
    snippet : str
        A few lines of Python that show a failure.
    command : str
        The command that runs this check alone, with the same numbers.
    seconds : float
        How long it took.
    warnings : tuple of str
        What the library warned of meanwhile.
    """

    check: str
    topic: str
    dtype: str
    state: str
    reason: str = ""
    snippet: str = ""
    command: str = ""
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether the state is "FAIL"."""
        return self.state == FAIL

    def __str__(self) -> str:
        lines = [f"{self.state}: {self.check} [{self.dtype}]"]
        lines += [self.reason] if self.reason else []
        if self.failed:
            lines += ["", *(f"    {line}" for line in self.snippet.splitlines()), ""]
            lines += [f"again: {self.command}"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Check:
    """One clause of the contract, as something to run.

    Attributes
    ----------
    name, topic : str
        The clause, and the part of the contract that it belongs to.
    function : callable
        Takes a :class:`Context`; returns where all is well.
    every_dtype : bool
        Whether it says something new for each dtype.
    """

    name: str
    topic: str
    function: Callable[[Context], None]
    every_dtype: bool

    def __str__(self) -> str:
        return self.name

    @property
    def clause(self) -> str:
        """What holds, in a sentence or two."""
        return " ".join((self.function.__doc__ or "").split())

    def __call__(self, context: Context, expected: Mapping[str, str] | None = None) -> Result:
        """Run the check; never raises for what the library does.

        Parameters
        ----------
        context : Context
            The library, device, dtype and seed.
        expected : mapping of str to str, optional
            Names of checks that are known to fail, with the reason. One that passes after all
            is a failure.

        Returns
        -------
        Result
        """
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            state, reason, snippet = self._outcome(context)
        warned = tuple(dict.fromkeys(f"{w.category.__name__}: {w.message}" for w in caught))
        known = (expected or {}).get(self.name)
        if known is not None and state == FAIL:
            state, reason = EXPECTED, f"{known} ({reason})"
        elif known is not None and state == PASS:
            state, reason = FAIL, f"was expected to fail ({known}), but passes"
        seconds = time.perf_counter() - start
        command = context.command(self.name)
        return Result(
            self.name, self.topic, context.dtype, state, reason, snippet, command, seconds, warned
        )

    def _outcome(self, context: Context) -> tuple[str, str, str]:
        context.begin(self.name)
        if not context.has_dtype(context.dtype):
            return UNSUPPORTED, f"{context.library} has no {context.dtype} here", ""
        try:
            self.function(context)
        except Missing as lack:
            return MISSING, str(lack), ""
        except NotRun as reason:
            return NOT_RUN, str(reason), ""
        except Fail as failure:
            return FAIL, str(failure), context.snippet()
        except (NotImplementedError, BufferError) as error:  # the latter: no export by DLPack
            return MISSING, _described(error), ""
        except AttributeError as error:
            lacking = context.lacking(error)
            if lacking:
                return MISSING, f"{context.library} has no {lacking}", ""
            return FAIL, _described(error), context.snippet()
        except Exception as error:  # noqa: BLE001 (whatever a library raises is a finding)
            refusal = context.refusal(error)
            if refusal:
                return NOT_RUN, refusal, ""
            return FAIL, _described(error), context.snippet()
        return PASS, "", ""


def _described(error: Exception) -> str:
    """Say what was raised, and where, without the suite's own frames."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
    text = str(error).strip().split("\n")[0][:300]
    return f"raised {type(error).__name__}: {text} (at {place} in {frame.name})"


_checks: dict[str, Check] = {}


def check(
    topic: str, *, every_dtype: bool = False
) -> Callable[[Callable[[Context], None]], Callable[[Context], None]]:
    """Make a check of a function; its name, with spaces, names the clause.

    Parameters
    ----------
    topic : str
        The part of the contract.
    every_dtype : bool
        Whether it says something new for each dtype.

    Returns
    -------
    callable
        The decorator.
    """

    def register(function: Callable[[Context], None]) -> Callable[[Context], None]:
        name = function.__name__.replace("_", " ")
        _checks[name] = Check(name, topic, function, every_dtype)
        return function

    return register


def registered() -> tuple[Check, ...]:
    """Return every check, in the order of their definition."""
    return tuple(_checks.values())


def pairs(checks: Iterable[Check], contexts: Sequence[Context]) -> list[tuple[Check, Context]]:
    """List what is to be run: checks that say nothing new for each dtype run with the first.

    Parameters
    ----------
    checks : iterable of Check
        Which.
    contexts : sequence of Context
        One per dtype.

    Returns
    -------
    list of (Check, Context)
    """
    return [(c, x) for c in checks for x in (contexts if c.every_dtype else contexts[:1])]
