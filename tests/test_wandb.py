"""An offline W&B folder of a whole run holds its configuration, every metric of every step, and one id through
resumes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_metrics import wandb_history, wandb_records
from test_run import folder, recipe_text

from tftrain.recipe import parse, to_dict
from tftrain.run import run_recipe
from tftrain.training.metrics import read_metrics

__all__ = ["folder"]

OWN = ("_step", "_timestamp", "_runtime")


def test_an_offline_folder_holds_the_whole_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    recipe = parse(recipe_text(folder), overrides=["wandb.mode=offline", "wandb.name=pancreas"])
    out = folder / "run"
    run_recipe(recipe)
    # As if it had been killed after step 10.
    (out / "checkpoints" / "step_00000012" / "COMPLETE").unlink()
    run_recipe(recipe)

    files = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    manifest = json.loads((out / "checkpoints" / "step_00000012" / "manifest.json").read_text())
    assert [file.name for file in files] == [f"run-{manifest['wandb_run_id']}.wandb"] * 2, "one id"
    runs = [record.run for file in files for record in wandb_records(file) if record.HasField("run")]
    assert {run.display_name for run in runs} == {"pancreas"}
    config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
    assert config["recipe"] == to_dict(recipe) | {"out": str(out)}
    assert config["data"]["plan_fingerprint"] == manifest["plan_fingerprint"]
    assert config["system"]["world_size"] == 1

    written: dict[int, dict[str, Any]] = {}
    for row in wandb_history(files):
        written[row["_step"]] = {key: value for key, value in row.items() if key not in OWN}
    lines = {line.pop("step"): line for line in read_metrics(str(out))}
    assert list(written) == list(lines) == list(range(1, 13))
    # The steps after the one that the run continued from were done twice; the second time counts in both places.
    assert written == lines
