"""The loop: steps, held-out loss, checkpoints, a graceful end. Knows neither Ray nor W&B nor an adapter nor a model.

In: this rank's Cells of every step, an engine, an architecture. Out: lines of metrics through `report`, checkpoints in a store.
The trainer owns time (step, cursor, learning rate); the engine owns gradients; the architecture owns the loss.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError, TrainingError
from tftrain.models.arch import Architecture, Batch
from tftrain.training.checkpoint import CheckpointStore, Progress
from tftrain.training.engine import Engine, StepResult
from tftrain.training.group import Group
from tftrain.training.optim import OptimConfig, learning_rate
from tftrain.training.prefetch import Prefetch


@dataclass(frozen=True)
class TrainConfig:
    """How long and in what portions. Exactly one of `steps` and `epochs` is given."""

    cells_per_step: int
    """Cells of one optimiser step over all ranks; a step at the end of an epoch may have fewer."""
    tokens_per_gpu: int
    """Most tokens of one micro-batch: the only knob of memory. Gradient accumulation follows from it."""
    steps: int | None = None
    epochs: float | None = None
    """Passes over the data; may be a fraction."""
    heldout_every_steps: int | None = 200
    """Steps between held-out losses; there is always one at the end. None: only at the end."""
    log_every_steps: int = 1
    """Steps between two lines of metrics; the last step always has one."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError(
                f"train.steps is {self.steps} and train.epochs is {self.epochs}; give exactly one of them, they are two names of one length"
            )
        for name in ("cells_per_step", "tokens_per_gpu", "steps", "epochs", "heldout_every_steps", "log_every_steps"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise RecipeError(f"train.{name} is {value}; it must be above 0")


@dataclass(frozen=True)
class AgreedStep:
    """One step's micro-batches of this rank, equally many on all ranks, and the totals of all ranks."""

    batches: Sequence[Batch]
    n_cells: int
    n_tokens: int
    n_scored: int
    is_stop_asked: bool
    """Whether any rank was asked to stop."""


def agree_step(group: Group, batches: Sequence[Batch], filler: Batch, is_stop_asked: bool = False) -> AgreedStep:
    """Collective. Fills `batches` up with `filler` to the largest number of any rank, at least one."""
    mine = [len(batches), *(sum(getattr(b, name) for b in batches) for name in ("n_cells", "n_tokens", "n_scored"))]
    rows = group.share([*mine, float(is_stop_asked)])
    n_batches = int(max(1, *(row[0] for row in rows)))
    n_cells, n_tokens, n_scored, n_asked = (int(sum(column)) for column in list(zip(*rows))[1:])
    return AgreedStep([*batches, *[filler] * (n_batches - len(batches))], n_cells, n_tokens, n_scored, n_asked > 0)
