"""The loop: steps, held-out loss, checkpoints, a graceful end. Knows neither Ray nor W&B nor an adapter nor a model.

In: this rank's Cells of every step, an engine, an architecture. Out: lines of metrics through `report`, checkpoints in
a store. The trainer owns time (step, cursor, learning rate); the engine owns gradients; the architecture owns the
loss.
"""

from __future__ import annotations

import hashlib
import math
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError, TrainingError
from tftrain.models.arch import Architecture, Batch
from tftrain.training.checkpoint import CheckpointStore, Progress
from tftrain.training.engine import Engine, StepResult
from tftrain.training.group import Group
from tftrain.training.ledger import Ledger
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
                f"train.steps is {self.steps} and train.epochs is {self.epochs}; give exactly one of them, "
                "they are two names of one length"
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


Report = Callable[[int, dict[str, float]], None]
"""Called on rank 0 with the number of steps done and the metrics of the last one."""
Outcome = Literal["finished", "stopped"]


@dataclass
class Trainer:
    """One run on one rank: every rank makes one and calls `run`."""

    engine: Engine
    architecture: Architecture
    model_config: Any
    vocab: Vocab
    config: TrainConfig
    optim: OptimConfig
    total_steps: int
    """Length of the whole run, which the learning rate depends on; not what is left of it."""
    seed: int
    steps: Iterable[tuple[Cells, int]]
    """This rank's cells of each step from `progress` on, and the cursor after the step. Equally many on all ranks."""
    heldout: Cells
    """This rank's held-out cells."""
    report: Report
    store: CheckpointStore | None = None
    """Where checkpoints go; None: nowhere."""
    ledger: Ledger | None = None
    """Which cells were trained goes there; None: it is not kept."""
    progress: Progress = field(default_factory=Progress)
    """Where to begin: what the restored checkpoint says."""
    epoch_of: Callable[[int], float] | None = None
    """Passes over the data that lie before a cursor; reported as `train/epoch`."""
    source_names: Sequence[str] = ()
    """Names of the sources, for messages."""
    is_stop_asked: bool = False
    """Set it (from a signal handler, say) and all ranks save after the step they are at, and return."""

    def run(self) -> Outcome:
        """Trains to the last step. Returns `stopped` where it was asked to stop before. Collective.

        Equal inputs give equal losses, whatever the number of ranks, up to the order of sums in floating point; a
        resumed run continues the losses of an unbroken one. Raises TrainingError at the first loss that is not a
        number, before the weights change.
        """
        self._filler = self.architecture.empty(self.model_config, self.vocab)
        self._heldout_step: AgreedStep | None = None
        self._saved_step = self.progress.step
        self._last_heldout: dict[str, float] = {}
        if self.progress.step >= self.total_steps:
            return "finished"
        ahead = Prefetch(enumerate(self.steps, start=self.progress.step), self._collate)
        try:
            return self._loop(ahead)
        finally:
            ahead.close()

    def heldout_metrics(self) -> dict[str, float]:
        """`val/<sum>`: held-out sums a scored gene, in one fixed gene order. Nothing without held-out cells.
        Collective.
        """
        if self._heldout_step is None:
            self._heldout_step = agree_step(self.engine.group, self._pack(_with_genes(self.heldout), "heldout"), self._filler)
        agreed = self._heldout_step
        if not agreed.n_scored:
            return {}
        sums = self.engine.evaluate(agreed.batches)
        return {f"val/{name}": value / agreed.n_scored for name, value in sums.items()}

    def _loop(self, ahead: Prefetch) -> Outcome:
        meter = _Meter()
        for cells, cursor, batches in ahead:
            step = self.progress.step
            lr = learning_rate(self.optim, step, self.total_steps)
            # Dropout is a function of (seed, step, rank), so that there is no generator's state to restore.
            torch.manual_seed(stable_seed(self.seed, "dropout", step, self.engine.group.rank))
            agreed = agree_step(self.engine.group, batches, self._filler, self.is_stop_asked)
            result = self.engine.step(agreed.batches, agreed.n_scored, lr)
            if not (math.isfinite(result.sums["loss"]) and math.isfinite(result.grad_norm)):
                self._refuse(step, result, cells, batches)
            self.progress = Progress(step + 1, cursor)
            if self.ledger:
                self.ledger.record(self.progress.step, cells)
            meter.step(agreed, ahead.wait_s)
            is_last = self.progress.step == self.total_steps or agreed.is_stop_asked
            self._after_step(agreed, result, lr, meter, is_last)
            if is_last:
                return "finished" if self.progress.step == self.total_steps else "stopped"
            meter.resume()
        raise AssertionError(f"cells ended at step {self.progress.step} of {self.total_steps}")

    def _after_step(self, agreed: AgreedStep, result: StepResult, lr: float, meter: _Meter, is_last: bool) -> None:
        """Held-out loss, metrics and checkpoint, where they are due."""
        step = self.progress.step
        is_heldout_due = is_last or _is_due(step, self.config.heldout_every_steps)
        if is_heldout_due:
            self._last_heldout = self.heldout_metrics()
        if self.engine.group.rank == 0 and (is_last or is_heldout_due or _is_due(step, self.config.log_every_steps)):
            metrics = {f"train/{name}": value / agreed.n_scored for name, value in result.sums.items()}
            metrics |= {"train/lr": lr, "train/grad_norm": result.grad_norm, **meter.metrics(self.engine.group.device)}
            if self.epoch_of:
                metrics["train/epoch"] = self.epoch_of(self.progress.cursor)
            self.report(step, metrics | (self._last_heldout if is_heldout_due else {}))
        is_save_due = self.store is not None and _is_due(step, self.store.config.save_every_steps)
        if self.ledger and (is_last or is_save_due):
            # Before the checkpoint is complete: what it has trained on is then on record.
            self.ledger.flush()
        if self.store and (is_last or is_save_due):
            facts = {"total_steps": self.total_steps, "metrics": self._last_heldout}
            if self.epoch_of:
                facts["epoch"] = self.epoch_of(self.progress.cursor)
            self.store.save(self.engine, self.progress, facts)
            self._saved_step = step

    def _collate(self, item: tuple[int, tuple[Cells, int]]) -> tuple[Cells, int, Sequence[Batch]]:
        step, (cells, cursor) = item
        return cells, cursor, self._pack(_with_genes(cells), step)

    def _pack(self, cells: Cells, occasion: int | str) -> Sequence[Batch]:
        """Micro-batches whose gene orders depend on the seed, the occasion and each cell, not on ranks."""
        if not len(cells):
            return []
        return self.architecture.collate(
            cells,
            self.model_config,
            self.vocab,
            seed=stable_seed(self.seed, "genes", occasion),
            shuffle_genes=True,
            max_tokens=self.config.tokens_per_gpu,
        )

    def _refuse(self, step: int, result: StepResult, cells: Cells, batches: Sequence[Batch]) -> None:
        """Raises the same TrainingError on all ranks, naming the cells of each batch that went wrong."""
        cells = _with_genes(cells)
        starts = [0]
        for batch in batches:
            starts.append(starts[-1] + batch.n_cells)
        mine = [
            f"{self._source_name(int(cells.source_C[cell]))}:{int(cells.joinid_C[cell])}"
            for index in result.bad_batches
            if index < len(batches)
            for cell in range(starts[index], starts[index + 1])
        ]
        named = [name for names in self.engine.group.gather(mine[:8]) for name in names]
        what = "loss" if not math.isfinite(result.sums["loss"]) else "gradient"
        saved = (
            f"the checkpoint of step {self._saved_step} is intact"
            if self.store and self._saved_step
            else "there is no checkpoint yet"
        )
        raise TrainingError(
            f"step {step + 1}: the {what} is not finite (loss sum {result.sums['loss']}, "
            f"gradient norm {result.grad_norm}); cells (source:soma_joinid) {', '.join(named) or 'not singled out'}; "
            f"{saved}. Look at these cells, or lower optim.lr"
        )

    def _source_name(self, index: int) -> str:
        return self.source_names[index] if index < len(self.source_names) else f"source {index}"


class _Meter:
    """Rates since the last line of metrics. The time of held-out losses and checkpoints is left out."""

    def __init__(self) -> None:
        self._wait_before_s = 0.0
        self._start = time.perf_counter()
        self._seconds = self._wait_s = 0.0
        self._n_steps = self._n_cells = self._n_tokens = 0

    def step(self, agreed: AgreedStep, wait_s: float) -> None:
        """A step has ended; `wait_s` is the wait for data since the run began."""
        self._seconds += time.perf_counter() - self._start
        self._wait_s += wait_s - self._wait_before_s
        self._wait_before_s = wait_s
        self._n_steps, self._n_cells = self._n_steps + 1, self._n_cells + agreed.n_cells
        self._n_tokens += agreed.n_tokens
        self._start = time.perf_counter()

    def resume(self) -> None:
        """The next step begins."""
        self._start = time.perf_counter()

    def metrics(self, device: torch.device) -> dict[str, float]:
        """`perf/...` a step, and a new beginning."""
        seconds = max(self._seconds, 1e-9)
        if device.type == "cuda":
            peak_bytes = torch.cuda.max_memory_allocated(device)
        else:
            peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {
            "perf/step_s": seconds / max(self._n_steps, 1),
            "perf/cells_per_s": self._n_cells / seconds,
            "perf/tokens_per_s": self._n_tokens / seconds,
            "perf/data_wait_fraction": self._wait_s / seconds,
            "perf/memory_peak_gib": peak_bytes / 2**30,
        }
        self._reset()
        return found

    def _reset(self) -> None:
        self._seconds = self._wait_s = 0.0
        self._n_steps = self._n_cells = self._n_tokens = 0


def _with_genes(cells: Cells) -> Cells:
    """Leaves out cells none of whose genes are in the vocabulary: there is nothing to learn from them."""
    n_expressed_C = cells.n_expressed_C
    return cells if n_expressed_C.all() else cells.take(np.flatnonzero(n_expressed_C))


def stable_seed(*parts: int | str) -> int:
    """A seed below 2**63 that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
