"""Plan -> this rank's cells, step by step, through Ray Data or a thread of this process.

In: a Plan, its Sources, a rank and a cursor. Out: (Cells of this rank for a step, cursor after the step). Both backends
run the same read tasks, one a window, in the order in which the steps need them, and give the same cells.

Ray Data keeps no position of its own: the cursor in the training checkpoint is all there is, and each rank builds the
rest of its tasks from it, inside its worker.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from tftrain.cells.contract import Cells
from tftrain.cells.plan import Plan, Step, Window
from tftrain.cells.read import heldout_cells, read_blocks, read_window, widen
from tftrain.cells.source import Source
from tftrain.errors import CellsError, RecipeError

__all__ = ["StreamConfig", "heldout_cells", "stream_steps"]

log = logging.getLogger(__name__)

_TASKS_PER_DATASET = 4096
"""Windows of one Ray Dataset (some 100 million cells at the default window); the next one starts when it is used up."""
_CELLS_PER_BLOCK = 2048
"""What is let go at a time: of a window that is half used up, half is in memory."""
_STALL_S = 30
"""Seconds without a window after which the reason is looked for."""
_EXECUTOR_STEP_S = 0.05
"""Least time between two looks of Ray Data's executor at its tasks, each of which takes 1 to 2 ms."""
ALLOCATOR = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=17179869184:"
    "glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
}
"""Environment of every process that reads. TileDB asks for large buffers again and again; without this half of the CPU
time goes to the kernel, which hands out and takes back their pages. Only has an effect from the start of a process."""
_CELL_COLUMNS = ("source", "joinid", "gene", "count")


@dataclass(frozen=True)
class StreamConfig:
    """Where windows are read."""

    backend: Literal["ray", "local"] = "ray"
    """ray: tasks on any node of the cluster; local: a thread of the training process."""
    reader_cpus: float = 0.5
    """CPUs that Ray reserves for a read task. Leave so many free beside the training workers: else nothing is read."""
    concurrency: int = 2
    """Read tasks of a rank that run at the same time; each takes about 0.6 GB at the default window."""
    prefetch_windows: int = 2
    """Windows that wait, read, for the step that needs them."""
    reader_resources: dict[str, float] | None = None
    """Custom Ray resources of a read task, to place readers on CPU-only nodes."""

    def __post_init__(self) -> None:
        if self.backend not in ("ray", "local"):
            raise RecipeError(f"data.stream.backend is {self.backend!r}; it must be ray or local")
        for name, least in (("concurrency", 1), ("prefetch_windows", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"data.stream.{name} is {getattr(self, name)}; it must be at least {least}")


def stream_steps(
    plan: Plan,
    sources: Sequence[Source],
    *,
    rank: int = 0,
    world: int = 1,
    cursor: int = 0,
    stop_cursor: int | None = None,
    config: StreamConfig | None = None,
) -> Iterator[tuple[Cells, int]]:
    """This rank's cells of every step from `cursor` to `stop_cursor`, each with the cursor after the step.

    The cells of a step, over all ranks, depend on the plan alone. In a short step a rank may have none: it then gets
    empty Cells, so that all ranks take the same number of steps. Cells of a rank come lane by lane. Raises CellsError
    where a store cannot be read or holds what is no count.
    """
    config = config or StreamConfig()
    assert [source.plan_source for source in sources] == list(plan.sources), "the plan was made of other sources"
    lanes = plan.lanes_of(rank, world)
    windows = plan.windows(cursor, stop_cursor, rank=rank, world=world)
    read = _read_with_ray if config.backend == "ray" else _read_here
    arriving = read(windows, list(sources), config)
    waiting = _Lanes(lanes, arriving, sources[0].obs_columns)
    try:
        for step in plan.steps(cursor, stop_cursor):
            yield waiting.take(step), step.cursor
    finally:
        arriving.close()


@dataclass(frozen=True)
class _Block:
    """Cells of a window that follow each other in a lane; its memory is its own."""

    window: Window
    first: int
    """Lane position of the first cell."""
    cells: Cells

    @property
    def stop(self) -> int:
        return self.first + len(self.cells)


class _Lanes:
    """What has been read of a rank's lanes and not been used yet."""

    def __init__(self, lanes: Sequence[int], arriving: Iterator[_Block], obs_columns: Sequence[str]) -> None:
        self._lanes: dict[int, deque[_Block]] = {lane: deque() for lane in lanes}
        self._arriving = arriving
        self._next: _Block | None = None
        self._obs_columns = obs_columns

    def take(self, step: Step) -> Cells:
        """Cells of a step; pulls the windows that it reaches into."""
        while (window := self._peek()) is not None and (window.epoch, window.start) < (step.epoch, step.lane_stop):
            assert self._next is not None
            self._lanes[window.lane].append(self._next)
            self._next = None
        parts = [part for queue in self._lanes.values() for part in self._take_of(queue, step)]
        return Cells.concat(parts) if parts else Cells.empty(self._obs_columns)

    def _peek(self) -> Window | None:
        if self._next is None:
            self._next = next(self._arriving, None)
        return self._next.window if self._next else None

    def _take_of(self, queue: deque[_Block], step: Step) -> Iterator[Cells]:
        while queue:
            block = queue[0]
            if block.window.epoch > step.epoch or block.first >= step.lane_stop:
                return
            start, stop = max(step.lane_start, block.first), min(step.lane_stop, block.stop)
            yield widen(block.cells.slice(start - block.first, stop - block.first))
            if block.stop > step.lane_stop:
                return
            queue.popleft()


def _blocks_of(window: Window, parts: Iterator[Cells] | Sequence[Cells]) -> Iterator[_Block]:
    first = window.start + window.skip
    for cells in parts:
        yield _Block(window, first, cells)
        first += len(cells)


# In this process


def _read_here(windows: Iterator[Window], sources: list[Source], config: StreamConfig) -> Generator[_Block]:
    """Reads ahead in one thread; TileDB uses several of its own."""
    running: deque[tuple[Window, Future[list[Cells]]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="cells") as pool:
        try:
            while True:
                for window in islice(windows, 1 + config.prefetch_windows - len(running)):
                    running.append((window, pool.submit(read_blocks, sources, window, _CELLS_PER_BLOCK)))
                if not running:
                    return
                window, future = running.popleft()
                yield from _blocks_of(window, future.result())
                del future
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Through Ray Data


def _read_with_ray(windows: Iterator[Window], sources: list[Source], config: StreamConfig) -> Generator[_Block]:
    """Reads in Ray tasks; gives the windows in order, whole, however Ray cuts the blocks."""
    import ray

    obs_columns = sources[0].obs_columns
    # Once a rank, not once a task: the sources hold a bit for each cell and a row for each gene.
    shared = ray.put(sources)
    while batch := list(islice(windows, _TASKS_PER_DATASET)):
        with closing(_tables(batch, shared, config)) as tables:
            rest: pa.Table | None = None
            for window in batch:
                first, stop = window.start + window.skip, window.start + window.stop
                while first < stop:
                    table = _next_table(tables, config) if rest is None else rest
                    n_cells = min(_CELLS_PER_BLOCK, len(table), stop - first)
                    yield _Block(window, first, _from_arrow(table.slice(0, n_cells), obs_columns))
                    first += n_cells
                    rest = table.slice(n_cells) if n_cells < len(table) else None


def _next_table(tables: Iterator[pa.Table], config: StreamConfig) -> pa.Table:
    """The next table; says so where it takes suspiciously long, since Ray waits for a free CPU without a word."""
    timer = threading.Timer(_STALL_S, _explain_stall, [config])
    timer.daemon = True
    timer.start()
    try:
        return next(tables)
    finally:
        timer.cancel()


def _explain_stall(config: StreamConfig) -> None:
    import ray

    free, has = (resources.get("CPU", 0.0) for resources in (ray.available_resources(), ray.cluster_resources()))
    why = (
        f"a reader needs {config.reader_cpus:g} CPUs and the Ray cluster has {free:g} of its {has:g} free beside the "
        "training workers: add a machine, or lower data.stream.reader_cpus or ray.cpus_per_worker, or read inside the "
        "workers with data.stream.backend=local"
        if free < config.reader_cpus
        else f"{free:g} CPUs of the Ray cluster are free, so the readers run but are slow: is the storage reachable?"
    )
    log.warning("no cells have come for %d s: %s", _STALL_S, why)


def _tables(windows: list[Window], shared: Any, config: StreamConfig) -> Generator[pa.Table]:
    """Arrow blocks of the windows, in order. Raises the CellsError that a task raised."""
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.custom_execution_callback_classes = [_unhurried()]
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name, level in (("progress", logging.ERROR), ("execution.streaming_executor", logging.WARNING)):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(level)
    dataset = ray.data.read_datasource(
        _datasource(windows, shared),
        runtime_env={"env_vars": dict(ALLOCATOR)},
        override_num_blocks=len(windows),
        concurrency=config.concurrency,
        num_cpus=config.reader_cpus,
        resources=config.reader_resources,
    )
    try:
        batches = dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=config.prefetch_windows
        )
        yield from batches
    except RayError as error:
        raise _cause(error) from error


@cache
def _unhurried() -> type:
    """Gives Ray's executor a pace. It runs in a thread of this process, the training worker, and while enough windows
    wait it looks for work in a loop without a pause, which takes two thirds of a core and of the interpreter lock."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Unhurried(ExecutionCallback):
        def __init__(self) -> None:
            self._next_step_s = 0.0

        def on_execution_step(self, executor: Any) -> None:
            time.sleep(max(0.0, self._next_step_s - time.monotonic()))
            self._next_step_s = time.monotonic() + _EXECUTOR_STEP_S

    return Unhurried


def _cause(error: BaseException) -> CellsError:
    """The CellsError behind Ray's wrappers; any other failure of a reader is named as such."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CellsError):
            inner = getattr(seen, "cause", seen)
            return CellsError(str(inner))
        seen = getattr(seen, "cause", None) or seen.__cause__
    return CellsError(f"a reader failed: {error}")


def _datasource(windows: list[Window], shared: Any) -> Any:
    """A Ray Data source with one read task a window. Made here, so that importing this file does not import Ray."""
    from ray.data.block import BlockMetadata
    from ray.data.datasource import Datasource, ReadTask

    class Windows(Datasource):
        def get_name(self) -> str:
            return "Cells"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(
            self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
        ) -> list[ReadTask]:
            return [
                ReadTask(
                    partial(_read_block, shared, window),
                    BlockMetadata(num_rows=window.n_cells, size_bytes=None, input_files=None, exec_stats=None),
                )
                for window in windows
            ]

    return Windows()


def _read_block(shared: Any, window: Window) -> list[pa.Table]:
    import ray

    return [_to_arrow(read_window(ray.get(shared), window))]


def _to_arrow(cells: Cells) -> pa.Table:
    """A row a cell: source, joinid, lists of genes and counts, and the obs columns."""
    start = pa.array(cells.cell_start_C1)
    lists = [pa.LargeListArray.from_arrays(start, pa.array(values)) for values in (cells.gene_N, cells.count_N)]
    obs = [pa.array(column_C) for column_C in cells.obs.values()]
    return pa.table(
        [pa.array(cells.source_C), pa.array(cells.joinid_C), *lists, *obs], [*_CELL_COLUMNS, *map(_obs_name, cells.obs)]
    )


def _from_arrow(table: pa.Table, obs_columns: Sequence[str]) -> Cells:
    """The cells of a block, copied out of Ray's object store, which can then drop it."""
    gene, count = (_whole(table[name]) for name in ("gene", "count"))
    start_C1 = gene.offsets.to_numpy()
    first, stop = int(start_C1[0]), int(start_C1[-1])
    return Cells(
        start_C1 - first,
        gene.values.to_numpy()[first:stop].copy(),
        count.values.to_numpy()[first:stop].copy(),
        table["source"].to_numpy().copy(),
        table["joinid"].to_numpy().copy(),
        {name: table[_obs_name(name)].to_pandas().to_numpy() for name in obs_columns},
    )


def _whole(column: pa.ChunkedArray) -> pa.LargeListArray:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _obs_name(name: str) -> str:
    """Keeps an obs column called `count`, say, apart from the cells' own."""
    return f"obs.{name}"
