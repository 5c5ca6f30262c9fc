"""What flows between the parts of an evaluation: data sets in, rows of one long table out.

Shapes: C cells, D width of a representation, B blocks of cells, G genes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab


@dataclass(frozen=True)
class Dataset:
    """Cells of one species that are judged, and the training cells that baselines may be fitted on."""

    name: str
    """The species, as the recipe names it."""
    cells: Cells
    """Judged cells; `obs` holds the label and the donor column."""
    fit_cells: Cells
    """A sample of the cells that were trained on; empty for an unseen source."""
    vocab: Vocab
    """What `gene_N` of both points into."""
    is_seen: bool
    """True: the model was trained on other donors of this source."""
    label_C: np.ndarray
    """Object array of strings; "" where a cell has no label."""
    donor_C: np.ndarray
    """Object array of strings."""
    condition_C: np.ndarray | None = None
    """Object array of strings, "" where a cell has none; None where the recipe names no column."""
    batch_C: np.ndarray | None = None
    """Object array of strings; None: the donors are the batches."""
    caveat: str = ""
    """What is missing of the cells as they were given: genes that the vocabulary does not have."""


@dataclass(frozen=True)
class GeneVectors:
    """A vector a gene, from parameters alone."""

    gene_ids: Sequence[str]
    vector_GD: np.ndarray


@dataclass(frozen=True)
class Scores:
    """Negative log-likelihoods of B blocks of judged cells, summed over the scored genes of a block, in nats."""

    gene_B: np.ndarray
    count_B: np.ndarray
    n_genes_B: np.ndarray


@dataclass(frozen=True)
class Row:
    """One line of metrics.parquet."""

    model: str
    """`trained`, or the name of a baseline."""
    dataset: str
    """A species, or `fitted on -> predicted`; species fitted on together are joined by ` + `."""
    task: str
    metric: str
    variant: str
    value: float
    n: int
    """Cells (or genes, for a likelihood) that the value is of."""
    chance: float | None = None
    """What guessing gets, in the same unit; none where guessing has no meaning."""
    fold: int = -1
    """A fold or a subsample; -1: all of them together."""
    low: float | None = None
    high: float | None = None
    """Bounds of the 95 % bootstrap interval."""
    resampled: str = ""
    """What the interval draws: `donors`, `cells`, `blocks`, `genes` or `subsamples`."""


@dataclass(frozen=True)
class Bench:
    """All that a task needs: the cells, what represents them, and how the models score them."""

    datasets: list[Dataset]
    embeddings: Mapping[str, Mapping[str, np.ndarray]]
    """Representation -> data set -> float array (C, D), rows as in `Dataset.cells`."""
    score: Mapping[str, Callable[[Dataset, list[Cells]], Scores]] = field(default_factory=dict)
    """Model -> function of a data set and its cells in blocks."""
    genes: Mapping[str, GeneVectors] = field(default_factory=dict)
    """Representation -> its gene vectors."""
    relations: str | None = None
    """Table of pairs of genes that belong together."""
    count_limit: int | None = None
    """Counts above it are taken for it by the models, so by the count baseline too; none: no limit."""
    seed: int = 0
    bootstraps: int = 1000
    by_cell: bool = False
    """Judge cell types on folds that mix donors too."""
    scib_cells: int = 10_000
    scib_seeds: int = 10


@dataclass(frozen=True)
class Findings:
    """What a task returns."""

    rows: list[Row]
    predictions: list[dict[str, object]] = field(default_factory=list)
    """One entry a prediction: model, dataset, task, variant, fold, cell, truth, predicted, as arrays of equal
    length."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know: dropped classes, skipped data sets."""
