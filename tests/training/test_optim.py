"""The learning rate is the literal curve; biases and norms are not decayed."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn
from toy import TOY, VOCAB, ToyConfig

from tftrain.errors import RecipeError
from tftrain.training.optim import OptimConfig, adamw, learning_rate


@pytest.mark.parametrize(
    ("warmup_fraction", "min_lr", "expected"),
    [
        (0.0, 0.0, [1.0, 0.853553, 0.5, 0.146447]),
        (0.5, 0.0, [0.5, 1.0, 1.0, 0.5]),
        (0.5, 0.2, [0.5, 1.0, 1.0, 0.6]),
        (0.0, 1.0, [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_learning_rate(warmup_fraction: float, min_lr: float, expected: list[float]) -> None:
    config = OptimConfig(lr=1.0, min_lr=min_lr, warmup_fraction=warmup_fraction)
    np.testing.assert_allclose([learning_rate(config, step, 4) for step in range(4)], expected, atol=1e-6)


def test_vectors_and_the_frozen_are_not_decayed() -> None:
    module = TOY.build(ToyConfig(), VOCAB)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = {
        group["weight_decay"]: {names[id(p)] for p in group["params"]}
        for group in adamw(module, OptimConfig(weight_decay=0.1), is_fused=False).param_groups
    }
    assert groups == {
        0.1: {"gene.weight", "mix.0.weight", "rate.weight"},
        0.0: {"mix.0.bias", "mix.2.weight", "mix.2.bias", "rate.bias"},
    }


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(RecipeError, match="nothing would be trained"):
        adamw(nn.Linear(2, 2).requires_grad_(False), OptimConfig(), is_fused=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": 0.0}, "optim.lr is 0 and optim.min_lr is 0"),
        ({"lr": 1e-4, "min_lr": 1e-3}, "optim.min_lr is 0.001"),
        ({"warmup_fraction": 1.0}, "optim.warmup_fraction is 1"),
        ({"betas": (0.9, 1.0)}, "optim.betas are"),
        ({"clip_norm": 0.0}, "optim.clip_norm is 0"),
    ],
)
def test_bad_config(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OptimConfig(**settings)
