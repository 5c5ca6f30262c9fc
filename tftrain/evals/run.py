"""One evaluation from a checkpoint to a verdict: open cells, embed, baselines, tasks, report.

In: a checkpoint and an `evaluate:` block. Out: `<out>/evaluation/` with metrics.parquet, metrics.json,
predictions.parquet, embeddings.h5ad and pictures, and the verdict on the terminal.
"""

from __future__ import annotations

import difflib
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from tftrain.embed import Embedder, load_embedder
from tftrain.errors import RecipeError
from tftrain.evals import baselines, models, report
from tftrain.evals.contract import Bench, Dataset, Findings
from tftrain.evals.extra import need
from tftrain.evals.report import Verdict
from tftrain.recipe import EvaluateConfig

TASKS = {
    "likelihood": "tftrain.evals.likelihood",
    "celltypes": "tftrain.evals.celltypes",
    "transfer": "tftrain.evals.transfer",
}
"""Name in a recipe -> module with `run(bench) -> Findings`."""

REQUIRED = ("sklearn", "matplotlib")


def run_evaluation(
    checkpoint: str | Path,
    config: EvaluateConfig,
    *,
    out: str,
    seed: int = 0,
    device: str | None = None,
    console: Console | None = None,
) -> Verdict:
    """Judges a checkpoint (published layout, checkpoint or run folder of ours) and writes what `report` names below
    `out`.

    Deterministic on a CPU. Raises RecipeError for a task or baseline that does not exist and where the `eval` extra
    is not installed, CellsError for cells, labels or tables that cannot be used, CheckpointError as `load_embedder`
    does.
    """
    check(config)
    console = console or Console()
    config = models.absolute(config)
    embedder = load_embedder(checkpoint, device=device)
    recipe = models.training_recipe(embedder)
    datasets = models.open_datasets(embedder, recipe, config, seed=seed)
    _say(console, "judged cells: " + ", ".join(f"{d.name} {len(d.cells):,}" for d in datasets))
    began = time.monotonic()
    fresh_seed = recipe.seed if recipe else seed
    embeddings = represent(embedder, datasets, config, seed=seed, fresh_seed=fresh_seed)
    _say(console, f"embedded by {', '.join(embeddings)} in {time.monotonic() - began:.0f} s")
    bench = Bench(
        datasets=datasets,
        embeddings=embeddings,
        score={"trained": lambda _, blocks: models.score(embedder, blocks, seed=seed)} if recipe else {},
        count_limit=getattr(embedder.config, "clip_counts", None),
        seed=seed,
        bootstraps=config.bootstraps,
    )
    findings = run_tasks(bench, config.tasks, console)
    findings.notes[:0] = models.overlap(datasets, config.donor)
    verdict = Verdict(
        findings, datasets, checkpoint=embedder.facts.get("checkpoint_folder", str(checkpoint)), seed=seed
    )
    report.print_verdict(console, verdict)
    report.write(out, verdict, embeddings, config, facts=embedder.facts)
    _say(console, f"report: {out}/evaluation")
    return verdict


def check(config: EvaluateConfig) -> None:
    """Raises RecipeError for unknown names and missing libraries: call it before anything expensive."""
    known = {"tasks": list(TASKS), "baselines": ["untrained", *baselines.BASELINES]}
    for name, valid in known.items():
        for value in getattr(config, name):
            if value not in valid:
                near = difflib.get_close_matches(value, valid, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(valid)}"
                raise RecipeError(f"evaluate.{name} has {value!r}; {hint}")
    for module in REQUIRED:
        need(module)


def represent(
    embedder: Embedder, datasets: Sequence[Dataset], config: EvaluateConfig, *, seed: int, fresh_seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """Representation -> data set -> (C, D): the model, then the baselines asked for, in the order of `TITLES`."""
    made = {"trained": {dataset.name: models.embed(embedder, dataset) for dataset in datasets}}
    for name in sorted(config.baselines, key=list(baselines.TITLES).index):
        if name == "untrained":
            fresh = models.untrained(embedder, fresh_seed)
            made[name] = {dataset.name: models.embed(fresh, dataset) for dataset in datasets}
        else:
            made[name] = baselines.BASELINES[name](datasets, seed=seed, orthologs=config.orthologs)
    return made


def run_tasks(bench: Bench, tasks: Sequence[str], console: Console) -> Findings:
    """The findings of all tasks together, in order."""
    together = Findings([])
    for name in tasks:
        began = time.monotonic()
        found = importlib.import_module(TASKS[name]).run(bench)
        together.rows.extend(found.rows)
        together.predictions.extend(found.predictions)
        together.notes.extend(found.notes)
        _say(console, f"{name}: {len(found.rows)} values in {time.monotonic() - began:.0f} s")
    return together


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
