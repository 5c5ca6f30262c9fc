"""Labels of cells from a column of obs: classes to tell apart, or a number to predict.

In: the column's values of training and held-out cells. Out: Labels, which turn values into class numbers (or
standardised numbers) and weights, 0 for a cell without a label. Missing are an empty text, NaN, and `unknown`, which
stores are filled up with.

Shapes: C cells, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from tftrain.errors import CellsError

MISSING = ("", "unknown", "nan", "None")


@dataclass(frozen=True)
class Labels:
    """What the training cells' column says."""

    column: str
    task: Literal["classify", "regress"]
    classes: tuple[str, ...] = ()
    """Values of the training cells, sorted; none for a regression."""
    class_weight_K: tuple[float, ...] = ()
    """Weight of a cell of each class."""
    mean: float = 0.0
    """Of a regression's training cells."""
    sd: float = 1.0
    spread: float = 1.0
    """Mean square of the held-out cells' standardised numbers: what an R2 of 0 leaves."""

    @property
    def n_outputs(self) -> int:
        """Outputs that a head needs."""
        return len(self.classes) if self.task == "classify" else 1

    def encode(self, values_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels (C), int64 class numbers or float32 standardised numbers, and weights (C), float32: 0 where there is
        no label, or one that no training cell has."""
        if self.task == "regress":
            number_C = numbers(values_C, self.column)
            is_there_C = np.isfinite(number_C)
            label_C = np.where(is_there_C, (number_C - self.mean) / self.sd, 0.0).astype(np.float32)
            return label_C, is_there_C.astype(np.float32)
        number_of = {name: number for number, name in enumerate(self.classes)}
        class_C = np.array([number_of.get(name, -1) for name in names(values_C)], np.int64)
        weight_C = np.where(class_C >= 0, np.array([*self.class_weight_K, 0.0])[class_C], 0.0)
        return np.maximum(class_C, 0), weight_C.astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a manifest."""
        return asdict(self)

    @staticmethod
    def of(values: Mapping[str, Any]) -> Labels:
        """From a manifest."""
        tuples = {key: tuple(values[key]) for key in ("classes", "class_weight_K")}
        return Labels(**{**values, **tuples})


def names(values_C: np.ndarray) -> list[str]:
    """Text of each value, "" where it is missing."""
    texts = ["" if value is None or value != value else str(value) for value in np.asarray(values_C).tolist()]
    return ["" if text in MISSING else text for text in texts]


def numbers(values_C: np.ndarray, column: str) -> np.ndarray:
    """float64 (C): NaN where a value is missing. Raises CellsError for a value that is no number."""
    number_C = np.full(len(values_C), np.nan)
    for cell, text in enumerate(names(values_C)):
        if text:
            try:
                number_C[cell] = float(text)
            except ValueError:
                raise CellsError(
                    f"obs column {column!r} holds {text!r}, which is no number; head.task=regress needs numbers, "
                    "head.task=classify takes any values"
                ) from None
    return number_C


def fit(
    column: str,
    task: Literal["classify", "regress"],
    train_C: np.ndarray,
    heldout_C: np.ndarray,
    *,
    is_balanced: bool = False,
) -> tuple[Labels, list[str]]:
    """The labels of the training cells, and notes on what a reader must know.

    `is_balanced` weights a cell by (labelled cells) / (K x cells of its class). Raises CellsError where no training
    cell has a label, or all have the same.
    """
    if task == "regress":
        return _fit_numbers(column, numbers(train_C, column), numbers(heldout_C, column))
    labelled = [name for name in names(train_C) if name]
    classes, count_K = np.unique(np.array(labelled, dtype=str), return_counts=True)
    if not labelled:
        raise CellsError(
            f"obs column {column!r}: none of {len(train_C):,} training cells has a label (missing, empty and `unknown` "
            "are none); name the column of labels as head.label"
        )
    if len(classes) == 1:
        raise CellsError(
            f"obs column {column!r}: all {len(labelled):,} labelled training cells are {str(classes[0])!r}; telling "
            "classes apart needs two: name another head.label, or loosen the hold-out and data.obs_filter"
        )
    weight_K = len(labelled) / (len(classes) * count_K) if is_balanced else np.ones(len(classes))
    heldout = names(heldout_C)
    notes = [
        f"labels: {len(labelled):,} of {len(train_C):,} training cells have one of {len(classes)} values of {column}"
    ]
    only = sorted({name for name in heldout if name} - set(classes.tolist()))
    if only:
        notes.append(
            f"warning: {', '.join(only)} of {column} {'is' if len(only) == 1 else 'are'} in held-out cells alone: "
            "nothing is learnt of it, and its cells count in no held-out metric"
        )
    absent = sorted(set(classes.tolist()) - set(heldout))
    if len(heldout) and absent:
        notes.append(f"warning: no held-out cell is {' or '.join(absent)}: how well it is told apart is not measured")
    return Labels(column, "classify", tuple(classes.tolist()), tuple(weight_K.tolist())), notes


def _fit_numbers(column: str, train_C: np.ndarray, heldout_C: np.ndarray) -> tuple[Labels, list[str]]:
    known_N = train_C[np.isfinite(train_C)]
    if not len(known_N) or np.ptp(known_N) == 0:
        what = f"all are {known_N[0]:g}" if len(known_N) else "none has one"
        raise CellsError(
            f"obs column {column!r}: of {len(train_C):,} training cells {len(known_N):,} have a number and {what}; "
            "name another head.label"
        )
    mean, sd = float(known_N.mean()), float(known_N.std())
    judged_N = (heldout_C[np.isfinite(heldout_C)] - mean) / sd
    spread = float((judged_N**2).mean()) if len(judged_N) else 1.0
    notes = [
        f"labels: {len(known_N):,} of {len(train_C):,} training cells have {column}: {mean:.4g} on average, SD {sd:.4g}"
    ]
    return Labels(column, "regress", mean=mean, sd=sd, spread=spread or 1.0), notes
