"""Checkpoints are judged while the run goes on, each by its own weights, and are not deleted meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_metrics import wandb_history
from test_run import folder, recipe_text

from tftrain.errors import RecipeError
from tftrain.evals.run import run_evaluation
from tftrain.recipe import TrainRecipe, parse
from tftrain.run import run_recipe
from tftrain.training.checkpoint import IN_USE, CheckpointConfig, CheckpointStore
from tftrain.training.folder import Folder
from tftrain.training.metrics import read_evaluations, read_metrics

__all__ = ["folder"]

EVALUATE = "evaluate: {tasks: [likelihood], baselines: [], label: assay, bootstraps: 20}\nevaluate_beside: {cpus: 0.5}"


@pytest.mark.timeout(240)
def test_checkpoints_are_judged_beside_the_training(
    ray_cluster: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    text = recipe_text(
        folder,
        checkpoint="checkpoint: {save_every_steps: 5, keep_last: null}",
        ray="ray: {num_workers: 1}",
        evaluate=EVALUATE,
        wandb="wandb: {mode: offline}",
    )
    recipe = parse(text)
    assert isinstance(recipe, TrainRecipe)
    out = folder / "run"
    assert run_recipe(recipe) == 0

    found = read_evaluations(str(out))
    assert [line["step"] for line in found] == [5, 10]
    for line in found:
        checkpoint = out / "checkpoints" / f"step_{line['step']:08d}"
        assert not (checkpoint / IN_USE).exists()
        verdict = run_evaluation(checkpoint, recipe.evaluate, out=str(folder / "again"), seed=recipe.seed)
        for name in ("species_a", "species_b"):
            row = verdict.value("trained", name, "likelihood", "gene_nll", "held-out")
            assert line[f"eval/likelihood/{name}/gene_nll/held-out"] == pytest.approx(row.value, rel=1e-5)
    assert [line["step"] for line in read_metrics(str(out))] == list(range(1, 13)), "metrics are as they were"

    logged = [row for row in wandb_history(sorted(out.glob("wandb/offline-run-*/*.wandb"))) if "eval/step" in row]
    assert {row["eval/step"]: row["eval/likelihood/species_a/gene_nll/held-out"] for row in logged} == {
        line["step"]: line["eval/likelihood/species_a/gene_nll/held-out"] for line in found
    }


def test_a_checkpoint_in_use_is_not_deleted(folder: Path) -> None:
    run_recipe(parse(recipe_text(folder, checkpoint="checkpoint: {save_every_steps: 2, keep_last: null}")))
    store = CheckpointStore(str(folder / "run"), CheckpointConfig(keep_last=1), recipe_text="", identity={})
    used = Folder.at(folder / "run" / "checkpoints" / "step_00000004")
    used.write_text(IN_USE, "")
    store._prune()
    assert store.folder.names() == ["step_00000004", "step_00000012"]
    used.remove(IN_USE)
    store._prune()
    assert store.folder.names() == ["step_00000012"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ray": "ray: {num_workers: 0}"}, "a Ray cluster: set ray.num_workers"),
        ({"checkpoint": "checkpoint: {save_every_steps: null}"}, "set checkpoint.save_every_steps"),
        ({"evaluate": "evaluate_beside: {every_saves: 1}"}, "give an `evaluate` block"),
    ],
)
def test_contradictions(folder: Path, change: dict, message: str) -> None:
    lines = {"ray": "ray: {num_workers: 1}", "evaluate": EVALUATE, **change}
    with pytest.raises(RecipeError, match=message):
        parse(recipe_text(folder, **lines))
