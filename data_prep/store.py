"""How a SOMA store in the CELLxGENE Census layout is written: tiles, filters, dataframes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import tiledbsoma
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


def tiling(n_cells: int, n_genes: int) -> dict:
    """The Census's own: 2048 x 2048 tiles of up to 65,536 values, zstd; a small store has one tile a side."""
    zstd = {"_type": "ZstdFilter", "level": 9}
    dims = {
        "soma_dim_0": {"tile": min(2048, n_cells), "filters": [zstd]},
        "soma_dim_1": {"tile": min(2048, n_genes), "filters": ["ByteShuffleFilter", zstd]},
    }
    create = {
        "capacity": 2**16,
        "dims": dims,
        "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", zstd]}},
        "cell_order": "row-major",
        "tile_order": "row-major",
        "allows_duplicates": True,
    }
    return {"tiledb": {"create": create}}


def write_frame(
    parent: Any,
    name: str,
    frame: pd.DataFrame,
    as_values: Sequence[str] = ("obs_id",),
) -> None:
    """A dataframe indexed by soma_joinid; strings become enumerations, as in the Census, but for `as_values`."""
    arrays = {}
    for column in frame.columns:
        array = pa.array(frame[column], from_pandas=True)
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            array = array.cast(pa.large_string())
            array = array if column in as_values else array.dictionary_encode()
        arrays[column] = array
    table = pa.table(arrays)
    target = parent.add_new_dataframe(
        name, schema=table.schema, index_column_names=["soma_joinid"], domain=[[0, max(len(frame) - 1, 0)]]
    )
    target.close()
    # Written through the handle that created it, an enumeration loses its values (tiledbsoma 2.3).
    with tiledbsoma.DataFrame.open(target.uri, "w") as opened:
        opened.write(table)


class _Rate(ProgressColumn):
    """Cells a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} cells/s" if task.speed else "", style="dim")


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True)
