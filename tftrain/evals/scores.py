"""Macro-F1 from confusion counts, its bootstrap interval and its chance level.

Everything is a sum over cells, so a bootstrap resamples confusion matrices (of donors, or of cells) and never
predicts again. Shapes: C cells, K classes, R resamples, M donors, U units drawn, J sets of predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    f1_1R, drawn = resampled_f1(truth_C, [predicted_C], donor_C, bootstraps=bootstraps, seed=seed)
    return *bounds(f1_1R[0]), drawn


def resampled_f1(
    truth_C: np.ndarray, predicted_JC: Sequence[np.ndarray], donor_C: np.ndarray, *, bootstraps: int, seed: int
) -> tuple[np.ndarray, str]:
    """Macro-F1 (J, R) of J sets of predictions for the same cells, and what was drawn: `donors`, or `cells` where
    donors are too few. Column r is of the same resample for all J, so their differences are paired."""
    rng = np.random.default_rng(seed)
    classes, truth, *predicted = numbered(truth_C, *predicted_JC)
    donors, donor = numbered(donor_C)
    K, M, C = len(classes), len(donors), len(truth)
    pair_JC = [truth * K + guess for guess in predicted]
    if M >= MIN_DONORS:
        unit_C, drawn = donor, "donors"
        weight_RU = rng.multinomial(M, np.full(M, 1 / M), size=bootstraps).astype(float)
    else:
        # Cells that all J predict alike are one unit, drawn as often as it has cells.
        _, unit_C, n_U = np.unique(np.stack(pair_JC), axis=1, return_inverse=True, return_counts=True)
        unit_C, drawn = unit_C.ravel(), "cells"
        weight_RU = rng.multinomial(C, n_U / C, size=bootstraps) / n_U
    U = weight_RU.shape[1]
    f1_JR = np.empty((len(pair_JC), bootstraps))
    for j, pair_C in enumerate(pair_JC):
        pairs, pair_C = np.unique(pair_C, return_inverse=True)
        per_unit_UP = np.bincount(unit_C * len(pairs) + pair_C, minlength=U * len(pairs)).reshape(U, len(pairs))
        confusion_RKK = np.zeros((bootstraps, K * K))
        confusion_RKK[:, pairs] = weight_RU @ per_unit_UP
        f1_JR[j] = macro_f1(confusion_RKK.reshape(bootstraps, K, K))
    return f1_JR, drawn


def drawn_units(donor_C: np.ndarray, *, bootstraps: int, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """A bootstrap of any figure: the unit of each cell (C), how often each unit is drawn (R, U), and what the units
    are: `donors`, or `cells` where donors are too few."""
    donors, donor_number_C = numbered(donor_C)
    is_enough = len(donors) >= MIN_DONORS
    unit_C = donor_number_C if is_enough else np.arange(len(donor_C))
    U = len(donors) if is_enough else len(donor_C)
    weight_RU = np.random.default_rng(seed).multinomial(U, np.full(U, 1 / U), size=bootstraps)
    return unit_C, weight_RU, "donors" if is_enough else "cells"


def bounds(sample_R: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of resampled values, those that are not finite left out."""
    low, high = np.percentile(sample_R[np.isfinite(sample_R)], [2.5, 97.5])
    return float(low), float(high)


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
    return bounds((weight_RB @ top_B) / (weight_RB @ bottom_B))
