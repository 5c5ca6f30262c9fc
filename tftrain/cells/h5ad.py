"""An .h5ad file, opened block by block: gene ids, obs and raw counts, every one of which is checked.

In: a path. Out: blocks of rows as scipy CSR matrices of whole numbers, or as Cells of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab, strip_version
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
        f"{int((~is_count_N).sum()):,} of {len(value_N):,} values seen with it are not either. Give raw counts: "
        "normalised, log-transformed or averaged values are not what the model was made for"
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
        if not isinstance(self._file.get("obs"), h5py.Group) or not isinstance(self._root["var"], h5py.Group):
            self._file.close()
            raise CellsError(
                f"{path}: obs or var is absent or of anndata's form before 0.7; open it with anndata, write it again"
            )

    def __enter__(self) -> H5adFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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

    def gene_ids(self, column: str | None = None, *, may_repeat: bool = False) -> list[str]:
        """Gene ids without version in column order, "" where the file has none.

        column: of var; None takes `ensembl_id`, or else the index. Raises CellsError where there are none, or an id
        occurs twice without its version (unless it may).
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
        if len(set(given)) < len(given) and not may_repeat:
            at = pd.Series(given)
            twice = at[at.duplicated()].unique()
            raise CellsError(
                f"{self.path}: {len(twice):,} gene ids occur more than once in {where} without their version "
                f"({', '.join(twice[:3])}); merge or drop those genes "
                "(`tftrain-data build --sum-duplicates` adds their counts)"
            )
        return ids

    def blocks(self, block_cells: int = 4096) -> Iterator[tuple[int, sp.csr_matrix]]:
        """(first cell, counts of up to `block_cells` cells), indices sorted, zeros removed; every value checked."""
        X = self._matrix()
        for first in range(0, self.n_cells, block_cells):
            try:
                block = sp.csr_matrix(X[first : first + block_cells])
                block.check_format(full_check=True)
            except (OSError, ValueError, IndexError) as error:
                last = min(first + block_cells, self.n_cells)
                raise CellsError(f"{self.path}: rows {first} to {last} cannot be read ({error})") from error
            block.sum_duplicates()
            check_counts(block.data, block.indptr, partial(self._where, first, block.indices))
            block.eliminate_zeros()
            yield first, block

    def _where(self, first: int, gene_N: np.ndarray, cell: int, n: int) -> str:
        """Where value number n of a block is, whose cells start with row `first`."""
        layer, row = "raw/X" if self.is_raw else "X", first + cell
        return f"{self.path}: cell {self.obs.index[row]} (row {row}), gene {self.var.index[gene_N[n]]}, {layer}"

    def _matrix(self) -> Any:
        X = self._root["X"]
        if isinstance(X, h5py.Dataset):
            return X
        matrix = anndata.io.sparse_dataset(X)
        # Rows of a column-wise matrix cannot be read alone.
        return matrix if matrix.format == "csr" else matrix.to_memory().tocsr()


@dataclass(frozen=True)
class GeneMatch:
    """How the columns of a file fall on the rows of a vocabulary."""

    row_of_column_G: np.ndarray
    """int32, one a column: vocabulary row, -1 for a column that is left out."""
    n_without_id: int
    """Columns left out because they have no gene id."""
    n_unknown: int
    """Columns left out because the vocabulary does not have their gene."""

    @property
    def n_matched(self) -> int:
        """Columns that are used."""
        return int((self.row_of_column_G >= 0).sum())

    def describe(self) -> str:
        """One line for the terminal."""
        n = len(self.row_of_column_G)
        left_out = f"left out {self.n_unknown:,} not in the vocabulary and {self.n_without_id:,} without gene id"
        return f"{self.n_matched:,} of {n:,} genes used; {left_out}"


def match_genes(file: H5adFile, vocab: Vocab, gene_col_name: str | None = None) -> GeneMatch:
    """Raises CellsError where the file has no gene ids, repeated ones, or none that the vocabulary knows."""
    ids = file.gene_ids(gene_col_name)
    row_of_column_G = vocab.rows(ids)
    n_without_id = sum(not gene_id for gene_id in ids)
    match = GeneMatch(row_of_column_G, n_without_id, int((row_of_column_G < 0).sum()) - n_without_id)
    if not match.n_matched:
        mine = ", ".join([gene_id for gene_id in ids if gene_id][:3])
        raise CellsError(
            f"{file.path}: none of its {len(ids) - n_without_id:,} gene ids ({mine}, ...) is among the "
            f"{vocab.n_genes:,} of the vocabulary ({', '.join(vocab.gene_ids[:3])}, ...). Is it another kind of id? "
            "Then name the var column of Ensembl ids. Is it another species? Then it needs its own protein table"
        )
    return match


def obs_column(file: H5adFile, name: str) -> np.ndarray:
    """One column of obs (C): object array of strings, "" for a missing value; numbers stay numbers."""
    if name not in file.obs.columns:
        raise CellsError(
            f"{file.path}: obs has no column {name!r}; it has {', '.join(map(str, file.obs.columns)) or 'none'}. "
            "Add the column, or rename the one that holds it"
        )
    column = file.obs[name]
    if pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
        return column.to_numpy()
    return column.astype(object).where(column.notna(), "").astype(str).to_numpy(object)


def read_h5ad(
    file: H5adFile, vocab: Vocab, match: GeneMatch, *, obs_columns: Sequence[str] = (), block_cells: int = 4096
) -> Iterator[Cells]:
    """All cells in row order, `block_cells` at a time; genes in column order; joinid = row. Memory is that of a block.

    A cell without any vocabulary gene is there, empty. Raises CellsError for a missing obs column before anything is
    read, and for a value that is no raw count, in whatever column, when its block is.
    """
    obs = {name: obs_column(file, name) for name in obs_columns}
    if not file.n_cells:
        raise CellsError(f"{file.path}: it holds no cells")
    for first, block in file.blocks(block_cells):
        row_N = match.row_of_column_G[block.indices]
        is_kept_N = row_N >= 0
        kept_before_N1 = np.concatenate([[0], np.cumsum(is_kept_N)])
        n_cells = block.shape[0]
        yield Cells(
            kept_before_N1[block.indptr].astype(np.int64),
            row_N[is_kept_N].astype(np.int32),
            block.data[is_kept_N].astype(np.int32),
            np.zeros(n_cells, np.int16),
            np.arange(first, first + n_cells, dtype=np.int64),
            {name: column[first : first + n_cells] for name, column in obs.items()},
        )
