"""Size and behaviour of a TranscriptFormer: the `model:` block of a recipe. Defaults are the published Sapiens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError

UNKNOWN, START, END, PAD = "unknown", "[START]", "[END]", "[PAD]"
SPECIAL_TOKENS = (UNKNOWN, START, END, "[RD]", "[CELL]", PAD, "[MASK]")

# Labels of CELLxGENE's `assay` column. The published model has 40 entries whose list is not in the sources at hand, so
# this one is chosen: `unknown` and 39 labels of transcriptome assays. A published checkpoint brings its own list.
ASSAYS = (
    UNKNOWN,
    "10x 3' v1",
    "10x 3' v2",
    "10x 3' v3",
    "10x 3' v4",
    "10x 3' transcription profiling",
    "10x 5' v1",
    "10x 5' v2",
    "10x 5' v3",
    "10x 5' transcription profiling",
    "10x gene expression flex",
    "10x multiome",
    "sci-Plex",
    "BD Rhapsody Targeted mRNA",
    "BD Rhapsody Whole Transcriptome Analysis",
    "CEL-seq",
    "CEL-seq2",
    "DroNc-seq",
    "Drop-seq",
    "GEXSCOPE technology",
    "MARS-seq",
    "MERFISH",
    "Patch-seq",
    "Quartz-seq",
    "STRT-seq",
    "SPLiT-seq",
    "ScaleBio single cell RNA sequencing",
    "Seq-Well",
    "Seq-Well S3",
    "Slide-seqV2",
    "Smart-like",
    "Smart-seq",
    "Smart-seq v4",
    "Smart-seq2",
    "Smart-seq3",
    "TruDrop",
    "Visium Spatial Gene Expression",
    "inDrop",
    "microwell-seq",
    "sci-RNA-seq",
)


@dataclass(frozen=True)
class TranscriptFormerConfig:
    """Everything that decides a TranscriptFormer's shape and loss, except its vocabulary."""

    layers: int = 12
    """Transformer blocks."""
    heads: int = 16
    """Attention heads; each is width / heads wide."""
    width: int = 2048
    """D: width of a token."""
    feedforward_width: int = 2048
    """Hidden width of a block's feed-forward part."""
    gene_head_width: int = 2048
    """Hidden width of the gene head, whose last layer has gene_head_width x vocabulary weights. Published: 2048 for
    Sapiens and Exemplar, 512 for Metazoa."""
    genes_per_cell: int = 2047
    """L: expressed genes of a cell that are kept, and what the cell embedding is divided by. Attention costs its
    square."""
    assays: list[str] = field(default_factory=lambda: list(ASSAYS))
    """Names that the assay token tells apart, the first is `unknown`; any other assay counts as unknown, whose token no
    gene attends to. An empty list makes a model without assay token."""
    dropout: float = 0.1
    """Probability, in the feed-forward part and in every MLP."""
    softcap: float = 10.0
    """Attention scores and gene logits are bent to softcap * tanh(x / softcap); 0 leaves them as they are."""
    attention_count_bias: bool = True
    """True adds log1p(count) of the attended gene to attention scores, as published."""
    clip_counts: int = 30
    """Counts above this are taken for this."""
    normalize_to_scale: float = 0.0
    """Total to which a cell's counts are scaled before clipping; 0 keeps raw counts, as published."""
    count_eps: float = 1e-6
    """Added to the expected count before its logarithm, and to counts in the attention bias."""
    count_loss: Literal["softplus_approx", "exact"] = "softplus_approx"
    """`softplus_approx` (published) or `exact`: how the zero-truncated Poisson's normaliser is computed."""
    gene_loss_weight: float = 1.0
    """Weight of the gene loss beside the count loss."""
    attention: Literal["auto", "plain", "flex"] = "auto"
    """`auto` (by device), `plain` (any device, the reference) or `flex` (FlexAttention, meant for CUDA)."""
    special_tokens: list[str] = field(default_factory=lambda: list(SPECIAL_TOKENS))
    """Vocabulary rows before the genes, in order. Change it only to match a published checkpoint."""

    def __post_init__(self) -> None:
        sizes = ("layers", "heads", "width", "feedforward_width", "gene_head_width", "genes_per_cell", "clip_counts")
        for name in sizes:
            if getattr(self, name) < 1:
                raise RecipeError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.width % self.heads:
            raise RecipeError(f"model.width is {self.width}, not a multiple of model.heads ({self.heads}); change one")
        if self.width < 2:
            raise RecipeError(f"model.width is {self.width}; the count head needs at least 2")
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"model.dropout is {self.dropout}; it must be at least 0 and below 1")
        for name in ("softcap", "normalize_to_scale", "gene_loss_weight"):
            if getattr(self, name) < 0:
                raise RecipeError(f"model.{name} is {getattr(self, name)}; it must be 0 or more")
        if not self.count_eps > 0:
            raise RecipeError(f"model.count_eps is {self.count_eps}; it must be above 0, or log(0) appears in the loss")
        _one_of("count_loss", self.count_loss, ("softplus_approx", "exact"))
        _one_of("attention", self.attention, ("auto", "plain", "flex"))
        for name, required in (("special_tokens", (UNKNOWN, START, END, PAD)), ("assays", (UNKNOWN,))):
            values = getattr(self, name)
            if name == "assays" and not values:
                continue
            missing = [value for value in required if value not in values]
            if missing or len(set(values)) != len(values):
                raise RecipeError(f"model.{name} needs {', '.join(required)}, each value once; got {list(values)}")
        if self.assays and self.assays[0] != UNKNOWN:
            raise RecipeError(f"model.assays starts with {self.assays[0]!r}; the first entry must be {UNKNOWN!r}")

    @property
    def n_special(self) -> int:
        """Vocabulary rows before the first gene."""
        return len(self.special_tokens)

    @property
    def assay_tokens_per_cell(self) -> int:
        """1 with an assay token before [START], else 0."""
        return int(bool(self.assays))

    def special(self, name: str) -> int:
        """Token id of a special token."""
        return self.special_tokens.index(name)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"model.{name} is {value!r}; choose one of {', '.join(allowed)}")


def protein_VE(config: TranscriptFormerConfig, vocab: Vocab) -> np.ndarray:
    """float32 (V, E): special rows, then the vocabulary's genes.

    Special rows are uniform [0, 1) from numpy's legacy RandomState(42), drawn row by row in the order of
    `config.special_tokens` (MODEL.md 1.7).
    """
    special_SE = np.random.RandomState(42).rand(config.n_special, vocab.protein_width).astype(np.float32)
    return np.concatenate([special_SE, vocab.protein_GE()])
