"""The scorer with scikit-learn itself."""

# ruff: noqa: E402 - the libraries may be missing

import re

import numpy as np
import pytest

sklearn = pytest.importorskip("sklearn")
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.ensemble import StackingClassifier
from sklearn.feature_selection import RFE
from sklearn.linear_model import RidgeClassifier
from sklearn.metrics import hinge_loss
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from mml_arrayapi import multi_margin_loss
from mml_arrayapi.sklearn import MultiMarginScorer

X, Y = load_iris(return_X_y=True)
NAMES = np.asarray(["setosa", "versicolor", "virginica"])
LABELS = {
    "integers": Y,
    "other integers": Y * 10 - 3,
    "strings": NAMES[Y],
    "objects": NAMES[Y].astype(object),
}


def expected(estimator, rows, sample_weight=None, **options):
    """Minus the mean of the losses, by the public function and NumPy."""
    scores = estimator.decision_function(X[rows])
    losses = multi_margin_loss(scores, Y[rows], reduction="none", **options)
    return -np.average(losses, weights=sample_weight)


@pytest.mark.parametrize("labels", LABELS.values(), ids=list(LABELS))
def test_cross_val_score(labels):
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    got = cross_val_score(
        RidgeClassifier(), X, labels, cv=folds, scoring=MultiMarginScorer(p=2, margin=0.5)
    )
    want = [
        expected(RidgeClassifier().fit(X[train], Y[train]), test, p=2, margin=0.5)
        for train, test in folds
    ]
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_a_fold_without_a_class_is_scored_by_the_estimators_classes():
    train, test = np.arange(0, 150, 2), np.arange(1, 100, 2)  # no virginica
    got = cross_val_score(
        RidgeClassifier(), X, NAMES[Y], cv=[(train, test)], scoring=MultiMarginScorer()
    )
    np.testing.assert_allclose(got, expected(RidgeClassifier().fit(X[train], Y[train]), test))


def test_grid_search_takes_the_smallest_loss():
    grid = {"ridgeclassifier__alpha": [0.01, 1e4]}
    model = make_pipeline(StandardScaler(), RidgeClassifier())
    search = GridSearchCV(model, grid, scoring=MultiMarginScorer(), cv=3).fit(X, NAMES[Y])
    means = search.cv_results_["mean_test_score"]
    assert search.best_params_ == {"ridgeclassifier__alpha": 0.01}
    assert means[0] == search.best_score_ > means[1]
    assert means.max() < 0
    assert search.score(X, NAMES[Y]) == MultiMarginScorer()(search.best_estimator_, X, NAMES[Y])


def test_ovo_behind_a_stack_of_classifiers():
    """Of three classes there are as many pairs: the number of columns doesn't tell."""
    layers = [("first", RidgeClassifier())]
    for shape, fits in (("ovr", True), ("ovo", False)):
        stack = StackingClassifier(layers, final_estimator=SVC(decision_function_shape=shape))
        stack.fit(X, Y)
        if fits:
            assert MultiMarginScorer()(stack, X, Y) <= 0
            continue
        with pytest.raises(ValueError, match="decision_function"):
            MultiMarginScorer()(stack, X, Y)


def test_several_scorers():
    scorers = {"p=1": MultiMarginScorer(), "p=2": MultiMarginScorer(p=2), "hits": "accuracy"}
    got = cross_validate(RidgeClassifier(), X, Y, scoring=scorers)
    assert set(scorers) == {name.removeprefix("test_") for name in got if name.startswith("test_")}


def test_two_classes_are_half_of_the_hinge_loss():
    rows = Y < 2
    labels = NAMES[Y[rows]]
    estimator = LinearSVC(C=0.001).fit(X[rows], labels)
    want = hinge_loss(labels, estimator.decision_function(X[rows])) / 2
    assert want > 0.01
    np.testing.assert_allclose(MultiMarginScorer()(estimator, X[rows], labels), -want)


def test_class_weights():
    estimator = RidgeClassifier().fit(X, NAMES[Y])
    weight = np.asarray([1.0, 5.0, 0.5])
    want = expected(estimator, slice(None), weight=weight)
    np.testing.assert_allclose(MultiMarginScorer(weight=weight)(estimator, X, NAMES[Y]), want)


def test_sample_weights():
    estimator = RidgeClassifier().fit(X, Y)
    weights = np.arange(150) % 4
    got = MultiMarginScorer()(estimator, X, Y, sample_weight=weights.tolist())
    np.testing.assert_allclose(got, expected(estimator, slice(None), weights))


def test_sample_weights_beside_another_metric():
    """Where weights are not routed, scikit-learn gives them to each scorer that says so."""
    weights = np.arange(150.0) % 4
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    scoring = {"loss": MultiMarginScorer(), "accuracy": "accuracy"}
    search = GridSearchCV(
        RidgeClassifier(), {"alpha": [1.0]}, cv=folds, scoring=scoring, refit="loss"
    )
    search.fit(X, Y, sample_weight=weights)
    fitted = [RidgeClassifier().fit(X[a], Y[a], weights[a]) for a, _ in folds]
    weighted = [expected(one, b, weights[b]) for one, (_, b) in zip(fitted, folds, strict=True)]
    plain = [expected(one, b) for one, (_, b) in zip(fitted, folds, strict=True)]
    told = sklearn.__version__ >= "1.8"  # before, the weights were for fitting alone
    np.testing.assert_allclose(search.best_score_, np.mean(weighted if told else plain))


def test_masks_are_refused():
    estimator = RidgeClassifier().fit(X, Y)
    weights = np.ma.masked_less(np.arange(150.0), 3)
    scorer = MultiMarginScorer()
    with pytest.raises(TypeError, match=r"^sample_weight must be a dense array, but is a masked"):
        scorer(estimator, X, Y, sample_weight=weights)
    with pytest.raises(TypeError, match=r"^y must be a dense array, but is a masked"):
        scorer(estimator, X, np.ma.masked_equal(Y, 1))
    with pytest.raises(TypeError, match=r"^weight must be a dense array, but is a masked"):
        MultiMarginScorer(weight=np.ma.ones(3))(estimator, X, Y)


def test_sample_weights_are_routed():
    weights = np.arange(150.0) % 4
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    with sklearn.config_context(enable_metadata_routing=True):
        scorer = MultiMarginScorer().set_score_request(sample_weight=True)
        estimator = RidgeClassifier().set_fit_request(sample_weight=False)
        params = {"sample_weight": weights}
        got = cross_val_score(estimator, X, Y, cv=folds, scoring=scorer, params=params)
        search = GridSearchCV(estimator, {"alpha": [1.0]}, cv=folds, scoring=scorer)
        searched = search.fit(X, Y, sample_weight=weights).best_score_
    want = [expected(RidgeClassifier().fit(X[a], Y[a]), b, weights[b]) for a, b in folds]
    np.testing.assert_allclose(got, want)
    np.testing.assert_allclose(searched, np.mean(want))


def test_a_label_that_is_no_class():
    estimator = RidgeClassifier().fit(X[:100], NAMES[Y[:100]])
    with pytest.raises(
        ValueError, match=r"label .*'virginica'.*none .* classes: 'setosa', 'versic"
    ):
        MultiMarginScorer()(estimator, X, NAMES[Y])


@pytest.mark.parametrize("y", [Y[:5], Y[:, None]], ids=["short", "a column"])
def test_labels_of_another_shape(y):
    estimator = RidgeClassifier().fit(X, Y)
    told = rf"y must have one label for each sample, shape \(150,\), but has shape {re.escape(str(y.shape))}"
    with pytest.raises(ValueError, match=told):
        MultiMarginScorer()(estimator, X, y)


def test_scores_of_pairs_of_classes_are_refused():
    class Pairs(RidgeClassifier):
        def decision_function(self, X):
            return np.zeros((len(X), 6))

    labels = np.arange(150) % 4
    with pytest.raises(ValueError, match=r"each of the 4 classes, but gives 6 .*ovr"):
        MultiMarginScorer()(Pairs().fit(X, labels), X, labels)


def test_bad_parameters():
    estimator = RidgeClassifier().fit(X, Y)
    with pytest.raises(ValueError, match="p must be"):
        MultiMarginScorer(p=0)(estimator, X, Y)


def test_it_is_cloned_and_shown_like_an_estimator():
    copy = clone(MultiMarginScorer(p=2, margin=0.5))
    assert repr(copy) == "MultiMarginScorer(margin=0.5, p=2)"


@pytest.mark.parametrize("within", ["itself", "pipeline", "search"])
def test_three_pairs_are_not_three_classes(within):
    estimator = SVC(decision_function_shape="ovo")
    if within != "itself":
        estimator = make_pipeline(StandardScaler(), estimator)
    if within == "search":
        estimator = GridSearchCV(estimator, {"svc__C": [1.0]}, cv=2)
    with pytest.raises(ValueError, match=r"must have decision_function_shape='ovr'.* has 'ovo'"):
        MultiMarginScorer()(estimator.fit(X, Y), X, Y)


def test_labels_that_cannot_be_compared():
    estimator = RidgeClassifier().fit(X, NAMES[Y])
    with pytest.raises(ValueError, match=r"'setosa', .* cannot be compared"):
        MultiMarginScorer()(estimator, X, np.full(150, None))


@pytest.mark.parametrize("kind", [list, np.asarray])
@pytest.mark.parametrize("classes", ["abc", "bac", "cba"])
def test_classes_in_any_order_and_as_a_list(classes, kind):
    class Fitted:
        classes_ = kind(list(classes))

        def decision_function(self, X):
            return X

    scores = np.asarray([[3.0, 1, 0], [0, 0.5, 0]])
    target = [classes.index(label) for label in "ab"]
    wanted = -multi_margin_loss(scores, np.asarray(target))
    made = MultiMarginScorer()(Fitted(), scores, np.asarray(["a", "b"]))
    assert made == pytest.approx(wanted)


def test_pairs_of_two_classes_are_one_score():
    few = Y < 2
    estimator = SVC(decision_function_shape="ovo").fit(X[few], Y[few])
    other = SVC(decision_function_shape="ovr").fit(X[few], Y[few])
    assert MultiMarginScorer()(estimator, X[few], Y[few]) == MultiMarginScorer()(
        other, X[few], Y[few]
    )


def test_pairs_within_a_meta_estimator():
    estimator = RFE(SVC(kernel="linear", decision_function_shape="ovo")).fit(X, Y)
    with pytest.raises(ValueError, match=r"must have decision_function_shape='ovr'"):
        MultiMarginScorer()(estimator, X, Y)
