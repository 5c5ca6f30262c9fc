"""The order against a slow reference that is written from the description alone, and the properties it must have."""

from __future__ import annotations

import time
from collections import Counter
from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest

from tftrain.cells.plan import OrderConfig, Plan, PlanSource, permutation
from tftrain.errors import CellsError, RecipeError


def make_plan(sizes, weights=None, *, seed=0, lanes=4, chunk=5, window=12, cells_per_step=8):
    weights = weights or [1.0] * len(sizes)
    sources = [PlanSource(f"s{i}", f"species {i}", n, f"digest {i}", w) for i, (n, w) in enumerate(zip(sizes, weights))]
    return Plan(tuple(sources), seed, OrderConfig(lanes, chunk, window), cells_per_step)


PLANS = {
    "one source": make_plan([103]),
    "three sources": make_plan([61, 7, 130]),
    "weights": make_plan([50, 33, 20], [0.3, 2.0, 1.7]),
    "one lane": make_plan([40], lanes=1, cells_per_step=3),
    "fewer cells than lanes": make_plan([3], lanes=8, cells_per_step=8),
    "windows longer than lanes": make_plan([100], window=1000),
    "steps longer than windows": make_plan([100, 57], window=3, cells_per_step=40),
    "chunks longer than windows": make_plan([100], chunk=30, window=7),
}


def reference_epoch(plan: Plan, epoch: int) -> list[list[tuple[int, int]]]:
    """Cells of each lane in the order of consumption, one cell at a time, from the head of plan.py."""
    size, lanes, seed = plan.order.chunk_cells, plan.order.lanes, plan.seed
    chunks = []
    for number, source in enumerate(plan.sources):
        weight, n = Fraction(str(source.weight)), source.n_cells
        pieces: dict[tuple[int, int], list[int]] = {}
        for t in range(floor(epoch * weight * n), floor((epoch + 1) * weight * n)):
            order = permutation(ceil(n / size), seed, "pass", source.name, t // n)
            of_pass = [cell for chunk in order for cell in range(chunk * size, min((chunk + 1) * size, n))]
            cell = of_pass[t % n]
            pieces.setdefault((t // n, cell // size), []).append(cell)
        chunks += [[(number, cell) for cell in piece] for piece in pieces.values()]
    chunks.sort(key=lambda chunk: chunk[0])  # stable: passes of a source in turn
    lot = {k: place for place, k in enumerate(permutation(len(chunks), seed, "epoch", epoch).tolist())}
    n_rounds = ceil(len(chunks) / (lanes * max(1, plan.order.window_cells // size)))
    rounds: list[list[int]] = [[] for _ in range(n_rounds)]
    for first in range(0, len(chunks), n_rounds):
        stratum = sorted(range(first, min(first + n_rounds, len(chunks))), key=lot.__getitem__)
        for number, k in enumerate(stratum):
            rounds[number].append(k)
    dealt = [k for in_round in rounds for k in sorted(in_round, key=lot.__getitem__)]
    cells = [cell for lane in range(lanes) for k in dealt[lane::lanes] for cell in chunks[k]]
    result = []
    for lane in range(lanes):
        of_lane = cells[lane * len(cells) // lanes : (lane + 1) * len(cells) // lanes]
        shuffled: list[tuple[int, int]] = []
        lengths = [size] if size < plan.order.window_cells else []
        lengths += [ceil((lane + 1) * plan.order.window_cells / lanes / size) * size]
        first, index = 0, 0
        while first < len(of_lane):
            length = lengths[index] if index < len(lengths) else plan.order.window_cells
            window = of_lane[first : first + length]
            shuffled += [window[i] for i in permutation(len(window), seed, "window", epoch, lane, index)]
            first, index = first + length, index + 1
        result.append(shuffled)
    return result


def steps_of(plan: Plan, cursor: int, stop_cursor: int, world: int) -> list[list[list[tuple[int, int]]]]:
    """For each step the cells of each rank, put together from the windows of that rank alone."""
    steps = list(plan.steps(cursor, stop_cursor))
    result: list[list[list[tuple[int, int]]]] = [[] for _ in steps]
    for rank in range(world):
        cells = {}
        for window in plan.windows(cursor, stop_cursor, rank=rank, world=world):
            source_C, position_C = window.cells()
            for i, cell in enumerate(zip(source_C.tolist(), position_C.tolist())):
                cells[window.epoch, window.lane, window.start + window.skip + i] = cell
        for at, step in enumerate(steps):
            positions = range(step.lane_start, step.lane_stop)
            keys = [(step.epoch, lane, i) for lane in plan.lanes_of(rank, world) for i in positions]
            result[at].append([cells.pop(key) for key in keys if key in cells])
        assert not cells, "a rank reads what no step takes"
    return result


@pytest.mark.parametrize("name", PLANS)
def test_windows_follow_the_description(name):
    plan = PLANS[name]
    for epoch in range(3):
        expected = reference_epoch(plan, epoch)
        for lane in range(plan.order.lanes):
            windows = plan.windows(
                plan.epoch_start(epoch), plan.epoch_start(epoch + 1), rank=lane, world=plan.order.lanes
            )
            cells = [cell for w in windows for cell in zip(*(part.tolist() for part in w.cells()))]
            assert cells == expected[lane]


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("seed", range(3))
def test_every_cell_once_an_epoch_through_any_stops_and_worlds(name, seed):
    plan, rng = PLANS[name], np.random.default_rng(seed)
    epochs = 4
    stop = plan.epoch_start(epochs)
    cursors = [0, *(step.cursor for step in plan.steps(0, stop))]
    assert cursors[-1] == stop
    seen: Counter = Counter()
    at, trained = 0, []
    while at < len(cursors) - 1:
        after = int(rng.integers(at + 1, len(cursors)))
        world = int(rng.integers(1, plan.order.lanes + 1))
        for ranks in steps_of(plan, cursors[at], cursors[after], world):
            trained.append(sorted(cell for rank in ranks for cell in rank))
        at = after
    for cells in trained:
        seen.update(cells)
    for number, source in enumerate(plan.sources):
        times = epochs * Fraction(str(source.weight))
        counts = [seen[number, cell] for cell in range(source.n_cells)]
        assert sum(counts) == floor(times * source.n_cells)
        assert set(counts) <= {floor(times), ceil(times)}
    uninterrupted = [sorted(cell for rank in ranks for cell in rank) for ranks in steps_of(plan, 0, stop, 1)]
    assert trained == uninterrupted


@pytest.mark.parametrize("name", PLANS)
def test_steps_and_cursors(name):
    plan = PLANS[name]
    steps = list(plan.steps(0, plan.epoch_start(3)))
    assert len(steps) == plan.n_steps(3)
    by_epoch = [[step for step in steps if step.epoch == epoch] for epoch in range(3)]
    for epoch, of_epoch in enumerate(by_epoch):
        assert sum(step.n_cells for step in of_epoch) == plan.epoch_cells(epoch)
        assert all(step.n_cells == plan.cells_per_step for step in of_epoch[:-1])
        assert sum(plan.cells_of(i, epoch) for i in range(len(plan.sources))) == plan.epoch_cells(epoch)
    for n, step in enumerate(steps, 1):
        assert plan.cursor_after(n) == step.cursor
        # A run that goes on from here takes the steps that it would have taken.
        assert list(plan.steps(step.cursor, plan.epoch_start(3))) == steps[n:]


def test_weights_are_stated_exactly():
    plan = make_plan([1000, 300, 10], [0.1, 3.0, 1.5])
    assert [[plan.cells_of(i, e) for i in range(3)] for e in range(3)] == [[100, 900, 15]] * 3
    ten_epochs = [cell for ranks in steps_of(plan, 0, plan.epoch_start(10), 1) for cell in ranks[0]]
    assert Counter(Counter(ten_epochs).values()) == {1: 1000, 30: 300, 15: 10}


@pytest.mark.parametrize(("epochs", "expected"), [(1, 13), (2, 26), (0.5, 7), (1.25, 17), (0.01, 1)])
def test_steps_of_a_broken_number_of_epochs(epochs, expected):
    assert make_plan([100]).n_steps(epochs) == expected  # 100 cells, 8 a step: 13 steps, the last one of 4


def test_a_seed_and_an_epoch_give_another_order():
    def epoch(plan, number):
        return [
            c for ranks in steps_of(plan, plan.epoch_start(number), plan.epoch_start(number + 1), 1) for c in ranks[0]
        ]

    first, again, other, second = (epoch(make_plan([200], seed=s), e) for s, e in ((1, 0), (1, 0), (2, 0), (1, 1)))
    assert first == again
    assert first != other
    assert first != second
    assert sorted(first) == sorted(other) == sorted(second)


def test_the_order_is_pinned():
    """A change of these numbers reorders every run that is continued: raise ORDER_VERSION then."""
    assert permutation(8, 0, "window", 1, 2, 3).tolist() == [1, 6, 5, 0, 3, 7, 4, 2]
    assert make_plan([103]).fingerprint == "d0c4ddf3ff0c40c2cd68ced4246fa7f1"


def test_windows_begin_short_and_then_run_out_one_after_another():
    plan = make_plan([4000], lanes=4, window=100, chunk=10)
    starts = sorted((w.start, w.lane) for w in plan.windows(0, plan.epoch_start(1)))
    ramp = [(start, lane) for start in (0, 10) for lane in range(4)]
    assert starts[:13] == [*ramp, (40, 0), (60, 1), (90, 2), (110, 3), (140, 0)]


def test_what_is_mixed_at_a_time_comes_from_all_parts_of_the_stores():
    """24 chunks are mixed at a time: each from another 24th of the two stores, laid end to end."""
    plan = make_plan([9600, 2400], lanes=4, chunk=10, window=60)
    lanes: list[list[int]] = [[] for _ in range(4)]
    for window in plan.windows(0, plan.epoch_start(1)):
        lanes[window.lane] += [960 * s + f // 10 for s, f in zip(window.source_S, window.first_S)]
    for number in range(0, 300, 6):
        strata = {chunk // 50 for lane in lanes for chunk in list(dict.fromkeys(lane))[number : number + 6]}
        assert len(strata) == 24


def test_fingerprint_and_difference():
    plan = make_plan([100, 50])
    before = plan.describe()
    same = make_plan([100, 50], cells_per_step=16)
    assert same.fingerprint == plan.fingerprint
    assert same.difference(before) == []
    sources = (plan.sources[0], PlanSource("s1", "species 1", 50, "other", 1.0))
    changed = Plan(sources, 0, plan.order, 8)
    assert changed.fingerprint != plan.fingerprint
    assert changed.difference(before) == ["source s1: other cells or counts, though as many (50)"]
    assert make_plan([100, 51], [1.0, 2.0], seed=3, window=9).difference(before) == [
        "seed: was 0, is now 3",
        "window_cells: was 12, is now 9",
        "source s1: n_cells was 50, is now 51",
        "source s1: weight was 1.0, is now 2.0",
    ]
    assert make_plan([100]).difference(before) == ["source s1 is gone"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: make_plan([10], cells_per_step=10),
            RecipeError,
            r"cells_per_step is 10; .* multiple of .* 4, for example 8",
        ),
        (lambda: make_plan([10], [0.0]), RecipeError, "s0: weight is 0.0; it must be above 0"),
        (lambda: make_plan([0]), CellsError, "s0 has no training cells"),
        (lambda: Plan((), 0), RecipeError, "data.sources is empty"),
        (lambda: OrderConfig(window_cells=0), RecipeError, "data.order.window_cells is 0; it must be at least 1"),
        (lambda: make_plan([100]).position(13), RecipeError, "cursor of 13 cells lies inside a step"),
        (lambda: list(make_plan([100]).windows(world=5)), RecipeError, "5 workers share data.order.lanes = 4"),
    ],
)
def test_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_planning_a_census_is_quick():
    sizes = [57e6, 38e6, 4e6, 3e6, 2e6, 2e6, 2e6, 1e6, 1e6, 1e6, 5e5, 5e5]
    sources = tuple(PlanSource(f"s{i}", f"s{i}", int(n), "", 1.0) for i, n in enumerate(sizes))
    plan = Plan(sources, 0, OrderConfig(), 2048)
    started = time.process_time()
    assert sum(window.n_cells for window in plan.windows(0, plan.epoch_start(1))) == 112_000_000
    assert time.process_time() - started < 10
