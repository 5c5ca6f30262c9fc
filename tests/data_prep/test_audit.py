"""Exactly once: real runs, killed and continued by other numbers of workers, judged by their ledgers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from data_prep.audit import audit
from data_prep.cli import main
from tftrain.cells.source import close_experiments
from tftrain.cells.vocab import write_protein_table
from tftrain.errors import CheckpointError, RecipeError
from tftrain.recipe import parse
from tftrain.run import run_recipe
from tftrain.training import ledger

CELLS = Path(__file__).parents[1] / "cells"
sys.path.insert(0, str(CELLS))
from stores import make_store  # noqa: E402

N_GENES = 40
SPECIES = {"a": 1.0, "b": 2.0, "c": 0.3}
"""Species and weight of three stores."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three stores of 260, 90 and 170 cells. A vocabulary that lacks the genes of some cells of the third."""
    path = tmp_path_factory.mktemp("audit")
    for store, (name, n_cells) in enumerate(zip(SPECIES, (260, 90, 170))):
        make_store(path / f"{name}.soma", store=store, n_cells=n_cells, n_genes=N_GENES, prefix=name.upper())
        # Every fourth cell of the third store expresses none of these genes.
        ids = [f"{name.upper()}{gene}" for gene in range(0, N_GENES, 4 if name == "c" else 1)]
        write_protein_table(path / f"{name}.h5", ids, np.random.default_rng(store).standard_normal((len(ids), 8)))
    return path


def recipe_text(folder: Path, out: Path, *, seed: int = 1, engine: str = "zero_stage: 0") -> str:
    sources = "\n".join(
        f"    - {{uri: {folder}/{name}.soma, species: {name}, weight: {weight}}}" for name, weight in SPECIES.items()
    )
    return f"""out: {out}
seed: {seed}
data:
  sources:
{sources}
  protein_tables: [{folder}/a.h5, {folder}/b.h5, {folder}/c.h5]
  qc: {{min_expressed_genes: 0, total_counts_within_sd: 0}}
  holdout: {{values: [d3], max_cells: 16}}
  order: {{lanes: 6, chunk_cells: 8, window_cells: 32}}
  stream: {{backend: local}}
  ledger: true
model: {{layers: 1, heads: 1, width: 8, feedforward_width: 8, gene_head_width: 8, genes_per_cell: 16, dropout: 0.0}}
train: {{epochs: 2, cells_per_step: 6, tokens_per_gpu: 256, heldout_every_steps: null}}
engine: {{{engine}}}
checkpoint: {{save_every_steps: 7, keep_last: 2}}
ray: {{num_workers: 0}}
"""


RANK = """
import sys, torch
torch.set_num_threads(1)
from tftrain.assemble import run_worker
class Channel:
    def report(self, step, total_steps, metrics): print("step", step, flush=True)
    def say(self, line): print(line, flush=True)
    def is_stop_asked(self): return False
print(run_worker({"recipe": open(sys.argv[1]).read()}, Channel()), flush=True)
"""
"""One rank of a run, as `launch` starts it in a Ray worker."""


def start(recipe: Path, world: int) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(recipe)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if rank else None,
            text=True,
        )
        for rank in range(world)
    ]


def run_until(recipe: Path, world: int, kill_after: int | None, victim: int = 0, delay_s: float = 0.0) -> list[str]:
    """Lines of rank 0; SIGKILLs rank `victim` some time after step `kill_after`, then the others, as Ray does."""
    processes = start(recipe, world)
    lines = []
    try:
        for line in processes[0].stdout:  # type: ignore[union-attr]
            lines.append(line.strip())
            if kill_after is not None and line.startswith("step ") and int(line.split()[1]) >= kill_after:
                time.sleep(delay_s)
                processes[victim].send_signal(signal.SIGKILL)
                break
        else:
            assert all(process.wait(60) == 0 for process in processes), lines
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return lines


@pytest.mark.timeout(240)
def test_killed_three_times_and_continued_by_other_numbers_of_workers(folder, tmp_path, capsys):
    """Two epochs over three stores with weights; killed as 3 workers, as 2 and as 1, finished by 3."""
    out, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(recipe_text(folder, out))
    out.mkdir()
    (out / "recipe.yaml").write_text(recipe.read_text())
    rng = np.random.default_rng(int(time.time()))
    began = 0
    for world, victim in ((3, 2), (2, 0), (1, 0)):
        moment, delay_s = began + int(rng.integers(9, 26)), float(rng.uniform(0, 0.1))
        print(f"world {world}: SIGKILL of rank {victim} {delay_s:.3f} s after step {moment}")
        run_until(recipe, world, moment, victim, delay_s)
        began = moment
    assert main(["audit", str(out)]) == 0, "what was saved so far is exact too"
    lines = run_until(recipe, 3, None)
    assert lines[-1] == "finished"
    assert any("continues at step" in line for line in lines)
    assert main(["audit", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "proved" in printed
    found = audit(str(out))
    # 0.9 of each store trains. An epoch has 234 + 2 x 81 cells of a and b, and 0.3 x 153 = 45.9 of c.
    assert [epoch["found"] for epoch in found.epochs] == [234 + 162 + 45, 234 + 162 + 46]
    ranks = pa.concat_tables(ledger.read(str(out)))["rank"].value_counts().to_pylist()
    assert {row["values"] for row in ranks} == {0, 1, 2}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory) -> dict[str, Path]:
    """Runs in this process of seed 1, of seed 1 again and of seed 2."""
    path = tmp_path_factory.mktemp("runs")
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run_recipe(parse(recipe_text(folder, path / name, seed=seed, engine="zero_stage: null"))) == 0
    return {name: path / name for name in ("one", "again", "other")}


def steps_of(out: Path) -> list[list[tuple[str, int]]]:
    """Cells of each step, sorted."""
    table = pa.concat_tables(ledger.read(str(out)))
    steps: dict[int, list] = {}
    for step, source, joinid in zip(*(table[name].to_pylist() for name in ("step", "source", "soma_joinid"))):
        steps.setdefault(step, []).append((source, joinid))
    return [sorted(steps[step]) for step in sorted(steps)]


def test_a_seed_decides_the_ledger_and_epochs_differ(runs):
    one, again, other = (steps_of(runs[name]) for name in ("one", "again", "other"))
    assert one == again
    assert one != other
    assert len(one) == len(other) == 74 + 74  # 441 and 442 cells, 6 a step
    assert one[:74] != one[74:]
    assert sorted({cell for step in one[:74] for cell in step if cell[0] == "a"}) == sorted(
        {cell for step in one[74:] for cell in step if cell[0] == "a"}
    )


def test_cells_without_any_vocabulary_gene_are_on_record(runs):
    """Cell c of store 2 expresses gene g where (7 c + 3 g + 2) % 4 == 0; genes 0, 4, ... are known: cells 2 mod 4."""
    seen = {joinid % 4 for step in steps_of(runs["one"]) for source, joinid in step if source == "c"}
    assert seen == {0, 1, 2, 3}
    assert audit(str(runs["one"])).is_proved


def spoil(run: Path, change) -> None:
    """Rewrites the first part of a ledger."""
    path = run / "ledger" / ledger.parts(str(run))[0].name
    pq.write_table(change(pq.read_table(path)), path)


def other_joinid(table: pa.Table, row: int, joinid: int) -> pa.Table:
    values = table["soma_joinid"].to_numpy().copy()
    values[row] = joinid
    return table.set_column(table.column_names.index("soma_joinid"), "soma_joinid", pa.array(values))


def row_of(table: pa.Table, source: str) -> int:
    return table["source"].to_pylist().index(source)


FAULTS = {
    "missing": (
        lambda t: t.slice(1),
        [r"1 of 148 steps have another number of cells \(step 1: 5 of 6", r"1 cells missing"],
    ),
    "repeated": (
        lambda t: pa.concat_tables([t, t.slice(0, 1)]),
        [r"step 1: 7 of 6", r"1 cells trained on more often than planned \(soma_joinid \d+\)"],
    ),
    "held out": (
        lambda t: other_joinid(t, row_of(t, "a"), 3 * 26),  # donor d3
        [r"epoch 0, a: 1 cells held out but trained on \(soma_joinid 78\)", r"epoch 0, a: 1 cells missing"],
    ),
    "exchanged": (
        lambda t: other_joinid(t, row_of(t, "b"), 0),
        [r"epoch 0, b: 1 cells missing", r"epoch 0, b: 1 cells trained on more often than planned"],
    ),
    "unknown": (lambda t: other_joinid(t, row_of(t, "a"), 10**9), [r"cells of a that the store does not have"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_named(runs, tmp_path, name, capsys):
    import shutil

    change, messages = FAULTS[name]
    run = shutil.copytree(runs["one"], tmp_path / "run")
    spoil(run, change)
    faults = "\n".join(audit(str(run)).faults)
    for message in messages:
        assert pc.match_substring_regex(pa.array([faults]), message)[0].as_py(), faults
    assert main(["audit", str(run), "--json"]) == 1
    assert '"is_proved": false' in capsys.readouterr().out


def test_runs_that_cannot_be_audited(folder, runs, tmp_path):
    import shutil

    with pytest.raises(RecipeError, match="has no recipe"):
        audit(str(tmp_path))
    run = shutil.copytree(runs["one"], tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(CheckpointError, match="no finished checkpoint yet"):
        audit(str(run))
    shutil.rmtree(run / "ledger")
    with pytest.raises(RecipeError, match=r"no ledger; set data.ledger=true"):
        audit(str(run))


def test_a_store_that_changed_is_shown(folder, runs, tmp_path):
    import shutil

    run = shutil.copytree(runs["one"], tmp_path / "run")
    make_store(tmp_path / "b.soma", store=1, n_cells=80, n_genes=N_GENES, prefix="B")
    text = (run / "recipe.yaml").read_text().replace(f"{folder}/b.soma", f"{tmp_path}/b.soma")
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(CheckpointError, match=r"(?s)the cells and their order changed.*n_cells: 81 -> 72"):
        audit(str(run))
    close_experiments()


def test_a_ledger_keeps_each_step_once(tmp_path):
    """Parts beyond the checkpoint go, a part across it is cut, a part cut short by a kill goes."""
    from types import SimpleNamespace

    from toy import toy_cells

    group = SimpleNamespace(rank=0, world_size=1, barrier=lambda: None)
    cells = toy_cells(40)

    def write(first, last, resume_step):
        record = ledger.Ledger(str(tmp_path), group, ["s"], resume_step=resume_step)
        for step in range(first, last + 1):
            record.record(step, cells.slice(step, step + 2))
            if step % 4 == 0:
                record.flush()
        record.flush()

    write(1, 10, 0)
    assert [part.name for part in ledger.parts(str(tmp_path))] == [
        f"steps_0000000{a}_000000{b}.rank_0_of_1.parquet" for a, b in ((1, "04"), (5, "08"), (9, "10"))
    ]
    (tmp_path / "ledger" / ".steps_00000011_00000012.rank_0_of_1.parquet.part").write_bytes(b"cut")
    write(7, 12, 6)
    table = pa.concat_tables(ledger.read(str(tmp_path)))
    assert table["step"].to_pylist() == [step for step in range(1, 13) for _ in range(2)]
    assert table["soma_joinid"].to_pylist() == [joinid for step in range(1, 13) for joinid in (step, step + 1)]
    assert sorted(os.listdir(tmp_path / "ledger")) == [part.name for part in ledger.parts(str(tmp_path))]
