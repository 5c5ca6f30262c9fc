"""A classifier or regressor on cell embeddings, put around any architecture: the trainer notices nothing.

In: an architecture, its module, Labels. Out: `LabellingArchitecture`, whose batches carry labels in cell order, and
`Labeller`, a module whose `forward(batch)` returns the same dict of scalar sums as the architecture's own.

The head reads cells exactly as `embed` does (column order of genes, embedding mode), so that what was trained is what
`tftrain predict` runs. With a generative loss beside it the module runs twice a batch, the second time on cells whose
genes are shuffled as in pretraining.

Sums are divided by the scored genes of all ranks and micro-batches, G, while a mean over labelled cells needs their
weights W. So every batch carries `head_scale` = G / W of its step, which the trainer sets once all ranks have said
what they hold, and

    loss = generative_weight * sum of the generative loss + weight * head_scale * sum_c w_c nll_c,

which divided by G is generative_weight * (mean a gene) + weight * (weighted mean a labelled cell). `loss_head`,
`accuracy` and `r2` are scaled likewise. A step without labelled cells has a scale of 0 and no head loss.

Shapes: C cells, D width, K classes (1 for a regression).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tftrain.cells.contract import Cells
from tftrain.cells.labels import Labels
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError
from tftrain.models.arch import Architecture, Batch

BASE = "base."
"""Before the names of the architecture's own parameters within a Labeller."""
HEAD = "head."


@dataclass(frozen=True)
class HeadConfig:
    """What is to be told of a cell, and how much that counts beside the generative loss."""

    task: Literal["classify", "regress"]
    label: str
    """Column of obs. Cells without a value (missing, empty, `unknown`) have no part in the head's loss."""
    class_weights: Literal["balanced", "none"] = "none"
    """`balanced`: every class weighs the same, however many cells it has; accuracy is then weighted likewise."""
    weight: float = 1.0
    """Of the head's loss, in nats (or SD squared) a labelled cell."""
    generative_weight: float = 0.0
    """Of the generative loss, in nats a gene; 0 leaves it out, which halves the arithmetic."""
    unknown_fraction: float = 0.05
    """Share of labelled held-out cells that `tftrain predict` is to call unknown: their least certain ones set the
    threshold."""

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.generative_weight < 0:
            raise RecipeError(
                f"head.weight is {self.weight:g} and head.generative_weight is {self.generative_weight:g}; the first "
                "must be above 0, the second at least 0"
            )
        if not 0 <= self.unknown_fraction < 1:
            raise RecipeError(f"head.unknown_fraction is {self.unknown_fraction:g}; it must be at least 0, and below 1")
        if self.task == "regress" and self.class_weights != "none":
            raise RecipeError("head.class_weights is for head.task=classify; a regression has no classes")


class Head(nn.Sequential):
    """LayerNorm and a linear layer: cell embeddings (C, D) -> logits (C, K), float32."""

    def __init__(self, width: int, n_outputs: int, device: torch.device | str = "cpu") -> None:
        super().__init__(nn.LayerNorm(width, device=device), nn.Linear(width, n_outputs, device=device))
        if torch.device(device).type != "meta":
            nn.init.normal_(self[1].weight, std=0.1 * width**-0.5)  # type: ignore[arg-type]
            nn.init.zeros_(self[1].bias)  # type: ignore[arg-type]

    def forward(self, embedding_CD: Tensor) -> Tensor:
        return super().forward(embedding_CD.to(self[1].weight.dtype)).float()  # type: ignore[arg-type]


@dataclass(frozen=True)
class LabelledBatch:
    """A batch for the head, one for the generative loss if there is any, and the labels of their cells."""

    reading: Batch
    generative: Batch | None
    label_C: Tensor
    """int64 class numbers or float32 standardised numbers; none at all for a filler."""
    weight_C: Tensor
    """float32: 0 for a cell without a label."""
    label_weight: float
    """Sum of `weight_C`, on the host."""
    head_scale: float = 0.0
    """Scored genes / label weights, both of the whole step."""

    @property
    def n_cells(self) -> int:
        return self.reading.n_cells

    @property
    def n_tokens(self) -> int:
        return self.reading.n_tokens + (self.generative.n_tokens if self.generative else 0)

    @property
    def n_scored(self) -> int:
        return self.reading.n_scored

    def to(self, device: torch.device | str) -> LabelledBatch:
        return replace(
            self,
            reading=self.reading.to(device),
            generative=self.generative.to(device) if self.generative else None,
            label_C=self.label_C.to(device),
            weight_C=self.weight_C.to(device),
        )

    def scaled(self, head_scale: float) -> LabelledBatch:
        """The same batch as a part of a step with this many scored genes a unit of label weight."""
        return replace(self, head_scale=head_scale)


@dataclass(frozen=True)
class Certainty:
    """What the head said of the labelled cells of a batch."""

    probability_C: np.ndarray
    """float32: of the likeliest class."""


class Labeller(nn.Module):
    """An architecture's module (with adapters in it, or without) and a head on its cell embeddings."""

    def __init__(self, base: nn.Module, width: int, labels: Labels, config: HeadConfig) -> None:
        super().__init__()
        device = next(base.parameters()).device
        self.base, self.head = base, Head(width, labels.n_outputs, device)
        self._config, self._spread = config, labels.spread
        self.noted: list[Certainty] | None = None
        """A list here collects what evaluation passes say of their cells."""

    def forward(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """`loss` and its parts; see the top of this file."""
        embedding_CD = self.base(batch.reading, ("embeddings",))["embeddings"]
        out_CK = self.head(embedding_CD)
        sums = self.base(batch.generative) if batch.generative is not None else {}
        if not len(batch.label_C):
            zero = out_CK.sum() * 0
            loss_head, right = zero, zero.detach()
        elif self._config.task == "classify":
            loss_C = F.cross_entropy(out_CK, batch.label_C, reduction="none")
            right_C = (out_CK.argmax(1) == batch.label_C).to(loss_C.dtype)
            loss_head, right = (batch.weight_C * loss_C).sum(), (batch.weight_C * right_C).sum()
            if self.noted is not None:
                peak_C = torch.softmax(out_CK.detach(), 1).amax(1)[batch.weight_C > 0]
                self.noted.append(Certainty(peak_C.cpu().numpy()))
        else:
            loss_C = (out_CK[:, 0] - batch.label_C) ** 2
            # Of held-out cells R2 is 1 - (mean square error) / (what predicting the training mean leaves).
            spread = 1.0 if self.training else self._spread
            loss_head = (batch.weight_C * loss_C).sum()
            right = (batch.weight_C * (1 - loss_C.detach() / spread)).sum()
        loss_head = loss_head * batch.head_scale
        loss = self._config.weight * loss_head
        if sums:
            loss = loss + self._config.generative_weight * sums["loss"]
        score = "accuracy" if self._config.task == "classify" else "r2"
        return {**sums, "loss": loss, "loss_head": loss_head.detach(), score: right.detach() * batch.head_scale}


class LabellingArchitecture:
    """An architecture whose batches carry labels; all else is the architecture's own."""

    def __init__(self, architecture: Architecture, labels: Labels, config: HeadConfig) -> None:
        self._own, self._labels, self._config = architecture, labels, config
        self.name, self.Config = architecture.name, architecture.Config
        self.build, self.set_genes, self.embed = architecture.build, architecture.set_genes, architecture.embed
        self.tokens_of, self.forward_flop = architecture.tokens_of, architecture.forward_flop
        self.checkpoint_activations = architecture.checkpoint_activations
        self.lora_targets = architecture.lora_targets

    def obs_columns(self, config: Any) -> tuple[str, ...]:
        """Those of the architecture, and the label."""
        return tuple(dict.fromkeys((*self._own.obs_columns(config), self._labels.column)))

    def collate(
        self, cells: Cells, config: Any, vocab: Vocab, *, seed: int, shuffle_genes: bool, max_tokens: int
    ) -> Sequence[LabelledBatch]:
        """The architecture's batches, with the labels of their cells."""

        def pack(is_shuffled: bool) -> Sequence[Batch]:
            return self._own.collate(cells, config, vocab, seed=seed, shuffle_genes=is_shuffled, max_tokens=max_tokens)

        reading = pack(False)
        generative: Sequence[Batch | None] = [None] * len(reading)
        if self._config.generative_weight:
            generative = pack(shuffle_genes)
        label_C, weight_C = self._labels.encode(cells.obs[self._labels.column])
        batches, first = [], 0
        for a, b in zip(reading, generative, strict=True):
            part = slice(first, first + a.n_cells)
            first += a.n_cells
            weights = torch.from_numpy(weight_C[part])
            batches.append(
                LabelledBatch(a, b, torch.from_numpy(label_C[part]), weights, float(weight_C[part].sum(dtype=float)))
            )
        return batches

    def empty(self, config: Any, vocab: Vocab) -> LabelledBatch:
        """The architecture's filler, without labels."""
        filler = self._own.empty(config, vocab)
        nothing = torch.zeros(0)
        return LabelledBatch(
            filler, filler if self._config.generative_weight else None, nothing.long(), nothing, label_weight=0.0
        )
