"""Plan -> this rank's cells, step by step, through Ray Data or a thread of this process.

In: a Plan, its Sources, a rank and a cursor. Out: (Cells of this rank for a step, cursor after the step). Both backends
run the same read tasks, one a window, in the order in which the steps need them, and give the same cells.

Ray Data keeps no position of its own: the cursor in the training checkpoint is all there is, and each rank builds the
rest of its tasks from it, inside its worker.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Literal

import pyarrow as pa

from tftrain.cells.contract import Cells
from tftrain.cells.plan import Plan, Step, Window
from tftrain.cells.read import heldout_cells, read_window, widen
from tftrain.cells.source import Source
from tftrain.errors import CellsError, RecipeError

__all__ = ["StreamConfig", "heldout_cells", "stream_steps"]

_TASKS_PER_DATASET = 4096
"""Windows of one Ray Dataset (67 million cells at the default window); the next one starts when it is used up."""
_CELL_COLUMNS = ("source", "joinid", "gene", "count")


@dataclass(frozen=True)
class StreamConfig:
    """Where windows are read."""

    backend: Literal["ray", "local"] = "ray"
    """ray: tasks on any node of the cluster; local: a thread of the training process."""
    reader_cpus: float = 0.5
    """CPUs that Ray reserves for a read task. Leave so many free beside the training workers: else nothing is read."""
    concurrency: int = 2
    """Read tasks of a rank that run at the same time; each takes about 0.5 GB at the default window."""
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


class _Lanes:
    """Windows of a rank's lanes that are not used up yet."""

    def __init__(
        self, lanes: Sequence[int], arriving: Iterator[tuple[Window, Cells]], obs_columns: Sequence[str]
    ) -> None:
        self._lanes: dict[int, deque[tuple[Window, Cells]]] = {lane: deque() for lane in lanes}
        self._arriving = arriving
        self._next: tuple[Window, Cells] | None = None
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
        return self._next[0] if self._next else None

    def _take_of(self, queue: deque[tuple[Window, Cells]], step: Step) -> Iterator[Cells]:
        while queue:
            window, cells = queue[0]
            first, stop = window.start + window.skip, window.start + window.stop
            if window.epoch > step.epoch or first >= step.lane_stop:
                return
            yield widen(cells.slice(max(step.lane_start, first) - first, min(step.lane_stop, stop) - first))
            if stop > step.lane_stop:
                return
            queue.popleft()


# In this process


def _read_here(
    windows: Iterator[Window], sources: list[Source], config: StreamConfig
) -> Generator[tuple[Window, Cells]]:
    """Reads ahead in one thread; TileDB uses several of its own."""
    running: deque[tuple[Window, Future[Cells]]] = deque()
    with ThreadPoolExecutor(1, thread_name_prefix="cells") as pool:
        try:
            while True:
                for window in islice(windows, 1 + config.prefetch_windows - len(running)):
                    running.append((window, pool.submit(read_window, sources, window)))
                if not running:
                    return
                window, future = running.popleft()
                yield window, future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Through Ray Data


def _read_with_ray(
    windows: Iterator[Window], sources: list[Source], config: StreamConfig
) -> Generator[tuple[Window, Cells]]:
    """Reads in Ray tasks; gives the windows in order, whole, however Ray cuts the blocks."""
    import ray

    obs_columns = sources[0].obs_columns
    # Once a rank, not once a task: the sources hold a bit for each cell and a row for each gene.
    shared = ray.put(sources)
    while batch := list(islice(windows, _TASKS_PER_DATASET)):
        parts: list[Cells] = []
        with closing(_blocks(batch, shared, config)) as blocks:
            for window in batch:
                while sum(map(len, parts)) < window.n_cells:
                    parts.append(_from_arrow(next(blocks), obs_columns))
                cells = Cells.concat(parts)
                yield window, cells.slice(0, window.n_cells)
                parts = [cells.slice(window.n_cells, len(cells))] if len(cells) > window.n_cells else []


def _blocks(windows: list[Window], shared: Any, config: StreamConfig) -> Generator[pa.Table]:
    """Arrow blocks of the windows, in order. Raises the CellsError that a task raised."""
    import ray
    from ray.data import DataContext
    from ray.exceptions import RayError

    context = DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name, level in (("progress", logging.ERROR), ("execution.streaming_executor", logging.WARNING)):
        logging.getLogger(f"ray.data._internal.{name}").setLevel(level)
    dataset = ray.data.read_datasource(
        _datasource(windows, shared),
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
