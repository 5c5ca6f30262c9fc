"""The exponential moving average of a model's weights, whole, in fp32, in rank 0's memory.

In: the engine's weights every few steps. Out: averaged weights for held-out losses and `ema.safetensors`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tftrain.training.plain import Engine


class Average:
    """weights <- d * average + (1 - d) * weights, every `every_steps` steps with d = decay ** every_steps.

    Early on a smaller decay, (1 + s) / (10 + s) after s steps, forgets the weights that the run began with. What
    happens at a step depends on its number alone, so that a resumed run has the average of an unbroken one.
    """

    def __init__(self, engine: Engine, decay: float, every_steps: int, saved: Mapping[str, Tensor] | None = None):
        """Collective. Begins with `saved` (rank 0) or else with the engine's weights."""
        self._engine, self._decay, self._every_steps = engine, decay, every_steps
        weights = engine.weights()
        self.weights: dict[str, Tensor] = {**weights, **{k: v for k, v in (saved or {}).items() if k in weights}}
        """On rank 0; empty on the others."""

    def update(self, step: int) -> None:
        """Collective. Step number `step` is done."""
        if step % self._every_steps:
            return
        decay = min(self._decay, (1 + step) / (10 + step)) ** self._every_steps
        for name, value in self._engine.weights().items():
            self.weights[name].lerp_(value, 1 - decay)
