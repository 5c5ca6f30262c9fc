"""Cells -> flat packed batches: tokens of many cells one after another, nothing padded.

In: Cells (genes and counts in the file's column order). Out: PackedBatch, the module's only argument.
A cell with n kept genes takes the tokens [assay, START, g1 ... gn]; the positions START ... g(n-1) are scored against
the targets g1 ... gn (MODEL.md 1.2). The last token, gn, predicts nothing but is part of the published cell embedding;
a full-length cell (n = L) has no room for it, and [END] with count 1 for its last target, as published.

Shapes: T tokens, C cells, S scored positions, R rest (the last tokens, which predict nothing), U distinct genes of the
batch, [START] included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError, RecipeError
from tftrain.models.transcriptformer.config import END, START, TranscriptFormerConfig


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch. Tensors move with `to`; numpy arrays stay on the host for whoever lays out memory or output."""

    distinct_U: Tensor
    """int64 (U): vocabulary row (special tokens first) of each distinct gene."""
    input_T: Tensor
    """int64 (T): index into distinct_U of each input token; assay tokens hold any valid index."""
    input_count_T: Tensor
    """float32 (T): clipped count seen with each input token, 1 for assay and [START]."""
    assay_C: Tensor | None
    """int64 (C): row of the assay table, None for a model without assay token."""
    assay_position_C: Tensor | None
    """int64 (C): position of each assay token in T."""
    is_hidden_key_T: Tensor | None
    """bool (T): True where no other token may attend to this one (unknown assay); None if there is none."""
    scored_S: Tensor
    """int64 (S): positions in T whose output predicts a gene."""
    gene_S: Tensor
    """int64 (S): index into distinct_U of the gene that follows, never [END]."""
    target_S: Tensor
    """int64 (S): vocabulary row that the gene head is scored against; [END] at the end of a full-length cell."""
    target_count_S: Tensor
    """float32 (S): clipped count that the count head is scored against; 1 for [END]."""
    cell_S: Tensor
    """int64 (S): cell of each scored position."""
    rest_R: Tensor
    """int64 (R): positions in T of last tokens, which predict nothing; absent in full-length cells."""
    rest_cell_R: Tensor
    """int64 (R): cell of each of these."""
    total_count_C: Tensor
    """float32 (C): sum of the kept genes' clipped counts."""
    n_genes_C: np.ndarray
    """int64 (C): kept genes, on the host."""
    n_tokens_C: np.ndarray
    """int64 (C): tokens, on the host."""
    gene_row_S: np.ndarray
    """int32 (S): vocabulary row, special tokens not counted, of the gene that follows, on the host."""
    max_tokens: int
    """The limit this batch was packed to: what a path with fixed shapes pads up to."""
    is_filler: bool = False
    """True for a batch that only keeps ranks in step: its loss is zero and it counts as nothing."""

    @property
    def n_cells(self) -> int:
        """C, 0 for a filler."""
        return 0 if self.is_filler else len(self.n_genes_C)

    @property
    def n_tokens(self) -> int:
        """T, 0 for a filler."""
        return 0 if self.is_filler else len(self.input_T)

    @property
    def n_scored(self) -> int:
        """S, 0 for a filler."""
        return 0 if self.is_filler else len(self.scored_S)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The same batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory, from where a copy to a GPU runs beside the computation."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: change(v) for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **moved)


def tokens_of(cells: Cells, config: TranscriptFormerConfig) -> np.ndarray:
    """int64 (C): tokens of each cell; a cell without genes takes none."""
    n_expressed_C = cells.n_expressed_C
    n_tokens_C = np.minimum(n_expressed_C + 1, config.genes_per_cell) + config.assay_tokens_per_cell
    return np.where(n_expressed_C > 0, n_tokens_C, 0).astype(np.int64)


def collate(
    cells: Cells, config: TranscriptFormerConfig, vocab: Vocab, *, seed: int, shuffle_genes: bool, max_tokens: int
) -> list[PackedBatch]:
    """Packs cells in order; see `Architecture.collate`.

    With `shuffle_genes` a cell's genes are put in an order that (seed, source, joinid) alone decides and the first L
    are kept; without it the first L in column order are, as the published inference does.
    """
    n_tokens_C = tokens_of(cells, config)
    if not len(cells):
        return []
    if not n_tokens_C.all():
        cell = int(np.flatnonzero(n_tokens_C == 0)[0])
        raise CellsError(
            f"cell {int(cells.joinid_C[cell])} of source {int(cells.source_C[cell])} has no expressed gene of the "
            "vocabulary; filter such cells out (data.qc.min_expressed_genes)"
        )
    if n_tokens_C.max() > max_tokens:
        raise RecipeError(
            f"a cell takes {int(n_tokens_C.max())} tokens but a micro-batch holds {max_tokens}; raise "
            f"train.tokens_per_gpu to at least {config.genes_per_cell + config.assay_tokens_per_cell} or lower "
            "model.genes_per_cell"
        )
    assay_C = _assay_rows(cells, config)
    stop_C = np.cumsum(n_tokens_C)
    batches, first = [], 0
    while first < len(cells):
        used = stop_C[first - 1] if first else 0
        stop = int(np.searchsorted(stop_C, used + max_tokens, side="right"))
        part_assay_C = None if assay_C is None else assay_C[first:stop]
        batches.append(_pack(cells.slice(first, stop), part_assay_C, config, vocab, seed, shuffle_genes, max_tokens))
        first = stop
    return batches


def filler(config: TranscriptFormerConfig, vocab: Vocab) -> PackedBatch:
    """One invented cell with one gene whose loss counts nothing: every module still runs forward and backward."""
    one = np.ones(1, np.int32)
    cells = Cells(np.array([0, 1]), one * 0, one, np.zeros(1, np.int16), np.zeros(1, np.int64))
    assay_C = np.zeros(1, np.int64) if config.assays else None
    max_tokens = 2 + config.assay_tokens_per_cell
    return replace(_pack(cells, assay_C, config, vocab, 0, False, max_tokens), is_filler=True)


def _assay_rows(cells: Cells, config: TranscriptFormerConfig) -> np.ndarray | None:
    """int64 (C): row of each cell's assay, 0 (`unknown`) for a name that the model does not have."""
    if not config.assays:
        return None
    if "assay" not in cells.obs:
        raise CellsError(
            "the model has an assay token but the cells have no obs column 'assay'; read it too, or set model.assays=[]"
        )
    row_of_name = {name: row for row, name in enumerate(config.assays)}
    name_C, inverse_C = np.unique(np.asarray(cells.obs["assay"]).astype(str), return_inverse=True)
    return np.array([row_of_name.get(str(name), 0) for name in name_C], np.int64)[inverse_C]


def _pack(
    cells: Cells,
    assay_C: np.ndarray | None,
    config: TranscriptFormerConfig,
    vocab: Vocab,
    seed: int,
    shuffle_genes: bool,
    max_tokens: int,
) -> PackedBatch:
    n_assay, n_special = config.assay_tokens_per_cell, config.n_special
    n_genes_C = np.minimum(cells.n_expressed_C, config.genes_per_cell)
    gene_row_S, count_S = _keep(
        cells.cell_start_C1,
        cells.gene_N,
        cells.count_N,
        cells.source_C.astype(np.int64),
        cells.joinid_C,
        np.uint64(seed & 0xFFFFFFFFFFFFFFFF),
        shuffle_genes,
        config.genes_per_cell,
        float(config.clip_counts),
        float(config.normalize_to_scale),
    )
    distinct_U, slot_S = _distinct(gene_row_S, vocab.n_genes)
    n_scored = len(gene_row_S)
    n_tokens_C = tokens_of(cells, config)
    first_S_C = np.cumsum(n_genes_C) - n_genes_C
    first_T_C = np.cumsum(n_tokens_C) - n_tokens_C
    cell_S = np.repeat(np.arange(len(cells)), n_genes_C)
    # START of cell c stands at first_T_C[c] + n_assay and is the first of its scored positions.
    scored_S = np.arange(n_scored) + (first_T_C + n_assay - first_S_C)[cell_S]
    full_C = n_genes_C == config.genes_per_cell
    last_S_C = first_S_C + n_genes_C - 1
    # Slot 0 of distinct_U is [START]. A token's input is the target of the position before it.
    n_tokens = int(n_tokens_C.sum())
    input_T, input_count_T = np.zeros(n_tokens, np.int64), np.ones(n_tokens, np.float32)
    shifts_S = np.ones(n_scored, bool)
    shifts_S[last_S_C[full_C]] = False
    input_T[scored_S[shifts_S] + 1] = slot_S[shifts_S] + 1
    input_count_T[scored_S[shifts_S] + 1] = count_S[shifts_S]
    target_S, target_count_S = gene_row_S.astype(np.int64) + n_special, count_S.copy()
    target_S[last_S_C[full_C]], target_count_S[last_S_C[full_C]] = config.special(END), 1
    assay_position_C = first_T_C if n_assay else None
    is_hidden_key_T = None
    if assay_C is not None and not assay_C.all():
        is_hidden_key_T = np.zeros(n_tokens, bool)
        is_hidden_key_T[first_T_C[assay_C == 0]] = True
    total_count_C = np.add.reduceat(count_S, first_S_C)
    return PackedBatch(
        distinct_U=torch.from_numpy(np.concatenate([[config.special(START)], distinct_U + n_special])),
        input_T=torch.from_numpy(input_T),
        input_count_T=torch.from_numpy(input_count_T),
        assay_C=None if assay_C is None else torch.from_numpy(assay_C),
        assay_position_C=None if assay_position_C is None else torch.from_numpy(assay_position_C),
        is_hidden_key_T=None if is_hidden_key_T is None else torch.from_numpy(is_hidden_key_T),
        scored_S=torch.from_numpy(scored_S),
        gene_S=torch.from_numpy(slot_S + 1),
        target_S=torch.from_numpy(target_S),
        target_count_S=torch.from_numpy(target_count_S),
        cell_S=torch.from_numpy(cell_S),
        rest_R=torch.from_numpy((first_T_C + n_tokens_C - 1)[~full_C]),
        rest_cell_R=torch.from_numpy(np.flatnonzero(~full_C)),
        total_count_C=torch.from_numpy(total_count_C),
        n_genes_C=n_genes_C,
        n_tokens_C=n_tokens_C,
        gene_row_S=gene_row_S,
        max_tokens=max_tokens,
    )


@numba.njit(cache=True)
def _mix(state):  # type: ignore[no-untyped-def]
    """The output function of splitmix64 (Steele, Lea, Flood 2014)."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@numba.njit(cache=True)
def _keep(start_C1, gene_N, count_N, source_C, joinid_C, seed, shuffle, n_keep, clip, scale):  # type: ignore[no-untyped-def]
    """Genes (int32) and clipped counts (float32) of the first `n_keep` genes of each cell, in column or shuffled order.

    The shuffle is the head of a Fisher-Yates shuffle driven by splitmix64 from (seed, source, joinid).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    n_cells = len(start_C1) - 1
    total = 0
    for c in range(n_cells):
        total += min(n_keep, start_C1[c + 1] - start_C1[c])
    gene_S = np.empty(total, np.int32)
    count_S = np.empty(total, np.float32)
    at = 0
    for c in range(n_cells):
        first, last = start_C1[c], start_C1[c + 1]
        n = last - first
        k = min(n_keep, n)
        factor = 1.0
        if scale > 0:
            cell_total = 0.0
            for i in range(first, last):
                cell_total += count_N[i]
            factor = scale / cell_total
        if shuffle:
            order = np.arange(first, last)
            state = _mix(_mix(seed + golden * np.uint64(source_C[c] + 1)) + golden * np.uint64(joinid_C[c] + 1))
            for i in range(k):
                state = state + golden
                j = i + np.int64(_mix(state) % np.uint64(n - i))
                swap = order[i]
                order[i] = order[j]
                order[j] = swap
            for i in range(k):
                gene_S[at + i] = gene_N[order[i]]
                count_S[at + i] = min(count_N[order[i]] * factor, clip)
        else:
            for i in range(k):
                gene_S[at + i] = gene_N[first + i]
                count_S[at + i] = min(count_N[first + i] * factor, clip)
        at += k
    return gene_S, count_S


@numba.njit(cache=True)
def _distinct(gene_S, n_genes):  # type: ignore[no-untyped-def]
    """The distinct genes (int64), in order of first appearance, and the index of each value among them (int64)."""
    slot_G = np.full(n_genes, -1, np.int64)
    distinct = np.empty(min(len(gene_S), n_genes), np.int64)
    slot_S = np.empty(len(gene_S), np.int64)
    n = 0
    for i in range(len(gene_S)):
        gene = gene_S[i]
        if slot_G[gene] < 0:
            slot_G[gene] = n
            distinct[n] = gene
            n += 1
        slot_S[i] = slot_G[gene]
    return distinct[:n].copy(), slot_S


def split_by_cell(values_S: np.ndarray, n_genes_C: np.ndarray) -> Sequence[np.ndarray]:
    """Flat per-position values -> one array a cell."""
    return np.split(values_S, np.cumsum(n_genes_C)[:-1])
