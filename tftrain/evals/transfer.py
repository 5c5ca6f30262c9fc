"""Do labels learned in one species hold in another?

Protocol: fit StandardScaler and the probe on all judged cells of species A, predict species B, classes that both have,
macro-F1. A is every species that was trained on (every species where none was), B every other one. The interval draws donors
of B; fitting is not repeated, so it does not cover the choice of A's cells.
"""

from __future__ import annotations

import numpy as np

from tftrain.evals import scores
from tftrain.evals.celltypes import kept_cells
from tftrain.evals.contract import Bench, Dataset, Findings, Row
from tftrain.evals.probes import PROBES

NAME = "transfer"


def run(bench: Bench) -> Findings:
    """Rows of every ordered pair, representation and probe; data set `A -> B`."""
    findings = Findings([])
    kept = {dataset.name: kept_cells(dataset, []) for dataset in bench.datasets}
    fitted_on = [dataset for dataset in bench.datasets if dataset.is_seen] or bench.datasets
    for a in fitted_on:
        for b in bench.datasets:
            if a.name != b.name:
                _pair(bench, a, b, kept, findings)
    return findings


def _pair(bench: Bench, a: Dataset, b: Dataset, kept: dict[str, np.ndarray], findings: Findings) -> None:
    """Appends the rows and predictions of one ordered pair."""
    shared = np.intersect1d(a.label_C[kept[a.name]].astype(str), b.label_C[kept[b.name]].astype(str))
    pair = f"{a.name} -> {b.name}"
    if len(shared) < 2:
        findings.notes.append(f"{NAME}: {pair} left out: {len(shared)} classes in common; it takes 2")
        return
    fit_C = kept[a.name][np.isin(a.label_C[kept[a.name]].astype(str), shared)]
    query_C = kept[b.name][np.isin(b.label_C[kept[b.name]].astype(str), shared)]
    fit_label_C, truth_C = a.label_C[fit_C].astype(str), b.label_C[query_C].astype(str)
    chance = scores.chance_f1(truth_C, fit_label_C, seed=bench.seed)
    for model, of_dataset in bench.embeddings.items():
        for variant, probe in PROBES.items():
            predicted_C = probe(of_dataset[a.name][fit_C], fit_label_C, of_dataset[b.name][query_C])
            classes, truth, guess = scores.numbered(truth_C, predicted_C)
            value = float(scores.macro_f1(scores.confusion(truth, guess, len(classes))))
            low, high, drawn = scores.interval_f1(
                truth_C, predicted_C, b.donor_C[query_C], bootstraps=bench.bootstraps, seed=bench.seed
            )
            findings.rows.append(
                Row(model, pair, NAME, "macro_f1", variant, value, len(query_C), chance, -1, low, high, drawn)
            )
            findings.predictions.append(
                {
                    "model": model,
                    "dataset": pair,
                    "task": NAME,
                    "variant": variant,
                    "fold": np.full(len(query_C), -1),
                    "cell": b.cells.joinid_C[query_C],
                    "truth": truth_C,
                    "predicted": predicted_C,
                }
            )
