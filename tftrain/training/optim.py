"""AdamW, its parameter groups, and the learning rate as a pure function of the step.

In: a module and the recipe's `optim:` block. Out: a `torch.optim.AdamW` and `learning_rate(step)`; there is no
scheduler object, so there is no scheduler state to save or to restore.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from tftrain.errors import RecipeError


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay; the defaults are those of the published training configuration."""

    lr: float = 1.5e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: float = 0.0
    """The rate that the cosine falls to."""
    warmup_fraction: float = 0.1
    """Share of all steps over which the rate rises linearly from 0."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; biases, norms and other parameters of one dimension are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    """Gradients are scaled down to this global L2 norm where they exceed it; none: never."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.min_lr <= self.lr:
            raise RecipeError(
                f"optim.lr is {self.lr:g} and optim.min_lr is {self.min_lr:g}; set lr > 0 and 0 <= min_lr <= lr"
            )
        if not 0 <= self.warmup_fraction < 1:
            raise RecipeError(
                f"optim.warmup_fraction is {self.warmup_fraction:g}, a share of all steps: set it in [0, 1)"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"optim.betas are {list(self.betas)}; each must lie in [0, 1)")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise RecipeError(f"optim.clip_norm is {self.clip_norm:g}; set it above 0, or to null to clip nothing")


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Rate of step `step` (0 <= step < total_steps): linear from lr / warm-up steps to lr, then half a cosine to
    min_lr.
    """
    warmup_steps = round(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def adamw(module: nn.Module, config: OptimConfig, *, is_fused: bool) -> torch.optim.AdamW:
    """AdamW over the parameters that require gradients, in two groups: decayed (matrices) and not (one dimension).

    Raises RecipeError where nothing is trainable.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise RecipeError("the model has no parameter that requires a gradient: nothing would be trained")
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=is_fused,
    )
