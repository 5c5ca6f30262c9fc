"""A disk that fills during a save, on a real small filesystem: the checkpoint before it stays, and stays the newest."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from gloo import run_ranks
from toy import TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.cells.contract import Cells
from tftrain.errors import CheckpointError, TrainingError
from tftrain.training import checkpoint
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, Progress
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import join_group
from tftrain.training.metrics import MetricsWriter
from tftrain.training.optim import OptimConfig
from tftrain.training.resume import restore
from tftrain.training.trainer import TrainConfig, Trainer

MIB = 2**20
WIDTH = 1000
"""A million weights: a checkpoint of 17 MiB, with two moments and the weights whole."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 80 MiB in memory; skipped where mounting is not permitted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a filesystem")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def free_bytes(disk: Path) -> int:
    import shutil

    return shutil.disk_usage(disk).free


def train(out: str, stage: int | None, n_steps: int, fill_to: int | None) -> tuple[str, int]:
    """A run that saves after every second step; before the fourth rank 0 fills the disk but for `fill_to` bytes.
    Returns the error's message and the steps done."""
    group = join_group()
    store = CheckpointStore(out, CheckpointConfig(2), recipe_text="", identity={})
    latest = group.agree(store.latest() if group.rank == 0 else None)
    torch.manual_seed(0)
    engine = build_engine(TOY.build(ToyConfig(width=WIDTH), VOCAB), EngineConfig(stage, "fp32"), OptimConfig(), group)
    progress = Progress()
    if latest:
        progress = Progress.of(checkpoint.read_manifest(latest))
        restore(engine, latest, "shards")

    def fill_the_disk(step: int, metrics: dict[str, float]) -> None:
        if fill_to is not None and step == 4:
            n_bytes = free_bytes(Path(out).parent) - fill_to
            (Path(out).parent / "ballast").write_bytes(bytes(n_bytes))

    trainer = Trainer(
        engine=engine,
        architecture=TOY,
        model_config=None,
        vocab=VOCAB,
        config=TrainConfig(cells_per_step=8, tokens_per_gpu=1000, steps=n_steps, heldout_every_steps=None),
        optim=OptimConfig(),
        total_steps=n_steps,
        seed=0,
        steps=toy_steps(toy_cells(64), 8, n_steps, rank=group.rank, world=group.world_size, cursor=progress.cursor),
        heldout=Cells.empty(),
        report=fill_the_disk,
        store=store,
        progress=progress,
    )
    try:
        trainer.run()
    except CheckpointError as error:
        return str(error), trainer.progress.step
    return "", trainer.progress.step


def judge(disk: Path, outcomes: list[tuple[str, int]], again: list[tuple[str, int]] | None = None) -> None:
    assert len({message for message, _ in outcomes}) == 1, "all ranks say the same"
    message, step = outcomes[0]
    assert step == 4
    assert "step_00000004 could not be saved (rank " in message, message
    assert "older checkpoints are intact: make room" in message
    folder = CheckpointStore(f"{disk}/run", CheckpointConfig(), recipe_text="", identity={}).latest()
    assert folder is not None
    assert folder.path.endswith("step_00000002")
    assert checkpoint.load_weights(folder)["gene.weight"].shape == (50, WIDTH)
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step_00000002"], "room is given back"


@pytest.mark.parametrize("left_bytes", [0, 1 * MIB, 10 * MIB], ids=["nothing", "1 MiB", "10 MiB"])
@pytest.mark.parametrize("stage", [None, 2])
def test_one_rank(small_disk: Path, stage: int | None, left_bytes: int) -> None:
    judge(small_disk, [train(f"{small_disk}/run", stage, 6, left_bytes)])
    (small_disk / "ballast").unlink()
    assert train(f"{small_disk}/run", stage, 6, None) == ("", 6), "with room the same command continues"


def test_two_ranks(small_disk: Path) -> None:
    outcomes = run_ranks(2, train, f"{small_disk}/run", 2, 6, 6 * MIB)
    judge(small_disk, outcomes)


def test_metrics_on_a_full_disk_end_the_run_with_a_message(small_disk: Path) -> None:
    writer = MetricsWriter(str(small_disk))
    writer.write(1, {"train/loss": 1.0})
    (small_disk / "ballast").write_bytes(bytes(free_bytes(small_disk)))

    def fill() -> None:
        for step in range(2, 500):
            writer.write(step, {"train/loss": 1.0})

    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written .*make room"):
        fill()
