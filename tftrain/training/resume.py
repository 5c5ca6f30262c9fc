"""What a run takes over from a checkpoint: whether it belongs to the run at all, and how much of it fits its ranks.

In: the manifest of a finished checkpoint, the run's own facts. Out: a refusal that says what differs; or the engine
with the checkpoint's weights and, where ranks, stage and precision allow, its optimiser.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tftrain.errors import CheckpointError
from tftrain.training.checkpoint import SHARDS
from tftrain.training.folder import Folder
from tftrain.training.plain import Engine

CHECKED = {
    "genes_hash": "the ordered gene vocabulary",
    "table_hash": "the protein table",
    "plan_fingerprint": "the cells and their order",
    "base_hash": "the weights that it starts from",
    "labels": "the labels of the training cells",
}
"""Keys of a manifest that decide whether a checkpoint belongs to a run, and what each stands for."""


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
