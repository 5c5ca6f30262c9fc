"""What fine-tuning adds to a checkpoint, each file read back and checked before the checkpoint counts.

    adapter/adapter_config.json, adapter_model.safetensors    PEFT's own format (training/lora.py)
    adapter/ or head/ head.safetensors                        the task head, if there is one
    adapter/ or head/ manifest.json                           hashes of base, genes and table; labels; the threshold

In: the trained weights, whole, on rank 0. The check: no tensor is empty, every lora_B has moved away from zero, and the
live model with what the files hold gives the losses that it gives without.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tftrain.models.heads import BASE, HEAD, Labeller
from tftrain.training import lora
from tftrain.training.checkpoint import WRITE_ERRORS, Progress
from tftrain.training.plain import Engine
from tftrain.training.trainer import AgreedStep

ADAPTER, HEAD_ONLY = "adapter", "head"
HEAD_FILE, MANIFEST = "head.safetensors", "manifest.json"
TOLERANCE = 1e-5
"""Relative, of the losses before and after."""


@dataclass
class TunedFiles:
    """The companion of a fine-tuning run's checkpoints; see `checkpoint.Companion`."""

    module: nn.Module
    """As the engine got it: a Labeller or the architecture's own module, with or without adapters."""
    facts: Mapping[str, Any]
    """JSON values for the manifest."""
    check: Callable[[], AgreedStep]
    """Collective. A few cells on which losses are compared."""
    heldout: Callable[[], AgreedStep] | None = None
    """Collective. The labelled held-out cells that set the threshold of `unknown`; None: there is no threshold."""
    unknown_fraction: float = 0.05

    def write(
        self, folder: Path, engine: Engine, weights: Mapping[str, Tensor], progress: Progress, *, is_averaged: bool
    ) -> str | None:
        problem, saved = None, dict(weights)
        if engine.group.rank == 0:
            try:
                saved, problem = self._written(self.folder_in(folder), weights, progress)
            except WRITE_ERRORS as error:
                problem = f"rank 0: {type(error).__name__}: {error}"
        if any(engine.group.gather(problem)):
            return problem
        live = engine.with_weights(weights) if is_averaged else contextlib.nullcontext()
        step = self.check()
        with live:
            before = engine.evaluate(step.batches)
        with engine.with_weights(saved):
            after = engine.evaluate(step.batches)
            unknown = self._threshold(engine) if self.heldout else None
        differs = [name for name in before if not np.isclose(before[name], after[name], rtol=TOLERANCE, atol=1e-6)]
        if differs:
            name = differs[0]
            problem = f"what was read back gives {name} {after[name]:.6g}, the live model {before[name]:.6g}"
        elif engine.group.rank == 0:
            text = json.dumps({**self.facts, "step": progress.step, "unknown": unknown}, indent=1) + "\n"
            try:
                (self.folder_in(folder) / MANIFEST).write_text(text)
            except OSError as error:
                problem = f"rank 0: {type(error).__name__}: {error}"
        return problem if engine.group.rank == 0 else None

    def folder_in(self, checkpoint: Path) -> Path:
        """Where the files of a checkpoint lie."""
        return checkpoint / (ADAPTER if lora.is_wrapped(self._tuned) else HEAD_ONLY)

    @property
    def _tuned(self) -> nn.Module:
        return self.module.base if isinstance(self.module, Labeller) else self.module

    def _written(
        self, folder: Path, weights: Mapping[str, Tensor], progress: Progress
    ) -> tuple[dict[str, Tensor], str | None]:
        """Writes the files and reads them again: the weights as they are on disk, and what is wrong with them."""
        folder.mkdir(parents=True, exist_ok=True)
        prefix = BASE if isinstance(self.module, Labeller) else ""
        saved, problem = dict(weights), None
        if lora.is_wrapped(self._tuned):
            own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
            lora.save(self._tuned, own, folder)
            read, keys = lora.read(folder), lora.names_in_file(self._tuned)
            saved |= {f"{prefix}{name}": read[key] for name, key in keys.items()}
            still = lora.unmoved(read) if progress.step > progress.n_skipped else []
            if still:
                problem = (
                    f"{len(still)} tensors of the adapter are empty or have not moved from zero, such as {still[0]}: "
                    "the loss does not reach them; name other lora.target_modules"
                )
        if isinstance(self.module, Labeller):
            head = {name: value.contiguous() for name, value in weights.items() if name.startswith(HEAD)}
            save_file(head, folder / HEAD_FILE)
            saved |= load_file(folder / HEAD_FILE)
        return saved, problem

    def _threshold(self, engine: Engine) -> dict[str, Any] | None:
        """Collective. The probability of the likeliest class below which `unknown_fraction` of the labelled held-out
        cells lie."""
        labeller = engine.module
        assert isinstance(labeller, Labeller)
        assert self.heldout is not None
        labeller.noted = []
        try:
            engine.evaluate(self.heldout().batches)
            mine = np.concatenate([np.zeros(0, np.float32), *(said.probability_C for said in labeller.noted)])
        finally:
            labeller.noted = None
        probability_C = np.concatenate(engine.group.gather(mine))
        if not len(probability_C):
            return None
        threshold = float(np.quantile(probability_C, self.unknown_fraction))
        return {"threshold": threshold, "fraction": self.unknown_fraction, "n_cells": len(probability_C)}
