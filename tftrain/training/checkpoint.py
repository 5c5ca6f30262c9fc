"""Checkpoints: folders that explain themselves, `<out>/checkpoints/step_00000020/`.

    recipe.yaml        the resolved recipe
    manifest.json      step, cursor, hashes of genes and protein table, the data plan, ranks, ZeRO stage, versions, git
                       commit, held-out losses of this step
    model.safetensors  every trained parameter, whole, fp32 (never the protein table)
    ema.safetensors    their moving average, where the recipe asks for one
    adapter/, head/    what fine-tuning adds, in formats that others read (training/adapter.py)
    ds/                each rank's shards of weights and optimiser state
    COMPLETE           written last, after every rank has finished: names and bytes of all files above

A folder without COMPLETE, or whose files are not those it lists, does not exist for resume. The marker follows a
barrier of all ranks, so the newest marked folder is the truth, with and without Ray; Ray Train's own registry is not
used. A folder on a local disk or a mounted share is written in place. Elsewhere every rank writes to its own disk first
and uploads in the background: training goes on, and the marker follows when all have arrived (`settle`).
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tftrain.errors import CheckpointError, RecipeError
from tftrain.training.early import rank_of
from tftrain.training.folder import Folder
from tftrain.training.group import Group
from tftrain.training.plain import Engine
from tftrain.training.provenance import git_commit, versions
from tftrain.training.upload import Upload

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER, MANIFEST, RECIPE, SHARDS = "COMPLETE", "manifest.json", "recipe.yaml", "ds"
WEIGHTS, AVERAGED = "model.safetensors", "ema.safetensors"
CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
IN_USE = "IN_USE"
"""A checkpoint with this file is not deleted: somebody reads it."""
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What a full or broken disk raises, through Python, torch and safetensors."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every_steps: int | None = 500
    """Steps between checkpoints; there is always one at the end. None: only at the end."""
    keep_last: int | None = 3
    """Newest checkpoints to keep; older ones are deleted. None keeps all."""
    keep_best: int | None = None
    """Checkpoints of the lowest `val/loss` to keep beside the newest; each save then takes a held-out loss. None: none.
    """

    def __post_init__(self) -> None:
        for name in ("save_every_steps", "keep_last", "keep_best"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"checkpoint.{name} is {value}; it must be at least 1, or null")


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Optimiser steps done."""
    cursor: int = 0
    """Cells of the global order consumed."""
    n_skipped: int = 0
    """Steps among them that were left out for a loss or gradient that was not finite."""

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> Progress:
        """That of a checkpoint; the beginning for an empty manifest."""
        return Progress(manifest.get("step", 0), manifest.get("cursor", 0), manifest.get("skipped_steps", 0))


class Companion(Protocol):
    """Writes files of its own into every checkpoint."""

    def write(
        self, folder: Path, engine: Engine, weights: Mapping[str, Tensor], progress: Progress, *, is_averaged: bool
    ) -> str | None:
        """Collective. `weights` (rank 0) are those to be used later, averaged ones or the engine's. Returns what went
        wrong on this rank."""
        ...


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(
        self,
        out: str,
        config: CheckpointConfig,
        *,
        recipe_text: str,
        identity: Mapping[str, Any],
        companion: Companion | None = None,
        metric: str = "val/loss",
    ):
        """`identity` enters every manifest: the keys of `resume.CHECKED`, `plan` (its description), and whatever
        else explains a run. `metric` decides which checkpoint is best.
        """
        self.folder = Folder.at(out) / CHECKPOINTS
        self.config = config
        self.recipe_text = recipe_text
        self.identity = dict(identity)
        self.companion = companion
        self.metric = metric
        self._written: Folder | None = None
        """On all ranks: the checkpoint that is written but has no marker yet."""
        self._upload: Upload | None = None

    def folder_of(self, step: int) -> Folder:
        """Where the checkpoint of a step is or would be."""
        return self.folder / f"step_{step:08d}"

    def latest(self) -> Folder | None:
        """The newest complete checkpoint. Ask on one rank and tell the others (`Group.agree`)."""
        complete = self._complete()
        return complete[-1] if complete else None

    def best(self) -> Folder | None:
        """The complete checkpoint with the best metric, the newest where none has it."""
        complete = self._complete()
        ranks = [(rank_of(self.metric, _heldout(folder, self.metric)), -index) for index, folder in enumerate(complete)]
        return complete[-min(ranks)[1]] if complete else None

    def save(
        self,
        engine: Engine,
        progress: Progress,
        facts: Mapping[str, Any] | None = None,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        """Collective. `begin`, and the wait until the checkpoint is complete."""
        folder = self.begin(engine, progress, facts, averaged)
        self.settle(engine.group, is_waiting=True)
        return folder

    def begin(
        self,
        engine: Engine,
        progress: Progress,
        facts: Mapping[str, Any] | None = None,
        averaged: Mapping[str, Tensor] | None = None,
    ) -> Folder:
        """Collective. Writes a checkpoint by all ranks. It counts, and older ones are pruned, once `settle` has
        marked it.

        `facts` (JSON values) join the manifest; `averaged` (rank 0) are the averaged weights, if any. Raises
        CheckpointError on all ranks where any could not write: older checkpoints are then as they were, and the new
        folder has no marker.
        """
        group = engine.group
        assert self._written is None, "settle the checkpoint before first"
        folder = self.folder_of(progress.step)
        self._agree(group, folder, self._renew(folder) if group.rank == 0 else None)
        weights = engine.weights()
        local = folder.local or Path(tempfile.mkdtemp(prefix="tftrain-"))
        problem = None
        try:
            engine.save_shards(local / SHARDS)
            if group.rank == 0:
                save_file(weights, local / WEIGHTS)
                if averaged:
                    save_file(dict(averaged), local / AVERAGED)
                (local / RECIPE).write_text(self.recipe_text)
                manifest = self._manifest(engine, progress, facts or {})
                (local / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str) + "\n")
        except WRITE_ERRORS as error:
            problem = f"rank {group.rank}: {type(error).__name__}: {error}"
        scratch = None if folder.local else local
        self._agree(group, folder, problem, scratch)
        if self.companion:
            used = weights if averaged is None else averaged
            problem = self.companion.write(local, engine, used, progress, is_averaged=averaged is not None)
            self._agree(group, folder, problem, scratch)
        self._written = folder
        self._upload = None if folder.local else Upload(local, folder)
        return folder

    def settle(self, group: Group, *, is_waiting: bool) -> Folder | None:
        """Collective. Marks what `begin` wrote once all ranks' files are in their place, and returns its folder then;
        None where there is nothing to mark yet. `is_waiting` waits for uploads. Raises CheckpointError as `begin` does.
        """
        folder, upload = self._written, self._upload
        if folder is None:
            return None
        if upload is not None:
            if is_waiting:
                upload.wait()
            if sum(group.total([float(upload.is_running)])):
                return None
            self._written = self._upload = None
            self._agree(group, folder, upload.problem and f"rank {group.rank}: {upload.problem}")
        self._written = None
        problem = None
        if group.rank == 0:
            try:
                folder.write_text(MARKER, json.dumps(folder.sizes(), indent=1) + "\n")
                self._prune()
            except OSError as error:
                problem = f"rank 0: {type(error).__name__}: {error}"
        self._agree(group, folder, problem)
        return folder

    @staticmethod
    def _renew(folder: Folder) -> str | None:
        """Deletes what an earlier attempt left and makes the folder; returns what went wrong."""
        try:
            folder.remove(MARKER)
            folder.remove()
            folder.make()
        except OSError as error:
            return f"rank 0: {type(error).__name__}: {error}"
        return None

    @staticmethod
    def _agree(group: Group, folder: Folder, problem: str | None, scratch: Path | None = None) -> None:
        """Collective. Raises the same CheckpointError on all ranks where any has a problem, and gives the room back."""
        problems = [text for text in group.gather(problem) if text]
        if not problems:
            return
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if group.rank == 0:
            with contextlib.suppress(OSError):
                folder.remove(MARKER)
                folder.remove()
        raise CheckpointError(
            f"{folder.uri} could not be saved ({problems[0]}); older checkpoints are intact: make room or "
            "repair the storage, then run the same command again"
        )

    def _manifest(self, engine: Engine, progress: Progress, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "cursor": progress.cursor,
            "skipped_steps": progress.n_skipped,
            "world_size": engine.group.world_size,
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            **self.identity,
            **facts,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": versions(),
            "git_commit": git_commit(),
        }

    def _complete(self) -> list[Folder]:
        names = [name for name in self.folder.names() if name.startswith("step_")]
        return [self.folder / name for name in names if not _flaws(self.folder / name)]

    def _prune(self) -> None:
        """Deletes complete checkpoints that are neither among the newest nor among the best, and unfinished ones older
        than the newest complete one."""
        complete = self._complete()
        kept = complete if self.config.keep_last is None else complete[-self.config.keep_last :]
        if self.config.keep_best and len(kept) < len(complete):
            values = [(_heldout(folder, self.metric), index) for index, folder in enumerate(complete)]
            ranks = [(rank_of(self.metric, value), index) for value, index in values if value is not None]
            best = sorted(ranks)[: self.config.keep_best]
            kept = [*(complete[index] for _, index in best), *kept]
        for name in self.folder.names():
            folder = self.folder / name
            is_free = folder not in kept and not folder.exists(IN_USE)
            if name.startswith("step_") and is_free and folder.path < kept[-1].path:
                # Without its marker first: a deletion that is cut short must not leave a folder that looks complete.
                folder.remove(MARKER)
                folder.remove()


def _heldout(folder: Folder, metric: str) -> float | None:
    """A held-out metric of a complete checkpoint's own step."""
    return json.loads(folder.read_text(MANIFEST)).get("metrics", {}).get(metric)


def require_complete(folder: Folder) -> None:
    """Raises CheckpointError unless the folder is a finished checkpoint."""
    flaws = _flaws(folder)
    if flaws:
        raise CheckpointError(f"{folder.uri} is not a usable checkpoint: {flaws}; take another folder of the same run")


def read_manifest(folder: Folder) -> dict[str, Any]:
    """The manifest of a finished checkpoint.

    Raises CheckpointError, also for a format newer than this version reads.
    """
    require_complete(folder)
    manifest = json.loads(folder.read_text(MANIFEST))
    if manifest.get("format_version") != FORMAT_VERSION:
        writer = manifest.get("versions", {}).get("tftrain", "of unknown version")
        raise CheckpointError(
            f"{folder.uri} has checkpoint format {manifest.get('format_version')!r} and this tftrain reads "
            f"{FORMAT_VERSION}; it was written by tftrain {writer}: use that one"
        )
    return manifest


def read_recipe(folder: Folder) -> str:
    """The resolved recipe (YAML) of a finished checkpoint."""
    require_complete(folder)
    return folder.read_text(RECIPE)


def load_weights(folder: Folder | str, *, is_averaged: bool = False) -> dict[str, Tensor]:
    """Every trained parameter by name, fp32, on the CPU; needs no DeepSpeed. Raises CheckpointError.

    `is_averaged` asks for their moving average, where the checkpoint has one.
    """
    folder = folder if isinstance(folder, Folder) else Folder.at(folder)
    require_complete(folder)
    name = AVERAGED if is_averaged and folder.exists(AVERAGED) else WEIGHTS
    if folder.local is not None:
        return load_file(folder.local / name)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        with folder.filesystem.open_input_stream(f"{folder.path}/{name}") as file:
            path.write_bytes(file.read())
        return load_file(path)


def load_average(folder: Folder) -> dict[str, Tensor]:
    """The averaged weights of a finished checkpoint; empty where it has none."""
    require_complete(folder)
    return load_weights(folder, is_averaged=True) if folder.exists(AVERAGED) else {}


def _flaws(folder: Folder) -> str:
    """What keeps the folder from being a finished checkpoint; empty for a finished one."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.exists(MARKER):
        return f"it has no {MARKER} marker, so it was never finished"
    try:
        listed = json.loads(folder.read_text(MARKER))
    except ValueError:
        return f"its {MARKER} marker is cut short"
    present = folder.sizes()
    for name, size in listed.items():
        if present.get(name) != size:
            found = f"has {present[name]} bytes" if name in present else "is missing"
            return f"{name} {found}, {size} bytes were saved"
    return ""
