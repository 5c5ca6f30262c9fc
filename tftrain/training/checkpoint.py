"""Checkpoints: folders that explain themselves, `<out>/checkpoints/step_00000020/`.

    recipe.yaml        the resolved recipe
    manifest.json      step, cursor, hashes of genes and protein table, the data plan, ranks, ZeRO stage, versions, git
    commit model.safetensors  every trained parameter, whole, fp32 (never the protein table) ds/                each
    rank's shards of weights and optimiser state COMPLETE           written last, after every rank has finished: names
    and bytes of all files above

A folder without COMPLETE, or whose files are not those it lists, does not exist for resume. The marker follows a
barrier of all ranks, so the newest marked folder is the truth, with and without Ray; Ray Train's own registry is not
used.
"""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tftrain.errors import CheckpointError, RecipeError
from tftrain.training.engine import Engine
from tftrain.training.folder import Folder

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MARKER, MANIFEST, RECIPE, WEIGHTS, SHARDS = "COMPLETE", "manifest.json", "recipe.yaml", "model.safetensors", "ds"
CHECKED = {
    "genes_hash": "the ordered gene vocabulary",
    "table_hash": "the protein table",
    "plan_fingerprint": "the cells and their order",
}
"""Keys of a manifest that decide whether a checkpoint belongs to a run, and what each stands for."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    save_every_steps: int | None = 500
    """Steps between checkpoints; there is always one at the end. None: only at the end."""
    keep_last: int | None = 3
    """Newest checkpoints to keep; older ones are deleted. None keeps all."""

    def __post_init__(self) -> None:
        for name in ("save_every_steps", "keep_last"):
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


class CheckpointStore:
    """The checkpoints of one run."""

    def __init__(self, out: str, config: CheckpointConfig, *, recipe_text: str, identity: Mapping[str, Any]):
        """`identity` enters every manifest: the keys of CHECKED, `plan` (its description), and whatever else explains a
        run.
        """
        self.folder = Folder.at(out) / "checkpoints"
        self.config = config
        self.recipe_text = recipe_text
        self.identity = dict(identity)

    def latest(self) -> Folder | None:
        """The newest complete checkpoint. Ask on one rank and tell the others (`Group.agree`)."""
        complete = self._complete()
        return complete[-1] if complete else None

    def save(self, engine: Engine, progress: Progress, facts: Mapping[str, Any] | None = None) -> Folder:
        """Collective. Writes a checkpoint by all ranks, marks it complete, deletes those beyond `keep_last`.

        `facts` (JSON values) join the manifest. Raises CheckpointError on all ranks where any could not write: older
        checkpoints are then as they were, and the new folder has no marker.
        """
        group = engine.group
        folder = self.folder / f"step_{progress.step:08d}"
        if group.rank == 0:
            folder.remove(MARKER)
            folder.remove()
            folder.make()
        group.barrier()
        weights = engine.weights()
        problem = None
        with _written_to(folder) as local:
            try:
                engine.save_shards(local / SHARDS)
                if group.rank == 0:
                    save_file(weights, local / WEIGHTS)
                    (local / RECIPE).write_text(self.recipe_text)
                    manifest = self._manifest(engine, progress, facts or {})
                    (local / MANIFEST).write_text(json.dumps(manifest, indent=1, default=str) + "\n")
                if folder.local is None:
                    folder.upload(local)
            except (OSError, RuntimeError) as error:
                problem = f"rank {group.rank}: {type(error).__name__}: {error}"
        problems = [text for text in group.gather(problem) if text]
        if problems:
            raise CheckpointError(
                f"{folder.uri} could not be saved ({problems[0]}); older checkpoints are intact: make room or "
                "repair the storage, then run the same command again"
            )
        if group.rank == 0:
            folder.write_text(MARKER, json.dumps(folder.sizes(), indent=1) + "\n")
            self._prune()
        group.barrier()
        return folder

    def _manifest(self, engine: Engine, progress: Progress, facts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": progress.step,
            "cursor": progress.cursor,
            "world_size": engine.group.world_size,
            "zero_stage": engine.zero_stage,
            "precision": engine.precision,
            **self.identity,
            **facts,
            "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
            "git_commit": _git_commit(),
        }

    def _complete(self) -> list[Folder]:
        names = [name for name in self.folder.names() if name.startswith("step_")]
        return [self.folder / name for name in names if not _flaws(self.folder / name)]

    def _prune(self) -> None:
        """Deletes complete checkpoints beyond `keep_last`, and unfinished ones older than the newest complete one."""
        complete = self._complete()
        kept = complete if self.config.keep_last is None else complete[-self.config.keep_last :]
        for name in self.folder.names():
            folder = self.folder / name
            if name.startswith("step_") and folder not in kept and folder.path < kept[-1].path:
                # Without its marker first: a deletion that is cut short must not leave a folder that looks complete.
                folder.remove(MARKER)
                folder.remove()


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


def load_weights(folder: Folder | str) -> dict[str, Tensor]:
    """Every trained parameter by name, fp32, on the CPU; needs no DeepSpeed. Raises CheckpointError."""
    folder = folder if isinstance(folder, Folder) else Folder.at(folder)
    require_complete(folder)
    if folder.local is not None:
        return load_file(folder.local / WEIGHTS)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / WEIGHTS
        with folder.filesystem.open_input_stream(f"{folder.path}/{WEIGHTS}") as file:
            path.write_bytes(file.read())
        return load_file(path)


def apply_weights(module: nn.Module, weights: Mapping[str, Tensor], origin: str = "the checkpoint") -> None:
    """Copies `weights` into the module; frozen parameters may be absent. Raises CheckpointError for any other
    difference.
    """
    own = dict(module.named_parameters())
    problems = [f"{name} is absent" for name, p in own.items() if p.requires_grad and name not in weights]
    problems += [f"{name} is unknown to the model" for name in weights if name not in own]
    problems += [
        f"{name} has shape {tuple(weights[name].shape)}, the model's has {tuple(p.shape)}"
        for name, p in own.items()
        if name in weights and weights[name].shape != p.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"the weights of {origin} are not this model's: {'; '.join(problems[:3])}{more}; "
            "use the recipe stored beside them"
        )
    module.load_state_dict(dict(weights), strict=False)


def check_manifest(manifest: Mapping[str, Any], expected: Mapping[str, Any], origin: str = "the checkpoint") -> None:
    """Raises CheckpointError with what differs, unless the checkpoint belongs to the run that `expected` describes.

    Compares the keys of CHECKED that `expected` has; where the plans differ, the message lists the leaves of `plan`
    that do.
    """
    for key, meaning in CHECKED.items():
        if key not in expected or manifest.get(key) == expected[key]:
            continue
        lines = [
            f"{origin} does not belong to this run: {meaning} changed ({key} {manifest.get(key)} -> {expected[key]})"
        ]
        if key == "plan_fingerprint":
            lines += [f"  {line}" for line in _differences(manifest.get("plan"), expected.get("plan"))]
        lines.append("restore what the run began with, or choose another `out` to begin a new run")
        raise CheckpointError("\n".join(lines))


How = Literal["shards", "universal", "weights"]


def how_to_resume(manifest: Mapping[str, Any], *, zero_stage: int | None, world_size: int, precision: str) -> How:
    """What of a checkpoint can be restored by `world_size` ranks at `zero_stage`.

    `shards`: all of it as it is. `universal`: all of it, after conversion to DeepSpeed's universal form (another
    number of ranks). `weights`: weights, step and cursor, but AdamW's moments begin anew (another ZeRO stage or
    precision).
    """
    if manifest["zero_stage"] != zero_stage or manifest["precision"] != precision:
        return "weights"
    # Stage 0 saves one replica, which serves any number of ranks.
    return "shards" if zero_stage in (None, 0) or manifest["world_size"] == world_size else "universal"


def restore(engine: Engine, folder: Folder, how: How) -> None:
    """Collective. Restores the engine from a finished checkpoint as `how_to_resume` says.

    For `weights` there is nothing left to do: `apply_weights` must have filled the module before the engine was built.
    """
    if how == "weights":
        return
    with _read_from(folder) as local:
        if how == "shards":
            engine.load_shards(local / SHARDS)
        else:
            engine.load_universal(local / SHARDS, is_shared=folder.local is not None)
    engine.group.barrier()


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


@contextlib.contextmanager
def _written_to(folder: Folder) -> Iterator[Path]:
    """A local folder to write into: the folder itself, or a temporary one where it lies elsewhere."""
    if folder.local is not None:
        yield folder.local
    else:
        with tempfile.TemporaryDirectory(prefix="tftrain-") as temporary:
            yield Path(temporary)


@contextlib.contextmanager
def _read_from(folder: Folder) -> Iterator[Path]:
    """A local folder with the checkpoint's files."""
    if folder.local is not None:
        yield folder.local
    else:
        with tempfile.TemporaryDirectory(prefix="tftrain-") as temporary:
            folder.download(Path(temporary))
            yield Path(temporary)


def _differences(before: Any, after: Any, path: str = "") -> Iterator[str]:
    """`key: old -> new` for every leaf that differs."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**before, **after}:
            yield from _differences(before.get(key), after.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(before, list | tuple) and isinstance(after, list | tuple) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after)):
            yield from _differences(*pair, f"{path}.{index}" if path else str(index))
    elif before != after:
        yield f"{path}: {before} -> {after}"


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tftrain", "torch", "deepspeed", "ray", "tiledbsoma", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def _git_commit() -> str | None:
    """The commit of the source tree that runs, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
