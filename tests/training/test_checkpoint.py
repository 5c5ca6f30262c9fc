"""Checkpoints: what is marked is whole, what does not belong is refused, and a resumed run is the unbroken one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gloo import run_ranks
from toy import TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.cells.contract import Cells
from tftrain.errors import CheckpointError, RecipeError
from tftrain.training import checkpoint, resume
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, Progress
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.folder import Folder
from tftrain.training.group import join_group
from tftrain.training.optim import OptimConfig
from tftrain.training.trainer import TrainConfig, Trainer

IDENTITY = {
    "genes_hash": "g",
    "table_hash": "t",
    "plan_fingerprint": "p",
    "plan": {"seed": 0, "sources": [{"name": "a", "n_cells": 64}]},
}
N_STEPS = 12


def run(
    out: str, zero_stage: int | None, n_steps: int, save_every: int | None = 4, keep_last: int | None = None
) -> dict[int, float]:
    """Trains to step `n_steps` of a run of N_STEPS, from the newest checkpoint in `out`; the loss of each step done
    here.
    """
    group = join_group()
    store = CheckpointStore(out, CheckpointConfig(save_every, keep_last), recipe_text="task: toy\n", identity=IDENTITY)
    found = group.agree(store.latest() if group.rank == 0 else None)
    config = EngineConfig(zero_stage, "fp32")
    torch.manual_seed(0)
    module = TOY.build(ToyConfig(dropout=0.0), VOCAB)
    progress, how = Progress(), "shards"
    if found:
        manifest = checkpoint.read_manifest(found)
        resume.check_manifest(manifest, IDENTITY)
        progress = Progress(manifest["step"], manifest["cursor"])
        how = resume.how_to_resume(manifest, zero_stage=zero_stage, world_size=group.world_size, precision="fp32")
        if how == "weights":
            resume.apply_weights(module, checkpoint.load_weights(found))
    engine = build_engine(module, config, OptimConfig(lr=1e-2), group)
    if found:
        resume.restore(engine, found, how)
    losses: dict[int, float] = {}
    trainer = Trainer(
        engine=engine,
        architecture=TOY,
        model_config=None,
        vocab=VOCAB,
        config=TrainConfig(cells_per_step=6, tokens_per_gpu=30, steps=N_STEPS, heldout_every_steps=4),
        optim=OptimConfig(lr=1e-2),
        total_steps=N_STEPS,
        seed=0,
        steps=toy_steps(toy_cells(64), 6, N_STEPS, rank=group.rank, world=group.world_size, cursor=progress.cursor),
        heldout=toy_cells(8, seed=1) if group.rank == 0 else Cells.empty(),
        report=lambda step, metrics: losses.__setitem__(step, metrics["train/loss"]),
        store=store,
        progress=progress,
    )
    trainer.is_stop_asked = lambda: trainer.progress.step == n_steps - 1
    assert trainer.run() == ("finished" if n_steps == N_STEPS else "stopped")
    assert trainer.progress.step == n_steps
    return losses


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    return run(str(tmp_path_factory.mktemp("unbroken")), None, N_STEPS)


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_a_resumed_run_is_the_unbroken_one(stage: int | None, tmp_path: Path, unbroken: dict) -> None:
    first, second = run(str(tmp_path), stage, 5), run(str(tmp_path), stage, N_STEPS)
    assert (list(first), list(second)) == ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11, 12])
    np.testing.assert_allclose([*first.values(), *second.values()], list(unbroken.values()), rtol=1e-5)
    assert run(str(tmp_path), stage, N_STEPS) == {}, "a finished run has nothing left to do"


def begun(folder: str) -> None:
    """Five steps at every stage, each in its folder."""
    for stage in (0, 1, 2, 3):
        run(f"{folder}/{stage}", stage, 5)


def continued(folder: str, to_step: int) -> list[list[float]]:
    """The next losses of every run that `begun` began, up to `to_step`."""
    return [list(run(f"{folder}/{stage}", stage, to_step).values()) for stage in (0, 1, 2, 3)]


def test_another_number_of_ranks_continues(tmp_path: Path, unbroken: dict) -> None:
    """2 -> 1 -> 3 ranks, every stage to itself; stage 2 to stage 3."""
    run_ranks(2, begun, str(tmp_path))
    shutil.copytree(tmp_path / "2", tmp_path / "2to3")
    expected = list(unbroken.values())
    for losses in continued(str(tmp_path), 8):
        np.testing.assert_allclose(losses, expected[5:8], rtol=1e-4)
    for losses in run_ranks(3, continued, str(tmp_path), N_STEPS)[0]:
        np.testing.assert_allclose(losses, expected[8:], rtol=1e-4)
    # Weights and schedule continue, AdamW's moments begin anew.
    other_stage = list(run(str(tmp_path / "2to3"), 3, N_STEPS).values())
    np.testing.assert_allclose(other_stage[0], expected[5], rtol=1e-4)
    np.testing.assert_allclose(other_stage, expected[5:], rtol=0.05)


def test_the_folder_explains_itself(tmp_path: Path) -> None:
    run(str(tmp_path), 2, N_STEPS, keep_last=2)
    folders = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert folders == ["step_00000008", "step_00000012"], "the oldest is pruned"
    folder = Folder.at(tmp_path) / "checkpoints" / "step_00000012"
    manifest = checkpoint.read_manifest(folder)
    expected = {"step": 12, "cursor": 72, "world_size": 1, "zero_stage": 2, "precision": "fp32", "genes_hash": "g"}
    assert {key: manifest[key] for key in expected} == expected
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["metrics"]["val/loss"] > 0
    assert checkpoint.read_recipe(folder) == "task: toy\n"
    weights = checkpoint.load_weights(folder)
    module = TOY.build(ToyConfig(), VOCAB)
    assert weights.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    resume.apply_weights(module, weights)
    assert torch.equal(module.gene.weight.detach(), weights["gene.weight"])


def _saved(tmp_path: Path) -> tuple[CheckpointStore, Folder, Folder]:
    """A store with checkpoints of steps 1 and 2."""
    store = CheckpointStore(str(tmp_path), CheckpointConfig(), recipe_text="", identity=IDENTITY)
    engine = build_engine(TOY.build(ToyConfig(), VOCAB), EngineConfig(None), OptimConfig(), join_group())
    return store, store.save(engine, Progress(1, 8)), store.save(engine, Progress(2, 16))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: (path / "COMPLETE").unlink(), "has no COMPLETE marker, so it was never finished"),
        (lambda path: (path / "COMPLETE").write_text("{"), "its COMPLETE marker is cut short"),
        (lambda path: (path / "ds" / "plain.pt").unlink(), "ds/plain.pt is missing"),
        (lambda path: (path / "model.safetensors").write_bytes(b"short"), "model.safetensors has 5 bytes"),
    ],
)
def test_what_is_not_whole_does_not_exist(damage, message: str, tmp_path: Path) -> None:
    store, first, second = _saved(tmp_path)
    assert store.latest() == second
    damage(second.local)
    assert store.latest() == first
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_weights(second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"genes_hash": "other"}, r"the ordered gene vocabulary changed \(genes_hash g -> other\)"),
        ({"table_hash": "other"}, "the protein table changed"),
        (
            {"plan_fingerprint": "q", "plan": {"seed": 0, "sources": [{"name": "a", "n_cells": 63}]}},
            r"plan_fingerprint p -> q\)\n  sources.0.n_cells: 64 -> 63\n",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change: dict, message: str) -> None:
    resume.check_manifest(IDENTITY, IDENTITY)
    with pytest.raises(CheckpointError, match=message):
        resume.check_manifest(IDENTITY, IDENTITY | change)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    _, _, folder = _saved(tmp_path)
    manifest = json.loads(folder.read_text("manifest.json"))
    folder.write_text("manifest.json", json.dumps(manifest | {"format_version": 9}))
    folder.write_text(
        "COMPLETE", json.dumps({name: size for name, size in folder.sizes().items() if name != "COMPLETE"})
    )
    with pytest.raises(CheckpointError, match="checkpoint format 9 and this tftrain reads 1"):
        checkpoint.read_manifest(folder)


def test_weights_of_another_model_are_refused() -> None:
    module = TOY.build(ToyConfig(width=8), VOCAB)
    weights = {name: p.detach().clone() for name, p in TOY.build(ToyConfig(width=4), VOCAB).named_parameters()}
    del weights["rate.bias"]
    weights["extra"] = torch.zeros(1)
    with pytest.raises(
        CheckpointError,
        match=r"rate.bias is absent; extra is unknown to the model; frozen has shape \(50, 4\), .* and 6 more",
    ):
        resume.apply_weights(module, weights)


def test_a_save_that_fails_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    store, _, second = _saved(tmp_path)
    engine = build_engine(TOY.build(ToyConfig(), VOCAB), EngineConfig(2), OptimConfig(), join_group())
    # A file stands where a rank wants to write its shards.
    engine.save_shards, save_shards = _blocked(engine.save_shards), engine.save_shards  # type: ignore[method-assign]
    with pytest.raises(
        CheckpointError, match=r"step_00000003 could not be saved \(rank 0: .*older checkpoints are intact"
    ):
        store.save(engine, Progress(3, 24))
    assert store.latest() == second
    engine.save_shards = save_shards  # type: ignore[method-assign]
    assert store.save(engine, Progress(3, 24)) == store.latest()


def _blocked(save_shards):
    def save(folder: Path) -> None:
        (folder / "ds").mkdir(parents=True)
        (folder / "ds" / "mp_rank_00_model_states.pt").mkdir()
        save_shards(folder)

    return save


@pytest.mark.parametrize(
    ("manifest", "now", "expected"),
    [
        ((2, 2, "fp32"), (2, 2, "fp32"), "shards"),
        ((2, 2, "fp32"), (2, 1, "fp32"), "universal"),
        ((3, 2, "fp32"), (3, 3, "fp32"), "universal"),
        ((0, 2, "fp32"), (0, 1, "fp32"), "shards"),
        ((2, 2, "fp32"), (3, 2, "fp32"), "weights"),
        ((2, 2, "bf16"), (2, 2, "fp32"), "weights"),
    ],
)
def test_how_to_resume(manifest: tuple, now: tuple, expected: str) -> None:
    stage, world, precision = now
    saved = dict(zip(("zero_stage", "world_size", "precision"), manifest))
    assert resume.how_to_resume(saved, zero_stage=stage, world_size=world, precision=precision) == expected


def test_bad_config() -> None:
    with pytest.raises(RecipeError, match=r"checkpoint.keep_last is 0; it must be at least 1, or null"):
        CheckpointConfig(keep_last=0)
