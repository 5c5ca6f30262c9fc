"""An .h5ad file, opened block by block: gene ids, obs and raw counts, every one of which is checked.

In: a path. Out: blocks of rows as scipy CSR matrices of whole numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tftrain.cells.vocab import strip_version
from tftrain.errors import CellsError

GENE_ID_COLUMN = "ensembl_id"
"""Column of var that holds gene ids where none is named; without it the index does."""
COUNT_LIMIT = 2**31
"""Counts are kept in int32."""


def check_counts(value_N: np.ndarray, cell_start_C1: np.ndarray, describe: Callable[[int, int], str]) -> None:
    """Raises CellsError for the first value that is no raw count: NaN, negative, fractional, or 2^31 and above.

    describe(cell, n) says which file, cell and gene value number n belongs to. Zeros are allowed.
    """
    value_N = np.asarray(value_N)
    if value_N.dtype.kind in "ui":
        is_count_N = (value_N >= 0) & (value_N < COUNT_LIMIT)
    else:
        with np.errstate(invalid="ignore"):  # NaN compares false, which refuses it
            is_count_N = (value_N >= 0) & (value_N < COUNT_LIMIT) & (value_N == np.floor(value_N))
    if is_count_N.all():
        return
    n = int(np.argmin(is_count_N))
    cell = int(np.searchsorted(cell_start_C1, n, side="right")) - 1
    raise CellsError(
        f"{describe(cell, n)}: {value_N[n]!s} is not a raw count (a whole number from 0 to 2^31); "
        f"{int((~is_count_N).sum()):,} of {len(value_N):,} values seen with it are not either. Give raw counts: normalised, "
        "log-transformed or averaged values are not what the model was made for"
    )


class H5adFile:
    """An open .h5ad file. Reads obs and var whole, X in blocks; use it in a `with` statement."""

    def __init__(self, path: str | Path, *, use_raw: bool | None = None) -> None:
        """use_raw: take counts and var from `raw`; None takes them from there where the file has a `raw`."""
        self.path = str(path)
        if not Path(path).is_file():
            raise CellsError(f"{path}: no such file")
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise CellsError(f"{path}: not an HDF5 file, or damaged ({error})") from error
        has_raw = "raw" in self._file and "X" in self._file["raw"]
        if use_raw and not has_raw:
            raise CellsError(f"{path}: it has no raw, but raw counts were asked from there")
        self.is_raw = has_raw if use_raw is None else use_raw
        self._root = self._file["raw"] if self.is_raw else self._file
        for name in ("X", "var"):
            if name not in self._root:
                self._file.close()
                raise CellsError(f"{path}: it has no {name}, so it is not an .h5ad file with counts")

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    @cached_property
    def obs(self) -> pd.DataFrame:
        """Cells, indexed by name."""
        return anndata.io.read_elem(self._file["obs"])

    @cached_property
    def var(self) -> pd.DataFrame:
        """Genes, in the order of X's columns."""
        return anndata.io.read_elem(self._root["var"])

    @property
    def n_cells(self) -> int:
        """Rows of X."""
        return len(self.obs)

    def gene_ids(self, column: str | None = None) -> list[str]:
        """Gene ids without version in column order, "" where the file has none; ids occur once.

        column: of var; None takes `ensembl_id`, or else the index. Raises CellsError where there are none, or an id
        occurs twice without its version.
        """
        if column is not None and column not in self.var.columns:
            raise CellsError(
                f"{self.path}: var has no column {column!r}; it has {', '.join(map(str, self.var.columns)) or 'none'}"
            )
        if column is None and GENE_ID_COLUMN in self.var.columns:
            column = GENE_ID_COLUMN
        named = self.var.index if column is None else self.var[column]
        where = "its index" if column is None else f"var column {column!r}"
        ids = ["" if gene_id is None or gene_id != gene_id else strip_version(str(gene_id)) for gene_id in named]
        given = [gene_id for gene_id in ids if gene_id]
        if not given or all(gene_id.isdigit() for gene_id in given):
            raise CellsError(
                f"{self.path}: no gene ids in {where} (it holds {', '.join(map(repr, ids[:3]))}, ...); "
                f"name the var column that has them; var has {', '.join(map(str, self.var.columns)) or 'no columns'}"
            )
        if len(set(given)) < len(given):
            at = pd.Series(given)
            twice = at[at.duplicated()].unique()
            raise CellsError(
                f"{self.path}: {len(twice):,} gene ids occur more than once in {where} without their version "
                f"({', '.join(twice[:3])}); merge or drop those genes"
            )
        return ids

    def blocks(self, block_cells: int = 4096) -> Iterator[tuple[int, sp.csr_matrix]]:
        """(first cell, counts of up to `block_cells` cells), indices sorted, zeros removed; every value checked."""
        X = self._matrix()
        for first in range(0, self.n_cells, block_cells):
            block = sp.csr_matrix(X[first : first + block_cells])
            block.sum_duplicates()
            check_counts(block.data, block.indptr, lambda cell, n, b=block, f=first: self._where(f + cell, b.indices[n]))
            block.eliminate_zeros()
            yield first, block

    def _where(self, cell: int, gene: int) -> str:
        layer = "raw/X" if self.is_raw else "X"
        return f"{self.path}: cell {self.obs.index[cell]} (row {cell}), gene {self.var.index[gene]}, {layer}"

    def _matrix(self) -> Any:
        X = self._root["X"]
        if isinstance(X, h5py.Dataset):
            return X
        matrix = anndata.io.sparse_dataset(X)
        # Rows of a column-wise matrix cannot be read alone.
        return matrix if matrix.format == "csr" else matrix.to_memory().tocsr()
