"""The TranscriptFormer: gene embeddings from proteins, a causal transformer over genes, a count head and a gene head.

In: a PackedBatch. Out: sums of the losses, or the outputs asked for (MODEL.md 1.2-1.6). Module names are the published
ones, so that a state dict differs from the published file only by the protein table, which is a buffer outside it.

Shapes: T tokens, S scored positions, C cells, U distinct genes, D width, E protein width, V vocabulary rows, L genes
kept of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tftrain.models.transcriptformer import attention
from tftrain.models.transcriptformer.batch import PackedBatch
from tftrain.models.transcriptformer.config import TranscriptFormerConfig
from tftrain.models.transcriptformer.loss import GeneProjection, count_nll, expected_count

OUTPUT_KEYS = ("embeddings", "llh", "gene_llh", "cge", "mu", "gene_logits")


class Mlp(nn.Module):
    """Linear, ReLU, LayerNorm, Dropout, Linear, with biases; `last` replaces the second Linear."""

    def __init__(
        self,
        n_in: int,
        hidden: int,
        n_out: int,
        dropout: float,
        device: torch.device | str,
        last: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(n_in, hidden, device=device),
            nn.ReLU(),
            nn.LayerNorm(hidden, device=device),
            nn.Dropout(dropout),
            last or nn.Linear(hidden, n_out, device=device),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class GeneHead(Mlp):
    """The MLP whose last layer is a GeneProjection."""

    def forward(self, x_SD: Tensor, target_S: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Logits (S, V), or with targets what GeneProjection returns."""
        *before, projection = self.layers
        for layer in before:
            x_SD = layer(x_SD)
        return projection(x_SD, target_S)


class GeneEmbedding(nn.Module):
    """Frozen protein vector of a vocabulary row -> token of width D."""

    def __init__(
        self, n_tokens: int, protein_width: int, width: int, dropout: float, device: torch.device | str
    ) -> None:
        super().__init__()
        self.mlp = Mlp(protein_width, width, width, dropout, device)
        self.protein_VE: Tensor
        # A buffer outside the state dict: moves with the module, is in no checkpoint, optimiser or ZeRO partition.
        self.register_buffer("protein_VE", torch.zeros(n_tokens, protein_width, device=device), persistent=False)

    def forward(self, row_U: Tensor) -> Tensor:
        """(U) rows -> (U, D)."""
        return self.mlp(self.protein_VE[row_U].to(next(self.mlp.parameters()).dtype))


class CountHead(nn.Module):
    """Logit of each gene's share in the cell's counts: a bias a gene + an MLP of the context and the gene."""

    def __init__(self, n_tokens: int, width: int, dropout: float, device: torch.device | str) -> None:
        super().__init__()
        self.gene_embedding = nn.Embedding(n_tokens, 1, device=device)
        self.mlp = Mlp(2 * width, width // 2, 1, dropout, device)

    def forward(self, context_SD: Tensor, gene_SD: Tensor, row_S: Tensor) -> Tensor:
        """Logits (S)."""
        logit_S1 = self.mlp(torch.cat([context_SD, gene_SD], -1))
        return (logit_S1 + self.gene_embedding(row_S))[:, 0]


class SelfAttention(nn.Module):
    """Projections q, k, v, out (`linears.0` to `.3`) around one of the attention paths."""

    def __init__(self, width: int, heads: int, device: torch.device | str) -> None:
        super().__init__()
        self.heads = heads
        self.linears = nn.ModuleList(nn.Linear(width, width, bias=False, device=device) for _ in range(4))

    def forward(self, x_TD: Tensor, attend: attention.Attend) -> Tensor:
        q, k, v = (self.linears[i](x_TD).unflatten(-1, (self.heads, -1)) for i in range(3))
        return self.linears[3](attend(q, k, v).flatten(-2))


class Block(nn.Module):
    """x <- LN1(x);  x <- Attn(x) + x;  x <- LN2(x);  x <- W2 drop(gelu(W1 x)) + x. The residual is the normalised x."""

    def __init__(self, config: TranscriptFormerConfig, device: torch.device | str) -> None:
        super().__init__()
        self.self_attn = SelfAttention(config.width, config.heads, device)
        self.linear1 = nn.Linear(config.width, config.feedforward_width, bias=False, device=device)
        self.linear2 = nn.Linear(config.feedforward_width, config.width, bias=False, device=device)
        self.norm1 = nn.LayerNorm(config.width, device=device)
        self.norm2 = nn.LayerNorm(config.width, device=device)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, attend: attention.Attend) -> Tensor:
        x_TD = self.norm1(x_TD)
        x_TD = self.self_attn(x_TD, attend) + x_TD
        x_TD = self.norm2(x_TD)
        return self.linear2(self.dropout(F.gelu(self.linear1(x_TD)))) + x_TD


class Encoder(nn.Module):
    """The stack of blocks; there is no final norm."""

    def __init__(self, config: TranscriptFormerConfig, device: torch.device | str) -> None:
        super().__init__()
        self.encoder_layers = nn.ModuleList(Block(config, device) for _ in range(config.layers))
        self.activation_checkpointing = False

    def forward(self, x_TD: Tensor, attend: attention.Attend) -> Tensor:
        for block in self.encoder_layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, attend, use_reentrant=False)
            else:
                x_TD = block(x_TD, attend)
        return x_TD


class TranscriptFormer(nn.Module):
    """The whole model for a vocabulary of `n_genes` genes with protein vectors of width `protein_width`."""

    def __init__(
        self, config: TranscriptFormerConfig, n_genes: int, protein_width: int, *, device: torch.device | str = "cpu"
    ) -> None:
        """Fresh weights of torch's global generator (see `_initialise`); a zero protein table before `set_proteins`."""
        super().__init__()
        self.config = config
        n_tokens, width, dropout = config.n_special + n_genes, config.width, config.dropout
        self.gene_embeddings = GeneEmbedding(n_tokens, protein_width, width, dropout, device)
        # A ModuleDict named by obs column, as published.
        self.aux_embeddings = nn.ModuleDict()
        if config.assays:
            self.aux_embeddings["assay"] = nn.Embedding(len(config.assays), width, device=device)
        self.transformer_encoder = Encoder(config, device)
        self.mu = CountHead(n_tokens, width, dropout, device)
        projection = GeneProjection(config.gene_head_width, n_tokens, config.softcap, device)
        self.gene_id_head = GeneHead(width, config.gene_head_width, n_tokens, dropout, device, projection)
        if torch.device(device).type != "meta":
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Linear weights: normal of std fan_in^-1/2, those that close a residual branch x (2 layers)^-1/2, the two
        output layers x 1/10 (training starts from nearly uniform predictions). Biases and count biases 0, assays
        normal(0, 1)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        branch_scale = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if name.endswith(("linears.3.weight", "linear2.weight")):
                parameter.mul_(branch_scale)
            elif name in ("gene_id_head.layers.4.weight", "mu.mlp.layers.4.weight"):
                parameter.mul_(0.1)
        nn.init.zeros_(self.mu.gene_embedding.weight)

    @torch.no_grad()
    def set_proteins(self, protein_VE: np.ndarray) -> None:
        """Takes the frozen table (V, E), special rows first. Another V than the model's is for embeddings only."""
        old = self.gene_embeddings.protein_VE
        assert protein_VE.shape[1] == old.shape[1], f"protein vectors {protein_VE.shape[1]} wide, model {old.shape[1]}"
        self.gene_embeddings.protein_VE = torch.from_numpy(protein_VE).to(old.device, old.dtype)

    def forward(
        self, batch: PackedBatch, keys: Sequence[str] | None = None, *, count_bias_on_self: bool | None = None
    ) -> dict[str, Tensor]:
        """Without `keys` the training losses: `loss` (with gradient), `loss_gene`, `loss_count` (detached), sums over
        scored positions; loss = loss_count + gene_loss_weight * loss_gene.

        With `keys` those outputs, in embedding mode (MODEL.md 1.3) unless `count_bias_on_self` is False:
        `embeddings` (C, D); `llh` (C), mean count NLL; `gene_llh` (S), cross-entropy; `cge` (S, D), outputs that belong
        to the genes `batch.gene_row_S`; `mu` (S), expected counts; `gene_logits` (S, V), before the softcap, for tests
        and small batches. A head that no key needs does not run.
        """
        on_self = keys is not None if count_bias_on_self is None else count_bias_on_self
        gene_UD = self.gene_embeddings(batch.distinct_U)
        h_TD = self._encode(batch, gene_UD, on_self)
        h_SD = h_TD[batch.scored_S]
        if keys is None:
            return self._losses(batch, gene_UD, h_SD)
        outputs: dict[str, Tensor] = {}
        for key in keys:
            assert key in OUTPUT_KEYS, f"unknown output {key!r}; known: {OUTPUT_KEYS}"
        if "embeddings" in keys:
            outputs["embeddings"] = self._pool(batch, h_TD, h_SD)
        if "cge" in keys:
            outputs["cge"] = h_SD
        if "mu" in keys or "llh" in keys:
            mu_S = self._expected_count(batch, gene_UD, h_SD)
            outputs |= {"mu": mu_S} if "mu" in keys else {}
            if "llh" in keys:
                nll_S = self._count_nll(batch, mu_S)
                n_C = torch.as_tensor(batch.n_genes_C, device=nll_S.device)
                outputs["llh"] = torch.zeros_like(n_C, dtype=nll_S.dtype).index_add(0, batch.cell_S, nll_S) / n_C
        if "gene_llh" in keys:
            outputs["gene_llh"] = self.gene_id_head(h_SD, batch.target_S)[1]
        if "gene_logits" in keys:
            outputs["gene_logits"] = self.gene_id_head(h_SD)
        return outputs

    def _pool(self, batch: PackedBatch, h_TD: Tensor, h_SD: Tensor) -> Tensor:
        """Cell embeddings (C, D), float32: sum over START and genes, assay left out, divided by L and not by their
        number (MODEL.md 1.6)."""
        wide = torch.promote_types(h_TD.dtype, torch.float32)
        sum_CD = h_TD.new_zeros(len(batch.total_count_C), h_TD.shape[1], dtype=wide)
        sum_CD = sum_CD.index_add(0, batch.cell_S, h_SD.to(wide))
        sum_CD = sum_CD.index_add(0, batch.rest_cell_R, h_TD[batch.rest_R].to(wide))
        return sum_CD / self.config.genes_per_cell

    def _losses(self, batch: PackedBatch, gene_UD: Tensor, h_SD: Tensor) -> dict[str, Tensor]:
        loss_count = self._count_nll(batch, self._expected_count(batch, gene_UD, h_SD)).sum()
        loss_gene = self.gene_id_head(h_SD, batch.target_S)[0]
        if batch.is_filler:
            loss_count, loss_gene = loss_count * 0, loss_gene * 0
        loss = loss_count + self.config.gene_loss_weight * loss_gene
        return {"loss": loss, "loss_gene": loss_gene.detach(), "loss_count": loss_count.detach()}

    def _expected_count(self, batch: PackedBatch, gene_UD: Tensor, h_SD: Tensor) -> Tensor:
        logit_S = self.mu(h_SD, gene_UD[batch.gene_S], batch.distinct_U[batch.gene_S])
        return expected_count(logit_S, batch.cell_S, batch.total_count_C)

    def _count_nll(self, batch: PackedBatch, mu_S: Tensor) -> Tensor:
        exact = self.config.count_loss == "exact"
        return count_nll(mu_S, batch.target_count_S, eps=self.config.count_eps, exact=exact)

    def _encode(self, batch: PackedBatch, gene_UD: Tensor, on_self: bool) -> Tensor:
        """Outputs (T, D), followed by those of filling tokens on a path with fixed shapes."""
        device, n_tokens = gene_UD.device, len(batch.input_T)
        use_flex = self.config.attention == "flex" or (self.config.attention == "auto" and device.type == "cuda")
        filling = attention.padded_tokens(n_tokens, batch.max_tokens) - n_tokens if use_flex else 0
        # Row 0 of distinct_U, [START], stands in for filling tokens; no cell's token sees them.
        x_TD = gene_UD[F.pad(batch.input_T, (0, filling))]
        if batch.assay_C is not None:
            assay_CD = self.aux_embeddings["assay"](batch.assay_C)
            assert batch.assay_position_C is not None
            x_TD = x_TD.index_copy(0, batch.assay_position_C, assay_CD.to(x_TD.dtype))
        log_count_T, hidden_T = None, batch.is_hidden_key_T
        if self.config.attention_count_bias:
            log_count_T = torch.log1p(F.pad(batch.input_count_T, (0, filling)) + self.config.count_eps)
        if hidden_T is not None:
            hidden_T = F.pad(hidden_T, (0, filling))
        bias = attention.KeyBias(log_count_T, hidden_T, self.config.softcap, on_self)
        if use_flex:
            attend = attention.flex(batch.n_tokens_C, n_tokens + filling, bias, device)
        else:
            attend = attention.plain(batch.n_tokens_C, self.config.heads, bias, device)
        return self.transformer_encoder(x_TD, attend)


def forward_flop(config: TranscriptFormerConfig, n_tokens: int, n_special_and_genes: int, protein_width: int) -> float:
    """FLOP (2 x multiply-add) of the forward pass of one cell of `n_tokens` tokens, causal attention counted half
    (MODEL.md 1.11), the gene embedding once a position, both heads at every position."""
    width, hidden = config.width, config.gene_head_width
    block = 4 * width**2 + 2 * width * config.feedforward_width
    embedding = protein_width * width + width**2
    count_head = 2 * width * (width // 2) + width // 2
    gene_head = width * hidden + hidden * n_special_and_genes
    linear = config.layers * block + embedding + count_head + gene_head
    scores = config.layers * width * n_tokens  # q.k and p.v, each width * n_tokens / 2 where causal
    return 2.0 * n_tokens * (linear + scores)


def parameter_count(module: nn.Module) -> int:
    """Trainable parameters; the protein table is none."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters() if parameter.requires_grad)
