"""The order of all cells of a run, as a pure function: no files, no state, no clock.

In: how many training cells every source has, their weights, a seed. Out: which cells each step trains on, and what a
rank reads for it. The only state of a run is a cursor: the number of cells of the global order already consumed.

How an epoch is made
1. A source of n cells and weight w is an endless sequence of passes; a pass is a permutation of its chunks of
   `chunk_cells` neighbouring cells. Epoch e takes cells floor(e w n) <= t < floor((e + 1) w n) of that sequence, so a
   weight of 1 is one whole pass an epoch, 2 two passes, 0.1 a tenth of a pass (every cell once in ten epochs).
2. The chunks of all sources, in the order of their stores, are cut into strata of R neighbours; each of R rounds takes
   one chunk of every stratum, by lot, and deals them to the V lanes in turn. A round is what the windows of all lanes
   hold at a time: neighbouring cells are of one data set, and so every minibatch mixes the data sets in proportion.
   Lanes are then cut at equal lengths (to one cell).
3. A lane shuffles its cells within windows of `window_cells`. Its first window is as long as a chunk, so that the first
   step need not wait for more; the next is (v + 1)/V of a window for lane v, in whole chunks, so that the lanes run
   out one after another, and a rank reads one window at a time.
4. A step takes the next cells_per_step / V cells of every lane. The last step of an epoch is short.
5. Rank r of W owns lanes r, r + W, ... What a step trains on does not depend on W.

Shapes: S segments (pieces of chunks) of a window, V lanes, K chunks of an epoch, P passes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from tftrain.cells.window import Window, permutation
from tftrain.errors import CellsError, RecipeError

__all__ = ["OrderConfig", "Plan", "PlanSource", "Step", "Window", "permutation"]

ORDER_VERSION = 3
"""Part of every fingerprint: raised when the same inputs would give another order."""


@dataclass(frozen=True)
class OrderConfig:
    """How cells are mixed. Fixed for the life of a run, whatever the number of workers."""

    lanes: int = 8
    """Independent streams that every step mixes; the greatest number of workers. cells_per_step is a multiple of it."""
    chunk_cells: int = 2048
    """Neighbouring cells of a store that are read together. Smaller mixes better, larger reads faster: in the
    Census's tiles of 2,048 rows a cell of a chunk of 1,024 costs 1.6 times as much to decode."""
    window_cells: int = 16384
    """Cells of a lane that are shuffled together. A minibatch mixes lanes x window_cells / chunk_cells chunks: 500 or
    more of them come within 2 % of perfect mixing on the Census. A rank holds half of (lanes / ranks) windows in
    memory, at some 6 kB a cell: 0.4 GB for one rank as it stands here."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise RecipeError(f"data.order.{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class PlanSource:
    """What the order needs to know of a source."""

    name: str
    """Unique among the sources; part of the seed of its passes, so that adding a source does not move the others."""
    species: str
    n_cells: int
    """Training cells: after filter, QC and hold-out."""
    digest: str
    """Changes when the cells do; not with the place where the store lies."""
    weight: float = 1.0
    """Passes over the source in an epoch."""


@dataclass(frozen=True)
class Step:
    """One optimiser step: cells `lane_start <= i < lane_stop` of every lane of the epoch, as far as the lane goes."""

    epoch: int
    lane_start: int
    lane_stop: int
    n_cells: int
    """Over all lanes: cells_per_step but for the last step of an epoch."""
    cursor: int
    """After the step."""


@dataclass(frozen=True)
class _Epoch:
    """The permuted chunks of one epoch; `end_K` are their ends in the epoch's order."""

    source_K: np.ndarray
    first_K: np.ndarray
    end_K: np.ndarray


@dataclass(frozen=True)
class Plan:
    """The global order. Equal arguments give the equal order on every machine; see the head of this file."""

    sources: tuple[PlanSource, ...]
    seed: int
    order: OrderConfig = field(default_factory=OrderConfig)
    cells_per_step: int = 256
    """Not part of the order or the fingerprint: it only says where steps are cut."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sources", tuple(self.sources))
        names = [source.name for source in self.sources]
        assert len(set(names)) == len(names), f"source names must be unique: {names}"
        if not self.sources:
            raise RecipeError("data.sources is empty; name at least one store")
        for source in self.sources:
            if source.n_cells < 1:
                raise CellsError(f"source {source.name} has no training cells")
            if not 0 < source.weight < float("inf"):
                raise RecipeError(f"source {source.name}: weight is {source.weight}; it must be above 0")
        lanes = self.order.lanes
        if self.cells_per_step < 1 or self.cells_per_step % lanes:
            near = max(1, round(self.cells_per_step / lanes)) * lanes
            raise RecipeError(
                f"train.cells_per_step is {self.cells_per_step}; it must be a multiple of data.order.lanes = {lanes}, "
                f"for example {near}"
            )

    # Where an epoch begins and ends

    def _quota(self, source: PlanSource, epoch: int) -> int:
        """Cells of the source in all epochs before `epoch`: floor(epoch * weight * n_cells), in exact arithmetic."""
        share = epoch * Fraction(str(source.weight)) * source.n_cells
        return share.numerator // share.denominator

    def epoch_start(self, epoch: int) -> int:
        """Cells of the global order before this epoch."""
        return sum(self._quota(source, epoch) for source in self.sources)

    def epoch_cells(self, epoch: int) -> int:
        """Cells of this epoch."""
        return self.epoch_start(epoch + 1) - self.epoch_start(epoch)

    def cells_of(self, source: int, epoch: int) -> int:
        """Cells of source number `source` in this epoch, a cell counted as often as it is repeated."""
        return self._quota(self.sources[source], epoch + 1) - self._quota(self.sources[source], epoch)

    def _lane_bounds(self, n_cells: int, lane: int) -> tuple[int, int]:
        lanes = self.order.lanes
        return lane * n_cells // lanes, (lane + 1) * n_cells // lanes

    def position(self, cursor: int) -> tuple[int, int]:
        """Epoch, and cells already taken of each of its lanes, after `cursor` cells of the global order.

        Raises RecipeError where no step can have ended.
        """
        per_epoch = max(1.0, float(sum(Fraction(str(s.weight)) * s.n_cells for s in self.sources)))
        epoch = max(0, int(cursor / per_epoch) - 1)
        while self.epoch_start(epoch + 1) <= cursor:
            epoch += 1
        taken, lanes = cursor - self.epoch_start(epoch), self.order.lanes
        if taken < 0 or taken % lanes:
            raise RecipeError(
                f"a cursor of {cursor} cells lies inside a step: {taken} cells into epoch {epoch} is no multiple of "
                f"data.order.lanes = {lanes}; it belongs to another plan"
            )
        return epoch, taken // lanes

    # Steps

    def steps(self, cursor: int = 0, stop_cursor: int | None = None) -> Iterator[Step]:
        """Steps from `cursor` on, until `stop_cursor` cells are consumed; without it, without end."""
        epoch, taken = self.position(cursor)
        per_lane = self.cells_per_step // self.order.lanes
        while stop_cursor is None or cursor < stop_cursor:
            start, n_cells = self.epoch_start(epoch), self.epoch_cells(epoch)
            longest = -(-n_cells // self.order.lanes)
            while taken < longest and (stop_cursor is None or cursor < stop_cursor):
                stop = min(taken + per_lane, longest)
                after = start + min(stop * self.order.lanes, n_cells)
                yield Step(epoch, taken, stop, after - cursor, after)
                cursor, taken = after, stop
            epoch, taken = epoch + 1, 0

    def n_steps(self, epochs: float) -> int:
        """Steps of so many epochs; a broken last epoch is rounded up to whole steps."""
        whole = int(epochs)
        n_cells = [self.epoch_cells(epoch) for epoch in range(whole)]
        steps = sum(-(-n // self.cells_per_step) for n in n_cells)
        rest = Fraction(str(epochs)) - whole
        return steps + (-(-(rest * self.epoch_cells(whole)) // self.cells_per_step) if rest else 0)

    def cursor_after(self, steps: int) -> int:
        """Cells consumed by the first `steps` steps of a run."""
        epoch = 0
        while (of_epoch := -(-self.epoch_cells(epoch) // self.cells_per_step)) <= steps:
            steps, epoch = steps - of_epoch, epoch + 1
        return self.epoch_start(epoch) + steps * self.cells_per_step

    # Windows

    def lanes_of(self, rank: int, world: int) -> range:
        """Lanes that rank `rank` of `world` owns. Raises RecipeError where a rank would have none."""
        if world > self.order.lanes:
            raise RecipeError(
                f"{world} workers share data.order.lanes = {self.order.lanes}; start at most {self.order.lanes} "
                "workers, or a new run with more lanes"
            )
        return range(rank, self.order.lanes, world)

    def lane_cells(self, epoch: int, lane: int) -> int:
        """Cells of one lane in this epoch."""
        start, stop = self._lane_bounds(self.epoch_cells(epoch), lane)
        return stop - start

    def windows(
        self, cursor: int = 0, stop_cursor: int | None = None, *, rank: int = 0, world: int = 1
    ) -> Iterator[Window]:
        """What a rank reads from `cursor` until `stop_cursor`, in the order in which its steps need it.

        The concatenation over a lane's windows is the order in which steps take that lane's cells. Windows come sorted
        by (epoch, lane position of the first cell, lane): a step that reaches lane position p needs those that start
        before p, and no others.
        """
        lanes = self.lanes_of(rank, world)
        epoch, taken = self.position(cursor)
        while stop_cursor is None or self.epoch_start(epoch) < stop_cursor:
            longest = -(-self.epoch_cells(epoch) // self.order.lanes)
            if stop_cursor is not None and stop_cursor < self.epoch_start(epoch + 1):
                longest = self.position(stop_cursor)[1]
            bounds = [(start, lane) for lane in lanes for start in self._window_starts(epoch, lane)]
            for start, lane in sorted(bounds):
                if (window := self._window(epoch, lane, start, taken, longest)) is not None:
                    yield window
            epoch, taken = epoch + 1, 0

    def _window_starts(self, epoch: int, lane: int) -> list[int]:
        n_cells, size = self.lane_cells(epoch, lane), self.order.window_cells
        first = self._ramp(lane)
        return [start for start in (*first[:-1], *range(first[-1], n_cells, size)) if start < n_cells]

    def _ramp(self, lane: int) -> list[int]:
        """Starts of a lane's windows up to the first whole one, which is the last entry."""
        size, chunk = self.order.window_cells, self.order.chunk_cells
        starts = [0, chunk] if chunk < size else [0]
        # In whole chunks, so that no more of them than need be are read in two pieces.
        return [*starts, starts[-1] - (-(lane + 1) * size // (self.order.lanes * chunk)) * chunk]

    def _window(self, epoch: int, lane: int, start: int, taken: int, limit: int) -> Window | None:
        """The window of `lane` that begins at `start`: its cells from lane position `taken` on and before `limit`."""
        lane_first, lane_stop = self._lane_bounds(self.epoch_cells(epoch), lane)
        ramp = self._ramp(lane)
        if start < ramp[-1]:
            index = ramp.index(start)
            end = ramp[index + 1]
        else:
            index = len(ramp) - 1 + (start - ramp[-1]) // self.order.window_cells
            end = start + self.order.window_cells
        end = min(end, lane_stop - lane_first)
        skip, stop = max(0, taken - start), min(end, limit) - start
        if skip >= stop:
            return None
        chunks = _epoch_chunks(self, epoch)
        a, b = lane_first + start, lane_first + end
        k0, k1 = np.searchsorted(chunks.end_K, [a, b - 1], side="right")
        end_S = chunks.end_K[k0 : k1 + 1]
        begin_S = np.concatenate([chunks.end_K[k0 - 1 : k0] if k0 else [0], end_S[:-1]])
        cut_S = np.maximum(a - begin_S, 0)
        length_S = np.minimum(end_S, b) - begin_S - cut_S
        return Window(
            epoch,
            lane,
            index,
            start,
            skip,
            stop,
            tuple(chunks.source_K[k0 : k1 + 1].tolist()),
            tuple((chunks.first_K[k0 : k1 + 1] + cut_S).tolist()),
            tuple(length_S.tolist()),
            self.seed,
        )

    # What a manifest keeps

    def describe(self) -> dict[str, Any]:
        """Everything that decides the order, as plain values for a manifest."""
        return {
            "order_version": ORDER_VERSION,
            "seed": self.seed,
            **asdict(self.order),
            "sources": [asdict(source) for source in self.sources],
        }

    @property
    def fingerprint(self) -> str:
        """Hash of `describe()`: two plans with the same fingerprint have the same order."""
        return hashlib.blake2b(json.dumps(self.describe(), sort_keys=True).encode(), digest_size=16).hexdigest()

    def difference(self, before: dict[str, Any]) -> list[str]:
        """Readable lines: what changed since `before`, a `describe()` from a manifest. Empty where nothing did."""
        now = self.describe()
        lines = [
            f"{key}: was {before.get(key)}, is now {now[key]}"
            for key in now
            if key != "sources" and before.get(key) != now[key]
        ]
        was = {source["name"]: source for source in before.get("sources", [])}
        are = {source["name"]: source for source in now["sources"]}
        lines += [f"source {name} is gone" for name in was if name not in are]
        lines += [f"source {name} is new" for name in are if name not in was]
        for name in [name for name in are if name in was]:
            old, new = was[name], are[name]
            changed = {key: (old.get(key), new[key]) for key in new if old.get(key) != new[key]}
            if set(changed) == {"digest"}:
                lines.append(f"source {name}: other cells or counts, though as many ({new['n_cells']:,})")
            changed.pop("digest", None)
            lines += [f"source {name}: {key} was {a}, is now {b}" for key, (a, b) in changed.items()]
        if not lines and list(was) != list(are):
            lines.append(f"sources: order was {', '.join(was)}, is now {', '.join(are)}")
        return lines


def _source_chunks(plan: Plan, number: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """First cell and length of the chunks that a source gives to an epoch, in the order of its passes."""
    source, size = plan.sources[number], plan.order.chunk_cells
    first_P, length_P = [], []
    t, stop = plan._quota(source, epoch), plan._quota(source, epoch + 1)
    while t < stop:
        number_of_pass, offset = divmod(t, source.n_cells)
        take = min(stop - t, source.n_cells - offset)
        chunk_K = permutation(-(-source.n_cells // size), plan.seed, "pass", source.name, number_of_pass)
        length_K = np.minimum(size, source.n_cells - chunk_K * size)
        end_K = np.cumsum(length_K)
        # A pass that an epoch boundary cuts gives its last chunk in two pieces.
        low_K, high_K = np.maximum(end_K - length_K, offset), np.minimum(end_K, offset + take)
        is_used_K = low_K < high_K
        first_P.append((chunk_K * size + low_K - (end_K - length_K))[is_used_K])
        length_P.append((high_K - low_K)[is_used_K])
        t += take
    empty = [np.zeros(0, np.int64)]
    return np.concatenate(first_P or empty), np.concatenate(length_P or empty)


@lru_cache(maxsize=2)
def _epoch_chunks(plan: Plan, epoch: int) -> _Epoch:
    parts: Sequence[tuple[np.ndarray, np.ndarray]] = [
        _source_chunks(plan, number, epoch) for number in range(len(plan.sources))
    ]
    source_K = np.repeat(np.arange(len(parts), dtype=np.int16), [len(first) for first, _ in parts])
    first_K, length_K = (np.concatenate([part[i] for part in parts]) for i in range(2))
    by_place_K = np.lexsort((first_K, source_K))
    order_K = by_place_K[_dealt(plan, epoch, len(source_K))]
    return _Epoch(source_K[order_K], first_K[order_K], np.cumsum(length_K[order_K]))


def _dealt(plan: Plan, epoch: int, n_chunks: int) -> np.ndarray:
    """int64 (K): the chunks, numbered by their place in the stores, in the order of lanes and rounds."""
    order = plan.order
    mixed = order.lanes * max(1, order.window_cells // order.chunk_cells)
    n_rounds = max(1, -(-n_chunks // mixed))
    lot_K = np.empty(n_chunks, np.int64)
    lot_K[permutation(n_chunks, plan.seed, "epoch", epoch)] = np.arange(n_chunks)
    stratum_K = np.arange(n_chunks) // n_rounds
    by_stratum_K = np.lexsort((lot_K, stratum_K))
    round_K = np.empty(n_chunks, np.int64)
    round_K[by_stratum_K] = np.arange(n_chunks) % n_rounds
    by_round_K = np.lexsort((lot_K, round_K))
    return np.concatenate([by_round_K[lane :: order.lanes] for lane in range(order.lanes)])
