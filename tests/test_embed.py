"""`tftrain embed` from file to file: published numbers, everything kept, nothing half-written, every refusal."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from rich.console import Console

from tftrain.cells.h5ad import H5adFile, match_genes, read_h5ad
from tftrain.cells.vocab import Vocab, write_protein_table
from tftrain.embed import embed_h5ad, load_embedder
from tftrain.errors import CellsError, CheckpointError, RecipeError
from tftrain.models.transcriptformer import ARCHITECTURE
from tftrain.recipe import dump, parse
from tftrain.training.checkpoint import CheckpointStore, Progress
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import join_group

sys.path.insert(0, str(Path(__file__).parent / "models"))
from parity import NAMES, SIMULATED, case, relative

CHECKPOINT, CELLS = SIMULATED / "checkpoint", SIMULATED / "cells.h5ad"
ALL_KEYS = ("embeddings", "llh", "gene_llh")


def embed(out, checkpoint=CHECKPOINT, cells=CELLS, **options):
    """(output, printed text)."""
    text = io.StringIO()
    embed_h5ad(checkpoint, cells, out, device="cpu", console=Console(file=text, width=200), **options)
    return anndata.read_h5ad(out), text.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_the_published_tool(tmp_path, name):
    of = case(name)
    expected = of.expected
    options = {"pretrained_embedding": of.new_table} if of.new_table else {"output_keys": ALL_KEYS}
    got, _ = embed(tmp_path / "out.h5ad", of.checkpoint, of.h5ad, emb_type="cge", max_tokens=150, **options)
    assert relative(got.obsm["embeddings"], expected["embeddings"]) < 1e-4
    assert relative(got.uns["cge_embeddings"], expected["cge_embeddings"]) < 1e-4
    assert got.uns["cge_cell_indices"].tolist() == expected["cge_cell_indices"].tolist()
    assert got.uns["cge_gene_names"].tolist() == [gene.decode() for gene in expected["cge_gene_names"]]
    if not of.new_table:
        assert relative(got.uns["llh"]["llh"].to_numpy(), expected["llh"]) < 1e-4
        assert relative(got.obsm["gene_llh"], expected["gene_llh"]) < 1e-4


def test_keeps_names_and_obs_and_says_how_it_was_made(tmp_path):
    got, text = embed(tmp_path / "deep" / "out.h5ad", output_keys=("embeddings", "llh"))
    given = anndata.read_h5ad(CELLS)
    pd.testing.assert_frame_equal(got.obs, given.obs)
    assert set(got.obsm) == {"embeddings"}
    assert set(got.uns) == {"llh", "tftrain"}
    assert got.uns["llh"].index.tolist() == given.obs_names.tolist()
    provenance = got.uns["tftrain"]
    assert provenance["checkpoint"] == str(CHECKPOINT)
    assert provenance["cells_truncated"] == "3"
    assert provenance["genes"] == "116 of 140 genes used; left out 24 not in the vocabulary and 0 without gene id"
    assert "116 of 140 genes used" in text
    assert "3 cells (25.0%) express more than 31 genes" in text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.h5ad"]


def test_blocks_and_batches_change_nothing(tmp_path, monkeypatch):
    whole, _ = embed(tmp_path / "a.h5ad", output_keys=ALL_KEYS, emb_type="cge")
    monkeypatch.setattr("tftrain.embed.BLOCK_CELLS", 5)
    parts, _ = embed(tmp_path / "b.h5ad", output_keys=ALL_KEYS, emb_type="cge", max_tokens=64)
    for key in ("embeddings", "gene_llh"):
        np.testing.assert_allclose(parts.obsm[key], whole.obsm[key], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(parts.uns["cge_embeddings"], whole.uns["cge_embeddings"], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(parts.uns["cge_cell_indices"], whole.uns["cge_cell_indices"])
    np.testing.assert_allclose(parts.uns["llh"]["llh"], whole.uns["llh"]["llh"], rtol=1e-5)


def variant(path, change):
    adata = anndata.read_h5ad(CELLS)
    change(adata)
    adata.write_h5ad(path)
    return path


def test_cells_without_genes_are_kept(tmp_path):
    def empty_two(adata):
        counts = adata.X.toarray()
        counts[[0, 7]] = 0
        adata.X = sp.csr_matrix(counts)

    cells = variant(tmp_path / "cells.h5ad", empty_two)
    got, text = embed(tmp_path / "out.h5ad", cells=cells, output_keys=ALL_KEYS, emb_type="cge")
    assert (got.obsm["embeddings"][[0, 7]] == 0).all()
    assert np.flatnonzero(np.isnan(got.uns["llh"]["llh"])).tolist() == [0, 7]
    assert not {0, 7} & set(got.uns["cge_cell_indices"].tolist())
    assert "2 cells express no gene of the vocabulary" in text
    whole, _ = embed(tmp_path / "whole.h5ad")
    kept = [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    np.testing.assert_allclose(got.obsm["embeddings"][kept], whole.obsm["embeddings"][kept], rtol=1e-5, atol=1e-6)


def test_the_publisher_says_how_cells_are_read(tmp_path):
    """`gene_col_name` and `use_raw` of config.json hold unless the caller says otherwise."""
    expected, _ = embed(tmp_path / "expected.h5ad")

    def rearrange(adata):
        adata.raw = anndata.AnnData(X=adata.X.copy() * 3, var=adata.var.copy(), obs=adata.obs.copy())
        adata.var["gid"] = adata.var["ensembl_id"]
        adata.var["ensembl_id"] = [f"wrong{n}" for n in range(adata.n_vars)]

    cells = variant(tmp_path / "cells.h5ad", rearrange)
    checkpoint = shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")
    raw = json.loads((checkpoint / "config.json").read_text())
    raw["model"]["data_config"] |= {"gene_col_name": "gid", "use_raw": False}
    (checkpoint / "config.json").write_text(json.dumps(raw))
    got, _ = embed(tmp_path / "a.h5ad", checkpoint, cells)
    np.testing.assert_array_equal(got.obsm["embeddings"], expected.obsm["embeddings"])
    got, _ = embed(tmp_path / "b.h5ad", checkpoint, cells, use_raw=True, gene_col_name="ensembl_id")
    assert got.uns["tftrain"]["layer"] == "raw/X"
    assert not np.allclose(got.obsm["embeddings"], expected.obsm["embeddings"])


@pytest.fixture
def new_species(tmp_path):
    path = tmp_path / "new_gene.h5"
    ids = anndata.read_h5ad(CELLS).var["ensembl_id"].tolist()
    write_protein_table(path, ids, np.random.default_rng(0).normal(size=(len(ids), 40)))
    return path


def test_a_larger_new_vocabulary_embeds(tmp_path, new_species):
    got, _ = embed(tmp_path / "out.h5ad", pretrained_embedding=new_species)
    assert got.uns["tftrain"]["pretrained_embedding"] == str(new_species)
    assert got.uns["tftrain"]["genes"].startswith("140 of 140 genes used")
    assert np.isfinite(got.obsm["embeddings"]).all()


@pytest.mark.parametrize("key", ["llh", "gene_llh"])
def test_likelihoods_of_a_new_species_are_refused(tmp_path, new_species, key):
    with pytest.raises(CheckpointError, match=rf"{key} cannot be computed with .*new_gene.h5"):
        embed(tmp_path / "out.h5ad", pretrained_embedding=new_species, output_keys=("embeddings", key))


def test_refuses_a_table_of_another_width(tmp_path):
    write_protein_table(tmp_path / "narrow.h5", {"ENSG00000900000": np.ones(8)})
    with pytest.raises(CheckpointError, match="protein vectors are 8 wide, the model takes 40"):
        embed(tmp_path / "out.h5ad", pretrained_embedding=tmp_path / "narrow.h5")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emb_type": "gene"}, "choose one of cell, cge"),
        ({"output_keys": ("embeddings", "umap")}, "must be some of embeddings, llh, gene_llh"),
        ({"output_keys": ()}, "must be some of"),
    ],
)
def test_refuses_options(tmp_path, options, message):
    with pytest.raises(RecipeError, match=message):
        embed(tmp_path / "out.h5ad", **options)


def set_ids(ids):
    return lambda adata: adata.var.__setitem__("ensembl_id", ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda adata: adata.X.data.__setitem__(5, 1.5), "1.5 is not a raw count"),
        (lambda adata: adata.X.data.__setitem__(5, -2), "-2.0 is not a raw count"),
        (set_ids([""] * 140), "no gene ids"),
        (set_ids([f"AT{n}G" for n in range(140)]), "none of its 140 gene ids"),
        (set_ids(["G.1", "G.2", *(f"X{n}" for n in range(138))]), "more than once"),
        (lambda adata: adata.obs.drop(columns="assay", inplace=True), "obs has no column 'assay'"),
    ],
)
def test_bad_cells_leave_nothing_behind(tmp_path, change, message):
    cells = variant(tmp_path / "cells.h5ad", change)
    (tmp_path / "out").mkdir()
    with pytest.raises(CellsError, match=message) as error:
        embed(tmp_path / "out" / "out.h5ad", cells=cells)
    assert str(cells) in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_an_output_that_exists_survives_a_failure(tmp_path):
    embed(tmp_path / "out.h5ad")
    before = (tmp_path / "out.h5ad").read_bytes()
    with pytest.raises(CellsError):
        embed(tmp_path / "out.h5ad", cells=variant(tmp_path / "bad.h5ad", lambda a: a.X.data.__setitem__(-1, 0.5)))
    assert (tmp_path / "out.h5ad").read_bytes() == before
    with pytest.raises(RecipeError, match="is the input too"):
        embed(CELLS)


def test_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        load_embedder(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"is no checkpoint: neither config.json .* nor manifest.json"):
        load_embedder(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="COMPLETE"):
        load_embedder(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        load_embedder(tmp_path)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """(run folder, its module, its vocabulary) of an untrained model, saved by the trainer's own store."""
    folder = tmp_path_factory.mktemp("run")
    table = CHECKPOINT / "vocabs" / "train_species_gene.h5"
    recipe = parse(
        f"""
        task: pretrain
        out: {folder}
        data: {{sources: [{{uri: none.soma, species: simulated}}], protein_tables: [{table}]}}
        model: {{layers: 1, heads: 2, width: 8, feedforward_width: 8, gene_head_width: 4, genes_per_cell: 20}}
        train: {{steps: 1, cells_per_step: 8, tokens_per_gpu: 64}}
        """
    )
    vocab = Vocab.load(recipe.data.protein_tables)
    module = ARCHITECTURE.build(recipe.model, vocab)
    engine = build_engine(module, EngineConfig(zero_stage=None, precision="fp32"), recipe.optim, join_group())
    store = CheckpointStore(
        str(folder), recipe.checkpoint, recipe_text=dump(recipe), identity={"genes_hash": vocab.genes_hash}
    )
    store.save(engine, Progress(step=7))
    return folder, module, vocab


@pytest.mark.parametrize("which", ["run", "checkpoint"])
def test_own_checkpoint(tmp_path, own_run, which):
    folder, module, vocab = own_run
    given = folder if which == "run" else folder / "checkpoints" / "step_00000007"
    got, _ = embed(tmp_path / "out.h5ad", given, output_keys=("embeddings", "llh"))
    with H5adFile(CELLS) as file:
        (cells,) = read_h5ad(file, vocab, match_genes(file, vocab), obs_columns=["assay"])
    (batch,) = ARCHITECTURE.collate(cells, module.config, vocab, seed=0, shuffle_genes=False, max_tokens=10_000)
    expected = ARCHITECTURE.embed(module, batch, ("embeddings", "llh"))
    np.testing.assert_allclose(got.obsm["embeddings"], expected["embeddings"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.uns["llh"]["llh"], expected["llh"], rtol=1e-5)
    assert got.uns["tftrain"]["step"] == "7"


def test_own_checkpoint_without_its_marker_or_with_other_genes(tmp_path, own_run):
    folder = shutil.copytree(own_run[0] / "checkpoints" / "step_00000007", tmp_path / "copy")
    (folder / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="no COMPLETE marker"):
        load_embedder(folder)
    manifest = (folder / "manifest.json").read_text()
    genes_hash = json.loads(manifest)["genes_hash"]
    (folder / "manifest.json").write_text(manifest.replace(genes_hash, "0" * 64))
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    (folder / "COMPLETE").write_text(json.dumps(sizes))
    with pytest.raises(CheckpointError, match="trained with other genes than its tables hold now"):
        load_embedder(folder)
