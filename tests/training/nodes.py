"""A run over several raylets of this machine, some of which die on the way: `python nodes.py PLAN.json`.

A process of its own, since a process is connected to one Ray cluster. PLAN holds the recipe and, by step, what happens
to the nodes then: {"10": "lose"}. The head has no CPUs, so that every worker is on a node that may die.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from tftrain.launch import launch
from tftrain.recipe import TrainRecipe, dump, parse
from tftrain.training.metrics import read_metrics

STORE = 80 * 1024**2
"""Bytes of a node's object store: the least that Ray takes."""


class Nodes:
    """Raylets with one CPU each."""

    def __init__(self, n_nodes: int):
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "object_store_memory": STORE, "include_dashboard": False},
        )
        self.nodes = [self._new() for _ in range(n_nodes)]

    def _new(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def lose(self) -> None:
        """The first node and all that runs on it are killed."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


def happen(nodes: Nodes, events: dict[int, str], out: str) -> None:
    """Each event as soon as its step is on record."""
    for step, event in sorted(events.items()):
        while max((line["step"] for line in read_metrics(out)), default=0) < step:
            time.sleep(0.05)
        getattr(nodes, event)()


def main(plan_file: str) -> None:
    plan = json.loads(Path(plan_file).read_text())
    recipe = parse(plan["recipe"])
    assert isinstance(recipe, TrainRecipe)
    nodes = Nodes(plan["n_nodes"])
    ray.init(address=nodes.cluster.address, log_to_driver=False, logging_level="warning")
    events = {int(step): event for step, event in plan["events"].items()}
    threading.Thread(target=happen, args=(nodes, events, recipe.out), daemon=True).start()
    payload = {"recipe": dump(recipe), "kills": [], "marks": plan["marks"], **plan["payload"]}
    outcome = launch("killed_worker:run", payload, recipe.ray, out=recipe.out)
    sys.stdout.write(f"outcome: {outcome}\n")
    ray.shutdown()
    nodes.cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
