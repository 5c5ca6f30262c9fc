"""The loop: steps, held-out loss, checkpoints, a graceful end. Knows neither Ray nor W&B nor an adapter nor a model.

In: this rank's Cells of every step, an engine, an architecture. Out: lines of metrics through `report`, checkpoints in
a store. The trainer owns time (step, cursor, learning rate); the engine owns gradients; the architecture owns the
loss.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError, TrainingError
from tftrain.models.arch import Architecture, Batch
from tftrain.training.average import Average
from tftrain.training.checkpoint import CheckpointStore, Progress
from tftrain.training.early import EarlyStop
from tftrain.training.folder import Folder
from tftrain.training.group import Group
from tftrain.training.ledger import Ledger
from tftrain.training.meter import Meter
from tftrain.training.nonfinite import explain
from tftrain.training.optim import OptimConfig, learning_rate
from tftrain.training.plain import Engine, StepResult
from tftrain.training.prefetch import Prefetch
from tftrain.training.profile import Profile

log = logging.getLogger(__name__)

COMPUTE = "tftrain: forward, backward, optimiser"
"""Name of a step's arithmetic in a profile; what a trace shows beside it is the trainer's own."""


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
    skip_nonfinite: int = 0
    """Steps of a run that may be left out because their loss or gradient is not finite; one more ends the run."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay a step (such as 0.999); held-out losses and
    embeddings then use it. None: no average.
    """
    ema_every_steps: int = 10
    """Steps between two updates of the average (by ema_decay to this power): each collects the weights on rank 0."""

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
        if self.skip_nonfinite < 0 or self.ema_every_steps < 1:
            raise RecipeError(
                f"train.skip_nonfinite is {self.skip_nonfinite} and train.ema_every_steps is {self.ema_every_steps}; "
                "the first must be at least 0, the second at least 1"
            )
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise RecipeError(f"train.ema_decay is {self.ema_decay:g}; it must lie between 0 and 1, such as 0.999")


@dataclass(frozen=True)
class AgreedStep:
    """One step's micro-batches of this rank, equally many on all ranks, and the totals of all ranks."""

    batches: Sequence[Batch]
    n_cells: int
    n_tokens: int
    n_scored: int
    n_flop: float
    is_stop_asked: bool
    """Whether any rank was asked to stop."""


def agree_step(
    group: Group, batches: Sequence[Batch], filler: Batch, *, n_flop: float = 0.0, is_stop_asked: bool = False
) -> AgreedStep:
    """Collective. Fills `batches` up with `filler` to the largest number of any rank, at least one."""
    mine = [len(batches), *(sum(getattr(b, name) for b in batches) for name in ("n_cells", "n_tokens", "n_scored"))]
    label_weight = sum(getattr(b, "label_weight", 0.0) for b in batches)
    rows = group.share([*mine, n_flop, float(is_stop_asked), label_weight])
    n_batches = int(max(1, *(row[0] for row in rows)))
    n_cells, n_tokens, n_scored, n_flop, n_asked, label_weight = (sum(column) for column in list(zip(*rows))[1:])
    filled = [*batches, *[filler] * (n_batches - len(batches))]
    if label_weight:
        # A second mean, over labels, goes through the one division by scored genes (models/heads.py).
        filled = [b.scaled(n_scored / label_weight) for b in filled]  # type: ignore[attr-defined]
    return AgreedStep(filled, int(n_cells), int(n_tokens), int(n_scored), n_flop, n_asked > 0)


@dataclass(frozen=True)
class _Item:
    """One step of this rank, ready to compute."""

    cells: Cells
    cursor: int
    batches: Sequence[Batch]
    n_flop: float


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
    is_stop_asked: Callable[[], bool] = bool
    """Asked before every step. Where any rank says yes all ranks save after that step, and return."""
    on_saved: Callable[[Folder, int], None] | None = None
    """Called on rank 0 with a checkpoint that has become complete, and the step under way."""
    average: Average | None = None
    """The moving average of the weights; None: there is none."""
    early: EarlyStop | None = None
    """Ends the run where a held-out metric no longer improves; None: the run goes to its last step."""
    is_heldout_first: bool = False
    """True takes a held-out loss before the first step too: that of what the run begins with."""
    profile: Profile | None = None
    device_tflops: float | None = None
    """Peak of one device in the precision in use, for `perf/mfu`; None: it is not reported."""

    def run(self) -> Outcome:
        """Trains to the last step. Returns `stopped` where it was asked to stop before. Collective.

        Equal inputs give equal losses, whatever the number of ranks, up to the order of sums in floating point; a
        resumed run continues the losses of an unbroken one. Raises TrainingError at the first loss or gradient that
        is not finite, before the weights change, unless `config.skip_nonfinite` such steps may be left out.
        """
        self._filler = self.architecture.empty(self.model_config, self.vocab)
        self._heldout_step: AgreedStep | None = None
        self._saved: Folder | None = None
        if self.store and self.progress.step:
            self._saved = self.store.folder_of(self.progress.step)
        if self.progress.step >= self.total_steps or (self.early and self.early.is_over):
            return "finished"
        if self.is_heldout_first and not self.progress.step:
            heldout = self.heldout_metrics()
            if heldout and self.engine.group.rank == 0:
                self.report(0, heldout)
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
            self._heldout_step = agree_step(
                self.engine.group, self._pack(_with_genes(self.heldout), "heldout"), self._filler
            )
        agreed = self._heldout_step
        if not agreed.n_scored:
            return {}
        weights = self.average.weights if self.average else None
        with contextlib.nullcontext() if weights is None else self.engine.with_weights(weights):
            sums = self.engine.evaluate(agreed.batches)
        return {f"val/{name}": value / agreed.n_scored for name, value in sums.items()}

    def _loop(self, ahead: Prefetch[_Item]) -> Outcome:
        group = self.engine.group
        meter = Meter(group.device, group.world_size, self.device_tflops)
        for item in ahead:
            step = self.progress.step
            if self.profile:
                self.profile.before(step + 1)
            lr = learning_rate(self.optim, step, self.total_steps)
            # Dropout is a function of (seed, step, rank), so that there is no generator's state to restore.
            torch.manual_seed(stable_seed(self.seed, "dropout", step, group.rank))
            agreed = agree_step(
                group, item.batches, self._filler, n_flop=item.n_flop, is_stop_asked=self.is_stop_asked()
            )
            with torch.profiler.record_function(COMPUTE):
                result = self.engine.step(agreed.batches, agreed.n_scored, lr)
            n_skipped = self.progress.n_skipped
            if not result.is_finite:
                self._skip_or_refuse(step, result, item)
                n_skipped += 1
            self.progress = Progress(step + 1, item.cursor, n_skipped)
            if self.average and result.is_finite:
                self.average.update(step + 1)
            if self.ledger:
                self.ledger.record(self.progress.step, item.cells)
            meter.step(n_cells=agreed.n_cells, n_tokens=agreed.n_tokens, n_flop=agreed.n_flop, wait_s=ahead.wait_s)
            is_last = self.progress.step == self.total_steps or agreed.is_stop_asked
            if self.profile:
                self.profile.after(step + 1, is_last=is_last)
            is_last = self._after_step(agreed, result, lr, meter, is_last)
            if is_last:
                is_over = self.progress.step == self.total_steps or (self.early and self.early.is_over)
                return "finished" if is_over else "stopped"
            meter.resume()
        raise AssertionError(f"cells ended at step {self.progress.step} of {self.total_steps}")

    def _after_step(self, agreed: AgreedStep, result: StepResult, lr: float, meter: Meter, is_last: bool) -> bool:
        """Held-out loss, metrics and checkpoint, where they are due. Returns whether this step was the last."""
        step = self.progress.step
        is_save_due = self.store is not None and (is_last or _is_due(step, self.store.config.save_every_steps))
        is_heldout_due = is_last or _is_due(step, self.config.heldout_every_steps)
        if is_save_due and self.store is not None and self.store.config.keep_best:
            # Which checkpoint is best is known by the held-out loss of its own step.
            is_heldout_due = True
        heldout = self.heldout_metrics() if is_heldout_due else {}
        if self.early and heldout and _is_due(step, self.config.heldout_every_steps):
            is_best = self.early.note(heldout)
            is_last = is_last or self.early.is_over
            is_save_due = is_save_due or (self.store is not None and (is_best or is_last))
        if self.engine.group.rank == 0 and (is_last or is_heldout_due or _is_due(step, self.config.log_every_steps)):
            metrics = {"train/lr": lr, **meter.metrics(), **heldout}
            if result.is_finite:
                metrics |= {f"train/{name}": value / agreed.n_scored for name, value in result.sums.items()}
                metrics["train/grad_norm"] = result.grad_norm
            if self.progress.n_skipped:
                metrics["train/skipped_steps"] = self.progress.n_skipped
            if self.epoch_of:
                metrics["train/epoch"] = self.epoch_of(self.progress.cursor)
            self.report(step, metrics)
        if self.ledger and (is_last or is_save_due):
            # Before the checkpoint is complete: what it has trained on is then on record.
            self.ledger.flush()
        if self.store:
            self._settle(is_waiting=is_save_due)
            if is_save_due:
                facts = {"total_steps": self.total_steps, "metrics": heldout}
                if self.epoch_of:
                    facts["epoch"] = self.epoch_of(self.progress.cursor)
                averaged = self.average.weights if self.average else None
                self.store.begin(self.engine, self.progress, facts, averaged)
                self._settle(is_waiting=is_last)
        return is_last

    def _settle(self, *, is_waiting: bool) -> None:
        """Takes note of a checkpoint that has become complete since the last call."""
        assert self.store is not None
        folder = self.store.settle(self.engine.group, is_waiting=is_waiting)
        if folder is not None:
            self._saved = folder
            if self.on_saved and self.engine.group.rank == 0:
                self.on_saved(folder, self.progress.step)

    def _collate(self, item: tuple[int, tuple[Cells, int]]) -> _Item:
        step, (cells, cursor) = item
        return _Item(cells, cursor, self._pack(_with_genes(cells), step), self._flop(cells))

    def _flop(self, cells: Cells) -> float:
        """FLOP of forward and backward passes over the real tokens of these cells; the backward pass takes twice the
        forward pass (MODEL.md 1.11)."""
        if self.device_tflops is None:
            return 0.0
        lengths, n_cells = np.unique(self.architecture.tokens_of(cells, self.model_config), return_counts=True)
        flop_of = self.architecture.forward_flop
        return sum(3.0 * n * flop_of(self.model_config, self.vocab, int(length)) for length, n in zip(lengths, n_cells))

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

    def _skip_or_refuse(self, step: int, result: StepResult, item: _Item) -> None:
        """Raises the same TrainingError on all ranks, naming the cells that went wrong; or says that the step was
        left out. Weights and optimiser are as before the step in both cases."""
        what = explain(
            self.engine,
            result,
            _with_genes(item.cells),
            item.batches,
            pack=lambda cells: self._pack(cells, step),
            filler=self._filler,
            name_of=self._source_name,
        )
        n_allowed = self.config.skip_nonfinite
        if self.progress.n_skipped < n_allowed:
            if self.engine.group.rank == 0:
                log.warning(
                    "step %d is left out (%d of at most %d): %s", step + 1, self.progress.n_skipped + 1, n_allowed, what
                )
            return
        saved = f"the checkpoint {self._saved.uri} is intact" if self._saved else "there is no checkpoint yet"
        limit = f" and train.skip_nonfinite allows {n_allowed}" if n_allowed else ""
        raise TrainingError(f"step {step + 1}: {what}; {saved}{limit}. Look at these cells, or lower optim.lr")

    def _source_name(self, index: int) -> str:
        return self.source_names[index] if index < len(self.source_names) else f"source {index}"


def _with_genes(cells: Cells) -> Cells:
    """Leaves out cells none of whose genes are in the vocabulary: there is nothing to learn from them."""
    n_expressed_C = cells.n_expressed_C
    return cells if n_expressed_C.all() else cells.take(np.flatnonzero(n_expressed_C))


def stable_seed(*parts: int | str) -> int:
    """A seed below 2**63 that depends on every part and on nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
