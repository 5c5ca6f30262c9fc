"""The files of an evaluation: the page, long tables, embeddings, and the recipe that repeats it.

In: a verdict and the embeddings. Out: the folder `evaluation` below `out`, replaced whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from tftrain import __version__
from tftrain.evals import page, pictures
from tftrain.evals.baselines import NOT_KEPT
from tftrain.evals.contract import Dataset
from tftrain.evals.report import Verdict
from tftrain.recipe import EvaluateConfig, EvaluateRecipe, dump
from tftrain.training.folder import Folder

FOLDER = "evaluation"
_LIBRARIES = ("torch", "scikit-learn", "scib-metrics", "scanpy", "scvi-tools", "numpy", "anndata", "tiledbsoma", "ray")


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
    metrics = run_folder.read_text("metrics.jsonl") if run_folder.exists("metrics.jsonl") else ""
    found = summary(verdict, config, facts)
    plane, plane_title = pictures.plane_of(verdict.datasets, embeddings, config.projection, verdict.seed)
    with tempfile.TemporaryDirectory(prefix="tftrain-") as temporary:
        here = Path(temporary)
        long_table(verdict).to_parquet(here / "metrics.parquet", index=False)
        predictions(verdict).to_parquet(here / "predictions.parquet", index=False)
        (here / "metrics.json").write_text(json.dumps(found, indent=1) + "\n")
        again = EvaluateRecipe(verdict.checkpoint, out, config, seed=verdict.seed)
        (here / "recipe.yaml").write_text(dump(again))
        embeddings_h5ad(verdict.datasets, embeddings).write_h5ad(here / "embeddings.h5ad")
        html = page.render(
            verdict.findings,
            verdict.datasets,
            found,
            plane=plane,
            plane_title=plane_title,
            losses=pictures.losses(metrics),
        )
        (here / "report.html").write_text(html)
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
        "versions": versions(),
        "letters": verdict.letters(),
        "shortfalls": verdict.shortfalls,
        "datasets": [
            {
                "name": dataset.name,
                "is_seen": dataset.is_seen,
                "cells": len(dataset.cells),
                "fit_cells": len(dataset.fit_cells),
                "donors": len(np.unique(dataset.donor_C.astype(str))),
                "cells_sha256": cells_sha256(dataset),
            }
            for dataset in verdict.datasets
        ],
        "sentences": verdict.sentences(),
        "notes": verdict.findings.notes,
        "rows": [dataclasses.asdict(row) for row in verdict.findings.rows],
    }


def versions() -> dict[str, str]:
    """Of this package and of the libraries that figures come from, those that are installed."""
    found = {"tftrain": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cells_sha256(dataset: Dataset) -> str:
    """Of the judged cells: their numbers, genes, counts, labels and donors."""
    digest = hashlib.sha256(dataset.vocab.genes_hash.encode())
    for values in (dataset.cells.joinid_C, dataset.cells.cell_start_C1, dataset.cells.gene_N, dataset.cells.count_N):
        digest.update(np.ascontiguousarray(values).astype("<i8").tobytes())
    for words in (dataset.label_C, dataset.donor_C):
        digest.update("\n".join(map(str, words)).encode())
    return digest.hexdigest()


def embeddings_h5ad(datasets: Sequence[Dataset], embeddings: Mapping[str, Mapping[str, np.ndarray]]) -> ad.AnnData:
    """All judged cells: obs has dataset, cell (joinid), label, donor; obsm has every representation that is more than
    the counts."""
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
    obsm = {
        name: np.concatenate([of[d.name] for d in datasets]) for name, of in embeddings.items() if name not in NOT_KEPT
    }
    return ad.AnnData(obs=obs, obsm=obsm)
