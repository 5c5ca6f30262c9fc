"""Macro-F1 from confusion counts, its bootstrap interval and its chance level.

Everything is a sum over cells, so a bootstrap resamples confusion matrices (of donors, or of cells) and never
predicts again. Shapes: C cells, K classes, R resamples, M donors.
"""

from __future__ import annotations

import numpy as np

MIN_DONORS = 5
"""With fewer donors a donor bootstrap means nothing: cells are drawn instead, and the row says so."""


def confusion(truth_C: np.ndarray, predicted_C: np.ndarray, n_classes: int) -> np.ndarray:
    """int64 (K, K): cells by true (row) and predicted (column) class number."""
    return np.bincount(truth_C * n_classes + predicted_C, minlength=n_classes**2).reshape(n_classes, n_classes)


def macro_f1(confusion_KK: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur as truth or prediction, over the last two axes.

    Equals sklearn.metrics.f1_score(average="macro"): a class that is never predicted scores 0.
    """
    hits = np.diagonal(confusion_KK, axis1=-2, axis2=-1).astype(np.float64)
    both = confusion_KK.sum(-1) + confusion_KK.sum(-2)
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    return f1.sum(-1) / np.maximum((both > 0).sum(-1), 1)


def numbered(*columns: np.ndarray) -> tuple[np.ndarray, ...]:
    """The distinct strings of all columns, sorted, then each column as class numbers."""
    classes = np.unique(np.concatenate([column.astype(str) for column in columns]))
    return classes, *(np.searchsorted(classes, column.astype(str)) for column in columns)


def interval_f1(
    truth_C: np.ndarray, predicted_C: np.ndarray, donor_C: np.ndarray, *, bootstraps: int, seed: int
) -> tuple[float, float, str]:
    """95 % percentile bootstrap of macro-F1: (low, high, what was drawn: donors, or cells where donors are too few)."""
    rng = np.random.default_rng(seed)
    classes, truth, predicted = numbered(truth_C, predicted_C)
    donors, donor = numbered(donor_C)
    K, M, C = len(classes), len(donors), len(truth)
    if M >= MIN_DONORS:
        per_donor_MKK = np.bincount((donor * K + truth) * K + predicted, minlength=M * K * K).reshape(M, K, K)
        weight_RM = rng.multinomial(M, np.full(M, 1 / M), size=bootstraps)
        resampled_RKK = np.tensordot(weight_RM, per_donor_MKK, axes=1)
    else:
        share = confusion(truth, predicted, K).ravel() / C
        resampled_RKK = rng.multinomial(C, share, size=bootstraps).reshape(bootstraps, K, K)
    low, high = np.percentile(macro_f1(resampled_RKK), [2.5, 97.5])
    return float(low), float(high), "donors" if M >= MIN_DONORS else "cells"


def chance_f1(truth_C: np.ndarray, fit_label_C: np.ndarray, *, seed: int, draws: int = 200) -> float:
    """Mean macro-F1 of guesses drawn with the class shares of the fitted labels (sklearn's "stratified" dummy)."""
    classes, truth, fit = numbered(truth_C, fit_label_C)
    share = np.bincount(fit, minlength=len(classes)) / len(fit)
    rng = np.random.default_rng(seed)
    guesses = rng.choice(len(classes), size=(draws, len(truth)), p=share)
    return float(np.mean([macro_f1(confusion(truth, guess, len(classes))) for guess in guesses]))


def interval_ratio(top_B: np.ndarray, bottom_B: np.ndarray, *, bootstraps: int, seed: int) -> tuple[float, float]:
    """95 % percentile bootstrap over blocks of sum(top) / sum(bottom)."""
    rng = np.random.default_rng(seed)
    B = len(top_B)
    weight_RB = rng.multinomial(B, np.full(B, 1 / B), size=bootstraps)
    low, high = np.percentile((weight_RB @ top_B) / (weight_RB @ bottom_B), [2.5, 97.5])
    return float(low), float(high)
