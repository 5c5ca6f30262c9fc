"""ZeRO 0 to 3 on one and two ranks, and torch alone, are one optimiser: the same losses, norms and weights."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from gloo import run_ranks
from toy import N_GENES, TOY, VOCAB, ToyConfig, toy_cells, toy_steps

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError
from tftrain.models.arch import Architecture, architecture
from tftrain.training.engine import EngineConfig, build_engine
from tftrain.training.group import Group, join_group
from tftrain.training.optim import OptimConfig, learning_rate
from tftrain.training.trainer import AgreedStep, agree_step

N_STEPS = 20
CELLS_PER_STEP = 8
# With the usual eps AdamW makes whole steps of rounding noise where a gradient is zero by design (a bias before a
# softmax).
OPTIM = OptimConfig(lr=2e-2, clip_norm=0.5, eps=1e-4)
STAGES = (0, 1, 2, 3)
ONE_BATCH, SEVERAL_BATCHES = 1000, 24
"""Tokens a micro-batch: all cells of a step, or one to three of them, so that ranks differ in their number."""


def subject(arch: str) -> tuple[Architecture, Any, Any]:
    """An architecture, its configuration without dropout, and its vocabulary."""
    if arch == "toy":
        return TOY, ToyConfig(), VOCAB
    architecture_ = architecture(arch)
    config = architecture_.Config(
        layers=2, heads=2, width=16, feedforward_width=32, gene_head_width=16, genes_per_cell=16, assays=[], dropout=0.0
    )
    protein_GE = np.random.default_rng(0).normal(size=(N_GENES, 12)).astype(np.float32)
    return architecture_, config, Vocab.of([f"ENSG{gene:011d}" for gene in range(N_GENES)], protein_GE)


def curve(
    zero_stage: int | None, max_tokens: int, arch: str, precision: Literal["fp32", "bf16"] = "fp32"
) -> dict[str, Any]:
    """Loss a scored gene and gradient norm of every step, and the final weights of rank 0."""
    group = join_group()
    arch_, config, vocab = subject(arch)
    torch.manual_seed(0)
    module = arch_.build(config, vocab)
    optim = replace(OPTIM, lr=OPTIM.lr if arch == "toy" else 1e-2)
    engine = build_engine(module, EngineConfig(zero_stage, precision), optim, group)

    def agreed_of(cells: Cells) -> AgreedStep:
        batches = arch_.collate(cells, config, vocab, seed=0, shuffle_genes=True, max_tokens=max_tokens)
        n_batches.append(len(batches))
        return agree_step(group, batches, arch_.empty(config, vocab))

    losses, norms, n_batches = [], [], []
    steps = toy_steps(toy_cells(64), CELLS_PER_STEP, N_STEPS, rank=group.rank, world=group.world_size)
    for step, (cells, _) in enumerate(steps):
        agreed = agreed_of(cells)
        result = engine.step(agreed.batches, agreed.n_scored, learning_rate(optim, step, N_STEPS))
        losses.append(result.sums["loss"] / agreed.n_scored)
        norms.append(result.grad_norm)
    # Every rank has the same held-out cells, which leaves their mean as it is.
    heldout = agreed_of(toy_cells(8, seed=1))
    return {
        "loss": losses,
        "grad_norm": norms,
        "n_batches": n_batches,
        "weights": {name: value.numpy() for name, value in engine.weights().items()},
        "heldout": engine.evaluate(heldout.batches)["loss"] / heldout.n_scored,
    }


def curves(tasks: list[tuple]) -> dict[tuple, dict]:
    """`curve` of every task, in one process group."""
    return {task: curve(*task) for task in tasks}


ARCHITECTURES = ("toy", "transcriptformer")
TASKS = [
    (stage, max_tokens, arch)
    for stage in STAGES
    for max_tokens, arch in ((ONE_BATCH, "toy"), (SEVERAL_BATCHES, "toy"), (SEVERAL_BATCHES, "transcriptformer"))
]


@pytest.fixture(scope="module")
def plain() -> dict[str, dict]:
    return {arch: curve(None, ONE_BATCH, arch) for arch in ARCHITECTURES}


@pytest.fixture(scope="module")
def one_rank() -> dict[tuple, dict]:
    return curves(TASKS)


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[tuple, dict]]:
    return run_ranks(2, curves, TASKS)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_plain_loop_learns_and_accumulates(arch: str, plain: dict) -> None:
    assert plain[arch]["loss"][-1] < plain[arch]["loss"][0] - 0.1
    assert OPTIM.clip_norm is not None
    assert max(plain[arch]["grad_norm"]) > OPTIM.clip_norm, "clipping is not exercised"
    several = curve(None, SEVERAL_BATCHES, arch)
    assert min(several["n_batches"]) > 2
    np.testing.assert_allclose(several["loss"], plain[arch]["loss"], rtol=1e-4)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_zero_on_one_rank_equals_plain(task: tuple, one_rank: dict, plain: dict) -> None:
    _assert_same(one_rank[task], plain[task[2]])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_zero_on_two_ranks_equals_plain(task: tuple, two_ranks: list, plain: dict) -> None:
    rank0, rank1 = (results[task] for results in two_ranks)
    _assert_same(rank0, plain[task[2]])
    assert rank0["loss"] == rank1["loss"], "all ranks know the global loss"
    assert rank1["weights"] == {}
    if task[1] == SEVERAL_BATCHES:
        assert rank0["n_batches"] != rank1["n_batches"], "ranks were meant to differ in their number of micro-batches"


def _assert_same(got: dict, expected: dict) -> None:
    np.testing.assert_allclose(got["loss"], expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(got["grad_norm"], expected["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(got["heldout"], expected["heldout"], rtol=1e-4)
    assert got["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        np.testing.assert_allclose(got["weights"][name], value, atol=2e-3, err_msg=name)
    assert "frozen" not in got["weights"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bf16_follows_fp32(stage: int, arch: str, plain: dict) -> None:
    got = curve(stage, SEVERAL_BATCHES, arch, "bf16")
    np.testing.assert_allclose(got["loss"], plain[arch]["loss"], rtol=2e-2)
    assert all(value.dtype == np.float32 for value in got["weights"].values())


@pytest.mark.parametrize("stage", [None, 0, 2, 3])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone(stage: int | None) -> None:
    group = join_group()
    torch.manual_seed(0)
    engine = build_engine(TOY.build(ToyConfig(), VOCAB), EngineConfig(stage), OPTIM, group)
    before = engine.weights()
    batches = TOY.collate(toy_cells(8), None, VOCAB, seed=0, shuffle_genes=True, max_tokens=20)
    batches[1].count_T[0] = math.inf
    result = engine.step(batches, 10, 1e-2)
    assert result.bad_batches == (1,)
    assert math.isnan(result.grad_norm)
    for name, value in engine.weights().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("config", "device", "expected"),
    [
        (EngineConfig(0, "auto"), "cpu", (0, "fp32")),
        (EngineConfig(0, "auto"), "cuda", (1, "bf16")),
        (EngineConfig(0, "fp32"), "cuda", (0, "fp32")),
        (EngineConfig(3, "bf16"), "cpu", (3, "bf16")),
        (EngineConfig(None), "cuda", (None, "bf16")),
    ],
)
def test_stage_and_precision_in_use(config: EngineConfig, device: str, expected: tuple) -> None:
    assert (config.stage_on(torch.device(device)), config.precision_on(torch.device(device))) == expected


def test_contradictions() -> None:
    with pytest.raises(RecipeError, match=r"engine.zero_stage is 4; it is 0, 1, 2, 3 or null"):
        EngineConfig(4)
    with pytest.raises(RecipeError, match="null, which is for one worker, and there are 2"):
        build_engine(TOY.build(ToyConfig(), VOCAB), EngineConfig(None), OPTIM, Group(0, 2, torch.device("cpu")))
