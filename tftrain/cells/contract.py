"""What flows between reading and modelling: a batch of cells as genes and counts.

Shapes: C cells, N stored (expressed) values, G genes of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Cells:
    """Expressed genes of C cells in compressed-sparse-row form.

    Cell c owns the values `cell_start_C1[c]:cell_start_C1[c + 1]`. Within a cell genes stand in the column order of the
    file they came from; a gene occurs at most once and its count is a whole number above zero.
    """

    cell_start_C1: np.ndarray
    """int64 (C + 1): first value of each cell; the last entry is N."""
    gene_N: np.ndarray
    """int32 (N): row of the gene in the vocabulary, 0 <= row < G (special tokens are not counted)."""
    count_N: np.ndarray
    """int32 (N): raw count, at least 1."""
    source_C: np.ndarray
    """int16 (C): index of the source (store or file) in the recipe."""
    joinid_C: np.ndarray
    """int64 (C): soma_joinid of the cell in its source; the row number for an h5ad file."""
    obs: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Columns of obs that a model or an evaluation asked for, each (C)."""

    def __len__(self) -> int:
        return len(self.cell_start_C1) - 1

    @property
    def n_expressed_C(self) -> np.ndarray:
        """int64 (C): number of expressed vocabulary genes of each cell."""
        return np.diff(self.cell_start_C1)

    def take(self, index_K: np.ndarray) -> Cells:
        """The cells `index_K` (K), in that order; a cell may be taken more than once."""
        index_K = np.asarray(index_K, dtype=np.int64)
        length_K = self.n_expressed_C[index_K]
        start_K1 = np.concatenate([[0], np.cumsum(length_K)])
        value_N = np.repeat(self.cell_start_C1[:-1][index_K] - start_K1[:-1], length_K) + np.arange(start_K1[-1])
        return Cells(
            start_K1,
            self.gene_N[value_N],
            self.count_N[value_N],
            self.source_C[index_K],
            self.joinid_C[index_K],
            {name: column_C[index_K] for name, column_C in self.obs.items()},
        )

    def slice(self, start: int, stop: int) -> Cells:
        """Cells start <= c < stop, as views where possible."""
        first, last = self.cell_start_C1[start], self.cell_start_C1[stop]
        return Cells(
            self.cell_start_C1[start : stop + 1] - first,
            self.gene_N[first:last],
            self.count_N[first:last],
            self.source_C[start:stop],
            self.joinid_C[start:stop],
            {name: column_C[start:stop] for name, column_C in self.obs.items()},
        )

    @staticmethod
    def concat(parts: Sequence[Cells]) -> Cells:
        """The cells of all parts, one after another. Parts must have the same obs columns."""
        assert parts, "nothing to concatenate"
        if len(parts) == 1:
            return parts[0]
        length_C = np.concatenate([part.n_expressed_C for part in parts])
        return Cells(
            np.concatenate([[0], np.cumsum(length_C)]),
            np.concatenate([part.gene_N for part in parts]),
            np.concatenate([part.count_N for part in parts]),
            np.concatenate([part.source_C for part in parts]),
            np.concatenate([part.joinid_C for part in parts]),
            {name: np.concatenate([part.obs[name] for part in parts]) for name in parts[0].obs},
        )

    @staticmethod
    def empty(obs_columns: Sequence[str] = ()) -> Cells:
        """No cells."""
        return Cells(
            np.zeros(1, np.int64),
            np.zeros(0, np.int32),
            np.zeros(0, np.int32),
            np.zeros(0, np.int16),
            np.zeros(0, np.int64),
            {name: np.zeros(0, object) for name in obs_columns},
        )
