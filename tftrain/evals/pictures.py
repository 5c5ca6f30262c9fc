"""What is drawn of a run: the loss by step, and embeddings in two dimensions. Illustrations: no figure is computed from
them.

Shapes: C cells, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np

from tftrain.evals.contract import Dataset
from tftrain.evals.extra import need

SHOWN = ("trained", "untrained", "pca")
"""Representations that are drawn in two dimensions, where they were made."""
Series = tuple[str, Sequence[float], Sequence[float]]


def losses(metrics_jsonl: str) -> list[tuple[str, list[Series]]]:
    """(gene or count, [(training or held out, steps, losses)]) from the lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics_jsonl.splitlines() if line.strip()]
    found = []
    for part in ("gene", "count"):
        series: list[Series] = []
        for prefix, name in (("train", "training"), ("val", "held out")):
            key = f"{prefix}/loss_{part}"
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                series.append((name, [step for step, _ in points], [loss for _, loss in points]))
        if series:
            found.append((part, series))
    return found


def plane_of(
    datasets: Sequence[Dataset], embeddings: Mapping[str, Mapping[str, np.ndarray]], projection: str, seed: int
) -> tuple[dict[str, np.ndarray], str]:
    """Representation -> (C, 2) over all data sets, and what the coordinates are; `projection` is pca or umap."""
    shown = {
        name: np.concatenate([embeddings[name][dataset.name] for dataset in datasets])
        for name in SHOWN
        if name in embeddings
    }
    if projection == "umap":
        umap = need("umap")
        made = {
            name: umap.UMAP(n_neighbors=30, random_state=seed, n_jobs=1).fit_transform(z_scored(of))
            for name, of in shown.items()
        }
        return made, "UMAP (30 neighbours) of each z-scored representation"
    return {name: plane(of) for name, of in shown.items()}, "the first two principal components of each representation"


def plane(embedding_CD: np.ndarray) -> np.ndarray:
    """float64 (C, 2): the first two principal components of the z-scored coordinates."""
    z_CD = z_scored(embedding_CD)
    _, axes_DD = np.linalg.eigh(z_CD.T @ z_CD)
    xy_CD = z_CD @ axes_DD[:, ::-1][:, :2]
    return xy_CD if xy_CD.shape[1] == 2 else np.column_stack([xy_CD, np.zeros(len(xy_CD))])


def z_scored(embedding_CD: np.ndarray) -> np.ndarray:
    """Each coordinate with mean 0 and standard deviation 1, a constant one 0."""
    spread_D = embedding_CD.std(0)
    return (embedding_CD - embedding_CD.mean(0)) / np.where(spread_D > 0, spread_D, 1)
