"""Times readers of one SOMA store against each other: `python tests/benchmarks/readers.py [--store FOLDER]`.

In: a store of 100,000 cells x 20,000 genes, about 1,500 expressed, that it makes itself (some minutes) in a temporary
folder or, once for all, at --store. Out: a table, and as the last line one JSON object. Every reader runs alone in a
fresh process under the same allocator settings, reads a full epoch `--repetitions` times in turn with the others, and
hands over minibatches of 256 cells with their 2,047 genes chosen by the same compiled function.

    limit             decoding the store in reads of a row of tiles, and tokenising, alone: the least it can cost
    tftrain           our stream in one process, at the default order
    tftrain-ray       our stream through Ray Data (a local cluster; its start is not counted)
    tftrain-2, tftrain-ray-2   two epochs of both, in which Ray Data's start of some seconds counts for less
    tftrain-10        our stream where a window holds under 10 % of the cells
    tiledbsoma-ml     64 x 65,536, its defaults
    tiledbsoma-ml-10  64 x 8,192: a window holds 8 % of the cells, as any window does of the Census
    scdataset         blocks of 64 rows, 32 minibatches fetched at a time, from the same store
    anndata           rows of an .h5ad file of 20,000 of the cells, opened backed, at random, 20 s

cells/CPU-s counts user and system time of the process (of all its children for Ray). entropy is that of the data sets
(plates) in a minibatch, over what random minibatches have. Peers that are not installed are left out: pip install
'.[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cells import PLATES, gene_ids, make_store, plate_of

from tftrain.cells.contract import Cells
from tftrain.cells.plan import OrderConfig, Plan
from tftrain.cells.read import _query
from tftrain.cells.source import HoldoutConfig, QcConfig, Source, SourceConfig, open_sources
from tftrain.cells.stream import ALLOCATOR, StreamConfig, stream_steps
from tftrain.cells.vocab import Vocab
from tftrain.models.transcriptformer.batch import _keep

BATCH, GENES_PER_CELL, N_GENES = 256, 2047, 20_000
NEEDS = {"tiledbsoma-ml": "tiledbsoma_ml", "tiledbsoma-ml-10": "tiledbsoma_ml", "scdataset": "scdataset"}
ANNDATA_CELLS, ANNDATA_SECONDS = 20_000, 20.0
Batches = Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
"""(cell starts, genes, counts, joinids) of each minibatch."""


def tokenise(start_C1: np.ndarray, gene_N: np.ndarray, count_N: np.ndarray, joinid_C: np.ndarray) -> int:
    """Permutes and truncates as training does; returns the genes kept."""
    start_C1, joinid_C = start_C1.astype(np.int64), joinid_C.astype(np.int64)
    source_C = np.zeros(len(joinid_C), np.int64)
    gene_N, count_N = gene_N.astype(np.int32, copy=False), count_N.astype(np.int32, copy=False)
    genes, _ = _keep(start_C1, gene_N, count_N, source_C, joinid_C, np.uint64(7), True, GENES_PER_CELL, 30.0, 0.0)
    return len(genes)


def open_store(store: Path) -> list[Source]:
    """Every cell of the store, as training opens it."""
    vocab = Vocab.of(gene_ids(N_GENES), np.zeros((N_GENES, 2), np.float32))
    config = SourceConfig(str(store), "homo_sapiens")
    return open_sources([config], vocab, qc=QcConfig(0, 0), holdout=HoldoutConfig(fraction=0))


def ours(store: Path, order: OrderConfig, config: StreamConfig, n_epochs: int = 1) -> Batches:
    """Epochs of our stream."""
    sources = open_store(store)
    plan = Plan((sources[0].plan_source,), 0, order, BATCH)
    for cells, _ in stream_steps(plan, sources, stop_cursor=plan.epoch_start(n_epochs), config=config):
        yield cells.cell_start_C1, cells.gene_N, cells.count_N, cells.joinid_C


def tftrain(store: Path) -> Batches:
    """At the default order, in one process."""
    return ours(store, OrderConfig(), StreamConfig(backend="local"))


def tftrain_10(store: Path) -> Batches:
    """Windows of 8 % of the cells, mixed as well as those of tiledbsoma-ml are."""
    return ours(store, OrderConfig(16, 1024, 8192), StreamConfig(backend="local"))


def tftrain_ray(store: Path) -> Batches:
    """At the default order, through Ray Data."""
    return ours(store, OrderConfig(), StreamConfig(backend="ray"))


def tftrain_2(store: Path) -> Batches:
    """Two epochs in one process."""
    return ours(store, OrderConfig(), StreamConfig(backend="local"), n_epochs=2)


def tftrain_ray_2(store: Path) -> Batches:
    """Two epochs through Ray Data."""
    return ours(store, OrderConfig(), StreamConfig(backend="ray"), n_epochs=2)


def limit(store: Path) -> Batches:
    """Decodes everything and tokenises other cells, as many: no rows are put together, nothing is shuffled."""
    (source,) = open_store(store)
    n_cells, size = source.n_cells, 2048
    rng, kept = np.random.default_rng(0), []
    for _ in range(BATCH):
        kept.append(np.sort(rng.choice(N_GENES, 1500, replace=False)))
    start_C1, gene_N = np.arange(BATCH + 1) * 1500, np.concatenate(kept).astype(np.int32)
    for first in range(0, n_cells, size):
        stop = min(first + size, n_cells)
        for _ in _query(source, np.arange(first, stop)):
            pass
        for joinid in range(first, stop, BATCH):
            n = min(BATCH, stop - joinid)
            yield start_C1[: n + 1], gene_N[: n * 1500], np.ones(n * 1500, np.int32), np.arange(joinid, joinid + n)


def _soma_ml(store: Path, io_batch_size: int) -> Batches:
    import tiledbsoma
    from tiledbsoma_ml import ExperimentDataset

    with tiledbsoma.Experiment.open(str(store)) as experiment:
        query = experiment.axis_query(measurement_name="RNA")
        dataset = ExperimentDataset(
            query,
            layer_name="raw",
            obs_column_names=["soma_joinid"],
            batch_size=BATCH,
            io_batch_size=io_batch_size,
            shuffle=True,
            shuffle_chunk_size=64,
            seed=0,
            return_sparse_X=True,
            use_eager_fetch=True,
        )
        for X, obs in dataset:
            yield X.indptr, X.indices, X.data, obs["soma_joinid"].to_numpy()


def soma_ml(store: Path) -> Batches:
    """At its defaults."""
    return _soma_ml(store, 65_536)


def soma_ml_10(store: Path) -> Batches:
    """Windows of 8 % of the cells."""
    return _soma_ml(store, 8192)


def scdataset(store: Path) -> Batches:
    """Blocks of 64 rows from the SOMA store; 32 minibatches are fetched and shuffled at a time."""
    import tiledbsoma
    from scdataset import BlockShuffling, scDataset

    with tiledbsoma.Experiment.open(str(store)) as experiment:
        X = experiment.ms["RNA"].X["raw"]

        def fetch(collection: Any, joinids: Any) -> tuple[Any, np.ndarray]:
            joinids = np.asarray(joinids)
            order = np.argsort(joinids)
            blocks = X.read((joinids[order], slice(None))).blockwise(axis=0, size=len(joinids)).scipy()
            matrix = next(iter(blocks))[0]
            inverse = np.empty(len(order), np.int64)
            inverse[order] = np.arange(len(order))
            return matrix[inverse], joinids

        dataset = scDataset(
            range(experiment.obs.count),
            BlockShuffling(block_size=64),
            batch_size=BATCH,
            fetch_factor=32,
            fetch_callback=fetch,
            batch_callback=lambda fetched, index: (fetched[0][index], fetched[1][index]),
        )
        for matrix, joinid in dataset:
            yield matrix.indptr, matrix.indices, matrix.data, joinid


def backed(store: Path) -> Batches:
    """Random rows of a backed .h5ad, 20 s long."""
    import anndata

    path = store.with_suffix(".h5ad")
    if not path.exists():
        _write_h5ad(store, path)
    data, rng, stop = anndata.read_h5ad(path, backed="r"), np.random.default_rng(0), time.monotonic() + ANNDATA_SECONDS
    order = rng.permutation(data.n_obs)
    for first in range(0, data.n_obs, BATCH):
        if time.monotonic() > stop:
            return
        rows = np.sort(order[first : first + BATCH])
        matrix = data.X[rows]
        yield matrix.indptr, matrix.indices, matrix.data, rows


def _write_h5ad(store: Path, path: Path) -> None:
    """Cells of all plates, every fifth chunk of the store."""
    import anndata
    import scipy.sparse as sp

    from tftrain.cells.read import read_rows

    (source,) = open_store(store)
    cells: Cells = read_rows(source, np.arange(min(ANNDATA_CELLS, source.n_cells)))
    X = sp.csr_matrix((cells.count_N.astype(np.float32), cells.gene_N, cells.cell_start_C1), (len(cells), N_GENES))
    anndata.AnnData(X).write_h5ad(path)


READERS: dict[str, Callable[[Path], Batches]] = {
    "limit": limit,
    "tftrain": tftrain,
    "tftrain-ray": tftrain_ray,
    "tftrain-2": tftrain_2,
    "tftrain-ray-2": tftrain_ray_2,
    "tiledbsoma-ml": soma_ml,
    "tftrain-10": tftrain_10,
    "tiledbsoma-ml-10": soma_ml_10,
    "scdataset": scdataset,
    "anndata": backed,
}


def cpu_seconds(is_ray: bool) -> float:
    """Of this process so far; with Ray, of all processes that it started and that live."""
    if is_ray:
        import psutil

        me = psutil.Process()
        times = [p.cpu_times() for p in (me, *me.children(recursive=True)) if p.is_running()]
        return sum(t.user + t.system for t in times)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def entropy(labels: np.ndarray) -> float:
    """In nats."""
    share = np.bincount(labels, minlength=PLATES) / len(labels)
    return float(-(share[share > 0] * np.log(share[share > 0])).sum())


def measure(name: str, store: Path) -> dict[str, float]:
    """One epoch of one reader, in this process."""
    is_ray = name.startswith("tftrain-ray")
    if is_ray:
        import ray

        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=2 * 2**30, log_to_driver=False)
    tokenise(np.array([0, 1]), np.zeros(1, np.int32), np.ones(1, np.int32), np.zeros(1, np.int64))  # compiles
    started, cpu_before, first_s = time.perf_counter(), cpu_seconds(is_ray), 0.0
    joinids, n_cells = [], 0
    for start_C1, gene_N, count_N, joinid_C in READERS[name](store):
        if not n_cells:
            first_s = time.perf_counter() - started
        tokenise(start_C1, gene_N, count_N, joinid_C)
        joinids.append(np.asarray(joinid_C))
        n_cells += len(joinid_C)
    wall, cpu = time.perf_counter() - started, cpu_seconds(is_ray) - cpu_before
    total = ANNDATA_CELLS if name == "anndata" else int(max(joinid_C.max() for joinid_C in joinids)) + 1
    plate_C, rng = plate_of(total), np.random.default_rng(0)
    mixed = [entropy(plate_C[joinid_C]) for joinid_C in joinids if len(joinid_C) == BATCH]
    perfect = [entropy(plate_C[rng.choice(total, BATCH, replace=False)]) for _ in range(300)]
    return {
        "cells": n_cells,
        "cells_per_cpu_s": n_cells / cpu,
        "cells_per_s": n_cells / wall,
        "first_batch_s": first_s,
        "entropy": float(np.mean(mixed)) / float(np.mean(perfect)),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def in_fresh_process(name: str, store: Path) -> dict[str, float]:
    """`measure` in a process that has the allocator's settings from its start."""
    environment = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    command = [sys.executable, __file__, "--store", str(store), "--one", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(store: Path, names: list[str], repetitions: int) -> dict[str, dict[str, float]]:
    """Medians over the repetitions, which take turns."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name in names:
            runs[name].append(in_fresh_process(name, store))
            print(f"  {name}: {runs[name][-1]['cells_per_cpu_s']:,.0f} cells/CPU-s", file=sys.stderr, flush=True)
    return {name: {key: float(np.median([run[key] for run in of])) for key in of[0]} for name, of in runs.items()}


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description="Times readers of one SOMA store against each other.")
    parser.add_argument("--store", type=Path, help="where the store is made, or was; default: a temporary folder")
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--readers", default=",".join(READERS), help="of %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.store)))
        return
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(given.store or Path(folder) / "cells.soma", given.cells, N_GENES)
        names = [n for n in given.readers.split(",") if n not in NEEDS or importlib.util.find_spec(NEEDS[n])]
        found = compare(store, names, given.repetitions)
    columns = ("cells_per_cpu_s", "cells_per_s", "first_batch_s", "entropy", "peak_gb")
    print(f"{'reader':18}" + "".join(f"{column:>17}" for column in columns))
    for name, row in found.items():
        cells = (f"{row[column]:,.0f}" if "cells" in column else f"{row[column]:.3f}" for column in columns)
        print(f"{name:18}" + "".join(f"{cell:>17}" for cell in cells))
    ratios = {
        f"{a}/{b} by {by}": round(found[a][by] / found[b][by], 3)
        for a, b, by in (
            ("tftrain", "tiledbsoma-ml", "cells_per_cpu_s"),
            ("tftrain-10", "tiledbsoma-ml-10", "cells_per_cpu_s"),
            ("tftrain", "limit", "cells_per_cpu_s"),
            ("tftrain-ray", "tftrain", "cells_per_s"),
            ("tftrain-ray-2", "tftrain-2", "cells_per_s"),
        )
        if a in found and b in found
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    print(json.dumps({"readers": found, "ratios": ratios}))


if __name__ == "__main__":
    main()
