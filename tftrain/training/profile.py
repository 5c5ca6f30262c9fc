"""A trace of some steps by torch's profiler: `<out>/profile/steps_11_15.rank_0.json`, for Perfetto or chrome://tracing.

In: the recipe's `profile:` block, and the trainer's word that a step has ended. Out: one file a rank.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from tftrain.errors import RecipeError
from tftrain.training.folder import Folder


@dataclass(frozen=True)
class ProfileConfig:
    """Which steps to trace. Tracing slows them down."""

    start_step: int = 10
    """First traced step, counted from 1; the first steps of a run are not like the others."""
    steps: int = 3

    def __post_init__(self) -> None:
        for name in ("start_step", "steps"):
            if getattr(self, name) < 1:
                raise RecipeError(f"profile.{name} is {getattr(self, name)}; it must be at least 1")


class Profile:
    """Tells when a traced step begins and ends."""

    def __init__(self, config: ProfileConfig, out: str, rank: int):
        self._first, self._last = config.start_step, config.start_step + config.steps - 1
        self._folder, self._rank = Folder.at(out) / "profile", rank
        self._running: torch.profiler.profile | None = None

    def before(self, step: int) -> None:
        """Step number `step` (from 1) begins. A run that continues between the two traces what is left."""
        if self._running is None and self._first <= step <= self._last:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._first = step
            self._running = torch.profiler.profile(activities=activities)
            self._running.start()

    def after(self, step: int, *, is_last: bool) -> None:
        """The step has ended; the file is written after the last one."""
        if self._running is None or (step < self._last and not is_last):
            return
        self._running.stop()
        with tempfile.TemporaryDirectory(prefix="tftrain-") as folder:
            path = Path(folder) / "trace.json"
            self._running.export_chrome_trace(str(path))
            self._folder.write_bytes(f"steps_{self._first}_{step}.rank_{self._rank}.json", path.read_bytes())
        self._running, self._first = None, self._last + 1
