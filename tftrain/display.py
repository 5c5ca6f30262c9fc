"""The progress of a run as its driver shows it, and the channel through which workers speak to the driver."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tftrain.stop import Stop


class Channel(Protocol):
    """What a worker function gets beside its payload. Only rank 0's reports are shown."""

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Moves the progress line. Returns at once."""
        ...

    def say(self, line: str) -> None:
        """Prints one line above the progress line. Returns at once."""
        ...

    def is_stop_asked(self) -> bool:
        """Whether the run was asked to save and to end. Returns at once."""
        ...


class Display:
    """The progress of a run: a live line on a terminal; elsewhere a line now and then. Is itself a Channel."""

    SILENT_S = 10.0
    """Least seconds between two lines where there is no terminal; lines with a held-out loss always appear."""

    def __init__(self, title: str = "train", console: Console | None = None, stop: Stop | None = None):
        self._title, self._stop = title, stop or Stop()
        self._console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown_step, self._shown_at = -1, -math.inf
        self._shown_heldout: float | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints one line, above the live line where there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def is_stop_asked(self) -> bool:
        """Whether this process was asked to end."""
        return self._stop.is_asked

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Shows step `step` of `total_steps`; nothing new is shown for a step that was shown."""
        if step == self._shown_step:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        text = _summary(metrics)
        if self._console.is_terminal:
            self._show_live(step, total_steps, text)
        elif (
            step == total_steps
            or now - self._shown_at >= self.SILENT_S
            or metrics.get("val/loss") != self._shown_heldout
        ):
            done, seconds = step - self._first[0], now - self._first[1]
            left = f"{_clock(seconds / done * (total_steps - step))} left" if done else "starting"
            self._console.print(
                f"{self._title} {step}/{total_steps}  {text}  {left}", markup=False, highlight=False, soft_wrap=True
            )
            self._shown_at, self._shown_heldout = now, metrics.get("val/loss")
        self._shown_step = step

    def _show_live(self, step: int, total_steps: int, text: str) -> None:
        if self._bar is None:
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            columns += [
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=120)
            self._bar.start()
        if self._task is None:
            # Remaining time counts from the step that this run began at, which a resumed run did not start from.
            self._task = self._bar.add_task(self._title, total=total_steps, completed=step, numbers=text)
        self._bar.update(self._task, completed=step, total=total_steps, numbers=text)


def _summary(metrics: Mapping[str, float]) -> str:
    """`loss 3.214  val 3.301  120 cells/s`, of what there is."""
    shown = (("train/loss", "loss {:.4f}"), ("val/loss", "val {:.4f}"), ("perf/cells_per_s", "{:,.0f} cells/s"))
    return "  ".join(text.format(metrics[name]) for name, text in shown if name in metrics)


def _clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
