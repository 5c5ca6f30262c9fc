"""A rank's stream is the plan, through Ray Data and in this process alike."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import numpy as np
import pytest
from stores import expected_cell, make_store, make_vocab

from tftrain.cells.plan import OrderConfig, Plan
from tftrain.cells.source import HoldoutConfig, QcConfig, SourceConfig, close_experiments, open_sources
from tftrain.cells.stream import StreamConfig, stream_steps
from tftrain.errors import CellsError, RecipeError

GENES = 40
VOCAB = make_vocab([f"G{gene}" for gene in range(GENES)])
LOCAL, RAY = StreamConfig(backend="local"), StreamConfig(backend="ray")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    paths = [make_store(folder / f"{i}.soma", store=i, n_cells=n) for i, n in enumerate((300, 90))]
    configs = [SourceConfig(str(path), f"species {i}", weight=1 + i) for i, path in enumerate(paths)]
    sources = open_sources(
        configs, VOCAB, qc=QcConfig(0, 0), holdout=HoldoutConfig(values=["d3"]), obs_columns=["assay", "nnz"]
    )
    plan = Plan(tuple(s.plan_source for s in sources), 7, OrderConfig(lanes=4, chunk_cells=10, window_cells=40), 24)
    return plan, sources


def collect(plan, sources, **settings):
    """Everything of a stream, step by step, in plain values."""
    steps = []
    for cells, cursor in stream_steps(plan, sources, **settings):
        ids = list(zip(cells.source_C.tolist(), cells.joinid_C.tolist()))
        for c, (store, joinid) in enumerate(ids):
            one = cells.slice(c, c + 1)
            got = dict(zip(one.gene_N.tolist(), one.count_N.tolist()))
            assert got == expected_cell(store, joinid, GENES)
            assert one.obs["assay"][0] == f"assay {joinid % 3}"
            assert one.obs["nnz"][0] == len(got)
        assert (cells.gene_N.dtype, cells.count_N.dtype) == (np.int32, np.int32)
        steps.append((cursor, ids))
    return steps


def test_steps_are_the_plan_s(run):
    plan, sources = run
    steps = collect(plan, sources, stop_cursor=plan.epoch_start(2), config=LOCAL)
    assert [cursor for cursor, _ in steps] == [step.cursor for step in plan.steps(0, plan.epoch_start(2))]
    assert [len(ids) for _, ids in steps] == [step.n_cells for step in plan.steps(0, plan.epoch_start(2))]
    for epoch in range(2):
        seen = [
            id for cursor, ids in steps if plan.epoch_start(epoch) < cursor <= plan.epoch_start(epoch + 1) for id in ids
        ]
        expected = [
            (s, j) for s, source in enumerate(sources) for j in source.train_joinid_N.tolist() for _ in range(1 + s)
        ]
        assert sorted(seen) == sorted(expected)
        held = {(s, j) for s, source in enumerate(sources) for j in source.heldout_joinid_M.tolist()}
        assert not held & set(seen)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_a_step(run, world):
    plan, sources = run
    stop = plan.epoch_start(1)
    alone = collect(plan, sources, stop_cursor=stop, config=LOCAL)
    ranks = [collect(plan, sources, rank=r, world=world, stop_cursor=stop, config=LOCAL) for r in range(world)]
    for (cursor, ids), *parts in zip(alone, *ranks):
        assert [part[0] for part in parts] == [cursor] * world
        assert sorted(ids) == sorted(id for _, part in parts for id in part)


@pytest.mark.parametrize("after", [1, 5, 14, 20])
def test_a_stream_goes_on_where_another_stopped(run, after):
    plan, sources = run
    stop = plan.epoch_start(2)
    whole = collect(plan, sources, stop_cursor=stop, config=LOCAL)
    assert collect(plan, sources, cursor=whole[after - 1][0], stop_cursor=stop, config=LOCAL) == whole[after:]


def test_a_short_last_step_may_leave_a_rank_empty(run):
    _, sources = run
    plan = Plan(tuple(s.plan_source for s in sources), 0, OrderConfig(4, 10, 40), cells_per_step=4 * 110)
    n_cells = plan.epoch_cells(0)
    assert n_cells % 440
    plan = Plan(plan.sources, 0, OrderConfig(n_cells - 1, 10, 40), cells_per_step=n_cells - 1)
    streams = [
        collect(plan, sources, rank=r, world=n_cells - 1, stop_cursor=n_cells, config=LOCAL) for r in (0, n_cells - 2)
    ]
    assert [[len(ids) for _, ids in steps] for steps in streams] == [[1, 0], [1, 1]]


def test_leaving_a_stream_early_ends_its_thread(run):
    plan, sources = run
    stream = stream_steps(plan, sources, config=LOCAL)  # without end
    assert {len(next(stream)[0]) for _ in range(30)} >= {24}
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cells")]


@pytest.mark.timeout(120)
def test_ray_gives_the_same_cells(run, ray_cluster):
    plan, sources = run
    stop, cursor = plan.epoch_start(2), plan.cursor_after(3)
    for rank in range(2):
        settings = {"rank": rank, "world": 2, "cursor": cursor, "stop_cursor": stop}
        assert collect(plan, sources, config=RAY, **settings) == collect(plan, sources, config=LOCAL, **settings)


@pytest.mark.timeout(120)
def test_a_killed_reader_loses_and_repeats_nothing(run, ray_cluster, monkeypatch, tmp_path):
    plan, sources = run
    stop = plan.epoch_start(1)
    expected = collect(plan, sources, stop_cursor=stop, config=LOCAL)
    marker = tmp_path / "killed"
    kill_once(monkeypatch, str(marker))
    assert collect(plan, sources, stop_cursor=stop, config=RAY) == expected
    assert marker.exists()


def kill_once(monkeypatch, marker: str) -> None:
    """Makes the first read task of Ray kill its own process; the function travels to it by value."""
    from tftrain.cells import stream

    read = stream._read_block

    def read_or_die(shared, window):
        if window.lane == 2 and not os.path.exists(marker):
            with open(marker, "w") as file:
                file.write("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return read(shared, window)

    monkeypatch.setattr(stream, "_read_block", read_or_die)


@pytest.mark.timeout(120)
def test_readers_have_the_allocator_s_settings_from_their_start(run, ray_cluster, monkeypatch, tmp_path):
    plan, sources = run
    from tftrain.cells import stream

    read, seen = stream._read_block, tmp_path / "seen"

    def read_and_tell(shared, window):
        with open("/proc/self/environ") as file:  # as the process began, whatever Python has set since
            seen.write_text(file.read().replace("\0", ":"))  # glibc cuts the value up where it lies
        return read(shared, window)

    monkeypatch.setattr(stream, "_read_block", read_and_tell)
    collect(plan, sources, stop_cursor=plan.cursor_after(1), config=RAY)
    assert f"GLIBC_TUNABLES={stream.ALLOCATOR['GLIBC_TUNABLES']}" in seen.read_text()


@pytest.mark.timeout(120)
def test_readers_that_wait_for_a_cpu_say_so(ray_cluster, monkeypatch):
    """The test cluster has 4 CPUs: a reader that needs 5 never starts."""
    from tftrain.cells import stream

    monkeypatch.setattr(stream, "_STALL_S", 0.05)
    waited, said = threading.Event(), []

    def tables():
        waited.wait(20)
        yield "table"

    handler = logging.Handler()
    handler.emit = lambda record: (said.append(record.getMessage()), waited.set())  # type: ignore[method-assign]
    stream.log.addHandler(handler)
    assert stream._next_table(tables(), StreamConfig(reader_cpus=5)) == "table"
    stream.log.removeHandler(handler)
    assert "a reader needs 5 CPUs and the Ray cluster has" in said[0]
    assert "lower data.stream.reader_cpus or ray.cpus_per_worker, or read inside the workers" in said[0]


@pytest.mark.timeout(120)
def test_reading_ahead_leaves_the_processor_to_training(run, ray_cluster):
    """While windows wait for the next step, Ray Data's executor, which runs in this process, must not spin."""
    plan, sources = run
    steps = stream_steps(plan, sources, config=RAY)
    next(steps)
    time.sleep(2)
    busy_s = time.process_time()
    time.sleep(3)
    busy_s = time.process_time() - busy_s
    steps.close()
    assert busy_s < 0.6, "of 3 s; 0.2 s is usual, 1.3 s were used where nothing kept the executor from spinning"


def test_memory_is_let_go_block_by_block(run, monkeypatch):
    """A lane that is half used up holds half of its window."""
    plan, sources = run
    from tftrain.cells import stream

    monkeypatch.setattr(stream, "_CELLS_PER_BLOCK", 8)
    window = max(plan.windows(0, plan.epoch_start(1)), key=lambda w: w.n_cells)
    blocks = list(stream._blocks_of(window, stream.read_blocks(sources, window, 8)))
    assert [len(block.cells) for block in blocks[:-1]] == [8] * (len(blocks) - 1)
    assert [block.first for block in blocks] == list(range(window.start, window.start + window.n_cells, 8))
    assert all(block.cells.gene_N.base is None for block in blocks), "a block must not keep its window alive"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("config", [LOCAL, RAY], ids=["local", "ray"])
def test_a_store_that_cannot_be_read_stops_the_stream(tmp_path, ray_cluster, config):
    path = make_store(tmp_path / "cut.soma", change={(250, 3): 0.5})
    sources = open_sources([SourceConfig(str(path), "s")], VOCAB, qc=QcConfig(0, 0), holdout=HoldoutConfig(fraction=0))
    plan = Plan((sources[0].plan_source,), 0, OrderConfig(2, 50, 100), 20)
    with pytest.raises(CellsError, match=r"^\S*cut.soma: cell 250 \(soma_joinid\), gene G3: X/raw holds 0.5"):
        list(stream_steps(plan, sources, stop_cursor=300, config=config))
    close_experiments()


@pytest.mark.parametrize("make", [lambda: StreamConfig(concurrency=0), lambda: StreamConfig(backend="spark")])  # type: ignore[arg-type]
def test_settings_out_of_range(make):
    with pytest.raises(RecipeError, match=r"data.stream.* must be"):
        make()
