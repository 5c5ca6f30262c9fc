"""Rows of a store -> Cells: the only file that reads X.

In: sorted or shuffled soma_joinids of a Source, or a Window of the plan. Out: Cells in the order asked for. Values come
from TileDB in no order; a counting sort makes rows of them, and a row whose columns are not sorted is sorted then.
Every value is checked on its way: what is no whole number above zero stops the run with its cell and gene.
Shapes: C cells, N values of the result, M values of one read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import pyarrow as pa
import tiledbsoma

from tftrain.cells.contract import Cells
from tftrain.cells.plan import Window
from tftrain.cells.source import LAYER, MEASUREMENT, Source, heldout_sample
from tftrain.cells.storage import READ_ERRORS, experiment, first_line, read_again
from tftrain.errors import CellsError

_ROWS_PER_READ = 2048
"""Most cells of one TileDB query, which begins with a row of the Census's tiles: enough to come near the limit, little
enough to keep the unsorted values small."""
_GAP, _FEW_ROWS = 256, 128
"""Joinids apart by more are read by queries of their own, unless they are few: a range is cheaper than its points."""


def read_rows(source: Source, joinid_C: np.ndarray) -> Cells:
    """The cells `joinid_C` (C, unique) in that order; genes outside the vocabulary are left out.

    A cell may be left with no gene at all: it stays, empty, so that every planned cell is accounted for. Raises
    CellsError for counts that are not whole numbers above zero, and for a store that cannot be read.
    """
    return widen(_read(source, np.asarray(joinid_C, np.int64)))


def read_window(sources: Sequence[Source], window: Window) -> Cells:
    """The cells of a window in the order of consumption, of all its sources.

    gene_N and count_N are uint16 where the values fit and int32 otherwise (`widen` makes them int32 as the contract has
    it): a window stays in memory until the last of its cells is consumed.
    """
    return take(*_window_in_any_order(sources, window))


def read_blocks(sources: Sequence[Source], window: Window, block_cells: int) -> list[Cells]:
    """`read_window` in blocks of up to `block_cells` cells with memory of their own, so that each can be let go."""
    cells, place_C = _window_in_any_order(sources, window)
    return [take(cells, place_C[first : first + block_cells]) for first in range(0, len(place_C), block_cells)]


def _window_in_any_order(sources: Sequence[Source], window: Window) -> tuple[Cells, np.ndarray]:
    """The cells of a window as they are read, and for each cell in the order of consumption where it is."""
    source_C, position_C = window.cells()
    place_C = np.empty(len(source_C), np.int64)
    parts, done = [], 0
    for index in sorted(set(source_C.tolist())):
        where_C = np.flatnonzero(source_C == index)
        # A source of weight above 1 may give the same cell twice to a window: read once.
        position_U, inverse_C = np.unique(position_C[where_C], return_inverse=True)
        rows = sources[index].train
        # Runs of neighbouring positions, so that each costs one look-up.
        breaks = np.flatnonzero(np.diff(position_U) != 1) + 1
        runs = np.split(position_U, breaks)
        joinid_U = np.concatenate([rows.slice(int(run[0]), len(run)) for run in runs])
        parts.append(_read(sources[index], joinid_U))
        place_C[where_C] = done + inverse_C
        done += len(position_U)
    return Cells.concat(parts), place_C


def heldout_cells(sources: Sequence[Source], rank: int, world: int, max_cells: int) -> Cells:
    """This rank's share of at most `max_cells` held-out cells over all sources: all ranks together have each once."""
    parts = []
    for source, joinid_C in zip(sources, heldout_sample(sources, max_cells)):
        parts.append(read_rows(source, joinid_C[rank::world]))
    return Cells.concat(parts)


def widen(cells: Cells) -> Cells:
    """The same cells with int32 genes and counts."""
    return Cells(
        cells.cell_start_C1,
        cells.gene_N.astype(np.int32, copy=False),
        cells.count_N.astype(np.int32, copy=False),
        cells.source_C,
        cells.joinid_C,
        cells.obs,
    )


def take(cells: Cells, index_K: np.ndarray) -> Cells:
    """`cells.take`, value by value in compiled code, keeping the types."""
    start_K1 = np.concatenate([[0], np.cumsum(cells.n_expressed_C[index_K])])
    gene_N, count_N = np.empty(start_K1[-1], cells.gene_N.dtype), np.empty(start_K1[-1], cells.count_N.dtype)
    _copy_rows(cells.cell_start_C1, cells.gene_N, cells.count_N, index_K, start_K1, gene_N, count_N)
    obs = {name: column_C[index_K] for name, column_C in cells.obs.items()}
    return Cells(start_K1, gene_N, count_N, cells.source_C[index_K], cells.joinid_C[index_K], obs)


def _read(source: Source, joinid_C: np.ndarray) -> Cells:
    """Reads in sorted order, `_ROWS_PER_READ` cells a query, then puts the cells in the order asked for."""
    obs = read_obs(source, joinid_C)
    order_C = np.argsort(joinid_C, kind="stable")
    sorted_C = joinid_C[order_C]
    assert not (np.diff(sorted_C) == 0).any(), "a cell is asked for twice"
    gene_type = np.uint16 if source.row_of_var.max(initial=0) < 2**16 else np.int32
    starts, genes, counts = [np.zeros(1, np.int64)], [np.zeros(0, gene_type)], [np.zeros(0, np.uint16)]
    for first, stop in _portions(sorted_C):
        start_C1, gene_N, count_N = _read_rows(source, sorted_C[first:stop], gene_type)
        starts.append(start_C1[1:] + starts[-1][-1])
        genes.append(gene_N)
        counts.append(count_N)
    cells = Cells(
        np.concatenate(starts),
        np.concatenate(genes),
        np.concatenate(counts),
        np.full(len(joinid_C), source.index, np.int16),
        sorted_C,
    )
    if (np.diff(order_C) != 1).any():
        inverse_C = np.empty(len(order_C), np.int64)
        inverse_C[order_C] = np.arange(len(order_C))
        cells = take(cells, inverse_C)
    return Cells(cells.cell_start_C1, cells.gene_N, cells.count_N, cells.source_C, joinid_C, obs)


def _portions(joinid_C: np.ndarray) -> list[tuple[int, int]]:
    """(first, stop) of the sorted joinids of each query: neighbours in one row of tiles, or a few scattered ones."""
    is_cut_C = (np.diff(joinid_C) > _GAP) | (np.diff(joinid_C // _ROWS_PER_READ) > 0)
    ends = [*(np.flatnonzero(is_cut_C) + 1).tolist(), len(joinid_C)] if len(joinid_C) else []
    portions: list[tuple[int, int]] = []
    begin, were_few = 0, False
    for end in ends:
        is_few = end - begin < _FEW_ROWS
        if is_few and were_few and end - portions[-1][0] <= _ROWS_PER_READ:
            portions[-1] = (portions[-1][0], end)
        else:
            portions.append((begin, end))
        begin, were_few = end, is_few
    return portions


def _read_rows(
    source: Source, joinid_C: np.ndarray, gene_type: type[np.generic]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row starts, vocabulary rows (`gene_type`) and counts (uint16, or int32) of sorted joinids, by one query."""
    tables = _query(source, joinid_C)
    length_C, greatest = np.zeros(len(joinid_C), np.int64), 0.0
    for row_M, column_M, value_M in tables:
        bad, most = _count(joinid_C, row_M, column_M, value_M, source.row_of_var, length_C)
        if bad >= 0:
            raise _not_a_count(source, int(row_M[bad]), int(column_M[bad]), value_M[bad])
        greatest = max(greatest, most)
    start_C1 = np.concatenate([[0], np.cumsum(length_C)])
    gene_N = np.empty(start_C1[-1], gene_type)
    count_N = np.empty(start_C1[-1], np.uint16 if greatest < 2**16 else np.int32)
    is_sorted, next_C, column_C = True, start_C1[:-1].copy(), np.full(len(joinid_C), -1, np.int64)
    for row_M, column_M, value_M in tables:
        is_sorted &= _fill(joinid_C, row_M, column_M, value_M, source.row_of_var, next_C, column_C, gene_N, count_N)
    if not is_sorted:
        # Genes stand in the order of columns; those that did not come so are put so.
        column_of_row = np.zeros(int(source.row_of_var.max()) + 1, np.int64)
        known = np.flatnonzero(source.row_of_var >= 0)
        column_of_row[source.row_of_var[known]] = known
        _sort_columns(start_C1, column_of_row, gene_N, count_N)
    return start_C1, gene_N, count_N


Values = tuple[np.ndarray, np.ndarray, np.ndarray]


def _query(source: Source, joinid_C: np.ndarray) -> list[Values]:
    """Unsorted (row, column, value) of the rows `joinid_C`, as views of Arrow buffers where they allow it."""
    first, last = int(joinid_C[0]), int(joinid_C[-1])
    # One range is cheaper than many points, even where QC dropped a cell here and there.
    is_dense = last - first + 1 <= 1.25 * len(joinid_C)
    rows: slice | pa.Array = slice(first, last) if is_dense else pa.array(joinid_C)

    def values(handle: tiledbsoma.Experiment) -> list[Values]:
        tables = handle.ms[MEASUREMENT].X[LAYER].read((rows, slice(None)), result_order="auto").tables()
        return [tuple(t[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data")) for t in tables]  # type: ignore[misc]

    try:
        return read_again(source.place, values)
    except READ_ERRORS as error:
        raise CellsError(
            f"{source.uri}: X/{LAYER} cannot be read at cells {first} to {last}: {first_line(error)}; the store is "
            "damaged, incomplete or out of reach: copy or build it again"
        ) from error


def _not_a_count(source: Source, joinid: int, var_joinid: int, value: float) -> CellsError:
    var = experiment(source.place).ms[MEASUREMENT].var
    gene = var.read((slice(var_joinid, var_joinid),), column_names=["feature_id"]).concat()["feature_id"].to_pylist()
    name = gene[0] if gene else var_joinid
    return CellsError(
        f"{source.uri}: cell {joinid} (soma_joinid), gene {name}: X/{LAYER} holds {float(value):.10g}, "
        "which is not a raw count (a whole number of 1 or more, below 2^31); build the store from raw counts, not from "
        "normalised or log-transformed values"
    )


def read_obs(source: Source, joinid_C: np.ndarray) -> dict[str, np.ndarray]:
    """The source's obs columns of these cells, in their order."""
    if not source.obs_columns or not len(joinid_C):
        return {name: np.zeros(0, object) for name in source.obs_columns}
    names = ["soma_joinid", *source.obs_columns]
    rows = pa.array(np.sort(joinid_C))
    obs = read_again(source.place, lambda handle: handle.obs.read((rows,), column_names=names).concat())
    table = obs.sort_by("soma_joinid")
    found = table["soma_joinid"].to_numpy()
    assert len(found) == len(joinid_C), f"{source.uri}: obs lacks cells that were chosen"
    place_C = np.searchsorted(found, joinid_C)
    return {name: table[name].to_pandas().to_numpy()[place_C] for name in source.obs_columns}


@numba.njit(cache=True, nogil=True)
def _place(joinid_C, joinid):
    """Position of `joinid` in the sorted `joinid_C`, or -1."""
    at = np.searchsorted(joinid_C, joinid)
    return at if at < len(joinid_C) and joinid_C[at] == joinid else -1


@numba.njit(cache=True, nogil=True)
def _count(joinid_C, row_M, column_M, value_M, row_of_var, length_C):
    """Adds the values that each cell keeps to `length_C`; returns the first value that is no count, or -1, and the
    greatest value.
    """
    last, at, greatest = np.int64(-1), np.int64(-1), 0.0
    for m in range(len(row_M)):
        if row_M[m] != last:
            last = row_M[m]
            at = _place(joinid_C, last)
        if at < 0 or value_M[m] == 0:
            continue
        value = value_M[m]
        # Written so that NaN, which compares false, is refused too.
        if not (value >= 1 and value < 2147483648.0 and value == np.floor(value)):
            return m, greatest
        if row_of_var[column_M[m]] >= 0:
            length_C[at] += 1
            greatest = max(greatest, value)
    return -1, greatest


@numba.njit(cache=True, nogil=True)
def _fill(joinid_C, row_M, column_M, value_M, row_of_var, next_C, column_C, gene_N, count_N):
    """Writes the values that `_count` counted to the places of their cells; `column_C` holds the last column of each.

    Returns whether the columns of every cell came in ascending order.
    """
    last, at, is_sorted = np.int64(-1), np.int64(-1), True
    for m in range(len(row_M)):
        if row_M[m] != last:
            last = row_M[m]
            at = _place(joinid_C, last)
        if at < 0 or value_M[m] == 0:
            continue
        column = column_M[m]
        gene = row_of_var[column]
        if gene < 0:
            continue
        is_sorted &= column > column_C[at]
        column_C[at] = column
        n = next_C[at]
        next_C[at] = n + 1
        gene_N[n] = gene
        count_N[n] = value_M[m]
    return is_sorted


@numba.njit(cache=True, nogil=True)
def _sort_columns(start_C1, column_of_row, gene_N, count_N):
    """Sorts the genes of every cell by their column where they are not sorted already."""
    for c in range(len(start_C1) - 1):
        first, stop = start_C1[c], start_C1[c + 1]
        column_L = column_of_row[gene_N[first:stop]]
        for n in range(1, stop - first):
            if column_L[n] < column_L[n - 1]:
                order = np.argsort(column_L)
                gene_N[first:stop] = gene_N[first:stop][order]
                count_N[first:stop] = count_N[first:stop][order]
                break


@numba.njit(cache=True, nogil=True)
def _copy_rows(start_C1, gene_N, count_N, index_K, new_start_K1, new_gene_N, new_count_N):
    """Copies the values of the cells `index_K`."""
    for k in range(len(index_K)):
        first, to = start_C1[index_K[k]], new_start_K1[k]
        for n in range(new_start_K1[k + 1] - to):
            new_gene_N[to + n] = gene_N[first + n]
            new_count_N[to + n] = count_N[first + n]
