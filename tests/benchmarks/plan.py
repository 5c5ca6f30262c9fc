"""Times the order of a full Metazoa run and simulates how well it mixes: `python tests/benchmarks/plan.py`.

In: nothing; 12 stores of 112 million cells that do not exist, and a stand-in of the Census of 60 million cells in 1,500
data sets of lognormal sizes, laid end to end as in the Census. Out: a table, and one JSON object as the last line:
seconds and peak memory of planning every window of an epoch, and the entropy of data sets in a minibatch of the plan's
own steps over that of random minibatches, at the orders of recipes/pretrain_sapiens.yaml and of the defaults.
"""

from __future__ import annotations

import json
import resource
import sys
import time

import numpy as np

from tftrain.cells.plan import OrderConfig, Plan, PlanSource

METAZOA = (57e6, 38e6, 4e6, 3e6, 2e6, 2e6, 2e6, 1e6, 1e6, 1e6, 5e5, 5e5)
CENSUS_CELLS, CENSUS_DATASETS, SPREAD = 60_000_000, 1500, 1.6
ORDERS = {"recipe": OrderConfig(64, 2048, 32768), "default": OrderConfig()}


def peak_mb() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def time_plan() -> dict[str, float]:
    """Every window of an epoch of all ranks, with the sources it reads; not the shuffle inside a window."""
    sources = tuple(PlanSource(f"s{i}", f"s{i}", int(n), "") for i, n in enumerate(METAZOA))
    before_mb, started = peak_mb(), time.perf_counter()
    plan = Plan(sources, 0, ORDERS["recipe"], 2048)
    n_cells = sum(window.n_cells for window in plan.windows(0, plan.epoch_start(1)))
    assert n_cells == sum(METAZOA)
    first = time.perf_counter()
    next(plan.windows(plan.epoch_start(3), rank=5, world=16))
    return {
        "cells": n_cells,
        "seconds": first - started,
        "seconds_to_a_first_window": time.perf_counter() - first,
        "added_mb": peak_mb() - before_mb,
        "peak_mb": peak_mb(),
    }


def entropy(labels: np.ndarray) -> float:
    """In nats."""
    share = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(share * np.log(share)).sum())


def mixing(order: OrderConfig, cells_per_step: int, n_steps: int = 400) -> float:
    """Mean entropy of data sets in steps from the middle of an epoch, over that of random minibatches."""
    rng = np.random.default_rng(0)
    size = rng.lognormal(0, SPREAD, CENSUS_DATASETS)
    end = np.cumsum(np.maximum(size / size.sum() * CENSUS_CELLS, 50).astype(np.int64))
    plan = Plan((PlanSource("census", "human", int(end[-1]), ""),), 0, order, cells_per_step)
    begin = plan.cursor_after(plan.n_steps(1) // 2)
    stop = begin + n_steps * cells_per_step
    parts: dict[int, list[np.ndarray]] = {lane: [] for lane in range(order.lanes)}
    for window in plan.windows(begin, stop):
        parts[window.lane].append(np.searchsorted(end, window.cells()[1], side="right"))
    lanes = np.stack([np.concatenate(parts[lane])[: n_steps * cells_per_step // order.lanes] for lane in parts])
    steps = np.split(lanes, n_steps, axis=1)
    perfect = [
        entropy(np.searchsorted(end, rng.integers(0, end[-1], cells_per_step), side="right")) for _ in range(n_steps)
    ]
    return float(np.mean([entropy(step.ravel()) for step in steps]) / np.mean(perfect))


def main() -> None:
    """See the head of this file."""
    planning = time_plan()
    print(f"planning 112 M cells of 12 stores: {planning['seconds']:.2f} s, {planning['peak_mb']:,.0f} MB at the peak")
    mixed: dict[str, dict[str, float]] = {}
    for name, order in ORDERS.items():
        mixed[name] = {str(n): round(mixing(order, n), 4) for n in (128, 256, 2048)}
        shown = ", ".join(f"{value:.3f} of i.i.d. at {n} cells a step" for n, value in mixed[name].items())
        print(f"{name}: {order.lanes} lanes x {order.window_cells:,} cells, chunks of {order.chunk_cells:,}: {shown}")
    print(json.dumps({"planning": planning, "entropy": mixed}))
    sys.exit(planning["seconds"] > 10 or planning["peak_mb"] > 500 or mixed["recipe"]["256"] < 0.98)


if __name__ == "__main__":
    main()
