"""Packing: literal token sequences, shuffling that only the seed and the cell decide, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError, RecipeError
from tftrain.models.transcriptformer import ARCHITECTURE, TranscriptFormerConfig

VOCAB = Vocab.of([f"G{i}" for i in range(40)], np.zeros((40, 2), np.float32))
N_SPECIAL = 7
START, END = 1, 2


def config(**changes) -> TranscriptFormerConfig:
    values = {"layers": 1, "heads": 1, "width": 4, "genes_per_cell": 5, "assays": ["unknown", "10x"], **changes}
    return TranscriptFormerConfig(**values)


def cells(*genes_and_counts: dict[int, int], joinids=None, source=0, assay="10x") -> Cells:
    start = np.cumsum([0] + [len(cell) for cell in genes_and_counts])
    n = len(genes_and_counts)
    return Cells(
        start.astype(np.int64),
        np.array([gene for cell in genes_and_counts for gene in cell], np.int32),
        np.array([count for cell in genes_and_counts for count in cell.values()], np.int32),
        np.full(n, source, np.int16),
        np.arange(n) if joinids is None else np.array(joinids),
        {"assay": np.array([assay] * n if isinstance(assay, str) else assay, object)},
    )


def collate(some: Cells, shuffle_genes=False, max_tokens=100, seed=0, **changes):
    return ARCHITECTURE.collate(
        some, config(**changes), VOCAB, seed=seed, shuffle_genes=shuffle_genes, max_tokens=max_tokens
    )


def test_tokens_of_a_short_and_a_full_cell():
    short, full = {3: 2, 9: 50}, {30: 1, 31: 2, 32: 3, 33: 4, 34: 5, 35: 6}
    (batch,) = collate(cells(short, full))
    is_assay = torch.zeros(batch.n_tokens, dtype=torch.bool)
    is_assay[batch.assay_position_C] = True
    inputs = batch.distinct_U[batch.input_T]
    g = N_SPECIAL
    # [assay, START, g3, g9] and [assay, START, g30 ... g33]: a full cell's last gene is a target only.
    assert inputs[~is_assay].tolist() == [START, 3 + g, 9 + g, START, 30 + g, 31 + g, 32 + g, 33 + g]
    assert batch.input_count_T.tolist() == [1, 1, 2, 30, 1, 1, 1, 2, 3, 4]
    assert batch.assay_position_C.tolist() == [0, 4]
    assert batch.assay_C.tolist() == [1, 1]
    assert batch.scored_S.tolist() == [1, 2, 5, 6, 7, 8, 9]
    assert batch.rest_R.tolist() == [3]
    assert batch.rest_cell_R.tolist() == [0]
    # The full cell's last target is [END] with count 1; the count head still sees gene 34 and the true total.
    assert batch.target_S.tolist() == [3 + g, 9 + g, 30 + g, 31 + g, 32 + g, 33 + g, END]
    assert batch.target_count_S.tolist() == [2, 30, 1, 2, 3, 4, 1]
    assert (batch.distinct_U[batch.gene_S] - g).tolist() == batch.gene_row_S.tolist() == [3, 9, 30, 31, 32, 33, 34]
    assert batch.total_count_C.tolist() == [32, 15]
    assert (batch.n_cells, batch.n_tokens, batch.n_scored) == (2, 10, 7)
    assert batch.n_tokens_C.tolist() == ARCHITECTURE.tokens_of(cells(short, full), config()).tolist() == [4, 6]


def test_without_assay_token_and_with_unknown_assays():
    (batch,) = collate(cells({3: 2}), assays=[])
    assert batch.assay_C is None
    assert batch.n_tokens == 2
    (batch,) = collate(cells({3: 2}, {3: 2}, assay=["10x", "never heard of"]))
    assert batch.assay_C.tolist() == [1, 0]
    assert batch.is_hidden_key_T.tolist() == [False, False, False, True, False, False]


def test_counts_are_scaled_before_they_are_clipped():
    (batch,) = collate(cells({1: 10, 2: 90}), normalize_to_scale=50.0)
    assert batch.target_count_S.tolist() == [5, 30]


@pytest.mark.parametrize(
    ("max_tokens", "expected"),
    [(100, [4]), (10, [2, 2]), (9, [2, 1, 1]), (6, [1, 1, 1, 1])],
)
def test_cells_fill_batches_in_order(max_tokens, expected):
    batches = collate(
        cells({1: 1}, {1: 1, 2: 1, 3: 1}, dict.fromkeys(range(9), 1), {1: 1, 2: 1}), max_tokens=max_tokens
    )
    assert [batch.n_cells for batch in batches] == expected
    assert max(batch.n_tokens for batch in batches) <= max_tokens


def kept(some: Cells, **options) -> list[list[int]]:
    return [
        part.tolist()
        for batch in collate(some, shuffle_genes=True, **options)
        for part in np.split(batch.gene_row_S, np.cumsum(batch.n_genes_C)[:-1])
    ]


def test_gene_order_depends_on_seed_source_and_joinid_alone():
    cell = dict.fromkeys(range(20), 1)
    some = cells(cell, cell, cell, joinids=[7, 8, 7])
    first, second, again = kept(some)
    assert first == again != second
    assert kept(some.take(np.array([1, 0])), max_tokens=7) == [second, first]
    assert kept(some, seed=1)[0] != first
    assert kept(cells(cell, joinids=[7], source=1))[0] != first
    assert kept(some) == kept(some)


def test_gene_order_is_uniform():
    """20 genes, 5 kept: each gene is kept in a quarter of the cells and stands first in a twentieth (5 sigma)."""
    n = 20_000
    genes = np.array(kept(cells(*[dict.fromkeys(range(20), 1)] * n), max_tokens=10**7))
    assert genes.shape == (n, 5)
    assert all(len(set(row)) == 5 for row in genes[:100].tolist())
    for values, share in ((genes.ravel(), 0.25), (genes[:, 0], 0.05), (genes[:, 4], 0.05)):
        frequency = np.bincount(values, minlength=20) / n
        assert np.abs(frequency - share).max() < 5 * np.sqrt(share * (1 - share) / n)


def test_shuffling_keeps_each_gene_with_its_count():
    cell = {n: n + 1 for n in range(20)}
    (batch,) = collate(cells(cell), shuffle_genes=True, genes_per_cell=25, clip_counts=100)
    assert batch.target_count_S.tolist() == (batch.gene_row_S + 1).tolist()
    assert sorted(batch.gene_row_S.tolist()) == list(range(20))


def test_refusals():
    with pytest.raises(CellsError, match=r"cell 1 of source 0 has no expressed gene"):
        collate(cells({1: 1}, {}))
    with pytest.raises(
        RecipeError, match=r"takes 6 tokens but a micro-batch holds 5; raise train.tokens_per_gpu to at least 6"
    ):
        collate(cells(dict.fromkeys(range(9), 1)), max_tokens=5)
    without = cells({1: 1})
    without.obs.clear()
    with pytest.raises(CellsError, match="no obs column 'assay'"):
        collate(without)
    assert collate(Cells.empty(["assay"])) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 10, "heads": 4}, r"model.width is 10, not a multiple of model.heads \(4\)"),
        ({"layers": 0}, "model.layers is 0"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
        ({"count_eps": 0.0}, "model.count_eps"),
        ({"count_loss": "poisson"}, "softplus_approx, exact"),
        ({"attention": "fast"}, "auto, plain, flex"),
        ({"assays": ["10x"]}, "model.assays"),
        ({"special_tokens": ["unknown", "[START]"]}, r"model.special_tokens needs .*\[END\]"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(RecipeError, match=message):
        config(**changes)
