"""A scorer for scikit-learn: the loss of an estimator's ``decision_function``.

Importing this module imports scikit-learn.
"""

from __future__ import annotations

from typing import Any, SupportsFloat

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.metadata_routing import UNUSED

from mml_arrayapi.accumulator import LossAccumulator
from mml_arrayapi.validation import shape_of

Array = Any


class MultiMarginScorer(BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """The negative multi-class hinge loss of an estimator, as ``scoring=`` takes it.

    Parameters
    ----------
    p : float, default 1
        The exponent, a finite real number >= 1.
    margin : float, default 1.0
        Any finite real number.
    weight : array, shape (C,), real floating, optional
        One factor per class, in the order of the estimator's ``classes_``.

    Notes
    -----
    Greater is better, as for every scorer, so the score is minus the mean loss. Labels of any type
    are taken for their position in ``classes_``: a fold that lacks a class is scored correctly. For
    two classes, the ``decision_function`` of scikit-learn has one column; the first class then has
    the score 0, and the loss is half of the ordinary hinge loss (the sum is divided by C = 2). An
    ``SVC`` must have ``decision_function_shape="ovr"``, its default.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.model_selection import cross_val_score
    >>> from sklearn.svm import LinearSVC
    >>> from mml_arrayapi.sklearn import MultiMarginScorer
    >>> X, y = load_iris(return_X_y=True)
    >>> scores = cross_val_score(LinearSVC(), X, y, scoring=MultiMarginScorer())
    >>> scores.shape, bool((scores <= 0).all())
    ((5,), True)
    """

    # Metadata routing takes every parameter of score but X and y for metadata.
    __metadata_request__score = {"estimator": UNUSED}  # noqa: RUF012 (scikit-learn reads it)

    def __init__(
        self, *, p: SupportsFloat = 1, margin: SupportsFloat = 1.0, weight: Array | None = None
    ) -> None:
        self.p, self.margin, self.weight = p, margin, weight

    def score(self, estimator: Any, X: Any, y: Any, sample_weight: Array | None = None) -> float:
        """Return minus the mean loss of an estimator's scores; so does calling the scorer.

        Parameters
        ----------
        estimator : estimator
            A fitted classifier with ``decision_function`` and ``classes_``.
        X : array-like, shape (N, features)
            The samples.
        y : array-like, shape (N,)
            Their labels.
        sample_weight : array-like, shape (N,), optional
            A factor for each sample; the mean is divided by their sum. Under scikit-learn's
            metadata routing, ask for it with ``set_score_request(sample_weight=True)``.

        Returns
        -------
        float

        Raises
        ------
        ValueError
            A label is none of ``classes_``, or there is not one of them for each sample and one
            score for each class.
        """
        classes = np.asarray(estimator.classes_)
        shape = getattr(_innermost(estimator), "decision_function_shape", "ovr")
        if shape != "ovr" and len(classes) > 2:  # of three there are three pairs
            raise ValueError(
                f"the estimator must have decision_function_shape='ovr', one score for each class, "
                f"but has {shape!r}"
            )
        scores = _plain("decision_function's result", estimator.decision_function(X))
        target = _encoded(_plain("y", y), classes)
        if target.shape != scores.shape[:1]:
            raise ValueError(
                f"y must have one label for each sample, shape ({len(scores)},), but has shape "
                f"{target.shape}"
            )
        if scores.ndim == 1:
            scores = np.stack([np.zeros_like(scores), scores], axis=1)
        if scores.shape[1] != len(classes):
            raise ValueError(
                f"decision_function must give one score for each of the {len(classes)} "
                f"classes, but gives {scores.shape[1]} (an SVC must have "
                f"decision_function_shape='ovr')"
            )
        loss = LossAccumulator(p=self.p, margin=self.margin, weight=self.weight)
        if sample_weight is not None:
            sample_weight = _plain("sample_weight", sample_weight)
        loss.update(scores, target, sample_weight)
        return -loss.compute()

    __call__ = score

    def _accept_sample_weight(self) -> bool:
        return True  # searches with several metrics ask


def _innermost(estimator: Any) -> Any:
    """Return the classifier at the end of pipelines, within searches and other meta-estimators."""
    for name in ("best_estimator_", "estimator_", "final_estimator_"):
        if hasattr(estimator, name):
            return _innermost(getattr(estimator, name))
    steps = getattr(estimator, "steps", None)
    return _innermost(steps[-1][1]) if steps else estimator


def _plain(name: str, values: Any) -> Array:
    """Return what NumPy makes of an array-like, unless it is masked: np.asarray drops the mask."""
    array = np.asanyarray(values)
    shape_of(name, array)
    return np.asarray(array)


def _encoded(y: Array, classes: Array) -> Array:
    """Return the positions of labels in ``classes``."""
    try:
        order = np.argsort(classes)
        place = order[np.minimum(np.searchsorted(classes, y, sorter=order), len(classes) - 1)]
    except TypeError as error:  # None, or text beside numbers
        raise ValueError(
            f"y must hold labels such as the estimator's classes ({_shown(classes)}), but has some "
            f"that cannot be compared with them: {error}"
        ) from error
    strange = classes[place] != y
    if strange.any():
        raise ValueError(
            f"y holds the label {y[strange][0]!r}, which is none of the estimator's classes: "
            f"{_shown(classes)}"
        )
    return place


def _shown(classes: Array) -> str:
    return ", ".join(map(repr, classes.tolist()))
