"""Can cell types be read off a representation of cells whose donors the classifier has not seen?

Protocol: within a data set, StandardScaler, then logistic regression and kNN(5), five folds that keep a donor's cells
together (StratifiedGroupKFold), macro-F1. Classes under 10 cells are dropped and listed. The headline is the macro-F1
of the pooled out-of-fold predictions with a donor-bootstrap interval; every fold and the folds' mean stand beside it.
"""

from __future__ import annotations

import numpy as np

from tftrain.evals import scores
from tftrain.evals.contract import Bench, Dataset, Findings, Row
from tftrain.evals.extra import need
from tftrain.evals.probes import PROBES, Probe

NAME = "celltypes"
MIN_CELLS = 10
FOLDS = 5


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
        for model, of_dataset in bench.embeddings.items():
            for variant, probe in PROBES.items():
                _judge(bench, dataset, kept_C, folds, model, of_dataset[dataset.name][kept_C], variant, probe, findings)
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


def _judge(
    bench: Bench,
    dataset: Dataset,
    kept_C: np.ndarray,
    folds: list[tuple[np.ndarray, np.ndarray]],
    model: str,
    embedding_CD: np.ndarray,
    variant: str,
    probe: Probe,
    findings: Findings,
) -> None:
    """Appends the rows and predictions of one representation under one probe."""
    label_C, donor_C = dataset.label_C[kept_C].astype(str), dataset.donor_C[kept_C]
    predicted_C, fold_C, values = label_C.copy(), np.zeros(len(label_C), np.int64), []
    for fold, (fitted, predicted) in enumerate(folds):
        predicted_C[predicted] = probe(embedding_CD[fitted], label_C[fitted], embedding_CD[predicted])
        fold_C[predicted] = fold
        _, truth, guess = scores.numbered(label_C[predicted], predicted_C[predicted])
        values.append(float(scores.macro_f1(scores.confusion(truth, guess, 1 + max(truth.max(), guess.max())))))
        findings.rows.append(Row(model, dataset.name, NAME, "macro_f1", variant, values[-1], len(predicted), fold=fold))
    classes, truth, guess = scores.numbered(label_C, predicted_C)
    value = float(scores.macro_f1(scores.confusion(truth, guess, len(classes))))
    low, high, drawn = scores.interval_f1(label_C, predicted_C, donor_C, bootstraps=bench.bootstraps, seed=bench.seed)
    chance = scores.chance_f1(label_C, label_C, seed=bench.seed)
    findings.rows.append(
        Row(model, dataset.name, NAME, "macro_f1", variant, value, len(label_C), chance, -1, low, high, drawn)
    )
    mean = float(np.mean(values))
    findings.rows.append(Row(model, dataset.name, NAME, "macro_f1_fold_mean", variant, mean, len(label_C), chance))
    findings.predictions.append(
        {
            "model": model,
            "dataset": dataset.name,
            "task": NAME,
            "variant": variant,
            "fold": fold_C,
            "cell": dataset.cells.joinid_C[kept_C],
            "truth": label_C,
            "predicted": predicted_C,
        }
    )
