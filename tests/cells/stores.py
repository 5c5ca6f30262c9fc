"""SOMA stores in the Census layout whose counts say where they belong, so that a mis-joined row shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from tftrain.cells.vocab import Vocab


def is_expressed(store: int, cell: Any, gene: Any) -> Any:
    return (cell * 7 + gene * 3 + store) % 4 == 0


def count_of(store: int, cell: Any, gene: Any) -> Any:
    return 1 + (cell * 31 + gene * 17 + store * 101) % 211


def expected_cell(store: int, cell: int, n_genes: int, known: Sequence[int] | None = None) -> dict[int, int]:
    """Gene number -> count of one cell, over the genes `known`, in column order."""
    genes = range(n_genes) if known is None else known
    return {gene: count_of(store, cell, gene) for gene in genes if is_expressed(store, cell, gene)}


def make_store(
    path: Path,
    *,
    store: int = 0,
    n_cells: int = 300,
    n_genes: int = 40,
    prefix: str = "G",
    obs: Mapping[str, Any] | None = None,
    drop_obs: Sequence[str] = (),
    gene_ids: Sequence[str] | None = None,
    change: Mapping[tuple[int, int], float] | None = None,
    rows_per_write: int = 128,
) -> Path:
    """Writes a store by tiledbsoma alone; `change` sets single values of X."""
    cell, gene = np.nonzero(is_expressed(store, *np.ogrid[:n_cells, :n_genes]))
    X = np.zeros((n_cells, n_genes), np.float32)
    X[cell, gene] = count_of(store, cell, gene)
    for at, value in (change or {}).items():
        X[at] = value
    frame = pd.DataFrame(
        {
            "soma_joinid": np.arange(n_cells),
            "donor_id": [f"d{c * 10 // n_cells}" for c in range(n_cells)],
            "assay": [f"assay {c % 3}" for c in range(n_cells)],
            "is_primary_data": True,
            "raw_sum": np.nansum(X, axis=1, dtype=np.float64),
            "nnz": (X != 0).sum(axis=1),
        }
    )
    for name, values in (obs or {}).items():
        frame[name] = values
    ids = [f"{prefix}{g}" for g in range(n_genes)] if gene_ids is None else list(gene_ids)
    var = pd.DataFrame({"soma_joinid": np.arange(n_genes), "feature_id": ids})
    with tiledbsoma.Experiment.create(str(path)) as experiment:
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray("raw", type=pa.float32(), shape=X.shape)
        for first in range(0, n_cells, rows_per_write):
            row, column = np.nonzero(X[first : first + rows_per_write])
            values = X[first + row, column]
            raw.write(pa.table({"soma_dim_0": first + row, "soma_dim_1": column, "soma_data": values}))
        for parent, name, table in ((experiment, "obs", frame.drop(columns=list(drop_obs))), (rna, "var", var)):
            arrow = pa.Table.from_pandas(table, preserve_index=False)
            made = parent.add_new_dataframe(
                name, schema=arrow.schema, index_column_names=["soma_joinid"], domain=[[0, len(table) - 1]]
            )
            made.write(arrow)
    return path


def make_vocab(gene_ids: Sequence[str]) -> Vocab:
    return Vocab.of(list(gene_ids), np.zeros((len(gene_ids), 2), np.float32))
