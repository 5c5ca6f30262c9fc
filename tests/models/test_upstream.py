"""The published layout: read, written, read again; refusals that name the file, the key and both shapes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from parity import SIMULATED

from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError, CheckpointError
from tftrain.models.transcriptformer import ARCHITECTURE, TranscriptFormerConfig
from tftrain.models.transcriptformer.upstream import is_published, load_published, save_published

CHECKPOINT = SIMULATED / "checkpoint"


@pytest.fixture
def copy(tmp_path):
    """A checkpoint folder that may be broken."""
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


def test_configuration_in_our_words():
    published = load_published(CHECKPOINT)
    assert published.config == TranscriptFormerConfig(
        layers=2,
        heads=2,
        width=16,
        feedforward_width=24,
        gene_head_width=12,
        genes_per_cell=31,
        assays=["unknown", "10x 3' v3", "10x 3' v2", "Smart-seq2"],
        dropout=0.0,
    )
    assert published.vocab.n_genes == 116
    assert is_published(CHECKPOINT)
    assert not is_published(CHECKPOINT.parent)


def test_special_rows_are_those_of_the_published_file():
    published = load_published(CHECKPOINT)
    built = ARCHITECTURE.build(published.config, published.vocab)
    torch.testing.assert_close(built.gene_embeddings.protein_VE, published.protein_VE, rtol=0, atol=0)


def test_read_and_written_again_is_equal(tmp_path):
    published = load_published(CHECKPOINT)
    out = tmp_path / "again"
    save_published(
        out,
        published.config,
        published.vocab,
        published.weights,
        table=published.protein_VE,
        raw_config=published.raw_config,
    )
    files = sorted(path.relative_to(CHECKPOINT) for path in CHECKPOINT.rglob("*") if path.is_file())
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == files
    assert json.loads((out / "config.json").read_text()) == json.loads((CHECKPOINT / "config.json").read_text())
    old, new = (torch.load(folder / "model_weights.pt", weights_only=True) for folder in (CHECKPOINT, out))
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


@pytest.mark.parametrize("assays", [["unknown", "10x"], []], ids=["assay token", "none"])
def test_our_own_model_written_and_read(tmp_path, assays):
    special = ["unknown", "[PAD]", "[START]", "[END]", "[RD]", "[CELL]", "[MASK]"]
    config = TranscriptFormerConfig(
        layers=1,
        heads=2,
        width=8,
        gene_head_width=4,
        assays=assays,
        special_tokens=special,
        count_loss="exact",
        softcap=0.0,
    )
    vocab = Vocab.of(["A", "B", "C"], np.random.default_rng(0).normal(size=(3, 5)))
    module = ARCHITECTURE.build(config, vocab)
    save_published(tmp_path / "out", config, vocab, module.state_dict())
    again = load_published(tmp_path / "out")
    assert again.config == config
    assert again.vocab.gene_ids == vocab.gene_ids
    rebuilt = again.build()
    for name, value in module.state_dict().items():
        assert torch.equal(rebuilt.state_dict()[name], value), name
    assert torch.equal(rebuilt.gene_embeddings.protein_VE, module.gene_embeddings.protein_VE)


def change_config(folder, path, value):
    raw = json.loads((folder / "config.json").read_text())
    target = raw
    for key in path[:-1]:
        target = target[key]
    if value is None:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "model_config", "activation"), "relu", r"model.model_config.activation is 'relu'; only 'gelu'"),
        (("model", "model_config", "mu_link_fn"), "softplus", "mu_link_fn is 'softplus'"),
        (("model", "model_config", "num_layers"), None, "has no model.model_config.num_layers"),
        (("model", "loss_config"), None, "lacks the sections"),
        (("model", "model_config", "num_layers"), 3, r"lacks 10 of the model's weights \(transformer_encoder"),
        (("model", "model_config", "num_layers"), 1, r"has unknown 10 of the model's weights \(transformer_encoder"),
        (("model", "model_config", "model_dim"), 32, r"linear1.weight has shape \(24, 16\), expected \(32, 16\)"),
        (
            ("model", "data_config", "special_tokens"),
            ["unknown", "[START]", "[END]", "[PAD]"],
            r"\(123, 40\), expected shape \(120, 40\)",
        ),
        (("model", "data_config", "esm2_mappings"), ["other_gene.h5"], "other_gene.h5 does not exist"),
        (("model", "data_config", "aux_cols"), "tissue", r"aux_cols is \['tissue'\]"),
    ],
)
def test_refuses_configurations_that_do_not_fit(copy, path, value, message):
    change_config(copy, path, value)
    with pytest.raises((CheckpointError, CellsError), match=message) as error:
        load_published(copy)
    assert str(copy) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("mu.gene_embedding.weight"), r"lacks 1 of the model's weights \(mu.gene_embedding"),
        (lambda state: state.update(extra=torch.ones(1)), r"has unknown 1 of the model's weights \(extra\)"),
        (lambda state: state.pop("gene_embeddings.embedding.weight"), r"is nothing, expected shape \(123, 40\)"),
    ],
)
def test_refuses_weights_that_do_not_fit(copy, change, message):
    state = torch.load(copy / "model_weights.pt", weights_only=True)
    change(state)
    torch.save(state, copy / "model_weights.pt")
    with pytest.raises(CheckpointError, match=message):
        load_published(copy)


def test_refuses_files_that_are_missing_or_damaged(copy, tmp_path):
    weights = (copy / "model_weights.pt").read_bytes()
    (copy / "model_weights.pt").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=r"model_weights.pt cannot be read .* copy it again"):
        load_published(copy)
    (copy / "model_weights.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model_weights.pt does not exist"):
        load_published(copy)
    (copy / "vocabs" / "assay_vocab.json").write_text('{"10x": 0}')
    with pytest.raises(CheckpointError, match="'unknown' = 0"):
        load_published(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        load_published(copy)
    with pytest.raises(CheckpointError, match=r"config.json does not exist"):
        load_published(tmp_path)
    with pytest.raises(CheckpointError, match="is not empty"):
        save_published(copy, *(None,) * 3)
