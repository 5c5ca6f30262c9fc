"""A sorted set of soma_joinids in one bit each: 60 million cells take 8 MB, not 480."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK_BYTES = 512


@dataclass(frozen=True)
class RowSet:
    """Sorted, unique, non-negative row ids with access by position. Pickles as its bits."""

    bits: np.ndarray
    """uint8: bit i of byte b says whether row 8 b + i is in the set."""
    before: np.ndarray
    """int64: rows in the set before each block of 512 bytes; the last entry is the size of the set."""

    @staticmethod
    def of(ids: np.ndarray) -> RowSet:
        """The set of `ids`, which must be unique; their order does not matter."""
        n_blocks = int(ids.max()) // (8 * _BLOCK_BYTES) + 1 if len(ids) else 0
        is_in = np.zeros(n_blocks * 8 * _BLOCK_BYTES, bool)
        is_in[ids] = True
        per_block = is_in.reshape(n_blocks, 8 * _BLOCK_BYTES).sum(axis=1, dtype=np.int64)
        assert per_block.sum() == len(ids), "row ids are not unique"
        return RowSet(np.packbits(is_in, bitorder="little"), np.concatenate([[0], np.cumsum(per_block)]))

    @property
    def stop(self) -> int:
        """Every id lies below; at most 4,095 above the greatest."""
        return 8 * len(self.bits)

    def __len__(self) -> int:
        return int(self.before[-1])

    def slice(self, first: int, length: int) -> np.ndarray:
        """int64 (length): ids number first, first + 1, ... of the sorted set."""
        assert 0 <= first <= first + length <= len(self), f"{first} + {length} of {len(self)} rows"
        if not length:
            return np.zeros(0, np.int64)
        low, high = np.searchsorted(self.before, [first, first + length - 1], side="right") - 1
        bits = self.bits[low * _BLOCK_BYTES : (high + 1) * _BLOCK_BYTES]
        ids = np.flatnonzero(np.unpackbits(bits, bitorder="little")) + low * _BLOCK_BYTES * 8
        return ids[first - self.before[low] :][:length]

    def all(self) -> np.ndarray:
        """int64: every id, sorted."""
        return self.slice(0, len(self))
