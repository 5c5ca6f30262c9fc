"""Classifiers that read labels off a frozen representation.

All but the cosine kNN z-score each coordinate on the fitted cells first.

Shapes: C fitted cells, Q predicted cells, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tftrain.evals.extra import need

Probe = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def logistic(fit_CD: np.ndarray, label_C: np.ndarray, predict_QD: np.ndarray) -> np.ndarray:
    """Labels (Q) by scikit-learn's logistic regression, C = 1, up to 1000 iterations. Deterministic."""
    linear = need("sklearn.linear_model")
    return _scaled(linear.LogisticRegression(max_iter=1000), fit_CD, label_C, predict_QD)


def knn5(fit_CD: np.ndarray, label_C: np.ndarray, predict_QD: np.ndarray) -> np.ndarray:
    """Labels (Q) by the majority of the 5 nearest fitted cells (Euclidean), fewer where fewer cells are fitted."""
    neighbors = need("sklearn.neighbors")
    return _scaled(neighbors.KNeighborsClassifier(min(5, len(label_C))), fit_CD, label_C, predict_QD)


def knn5_cosine(fit_CD: np.ndarray, label_C: np.ndarray, predict_QD: np.ndarray) -> np.ndarray:
    """Labels (Q) by the majority of the 5 fitted cells of greatest cosine, coordinates as they are."""
    neighbors = need("sklearn.neighbors")
    classifier = neighbors.KNeighborsClassifier(min(5, len(label_C)), metric="cosine")
    return classifier.fit(fit_CD, label_C.astype(str)).predict(predict_QD)


def balanced(fit_CD: np.ndarray, label_C: np.ndarray, predict_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sorted classes (K) and their probabilities (Q, K) by logistic regression whose classes weigh the same."""
    scaler = need("sklearn.preprocessing").StandardScaler().fit(fit_CD)
    model = need("sklearn.linear_model").LogisticRegression(max_iter=1000, class_weight="balanced")
    model.fit(scaler.transform(fit_CD), label_C.astype(str))
    return model.classes_, model.predict_proba(scaler.transform(predict_QD))


def _scaled(classifier, fit_CD: np.ndarray, label_C: np.ndarray, predict_QD: np.ndarray) -> np.ndarray:
    if len(np.unique(label_C.astype(str))) == 1:
        # A fold whose fitted cells are all of one class: there is nothing to tell apart.
        return np.full(len(predict_QD), label_C.astype(str)[0])
    scaler = need("sklearn.preprocessing").StandardScaler().fit(fit_CD)
    classifier.fit(scaler.transform(fit_CD), label_C.astype(str))
    return classifier.predict(scaler.transform(predict_QD))


PROBES: dict[str, Probe] = {"logistic": logistic, "knn5": knn5, "knn5_cosine": knn5_cosine}
