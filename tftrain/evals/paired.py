"""A figure of every representation, and by how much the trained model's differs from each baseline's.

In: one value a representation and R resampled values of each, drawn alike for all. Out: rows with 95 % intervals, and
rows `<metric>_gain` of the trained model over each other one, whose interval is that of the paired difference.
Shapes: C cells, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tftrain.evals import scores
from tftrain.evals.contract import Bench, Findings, Row

TRAINED = "trained"


def gain_variant(variant: str, other: str) -> str:
    """How the row of a gain names what it is over."""
    return f"{variant} over {other}".strip()


def rows(
    task: str,
    dataset: str,
    metric: str,
    variant: str,
    value: Mapping[str, float],
    sample_R: Mapping[str, np.ndarray],
    *,
    n: int,
    chance: float | Mapping[str, float] | None,
    resampled: str,
    interval: Callable[[np.ndarray], tuple[float | None, float | None]] = scores.bounds,
) -> list[Row]:
    """A row a representation, then the gains of `trained`, where it is there. Greater is better."""
    made = [
        Row(
            model,
            dataset,
            task,
            metric,
            variant,
            got,
            n,
            chance[model] if isinstance(chance, Mapping) else chance,
            -1,
            *interval(sample_R[model]),
            resampled,
        )
        for model, got in value.items()
    ]
    for model, got in value.items():
        if model != TRAINED and TRAINED in value:
            low, high = interval(sample_R[TRAINED] - sample_R[model])
            gain, over = value[TRAINED] - got, gain_variant(variant, model)
            made.append(Row(TRAINED, dataset, task, f"{metric}_gain", over, gain, n, 0.0, -1, low, high, resampled))
    return made


def classified(
    bench: Bench,
    findings: Findings,
    task: str,
    dataset: str,
    variant: str,
    predicted: Mapping[str, np.ndarray],
    *,
    truth_C: np.ndarray,
    donor_C: np.ndarray,
    cell_C: np.ndarray,
    fold_C: np.ndarray,
    chance: float,
) -> None:
    """Appends macro-F1 and the predictions of every representation under one classifier."""
    value = {}
    for model, predicted_C in predicted.items():
        classes, truth, guess = scores.numbered(truth_C, predicted_C)
        value[model] = float(scores.macro_f1(scores.confusion(truth, guess, len(classes))))
        findings.predictions.append(
            {
                "model": model,
                "dataset": dataset,
                "task": task,
                "variant": variant,
                "fold": fold_C,
                "cell": cell_C,
                "truth": truth_C,
                "predicted": predicted_C,
            }
        )
    f1_JR, drawn = scores.resampled_f1(
        truth_C, list(predicted.values()), donor_C, bootstraps=bench.bootstraps, seed=bench.seed
    )
    sample_R = dict(zip(predicted, f1_JR))
    findings.rows.extend(
        rows(task, dataset, "macro_f1", variant, value, sample_R, n=len(truth_C), chance=chance, resampled=drawn)
    )
