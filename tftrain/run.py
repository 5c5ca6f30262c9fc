"""One recipe from start to finish, on the driver: prepare, check, train, evaluate. `tftrain run` is this."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tftrain import tuning
from tftrain.assemble import RECIPE_FILE, derive, refuse_another_run, with_absolute_paths
from tftrain.beside import Beside
from tftrain.embed import embed_h5ad
from tftrain.errors import RecipeError
from tftrain.evals.run import check as check_evaluation
from tftrain.evals.run import run_evaluation
from tftrain.launch import launch
from tftrain.predict import predict_h5ad
from tftrain.recipe import EmbedRecipe, EvaluateRecipe, FinetuneRecipe, PredictRecipe, Recipe, TrainRecipe, dump
from tftrain.stop import Stop
from tftrain.training.folder import Folder


def run_recipe(recipe: Recipe) -> int:
    """Does what the recipe says, or continues it; returns the exit code."""
    return _TASKS[recipe.task](recipe)


def _embed(recipe: EmbedRecipe) -> int:
    embed_h5ad(
        recipe.checkpoint,
        recipe.cells,
        recipe.out,
        emb_type=recipe.emb_type,
        output_keys=recipe.output_keys,
        pretrained_embedding=recipe.pretrained_embedding,
        gene_col_name=recipe.gene_col_name,
    )
    return 0


def _finetune(recipe: FinetuneRecipe) -> int:
    recipe = with_absolute_paths(recipe)
    prepare(recipe.prepare)
    # A checkpoint that is not there is named before stores are built.
    recipe = tuning.pinned(recipe)
    prepare(tuning.build_commands(recipe))
    return _train(tuning.resolve(recipe), is_prepared=True)


def _train(recipe: TrainRecipe, *, is_prepared: bool = False) -> int:
    recipe = with_absolute_paths(recipe)
    refuse_another_run(recipe)
    if recipe.evaluate:
        check_evaluation(recipe.evaluate)
    if not is_prepared:
        prepare(recipe.prepare)
    # Whatever cannot be trained on is refused here, before a worker starts.
    for line in derive(recipe):
        print(line, flush=True)
    folder = Folder.at(recipe.out)
    folder.make()
    folder.write_text(RECIPE_FILE, dump(recipe))
    stream, stop = recipe.data.stream, Stop()
    beside = Beside(recipe) if recipe.evaluate_beside else None
    reader_cpus = stream.reader_cpus * recipe.ray.most_workers if stream.backend == "ray" else 0.0
    outcome = launch(
        "tftrain.assemble:run_worker",
        {"recipe": dump(recipe)},
        recipe.ray,
        out=recipe.out,
        title=recipe.task,
        reader_cpus=reader_cpus + (recipe.evaluate_beside.cpus if recipe.evaluate_beside else 0.0),
        stop=stop,
        beside=beside,
    )
    if beside and recipe.wandb.mode != "disabled":
        beside.tell_wandb(recipe)
    print(f"{outcome}: {recipe.out}", flush=True)
    if stop.is_asked:
        print("the same command continues", flush=True)
        return stop.exit_code
    if recipe.evaluate and outcome == "finished":
        verdict = run_evaluation(recipe.out, recipe.evaluate, out=recipe.out, seed=recipe.seed, wandb=recipe.wandb)
        return 1 if verdict.shortfalls else 0
    return 0


def _predict(recipe: PredictRecipe) -> int:
    predict_h5ad(
        recipe.checkpoint,
        recipe.cells,
        recipe.out,
        is_unknown_told=recipe.unknown,
        gene_col_name=recipe.gene_col_name,
    )
    return 0


def _evaluate(recipe: EvaluateRecipe) -> int:
    verdict = run_evaluation(
        recipe.checkpoint,
        recipe.evaluate,
        out=recipe.out,
        seed=recipe.seed,
        ray=recipe.ray,
        wandb=recipe.wandb,
    )
    return 1 if verdict.shortfalls else 0


def prepare(commands: list[str]) -> None:
    """Runs the recipe's `prepare` commands, in order, with this installation's programs first on the PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for command in commands:
        print(f"$ {command}", flush=True)
        done = subprocess.run(shlex.split(command), env={**os.environ, "PATH": path}, check=False)
        if done.returncode:
            raise RecipeError(f"prepare: {command!r} ended with exit code {done.returncode}; its message stands above")


_TASKS: dict[str, Callable[..., int]] = {
    "pretrain": _train,
    "finetune": _finetune,
    "embed": _embed,
    "evaluate": _evaluate,
    "predict": _predict,
}
