"""Fine-tuning from files to answers: adapt, classify, continue, export, predict; and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from data_prep.build import build
from data_prep.simulate import SimulationConfig, SpeciesConfig, simulate_atlas
from tftrain.assemble import open_data
from tftrain.cli import main
from tftrain.embed import load_embedder
from tftrain.errors import CellsError, CheckpointError, RecipeError
from tftrain.predict import predict_h5ad
from tftrain.pretrained import load_pretrained, own_checkpoint
from tftrain.recipe import FinetuneRecipe, dump, load, parse
from tftrain.run import run_recipe
from tftrain.training import lora
from tftrain.training.metrics import read_metrics
from tftrain.tuning import resolve

ATLAS = SimulationConfig(
    species=(SpeciesConfig("sim_alba", 480, 8, 330.0), SpeciesConfig("sim_celata", 160, 4, 280.0)),
    n_orthogroups=460,
    n_own_genes=20,
    protein_width=32,
)
HERE = """
  qc: {min_expressed_genes: 30, total_counts_within_sd: 0}
  order: {lanes: 2, chunk_cells: 16, window_cells: 128}
  stream: {backend: local}
engine: {zero_stage: null}
ray: {num_workers: 0}
"""
HELD = "holdout: {column: donor_id, values: [sim_alba_d00, sim_alba_d01]}"


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Simulated cells as files and stores, and `base`: a small model trained on the first species."""
    folder = tmp_path_factory.mktemp("atlas")
    files = simulate_atlas(folder, ATLAS)
    build(folder, files, show=lambda line: None)
    text = f"""
task: pretrain
out: {folder}/base
data:
  sources: [{{uri: {folder}/sim_alba.soma, species: sim_alba}}]
  protein_tables: [{folder}/sim_alba_gene.h5]
  {HELD}{HERE}
model: {{layers: 1, heads: 2, width: 32, feedforward_width: 32, gene_head_width: 32, genes_per_cell: 320, assays: [],
  dropout: 0.0, count_loss: exact, gene_loss_weight: 4.0}}
optim: {{lr: 6.0e-3}}
train: {{steps: 60, cells_per_step: 16, tokens_per_gpu: 4096, heldout_every_steps: null}}
"""
    assert run_recipe(parse(text)) == 0
    return folder


def finetune_text(atlas: Path, out: Path, extra: str = "", species: str = "sim_alba") -> str:
    return f"""
task: finetune
out: {out}
init_from: {atlas}/base
data:
  sources: [{{uri: {atlas}/{species}.soma, species: {species}}}]
  {HELD if species == "sim_alba" else "holdout: {column: donor_id, values: [sim_celata_d00]}"}{HERE}
optim: {{lr: 5.0e-3}}
train: {{steps: 12, cells_per_step: 16, tokens_per_gpu: 8192, heldout_every_steps: 4}}
checkpoint: {{save_every_steps: 5}}
{extra}
"""


def from_file(path: Path) -> list[str]:
    """Overrides that build a store of a file in place of the one that is there."""
    return ["data.sources=[]", f"data.files=[{path}]", "data.species=sim_alba"]


def run(atlas: Path, out: Path, extra: str = "", species: str = "sim_alba", overrides: list[str] | None = None) -> Path:
    assert run_recipe(parse(finetune_text(atlas, out, extra, species), overrides=overrides or [])) == 0
    return out


def heldout(out: Path, name: str = "val/loss") -> dict[int, float]:
    return {line["step"]: line[name] for line in read_metrics(str(out)) if name in line}


@pytest.fixture(scope="module")
def adapted(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, overrides = tmp_path_factory.mktemp("adapted") / "run", from_file(atlas / "sim_alba.h5ad")
    return run(atlas, out, "lora: {r: 4, lora_alpha: 8}", overrides=overrides)


def test_an_adapted_run_from_a_file(atlas: Path, adapted: Path, capsys: pytest.CaptureFixture) -> None:
    losses = heldout(adapted)
    assert list(losses) == [0, 4, 8, 12]
    # The base was barely trained; that adapting helps is shown where genes are new, below.
    assert losses[12] != losses[0]
    recipe = load(adapted / "recipe.yaml")
    assert isinstance(recipe, FinetuneRecipe)
    assert recipe.init_from == f"{atlas}/base/checkpoints/step_00000060", "a run folder is pinned to its checkpoint"
    assert [source.species for source in recipe.data.sources] == ["sim_alba"]
    folder = own_checkpoint(adapted)
    assert "adapter/adapter_model.safetensors" in folder.sizes()
    weights = load_file(Path(folder.path) / "model.safetensors")
    assert all("lora_" in name for name in weights), "the base is in no checkpoint of it"
    manifest = json.loads(folder.read_text("manifest.json"))
    base = load_pretrained(atlas / "base")
    assert manifest["base_hash"] == base.weights_hash
    # The held-out loss before the first step is the base's own.
    before = {line["step"]: line for line in read_metrics(str(atlas / "base"))}[60]["val/loss"]
    assert losses[0] == pytest.approx(before, rel=1e-5)


def test_merged_is_unmerged_and_peft_reads_it(atlas: Path, adapted: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = Path(own_checkpoint(adapted).path)
    embedder = load_embedder(adapted)
    data = open_data(resolve(load(adapted / "recipe.yaml")))  # type: ignore[arg-type]
    from tftrain.cells.read import read_rows

    cells = read_rows(data.sources[0], data.sources[0].heldout_joinid_M[:20])
    merged = embedder.outputs(cells, ("embeddings", "llh"))
    unmerged_module = PeftModel.from_pretrained(load_pretrained(atlas / "base").build(), str(folder / "adapter"))  # type: ignore[arg-type]
    import dataclasses

    unmerged = dataclasses.replace(embedder, module=unmerged_module.eval()).outputs(cells, ("embeddings", "llh"))
    fresh = load_embedder(atlas / "base").outputs(cells, ("embeddings", "llh"))
    for key, value in merged.items():
        np.testing.assert_allclose(value, unmerged[key], atol=1e-5)
        assert np.abs(value - fresh[key]).max() > 1e-3
    assert main(["export", str(adapted), str(tmp_path / "published")]) == 0
    published = load_embedder(tmp_path / "published")
    assert published.facts["layout"] == "published"
    for key, value in published.outputs(cells, ("embeddings", "llh")).items():
        np.testing.assert_allclose(value, merged[key], atol=1e-5)


def test_a_published_folder_can_be_adapted(atlas: Path, adapted: Path, tmp_path: Path) -> None:
    assert main(["export", str(atlas / "base"), str(tmp_path / "published")]) == 0
    out = run(atlas, tmp_path / "run", "lora: {r: 4, lora_alpha: 8}", overrides=[f"init_from={tmp_path}/published"])
    expected = load_pretrained(adapted).weights
    for name, value in load_pretrained(out).weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5)


def test_a_broken_off_run_gives_the_same_adapter(atlas: Path, adapted: Path, tmp_path: Path) -> None:
    """As if it had been killed after step 10: later metrics are there, the newest checkpoint is not whole."""
    out = tmp_path / "run"
    shutil.copytree(adapted, out)
    (out / "checkpoints" / "step_00000012" / "COMPLETE").unlink()
    recipe = (out / "recipe.yaml").read_text()
    (out / "recipe.yaml").write_text(recipe.replace(str(adapted), str(out)))
    run(atlas, out, "lora: {r: 4, lora_alpha: 8}", overrides=from_file(atlas / "sim_alba.h5ad"))
    assert heldout(out) == pytest.approx(heldout(adapted), rel=1e-6)
    expected = load_pretrained(adapted).weights
    for name, value in load_pretrained(out).weights.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_an_adapter_over_the_wrong_base_is_refused(atlas: Path, adapted: Path, tmp_path: Path) -> None:
    shutil.copytree(adapted, tmp_path / "run")
    shutil.copytree(atlas / "base", tmp_path / "base")
    folder = Path(own_checkpoint(tmp_path / "run").path)
    base = Path(own_checkpoint(tmp_path / "base").path)
    weights = load_file(base / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: value + 1e-3 for name, value in weights.items()}, base / "model.safetensors")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace(str(atlas / "base"), str(tmp_path / "base")))
    marker = json.loads((folder / "COMPLETE").read_text())
    marker["recipe.yaml"] = (folder / "recipe.yaml").stat().st_size
    (folder / "COMPLETE").write_text(json.dumps(marker))
    right, wrong = load_pretrained(atlas / "base").weights_hash, load_pretrained(tmp_path / "base").weights_hash
    with pytest.raises(CheckpointError, match=f"of hash {right} and .* has {wrong}"):
        load_pretrained(tmp_path / "run")


@pytest.fixture(scope="module")
def classifier(atlas: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = """lora: {r: 4, lora_alpha: 8}
head: {task: classify, label: cell_type, class_weights: balanced}
early_stop: {patience: 8, metric: val/accuracy}"""
    overrides = ["train.steps=100", "train.heldout_every_steps=25", "checkpoint.save_every_steps=50", "optim.lr=1e-2"]
    return run(atlas, tmp_path_factory.mktemp("classifier") / "run", extra, overrides=overrides)


def test_a_classifier_learns_and_its_best_checkpoint_is_used(classifier: Path) -> None:
    accuracy = heldout(classifier, "val/accuracy")
    assert accuracy[0] < 0.35, "8 classes, before the first step"
    assert max(accuracy.values()) > 0.4, accuracy
    best = max((value, step) for step, value in accuracy.items() if step)[1]
    manifest = json.loads(own_checkpoint(classifier).read_text("manifest.json"))
    assert accuracy[manifest["step"]] == accuracy[best]
    assert len(manifest["labels"]["classes"]) == 8


def test_predict_labels_new_cells(atlas: Path, classifier: Path, tmp_path: Path) -> None:
    cells = anndata.read_h5ad(atlas / "sim_alba.h5ad")
    new = cells[cells.obs["donor_id"].isin(["sim_alba_d00", "sim_alba_d01"])].copy()
    new.X[3] = 0
    new.X.eliminate_zeros()
    new.write_h5ad(tmp_path / "new.h5ad")
    assert main(["predict", str(classifier), str(tmp_path / "new.h5ad"), str(tmp_path / "out.h5ad")]) == 0
    got = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert list(got.obs_names) == list(new.obs_names)
    pd.testing.assert_series_equal(got.obs["donor_id"], new.obs["donor_id"])
    told, truth = got.obs["predicted_cell_type"].astype(str), new.obs["cell_type"].astype(str)
    sure = told != "unknown"
    is_empty = np.arange(len(new)) == 3
    assert told[is_empty].tolist() == ["unknown"]
    assert (told[sure] == truth[sure]).mean() > 0.4
    probability = got.obsm["cell_type_probabilities"][~is_empty]
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(probability.max(1), got.obs["predicted_cell_type_probability"][~is_empty], rtol=1e-6)
    assert got.uns["cell_type_classes"].tolist() == sorted(set(truth))
    # These are the cells that the threshold was set on: 5 % of them lie below it.
    assert 0.03 <= (~sure[~is_empty]).mean() <= 0.07
    run_recipe(
        parse(
            f"task: predict\ncheckpoint: {classifier}\ncells: {tmp_path}/new.h5ad\nout: {tmp_path}/all.h5ad\n"
            "unknown: false\n"
        )
    )
    everything = anndata.read_h5ad(tmp_path / "all.h5ad").obs["predicted_cell_type"]
    assert (everything == "unknown").sum() == 1


def test_predict_says_what_is_missing(atlas: Path, adapted: Path, classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no head to predict with"):
        predict_h5ad(adapted, atlas / "sim_alba.h5ad", tmp_path / "out.h5ad")
    cells = anndata.read_h5ad(atlas / "sim_alba.h5ad")
    cells.obs["predicted_cell_type"] = "x"
    cells.write_h5ad(tmp_path / "taken.h5ad")
    with pytest.raises(CellsError, match="obs has a column 'predicted_cell_type' already"):
        predict_h5ad(classifier, tmp_path / "taken.h5ad", tmp_path / "out.h5ad")


def test_a_regression_of_a_number_and_full_fine_tuning(atlas: Path, tmp_path: Path) -> None:
    """Every weight that the head's loss reaches is trained; the generative heads stay as they were."""
    cells = anndata.read_h5ad(atlas / "sim_alba.h5ad")
    cells.obs["n_genes"] = np.asarray((cells.X > 0).sum(1)).ravel().astype(float) * 3 + 100
    cells.obs.loc[cells.obs_names[:20], "n_genes"] = np.nan
    cells.write_h5ad(tmp_path / "cells.h5ad")
    extra = "head: {task: regress, label: n_genes}"
    overrides = [*from_file(tmp_path / "cells.h5ad"), "train.steps=60"]
    out = run(atlas, tmp_path / "run", extra, overrides=overrides)
    r2 = heldout(out, "val/r2")
    assert r2[60] > max(0.3, r2[0] + 0.2), r2
    base, tuned = load_pretrained(atlas / "base").weights, load_pretrained(out).weights
    changed = {name for name in base if not torch.equal(base[name], tuned[name])}
    assert changed
    assert not [name for name in changed if name.startswith(("gene_id_head", "mu."))]
    predict_h5ad(out, tmp_path / "cells.h5ad", tmp_path / "out.h5ad")
    got = anndata.read_h5ad(tmp_path / "out.h5ad").obs
    assert np.corrcoef(got["predicted_n_genes"][20:], got["n_genes"][20:])[0, 1] > 0.5


def test_early_stop_ends_a_run_once(atlas: Path, tmp_path: Path) -> None:
    extra = "lora: {r: 2}\nearly_stop: {patience: 2, min_delta: 100.0}"
    out = run(atlas, tmp_path / "run", extra, overrides=["train.heldout_every_steps=2", "train.steps=40"])
    # Nothing beats the first evaluation, at step 2, by so much: the run ends two evaluations later.
    assert list(heldout(out)) == [0, 2, 4, 5, 6]
    kept = sorted(path.name for path in (out / "checkpoints").iterdir())
    run(atlas, out, extra, overrides=["train.heldout_every_steps=2", "train.steps=40"])
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == kept, "it is finished"


def test_a_new_species_brings_its_genes(atlas: Path, tmp_path: Path) -> None:
    tables = f"data.protein_tables=[{atlas}/sim_alba_gene.h5,{atlas}/sim_celata_gene.h5]"
    with pytest.raises(RecipeError, match=r"480 genes are new .*modules_to_save=\[gene_id_head.layers.4,mu.gene_emb"):
        run(atlas, tmp_path / "run", "lora: {r: 2}", "sim_celata", [tables])
    extra = "lora: {r: 2, modules_to_save: [gene_id_head.layers.4, mu.gene_embedding]}"
    out = run(atlas, tmp_path / "run", extra, "sim_celata", [tables])
    losses = heldout(out)
    assert losses[12] < losses[0] - 0.1
    tuned, base = load_pretrained(out), load_pretrained(atlas / "base")
    assert (base.vocab.n_genes, tuned.vocab.n_genes) == (480, 960)
    assert tuned.weights["mu.gene_embedding.weight"].shape[0] == 7 + 960
    with pytest.raises(CheckpointError, match="do not begin with the 480 of"):
        run(atlas, tmp_path / "other", extra, "sim_celata", [f"data.protein_tables=[{atlas}/sim_celata_gene.h5]"])


@pytest.mark.parametrize(
    ("extra", "overrides", "error", "message"),
    [
        ("head: {task: classify, label: absent}", [], CellsError, "obs has no column absent; it has"),
        ("head: {task: classify, label: assay}", [], CellsError, "all .* labelled training cells are 'simulated'"),
        ("head: {task: classify, label: tissue}", [], CellsError, "none of .* training cells has a label"),
        ("head: {task: regress, label: cell_type}", [], CellsError, "which is no number"),
        ("lora: {target_modules: [q_proj]}", [], RecipeError, "'q_proj', which matches no module"),
        ("", ["init_from=nowhere"], CheckpointError, "nowhere does not exist"),
        ("", ["data.holdout={column: species, fraction: 0.5}"], CellsError, "all chosen cells have one species"),
        ("", ["data.sources=[]"], RecipeError, "data.files and data.sources are both empty"),
        ("", ["model.layers=2"], RecipeError, "model: it is taken from"),
        ("lora: {use_dora: true}", ["engine.zero_stage=3"], RecipeError, "lora.use_dora needs whole weights"),
        ("early_stop: {patience: 3}", ["data.holdout={fraction: 0.0}"], RecipeError, "early_stop needs held-out"),
        ("early_stop: {metric: val/best}", [], RecipeError, "the held-out metrics are val/loss"),
        (
            "lora: {target_modules: [gene_id_head.layers.0]}\nhead: {task: classify, label: cell_type}",
            [],
            RecipeError,
            "has no part in the head's loss",
        ),
    ],
)
def test_bad_input_is_refused(atlas: Path, tmp_path: Path, extra, overrides, error, message) -> None:
    with pytest.raises(error, match=message):
        run(atlas, tmp_path / "run", extra, overrides=overrides)


def test_check_before_anything_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = finetune_text(tmp_path, tmp_path / "run", "lora: {}")
    text = text.replace(
        f"sources: [{{uri: {tmp_path}/sim_alba.soma, species: sim_alba}}]", f"files: [{tmp_path}/a.h5ad]"
    )
    (tmp_path / "r.yaml").write_text(text)
    assert main(["check", str(tmp_path / "r.yaml")]) == 0
    printed = capsys.readouterr().out
    assert f"init_from: {tmp_path}/base is absent" in printed
    assert f"tftrain-data build {tmp_path}/run/cells {tmp_path}/a.h5ad" in printed
    recipe = parse(text)
    assert dump(parse(dump(recipe))) == dump(recipe)


def test_a_warning_names_what_is_in_the_hold_out_alone(atlas: Path, tmp_path: Path, capsys) -> None:
    cells = anndata.read_h5ad(atlas / "sim_alba.h5ad")
    kind = np.where(cells.obs["donor_id"] == "sim_alba_d00", "rare", cells.obs["lineage"].astype(str))
    cells.obs["kind"] = kind
    cells.write_h5ad(tmp_path / "cells.h5ad")
    overrides = [*from_file(tmp_path / "cells.h5ad"), "train.steps=2", "train.heldout_every_steps=null"]
    run(atlas, tmp_path / "run", "lora: {r: 2}\nhead: {task: classify, label: kind}", overrides=overrides)
    assert "warning: rare of kind is in held-out cells alone" in capsys.readouterr().out


def test_the_adapter_is_peft_s(adapted: Path) -> None:
    config = json.loads((Path(own_checkpoint(adapted).path) / "adapter" / lora.CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
