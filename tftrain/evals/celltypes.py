"""Can cell types be read off a representation of cells whose donors the classifier has not seen?

Protocol: within a data set, StandardScaler, then logistic regression and kNN(5), five folds that keep a donor's cells
together (StratifiedGroupKFold), macro-F1. Classes under 10 cells are dropped and listed. The headline is the macro-F1
of the pooled out-of-fold predictions with a donor-bootstrap interval; every fold and the folds' mean stand beside it.
So does kNN(5) by cosine without scaling, and, under `by cell`, the same on folds that mix donors (StratifiedKFold of 5,
shuffled, seed 42), which published figures use: it asks an easier question.
"""

from __future__ import annotations

import numpy as np

from tftrain.evals import paired, scores
from tftrain.evals.contract import Bench, Dataset, Findings, Row
from tftrain.evals.extra import need
from tftrain.evals.probes import PROBES, Probe

NAME = "celltypes"
MIN_CELLS = 10
FOLDS = 5
BY_CELL = " by cell"


def run(bench: Bench) -> Findings:
    """Rows of every data set, representation and probe."""
    findings = Findings([])
    for dataset in bench.datasets:
        kept_C = kept_cells(dataset, findings.notes)
        n_donors, n_classes = len(np.unique(dataset.donor_C[kept_C])), len(np.unique(dataset.label_C[kept_C]))
        if n_donors < 2 or n_classes < 2:
            findings.notes.append(
                f"{NAME}: {dataset.name} left out: {n_classes} classes of {n_donors} donors; it takes 2 of each"
            )
            continue
        folds = donor_folds(dataset.label_C[kept_C], dataset.donor_C[kept_C])
        findings.notes.extend(lone_classes(NAME, dataset, dataset.label_C[kept_C].astype(str), folds))
        schemes = {"": folds} | ({BY_CELL: cell_folds(dataset.label_C[kept_C])} if bench.by_cell else {})
        for scheme, of_scheme in schemes.items():
            for variant, probe in PROBES.items():
                _judge(bench, dataset, kept_C, of_scheme, variant + scheme, probe, findings)
    return findings


def kept_cells(dataset: Dataset, notes: list[str]) -> np.ndarray:
    """int64: cells whose class has at least MIN_CELLS cells; a note lists the classes that are dropped."""
    classes, inverse_C, n_K = np.unique(dataset.label_C.astype(str), return_inverse=True, return_counts=True)
    is_kept_K = (n_K >= MIN_CELLS) & (classes != "")
    dropped = [f"{name or '(no label)'}: {n}" for name, n in zip(classes[~is_kept_K], n_K[~is_kept_K])]
    if dropped:
        notes.append(f"{dataset.name}: cells of classes left out: {', '.join(dropped)}")
    return np.flatnonzero(is_kept_K[inverse_C])


def donor_folds(label_C: np.ndarray, donor_C: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fitted, predicted) cell numbers of each fold: five, or one a donor where there are fewer."""
    splitter = need("sklearn.model_selection").StratifiedGroupKFold(min(FOLDS, len(np.unique(donor_C))))
    return list(splitter.split(np.zeros(len(label_C)), label_C.astype(str), donor_C.astype(str)))


def cell_folds(label_C: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(fitted, predicted) cell numbers of each of five folds that mix donors, as cz-benchmarks draws them."""
    splitter = need("sklearn.model_selection").StratifiedKFold(FOLDS, shuffle=True, random_state=42)
    return list(splitter.split(np.zeros(len(label_C)), label_C.astype(str)))


def lone_classes(
    task: str, dataset: Dataset, label_C: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    """A note where all cells of a class are predicted in one fold: no other fold can have learned it, so its F1 is 0
    whatever the representation."""
    lone = [
        name
        for name in np.unique(label_C)
        if any(name not in label_C[fitted] for fitted, predicted in folds if name in label_C[predicted])
    ]
    if not lone:
        return []
    return [
        f"{task}: {dataset.name}: classes of a single donor or fold, whose F1 is 0 for any model: {', '.join(lone)}"
    ]


def _judge(
    bench: Bench,
    dataset: Dataset,
    kept_C: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    variant: str,
    probe: Probe,
    findings: Findings,
) -> None:
    """Appends the rows and predictions of every representation under one probe."""
    label_C, pooled = dataset.label_C[kept_C].astype(str), {}
    fold_C = np.zeros(len(label_C), np.int64)
    chance = scores.chance_f1(label_C, label_C, seed=bench.seed)
    for model, of_dataset in bench.embeddings.items():
        embedding_CD = of_dataset[dataset.name][kept_C]
        predicted_C, values = label_C.copy(), []
        for fold, (fitted, predicted) in enumerate(folds):
            predicted_C[predicted] = probe(embedding_CD[fitted], label_C[fitted], embedding_CD[predicted])
            fold_C[predicted] = fold
            _, truth, guess = scores.numbered(label_C[predicted], predicted_C[predicted])
            values.append(float(scores.macro_f1(scores.confusion(truth, guess, 1 + max(truth.max(), guess.max())))))
            findings.rows.append(
                Row(model, dataset.name, NAME, "macro_f1", variant, values[-1], len(predicted), fold=fold)
            )
        pooled[model] = predicted_C
        mean = float(np.mean(values))
        findings.rows.append(Row(model, dataset.name, NAME, "macro_f1_fold_mean", variant, mean, len(label_C), chance))
    paired.classified(
        bench,
        findings,
        NAME,
        dataset.name,
        variant,
        pooled,
        truth_C=label_C,
        donor_C=dataset.donor_C[kept_C],
        cell_C=dataset.cells.joinid_C[kept_C],
        fold_C=fold_C,
        chance=chance,
    )
