"""The module: published sizes, causality, independence of batch mates, and what is in no checkpoint."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from parity import SIMULATED, Case

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.models.transcriptformer import ARCHITECTURE, TranscriptFormerConfig
from tftrain.models.transcriptformer.model import parameter_count

SMALL = TranscriptFormerConfig(
    layers=2,
    heads=2,
    width=16,
    feedforward_width=24,
    gene_head_width=8,
    genes_per_cell=31,
    assays=["unknown", "10x 3' v2"],
    dropout=0.0,
)


@pytest.fixture(scope="module")
def small():
    """(module, vocabulary, 12 simulated cells)."""
    vocab = Vocab.load([SIMULATED / "checkpoint" / "vocabs" / "train_species_gene.h5"])
    torch.manual_seed(0)
    return ARCHITECTURE.build(SMALL, vocab).double(), vocab, Case("simulated_cells", SIMULATED).cells(vocab)


def batches_of(cells: Cells, vocab: Vocab, config=SMALL, max_tokens=10_000):
    return ARCHITECTURE.collate(cells, config, vocab, seed=3, shuffle_genes=True, max_tokens=max_tokens)


@pytest.mark.parametrize(
    ("vocabulary", "gene_head_width", "trainable", "frozen"),
    [
        # MODEL.md 1.1: encoder 302,088,192 + gene MLP 9,445,376 + count MLP 4,198,401 + V + 2048 h + 3 h + h V + V
        # + 2048 x 40, and a frozen table of V x 2560.
        (23_829, 2048, 368_863_787, 61_002_240),
        (110_291, 2048, 546_110_887, 282_344_960),
        (247_388, 512, 444_021_433, 633_313_280),
    ],
    ids=["Sapiens", "Exemplar", "Metazoa"],
)
def test_published_sizes(vocabulary, gene_head_width, trainable, frozen):
    config = TranscriptFormerConfig(gene_head_width=gene_head_width)
    module = ARCHITECTURE.build(config, Vocab.placeholder(vocabulary - config.n_special, 2560), device="meta")
    assert parameter_count(module) == trainable
    assert parameter_count(module.transformer_encoder) == 302_088_192
    assert parameter_count(module.gene_embeddings) == 9_445_376
    assert parameter_count(module.mu.mlp) == 4_198_401
    assert sum(buffer.numel() for buffer in module.buffers()) == frozen


def test_protein_table_is_in_no_state_dict_and_no_parameter(small):
    module, vocab, _ = small
    assert module.gene_embeddings.protein_VE.shape == (7 + vocab.n_genes, 40)
    table = (7 + vocab.n_genes) * 40
    assert all(tensor.numel() != table for tensor in [*module.state_dict().values(), *module.parameters()])


def test_gene_head_is_causal(small):
    """The Jacobian of the gene logits by the blocks' inputs is zero for later tokens and not for earlier ones. The
    count head is not causal, as published: its softmax runs over the cell (MODEL.md 1.12)."""
    module, vocab, cells = small
    (batch,) = batches_of(cells.slice(0, 1), vocab)
    shift_TD = torch.zeros(batch.n_tokens, SMALL.width, dtype=torch.float64, requires_grad=True)
    first = module.transformer_encoder.encoder_layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: (args[0] + shift_TD, *args[1:]))
    try:
        outputs = module(batch, ("gene_logits", "mu"), count_bias_on_self=False)
    finally:
        hook.remove()
    for position, logits_G in zip(batch.scored_S.tolist(), outputs["gene_logits"]):
        (by_shift_TD,) = torch.autograd.grad(logits_G.square().sum(), shift_TD, retain_graph=True)
        assert by_shift_TD[position + 1 :].abs().sum() == 0
        assert by_shift_TD[: position + 1].abs().sum(1).min() > 0
    (by_shift_TD,) = torch.autograd.grad(outputs["mu"][0], shift_TD)
    assert by_shift_TD[-2].abs().sum() > 0


def test_gene_head_sees_counts_of_earlier_tokens_only(small):
    """A changed count changes the gene logits of later positions, not of its own nor of earlier ones."""
    module, vocab, cells = small
    (batch,) = batches_of(cells.slice(0, 1), vocab)
    before = module(batch, ("gene_logits",), count_bias_on_self=False)["gene_logits"]
    at = batch.n_scored // 2
    counts_T = batch.input_count_T.clone()
    counts_T[batch.scored_S[at]] += 20
    changed = dataclasses.replace(batch, input_count_T=counts_T)
    after = module(changed, ("gene_logits",), count_bias_on_self=False)["gene_logits"]
    is_changed_S = (before != after).any(1)
    assert not is_changed_S[: at + 1].any()
    assert is_changed_S[at + 1 :].all()
    on_self = module(changed, ("gene_logits",))["gene_logits"] != module(batch, ("gene_logits",))["gene_logits"]
    assert on_self.any(1)[at], "in embedding mode the bias is on the diagonal too"


def test_a_cell_does_not_depend_on_its_batch_mates(small):
    module, vocab, cells = small
    keys = ("embeddings", "llh", "gene_llh", "cge")
    (together,) = (ARCHITECTURE.embed(module, batch, keys) for batch in batches_of(cells, vocab))
    alone = [ARCHITECTURE.embed(module, batch, keys) for batch in batches_of(cells, vocab, max_tokens=33)]
    assert len(alone) > 6
    for key in keys:
        torch.testing.assert_close(torch.cat([part[key] for part in alone]), together[key], rtol=1e-10, atol=1e-12)


def test_losses_and_gradients_add_up_over_micro_batches(small):
    module, vocab, cells = small

    def run(max_tokens):
        module.zero_grad()
        sums, n_scored = torch.zeros(3, dtype=torch.float64), 0
        for batch in batches_of(cells, vocab, max_tokens=max_tokens):
            out = module(batch)
            out["loss"].backward()
            sums += torch.stack([out[key].detach() for key in ("loss", "loss_gene", "loss_count")])
            n_scored += batch.n_scored
        return sums, n_scored, {name: p.grad.clone() for name, p in module.named_parameters()}

    (sums, n_scored, grads), (sums_parts, n_parts, grads_parts) = run(10_000), run(40)
    assert n_scored == n_parts
    torch.testing.assert_close(sums_parts, sums)
    assert float(sums[0]) == pytest.approx(float(sums[1] + sums[2]))
    for name, grad in grads.items():
        torch.testing.assert_close(grads_parts[name], grad, rtol=1e-7, atol=1e-9, msg=name)


@pytest.mark.parametrize("assays", [["unknown", "10x 3' v2"], []], ids=["assay token", "none"])
def test_a_filler_reaches_every_parameter_and_changes_none(small, assays):
    _, vocab, _ = small
    config = dataclasses.replace(SMALL, assays=assays)
    module, batch = ARCHITECTURE.build(config, vocab), ARCHITECTURE.empty(config, vocab)
    assert (batch.n_cells, batch.n_tokens, batch.n_scored) == (0, 0, 0)
    out = module(batch)
    out["loss"].backward()
    assert {key: float(value.detach()) for key, value in out.items()} == {"loss": 0, "loss_gene": 0, "loss_count": 0}
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_activation_checkpointing_changes_nothing(small):
    module, vocab, cells = small
    (batch,) = batches_of(cells, vocab)
    grads = []
    for is_on in (False, True):
        module.transformer_encoder.activation_checkpointing = is_on
        module.zero_grad()
        module(batch)["loss"].backward()
        grads.append([parameter.grad.clone() for parameter in module.parameters()])
    module.transformer_encoder.activation_checkpointing = False
    for plain, checkpointed in zip(*grads):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("path", ["plain", "flex"])
def test_attention_paths_agree_in_the_whole_model(small, path):
    module, vocab, cells = small
    (batch,) = batches_of(cells, vocab)
    keys = ("embeddings", "llh", "gene_llh")
    expected = ARCHITECTURE.embed(module, batch, keys)
    other = ARCHITECTURE.build(dataclasses.replace(SMALL, attention=path), vocab)
    other.load_state_dict(module.state_dict())
    for key, value in ARCHITECTURE.embed(other, batch, keys).items():
        torch.testing.assert_close(value, expected[key].to(value.dtype), rtol=1e-4, atol=1e-5)


def test_embedding_runs_no_head(small):
    module, vocab, cells = small
    (batch,) = batches_of(cells, vocab)
    called = []
    heads = (module.mu, module.gene_id_head)
    hooks = [head.register_forward_hook(lambda head, *_: called.append(type(head).__name__)) for head in heads]
    ARCHITECTURE.embed(module, batch, ("embeddings", "cge"))
    assert called == []
    ARCHITECTURE.embed(module, batch, ("llh",))
    assert called == ["CountHead"]
    for hook in hooks:
        hook.remove()


def test_training_starts_from_uniform_predictions_and_learns(small):
    _, vocab, cells = small
    torch.manual_seed(1)
    module = ARCHITECTURE.build(SMALL, vocab)
    (batch,) = batches_of(cells, vocab)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        out = module(batch)
        (out["loss"] / batch.n_scored).backward()
        optimizer.step()
        losses.append(float(out["loss_gene"]) / batch.n_scored)
    assert losses[0] == pytest.approx(np.log(7 + vocab.n_genes), abs=0.1)
    assert losses[-1] < losses[0] - 0.5


def test_mixed_precision_stays_close(small):
    """bf16 by autocast: losses within a percent, gradients finite everywhere."""
    module, vocab, cells = small
    single = ARCHITECTURE.build(SMALL, vocab)
    single.load_state_dict(module.state_dict())
    (batch,) = batches_of(cells, vocab)
    with torch.autocast("cpu", torch.bfloat16):
        out = single(batch)
    out["loss"].backward()
    for key, expected in module(batch).items():
        assert float(out[key].detach()) == pytest.approx(float(expected.detach()), rel=0.01), key
    assert all(torch.isfinite(parameter.grad).all() for parameter in single.parameters())


def test_lora_targets_are_linear_layers_of_the_blocks(small):
    module, _, _ = small
    targets = ARCHITECTURE.lora_targets(module)
    assert len(targets) == SMALL.layers * 6
    assert all(isinstance(module.get_submodule(name), torch.nn.Linear) for name in targets)


@pytest.mark.parametrize(
    ("gene_head_width", "vocabulary", "forward_gflop_a_token"),
    [(2048, 23_829, 0.857), (2048, 110_291, 1.211), (512, 247_388, 1.006)],
    ids=["Sapiens", "Exemplar", "Metazoa"],
)
def test_arithmetic_of_the_published_models(gene_head_width, vocabulary, forward_gflop_a_token):
    """MODEL.md 1.11, which counts the gene embedding twice a token, as the published package computes it."""
    config = TranscriptFormerConfig(gene_head_width=gene_head_width)
    genes = Vocab.placeholder(vocabulary - config.n_special, 2560)
    second_embedding = 2 * (2560 * 2048 + 2048 * 2048)
    gflop = (ARCHITECTURE.forward_flop(config, genes, 2048) / 2048 + second_embedding) / 1e9
    assert gflop == pytest.approx(forward_gflop_a_token, abs=6e-4)
