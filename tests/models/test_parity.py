"""The published package and this one agree on what the fixtures hold, to 1e-4 relative in fp32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from parity import NAMES, Case, case, relative

from tftrain.cells.vocab import Vocab
from tftrain.models.transcriptformer import ARCHITECTURE, PackedBatch, TranscriptFormer
from tftrain.models.transcriptformer.upstream import Published, load_published

TOLERANCE = 1e-4


def embedding_outputs(of: Case, keys: tuple[str, ...], max_tokens: int) -> dict[str, np.ndarray]:
    published = load_published(of.checkpoint)
    module, vocab = published.build(), published.vocab
    if of.new_table:
        vocab = Vocab.load([of.new_table])
        ARCHITECTURE.set_genes(module, published.config, vocab)
    batches = ARCHITECTURE.collate(
        of.cells(vocab), published.config, vocab, seed=0, shuffle_genes=False, max_tokens=max_tokens
    )
    parts = [ARCHITECTURE.embed(module, batch, keys) for batch in batches]
    outputs = {key: torch.cat([part[key] for part in parts]).numpy() for key in keys}
    genes = [np.array(vocab.gene_ids)[batch.gene_row_S] for batch in batches]
    cells = [batch.cell_S.numpy() for batch in batches]
    first = np.cumsum([0] + [batch.n_cells for batch in batches])
    outputs["genes"] = np.concatenate(genes)
    outputs["cells"] = np.concatenate([cell + at for cell, at in zip(cells, first)])
    return outputs


@pytest.mark.parametrize("max_tokens", [160, 10_000], ids=["several batches", "one batch"])
@pytest.mark.parametrize("name", NAMES)
def test_embedding_mode(name, max_tokens):
    of = case(name)
    expected = of.expected
    scores = ("llh", "gene_llh") if "llh" in expected else ()
    got = embedding_outputs(of, ("embeddings", "cge", *scores), max_tokens)
    assert relative(got["embeddings"], expected["embeddings"]) < TOLERANCE
    assert relative(got["cge"], expected["cge_embeddings"]) < TOLERANCE
    assert got["genes"].tolist() == [gene.decode() for gene in expected["cge_gene_names"]]
    assert got["cells"].tolist() == expected["cge_cell_indices"].tolist()
    if scores:
        assert relative(got["llh"], expected["llh"]) < TOLERANCE
        assert relative(got["gene_llh"], expected["gene_llh"][expected["gene_llh"] != 0]) < TOLERANCE


def training_batch(of: Case) -> tuple[Published, TranscriptFormer, PackedBatch, np.ndarray]:
    """The fixture's training batch: the first 8 cells, and which of its padded positions (C, L) are real."""
    published = load_published(of.checkpoint)
    cells = of.cells(published.vocab).slice(0, 8)
    (batch,) = ARCHITECTURE.collate(
        cells, published.config, published.vocab, seed=0, shuffle_genes=False, max_tokens=10_000
    )
    is_real_CL = of.expected["train_gene_token_indices"] != published.config.special("[PAD]")
    return published, published.build(), batch, is_real_CL


@pytest.mark.parametrize("name", NAMES[:3])
def test_batch_holds_the_published_tokens(name):
    of = case(name)
    published, _, batch, is_real_CL = training_batch(of)
    expected = of.expected
    genes_S = expected["train_gene_token_indices"][is_real_CL]
    assert (batch.gene_row_S + published.config.n_special).tolist() == genes_S.tolist()
    counts_C = np.where(is_real_CL, expected["train_gene_counts"], 0).sum(1)
    assert batch.total_count_C.tolist() == counts_C.tolist()
    if batch.assay_C is not None:
        assert batch.assay_C.tolist() == expected["train_aux_token_indices"][:, 0].tolist()


@pytest.mark.parametrize("name", NAMES[:3])
def test_training_mode(name):
    of = case(name)
    _, module, batch, is_real_CL = training_batch(of)
    expected = of.expected
    with torch.no_grad():
        got = module(batch, ("mu", "gene_logits"), count_bias_on_self=False)
        losses = module(batch)
    assert relative(got["mu"].numpy(), expected["train_mu"][is_real_CL]) < TOLERANCE
    assert relative(got["gene_logits"].numpy(), expected["train_gene_logit"][is_real_CL]) < TOLERANCE
    count_loss = float(losses["loss_count"]) / batch.n_scored
    assert count_loss == pytest.approx(float(expected["train_count_loss"]), rel=TOLERANCE)
    # The published gene loss is a mean over all positions of the padded batch: is_real_CL.mean() x ours.
    gene_loss = float(losses["loss_gene"]) / batch.n_scored * is_real_CL.mean()
    assert gene_loss == pytest.approx(float(expected["train_gene_loss"]), rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES[:3])
def test_gradient_norms(name):
    of = case(name)
    published, module, batch, is_real_CL = training_batch(of)
    # loss / n_scored is then the published count loss + gene loss, with its mean over all positions.
    weight = batch.n_scored / is_real_CL.size
    module.config = dataclasses.replace(published.config, gene_loss_weight=weight)
    (module(batch)["loss"] / batch.n_scored).backward()
    norms = {
        key.decode(): float(norm)
        for key, norm in zip(of.expected["train_grad_names"], of.expected["train_grad_norms"], strict=True)
    }
    own = {key: float(parameter.grad.norm()) for key, parameter in module.named_parameters()}
    assert own.keys() == norms.keys()
    # Both shift all count logits of a cell alike, which changes nothing: their true gradient is zero.
    for key in ("mu.mlp.layers.2.bias", "mu.mlp.layers.4.bias"):
        assert own.pop(key) < 1e-5
    for key, norm in own.items():
        assert norm == pytest.approx(norms[key], rel=TOLERANCE), key
