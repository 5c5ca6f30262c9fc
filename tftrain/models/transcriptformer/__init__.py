"""TranscriptFormer (MODEL.md 1.1-1.7): the object behind `model.arch: transcriptformer`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import CheckpointError
from tftrain.models.transcriptformer import batch as packing
from tftrain.models.transcriptformer.batch import PackedBatch
from tftrain.models.transcriptformer.config import TranscriptFormerConfig, protein_VE
from tftrain.models.transcriptformer.model import OUTPUT_KEYS, TranscriptFormer, forward_flop


class TranscriptFormerArchitecture:
    """What `models/arch.py` asks of an architecture."""

    name = "transcriptformer"
    Config = TranscriptFormerConfig

    def build(
        self, config: TranscriptFormerConfig, vocab: Vocab, *, device: torch.device | str = "cpu"
    ) -> TranscriptFormer:
        """The module with fresh weights and the protein table of `vocab`; on "meta" the table is not read."""
        module = TranscriptFormer(config, vocab.n_genes, vocab.protein_width, device=device)
        if torch.device(device).type != "meta":
            module.set_proteins(protein_VE(config, vocab))
        return module

    def set_genes(self, module: nn.Module, config: TranscriptFormerConfig, vocab: Vocab) -> None:
        """Replaces the genes' rows of the protein table and keeps those of special tokens (MODEL.md 1.8)."""
        assert isinstance(module, TranscriptFormer)
        old_VE = module.gene_embeddings.protein_VE
        if vocab.protein_width != old_VE.shape[1]:
            raise CheckpointError(
                f"{', '.join(vocab.files)}: protein vectors are {vocab.protein_width} wide, the model takes "
                f"{old_VE.shape[1]}; make them with the protein model that it was trained with"
            )
        special_SE = old_VE[: config.n_special].float().cpu().numpy()
        module.set_proteins(np.concatenate([special_SE, vocab.protein_GE()]))

    def obs_columns(self, config: TranscriptFormerConfig) -> tuple[str, ...]:
        """`assay` for a model with assay token."""
        return ("assay",) if config.assays else ()

    def tokens_of(self, cells: Cells, config: TranscriptFormerConfig) -> np.ndarray:
        """int64 (C): tokens of each cell."""
        return packing.tokens_of(cells, config)

    def collate(
        self,
        cells: Cells,
        config: TranscriptFormerConfig,
        vocab: Vocab,
        *,
        seed: int,
        shuffle_genes: bool,
        max_tokens: int,
    ) -> list[packing.PackedBatch]:
        """Packed batches; see `batch.collate`."""
        return packing.collate(cells, config, vocab, seed=seed, shuffle_genes=shuffle_genes, max_tokens=max_tokens)

    def empty(self, config: TranscriptFormerConfig, vocab: Vocab) -> packing.PackedBatch:
        """A batch that counts nothing; see `batch.filler`."""
        return packing.filler(config, vocab)

    def embed(self, module: nn.Module, batch: packing.PackedBatch, keys: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of MODEL.md 1.6 in embedding mode, without dropout or gradient; keys: see `TranscriptFormer.forward`.

        `module` may be a wrapper (an engine, an adapter) whose forward passes its arguments on.
        """
        was_training = module.training
        module.eval()
        try:
            with torch.no_grad():
                return module(batch, tuple(keys))
        finally:
            module.train(was_training)

    def gene_vectors(self, module: nn.Module, config: TranscriptFormerConfig) -> Tensor:
        """(G, D): the genes' tokens, the learned map of their protein vectors."""
        assert isinstance(module, TranscriptFormer)
        protein_VE = module.gene_embeddings.protein_VE
        return module.gene_embeddings(torch.arange(config.n_special, len(protein_VE), device=protein_VE.device))

    def forward_flop(self, config: TranscriptFormerConfig, vocab: Vocab, n_tokens: int) -> float:
        """FLOP of one cell's forward pass."""
        return forward_flop(config, n_tokens, config.n_special + vocab.n_genes, vocab.protein_width)

    def checkpoint_activations(self, module: nn.Module) -> None:
        """Every block of the encoder."""
        assert isinstance(module, TranscriptFormer)
        module.transformer_encoder.activation_checkpointing = True

    def lora_targets(self, module: nn.Module) -> list[str]:
        """The attention and feed-forward projections of every block."""
        return [
            name for name, child in module.named_modules() if "encoder_layers." in name and isinstance(child, nn.Linear)
        ]


ARCHITECTURE = TranscriptFormerArchitecture()

__all__ = [
    "ARCHITECTURE",
    "OUTPUT_KEYS",
    "PackedBatch",
    "TranscriptFormer",
    "TranscriptFormerArchitecture",
    "TranscriptFormerConfig",
]
