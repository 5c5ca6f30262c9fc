"""What an evaluation leaves behind: the verdict on the terminal, long tables, pictures.

Every figure of the verdict stands beside chance, the baselines on the same cells and its 95 % interval; the lines
below the tables say who wins, whoever it is.
"""

from __future__ import annotations

import dataclasses
import json
import string
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from rich import box
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

    def letters(self) -> dict[str, str]:
        """A short name of every data set, for tables."""
        few = len(self.datasets) <= len(string.ascii_uppercase)
        return {d.name: string.ascii_uppercase[i] if few else d.name for i, d in enumerate(self.datasets)}

    def lines(self) -> list[tuple[str, str]]:
        """(task, data set) of each line of the F1 table: cell types of every species, then transfers, those to unseen
        species last."""
        unseen = {dataset.name for dataset in self.datasets if not dataset.is_seen}
        found = dict.fromkeys(
            (row.task, row.dataset) for row in self.findings.rows if row.metric == "macro_f1" and row.fold == -1
        )
        return sorted(found, key=lambda c: (c[0] != "celltypes", c[1].split(" -> ")[-1] in unseen, " + " in c[1]))

    def sentences(self) -> list[str]:
        """One sentence a line of the F1 table: who beats whom, and whether a baseline or the oracle wins."""
        found, letters = [], self.letters()
        for task, dataset in self.lines():
            rows = {
                model: row
                for model in TITLES
                if (row := self.value(model, dataset, task, "macro_f1", HEADLINE_PROBE)) is not None
            }
            if "trained" in rows and len(rows) > 1:
                where = "cell types" if task == "celltypes" else "transfer"
                found.append(f"{where} {_lettered(dataset, letters)}: {_judgement(rows)}")
        return found


def _judgement(rows: Mapping[str, Row]) -> str:
    """`trained 0.71 beats ...; best is a baseline: ...; below the oracle: ...`."""
    own = rows["trained"].value
    others = sorted(((row.value, model) for model, row in rows.items() if model != "trained"), reverse=True)
    beaten = [f"{_short(model)} {value:.2f}" for value, model in others if value < own]
    better = [f"{_short(model)} {value:.2f}" for value, model in others if value >= own and model not in ORACLES]
    oracle = [f"{_short(model)} {value:.2f}" for value, model in others if value >= own and model in ORACLES]
    parts = [f"trained {own:.2f} beats {', '.join(beaten) or 'nothing'}"]
    if better:
        parts.append(f"a baseline is better or equal: {', '.join(better)}")
    if oracle:
        parts.append(f"the oracle is better or equal: {', '.join(oracle)}")
    return "; ".join(parts)


def _short(model: str) -> str:
    return TITLES[model].replace("\n", " ").rstrip("*")


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Prints both tables, the sentences and the notes; fits 80 columns."""
    letters = verdict.letters()
    for dataset in verdict.datasets:
        how = "trained on; its held-out donors are judged" if dataset.is_seen else "no cell of it was trained on"
        _say(console, f"{letters[dataset.name]} = {dataset.name}: {len(dataset.cells):,} cells, {how}")
    for table in filter(None, [_likelihood_table(verdict, letters), _f1_table(verdict, letters)]):
        console.print(table)
    if any(row.model in ORACLES for row in verdict.findings.rows):
        _say(console, "* an oracle: it is told which genes are orthologs, which no model is")
    for line in verdict.sentences():
        _say(console, f"- {line}")
    for note in verdict.findings.notes:
        _say(console, f"note: {note}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _likelihood_table(verdict: Verdict, letters: Mapping[str, str]) -> Table | None:
    rows = [row for row in verdict.findings.rows if row.task == "likelihood"]
    if not rows:
        return None
    table = _table(f"Held-out NLL, nats a gene, lower is better (seed {verdict.seed})")
    for title in (
        "",
        "trained",
        "unigram",
        "gain over unigram [95 %]",
        "unigram,\nall species",
        "unigram,\nno repeats",
    ):
        table.add_column(title, justify="right" if title else "left")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for metric, title in (("gene_nll", "gene"), ("count_nll", "count")):
            of = {row.model: row for row in rows if row.dataset == dataset and row.metric == metric}
            gain = verdict.value("trained", dataset, "likelihood", f"{metric}_gain", "over unigram")
            cells = [
                f"{of[model].value:.3f}" if model in of else ""
                for model in ("trained", "unigram", "unigram_pooled", "unigram_no_repeat")
            ]
            cells.insert(2, f"{gain.value:+.3f} \\[{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "")
            table.add_row(f"{letters[dataset]}: {title}", *cells)
    return table


def _f1_table(verdict: Verdict, letters: Mapping[str, str]) -> Table | None:
    lines = verdict.lines()
    if not lines:
        return None
    table = _table(f"Macro-F1 of logistic regression, 95 % interval below it (seed {verdict.seed})")
    table.add_column("", no_wrap=True)
    found = {row.model for row in verdict.findings.rows if row.metric == "macro_f1"}
    models = [model for model in TITLES if model in found]
    for model in models:
        table.add_column(TITLES[model], justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for task, dataset in lines:
        rows = [verdict.value(model, dataset, task, "macro_f1", HEADLINE_PROBE) for model in models]
        best = max(row.value for row in rows if row)
        chance = next(row.chance for row in rows if row)
        title = ("cell types " if task == "celltypes" else "") + _lettered(dataset, letters)
        cells = ["" if row is None else _figure(row, row.value == best) for row in rows]
        table.add_row(title, *cells, "" if chance is None else f"{chance:.2f}")
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _lettered(dataset: str, letters: Mapping[str, str]) -> str:
    """`A + B -> C` of a data set's name."""
    sides = dataset.split(" -> ")
    return " -> ".join(" + ".join(letters[name] for name in side.split(" + ")) for side in sides)


def _figure(row: Row, is_best: bool) -> str:
    value = f"[bold green]{row.value:.2f}[/]" if is_best else f"{row.value:.2f}"
    if row.low is None or row.high is None:
        return value
    # Without the leading zero, so that six representations fit 80 columns.
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in (row.low, row.high))
    return f"{value}\n[dim]{low}-{high}[/]"


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
    """Writes the folder `evaluation` below `out`, a local folder or a `scheme://` location; an older one is
    replaced."""
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
