"""Can a condition (a disease, a treatment) be read off a cell of a donor whom the classifier has not met?

Protocol: within a data set, cells whose column `evaluate.condition` is not empty; StandardScaler, then logistic
regression with balanced class weights (which side a donor is on must not follow from how many the folds left on it);
up to five folds that keep a donor's cells together. Headlines: macro-F1 of the pooled out-of-fold predictions, and
AUROC within each cell type of the same classifier's out-of-fold probabilities (one against the rest, mean of
conditions), of cell types with at least MIN_CELLS cells of two conditions; then their mean. Intervals draw donors.
Conditions with a single donor can be told from others by what is the donor's alone: a note names them.

Shapes: C cells, K conditions, U units drawn, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from tftrain.evals import paired, probes, scores
from tftrain.evals.celltypes import donor_folds
from tftrain.evals.contract import Bench, Dataset, Findings

NAME = "condition"
MIN_CELLS = 10
MEAN = "mean of cell types"


def run(bench: Bench) -> Findings:
    """Rows of every data set that has at least two conditions of two donors each."""
    findings = Findings([])
    for dataset in bench.datasets:
        kept_C = _kept(dataset, findings.notes)
        if len(kept_C):
            _judge(bench, dataset, kept_C, findings)
    return findings


def _kept(dataset: Dataset, notes: list[str]) -> np.ndarray:
    """The cells whose condition has at least MIN_CELLS cells of two donors; none, and a note, where fewer than two
    conditions are left."""
    if dataset.condition_C is None:
        notes.append(f"{NAME}: {dataset.name} left out: no column of conditions")
        return np.zeros(0, np.int64)
    condition_C, donor_C = dataset.condition_C.astype(str), dataset.donor_C.astype(str)
    kept, dropped = [], []
    for name in np.unique(condition_C):
        is_name_C = condition_C == name
        n_cells, n_donors = int(is_name_C.sum()), len(np.unique(donor_C[is_name_C]))
        if name and n_cells >= MIN_CELLS and n_donors >= 2:
            kept.append(name)
        else:
            dropped.append(f"{name or '(none)'}: {n_cells} cells of {n_donors} donors")
    if dropped:
        notes.append(f"{NAME}: {dataset.name}: left out: {', '.join(dropped)}; it takes {MIN_CELLS} cells of 2 donors")
    if len(kept) < 2:
        notes.append(f"{NAME}: {dataset.name} left out: {len(kept)} conditions; it takes 2")
        return np.zeros(0, np.int64)
    return np.flatnonzero(np.isin(condition_C, kept))


def _judge(bench: Bench, dataset: Dataset, kept_C: np.ndarray, findings: Findings) -> None:
    """Appends the rows of every representation."""
    assert dataset.condition_C is not None
    truth_C, donor_C = dataset.condition_C[kept_C].astype(str), dataset.donor_C[kept_C].astype(str)
    classes = np.unique(truth_C)
    folds = donor_folds(truth_C, donor_C)
    fold_C = np.zeros(len(kept_C), np.int64)
    predicted, probability = {}, {}
    for model, of_dataset in bench.embeddings.items():
        x_CD = of_dataset[dataset.name][kept_C]
        p_CK = np.zeros((len(kept_C), len(classes)))
        for fold, (fit, query) in enumerate(folds):
            fold_C[query] = fold
            if len(np.unique(truth_C[fit])) < 2:
                p_CK[query, np.searchsorted(classes, truth_C[fit][0])] = 1.0
                continue
            known, p_QK = probes.balanced(x_CD[fit], truth_C[fit], x_CD[query])
            p_CK[np.ix_(query, np.searchsorted(classes, known))] = p_QK
        predicted[model], probability[model] = classes[p_CK.argmax(1)], p_CK
    # Guesses of a balanced classifier are drawn from all conditions alike.
    chance = scores.chance_f1(truth_C, classes, seed=bench.seed)
    paired.classified(
        bench,
        findings,
        NAME,
        dataset.name,
        "logistic",
        predicted,
        truth_C=truth_C,
        donor_C=donor_C,
        cell_C=dataset.cells.joinid_C[kept_C],
        fold_C=fold_C,
        chance=chance,
    )
    _by_cell_type(bench, dataset, kept_C, truth_C, donor_C, probability, findings)


def _by_cell_type(
    bench: Bench,
    dataset: Dataset,
    kept_C: np.ndarray,
    truth_C: np.ndarray,
    donor_C: np.ndarray,
    probability: Mapping[str, np.ndarray],
    findings: Findings,
) -> None:
    """Appends AUROC of every cell type that has enough cells of two conditions, and the mean over them."""
    label_C, classes = dataset.label_C[kept_C].astype(str), np.unique(truth_C)
    unit_C, weight_RU, drawn = scores.drawn_units(donor_C, bootstraps=bench.bootstraps, seed=bench.seed)
    values: dict[str, list[float]] = {model: [] for model in probability}
    samples: dict[str, list[np.ndarray]] = {model: [] for model in probability}
    n_judged = 0
    for label in np.unique(label_C):
        at_C = np.flatnonzero(label_C == label)
        if label == "" or sum((truth_C[at_C] == name).sum() >= MIN_CELLS for name in classes) < 2:
            continue
        n_judged += len(at_C)
        value, sample_R = {}, {}
        for model, p_CK in probability.items():
            value[model], sample_R[model] = auroc(p_CK[at_C], truth_C[at_C], classes, unit_C[at_C], weight_RU)
            values[model].append(value[model])
            samples[model].append(sample_R[model])
        findings.rows.extend(
            paired.rows(NAME, dataset.name, "auroc", label, value, sample_R, n=len(at_C), chance=0.5, resampled=drawn)
        )
    if not n_judged:
        findings.notes.append(f"{NAME}: {dataset.name}: no cell type has {MIN_CELLS} cells of two conditions: no AUROC")
        return
    means = {model: float(np.mean(of)) for model, of in values.items()}
    # A resample in which a cell type has one condition alone says nothing of that type.
    n_R = np.isfinite(next(iter(samples.values()))).sum(0)
    means_R = {
        model: np.divide(np.nansum(of, axis=0), n_R, out=np.full(len(n_R), np.nan), where=n_R > 0)
        for model, of in samples.items()
    }
    findings.rows.extend(
        paired.rows(NAME, dataset.name, "auroc", MEAN, means, means_R, n=n_judged, chance=0.5, resampled=drawn)
    )


def auroc(
    p_CK: np.ndarray, truth_C: np.ndarray, classes: np.ndarray, unit_C: np.ndarray, weight_RU: np.ndarray
) -> tuple[float, np.ndarray]:
    """Mean over the conditions that occur of the area under the curve of one against the rest, and its resamples (R);
    ties count a half."""
    units, unit_C = np.unique(unit_C, return_inverse=True)
    weight_RU = weight_RU[:, units].astype(float)
    value, sample_R = [], []
    for k, name in enumerate(classes):
        is_it_C = truth_C == name
        if is_it_C.all() or not is_it_C.any():
            continue
        won_PN = _won(p_CK[is_it_C, k], p_CK[~is_it_C, k])
        value.append(won_PN.mean())
        # Sums over pairs of units, so that a resample is two small products.
        of_P, of_N = (np.eye(len(units))[unit_C[rows]] for rows in (is_it_C, ~is_it_C))
        won_UU = of_P.T @ won_PN @ of_N
        pairs_UU = np.outer(of_P.sum(0), of_N.sum(0))
        won_R, pairs_R = (((weight_RU @ of_UU) * weight_RU).sum(1) for of_UU in (won_UU, pairs_UU))
        sample_R.append(np.divide(won_R, pairs_R, out=np.full(len(won_R), np.nan), where=pairs_R > 0))
    return float(np.mean(value)), np.mean(sample_R, axis=0)


def _won(above_P: np.ndarray, below_N: np.ndarray) -> np.ndarray:
    """(P, N): 1 where the first is greater, 1/2 where they are equal."""
    return (above_P[:, None] > below_N) + 0.5 * (above_P[:, None] == below_N)
