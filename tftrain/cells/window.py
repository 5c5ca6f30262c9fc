"""A window: cells of one lane that are read by one task and shuffled together. PURE, as plan.py, which cuts them.

In: pieces of chunks and a seed. Out: the cells in the order of consumption. Shapes: S segments, C cells.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """What one read task delivers: cells of one lane that are shuffled together."""

    epoch: int
    lane: int
    index: int
    start: int
    """Lane position of its first cell; cells already consumed before a resume are counted by `skip`."""
    skip: int
    """Cells at the front of the shuffled window that are not wanted (again)."""
    stop: int
    """Shuffled cells `skip <= i < stop` are wanted."""
    source_S: tuple[int, ...]
    first_S: tuple[int, ...]
    """First training cell of each segment, counted in the source's sorted training cells."""
    length_S: tuple[int, ...]
    seed: int

    @property
    def n_cells(self) -> int:
        """Cells that the window delivers."""
        return self.stop - self.skip

    @property
    def n_shuffled(self) -> int:
        """Cells that are shuffled together, consumed or not."""
        return sum(self.length_S)

    def order(self) -> np.ndarray:
        """int64 (n_cells): positions in the concatenated segments, in the order of consumption."""
        key = (self.seed, "window", self.epoch, self.lane, self.index)
        return permutation(self.n_shuffled, *key)[self.skip : self.stop]

    def cells(self) -> tuple[np.ndarray, np.ndarray]:
        """Source (int16) and training-cell position (int64) of each cell, in the order of consumption."""
        source_C = np.repeat(np.array(self.source_S, np.int16), self.length_S)
        position_C = np.concatenate([np.arange(f, f + n) for f, n in zip(self.first_S, self.length_S)])
        order_C = self.order()
        return source_C[order_C], position_C[order_C]


def permutation(n: int, *key: int | str) -> np.ndarray:
    """int64 (n): a permutation that depends on `key` alone.

    Sorts raw bits of a PCG64 stream, which numpy promises never to change (unlike `Generator.permutation`), so that an
    upgrade of numpy does not reorder a run.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=32).digest()
    bits = np.random.PCG64(np.random.SeedSequence(np.frombuffer(digest, "<u4").tolist()))
    return np.argsort(bits.random_raw(n), kind="stable")
