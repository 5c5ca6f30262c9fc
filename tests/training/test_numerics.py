"""What is not finite never reaches the weights; averages, recomputed activations, compiled modules change no result."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks
from safetensors.torch import load_file
from toy import N_GENES, TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError, TrainingError
from tftrain.models.arch import architecture
from tftrain.training import checkpoint
from tftrain.training.average import Average
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.folder import Folder
from tftrain.training.group import join_group
from tftrain.training.optim import OptimConfig
from tftrain.training.profile import Profile, ProfileConfig
from tftrain.training.trainer import TrainConfig, Trainer

OPTIM = OptimConfig(lr=1e-2)
STAGES = (None, 0, 1, 2, 3)
N_STEPS = 6


def engine_of(stage: int | None, config: ToyConfig | None = None) -> Any:
    torch.manual_seed(0)
    return build_engine(TOY.build(config or ToyConfig(), VOCAB), EngineConfig(stage, "fp32"), OPTIM, join_group())


def trainer_of(engine: Any, steps: Iterator[tuple[Cells, int]] | None = None, **more: Any) -> tuple[Trainer, list]:
    group, reports = engine.group, []
    settings = {"cells_per_step": 8, "tokens_per_gpu": 30, "steps": N_STEPS, "heldout_every_steps": 3}
    settings |= {name: more.pop(name) for name in list(more) if name in TrainConfig.__dataclass_fields__}
    trainer = Trainer(
        engine=engine,
        architecture=TOY,
        model_config=ToyConfig(),
        vocab=VOCAB,
        config=TrainConfig(**settings),
        optim=OPTIM,
        total_steps=N_STEPS,
        seed=0,
        steps=steps or toy_steps(toy_cells(64), 8, N_STEPS, rank=group.rank, world=group.world_size),
        heldout=toy_cells(16, seed=1) if group.rank == 0 else Cells.empty(),
        report=lambda step, metrics: reports.append((step, metrics)),
        source_names=["pancreas"],
        **more,
    )
    return trainer, reports


def batches_of(cells: Cells) -> Any:
    return TOY.collate(cells, None, VOCAB, seed=0, shuffle_genes=True, max_tokens=1000)


def held_back(stage: int | None, is_loss: bool) -> dict[str, float]:
    """A bad step between two good ones, beside the two good ones alone: greatest difference of any weight."""
    gene = int(toy_cells(64).take(np.array([17])).gene_N[0])
    cells = toy_cells(64)
    clean_C = np.array([gene not in cells.slice(c, c + 1).gene_N for c in range(64)])
    good = batches_of(cells.take(np.flatnonzero(clean_C)[:8]))
    n_scored = sum(batch.n_scored for batch in good)
    config = ToyConfig(bad_gradient_gene=gene)
    engine, reference = engine_of(stage, config), engine_of(stage, config)
    for _ in range(2):
        reference.step(good, n_scored, 1e-2)
    engine.step(good, n_scored, 1e-2)
    bad = batches_of(cells.take(np.array([17])))
    if is_loss:
        bad[0].count_T[0] = math.inf
    result = engine.step(bad, n_scored, 1e-2)
    assert not result.is_finite
    assert math.isfinite(result.sums["loss"]) != is_loss
    engine.step(good, n_scored, 1e-2)
    after, expected = engine.weights(), reference.weights()
    return {name: float((after[name] - value).abs().max()) for name, value in expected.items()}


@pytest.mark.parametrize("is_loss", [True, False], ids=["loss", "gradient"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_bad_step_leaves_weights_moments_and_gradients_alone(stage: int | None, is_loss: bool) -> None:
    differences = held_back(stage, is_loss)
    assert max(differences.values()) == 0.0, differences


def planted(stage: int | None, n_bad: int, **more: Any) -> tuple[Trainer, list, int]:
    """`n_bad` steps that hold the cell 17, whose gradient alone is not finite."""
    cells = toy_cells(64)
    gene = int(cells.take(np.array([17])).gene_N[0])
    clean = np.flatnonzero([gene not in cells.slice(c, c + 1).gene_N for c in range(64)])
    engine = engine_of(stage, ToyConfig(bad_gradient_gene=gene))
    rank, world = engine.group.rank, engine.group.world_size
    rows = [np.roll(clean, -step * 8)[:8] for step in range(N_STEPS)]
    for step in range(2, 2 + n_bad):
        rows[step] = np.array([*rows[step][:7], 17])
    steps = ((cells.take(row[rank::world]), 8 * index) for index, row in enumerate(rows, start=1))
    return *trainer_of(engine, steps, **more), 17


@pytest.mark.parametrize("stage", [None, 0, 2])
def test_a_gradient_that_is_not_finite_names_its_cell(stage: int | None) -> None:
    trainer, reports, cell = planted(stage, 1)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    assert str(caught.value).startswith("step 3: the gradient is not finite")
    assert f"cells (source:soma_joinid) pancreas:{cell};" in str(caught.value)
    assert len(reports) == 2, "within one step"


def test_steps_are_left_out_where_the_recipe_allows_it(caplog: pytest.LogCaptureFixture) -> None:
    trainer, reports, _ = planted(2, 2, skip_nonfinite=2)
    assert trainer.run() == "finished"
    assert [metrics.get("train/skipped_steps") for _, metrics in reports] == [None, None, 1, 2, 2, 2]
    assert ["train/loss" in metrics for _, metrics in reports] == [True, True, False, False, True, True]
    assert "step 3 is left out (1 of at most 2): the gradient is not finite" in caplog.text
    assert "pancreas:17" in caplog.text
    trainer, reports, _ = planted(2, 2, skip_nonfinite=1)
    with pytest.raises(TrainingError, match=r"^step 4: .* and train.skip_nonfinite allows 1"):
        trainer.run()


def averaged(folder: str, stage: int | None) -> tuple[dict, dict, list]:
    """The averaged weights of a whole run, of one that was stopped and resumed, and the held-out losses."""
    found = []
    for name, stop_after in (("whole", None), ("halves", 3)):
        store = CheckpointStore(f"{folder}/{name}", CheckpointConfig(), recipe_text="", identity={})
        engine = engine_of(stage)
        trainer, reports = trainer_of(engine, store=store)
        trainer.average = Average(engine, 0.9, 2)
        if stop_after:
            trainer.is_stop_asked = lambda trainer=trainer, last=stop_after: trainer.progress.step == last - 1
        trainer.run()
        if stop_after:
            from tftrain.training.resume import restore

            latest = store.latest()
            assert latest is not None
            engine = engine_of(stage)
            restore(engine, latest, "shards")
            progress = checkpoint.Progress.of(checkpoint.read_manifest(latest))
            group = engine.group
            steps = toy_steps(
                toy_cells(64), 8, N_STEPS, rank=group.rank, world=group.world_size, cursor=progress.cursor
            )
            trainer, reports = trainer_of(engine, steps, store=store, progress=progress)
            saved = checkpoint.load_average(latest) if group.rank == 0 else None
            trainer.average = Average(engine, 0.9, 2, saved)
            trainer.run()
        found.append({k: v.numpy() for k, v in trainer.average.weights.items()})
    return found[0], found[1], [metrics.get("val/loss") for _, metrics in reports]


def averaged_on_ranks(folder: str) -> list:
    return [averaged(f"{folder}/{stage}", stage) for stage in (2, 3)]


def reference_average() -> tuple[dict[str, torch.Tensor], float]:
    """The same average in five lines, and the held-out loss of a module that holds it."""
    engine, mean = engine_of(None), {}
    mean = engine.weights()
    for step, (cells, _) in enumerate(toy_steps(toy_cells(64), 8, N_STEPS), start=1):
        from tftrain.training.optim import learning_rate

        batches = batches_of(cells)
        engine.step(batches, sum(b.n_scored for b in batches), learning_rate(OPTIM, step - 1, N_STEPS))
        if step % 2 == 0:
            d = min(0.9, (1 + step) / (10 + step)) ** 2
            mean = {k: d * mean[k] + (1 - d) * v for k, v in engine.weights().items()}
    engine.module.load_state_dict(mean, strict=False)
    heldout = batches_of(toy_cells(16, seed=1))
    return mean, engine.evaluate(heldout)["loss"] / sum(b.n_scored for b in heldout)


def test_an_average_of_the_weights_is_kept_saved_and_resumed(tmp_path: Path) -> None:
    expected, heldout = reference_average()
    runs = [averaged(f"{tmp_path}/1_{stage}", stage) for stage in (None, 0)]
    ranks = run_ranks(2, averaged_on_ranks, f"{tmp_path}/2")
    runs += ranks[0]
    assert [part[0] for part in ranks[1]] == [{}, {}], "rank 0 alone keeps it"
    for whole, halves, losses in runs:
        for name, value in expected.items():
            np.testing.assert_allclose(whole[name], value.numpy(), atol=2e-4, err_msg=name)
            np.testing.assert_allclose(halves[name], whole[name], atol=1e-6, err_msg=name)
        assert losses[-1] == pytest.approx(heldout, rel=1e-4)
    folder = tmp_path / "1_0" / "whole" / "checkpoints" / f"step_{N_STEPS:08d}"
    saved = load_file(folder / "ema.safetensors")
    np.testing.assert_allclose(saved["gene.weight"].numpy(), runs[1][0]["gene.weight"])
    plain, chosen = checkpoint.load_weights(str(folder)), checkpoint.load_weights(str(folder), is_averaged=True)
    assert torch.equal(chosen["gene.weight"], saved["gene.weight"])
    assert not torch.equal(plain["gene.weight"], saved["gene.weight"])


def test_the_best_checkpoints_stay(tmp_path: Path) -> None:
    store = CheckpointStore(str(tmp_path), CheckpointConfig(1, keep_last=1, keep_best=2), recipe_text="", identity={})
    trainer, reports = trainer_of(engine_of(None), store=store, heldout_every_steps=100)
    losses = iter([3.0, 1.0, 2.0, 1.5, 5.0, 4.0])
    trainer.heldout_metrics = lambda: {"val/loss": next(losses)}  # type: ignore[method-assign]
    trainer.run()
    assert store.folder.names() == ["step_00000002", "step_00000004", "step_00000006"]
    assert [metrics["val/loss"] for _, metrics in reports] == [3.0, 1.0, 2.0, 1.5, 5.0, 4.0]


def test_a_profile_is_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    trainer, _ = trainer_of(engine_of(None), profile=Profile(ProfileConfig(3, 2), str(tmp_path), 0))
    trainer.run()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "steps_3_4.rank_0.json"
    names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step#AdamW") for name in names) == 2
    with pytest.raises(RecipeError, match=r"profile.steps is 0"):
        ProfileConfig(1, 0)


def test_mfu_counts_real_tokens_by_the_architecture(tmp_path: Path) -> None:
    trainer, reports = trainer_of(engine_of(None), device_tflops=1e-6, tokens_per_gpu=1000)
    trainer.run()
    lengths = toy_cells(64).n_expressed_C
    for step, metrics in reports:
        of_step = lengths[8 * (step - 1) : 8 * step]
        flop = 3 * sum(100.0 * n + n**2 for n in of_step)
        assert metrics["perf/mfu"] == pytest.approx(flop / metrics["perf/step_s"] / 1e6)
    trainer, reports = trainer_of(engine_of(None))
    trainer.run()
    assert "perf/mfu" not in reports[0][1], "without a peak there is no share of it"


def subject(arch: str) -> tuple[Any, Any, Any]:
    """An architecture, its configuration with dropout, and its vocabulary."""
    if arch == "toy":
        return TOY, ToyConfig(dropout=0.2), VOCAB
    arch_ = architecture(arch)
    config = arch_.Config(
        layers=3, heads=2, width=16, feedforward_width=32, gene_head_width=16, genes_per_cell=16, assays=[]
    )
    protein_GE = np.random.default_rng(0).normal(size=(N_GENES, 12)).astype(np.float32)
    return arch_, config, Vocab.of([f"ENSG{gene:011d}" for gene in range(N_GENES)], protein_GE)


def losses_and_gradients(arch: str, is_checkpointed: bool) -> tuple[list[float], list[torch.Tensor], int]:
    """Loss and gradients of one batch with dropout, and elements kept for the backward pass."""
    arch_, config, vocab = subject(arch)
    torch.manual_seed(0)
    module = arch_.build(config, vocab).train()
    if is_checkpointed:
        arch_.checkpoint_activations(module)
    (batch,) = arch_.collate(toy_cells(16), config, vocab, seed=0, shuffle_genes=True, max_tokens=1000)
    kept: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(batch)
        n_kept = sum(kept)
    out["loss"].backward()
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return [float(value.detach()) for value in out.values()], gradients, n_kept


@pytest.mark.parametrize("arch", ["toy", "transcriptformer"])
def test_recomputed_activations_change_memory_alone(arch: str) -> None:
    losses, gradients, n_kept = losses_and_gradients(arch, False)
    again, gradients_again, n_kept_again = losses_and_gradients(arch, True)
    assert losses == again
    assert len(gradients) == len(gradients_again)
    for one, other in zip(gradients, gradients_again):
        torch.testing.assert_close(one, other)
    assert n_kept_again < n_kept


@pytest.mark.parametrize("arch", ["toy", "transcriptformer"])
def test_a_compiled_module_computes_the_same(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The graphs are captured as on a GPU, and then run as they are: compiling C++ would take minutes here.
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    arch_, config, vocab = subject(arch)
    losses = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        engine_config = EngineConfig(None, "fp32", compile=is_compiled)
        engine = build_engine(arch_.build(config, vocab), engine_config, OPTIM, join_group())
        assert (engine.module._compiled_call_impl is not None) == is_compiled
        for cells in (toy_cells(8), toy_cells(8, seed=2)):
            batches = arch_.collate(cells, config, vocab, seed=0, shuffle_genes=True, max_tokens=1000)
            torch.manual_seed(1)
            losses.append(engine.step(batches, batches[0].n_scored, 1e-2).sums["loss"])
    np.testing.assert_allclose(losses[2:], losses[:2], rtol=1e-5)


def test_a_slow_upload_does_not_hold_training_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage that is no local disk: the marker follows when all files have arrived, steps later."""
    import threading

    import pyarrow.fs as pafs

    (tmp_path / "bucket").mkdir()
    filesystem = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())
    store = CheckpointStore("unused", CheckpointConfig(2), recipe_text="", identity={})
    store.folder = Folder(filesystem, "run/checkpoints", "s3://bucket/run/checkpoints")
    gate, upload = threading.Event(), Folder.upload
    monkeypatch.setattr(Folder, "upload", lambda self, source: (gate.wait(20), upload(self, source)))
    trainer, _ = trainer_of(engine_of(2), store=store)
    seen: list[tuple[int, bool]] = []

    def report(step: int, metrics: dict[str, float]) -> None:
        seen.append((step, store.folder_of(2).exists("COMPLETE")))
        if step == 3:
            gate.set()

    saved: list[tuple[str, int]] = []
    trainer.report, trainer.on_saved = report, lambda folder, step: saved.append((folder.uri[-1], step))
    trainer.run()
    assert seen[:3] == [(1, False), (2, False), (3, False)], "training went on while files were on their way"
    assert [name for name, _ in saved] == ["2", "4", "6"]
    assert saved[0][1] in (3, 4)
