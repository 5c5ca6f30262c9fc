"""Adapters: one optimiser at every ZeRO stage, a base that stays as it was, files that PEFT itself reads."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks
from safetensors.torch import load_file
from toy import N_GENES, TOY, VOCAB, ToyConfig, toy_cells

from tftrain.cells.labels import Labels, fit
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError, CheckpointError, RecipeError
from tftrain.models.arch import architecture
from tftrain.models.heads import HeadConfig, Labeller, LabellingArchitecture
from tftrain.training import lora
from tftrain.training.adapter import TunedFiles
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, Progress
from tftrain.training.early import EarlyStop, EarlyStopConfig
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import join_group
from tftrain.training.lora import LoraBlock
from tftrain.training.optim import OptimConfig
from tftrain.training.trainer import agree_step

ARCH = architecture("transcriptformer")
CONFIG = ARCH.Config(
    layers=2, heads=2, width=16, feedforward_width=32, gene_head_width=16, genes_per_cell=16, assays=[], dropout=0.0
)
GENES = Vocab.of(
    [f"ENSG{gene:011d}" for gene in range(N_GENES)],
    np.random.default_rng(0).normal(size=(N_GENES, 12)).astype(np.float32),
)
KINDS = ["a", "b", "unknown", "c"]
LABELS = Labels("kind", "classify", ("a", "b", "c"), (1.0, 2.0, 1.0))
HEAD = HeadConfig("classify", "kind", generative_weight=0.5)
OPTIM = OptimConfig(eps=1e-4)
STAGES = (0, 2, 3)
TASKS = [(stage, with_head, block) for stage in STAGES for with_head, block in ((False, "plain"), (True, "whole"))]
BLOCKS = {
    "plain": LoraBlock(r=4),
    "whole": LoraBlock(r=2, use_rslora=True, modules_to_save=["norm1", "mu.gene_embedding"]),
}


def cells_of(rank: int = 0, world: int = 1) -> Any:
    cells = toy_cells(24)
    cells = replace(cells, obs={"kind": np.array(KINDS * 6, object)})
    return cells.take(np.arange(24)[rank::world])


def base_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return ARCH.build(CONFIG, GENES)


def adapt(stage: int | None, with_head: bool, block: str, folder: str | None = None) -> dict[str, Any]:
    """Six steps; what rank 0 has of the trained weights, the sums, and the files of a checkpoint in `folder`."""
    group, module = join_group(), base_module()
    torch.manual_seed(1)
    lora.wrap(module, BLOCKS[block], ARCH.lora_targets(module))
    arch: Any = ARCH
    if with_head:
        module, arch = Labeller(module, CONFIG.width, LABELS, HEAD), LabellingArchitecture(ARCH, LABELS, HEAD)
    engine = build_engine(module, EngineConfig(stage), OPTIM, group)

    def step() -> Any:
        cells = cells_of(group.rank, group.world_size)
        batches = arch.collate(cells, CONFIG, GENES, seed=0, shuffle_genes=True, max_tokens=30)
        return agree_step(group, batches, arch.empty(CONFIG, GENES))

    sums = []
    for _ in range(6):
        agreed = step()
        result = engine.step(agreed.batches, agreed.n_scored, 1e-2)
        sums.append({name: value / agreed.n_scored for name, value in result.sums.items()})
    if folder:
        files = TunedFiles(module, {"base_hash": "h"}, check=step, heldout=step if with_head else None)
        store = CheckpointStore(folder, CheckpointConfig(), recipe_text="", identity={}, companion=files)
        store.save(engine, Progress(6, 6 * 24))
    return {"weights": {name: value.numpy() for name, value in engine.weights().items()}, "sums": sums}


def adapt_all(folder: str) -> list[dict[str, Any]]:
    return [adapt(*task, f"{folder}/{'-'.join(map(str, task))}") for task in TASKS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two_ranks(saved: Path) -> list[dict[str, Any]]:
    return run_ranks(2, adapt_all, str(saved))[0]


@pytest.fixture(scope="module")
def plain() -> dict[tuple, dict[str, Any]]:
    """Torch alone on one rank."""
    return {task[1:]: adapt(None, *task[1:]) for task in TASKS[:2]}


@pytest.mark.parametrize("number", range(len(TASKS)), ids=[str(task) for task in TASKS])
def test_every_stage_gives_the_same_adapter(number: int, two_ranks: list, plain: dict) -> None:
    got, expected = two_ranks[number], plain[TASKS[number][1:]]
    assert got["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        np.testing.assert_allclose(got["weights"][name], value, atol=1e-4, err_msg=name)
    for one, other in zip(got["sums"], expected["sums"]):
        assert one == pytest.approx(other, rel=1e-4)
    assert got["sums"][-1]["loss"] < got["sums"][0]["loss"] - 0.01


@pytest.mark.parametrize("number", range(len(TASKS)), ids=[str(task) for task in TASKS])
def test_peft_reads_the_files_and_merging_changes_nothing(number: int, two_ranks: list, saved: Path) -> None:
    from peft import PeftModel

    stage, with_head, block = TASKS[number]
    folder = saved / f"{stage}-{with_head}-{block}" / "checkpoints" / "step_00000006" / "adapter"
    live = base_module()
    before = {name: value.clone() for name, value in live.state_dict().items()}
    torch.manual_seed(1)
    lora.wrap(live, BLOCKS[block], ARCH.lora_targets(live))
    prefix = "base." if with_head else ""
    trained = {name: torch.from_numpy(value) for name, value in two_ranks[number]["weights"].items()}
    own = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
    assert not live.load_state_dict(own, strict=False).unexpected_keys
    loaded = PeftModel.from_pretrained(base_module(), str(folder))  # type: ignore[arg-type]
    batch = ARCH.collate(cells_of(), CONFIG, GENES, seed=0, shuffle_genes=False, max_tokens=1000)[0]
    keys = ("embeddings", "llh", "gene_llh")
    expected, unmerged = ARCH.embed(live, batch, keys), ARCH.embed(loaded, batch, keys)
    merged = ARCH.embed(lora.merged(base_module(), folder), batch, keys)
    fresh = ARCH.embed(base_module(), batch, keys)
    for key in keys:
        torch.testing.assert_close(unmerged[key], expected[key], rtol=0, atol=1e-6)
        torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-5)
        assert not torch.allclose(expected[key], fresh[key], atol=1e-3), "the adapter was meant to change something"
    # The base is in the wrapped module as it was.
    state = live.state_dict()
    for name, value in before.items():
        kept = [key for key in state if _is_base_of(key, name)]
        assert len(kept) == 1, name
        assert torch.equal(state[kept[0]], value), name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["base_hash"], manifest["step"]) == ("h", 6)
    assert (folder / "head.safetensors").exists() == with_head
    if with_head:
        assert 1 / 3 < manifest["unknown"]["threshold"] < 1
        assert manifest["unknown"]["n_cells"] == 18, "cells without a label set no threshold"


def _is_base_of(key: str, name: str) -> bool:
    """Whether `key` of a wrapped module is `name` of the module."""
    return key.replace(".base_layer.", ".").replace(".original_module.", ".") == name


def test_the_whole_module_of_deepspeed_keeps_the_base_bit_for_bit() -> None:
    group, module = join_group(), base_module()
    lora.wrap(module, BLOCKS["plain"], ARCH.lora_targets(module))
    before = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    engine = build_engine(module, EngineConfig(2), OPTIM, group)
    for _ in range(3):
        batches = ARCH.collate(cells_of(), CONFIG, GENES, seed=0, shuffle_genes=True, max_tokens=1000)
        engine.step(batches, sum(batch.n_scored for batch in batches), 1e-2)
    after = dict(engine.module.named_parameters())
    assert len(before) == 39
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert not before.keys() & engine.weights().keys()


def test_trainable_share() -> None:
    module = base_module()
    lora.wrap(module, LoraBlock(r=4), ["transformer_encoder.encoder_layers.0.linear1"])
    n = sum(parameter.numel() for parameter in base_module().parameters())
    assert lora.trainable_share(module) == f"trains 192 of {n + 192:,} parameters ({100 * 192 / (n + 192):.2f} %)"


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (LoraBlock(target_modules=["linear3"]), r"'linear3', which matches no module; there are .*linear1, linear2"),
        (LoraBlock(target_modules=["linear1", "q_proj"]), "'q_proj', which matches no module"),
        (LoraBlock(target_modules=["gene_id_head.layers.4"]), r"GeneProjection, which takes no adapter; name it as"),
        (LoraBlock(modules_to_save=["heads"]), "lora.modules_to_save has 'heads', which matches no module"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(block: LoraBlock, message: str) -> None:
    module = base_module()
    with pytest.raises(RecipeError, match=message):
        lora.wrap(module, block, ARCH.lora_targets(module))


def test_dora_trains_and_merges(tmp_path: Path) -> None:
    module = base_module()
    lora.wrap(module, LoraBlock(r=2, use_dora=True), ARCH.lora_targets(module))
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in name for name in names)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    lora.save(module, dict(module.named_parameters()), tmp_path)
    batch = ARCH.collate(cells_of(), CONFIG, GENES, seed=0, shuffle_genes=False, max_tokens=1000)[0]
    merged = ARCH.embed(lora.merged(base_module(), tmp_path), batch, ("embeddings",))["embeddings"]
    torch.testing.assert_close(merged, ARCH.embed(module, batch, ("embeddings",))["embeddings"], rtol=0, atol=1e-5)


def _files(tmp_path: Path) -> tuple[CheckpointStore, Any]:
    group, module = join_group(), base_module()
    lora.wrap(module, BLOCKS["plain"], ARCH.lora_targets(module))
    engine = build_engine(module, EngineConfig(None), OPTIM, group)

    def step() -> Any:
        batches = ARCH.collate(cells_of(), CONFIG, GENES, seed=0, shuffle_genes=True, max_tokens=1000)
        return agree_step(group, batches, ARCH.empty(CONFIG, GENES))

    files = TunedFiles(module, {}, check=step)
    return CheckpointStore(str(tmp_path), CheckpointConfig(), recipe_text="", identity={}, companion=files), engine


def test_an_adapter_that_has_not_moved_is_no_checkpoint(tmp_path: Path) -> None:
    store, engine = _files(tmp_path)
    with pytest.raises(CheckpointError, match=r"12 tensors .*not moved from zero, such as base_model.model."):
        store.save(engine, Progress(3, 72))
    assert store.latest() is None
    assert store.save(engine, Progress(0, 0)), "before the first step it is zero by design"


def test_a_file_that_holds_something_else_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, engine = _files(tmp_path)
    with torch.no_grad():
        for parameter in engine.module.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    read = lora.read
    monkeypatch.setattr(lora, "read", lambda folder: {key: value * 1.01 for key, value in read(folder).items()})
    with pytest.raises(CheckpointError, match=r"what was read back gives loss[_a-z]* .*, the live model "):
        store.save(engine, Progress(3, 72))
    monkeypatch.undo()
    folder = store.save(engine, Progress(4, 96))
    assert folder.local is not None
    assert load_file(folder.local / "adapter" / lora.WEIGHTS_FILE)


def test_the_toy_takes_adapters_too() -> None:
    module = TOY.build(ToyConfig(), VOCAB)
    frozen = copy.deepcopy(module.state_dict())
    lora.wrap(module, LoraBlock(r=2), TOY.lora_targets(module))
    assert "trains 32 of" in lora.trainable_share(module)
    assert torch.equal(module.gene.weight, frozen["gene.weight"])


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["unknown", "", None], "classify", "none of 3 training cells has a label"),
        (["a", "a", "unknown"], "classify", "all 2 labelled training cells are 'a'"),
        (["a", "1"], "regress", "holds 'a', which is no number"),
        ([1.0, 1.0, np.nan], "regress", "2 have a number and all are 1"),
    ],
)
def test_labels_that_cannot_be_learnt(values: list, task: Any, expected: str) -> None:
    with pytest.raises(CellsError, match=expected):
        fit("kind", task, np.array(values, object), np.zeros(0, object))


def test_labels_and_weights() -> None:
    train, heldout = np.array(["b", "a", "b", "unknown", "b"], object), np.array(["c", "b", ""], object)
    labels, notes = fit("kind", "classify", train, heldout, is_balanced=True)
    assert labels.classes == ("a", "b")
    assert labels.class_weight_K == pytest.approx((2.0, 4 / 6))
    label_C, weight_C = labels.encode(heldout)
    assert label_C.tolist() == [0, 1, 0]
    np.testing.assert_allclose(weight_C, [0, 4 / 6, 0], rtol=1e-6)
    assert Labels.of(json.loads(json.dumps(labels.to_dict()))) == labels
    assert any(note.startswith("warning: c of kind is in held-out cells alone") for note in notes)
    assert any("no held-out cell is a" in note for note in notes)
    numbers, _ = fit("age", "regress", np.array([1.0, 3.0, np.nan]), np.array([2.0, 5.0]))
    assert numbers.encode(np.array([3.0, np.nan]))[0].tolist() == [1.0, 0.0]
    assert numbers.spread == pytest.approx((0 + 9) / 2)


@pytest.mark.parametrize(
    ("metric", "values", "expected"),
    [
        ("val/loss", [3, 2, 2.5, 2.4, 2.3], [True, True, False, False, False]),
        ("val/accuracy", [0.1, 0.3, 0.2, 0.3, 0.3], [True, True, False, False, False]),
        ("val/loss", [3, float("nan"), 2, 2, 2], [True, False, True, False, False]),
    ],
)
def test_early_stop(metric: str, values: list, expected: list) -> None:
    stop = EarlyStop(EarlyStopConfig(3, metric))
    assert [stop.note({metric: value}) for value in values] == expected
    assert stop.is_over == (expected[-3:] == [False] * 3)
    again = EarlyStop(EarlyStopConfig(3, metric), [{metric: value} for value in values])
    assert again.is_over == stop.is_over
    with pytest.raises(RecipeError, match="the held-out metrics are val/other"):
        stop.note({"val/other": 1.0})
