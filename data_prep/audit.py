"""`tftrain-data audit RUN`: does the ledger of a run hold every planned cell exactly once an epoch?

In: a run folder (recipe, newest checkpoint, ledger) and the stores that its recipe names. The plan is made anew from
the stores and must be the checkpoint's; what each epoch should have seen follows from it, and is compared with what the
ledger says was trained, cell by cell. Out: an Audit: what was proved, or which cells are missing, repeated, held out or
none of the plan's.

A source of weight w is seen w times an epoch (a broken w: some cells once more than others); "exactly once" stands for
exactly as often as the plan has it. Shapes: J soma_joinids of a source, C cells of a part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from tftrain.assemble import RECIPE_FILE, open_data
from tftrain.cells.plan import Plan
from tftrain.cells.source import Source
from tftrain.errors import CheckpointError, RecipeError
from tftrain.recipe import TrainRecipe, parse
from tftrain.training import ledger
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, read_manifest
from tftrain.training.folder import Folder
from tftrain.training.resume import check_manifest

NAMED = 10
"""Cells of a kind that are named; the rest is counted."""


@dataclass
class Audit:
    """What was found."""

    run: str
    n_steps: int
    """Steps of the newest checkpoint: what lies beyond was never final."""
    n_cells: int
    """Cells of those steps in the ledger."""
    epochs: list[dict[str, int]] = field(default_factory=list)
    """For each epoch begun: number, cells planned so far, cells found, cells of the whole epoch."""
    faults: list[str] = field(default_factory=list)
    """What is wrong, a line each; empty: proved."""

    @property
    def is_proved(self) -> bool:
        """Whether every planned cell is there exactly as often as planned, and no other."""
        return not self.faults

    def lines(self) -> list[str]:
        """For the terminal: epochs, then faults or the verdict."""
        lines = [f"{self.run}: {self.n_steps:,} steps, {self.n_cells:,} cells on record"]
        for epoch in self.epochs:
            part = "" if epoch["planned"] == epoch["whole"] else f" so far, of {epoch['whole']:,}"
            lines.append(f"epoch {epoch['epoch']}: {epoch['found']:,} cells found, {epoch['planned']:,} planned{part}")
        if self.is_proved:
            return [*lines, "proved: every planned cell trained exactly as often as planned, no other, none held out"]
        return [*lines, *(f"FAULT: {fault}" for fault in self.faults)]


def audit(run: str) -> Audit:
    """Compares the ledger of the run folder `run` with its plan.

    Raises RecipeError where there is no run or no ledger, CheckpointError where it has no finished checkpoint or the
    stores are not those that it was trained on (with the difference), CellsError where they cannot be opened.
    """
    folder = Folder.at(run)
    if not folder.exists(RECIPE_FILE):
        raise RecipeError(f"{run} has no {RECIPE_FILE}: give the `out` folder of a run")
    recipe = parse(folder.read_text(RECIPE_FILE), origin=f"{run}/{RECIPE_FILE}")
    if not isinstance(recipe, TrainRecipe) or not ledger.parts(folder):
        raise RecipeError(f"{run} has no ledger; set data.ledger=true before a run begins")
    latest = CheckpointStore(run, CheckpointConfig(), recipe_text="", identity={}).latest()
    if latest is None:
        raise CheckpointError(f"{run} has no finished checkpoint yet: no step of it is final")
    manifest = read_manifest(latest)
    data = open_data(recipe)
    now = {"plan_fingerprint": data.plan.fingerprint, "plan": data.plan.describe()}
    check_manifest(manifest, now, latest.uri)
    found = Audit(run, manifest["step"], 0)
    _check_steps(folder, data.plan, manifest["cursor"], found)
    for epoch, first_step, last_step, cursor in _epochs(data.plan, manifest["cursor"]):
        _check_epoch(folder, data.plan, data.sources, epoch, (first_step, last_step), cursor, found)
    return found


def _epochs(plan: Plan, cursor: int) -> Iterator[tuple[int, int, int, int]]:
    """(epoch, its first and last step, cursor after the last) of every epoch begun before `cursor`."""
    epoch = first_step = step = 0
    after = 0
    for step, planned in enumerate(plan.steps(0, cursor), 1):
        if planned.epoch != epoch:
            yield epoch, first_step or 1, step - 1, after
            epoch, first_step = planned.epoch, step
        after = planned.cursor
    if step:
        yield epoch, first_step or 1, step, after


def _check_steps(run: Folder, plan: Plan, cursor: int, found: Audit) -> None:
    """Every step is on record with as many cells as the plan gives it."""
    planned = np.array([0, *(step.n_cells for step in plan.steps(0, cursor))], np.int64)
    if len(planned) - 1 != found.n_steps:
        found.faults.append(f"the checkpoint is at step {found.n_steps:,}, its cursor lies after {len(planned) - 1:,}")
    got = np.zeros(len(planned), np.int64)
    for table in ledger.read(run, 1, len(planned) - 1):
        got += np.bincount(table["step"].to_numpy(), minlength=len(planned))
    found.n_cells = int(got.sum())
    if len(wrong := np.flatnonzero(got != planned)):
        named = ", ".join(f"step {step:,}: {got[step]:,} of {planned[step]:,} cells" for step in wrong[:NAMED])
        found.faults.append(f"{len(wrong):,} of {found.n_steps:,} steps have another number of cells ({named})")


def _check_epoch(
    run: Folder,
    plan: Plan,
    sources: Sequence[Source],
    epoch: int,
    steps: tuple[int, int],
    cursor: int,
    found: Audit,
) -> None:
    n_J = [source.n_joinids for source in sources]
    expected = [np.zeros(n, np.uint16) for n in n_J]
    got = [np.zeros(n, np.uint16) for n in n_J]
    number = {source.name: source.index for source in sources}
    for table in ledger.read(run, *steps):
        for name in pc.unique(table["source"]).to_pylist():
            joinid_C = table.filter(pc.equal(table["source"], name))["soma_joinid"].to_numpy()
            index = number.get(name)
            if index is None or joinid_C.max() >= n_J[index] or joinid_C.min() < 0:
                found.faults.append(f"epoch {epoch}: cells of {name} that the store does not have")
            else:
                got[index] += np.bincount(joinid_C, minlength=n_J[index]).astype(np.uint16)
    for index, position_C in _planned(plan, epoch, cursor):
        np.add.at(expected[index], sources[index].train_joinid_N[position_C], 1)
    total_expected, total_got = (sum(int(a.sum()) for a in arrays) for arrays in (expected, got))
    found.epochs.append(
        {"epoch": epoch, "planned": total_expected, "found": total_got, "whole": plan.epoch_cells(epoch)}
    )
    for source, want_J, have_J in zip(sources, expected, got):
        heldout = source.heldout_joinid_M
        is_train_J = np.zeros(len(want_J), bool)
        is_train_J[source.train_joinid_N] = True
        is_held_J = np.zeros(len(want_J), bool)
        is_held_J[heldout] = True
        kinds = {
            "held out but trained on": is_held_J & (have_J > 0),
            "not chosen but trained on": ~is_train_J & ~is_held_J & (have_J > 0),
            "missing": have_J < want_J,
            "trained on more often than planned": is_train_J & (have_J > want_J),
        }
        for kind, is_J in kinds.items():
            if len(which := np.flatnonzero(is_J)):
                named = ", ".join(str(joinid) for joinid in which[:NAMED])
                more = ", ..." if len(which) > NAMED else ""
                found.faults.append(
                    f"epoch {epoch}, {source.name}: {len(which):,} cells {kind} (soma_joinid {named}{more})"
                )


def _planned(plan: Plan, epoch: int, cursor: int) -> Iterator[tuple[int, np.ndarray]]:
    """(source, positions of its training cells) of an epoch as far as `cursor`, each as often as it is planned."""
    for window in plan.windows(plan.epoch_start(epoch), cursor):
        source_C, position_C = window.cells()
        for source in np.unique(source_C):
            yield int(source), position_C[source_C == source]
