"""Properties that hold for all scores, by Hypothesis, on every library."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mml_arrayapi import multi_margin_loss, multi_margin_loss_and_grad
from tests.reference import loss_and_grad as reference

scores_like = st.floats(-100, 100, width=32)


@st.composite
def problems(draw):
    n, c = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    scores = draw(hnp.arrays(np.float32, (n, c), elements=scores_like))
    target = draw(hnp.arrays(np.int32, n, elements=st.integers(0, c - 1)))
    p = draw(st.sampled_from([1, 2, 3, 1.5]))
    margin = draw(st.floats(-2, 2, width=16))
    weight = draw(st.none() | hnp.arrays(np.float32, c, elements=st.floats(-3, 3, width=16)))
    return scores, target, {"p": p, "margin": margin, "weight": weight}


def run(lib, scores, target, options, **more):
    options = options | more
    if options["weight"] is not None:
        options["weight"] = lib.array(options["weight"])
    loss, grad = multi_margin_loss_and_grad(lib.array(scores), lib.array(target), **options)
    return lib.numpy(loss).astype(np.float64), lib.numpy(grad).astype(np.float64)


def scale(scores, options):
    """The size of what is added and subtracted; errors are a few eps of it."""
    size = 2 * np.abs(scores).max(initial=0) + abs(options["margin"])
    weight = options["weight"]
    factor = 1 if weight is None else np.abs(weight).max()
    return max(factor, 1e-3) * max(size, 1) ** options["p"] * options["p"]


EXAMPLES = {"numpy": 100, "torch": 50, "jax": 15, "dask": 8, "array_api_strict": 30, "cupy": 30}


def on(lib, check):
    settings(max_examples=EXAMPLES[lib.name], deadline=None)(given(problems())(check))()


def test_agrees_with_exact_arithmetic(lib):
    def check(problem):
        scores, target, options = problem
        expected, expected_grad = reference(scores, target, **options)
        loss, grad = run(lib, scores, target, options)
        bound = 4e-7 * scale(scores, options)
        np.testing.assert_allclose(loss, expected, atol=bound, rtol=0)
        # Where z is within rounding of the kink, p = 1 has either slope; leave those samples out.
        z = (
            scores.astype(np.float64)
            - scores[np.arange(len(target)), target, None]
            + options["margin"]
        )
        sure = (np.abs(z) > 1e-4).all(axis=1) | (options["p"] > 1)
        np.testing.assert_allclose(grad[sure], expected_grad[sure], atol=bound * 10, rtol=0)

    on(lib, check)


def test_gradient_rows_sum_to_zero(lib):
    def check(problem):
        scores, target, options = problem
        _, grad = run(lib, scores, target, options, reduction="none")
        np.testing.assert_allclose(grad.sum(axis=1), 0, atol=2e-6 * scale(scores, options))

    on(lib, check)


def test_adding_a_constant_to_a_samples_scores_changes_nothing(lib):
    def check(problem):
        scores, target, options = problem
        whole = np.round(scores)  # so that the shift is exact
        loss, _ = run(lib, whole, target, options, reduction="none")
        shifted, _ = run(lib, whole + np.float32(64), target, options, reduction="none")
        np.testing.assert_array_equal(loss, shifted)

    on(lib, check)


def test_convex_in_the_scores(lib):
    def check(problem):
        scores, target, options = problem
        options = options | {
            "weight": None if options["weight"] is None else np.abs(options["weight"])
        }
        other = scores[::-1].copy()
        middle = (scores + other) / 2
        at = [run(lib, x, target, options, reduction="sum")[0] for x in (scores, other, middle)]
        assert at[2] <= (at[0] + at[1]) / 2 + 1e-6 * scale(scores, options) * len(target)

    on(lib, check)


def test_a_sample_depends_on_no_other(lib):
    def check(problem):
        scores, target, options = problem
        loss, grad = run(lib, scores, target, options, reduction="none")
        first, first_grad = run(lib, scores[:1], target[:1], options, reduction="none")
        # 2 ulp: with other array shapes, vector code for powers may round otherwise
        np.testing.assert_allclose(loss[0], first[0], rtol=3e-7)
        np.testing.assert_allclose(grad[0], first_grad[0], rtol=3e-7, atol=1e-30)

    on(lib, check)


def test_samples_may_be_evaluated_in_parts(lib):
    def check(problem):
        scores, target, options = problem
        whole, _ = run(lib, scores, target, options, reduction="sum")
        parts = [
            run(lib, scores[i : i + 2], target[i : i + 2], options, reduction="sum")[0]
            for i in range(0, len(target), 2)
        ]
        np.testing.assert_allclose(
            whole, np.sum(parts), atol=1e-6 * scale(scores, options) * len(target)
        )

    on(lib, check)


def test_negating_the_weight_negates_everything():
    @settings(max_examples=50, deadline=None)
    @given(problems())
    def check(problem):
        scores, target, options = problem
        weight = np.ones(scores.shape[1], np.float32)
        options = options | {"reduction": "none"}
        plus = multi_margin_loss(scores, target, **options | {"weight": weight})
        minus = multi_margin_loss(scores, target, **options | {"weight": -weight})
        np.testing.assert_array_equal(plus, -minus)

    check()
