"""A recipe from start to finish: run, continue, refuse; the command line's exit codes; what `check` derives."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tftrain.assemble import derive
from tftrain.cells.source import close_experiments
from tftrain.cells.vocab import write_protein_table
from tftrain.cli import main
from tftrain.errors import CellsError, CheckpointError, RecipeError
from tftrain.recipe import load, parse
from tftrain.run import run_recipe
from tftrain.training.metrics import read_metrics

sys.path.insert(0, str(Path(__file__).parent / "cells"))
from stores import make_store

RECIPES = Path(__file__).parents[1] / "recipes"
N_GENES = 40


def recipe_text(folder: Path, **changes: str) -> str:
    """Two small stores and everything in this process; `changes` replace whole lines by their key."""
    lines = {
        "out": f"out: {folder}/run",
        "seed": "seed: 1",
        "data": f"""data:
  sources:
    - {{uri: {folder}/a.soma, species: species_a}}
    - {{uri: {folder}/b.soma, species: species_b, weight: 0.5}}
  protein_tables: [{folder}/a.h5, {folder}/b.h5]
  qc: {{min_expressed_genes: 0, total_counts_within_sd: 0}}
  order: {{lanes: 4, chunk_cells: 16, window_cells: 64}}
  stream: {{backend: local}}""",
        "holdout": "",
        "model": "model: {layers: 1, heads: 2, width: 16, feedforward_width: 16, gene_head_width: 16, "
        "genes_per_cell: 32}",
        "train": "train: {steps: 12, cells_per_step: 16, tokens_per_gpu: 256, heldout_every_steps: 4}",
        "engine": "engine: {zero_stage: null}",
        "checkpoint": "checkpoint: {save_every_steps: 5, keep_last: 2}",
        "ray": "ray: {num_workers: 0}",
        **changes,
    }
    return "\n".join(line for line in lines.values() if line)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two stores of other species, and their protein tables."""
    for store, name in enumerate("ab"):
        make_store(tmp_path / f"{name}.soma", store=store, n_cells=120, n_genes=N_GENES, prefix=name.upper())
        ids = [f"{name.upper()}{gene}" for gene in range(N_GENES)]
        vectors_GE = np.random.default_rng(store).standard_normal((N_GENES, 8)).astype(np.float32)
        write_protein_table(tmp_path / f"{name}.h5", ids, vectors_GE)
    return tmp_path


def losses(out: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(str(out))}


def test_a_run_leaves_metrics_and_finished_checkpoints(folder, capsys):
    assert run_recipe(parse(recipe_text(folder))) == 0
    assert sorted(losses(folder / "run")) == list(range(1, 13))
    heldout = [line["step"] for line in read_metrics(str(folder / "run")) if "val/loss" in line]
    assert heldout == [4, 8, 12]
    kept = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000010", "step_00000012"]
    assert "species_b: " in capsys.readouterr().out


def test_the_same_recipe_continues_an_unfinished_run(folder, capsys):
    text = recipe_text(folder)
    run_recipe(parse(text, overrides=[f"out={folder}/whole"]))
    run_recipe(parse(text))
    expected = losses(folder / "whole")
    assert losses(folder / "run") == expected
    # As if it had been killed after step 10: the newest checkpoint goes, metrics of later steps are still there.
    (folder / "run" / "checkpoints" / "step_00000012" / "COMPLETE").unlink()
    capsys.readouterr()
    run_recipe(parse(text))
    assert "continues at step 10 of 12" in capsys.readouterr().out
    assert losses(folder / "run") == pytest.approx(expected, rel=1e-6)


def test_another_recipe_with_the_same_out_is_refused(folder):
    run_recipe(parse(recipe_text(folder)))
    with pytest.raises(RecipeError, match=r"optim.lr: 0.00015 -> 0.1[\s\S]*choose another `out`"):
        run_recipe(parse(recipe_text(folder), overrides=["optim.lr=0.1"]))


def test_a_changed_store_is_refused(folder):
    run_recipe(parse(recipe_text(folder), overrides=["train.steps=6"]))
    close_experiments()
    shutil.rmtree(folder / "a.soma")
    make_store(folder / "a.soma", store=0, n_cells=121, n_genes=N_GENES, prefix="A")
    with pytest.raises(CheckpointError, match=r"the cells and their order changed"):
        run_recipe(parse(recipe_text(folder), overrides=["train.steps=6"]))


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.protein_tables=[absent.h5]"], CellsError, "absent.h5"),
        (["data.n_genes=7"], CellsError, "data.n_genes is 7 and the protein tables"),
        (["data.holdout.column=batch"], CellsError, "batch"),
        (["data.holdout.fraction=0.000001"], CellsError, "data.holdout.fraction"),
        (["data.obs_filter=nonsense =="], CellsError, "nonsense"),
        (["ray.num_workers=5"], RecipeError, "data.order.lanes is 4"),
        (["train.cells_per_step=10"], RecipeError, "train.cells_per_step is 10"),
        (["data.sources.0.uri=absent.soma"], CellsError, "absent.soma"),
        (["train.tokens_per_gpu=8"], RecipeError, "tokens_per_gpu"),
        (['prepare=["false"]'], RecipeError, "'false' ended with exit code 1"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else None,
)
def test_bad_input_is_refused_with_its_remedy(folder, overrides, error, message):
    with pytest.raises(error) as caught:
        run_recipe(parse(recipe_text(folder), overrides=overrides))
    assert message in str(caught.value)
    assert not (folder / "run" / "checkpoints").exists()


def test_the_command_prints_one_line_and_exits_with_2(folder, capsys):
    path = folder / "r.yaml"
    path.write_text(recipe_text(folder))
    assert main(["run", str(path), "train.stepz=3"]) == 2
    assert capsys.readouterr().err == (
        "tftrain: override 'train.stepz=3': unknown key train.stepz; did you mean train.steps?\n"
    )
    assert main(["run", str(folder / "absent.yaml")]) == 2
    assert main(["check", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "12 steps of 16 cells" in printed
    assert "order: " in printed


@pytest.mark.parametrize(
    ("name", "trained", "frozen"),
    [
        ("sapiens", 368_863_787, 61_002_240),
        ("exemplar", 546_110_887, 282_344_960),
        ("metazoa", 444_021_433, 633_313_280),
    ],
)
def test_check_sizes_the_published_models_without_any_data(name, trained, frozen):
    lines = derive(load(RECIPES / f"pretrain_{name}.yaml"))
    assert f"parameters: {trained:,} trained, {frozen:,} frozen" in lines
    assert any("absent" in line for line in lines)


def test_a_cell_without_a_known_gene_does_not_stop_a_run(folder):
    """Its genes have no protein vector, which quality control cannot see."""
    only_first = {(7, gene): float(gene == 0) for gene in range(N_GENES)}
    make_store(folder / "c.soma", store=2, n_cells=64, n_genes=N_GENES, prefix="A", change=only_first)
    ids = [f"A{gene}" for gene in range(1, N_GENES)]
    write_protein_table(folder / "c.h5", ids, np.ones((N_GENES - 1, 8), np.float32))
    changes = ["data.sources.0.uri=" + str(folder / "c.soma"), f"data.protein_tables=[{folder}/c.h5,{folder}/b.h5]"]
    run_recipe(parse(recipe_text(folder), overrides=[*changes, "train.steps=null", "train.epochs=1"]))
    assert all(np.isfinite(loss) for loss in losses(folder / "run").values())


def test_embed_as_a_recipe(folder):
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    run_recipe(parse(recipe_text(folder)))
    X = sp.csr_matrix(np.arange(3 * N_GENES, dtype=np.float32).reshape(3, N_GENES) % 4)
    var = pd.DataFrame(index=[f"A{gene}" for gene in range(N_GENES)])
    obs = pd.DataFrame({"assay": ["x"] * 3}, index=["c0", "c1", "c2"])
    anndata.AnnData(X=X, obs=obs, var=var).write_h5ad(folder / "cells.h5ad")
    run_recipe(parse(f"task: embed\ncheckpoint: {folder}/run\ncells: {folder}/cells.h5ad\nout: {folder}/out.h5ad\n"))
    got = anndata.read_h5ad(folder / "out.h5ad")
    assert got.obsm["embeddings"].shape == (3, 16)
    assert list(got.obs_names) == ["c0", "c1", "c2"]


def test_no_progress_is_lost_on_a_closed_terminal(folder, monkeypatch):
    """A driver whose output nobody reads any more still finishes."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert run_recipe(parse(recipe_text(folder), overrides=["train.steps=2"])) == 0
