"""What an evaluation leaves behind: the verdict on the terminal, long tables, pictures.

Every figure of the verdict stands beside chance, the baselines on the same cells and its 95 % interval; the lines below the
tables say who wins, whoever it is.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from tftrain import __version__
from tftrain.evals import pictures
from tftrain.evals.baselines import TITLES
from tftrain.evals.contract import Dataset, Findings, Row
from tftrain.recipe import EvaluateConfig
from tftrain.training.folder import Folder

FOLDER = "evaluation"
HEADLINE_PROBE = "logistic"
ORACLES = ("ortholog_pca",)
"""Baselines that are told what no model is: named apart when they win."""
_LIBRARIES = ("torch", "scikit-learn", "numpy", "anndata", "tiledbsoma", "ray")


@dataclass(frozen=True)
class Verdict:
    """The findings of one checkpoint with what they are of."""

    findings: Findings
    datasets: Sequence[Dataset]
    checkpoint: str
    seed: int

    def value(self, model: str, dataset: str, task: str, metric: str, variant: str) -> Row | None:
        """The row over all folds, or None."""
        for row in self.findings.rows:
            if (row.model, row.dataset, row.task, row.metric, row.variant, row.fold) == (
                model,
                dataset,
                task,
                metric,
                variant,
                -1,
            ):
                return row
        return None

    def columns(self) -> list[tuple[str, str]]:
        """(task, data set) of the F1 table: cell types of every species, then transfers, those to unseen species last."""
        unseen = {dataset.name for dataset in self.datasets if not dataset.is_seen}
        found = dict.fromkeys(
            (row.task, row.dataset) for row in self.findings.rows if row.metric == "macro_f1" and row.fold == -1
        )
        return sorted(found, key=lambda c: (c[0] != "celltypes", c[1].split(" -> ")[-1] in unseen, " + " in c[1]))

    def sentences(self) -> list[str]:
        """One sentence a column of the F1 table: who beats whom, and whether a baseline or the oracle wins."""
        lines = []
        for task, dataset in self.columns():
            rows = {
                model: row
                for model in TITLES
                if (row := self.value(model, dataset, task, "macro_f1", HEADLINE_PROBE)) is not None
            }
            if "trained" in rows and len(rows) > 1:
                where = f"cell types of {dataset}" if task == "celltypes" else f"transfer {dataset}"
                lines.append(f"{where}: {_judgement(rows)}")
        return lines


def _judgement(rows: Mapping[str, Row]) -> str:
    """`the trained model (0.71) beats ...; ... is better: 0.80`."""
    own = rows["trained"].value
    others = sorted((row.value, model) for model, row in rows.items() if model != "trained")
    beaten = [f"{_short(model)} {value:.2f}" for value, model in reversed(others) if value < own]
    better = [f"{_short(model)} {value:.2f}" for value, model in reversed(others) if value >= own and model not in ORACLES]
    oracle = [f"{_short(model)} {value:.2f}" for value, model in others if value >= own and model in ORACLES]
    parts = [f"the trained model ({own:.2f}) " + (f"beats {', '.join(beaten)}" if beaten else "beats nothing")]
    if better:
        parts.append(f"WINNER IS A BASELINE: {', '.join(better)}")
    if oracle:
        parts.append(f"the oracle wins: {', '.join(oracle)}")
    return "; ".join(parts)


def _short(model: str) -> str:
    return TITLES[model].split(" (")[0]


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Prints both tables, the sentences and the notes."""
    for table in filter(None, [_likelihood_table(verdict), _f1_table(verdict)]):
        console.print(table)
    for line in verdict.sentences():
        console.print(f"- {line}", highlight=False, soft_wrap=True)
    for note in verdict.findings.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, style="yellow")


def _likelihood_table(verdict: Verdict) -> Table | None:
    rows = [row for row in verdict.findings.rows if row.task == "likelihood"]
    if not rows:
        return None
    table = Table(
        title=f"Held-out cells of the training species: NLL in nats a gene, lower is better (seed {verdict.seed})"
    )
    for title in ("species", "of the", "model", "unigram", "gain over it [95 %]", "unigram, all species", "no repeats"):
        table.add_column(title, justify="left" if title in ("species", "of the") else "right")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for metric, title in (("gene_nll", "gene"), ("count_nll", "count")):
            of = {row.model: row for row in rows if row.dataset == dataset and row.metric == metric}
            gain = verdict.value("trained", dataset, "likelihood", f"{metric}_gain", "over unigram")
            cells = [
                f"{of[model].value:.3f}" if model in of else ""
                for model in ("trained", "unigram", "unigram_pooled", "unigram_no_repeat")
            ]
            cells.insert(2, f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "")
            table.add_row(dataset, title, *cells)
    return table


def _f1_table(verdict: Verdict) -> Table | None:
    columns = verdict.columns()
    if not columns:
        return None
    unseen = {dataset.name for dataset in verdict.datasets if not dataset.is_seen}
    table = Table(
        title=f"Macro-F1 of logistic regression [95 % interval], higher is better (seed {verdict.seed})",
        caption=f"unseen by the model: {', '.join(sorted(unseen)) or 'none'}. cell types: donor-grouped folds within a species",
        show_lines=True,
    )
    table.add_column("representation")
    for task, dataset in columns:
        title = "cell types" if task == "celltypes" else "transfer"
        table.add_column(f"{title}\n" + dataset.replace(" -> ", "\n-> ").replace(" + ", "\n+ "), justify="right")
    rows = {
        (model, *column): verdict.value(model, column[1], column[0], "macro_f1", HEADLINE_PROBE)
        for model in TITLES
        for column in columns
    }
    best = {column: max((r.value for m in TITLES if (r := rows[m, *column])), default=0.0) for column in columns}
    for model, title in TITLES.items():
        of = [rows[model, *column] for column in columns]
        if any(of):
            texts = ["" if row is None else _figure(row, row.value == best[column]) for row, column in zip(of, columns)]
            table.add_row(title.replace(" (", "\n("), *texts)
    chance = [next(r for m in TITLES if (r := rows[m, *column])).chance for column in columns]
    table.add_row("chance", *["" if value is None else f"{value:.2f}" for value in chance])
    return table


def _figure(row: Row, is_best: bool) -> str:
    value = f"[bold green]{row.value:.2f}[/]" if is_best else f"{row.value:.2f}"
    return value if row.low is None or row.high is None else f"{value}\n[dim]{row.low:.2f}-{row.high:.2f}[/]"


def long_table(verdict: Verdict) -> pd.DataFrame:
    """All rows, one value a line."""
    frame = pd.DataFrame([dataclasses.asdict(row) for row in verdict.findings.rows])
    frame.insert(1, "checkpoint", verdict.checkpoint)
    frame.insert(6, "seed", verdict.seed)
    return frame


def predictions(verdict: Verdict) -> pd.DataFrame:
    """One line a prediction; `cell` is the soma_joinid (row number of an .h5ad file)."""
    parts = [pd.DataFrame(part) for part in verdict.findings.predictions]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def write(
    out: str,
    verdict: Verdict,
    embeddings: Mapping[str, Mapping[str, np.ndarray]],
    config: EvaluateConfig,
    *,
    facts: Mapping[str, str],
) -> None:
    """Writes the folder `evaluation` below `out`, a local folder or a `scheme://` location; an older one is replaced."""
    run_folder = Folder.at(out)
    with tempfile.TemporaryDirectory(prefix="tftrain-") as temporary:
        here = Path(temporary)
        long_table(verdict).to_parquet(here / "metrics.parquet", index=False)
        predictions(verdict).to_parquet(here / "predictions.parquet", index=False)
        (here / "metrics.json").write_text(json.dumps(summary(verdict, config, facts), indent=1) + "\n")
        embeddings_h5ad(verdict.datasets, embeddings).write_h5ad(here / "embeddings.h5ad")
        pictures.embedding_picture(here / "embeddings.png", verdict.datasets, embeddings)
        if run_folder.exists("metrics.jsonl"):
            pictures.loss_picture(here / "loss.png", run_folder.read_text("metrics.jsonl"))
        folder = run_folder / FOLDER
        folder.remove()
        folder.upload(here)


def summary(verdict: Verdict, config: EvaluateConfig, facts: Mapping[str, str]) -> dict[str, Any]:
    """What metrics.json holds: the rows and everything needed to judge or repeat them."""
    return {
        "checkpoint": verdict.checkpoint,
        "seed": verdict.seed,
        "evaluate": dataclasses.asdict(config),
        "facts": dict(facts),
        "versions": {"tftrain": __version__, **{name: version(name) for name in _LIBRARIES}},
        "datasets": [
            {
                "name": dataset.name,
                "is_seen": dataset.is_seen,
                "cells": len(dataset.cells),
                "fit_cells": len(dataset.fit_cells),
                "donors": len(np.unique(dataset.donor_C.astype(str))),
            }
            for dataset in verdict.datasets
        ],
        "sentences": verdict.sentences(),
        "notes": verdict.findings.notes,
        "rows": [dataclasses.asdict(row) for row in verdict.findings.rows],
    }


def embeddings_h5ad(datasets: Sequence[Dataset], embeddings: Mapping[str, Mapping[str, np.ndarray]]) -> ad.AnnData:
    """All judged cells: obs has dataset, cell (joinid), label, donor; obsm has every representation."""
    obs = pd.DataFrame(
        {
            "dataset": np.concatenate([np.full(len(d.cells), d.name, object) for d in datasets]),
            "cell": np.concatenate([d.cells.joinid_C for d in datasets]),
            "label": np.concatenate([d.label_C for d in datasets]),
            "donor": np.concatenate([d.donor_C for d in datasets]),
            "is_seen": np.concatenate([np.full(len(d.cells), d.is_seen) for d in datasets]),
        }
    )
    obs.index = obs["dataset"] + ":" + obs["cell"].astype(str)
    obsm = {name: np.concatenate([of[d.name] for d in datasets]) for name, of in embeddings.items()}
    return ad.AnnData(obs=obs, obsm=obsm)
