"""A second, tiny architecture: whatever trains it knows nothing of TranscriptFormer. Also the cells it is trained on.

Shapes: C cells, T tokens of a batch (one an expressed gene), G genes, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tftrain.cells.contract import Cells

N_GENES = 50
VOCAB: Any = SimpleNamespace(n_genes=N_GENES)


@dataclass(frozen=True)
class ToyConfig:
    """Width of the toy."""

    width: int = 8
    dropout: float = 0.0
    bad_gradient_gene: int | None = None
    """A gene whose loss is finite and whose gradient is not."""


@dataclass(frozen=True)
class ToyBatch:
    """Cells one after another."""

    gene_T: Tensor
    count_T: Tensor
    cell_T: Tensor
    n_cells: int
    n_tokens: int
    n_scored: int

    def to(self, device: torch.device | str) -> ToyBatch:
        """The same on `device`."""
        return replace(
            self, gene_T=self.gene_T.to(device), count_T=self.count_T.to(device), cell_T=self.cell_T.to(device)
        )


class ToyModule(nn.Module):
    """Predicts each gene from its cell's mean, through tied weights, and its count by Poisson regression."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.bad_gene, self.is_checkpointed = config.bad_gradient_gene, False
        self.gene = nn.Embedding(N_GENES, config.width)
        self.frozen = nn.Parameter(torch.linspace(-1, 1, N_GENES * config.width).view(N_GENES, -1), requires_grad=False)
        self.mix = nn.Sequential(nn.Linear(config.width, config.width), nn.GELU(), nn.LayerNorm(config.width))
        self.drop = nn.Dropout(config.dropout)
        self.rate = nn.Linear(config.width, 1)

    def forward(self, batch: ToyBatch) -> dict[str, Tensor]:
        """The sums of the seam."""
        x_TD = self.gene(batch.gene_T) + self.frozen[batch.gene_T]
        sum_CD = torch.zeros(batch.n_cells, x_TD.shape[1], dtype=x_TD.dtype).index_add(0, batch.cell_T, x_TD)
        size_C = torch.zeros(batch.n_cells, dtype=x_TD.dtype).index_add(0, batch.cell_T, torch.ones_like(x_TD[:, 0]))
        mean_CD = sum_CD / size_C.clamp(min=1)[:, None]
        if self.is_checkpointed:
            mixed_CD = checkpoint(self.mix, mean_CD, use_reentrant=False)
        else:
            mixed_CD = self.mix(mean_CD)
        h_TD = self.drop(mixed_CD)[batch.cell_T]
        is_scored_T = (batch.count_T > 0).float()
        gene_loss_T = nn.functional.cross_entropy((h_TD @ self.gene.weight.T).float(), batch.gene_T, reduction="none")
        rate_T = self.rate(h_TD)[:, 0].float()
        count_loss_T = torch.exp(rate_T) - batch.count_T * rate_T
        if self.bad_gene is not None:
            is_bad_T = batch.gene_T == self.bad_gene
            # The root of 0 is 0 and has no slope.
            gene_loss_T = gene_loss_T + torch.sqrt(torch.where(is_bad_T, rate_T * 0, 1.0)) - (~is_bad_T).float()
        loss_gene, loss_count = (gene_loss_T * is_scored_T).sum(), (count_loss_T * is_scored_T).sum()
        return {"loss": loss_gene + loss_count, "loss_gene": loss_gene.detach(), "loss_count": loss_count.detach()}


class Toy:
    """The seam's object."""

    name = "toy"
    Config = ToyConfig

    def build(self, config: ToyConfig, vocab: Any, *, device: torch.device | str = "cpu") -> nn.Module:
        """Fresh weights."""
        return ToyModule(config).to(device)

    def tokens_of(self, cells: Cells, config: Any) -> np.ndarray:
        """One a gene."""
        return cells.n_expressed_C

    def collate(
        self, cells: Cells, config: Any, vocab: Any, *, seed: int, shuffle_genes: bool, max_tokens: int
    ) -> Sequence[ToyBatch]:
        """First fit in order; the order of genes does not matter to this module."""
        batches, first, size = [], 0, 0
        for cell, n_tokens in enumerate(self.tokens_of(cells, config)):
            if size + n_tokens > max_tokens:
                batches.append(_pack(cells.slice(first, cell)))
                first, size = cell, 0
            size += n_tokens
        return [*batches, *([_pack(cells.slice(first, len(cells)))] if first < len(cells) else [])]

    def empty(self, config: Any, vocab: Any) -> ToyBatch:
        """One token that is not scored."""
        zero_1 = torch.zeros(1, dtype=torch.int64)
        return ToyBatch(zero_1, torch.zeros(1), zero_1, n_cells=1, n_tokens=0, n_scored=0)

    def embed(self, module: nn.Module, batch: Any, keys: Sequence[str]) -> dict[str, Tensor]:
        """Not needed here."""
        raise NotImplementedError

    def forward_flop(self, config: Any, vocab: Any, n_tokens: int) -> float:
        """A number to reckon with: 100 a token and 1 a pair of tokens."""
        return 100.0 * n_tokens + n_tokens**2

    def checkpoint_activations(self, module: nn.Module) -> None:
        """The one block."""
        assert isinstance(module, ToyModule)
        module.is_checkpointed = True

    def lora_targets(self, module: nn.Module) -> list[str]:
        """Not needed here."""
        return ["mix.0"]


TOY = Toy()


def toy_cells(n_cells: int, seed: int = 0) -> Cells:
    """Cells of 3 to 12 genes; joinids are row numbers."""
    rng = np.random.default_rng(seed)
    length_C = rng.integers(3, 13, n_cells)
    genes = [rng.choice(N_GENES, size=length, replace=False) for length in length_C]
    n_values = int(length_C.sum())
    return Cells(
        np.concatenate([[0], np.cumsum(length_C)]),
        np.concatenate(genes).astype(np.int32),
        rng.integers(1, 6, n_values).astype(np.int32),
        np.zeros(n_cells, np.int16),
        np.arange(n_cells, dtype=np.int64),
    )


def toy_steps(
    cells: Cells, cells_per_step: int, n_steps: int, *, rank: int = 0, world: int = 1, cursor: int = 0
) -> Iterator[tuple[Cells, int]]:
    """What `stream_steps` yields: this rank's share (every `world`-th cell) of each step from `cursor` on, and the
    cursor after it.
    """
    while cursor < n_steps * cells_per_step:
        position = np.arange(cursor, cursor + cells_per_step) % len(cells)
        cursor += cells_per_step
        yield cells.take(position[rank::world]), cursor


def _pack(cells: Cells) -> ToyBatch:
    return ToyBatch(
        torch.from_numpy(cells.gene_N.astype(np.int64)),
        torch.from_numpy(cells.count_N.astype(np.float32)),
        torch.from_numpy(np.repeat(np.arange(len(cells)), cells.n_expressed_C)),
        n_cells=len(cells),
        n_tokens=len(cells.gene_N),
        n_scored=len(cells.gene_N),
    )
