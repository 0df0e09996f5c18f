"""Tests of the conformance checks: what is broken on purpose is found by the check that claims it."""

import dataclasses
import itertools
import re
from random import Random

import pytest

from mml_arrayapi import Kernel, LossAccumulator, accumulator, registry
from mml_arrayapi.conformance import Context, all_checks, checks_combinations
from mml_arrayapi.conformance.covering import covering
from mml_arrayapi.conformance.suite import FAIL, MISSING, NOT_RUN, PASS, UNSUPPORTED
from tests.conformance.broken import combinations, kernels, libraries
from tests.conformance.broken.arrays import Array

CHECKS = {check.name: check for check in all_checks()}
LIBRARY = libraries.SOUND.__name__


@pytest.fixture
def registered():
    """Register kernels for one test only."""
    with registry.isolated(built_in_kernels=True):
        yield registry.register_kernel


def outcome(name, xp, dtype="float32", **keywords):
    return CHECKS[name](Context(xp, dtype=dtype, **keywords))


def library_for(check):
    return libraries.READABLE if check.startswith("accumulators") else libraries.SOUND


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.parametrize("kernel", ["generic", "plain"])
def test_nothing_is_found_where_nothing_is_wrong(name, kernel, registered):
    if kernel == "plain":
        registered(kernels.kernel("", LIBRARY))
    backend = kernels.name_of("") if kernel == "plain" else "generic"
    xp = library_for(name)
    for dtype in ("float32", "float64", "float16") if CHECKS[name].every_dtype else ("float32",):
        result = outcome(name, xp, dtype, backend=backend)
        assert result.state in (PASS, NOT_RUN), result.reason


@pytest.mark.parametrize(
    ("fault", "claim"), combinations.CLAIMS.items(), ids=list(combinations.CLAIMS)
)
def test_broken_kernels_are_found(fault, claim, registered):
    module = combinations if fault in combinations.FAULTS else kernels
    registered(module.kernel(fault, LIBRARY))
    name, dtype = claim
    result = outcome(name, libraries.SOUND, dtype, backend=kernels.name_of(fault))
    assert result.state == FAIL, f"{fault}: {result}"
    assert result.reason
    assert "mml.multi_margin_loss" in result.snippet
    assert f"--check '{name}'" in result.command


@pytest.mark.parametrize(
    ("xp", "claim"),
    libraries.LIBRARIES.items(),
    ids=[xp.__name__ for xp in libraries.LIBRARIES],
)
def test_broken_libraries_are_found(xp, claim):
    name, dtype = claim
    result = outcome(name, xp, dtype)
    assert result.state == FAIL, result


def test_every_check_that_judges_numbers_finds_something():
    """Only checks of our own argument checking, and of two libraries, have no broken partner."""
    claimed = {name for name, _ in (*combinations.CLAIMS.values(), *libraries.LIBRARIES.values())}
    left = {name for name in CHECKS if name not in claimed}
    assert left == {
        # argument checks run before any kernel
        "no classes is an error",
        "lengths that differ are an error",
        "faults raise and name what is accepted",
        "faults are found in the documented order",
        "numbers of other kinds are refused",
        "scores must be real floating",
        "targets must be integers",
        "libraries are not mixed",
        "grad output is checked",
        # a kernel gets these in the usual shape already
        "one sample may be spelled in several ways",
        "input without axes is one class",
        # each has a test below
        "valid targets pass in every mode",
        "nothing is computed before it is asked for",
        "libraries agree with each other",
        "chunks of ignored samples cost nothing",
        "accumulators leave ignored samples out",
    }


def test_a_lazy_library_is_not_looked_at(registered):
    name = "nothing is computed before it is asked for"
    assert outcome(name, libraries.LAZY).state == PASS

    def peek(problem):
        return registry.GENERIC.loss(problem._replace(input=_same(problem.input)))

    def _same(array):
        array.compute()
        return array

    registered(Kernel("peeks", "lazy", lambda _: None, peek, registry.GENERIC.loss_and_grad))
    result = outcome(name, libraries.LAZY, backend="peeks")
    assert result.state == FAIL
    assert "compute" in result.reason


def test_libraries_that_disagree(registered):
    fault = "differs from the generic code"
    registered(kernels.kernel(fault, LIBRARY))
    other = Context("numpy")
    name = "libraries agree with each other"
    good = outcome(name, libraries.SOUND, backend="generic", other=other)
    bad = outcome(name, libraries.SOUND, backend=kernels.name_of(fault), other=other)
    assert (good.state, bad.state) == (PASS, FAIL)
    assert outcome(name, libraries.SOUND).reason == "give a second --xp to compare with"


def test_a_mean_of_the_chunks_means_is_found(registered):
    pytest.importorskip("dask.array", reason="Dask is not installed")

    def loss(problem):
        if problem.reduction != "mean":
            return registry.GENERIC.loss(problem)
        parts = [slice(i, i + 2) for i in range(0, problem.target.shape[0], 2)]
        means = [
            registry.GENERIC.loss(
                problem._replace(input=problem.input[part], target=problem.target[part])
            )
            for part in parts
        ]
        return problem.xp.nanmean(problem.xp.stack(means))

    def loss_and_grad(problem, grad_output):
        return loss(problem), registry.GENERIC.loss_and_grad(problem, grad_output)[1]

    features = frozenset({"ignore_index"})
    registered(
        Kernel("mean-of-means", "dask", lambda _: None, loss, loss_and_grad, supports=features)
    )
    name = "chunks of ignored samples cost nothing"
    assert outcome(name, "dask").state == PASS
    result = outcome(name, "dask", backend="mean-of-means")
    assert (result.state, result.reason[:8]) == (FAIL, "p=1, chu")
    assert ".rechunk((2, 9))" in result.snippet
    assert outcome(name, libraries.SOUND).reason == "arrays of sound have no chunks"


class _CountsAll(LossAccumulator):
    count = 6


class _AveragesAll(LossAccumulator):
    def compute(self, reduction="mean"):
        return super().compute(reduction) / (2 if reduction == "mean" else 1)


class _AddsIgnored(LossAccumulator):
    def compute(self, reduction="mean"):
        return super().compute(reduction) + (1 if reduction == "sum" else 0)


@pytest.mark.parametrize("broken", [_CountsAll, _AveragesAll, _AddsIgnored])
def test_accumulators_that_take_ignored_samples_in(broken, monkeypatch):
    name = "accumulators leave ignored samples out"
    assert outcome(name, "numpy").state == PASS
    monkeypatch.setattr("mml_arrayapi.LossAccumulator", broken)
    assert outcome(name, "numpy").state == FAIL


def test_accumulators_run_the_kernel_that_is_asked_for(registered):
    fault = "differs from the generic code"
    registered(kernels.kernel(fault, LIBRARY))
    name = "accumulators leave ignored samples out"
    assert outcome(name, libraries.READABLE, backend="generic").state == PASS
    assert outcome(name, libraries.READABLE, backend=kernels.name_of(fault)).state == FAIL


def test_modes_that_give_different_losses(registered):
    def loss(problem):
        value = registry.GENERIC.loss(problem)
        return value + 1 if problem.check_target == "nan" else value

    registered(Kernel("moody", LIBRARY, lambda _: None, loss, registry.GENERIC.loss_and_grad))
    assert outcome("valid targets pass in every mode", libraries.SOUND, backend="moody").failed


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("one sample may be spelled in several ways", lambda shape: (*shape, 1)),
        ("input without axes is one class", lambda shape: (*shape, 1)),
    ],
)
def test_spellings_with_another_shape(name, change, monkeypatch):
    original = Context.loss_and_grad

    def reshaped(self, input, target, **keywords):
        loss, grad = original(self, input, target, **keywords)
        return self.xp.reshape(loss, change(loss.shape)), grad

    monkeypatch.setattr(Context, "loss_and_grad", reshaped)
    assert outcome(name, "numpy").failed


@pytest.mark.parametrize(
    "name",
    [
        "no classes is an error",
        "lengths that differ are an error",
        "faults raise and name what is accepted",
        "faults are found in the documented order",
        "numbers of other kinds are refused",
        "scores must be real floating",
        "targets must be integers",
        "libraries are not mixed",
        "grad output is checked",
    ],
)
def test_arguments_that_are_not_checked(name, monkeypatch):
    def accepts_everything(self, *args, **keywords):
        one = self.xp.asarray(1.0)
        return one, one

    monkeypatch.setattr(Context, "loss", accepts_everything)
    monkeypatch.setattr(Context, "loss_and_grad", accepts_everything)
    result = outcome(name, "numpy")
    assert result.state == FAIL
    assert "expected" in result.reason


def test_checks_in_another_order(monkeypatch):
    from mml_arrayapi import validation

    original = validation.check_options

    def p_first(options):
        if options[0] < 1:
            raise ValueError("p must be >= 1, but is 0.5")
        return original(options)

    monkeypatch.setattr(validation, "check_options", p_first)
    result = outcome("faults are found in the documented order", "numpy")
    assert result.failed
    assert "reduction comes first" in result.reason


def test_a_missing_function_is_named_and_not_passed():
    result = outcome("golden vectors agree", libraries.WITHOUT_ISNAN)
    assert result.state == MISSING
    assert result.reason == "without_isnan has no function isnan"


def test_arrays_that_cannot_be_exported_are_missing_something(monkeypatch):
    def no_export(*arrays):
        raise BufferError("no export")

    monkeypatch.setattr(accumulator, "to_numpy", no_export)
    result = outcome("accumulators leave ignored samples out", "numpy")
    assert result.state == MISSING
    assert result.reason.startswith("raised BufferError: no export (at ")


def test_a_missing_dtype_is_not_passed():
    result = outcome("golden vectors agree", libraries.SOUND, "bfloat16")
    assert (result.state, result.reason) == (UNSUPPORTED, "sound has no bfloat16 here")


@pytest.mark.parametrize("name", CHECKS)
def test_a_kernel_that_refuses_is_not_run(name, registered):
    plain = kernels.kernel("", LIBRARY)
    refusing = Kernel(
        "refuses", LIBRARY, lambda _: "only on Sundays", plain.loss, plain.loss_and_grad
    )
    registered(refusing)
    result = outcome(name, library_for(name), backend="refuses")
    assert result.state in (PASS, NOT_RUN), result.reason
    if name in ("golden vectors agree", "check target raise raises"):
        assert result.state == NOT_RUN
        assert "only on Sundays" in result.reason


def test_a_kernel_that_refuses_some_calls_is_found_to_be_wrong_in_others(registered):
    fault = "reverses the weights along another axis"
    broken = combinations.kernel(fault, LIBRARY)
    name, refuses = combinations.TWO[0], lambda problem: "no" if problem.p == 1.5 else None
    registered(dataclasses.replace(broken, refuses=refuses))
    assert outcome(name, libraries.SOUND, backend=broken.name).state == FAIL


def test_a_shorter_way_that_is_wrong_is_found(registered):
    def direct(input, target, weight, options):
        return libraries.SOUND.asarray(0.5) if options[0] == 2 and weight is not None else None

    sound = kernels.kernel("", LIBRARY)
    registered(dataclasses.replace(sound, direct={Array: direct}))
    result = outcome(combinations.TWO[0], libraries.SOUND, backend=sound.name)
    assert result.state == FAIL
    assert "backend=None" in result.snippet


def test_three_options_are_not_walked_where_it_takes_long(monkeypatch):
    monkeypatch.setattr(checks_combinations, "_PATIENCE", 0.0)
    result = outcome(combinations.THREE[0], libraries.SOUND)
    assert result.state == NOT_RUN
    assert re.fullmatch(r"\d+ cases would take \d+ seconds", result.reason)


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_all_values_of_so_many_options_meet(strength):
    values = {"a": (1, 2, 3), "b": "xyz", "c": (True, False), "d": (0.5, None, None), "e": "no"}
    hiding = {("a", 3), ("d", None)}
    cases = [set(case.items()) for case in covering(values, hiding, strength, Random(0))]
    for options in itertools.combinations(values, strength):
        for met in itertools.product(*(values[option] for option in options)):
            wanted = set(zip(options, met, strict=True))
            assert any(wanted <= case and case & hiding <= wanted for case in cases)


def test_a_missing_function_is_no_wrong_error():
    result = outcome("check target raise raises", libraries.WITHOUT_ANY)
    assert (result.state, result.reason) == (MISSING, "without_any has no function any")


def test_a_lazy_library_whose_arrays_compute_in_bool_is_not_computed():
    assert (
        outcome("nothing is computed before it is asked for", libraries.EAGER_TO_COMPUTE).state
        == PASS
    )
