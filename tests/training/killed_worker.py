"""The worker function of real recipes with an accident built in, and a driver that uses it; Ray's workers import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tftrain.run
from tftrain import assemble, cli
from tftrain.launch import Channel
from tftrain.recipe import parse
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, read_manifest
from tftrain.training.group import join_group


class Accident:
    """A channel that kills its rank before the steps `kills` ([step, rank] pairs), once each, and slows steps down."""

    def __init__(self, channel: Channel, payload: Mapping[str, Any], rank: int, began_at: int):
        self._channel, self._rank, self._step = channel, rank, began_at - 1
        self._marks, self._kills, self._pause_s = Path(payload["marks"]), payload["kills"], payload.get("pause_s", 0.0)

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        self._channel.report(step, total_steps, metrics)

    def say(self, line: str) -> None:
        self._channel.say(line)

    def is_stop_asked(self) -> bool:
        """Called once before every step."""
        time.sleep(self._pause_s)
        self._step += 1
        mark = self._marks / f"killed_{self._step}"
        if [self._step, self._rank] in self._kills and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._channel.is_stop_asked()


def run(payload: Mapping[str, Any], channel: Channel) -> str:
    """`assemble.run_worker`; leaves a mark of where this group of workers began and of how many they were."""
    group = join_group()
    out = parse(payload["recipe"]).out
    latest = CheckpointStore(out, CheckpointConfig(), recipe_text="", identity={}).latest()
    began_at = group.agree(read_manifest(latest)["step"] if latest else 0)
    if group.rank == 0:
        (Path(payload["marks"]) / f"began_{began_at}_with_{group.world_size}").touch()
    return assemble.run_worker(payload, Accident(channel, payload, group.rank, began_at))


def slow_driver(recipe: str, pause_s: str) -> int:
    """`tftrain run` with a pause before every step, so that a signal meets a run under way."""
    launch, more = tftrain.run.launch, {"kills": [], "marks": str(Path(recipe).parent), "pause_s": float(pause_s)}
    tftrain.run.launch = lambda worker, payload, *rest, **options: launch(
        "killed_worker:run", {**payload, **more}, *rest, **options
    )
    return cli.main(["run", recipe])


if __name__ == "__main__":
    sys.exit(slow_driver(*sys.argv[1:]))
