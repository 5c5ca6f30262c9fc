"""One evaluation from a checkpoint to a verdict: open cells, embed, baselines, tasks, report.

In: a checkpoint and an `evaluate:` block. Out: `<out>/evaluation/` with report.html, metrics.parquet, metrics.json,
predictions.parquet, embeddings.h5ad and recipe.yaml, and the verdict on the terminal.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from tftrain.cluster import RayConfig, connected
from tftrain.embed import Embedder, load_embedder
from tftrain.errors import CellsError, RecipeError
from tftrain.evals import baselines, files, gates, gene_relations, jobs, models, overlap, report, wandb_page
from tftrain.evals.contract import Bench, Dataset, Findings, GeneVectors
from tftrain.evals.extra import find
from tftrain.evals.report import Verdict
from tftrain.recipe import EvaluateConfig
from tftrain.training.folder import Folder
from tftrain.training.metrics import WandbConfig

TASKS = {
    "likelihood": "tftrain.evals.likelihood",
    "celltypes": "tftrain.evals.celltypes",
    "transfer": "tftrain.evals.transfer",
    "condition": "tftrain.evals.condition",
    "scib": "tftrain.evals.scib",
    "species_or_type": "tftrain.evals.species_or_type",
    "gene_relations": "tftrain.evals.gene_relations",
}
"""Name in a recipe -> module with `run(bench) -> Findings`."""

NEED_THE_MODEL = ("likelihood",)
OF_TASK = {"scib": ("igraph", "scib_metrics"), "species_or_type": ("scib_metrics",)}
"""What a task needs beyond `REQUIRED`."""
REQUIRED = ("sklearn", "matplotlib", "jinja2")


def run_evaluation(
    checkpoint: str | Path,
    config: EvaluateConfig,
    *,
    out: str,
    seed: int = 0,
    device: str | None = None,
    console: Console | None = None,
    ray: RayConfig | None = None,
    wandb: WandbConfig | None = None,
) -> Verdict:
    """Judges a checkpoint (published layout, checkpoint or run folder of ours) and writes what `files` names below
    `out`; with `ray`, representations and tasks side by side on that cluster.

    Deterministic on a CPU. Raises RecipeError for a task or baseline that does not exist and where the `eval` extra
    is not installed, CellsError for cells, labels or tables that cannot be used, CheckpointError as `load_embedder`
    does.
    """
    check(config)
    # Rich takes 80 columns where there is no terminal, too few for a table with many baselines.
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    config = models.absolute(config)
    if config.relations is not None:
        gene_relations.read_relations(config.relations)
    embedder = load_embedder(checkpoint, device=device)
    recipe = models.training_recipe(embedder)
    datasets = models.open_datasets(embedder, recipe, config, seed=seed)
    _say(console, "judged cells: " + ", ".join(f"{d.name} {len(d.cells):,}" for d in datasets))
    fresh_seed = recipe.seed if recipe else seed
    with connected(ray, 0.0, lambda line: _say(console, line)) if ray else contextlib.nullcontext():
        began = time.monotonic()
        embeddings = represent(embedder, datasets, config, seed=seed, fresh_seed=fresh_seed, ray=ray)
        _say(console, f"embedded by {', '.join(embeddings)} in {time.monotonic() - began:.0f} s")
        bench = Bench(
            datasets=datasets,
            embeddings=embeddings,
            score={"trained": lambda _, blocks: models.score(embedder, blocks, seed=seed)} if recipe else {},
            count_limit=getattr(embedder.config, "clip_counts", None),
            seed=seed,
            bootstraps=config.bootstraps,
            genes=gene_vectors(embedder, datasets, config, seed=seed, fresh_seed=fresh_seed),
            relations=config.relations,
            by_cell=config.by_cell,
            scib_cells=config.scib_cells,
            scib_seeds=config.scib_seeds,
        )
        findings = run_tasks(bench, config.tasks, console, ray=ray)
    add_caveats(findings, datasets, config.donor, is_training_known=recipe is not None)
    verdict = Verdict(
        findings,
        datasets,
        checkpoint=embedder.facts.get("checkpoint_folder", models.located(str(checkpoint))),
        seed=seed,
        shortfalls=gates.shortfalls(findings.rows, config.fail_below),
    )
    report.print_verdict(console, verdict)
    files.write(out, verdict, embeddings, config, facts=embedder.facts)
    _say(console, f"report: {out}/{files.FOLDER}/report.html")
    if wandb is not None:
        html = (Folder.at(out) / files.FOLDER).read_text("report.html")
        wandb_page.log(wandb, verdict, html, out=out, run_id=models.wandb_run_id(embedder))
    return verdict


def add_caveats(findings: Findings, datasets: Sequence[Dataset], donor: str, *, is_training_known: bool) -> None:
    """Puts overlap with training cells before the notes and missing genes after them. Raises CellsError where no task
    has found anything."""
    findings.notes[:0] = overlap.notes(datasets, donor, is_training_known=is_training_known)
    findings.notes.extend(f"genes: {dataset.name}: {dataset.caveat}" for dataset in datasets if dataset.caveat)
    if not findings.rows:
        raise CellsError(f"no task could judge anything: {'; '.join(findings.notes)}")


def check(config: EvaluateConfig) -> None:
    """Raises RecipeError for unknown names and missing libraries: call it before anything expensive."""
    known = {"tasks": list(TASKS), "baselines": ["untrained", *baselines.BASELINES]}
    for name, valid in known.items():
        for value in getattr(config, name):
            if value not in valid:
                near = difflib.get_close_matches(value, valid, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(valid)}"
                raise RecipeError(f"evaluate.{name} has {value!r}; {hint}")
    gates.check_keys(config.fail_below, config.tasks)
    for module in (*REQUIRED, *(module for task in config.tasks for module in OF_TASK.get(task, ()))):
        find(module)
    if "scvi" in config.baselines:
        baselines.need_scvi()


def represent(
    embedder: Embedder,
    datasets: Sequence[Dataset],
    config: EvaluateConfig,
    *,
    seed: int,
    fresh_seed: int,
    ray: RayConfig | None = None,
) -> dict[str, dict[str, np.ndarray]]:
    """Representation -> data set -> (C, D): the model, then the baselines asked for, in the order of `TITLES`. Raises
    CellsError where one is not finite."""
    names = ["trained", *sorted(config.baselines, key=list(baselines.TITLES).index)]
    if ray is not None:
        made = jobs.represent(
            models.located(embedder.origin),
            datasets,
            names,
            ray,
            seed=seed,
            fresh_seed=fresh_seed,
            orthologs=config.orthologs,
        )
    else:
        made = {}
        for name in names:
            if name in ("trained", "untrained"):
                of = embedder if name == "trained" else models.untrained(embedder, fresh_seed)
                made[name] = {dataset.name: models.embed(of, dataset) for dataset in datasets}
            else:
                made[name] = baselines.BASELINES[name](datasets, seed=seed, orthologs=config.orthologs)
    for name, of_dataset in made.items():
        for dataset in datasets:
            refuse_nonfinite(name, dataset, of_dataset[dataset.name])
    return made


def refuse_nonfinite(name: str, dataset: Dataset, embedding_CD: np.ndarray) -> None:
    """Raises CellsError for a representation with NaN or infinite values: no classifier takes it."""
    is_bad_C = ~np.isfinite(embedding_CD).all(axis=1)
    if is_bad_C.any():
        raise CellsError(
            f"{dataset.name}: {is_bad_C.sum():,} of {len(is_bad_C):,} cells have no finite embedding by {name}, for "
            f"one cell {dataset.cells.joinid_C[np.argmax(is_bad_C)]}; the weights may have diverged: evaluate an "
            "earlier checkpoint, or drop these cells"
        )


def gene_vectors(
    embedder: Embedder, datasets: Sequence[Dataset], config: EvaluateConfig, *, seed: int, fresh_seed: int
) -> dict[str, GeneVectors]:
    """Of the model and the baselines of the task gene_relations; nothing where it is not asked for."""
    if "gene_relations" not in config.tasks:
        return {}
    made = {"trained": models.gene_vectors(embedder)}
    if "untrained" in config.baselines:
        made["untrained"] = models.gene_vectors(models.untrained(embedder, fresh_seed))
    return made | gene_relations.baseline_vectors(datasets, embedder.vocab, seed=seed)


def run_tasks(bench: Bench, tasks: Sequence[str], console: Console, *, ray: RayConfig | None = None) -> Findings:
    """The findings of all tasks together, in order; with `ray` all but those that need the model run side by side."""
    together = Findings([])
    away = (
        jobs.start_tasks(bench, {name: TASKS[name] for name in tasks if name not in NEED_THE_MODEL}, ray) if ray else {}
    )
    for name in tasks:
        began = time.monotonic()
        found = jobs.get(away[name]) if name in away else importlib.import_module(TASKS[name]).run(bench)
        together.rows.extend(found.rows)
        together.predictions.extend(found.predictions)
        together.notes.extend(found.notes)
        _say(console, f"{name}: {len(found.rows)} values in {time.monotonic() - began:.0f} s")
    return together


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
