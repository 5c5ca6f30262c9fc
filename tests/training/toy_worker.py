"""A worker function for the launcher's tests; workers import it, so it is no part of a test file."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from toy import TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.errors import CellsError
from tftrain.launch import Channel
from tftrain.training import checkpoint, resume
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, Progress
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import join_group
from tftrain.training.metrics import MetricsWriter
from tftrain.training.optim import OptimConfig
from tftrain.training.trainer import TrainConfig, Trainer


def train(payload: Mapping[str, Any], channel: Channel) -> dict[str, Any]:
    """Trains the toy as `assemble` trains the real model: resume, stream, engine, store, metrics."""
    group = join_group()
    if group.rank == payload.get("bad_rank"):
        raise CellsError("source a: cell 7 has count -1; counts are whole numbers above 0")
    if payload.get("is_bug"):
        raise ZeroDivisionError("a bug of ours")
    logging.getLogger("tftrain.test").info("rank %d of %d", group.rank, group.world_size)
    store = CheckpointStore(payload["out"], CheckpointConfig(4), recipe_text="", identity={})
    found = group.agree(store.latest() if group.rank == 0 else None)
    torch.manual_seed(0)
    engine = build_engine(TOY.build(ToyConfig(), VOCAB), EngineConfig(2), OptimConfig(lr=1e-2), group)
    progress = Progress()
    if found:
        manifest = checkpoint.read_manifest(found)
        progress = Progress.of(manifest)
        resume.restore(engine, found, "shards")
    writer = MetricsWriter(payload["out"], resume_step=progress.step) if group.rank == 0 else None

    def report(step: int, metrics: dict[str, float]) -> None:
        writer.write(step, metrics)
        channel.report(step, payload["n_steps"], metrics)
        if step == payload.get("kill_after") and not found:
            os.kill(os.getpid(), signal.SIGKILL)

    outcome = Trainer(
        engine=engine,
        architecture=TOY,
        model_config=None,
        vocab=VOCAB,
        config=TrainConfig(cells_per_step=8, tokens_per_gpu=30, steps=payload["n_steps"], heldout_every_steps=5),
        optim=OptimConfig(lr=1e-2),
        total_steps=payload["n_steps"],
        seed=0,
        steps=toy_steps(
            toy_cells(64), 8, payload["n_steps"], rank=group.rank, world=group.world_size, cursor=progress.cursor
        ),
        heldout=toy_cells(16, seed=1).slice(
            group.rank * 16 // group.world_size, (group.rank + 1) * 16 // group.world_size
        ),
        report=report,
        store=store,
        progress=progress,
        is_stop_asked=channel.is_stop_asked,
    ).run()
    return {"outcome": outcome, "began_at": progress.step, "world_size": group.world_size}
