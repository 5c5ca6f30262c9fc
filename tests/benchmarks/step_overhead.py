"""Share of a training step that is not forward pass, backward pass and optimiser, on two Ray workers.

    python tests/benchmarks/step_overhead.py [--store FOLDER]

In: a store of 8,000 cells x 6,000 genes that it makes itself, read through Ray Data by two workers at ZeRO stage 2, and
the traces that the recipe's `profile:` block leaves. Out: a table, and as the last line one JSON object. The overhead
is the time between the beginnings of two steps less the time inside the engine (`COMPUTE` in the trace), which holds
the ranks' exchange of gradients; waiting for data, packing, agreement between ranks, metrics and reports are overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
from cells import gene_ids, make_store

from tftrain.cells.vocab import write_protein_table
from tftrain.recipe import parse
from tftrain.run import run_recipe
from tftrain.training.metrics import read_metrics
from tftrain.training.trainer import COMPUTE

N_CELLS, N_GENES, EXPRESSED, FIRST, TRACED = 8_000, 6_000, 600, 6, 10
RECIPE = """
out: {out}
data:
  sources: [{{uri: {store}, species: homo_sapiens}}]
  protein_tables: [{table}]
  obs_filter: ""
  order: {{lanes: 2, chunk_cells: 256, window_cells: 1024}}
  stream: {{reader_cpus: 0.25, concurrency: 1}}
model:
  {{layers: 2, heads: 4, width: 64, feedforward_width: 128, gene_head_width: 256, genes_per_cell: 700, assays: []}}
train: {{steps: {steps}, cells_per_step: {cells}, tokens_per_gpu: 4096, heldout_every_steps: null, log_every_steps: 1}}
engine: {{zero_stage: 2}}
checkpoint: {{save_every_steps: 1000}}
profile: {{start_step: {first}, steps: {traced}}}
ray: {{num_workers: 2, cpus_per_worker: 0.75, local_cpus: 2}}
"""


def shares(trace: Path) -> tuple[list[float], list[float]]:
    """(seconds of a step, overhead of a step as a share of it) of every traced step but the last."""
    events = json.loads(trace.read_text())["traceEvents"]
    spans = sorted((e["ts"], e["dur"]) for e in events if e.get("name") == COMPUTE and e.get("ph") == "X")
    periods = [after[0] - before[0] for before, after in pairwise(spans)]
    return [period / 1e6 for period in periods], [
        1 - duration / period for (_, duration), period in zip(spans, periods)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="folder for the store; kept")
    parser.add_argument("--cells", type=int, default=16, help="cells of a step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        store = make_store(arguments.store or folder / "cells.soma", N_CELLS, N_GENES, EXPRESSED)
        vectors_GE = np.random.default_rng(0).standard_normal((N_GENES, 64)).astype(np.float32)
        write_protein_table(folder / "genes.h5", gene_ids(N_GENES), vectors_GE)
        out, steps = folder / "run", FIRST + TRACED + 2
        text = RECIPE.format(
            out=out,
            store=store,
            table=folder / "genes.h5",
            steps=steps,
            cells=arguments.cells,
            first=FIRST,
            traced=TRACED,
        )
        run_recipe(parse(text))
        traced = [shares(path) for path in sorted((out / "profile").glob("*.json"))]
        waits = [line["perf/data_wait_fraction"] for line in read_metrics(str(out))[FIRST - 1 : FIRST - 1 + TRACED]]
    print(f"{'rank':>4} {'step, s':>8} {'overhead, median':>17} {'greatest':>9}")
    for rank, (seconds, overheads) in enumerate(traced):
        print(
            f"{rank:>4} {statistics.median(seconds):>8.2f} {statistics.median(overheads):>16.1%} {max(overheads):>8.1%}"
        )
    result = {
        "step_s": round(statistics.median(traced[0][0]), 3),
        "overhead_share": [round(statistics.median(overheads), 4) for _, overheads in traced],
        "data_wait_fraction": round(statistics.fmean(waits), 5),
        "traced_steps": TRACED,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
