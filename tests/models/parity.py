"""The parity cases: checkpoints in the published layout and what the published package computes from them (fp32, CPU).

`simulated_cells` is part of the repository; the others are read from ../shared and skipped where that is absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tftrain.cells.contract import Cells
from tftrain.cells.h5ad import H5adFile, match_genes, read_h5ad
from tftrain.cells.vocab import Vocab

ROOT = Path(__file__).parents[2]
SIMULATED = ROOT / "tests" / "fixtures" / "simulated_cells"
SHARED = ROOT.parent / "shared" / "parity"
NAMES = ("simulated_cells", "assay_token", "no_assay_token", "new_species")


@dataclass(frozen=True)
class Case:
    """One folder of fixtures."""

    name: str
    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def h5ad(self) -> Path:
        return self.folder / "cells.h5ad"

    @property
    def new_table(self) -> Path | None:
        """Protein table that replaces the checkpoint's."""
        path = self.folder / "new_species_gene.h5"
        return path if path.exists() else None

    @property
    def expected(self) -> dict[str, np.ndarray]:
        with np.load(self.folder / "expected.npz") as file:
            return dict(file)

    def cells(self, vocab: Vocab) -> Cells:
        with H5adFile(self.h5ad) as file:
            match = match_genes(file, vocab)
            return Cells.concat(list(read_h5ad(file, vocab, match, obs_columns=["assay"])))


def case(name: str) -> Case:
    """Skips the test where the case is not at hand."""
    folder = SIMULATED if name == "simulated_cells" else SHARED / name
    if not folder.exists():
        pytest.skip(f"{folder} is not on this machine")
    return Case(name, folder)


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value."""
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return float(np.abs(got.astype(np.float64) - expected).max() / np.abs(expected).max())
