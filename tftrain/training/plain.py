"""What an engine is, and the plain one: torch alone, one process, the reference that the other is tested against.

In: micro-batches of a step, the number of genes scored by all ranks together, a learning rate. Out: sums of the losses
over all ranks, the gradient's norm; the weights whole, or a rank's state for a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tftrain.errors import CheckpointError, RecipeError
from tftrain.models.arch import Batch
from tftrain.training.group import Group
from tftrain.training.optim import OptimConfig, adamw


@dataclass(frozen=True)
class StepResult:
    """What one optimiser step did, equal on all ranks."""

    sums: dict[str, float]
    """Each sum that the module returned, over all micro-batches of all ranks. `loss` is the one trained on."""
    grad_norm: float
    """Global L2 norm of the gradient of loss / scored genes, before clipping. NaN where the loss was not finite."""
    bad_batches: tuple[int, ...]
    """Of this rank alone: micro-batches whose loss was not finite."""

    @property
    def is_finite(self) -> bool:
        """Where loss or gradient are not, weights and optimiser were left as they were, and the next step is a clean
        one."""
        return math.isfinite(self.sums["loss"]) and math.isfinite(self.grad_norm)


class Engine(Protocol):
    """A module with its optimiser. Every method is collective: all ranks call it with equally many micro-batches."""

    group: Group
    precision: str
    module: nn.Module

    @property
    def zero_stage(self) -> int | None:
        """The ZeRO stage in use; None without DeepSpeed."""
        ...

    def step(self, batches: Sequence[Batch], n_scored_total: float, lr: float) -> StepResult:
        """Minimises (sum of `loss` over ranks and micro-batches) / n_scored_total by one step of rate `lr`."""
        ...

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The module's sums over ranks and micro-batches, without dropout and without gradients."""
        ...

    def bad_batches(self, batches: Sequence[Batch], *, of_gradient: bool) -> tuple[int, ...]:
        """Of this rank: batches whose sums (or the gradients of whose loss) are not finite, without dropout. Changes
        nothing. Under ZeRO-3 gradients are not looked at."""
        ...

    def with_weights(self, weights: Mapping[str, Tensor]) -> contextlib.AbstractContextManager[None]:
        """For the time of the block the module computes with rank 0's `weights` (as `weights()` returns them)."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """Rank 0: every parameter that requires a gradient, whole, fp32, on the CPU. Other ranks: nothing."""
        ...

    def save_shards(self, folder: Path) -> None:
        """Writes this rank's part of weights and optimiser state below `folder`; several ranks may share it."""
        ...

    def load_shards(self, folder: Path) -> None:
        """Restores what `save_shards` wrote at the same stage and number of ranks; CheckpointError otherwise."""
        ...

    def load_universal(self, folder: Path, *, is_shared: bool) -> None:
        """Restores what `save_shards` wrote at the same stage and any number of ranks, after a conversion beside it.

        `is_shared` says that all ranks see the same `folder`: then rank 0 alone converts.
        """
        ...


class PlainEngine:
    """The reference: torch alone, one process."""

    zero_stage: int | None = None

    def __init__(self, module: nn.Module, precision: str, optim: OptimConfig, group: Group):
        if group.world_size != 1:
            raise RecipeError(
                f"engine.zero_stage is null, which is for one worker, and there are {group.world_size}; "
                "set it to 0, 1, 2 or 3"
            )
        self.group, self.precision, self.clip_norm = group, precision, optim.clip_norm
        self.module = module.to(group.device)
        self.optimizer = adamw(module, optim, is_fused=group.device.type == "cuda")

    def step(self, batches: Sequence[Batch], n_scored_total: float, lr: float) -> StepResult:
        self.module.train()
        set_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        sums = Sums()
        for batch in batches:
            out = self._forward(batch)
            (out["loss"] / n_scored_total).backward()
            sums.add(out)
        totals = sums.totals(self.group)
        if not math.isfinite(totals["loss"]):
            return StepResult(totals, math.nan, sums.bad_batches())
        grad_norm = clip(self.module, self.clip_norm)
        if math.isfinite(grad_norm):
            self.optimizer.step()
        return StepResult(totals, grad_norm, ())

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        self.module.eval()
        sums = Sums()
        with torch.no_grad():
            for batch in batches:
                sums.add(self._forward(batch))
        return sums.totals(self.group)

    def bad_batches(self, batches: Sequence[Batch], *, of_gradient: bool) -> tuple[int, ...]:
        self.module.eval()
        return bad_batches(self.module, self._forward, batches, of_gradient=of_gradient)

    @contextlib.contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = self.weights()
        self.module.load_state_dict(dict(weights), strict=False)
        try:
            yield
        finally:
            self.module.load_state_dict(own, strict=False)

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().float().cpu().clone() for name, p in self.module.named_parameters() if p.requires_grad}

    def save_shards(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save({"weights": self.weights(), "optimizer": self.optimizer.state_dict()}, folder / "plain.pt")

    def load_shards(self, folder: Path) -> None:
        path = folder / "plain.pt"
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no state of a run without DeepSpeed; set engine.zero_stage as in its manifest"
            )
        state = torch.load(path, map_location=self.group.device, weights_only=True)
        self.module.load_state_dict(state["weights"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])

    def load_universal(self, folder: Path, *, is_shared: bool) -> None:
        self.load_shards(folder)

    def _forward(self, batch: Batch) -> dict[str, Tensor]:
        device = self.group.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.module(batch.to(device))


class Sums:
    """Sums over micro-batches, kept on the device so that no micro-batch waits for it."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []
        self._names: list[str] = []

    def add(self, out: dict[str, Tensor]) -> None:
        self._names = sorted(out)
        self._rows.append(torch.stack([out[name].detach().double() for name in self._names]))

    def totals(self, group: Group) -> dict[str, float]:
        """Over all ranks."""
        return dict(zip(self._names, group.total(torch.stack(self._rows).sum(0).tolist())))

    def bad_batches(self) -> tuple[int, ...]:
        """Indices of this rank's micro-batches with a sum that is not finite."""
        return tuple(index for index, row in enumerate(self._rows) if not bool(torch.isfinite(row).all()))


def bad_batches(
    module: nn.Module, forward: Callable[[Batch], dict[str, Tensor]], batches: Sequence[Batch], *, of_gradient: bool
) -> tuple[int, ...]:
    """See Engine. Gradients go through `torch.autograd.grad`, which no hook of DeepSpeed hears of."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    bad = []
    for index, batch in enumerate(batches):
        with torch.set_grad_enabled(of_gradient):
            out = forward(batch)
        values = list(out.values())
        if of_gradient:
            found = torch.autograd.grad(out["loss"], parameters, allow_unused=True)
            values += [gradient for gradient in found if gradient is not None]
        if not all(bool(torch.isfinite(value).all()) for value in values):
            bad.append(index)
    return tuple(bad)


def set_rate(optimizer: Any, lr: float) -> None:
    """The learning rate of all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip(module: nn.Module, clip_norm: float | None) -> float:
    """The norm before clipping; None clips nothing."""
    return float(
        torch.nn.utils.clip_grad_norm_(list(module.parameters()), math.inf if clip_norm is None else clip_norm)
    )
