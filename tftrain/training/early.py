"""When to stop before the last step: a held-out metric that has not improved for some evaluations.

In: the held-out metrics of a run, one evaluation after another. Out: whether the last one was the best so far, and
whether it is enough. A pure function of the metrics' history, so that a resumed run stops where an unbroken one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tftrain.errors import RecipeError

HIGHER_IS_BETTER = ("val/accuracy", "val/r2")
"""Metrics of which more is better; of all others less is."""


@dataclass(frozen=True)
class EarlyStopConfig:
    """Held-out evaluations come every `train.heldout_every_steps`; the checkpoint of the best one is kept."""

    patience: int = 5
    """Evaluations in a row without a better value after which the run ends."""
    metric: str = "val/loss"
    """A held-out metric: val/loss, val/loss_gene, val/loss_head, val/accuracy, val/r2, ..."""
    min_delta: float = 0.0
    """A value is better where it is so by more than this."""

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_delta < 0:
            raise RecipeError(
                f"early_stop.patience is {self.patience} and early_stop.min_delta is {self.min_delta:g}; the first "
                "must be at least 1, the second at least 0"
            )
        if not self.metric.startswith("val/"):
            raise RecipeError(
                f"early_stop.metric is {self.metric!r}; held-out metrics begin with val/, as val/loss does"
            )


def rank_of(metric: str, value: float | None) -> float:
    """A number that is the lower the better the value is; infinite for a value that is none."""
    if value is None or math.isnan(value):
        return math.inf
    return -value if metric in HIGHER_IS_BETTER else value


class EarlyStop:
    """The state of it: the best value and the evaluations since."""

    def __init__(self, config: EarlyStopConfig, history: Sequence[Mapping[str, float]] = ()):
        """`history`: the metrics of the run's evaluations so far, in order."""
        self.config = config
        self._best, self._n_since = math.inf, 0
        for metrics in history:
            self.note(metrics)

    def note(self, metrics: Mapping[str, float]) -> bool:
        """Takes note of an evaluation; returns whether it is the best so far. Raises RecipeError where it has no such
        metric."""
        if self.config.metric not in metrics:
            there = ", ".join(name for name in metrics if name.startswith("val/"))
            raise RecipeError(f"early_stop.metric is {self.config.metric!r}; the held-out metrics are {there}")
        rank = rank_of(self.config.metric, metrics[self.config.metric])
        is_best = rank < self._best - self.config.min_delta
        if is_best:
            self._best, self._n_since = rank, 0
        else:
            self._n_since += 1
        return is_best

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        return self._n_since >= self.config.patience
