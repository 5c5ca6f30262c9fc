"""The store that readers are timed on: 100,000 cells of 20,000 genes, about 1,500 expressed, in the Census's tiling."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from data_prep.store import tiling, write_frame

PLATES = 14
"""Data sets of the store, one after another as in the Census, of sizes 1 : 2 : ... : 14."""
_BLOCK = 4096


def gene_ids(n_genes: int) -> list[str]:
    """ids of the simulated genes."""
    return [f"ENSG{gene:011d}" for gene in range(n_genes)]


def plate_of(n_cells: int) -> np.ndarray:
    """int64 (C): the data set of each cell."""
    ends = np.cumsum(np.arange(1, PLATES + 1)) * n_cells // (PLATES * (PLATES + 1) // 2)
    return np.searchsorted(ends, np.arange(n_cells), side="right")


@numba.njit(cache=True)
def _block(seed, n_cells, p_G, row, column, value):
    """Fills (row, column, value) with the expressed genes of `n_cells` cells; returns how many."""
    np.random.seed(seed)
    n = 0
    for cell in range(n_cells):
        depth = np.exp(0.35 * np.random.standard_normal())
        for gene in range(len(p_G)):
            if np.random.random() < p_G[gene] * depth:
                row[n], column[n] = cell, gene
                value[n] = 1.0 + np.floor(-2.0 * np.log(1.0 - np.random.random()))
                n += 1
    return n


def make_store(path: Path, n_cells: int = 100_000, n_genes: int = 20_000, expressed: int = 1500) -> Path:
    """Writes the store once; a finished one stays."""
    if (path / "done").exists():
        return path
    rng = np.random.default_rng(0)
    p_G = rng.lognormal(0, 1.2, n_genes)
    for _ in range(20):  # so that the mean holds after clipping at 0.9
        p_G = np.minimum(p_G * expressed / p_G.sum(), 0.9)
    room = _BLOCK * 4 * expressed
    buffers = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.float32)
    raw_sum, nnz = np.zeros(n_cells), np.zeros(n_cells, np.int64)
    with tiledbsoma.Experiment.create(str(path)) as experiment:
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(n_cells, n_genes), platform_config=tiling(n_cells, n_genes)
        )
        for first in range(0, n_cells, _BLOCK):
            size = min(_BLOCK, n_cells - first)
            n = _block(first, size, p_G, *buffers)
            row, column, value = (buffer[:n] for buffer in buffers)
            raw_sum[first : first + size] = np.bincount(row, weights=value, minlength=size)
            nnz[first : first + size] = np.bincount(row, minlength=size)
            raw.write(pa.table({"soma_dim_0": row + first, "soma_dim_1": column, "soma_data": value}))
        obs = pd.DataFrame({"soma_joinid": np.arange(n_cells), "obs_id": np.arange(n_cells).astype(str)})
        obs["plate"] = [f"plate {plate}" for plate in plate_of(n_cells)]
        obs["assay"], obs["donor_id"], obs["is_primary_data"] = "10x 3' v3", obs["plate"], True
        obs["raw_sum"], obs["nnz"] = raw_sum, nnz
        var = pd.DataFrame({"soma_joinid": np.arange(n_genes), "feature_id": gene_ids(n_genes)})
        write_frame(experiment, "obs", obs)
        write_frame(rna, "var", var, as_values=("feature_id",))
    (path / "done").touch()
    return path
