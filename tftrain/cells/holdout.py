"""Which cells never train: whole donors, chosen by a hash of species and donor.

In: the values of a column of obs. Out: the held-out cells. The same donor is held out in every store of its species and
in every run, whatever its seed.
Shapes: C cells.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from tftrain.errors import RecipeError


@dataclass(frozen=True)
class HoldoutConfig:
    """Which cells never train. A donor is held out whole, in every store of its species, whatever the run's seed."""

    column: str = "donor_id"
    fraction: float = 0.1
    """Donors whose hash lies below this fraction are held out; 0 turns it off. Not used where `values` are given."""
    values: list[str] = field(default_factory=list)
    """Values of the column to hold out, in place of a fraction."""
    max_cells: int = 2048
    """Held-out cells, over all sources, that the held-out loss is measured on."""

    def __post_init__(self) -> None:
        if not 0 <= self.fraction < 1:
            raise RecipeError(f"data.holdout.fraction is {self.fraction}; it must be 0 (off) or more, and below 1")
        if self.max_cells < 1:
            raise RecipeError(f"data.holdout.max_cells is {self.max_cells}; it must be at least 1")

    @property
    def is_on(self) -> bool:
        """Whether any cell may be held out."""
        return self.fraction > 0 or bool(self.values)


def holdout_fraction(species: str, value: str) -> float:
    """Where in [0, 1) a donor lies: it is held out by every fraction above. Depends on species and donor alone."""
    digest = hashlib.blake2b(f"tftrain holdout\0{species}\0{value}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def held_out(values_C: pa.ChunkedArray, holdout: HoldoutConfig, species: str) -> tuple[np.ndarray, dict[str, float]]:
    """bool (C): the held-out cells; and every value of the column with the fraction above which it is held out."""
    column = values_C.combine_chunks()
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    # A store's dictionary may hold values of cells that were dropped, and a null is a value of its own.
    code_C = column.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    values = [str(value) for value in column.dictionary.to_pylist()]
    present = np.unique(code_C)
    is_held = np.zeros(len(values) + 1, bool)
    thresholds = {}
    for code in present:
        value = values[code] if code >= 0 else "None"
        thresholds[value] = holdout_fraction(species, value)
        is_held[code] = value in holdout.values if holdout.values else thresholds[value] < holdout.fraction
    return is_held[code_C], thresholds
