"""The loop: what it reports, when it stops, whom it names when the loss is no number."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks
from toy import TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.cells.contract import Cells
from tftrain.errors import CellsError, RecipeError, TrainingError
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import join_group
from tftrain.training.optim import OptimConfig
from tftrain.training.prefetch import Prefetch
from tftrain.training.trainer import TrainConfig, Trainer

OPTIM = OptimConfig(lr=1e-2)


def make(n_steps: int = 6, *, dropout: float = 0.0, heldout: Cells | None = None, **more: Any) -> tuple[Trainer, list]:
    """A trainer of the toy on this rank, and the list that its reports go to."""
    group = join_group()
    torch.manual_seed(0)
    engine = build_engine(TOY.build(ToyConfig(dropout=dropout), VOCAB), EngineConfig(2), OPTIM, group)
    reports: list[tuple[int, dict[str, float]]] = []
    settings = {"cells_per_step": 8, "tokens_per_gpu": 30, "steps": n_steps, "heldout_every_steps": 3}
    trainer = Trainer(
        engine=engine,
        architecture=TOY,
        model_config=None,
        vocab=VOCAB,
        config=TrainConfig(**{**settings, **more}),
        optim=OPTIM,
        total_steps=n_steps,
        seed=0,
        steps=toy_steps(toy_cells(64), 8, n_steps, rank=group.rank, world=group.world_size),
        heldout=toy_cells(16, seed=1) if heldout is None else heldout,
        report=lambda step, metrics: reports.append((step, metrics)),
        epoch_of=lambda cursor: cursor / 64,
        source_names=["pancreas"],
    )
    return trainer, reports


def test_reports_have_the_agreed_names() -> None:
    trainer, reports = make()
    assert trainer.run() == "finished"
    assert [step for step, _ in reports] == [1, 2, 3, 4, 5, 6]
    always = {
        *("train/loss", "train/loss_gene", "train/loss_count", "train/lr", "train/grad_norm", "train/epoch"),
        *("perf/step_s", "perf/cells_per_s", "perf/tokens_per_s", "perf/data_wait_fraction", "perf/memory_peak_gib"),
    }
    heldout = {"val/loss", "val/loss_gene", "val/loss_count"}
    for step, metrics in reports:
        assert set(metrics) == (always | heldout if step % 3 == 0 else always)
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["train/loss"] == pytest.approx(metrics["train/loss_gene"] + metrics["train/loss_count"])
    assert reports[-1][1]["train/epoch"] == 48 / 64


def test_fewer_lines_where_asked() -> None:
    trainer, reports = make(7, log_every_steps=4, heldout_every_steps=None)
    trainer.run()
    assert [(step, "val/loss" in metrics) for step, metrics in reports] == [(4, False), (7, True)]


def test_without_held_out_cells_there_is_no_held_out_loss() -> None:
    trainer, reports = make(3, heldout=Cells.empty())
    trainer.run()
    assert not any(name.startswith("val/") for _, metrics in reports for name in metrics)


def test_held_out_loss_has_no_chance_in_it() -> None:
    trainer, _ = make(3, dropout=0.5)
    trainer.run()
    assert trainer.heldout_metrics() == trainer.heldout_metrics()
    first, second = make(3, dropout=0.5), make(3, dropout=0.5)
    for trainer, _ in (first, second):
        trainer.run()
    losses = [[metrics["train/loss"] for _, metrics in reports] for _, reports in (first, second)]
    assert losses[0] == losses[1], "dropout depends on seed, step and rank alone"


def stop_asked_on_rank_1() -> tuple[str, int]:
    """Rank 1 is asked to stop before the third step."""
    trainer, _ = make(20)

    def steps() -> Iterator[tuple[Cells, int]]:
        for index, item in enumerate(toy_steps(toy_cells(64), 8, 20)):
            yield item
            # The thread that reads runs ahead: wait until the step before has been done.
            until = time.monotonic() + 1
            while trainer.progress.step < index and time.monotonic() < until:
                time.sleep(0.01)
            if index == 2 and trainer.engine.group.rank == 1:
                trainer.is_stop_asked = lambda: True

    trainer.steps = steps()
    return trainer.run(), trainer.progress.step


def nan_on_rank_1() -> tuple[str, list[str]]:
    """One gene of one of rank 1's cells gives a loss that is no number: the error of this rank, and the cells that have
    it.
    """
    trainer, _ = make(20, tokens_per_gpu=13)
    gene = int(toy_cells(64).take(np.array([17])).gene_N[0])
    with torch.no_grad():
        trainer.engine.module.frozen[gene] = math.nan
    # Only rank 1 has the gene, in one cell of its third step: rank 0 is given cells without it.
    cells = toy_cells(64)
    has_gene_C = np.array([gene in cells.slice(c, c + 1).gene_N for c in range(64)])
    clean = np.flatnonzero(~has_gene_C)[:4]
    rows = [clean, clean, np.array([*clean[:3], 17]) if trainer.engine.group.rank == 1 else clean]
    trainer.steps = ((cells.take(row), 8 * index) for index, row in enumerate(rows, start=1))
    trainer.heldout = Cells.empty()
    try:
        trainer.run()
    except TrainingError as error:
        return str(error), [f"pancreas:{joinid}" for joinid in rows[-1]]
    raise AssertionError("not refused")


def both() -> tuple:
    """One pair of processes for two tests."""
    return stop_asked_on_rank_1(), nan_on_rank_1()


def test_what_one_rank_meets_all_ranks_do() -> None:
    (stopped_0, nan_0), (stopped_1, nan_1) = run_ranks(2, both)
    assert stopped_0 == stopped_1
    assert stopped_0[0] == "stopped"
    assert 3 <= stopped_0[1] <= 5, "at the end of the step under way"
    assert nan_0[0] == nan_1[0], "all ranks say the same"
    assert nan_0[0].startswith("step 3: the loss is not finite (loss sum nan")
    named = re.findall(r"pancreas:\d+", nan_0[0])
    assert "pancreas:17" in named
    assert len(named) < len(nan_1[1]), "a cell of another micro-batch is not blamed"
    assert set(named) <= set(nan_1[1])
    assert "there is no checkpoint yet" in nan_0[0]


def test_an_error_while_reading_is_raised_as_it_is() -> None:
    trainer, reports = make(6)

    def steps() -> Iterator[tuple[Cells, int]]:
        yield from toy_steps(toy_cells(64), 8, 2)
        raise CellsError("store a: block 3 cannot be read")

    trainer.steps = steps()
    with pytest.raises(CellsError, match="block 3 cannot be read"):
        trainer.run()
    assert len(reports) == 2


def test_prefetch_keeps_order_and_ends_its_source() -> None:
    is_closed = []

    def source() -> Iterator[int]:
        try:
            yield from range(100)
        finally:
            is_closed.append(True)

    ahead = Prefetch(source(), lambda x: x * x, depth=2)
    assert [next(ahead) for _ in range(3)] == [0, 1, 4]
    ahead.close()
    assert is_closed == [True]
    assert list(Prefetch([1, 2], str)) == ["1", "2"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 5, "epochs": 1.0}, "train.steps is 5 and train.epochs is 1.0; give exactly one"),
        ({}, "train.steps is None and train.epochs is None; give exactly one"),
        ({"steps": 0}, "train.steps is 0; it must be above 0"),
        ({"steps": 5, "log_every_steps": -1}, "train.log_every_steps is -1; it must be above 0"),
    ],
)
def test_bad_config(settings: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        TrainConfig(cells_per_step=8, tokens_per_gpu=30, **settings)


def test_checkpoints_on_storage_without_local_files(tmp_path: Path) -> None:
    import pyarrow.fs as pafs

    from tftrain.training import checkpoint, resume
    from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, Progress
    from tftrain.training.folder import Folder

    # As on an object store: files only come and go through the filesystem's own words.
    (tmp_path / "bucket").mkdir()
    filesystem = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())
    store = CheckpointStore("unused", CheckpointConfig(keep_last=1), recipe_text="task: toy\n", identity={})
    store.folder = Folder(filesystem, "run/checkpoints", "s3://bucket/run/checkpoints")
    trainer, _ = make(6)
    trainer.store = store
    trainer.run()
    store.save(trainer.engine, Progress(7, 56))
    latest = store.latest()
    assert latest is not None
    assert latest.local is None
    assert store.folder.names() == ["step_00000007"]
    saved = trainer.engine.weights()
    assert checkpoint.load_weights(latest).keys() == saved.keys()
    again, _ = make(6)
    resume.restore(again.engine, latest, "shards")
    for name, value in again.engine.weights().items():
        assert torch.equal(value, saved[name])
