"""Evaluation beside training: saved checkpoints are judged by tasks of the same Ray cluster while the run goes on.

In: the recipe of a run under way, and a call now and then. Out: a line a checkpoint in `<out>/evaluations.jsonl`
(`{"step": ..., "eval/<task>/<data set>/<metric>/<variant>": ...}`), its report under `<out>/evaluations/<checkpoint>`.
A checkpoint stays while it is being judged. An evaluation that fails is reported and never stops the training.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from tftrain.cells.storage import first_line
from tftrain.errors import CheckpointError
from tftrain.evals.contract import Row
from tftrain.evals.run import run_evaluation
from tftrain.recipe import EvaluateConfig, TrainRecipe
from tftrain.training.checkpoint import CHECKPOINTS, IN_USE, CheckpointStore, read_manifest, require_complete
from tftrain.training.folder import Folder
from tftrain.training.metrics import EVALUATIONS, MetricsWriter, read_evaluations

LOOK_EVERY_S = 1.0


@dataclass
class _Running:
    """One evaluation under way."""

    folder: Folder
    step: int
    result: Any
    """Ray's reference to what `_evaluate` returns."""


class Beside:
    """Starts and collects the evaluations of one run, one at a time, the oldest checkpoint first. Lives in the
    driver."""

    def __init__(self, recipe: TrainRecipe):
        assert recipe.evaluate is not None
        assert recipe.evaluate_beside is not None
        self._config, self._beside, self._seed = recipe.evaluate, recipe.evaluate_beside, recipe.seed
        self._every_steps = (recipe.checkpoint.save_every_steps or 1) * recipe.evaluate_beside.every_saves
        self._out = Folder.at(recipe.out)
        self._done = {line["step"] for line in read_evaluations(self._out)}
        self._running: _Running | None = None
        self._looked_at = 0.0

    def poll(self, say: Callable[[str], None]) -> None:
        """Collects what has ended, with a line about it to `say`, and starts what is due. Returns at once."""
        if time.monotonic() - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = time.monotonic()
        self._collect(say, wait_s=0)
        if self._running is None:
            self._start_next()

    def finish(self, say: Callable[[str], None]) -> None:
        """Waits for every checkpoint that is due."""
        while True:
            if self._running is None:
                self._start_next()
            if self._running is None:
                return
            say(f"evaluating the checkpoint of step {self._running.step:,}")
            self._collect(say, wait_s=None)

    def cancel(self) -> None:
        """Ends the evaluation under way; it is done when the run continues."""
        if self._running:
            import ray

            ray.cancel(self._running.result, force=True)
            self._running.folder.remove(IN_USE)
            self._running = None

    def tell_wandb(self, recipe: TrainRecipe) -> None:
        """Adds what was found after the training had ended to its W&B run, as one more part of it."""
        latest = CheckpointStore(recipe.out, recipe.checkpoint, recipe_text="", identity={}).latest()
        if latest is None or not self._done:
            return
        manifest = read_manifest(latest)
        run_id = manifest.get("wandb_run_id")
        MetricsWriter(recipe.out, recipe.wandb, resume_step=manifest["step"], wandb_run_id=run_id).close()

    def _start_next(self) -> None:
        import ray

        checkpoints = self._out / CHECKPOINTS
        for name in checkpoints.names():
            step = int(name.removeprefix("step_")) if name.startswith("step_") else 0
            if step == 0 or step % self._every_steps or step in self._done:
                continue
            folder = checkpoints / name
            try:
                require_complete(folder)
                folder.write_text(IN_USE, "being evaluated\n")
            except (CheckpointError, OSError):
                continue
            task = ray.remote(num_cpus=self._beside.cpus, max_retries=1)(_evaluate)
            out = (self._out / "evaluations" / name).uri
            self._running = _Running(folder, step, task.remote(folder.uri, self._config, out, self._seed))
            return

    def _collect(self, say: Callable[[str], None], *, wait_s: float | None) -> None:
        import ray

        running = self._running
        if running is None or not ray.wait([running.result], timeout=wait_s)[0]:
            return
        self._running = None
        self._done.add(running.step)
        try:
            values = ray.get(running.result)
        except Exception as error:  # whatever it is, the training is worth more
            cause = getattr(error, "cause", None) or error
            say(f"the evaluation of step {running.step:,} failed: {first_line(cause)}")
            return
        finally:
            running.folder.remove(IN_USE)
        lines = [*read_evaluations(self._out), {"step": running.step, **values}]
        lines.sort(key=lambda line: line["step"])
        self._out.write_text(EVALUATIONS, "".join(json.dumps(line) + "\n" for line in lines))
        headline = ", ".join(f"{key.removeprefix('eval/')} {value:.3f}" for key, value in list(values.items())[:3])
        say(f"evaluated step {running.step:,}: {headline}")


def _evaluate(checkpoint: str, config: EvaluateConfig, out: str, seed: int) -> dict[str, float]:
    """In a Ray task: the model's own values; those of the baselines stand in its report."""
    verdict = run_evaluation(checkpoint, config, out=out, seed=seed, console=Console(file=io.StringIO()))
    return {
        f"eval/{_key(row)}": row.value
        for row in verdict.findings.rows
        if row.model == "trained" and row.fold == -1 and row.value == row.value
    }


def _key(row: Row) -> str:
    return "/".join(part for part in (row.task, row.dataset, row.metric, row.variant) if part)
