"""Whole recipes under kill -9, SIGTERM, Ctrl-C and a killed driver: the losses are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_run import folder, losses, recipe_text

from data_prep.audit import audit
from tftrain.launch import launch
from tftrain.recipe import TrainRecipe, dump, parse
from tftrain.run import run_recipe

__all__ = ["folder"]

N_STEPS = 24
SEED = 11
"""Of the steps and ranks that are killed."""


def text_of(folder: Path, **changes: str) -> str:
    """Two species, held-out cells, a ledger; a step of 16 cells."""
    train = f"train: {{steps: {N_STEPS}, cells_per_step: 16, tokens_per_gpu: 256, heldout_every_steps: 8}}"
    # Without dropout, which is drawn rank by rank, one rank's losses are those of two.
    model = "model: {layers: 1, heads: 2, width: 16, feedforward_width: 16, gene_head_width: 16, genes_per_cell: 32, "
    text = recipe_text(
        folder,
        model=f"{model}dropout: 0.0}}",
        train=train,
        engine="engine: {zero_stage: 2}",
        checkpoint="checkpoint: {save_every_steps: 3, keep_last: 2}",
        ray="ray: {num_workers: 2, cpus_per_worker: 1.0}",
        **changes,
    )
    return text.replace("  stream: {backend: local}", "  stream: {backend: local}\n  ledger: true")


@pytest.fixture
def undisturbed(folder: Path) -> dict[int, float]:
    run_recipe(parse(text_of(folder), overrides=[f"out={folder}/whole", "ray.num_workers=0"]))
    return losses(folder / "whole")


def assert_equal(out: Path, expected: dict[int, float]) -> None:
    got = losses(out)
    assert list(got) == list(range(1, N_STEPS + 1)), "each step once"
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
    assert audit(str(out)).faults == []


def launch_with(folder: Path, recipe: TrainRecipe, kills: list, **more: Any) -> str:
    (folder / "run").mkdir(exist_ok=True)
    (folder / "run" / "recipe.yaml").write_text(dump(recipe))
    payload = {"recipe": dump(recipe), "kills": kills, "marks": str(folder), **more}
    return launch("killed_worker:run", payload, recipe.ray, out=recipe.out)


def test_three_killed_workers_do_not_change_a_loss(ray_cluster: str, folder: Path, undisturbed: dict) -> None:
    chance = random.Random(SEED)
    # One in each third, never before the first checkpoint is due.
    kills = [[chance.randint(first + 3, first + 7), chance.randint(0, 1)] for first in (0, 8, 16)]
    recipe = parse(text_of(folder))
    assert isinstance(recipe, TrainRecipe)
    assert launch_with(folder, recipe, kills) == "finished"
    began = [0, *(step // 3 * 3 for step, _ in kills)]
    assert sorted(path.name for path in folder.glob("began_*")) == sorted(f"began_{step}_with_2" for step in began)
    assert sorted(path.name for path in folder.glob("killed_*")) == sorted(f"killed_{step}" for step, _ in kills)
    assert_equal(folder / "run", undisturbed)


PAUSE_S = "0.2"


def start(path: Path, address: str | None) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if address:
        environment["RAY_ADDRESS"] = address
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "training" / "killed_worker.py"), str(path), PAUSE_S],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen, out: Path, step: int, seconds: float = 180) -> None:
    """Returns when `step` is done."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if max(losses(out), default=0) >= step:
            return
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not done in {seconds} s")


def test_sigterm_and_a_killed_driver_do_not_change_a_loss(ray_cluster: str, folder: Path, undisturbed: dict) -> None:
    path, out = folder / "recipe.yaml", folder / "run"
    path.write_text(text_of(folder))
    marker = out / "checkpoints" / f"step_{N_STEPS:08d}" / "COMPLETE"

    process = start(path, ray_cluster)
    wait_for_step(process, out, 2)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=120)[0]
    assert process.returncode == 143, printed[-3000:]
    assert "SIGTERM: saving after the step under way" in printed
    stopped_at = max(losses(out))
    assert f"stopped at step {stopped_at} of {N_STEPS}: saved {out}/checkpoints/step_{stopped_at:08d}" in printed
    assert 2 <= stopped_at < N_STEPS, "the step under way, not the run"

    process = start(path, ray_cluster)
    wait_for_step(process, out, stopped_at + 2)
    process.kill()
    process.communicate(timeout=60)
    assert not marker.exists(), "killed before its end"

    process = start(path, ray_cluster)
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed[-3000:]
    assert "continues at step " in printed
    assert_equal(out, undisturbed)


def test_ctrl_c_in_a_run_without_ray(folder: Path, undisturbed: dict) -> None:
    path, out = folder / "recipe.yaml", folder / "run"
    path.write_text(text_of(folder).replace("num_workers: 2", "num_workers: 0"))
    process = start(path, None)
    wait_for_step(process, out, 2)
    os.killpg(process.pid, signal.SIGINT)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 130, printed[-3000:]
    assert f"stopped at step {max(losses(out))} of {N_STEPS}: saved " in printed
    run_recipe(parse(path.read_text()))
    assert_equal(out, undisturbed)
