"""Do labels learned in one species hold in another?

Protocol: fit StandardScaler and the probe on all judged cells of species A, predict species B, classes that both
have, macro-F1. A is every species that was trained on (every species where none was), B every other one; beside these
pairs, all species that were trained on together predict each unseen one. The interval draws donors of B; fitting is
not repeated, so it does not cover the choice of A's cells.
"""

from __future__ import annotations

import numpy as np

from tftrain.evals import paired, scores
from tftrain.evals.celltypes import kept_cells
from tftrain.evals.contract import Bench, Dataset, Findings
from tftrain.evals.probes import PROBES

NAME = "transfer"


def run(bench: Bench) -> Findings:
    """Rows of every ordered pair, representation and probe; data set `A -> B` or `A1 + A2 -> B`."""
    findings = Findings([])
    kept = {dataset.name: kept_cells(dataset, []) for dataset in bench.datasets}
    seen = [dataset for dataset in bench.datasets if dataset.is_seen]
    for target in bench.datasets:
        for a in seen or bench.datasets:
            if a.name != target.name:
                _transfer(bench, [a], target, kept, findings)
        if len(seen) > 1 and not target.is_seen:
            _transfer(bench, seen, target, kept, findings)
    return findings


def _transfer(
    bench: Bench, fitted: list[Dataset], target: Dataset, kept: dict[str, np.ndarray], findings: Findings
) -> None:
    """Appends the rows and predictions of one set of fitted species and one predicted species."""
    title = f"{' + '.join(dataset.name for dataset in fitted)} -> {target.name}"
    of_fitted = [dataset.label_C[kept[dataset.name]].astype(str) for dataset in fitted]
    shared = np.intersect1d(np.concatenate(of_fitted), target.label_C[kept[target.name]].astype(str))
    if len(shared) < 2:
        findings.notes.append(f"{NAME}: {title} left out: {len(shared)} classes in common; it takes 2")
        return
    fit = [(dataset, _of_classes(dataset, kept[dataset.name], shared)) for dataset in fitted]
    query_C = _of_classes(target, kept[target.name], shared)
    fit_label_C = np.concatenate([dataset.label_C[cells].astype(str) for dataset, cells in fit])
    truth_C = target.label_C[query_C].astype(str)
    chance = scores.chance_f1(truth_C, fit_label_C, seed=bench.seed)
    for variant, probe in PROBES.items():
        predicted = {}
        for model, of_dataset in bench.embeddings.items():
            fit_CD = np.concatenate([of_dataset[dataset.name][cells] for dataset, cells in fit])
            predicted[model] = probe(fit_CD, fit_label_C, of_dataset[target.name][query_C])
        paired.classified(
            bench,
            findings,
            NAME,
            title,
            variant,
            predicted,
            truth_C=truth_C,
            donor_C=target.donor_C[query_C],
            cell_C=target.cells.joinid_C[query_C],
            fold_C=np.full(len(query_C), -1),
            chance=chance,
        )


def _of_classes(dataset: Dataset, kept_C: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The kept cells whose label is one of `classes`."""
    return kept_C[np.isin(dataset.label_C[kept_C].astype(str), classes)]
