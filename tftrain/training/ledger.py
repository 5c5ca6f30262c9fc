"""Which cells were trained: source and soma_joinid of every one, by step and rank, in parquet under `<out>/ledger`.

In: this rank's Cells of every step that is done. Out: parts `steps_00000101_00000150.rank_1_of_2.parquet` with the
columns step, rank, source (name) and soma_joinid. A part appears whole or not at all, and all steps of a checkpoint are
written before the checkpoint is complete. A run that continues drops what lies after its checkpoint, so that a step
done again replaces its earlier record: read together, the parts hold every step once, whatever was killed.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tftrain.cells.contract import Cells
from tftrain.errors import CheckpointError
from tftrain.training.folder import Folder
from tftrain.training.group import Group

FOLDER = "ledger"
_NAME = re.compile(r"steps_(\d+)_(\d+)\.rank_(\d+)_of_(\d+)\.parquet")


@dataclass(frozen=True)
class Part:
    """One file of a ledger; steps count from 1."""

    name: str
    first_step: int
    last_step: int
    """No row lies beyond; a part that was cut at a resume may end before."""


class Ledger:
    """The record of one rank. Rows wait in memory (10 bytes a cell) until `flush`."""

    CELLS_PER_PART = 2_000_000
    """A part is written when so many cells wait, though no checkpoint is due."""

    def __init__(self, out: str, group: Group, source_names: Sequence[str], *, resume_step: int = 0) -> None:
        """Collective. Rank 0 drops every record after `resume_step`, before any rank writes."""
        self._folder = Folder.at(out) / FOLDER
        self._group = group
        self._source_names = list(source_names)
        self._steps: list[int] = []
        self._source: list[np.ndarray] = []
        self._joinid: list[np.ndarray] = []
        self._n_cells = 0
        if group.rank == 0:
            self._folder.make()
            _drop_after(self._folder, resume_step)
        group.barrier()

    def record(self, step: int, cells: Cells) -> None:
        """Step number `step` (from 1) is done and trained on `cells`, those without any vocabulary gene included."""
        self._steps.append(step)
        self._source.append(cells.source_C.astype(np.int16))
        self._joinid.append(cells.joinid_C.astype(np.int64))
        self._n_cells += len(cells)
        if self._n_cells >= self.CELLS_PER_PART:
            self.flush()

    def flush(self) -> None:
        """Writes what waits as one part. Raises CheckpointError where the storage refuses it."""
        if not self._steps:
            return
        n_K = [len(joinid_C) for joinid_C in self._joinid]
        source = pa.DictionaryArray.from_arrays(pa.array(np.concatenate(self._source)), self._source_names)
        table = pa.table(
            {
                "step": pa.array(np.repeat(np.array(self._steps, np.int64), n_K)),
                "rank": pa.array(np.full(sum(n_K), self._group.rank, np.int16)),
                "source": source,
                "soma_joinid": pa.array(np.concatenate(self._joinid)),
            }
        )
        name = f"steps_{self._steps[0]:08d}_{self._steps[-1]:08d}.rank_{self._group.rank}_of_{self._group.world_size}"
        try:
            _write(self._folder, f"{name}.parquet", table)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder.uri}: the ledger cannot be written ({error}); make room or repair the storage, "
                "then run the same command again"
            ) from error
        self._steps, self._source, self._joinid, self._n_cells = [], [], [], 0


def parts(out: Folder | str) -> list[Part]:
    """The parts of a run's ledger, by step; empty where it has none."""
    folder = (out if isinstance(out, Folder) else Folder.at(out)) / FOLDER
    found = [match for name in folder.names() if (match := _NAME.fullmatch(name))]
    return sorted((Part(m[0], int(m[1]), int(m[2])) for m in found), key=lambda part: (part.first_step, part.name))


def read(out: Folder | str, first_step: int = 1, last_step: int | None = None) -> Iterator[pa.Table]:
    """Tables (step, rank, source, soma_joinid) of steps `first_step` to `last_step`, a part at a time."""
    run = out if isinstance(out, Folder) else Folder.at(out)
    for part in parts(run):
        if part.last_step >= first_step and (last_step is None or part.first_step <= last_step):
            table = _read(run / FOLDER, part.name)
            is_wanted = pc.greater_equal(table["step"], first_step)
            if last_step is not None:
                is_wanted = pc.and_(is_wanted, pc.less_equal(table["step"], last_step))
            yield table.filter(is_wanted)


def _drop_after(folder: Folder, step: int) -> None:
    for name in folder.names():
        match = _NAME.fullmatch(name)
        if match is None or int(match[1]) > step:
            # What is no part is a part that was being written when its process died.
            folder.remove(name)
        elif int(match[2]) > step:
            table = _read(folder, name)
            _write(folder, name, table.filter(pc.less_equal(table["step"], step)))


def _read(folder: Folder, name: str) -> pa.Table:
    try:
        with folder.filesystem.open_input_file(f"{folder.path}/{name}") as file:
            return pq.read_table(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise CheckpointError(f"{folder.uri}/{name} cannot be read ({error}): the ledger is damaged") from error


def _write(folder: Folder, name: str, table: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd", use_dictionary=["rank", "source"])
    folder.write_bytes(name, buffer.getvalue())
