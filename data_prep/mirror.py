"""`tftrain-data mirror`: a filtered slice of a Census build, or of any SOMA store, -> a local store.

In: a source and an obs filter. Out: a local store in the same layout: all columns of obs and var, the matching cells
in their order, with their joinid in the source as `origin_joinid`. A mirror that was killed is continued by the
same command, `PORTION_CELLS` cells at a time. raw_sum and nnz are counted anew, also where the source has none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma
from rich.console import Console

from data_prep.store import progress_bar
from data_prep.writer import INPUT_KEY, StoreWriter, recover
from tftrain.cells.source import LAYER, MEASUREMENT
from tftrain.cells.storage import READ_ERRORS, SourceConfig, experiment, first_line, read_again, resolved
from tftrain.errors import CellsError

PORTION_CELLS = 8192
"""Cells read and written at a time: some 12 million values of a whole transcriptome, one fragment."""
ORIGIN = "tftrain_origin"


def mirror(
    source: SourceConfig,
    target: str | Path,
    *,
    obs_filter: str = "is_primary_data == True",
    max_cells: int | None = None,
    show: Callable[[str], None] = print,
    console: Console | None = None,
) -> Path:
    """Copies the cells of `source` that match into the store `target`; leaves a finished mirror of the same as it is.

    max_cells: the first so many that match. Raises CellsError where the source cannot be read, nothing matches, or
    `target` holds something else.
    """
    source, target = resolved(source), Path(target)
    obs = _chosen(source, obs_filter)[:max_cells].reset_index(drop=True)
    joinid_C = obs["soma_joinid"].to_numpy(np.int64)
    var = _var(source)
    origin = {**asdict(source), "obs_filter": obs_filter, "max_cells": max_cells}
    digest = hashlib.blake2b(json.dumps([origin["uri"], obs_filter]).encode(), digest_size=16)
    digest.update(joinid_C.tobytes())
    digest.update("\n".join(var["feature_id"]).encode())
    if _is_finished(target, digest.hexdigest()):
        show(f"{target} is a finished mirror of these cells and stays as it is")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    building = target.with_name(f".{target.name}.building")
    writer = StoreWriter.open(building, len(obs), len(var), digest.hexdigest())
    starts = range(0, len(joinid_C), PORTION_CELLS)
    if writer.n_done:
        show(f"{target}: continues after {min(writer.n_done * PORTION_CELLS, len(obs)):,} of {len(obs):,} cells")
    gene_of_joinid = np.full(int(var["soma_joinid"].max()) + 1, -1, np.int64)
    gene_of_joinid[var["soma_joinid"]] = np.arange(len(var))
    with progress_bar(console or Console(stderr=True)) as progress:
        task = progress.add_task(target.name, total=len(joinid_C))
        for number, first in enumerate(starts):
            part_C = joinid_C[first : first + PORTION_CELLS]
            if number >= writer.n_done:
                row_N, column_N, value_N = _values(source, part_C)
                gene_N = gene_of_joinid[column_N]
                writer.write(first + np.searchsorted(part_C, row_N), gene_N, value_N)
                writer.commit()
            progress.advance(task, len(part_C))
    writer.n_measured_obs_G[:] = var["n_measured_obs"] if "n_measured_obs" in var else len(obs)
    obs.insert(1, "origin_joinid", joinid_C)
    obs["soma_joinid"] = np.arange(len(obs))
    var["soma_joinid"] = np.arange(len(var))
    writer.finish(obs, var, target, {ORIGIN: json.dumps(origin)})
    show(f"{target}: {len(obs):,} cells, {len(var):,} genes of {source.uri}")
    return target


def _chosen(source: SourceConfig, obs_filter: str) -> pd.DataFrame:
    """obs of the cells that match, in their order."""
    n_cells = experiment(source.place).obs.count
    try:
        table = read_again(source.place, lambda handle: handle.obs.read(value_filter=obs_filter or None).concat())
    except (*READ_ERRORS, ValueError, KeyError, SyntaxError) as error:
        columns = ", ".join(experiment(source.place).obs.schema.names)
        raise CellsError(
            f"{source.uri}: obs cannot be read with the filter {obs_filter!r} ({first_line(error)}); obs has {columns}"
        ) from error
    if not len(table):
        raise CellsError(f"{source.uri}: the filter {obs_filter!r} matches none of {n_cells:,} cells")
    return table.sort_by("soma_joinid").to_pandas()


def _var(source: SourceConfig) -> pd.DataFrame:
    try:
        table = read_again(source.place, lambda handle: handle.ms[MEASUREMENT].var.read().concat())
    except KeyError as error:
        raise CellsError(f"{source.uri}: not in the Census layout, {error} is missing") from error
    var = table.sort_by("soma_joinid").to_pandas()
    if "feature_id" not in var:
        raise CellsError(f"{source.uri}: ms/{MEASUREMENT}/var has no feature_id; it has {', '.join(var.columns)}")
    return var


def _values(source: SourceConfig, joinid_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows and columns (joinids of the source) and values of the cells `joinid_C`."""

    def read(handle: tiledbsoma.Experiment) -> pa.Table:
        return handle.ms[MEASUREMENT].X[LAYER].read((pa.array(joinid_C), slice(None))).tables().concat()

    try:
        table = read_again(source.place, read)
    except READ_ERRORS as error:
        raise CellsError(f"{source.uri}: X/{LAYER} cannot be read: {first_line(error)}") from error
    value_N = table["soma_data"].to_numpy()
    with np.errstate(invalid="ignore"):
        is_count_N = (value_N >= 0) & (value_N == np.floor(value_N)) & (value_N < 2**31)
    if not is_count_N.all():
        n = int(np.argmin(is_count_N))
        raise CellsError(
            f"{source.uri}: cell {table['soma_dim_0'][n]} (soma_joinid), var {table['soma_dim_1'][n]}: X/{LAYER} holds "
            f"{value_N[n]}, which is not a raw count"
        )
    table = table.filter(pa.array(value_N > 0))
    return tuple(table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))  # type: ignore[return-value]


def _is_finished(target: Path, digest: str) -> bool:
    recover(target)
    if not target.exists():
        return False
    try:
        with tiledbsoma.Experiment.open(str(target)) as found:
            if found.metadata.get(INPUT_KEY) == digest:
                return True
    except (tiledbsoma.SOMAError, tiledbsoma.DoesNotExistError, TypeError):
        pass  # something else: told below
    raise CellsError(f"{target} is there already and is no mirror of these cells; remove it or give another place")
