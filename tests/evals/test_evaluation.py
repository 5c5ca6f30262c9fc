"""An evaluation from a checkpoint to its files: a model trained for a few steps on a small simulated atlas."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import anndata as ad
import pandas as pd
import pytest
from rich.console import Console

from data_prep.build import build
from data_prep.simulate import SimulationConfig, SpeciesConfig, simulate_atlas
from tftrain.embed import embed_h5ad
from tftrain.errors import CellsError, RecipeError
from tftrain.evals.run import check, run_evaluation
from tftrain.recipe import EvalSource, EvaluateConfig, load, parse
from tftrain.run import run_recipe

CONFIG = SimulationConfig(
    species=(
        SpeciesConfig("sim_a", 320, 10, 400.0),
        SpeciesConfig("sim_b", 320, 10, 250.0),
        SpeciesConfig("sim_c", 160, 6, 300.0),
    ),
)
BASELINES = ["untrained", "random", "pca", "protein_mean", "ortholog_pca"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`cells` with stores, `run` with a finished training and its evaluation."""
    out = tmp_path_factory.mktemp("quickstart")
    build(out / "cells", simulate_atlas(out / "cells", CONFIG))
    donors = ", ".join(f"{name}_d0{d}" for name in ("sim_a", "sim_b") for d in range(5))
    assert (
        run_recipe(
            parse(f"""
out: {out}/run
data:
  sources: [{{uri: {out}/cells/sim_a.soma, species: sim_a}}, {{uri: {out}/cells/sim_b.soma, species: sim_b}}]
  protein_tables: [{out}/cells/sim_a_gene.h5, {out}/cells/sim_b_gene.h5]
  qc: {{min_expressed_genes: 20}}
  holdout: {{values: [{donors}]}}
  order: {{lanes: 2, chunk_cells: 16, window_cells: 64}}
  stream: {{backend: local}}
model: {{layers: 1, heads: 2, width: 16, feedforward_width: 16, gene_head_width: 16, genes_per_cell: 320, assays: []}}
train: {{steps: 5, cells_per_step: 16, tokens_per_gpu: 4096}}
engine: {{zero_stage: null}}
ray: {{num_workers: 0}}
evaluate:
  baselines: [{", ".join(BASELINES)}]
  unseen: [{{uri: {out}/cells/sim_c.soma, species: sim_c, protein_table: {out}/cells/sim_c_gene.h5}}]
  orthologs: {out}/cells/orthologs.tsv
  bootstraps: 100
""")
        )
        == 0
    )
    return out


@pytest.fixture(scope="module")
def rows(folder):
    return pd.read_parquet(folder / "run" / "evaluation" / "metrics.parquet")


def unseen(folder, suffix=".soma"):
    cells = folder / "cells"
    return EvalSource(f"{cells}/sim_c{suffix}", "sim_c", f"{cells}/sim_c_gene.h5")


def test_it_leaves_all_files_behind(folder):
    names = {path.name for path in (folder / "run" / "evaluation").iterdir()}
    assert names == {
        "metrics.parquet",
        "metrics.json",
        "predictions.parquet",
        "embeddings.h5ad",
        "recipe.yaml",
        "report.html",
    }
    summary = json.loads((folder / "run" / "evaluation" / "metrics.json").read_text())
    assert [(d["name"], d["is_seen"]) for d in summary["datasets"]] == [
        ("sim_a", True),
        ("sim_b", True),
        ("sim_c", False),
    ]
    assert summary["notes"] == []
    assert any(line.startswith("transfer A + B -> C: trained") for line in summary["sentences"])


def test_the_long_table_has_every_model_task_and_chance(rows):
    wanted = {"model", "checkpoint", "dataset", "task", "metric", "variant", "seed", "fold", "value", "n", "chance"}
    assert wanted <= set(rows.columns)
    f1 = rows[(rows.metric == "macro_f1") & (rows.fold == -1)]
    assert set(f1.model) == {"trained", *BASELINES}
    assert set(f1.task) == {"celltypes", "transfer"}
    assert f1[["chance", "low", "high"]].notna().all().all()
    assert f1.value.between(0, 1).all()
    assert f1.low.le(f1.high).all()
    assert set(rows[rows.task == "likelihood"].model) == {"trained", "unigram", "unigram_pooled", "unigram_no_repeat"}
    # Five steps are few: the model knows less than the unigram, and the table says so.
    gain = rows[(rows.metric == "gene_nll_gain") & (rows.variant == "over unigram")]
    assert (gain.value < 0).all()


def test_judged_cells_are_held_out_donors_and_all_unseen_cells(folder):
    cells = ad.read_h5ad(folder / "run" / "evaluation" / "embeddings.h5ad")
    for name in ("sim_a", "sim_b"):
        of = cells.obs[cells.obs.dataset == name]
        assert set(of.donor) <= {f"{name}_d0{d}" for d in range(5)}
        assert of.is_seen.all()
    assert (cells.obs.dataset == "sim_c").sum() > 150
    assert set(cells.obsm) == {"trained", *BASELINES}


def test_embeddings_are_those_of_the_embed_command(folder, tmp_path):
    embed_h5ad(
        folder / "run",
        folder / "cells" / "sim_c.h5ad",
        tmp_path / "c.h5ad",
        pretrained_embedding=folder / "cells" / "sim_c_gene.h5",
        console=Console(quiet=True),
    )
    ours = ad.read_h5ad(folder / "run" / "evaluation" / "embeddings.h5ad")
    ours = ours[ours.obs.dataset == "sim_c"]
    theirs = ad.read_h5ad(tmp_path / "c.h5ad").obsm["embeddings"][ours.obs.cell.to_numpy()]
    assert ours.obsm["trained"] == pytest.approx(theirs, rel=1e-4, abs=1e-5)


def test_an_h5ad_file_is_judged_like_its_store(folder, tmp_path, rows):
    verdict = run_evaluation(
        folder / "run",
        EvaluateConfig(tasks=["transfer"], baselines=["random"], unseen=[unseen(folder, ".h5ad")], bootstraps=10),
        out=str(tmp_path),
        console=Console(quiet=True),
    )
    row = verdict.value("trained", "sim_a -> sim_c", "transfer", "macro_f1", "logistic")
    same = rows[(rows.model == "trained") & (rows.dataset == "sim_a -> sim_c") & (rows.variant == "logistic")]
    # The store's QC drops a few cells that the file still has.
    assert row.value == pytest.approx(float(same.value.iloc[0]), abs=0.05)
    assert (tmp_path / "evaluation" / "metrics.json").exists()


def test_the_recipe_beside_the_report_repeats_it(folder, tmp_path, rows):
    again = load(folder / "run" / "evaluation" / "recipe.yaml", [f"out={tmp_path}", "evaluate.tasks=[celltypes]"])
    assert run_recipe(again) == 0
    repeated = pd.read_parquet(tmp_path / "evaluation" / "metrics.parquet")
    first = rows[rows.task == "celltypes"].reset_index(drop=True)
    pd.testing.assert_frame_equal(repeated, first)


def test_the_other_tasks_from_a_checkpoint(folder, tmp_path):
    """Condition, species or type, gene relations and the counts baseline, on what the few steps taught; a gate."""
    vocab = ad.read_h5ad(folder / "cells" / "sim_a.h5ad", backed="r").var
    genes = (vocab["ensembl_id"] if "ensembl_id" in vocab else vocab.index.to_series()).tolist()
    pairs = pd.DataFrame({"gene_a": genes[:60], "gene_b": genes[1:61]})
    pairs.to_csv(tmp_path / "pairs.tsv", sep="\t", index=False)
    recipe = parse(f"""
task: evaluate
checkpoint: {folder}/run
out: {tmp_path}/judged
evaluate:
  tasks: [condition, species_or_type, gene_relations]
  baselines: [untrained, random, log_counts]
  condition: lineage
  relations: {tmp_path}/pairs.tsv
  unseen: [{{uri: {folder}/cells/sim_c.h5ad, species: sim_c, protein_table: {folder}/cells/sim_c_gene.h5}}]
  bootstraps: 50
  fail_below: {{species_or_type/all species/log_ratio: 99.0}}
""")
    assert run_recipe(recipe) == 1
    found = pd.read_parquet(tmp_path / "judged" / "evaluation" / "metrics.parquet")
    assert set(found[found.task == "condition"].dataset) == {"sim_a", "sim_b", "sim_c"}
    assert set(found[found.task == "species_or_type"].model) == {"trained", "untrained", "random", "log_counts"}
    of_genes = found[found.task == "gene_relations"]
    assert set(of_genes.model) == {"trained", "untrained", "random", "protein", "pca"}
    summary = json.loads((tmp_path / "judged" / "evaluation" / "metrics.json").read_text())
    (short,) = summary["shortfalls"]
    assert short.startswith("species_or_type/all species/log_ratio is ")
    assert "log_counts" not in ad.read_h5ad(tmp_path / "judged" / "evaluation" / "embeddings.h5ad").obsm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tasks": ["celtypes"]}, r"evaluate.tasks has 'celtypes'; did you mean celltypes\?"),
        ({"baselines": ["umap"]}, "evaluate.baselines has 'umap'; known: untrained, random"),
    ],
)
def test_unknown_names_are_refused_before_anything_runs(change, message):
    with pytest.raises(RecipeError, match=message):
        check(replace(EvaluateConfig(), **change))


def test_the_oracle_needs_its_table():
    with pytest.raises(RecipeError, match=r"needs evaluate\.orthologs"):
        EvaluateConfig(baselines=["ortholog_pca"])


@pytest.mark.parametrize(
    ("task", "key"), [("condition", "evaluate.condition"), ("gene_relations", "evaluate.relations")]
)
def test_a_task_that_needs_a_key_says_so(task, key):
    with pytest.raises(RecipeError, match=f"which needs {key}"):
        EvaluateConfig(tasks=[task])


def test_labels_that_decide_nothing_are_an_error_and_not_an_empty_report(folder, tmp_path):
    with pytest.raises(CellsError, match=r"no task could judge anything: .*1 classes"):
        run_evaluation(
            folder / "run",
            EvaluateConfig(tasks=["celltypes"], label="tissue"),
            out=str(tmp_path),
            console=Console(quiet=True),
        )
    assert not (tmp_path / "evaluation").exists()


def test_scvi_names_the_extra_where_it_is_missing(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scvi" else found(name))
    with pytest.raises(RecipeError, match=r"tftrain\[eval-baselines\]"):
        check(EvaluateConfig(baselines=["scvi"]))


def test_a_missing_label_column_is_named(folder, tmp_path):
    with pytest.raises(CellsError, match="no_such_label"):
        run_evaluation(
            folder / "run", EvaluateConfig(label="no_such_label"), out=str(tmp_path), console=Console(quiet=True)
        )


def test_the_verdict_fits_a_terminal_and_names_winners(folder, capsys):
    from tftrain.evals import report
    from tftrain.evals.contract import Findings, Row

    kept = [
        Row(model, "s", "celltypes", "macro_f1", "logistic", value, 100, 0.5, -1, value - 0.05, value + 0.05, "cells")
        for model, value in [("trained", 0.7), ("pca", 0.8), ("random", 0.5), ("ortholog_pca", 0.9)]
    ]

    class Named:
        name, is_seen, cells = "s", True, range(100)

    verdict = report.Verdict(Findings(kept, notes=["a note"]), [Named()], "checkpoint", 0)
    report.print_verdict(Console(width=80), verdict)
    printed = capsys.readouterr().out
    sentence = (
        "cell types A: trained 0.70 beats random 0.50; a baseline is better or equal: PCA 0.80; "
        "the oracle is better or equal: ortholog PCA 0.90"
    )
    assert sentence in printed
    assert ".65-.75" in printed
    assert "note: a note" in printed


def test_ray_tasks_find_what_one_process_finds(folder, tmp_path, rows, ray_cluster, monkeypatch):
    """Representations and tasks side by side on a cluster; a failing part raises its own error."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    from tftrain.cluster import RayConfig
    from tftrain.evals import jobs
    from tftrain.evals.contract import Bench

    recipe = parse(f"""
task: evaluate
checkpoint: {folder}/run
out: {tmp_path}/judged
ray: {{num_workers: 2, cpus_per_worker: 0.5}}
wandb: {{mode: offline}}
evaluate:
  tasks: [celltypes, transfer]
  baselines: [untrained, pca]
  unseen: [{{uri: {folder}/cells/sim_c.soma, species: sim_c, protein_table: {folder}/cells/sim_c_gene.h5}}]
  bootstraps: 100
""")
    assert run_recipe(recipe) == 0
    found = pd.read_parquet(tmp_path / "judged" / "evaluation" / "metrics.parquet")
    keys = ["model", "dataset", "task", "metric", "variant", "fold"]
    same = rows[rows.task.isin(["celltypes", "transfer"]) & rows.model.isin(["trained", "untrained", "pca"])]
    same = same[~same.variant.str.contains("over (?:random|protein_mean|ortholog_pca)")]
    ours, theirs = (frame.set_index(keys).sort_index() for frame in (found, same))
    assert ours.index.equals(theirs.index)
    assert ours.value.to_numpy() == pytest.approx(theirs.value.to_numpy(), abs=1e-9)
    (page,) = (tmp_path / "judged" / "wandb").glob("offline-run-*/files/media/html/evaluation/report*.html")
    assert page.read_text() == (tmp_path / "judged" / "evaluation" / "report.html").read_text()
    assert list((tmp_path / "judged" / "wandb").glob("offline-run-*/files/media/table/evaluation/verdict*.json"))
    config = RayConfig(cpus_per_worker=0.5)
    refs = jobs.start_tasks(
        Bench([], {}, relations="absent.tsv", genes={"x": None}),
        {"gene_relations": "tftrain.evals.gene_relations"},
        config,
    )
    with pytest.raises(CellsError, match=r"no file at absent\.tsv"):
        jobs.get(refs["gene_relations"])


def test_a_published_checkpoint_is_judged_and_says_what_is_not_known_of_it(tmp_path):
    """It records no training cells; columns of the file that it has no vector for are counted."""
    fixture = Path(__file__).parents[1] / "fixtures" / "simulated_cells"
    cells = ad.read_h5ad(fixture / "cells.h5ad")
    many = ad.concat([cells] * 6, merge="same")
    many.obs_names = [f"cell{n}" for n in range(len(many))]
    many.obs["cell_type"] = ["x", "y", "y"] * 24
    many.obs["donor_id"] = [f"d{n % 5}" for n in range(72)]
    many.write_h5ad(tmp_path / "cells.h5ad")
    verdict = run_evaluation(
        fixture / "checkpoint",
        EvaluateConfig(
            tasks=["likelihood", "celltypes"],
            baselines=["random"],
            unseen=[EvalSource(str(tmp_path / "cells.h5ad"), "homo_sapiens")],
            bootstraps=20,
        ),
        out=str(tmp_path / "judged"),
        console=Console(quiet=True),
    )
    assert verdict.value("trained", "homo_sapiens", "celltypes", "macro_f1", "logistic by cell") is not None
    notes = " | ".join(verdict.findings.notes)
    assert "which cells the checkpoint was trained on is not recorded" in notes
    assert "likelihood: left out" in notes
    assert "genes: homo_sapiens: " in notes
    assert "is not recorded in it" in (tmp_path / "judged" / "evaluation" / "report.html").read_text()
