"""Training across raylets: a node that dies is replaced by another, or done without where the recipe allows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_run import folder
from test_survival import N_STEPS, assert_equal, text_of, undisturbed

from tftrain.recipe import dump, parse

__all__ = ["folder", "undisturbed"]

SCRIPT = Path(__file__).parent / "training" / "nodes.py"


def run_on_nodes(folder: Path, ray: str, n_nodes: int, events: dict[int, str], **payload: float) -> list[str]:
    """Runs the recipe of the survival tests; the marks that its groups of workers left."""
    text = text_of(folder).replace("ray: {num_workers: 2, cpus_per_worker: 1.0}", f"ray: {ray}")
    (folder / "run").mkdir()
    recipe = parse(text)
    (folder / "run" / "recipe.yaml").write_text(dump(recipe))
    plan = {"recipe": dump(recipe), "n_nodes": n_nodes, "events": events, "marks": str(folder), "payload": payload}
    (folder / "plan.json").write_text(json.dumps(plan))
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "plan.json")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
        check=False,
    )
    assert "outcome: finished" in done.stdout, done.stdout[-4000:]
    return sorted(path.name for path in folder.glob("began_*"))


@pytest.mark.timeout(420)
def test_a_node_that_dies_is_replaced(folder: Path, undisturbed: dict) -> None:
    """Two workers on two of three nodes; the first of them dies."""
    ray = "{num_workers: 2, cpus_per_worker: 1.0, placement: STRICT_SPREAD}"
    began = run_on_nodes(folder, ray, 3, {8: "lose"}, pause_s=0.1)
    assert_equal(folder / "run", undisturbed)
    assert "began_0_with_2" in began
    assert all(name.endswith("_with_2") for name in began)


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_workers_become_fewer(folder: Path, undisturbed: dict) -> None:
    """`num_workers: [1, 2]` on two nodes, of which one dies and is not replaced. Ray takes a minute to go on."""
    ray = "{num_workers: [1, 2], cpus_per_worker: 1.0, placement: STRICT_SPREAD, resize_every_s: 1.0}"
    began = run_on_nodes(folder, ray, 2, {8: "lose"}, pause_s=0.1)
    assert_equal(folder / "run", undisturbed)
    steps = [(int(name.split("_")[1]), int(name.split("_")[3])) for name in began]
    assert [n_workers for _, n_workers in sorted(steps)] == [2, 1]
    assert 0 < max(steps)[0] < N_STEPS
