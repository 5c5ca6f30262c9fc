"""Pictures of a run: the loss curve, and embeddings in two dimensions. Illustrations: no figure is computed from them.

Shapes: C cells, D width.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tftrain.evals.baselines import TITLES
from tftrain.evals.contract import Dataset
from tftrain.evals.extra import need

SHOWN = ("trained", "untrained", "pca")
"""Representations that have a row in the picture, where they were made."""


def loss_picture(path: Path, metrics_jsonl: str) -> None:
    """Training and held-out loss by step, from the lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in metrics_jsonl.splitlines() if line.strip()]
    figure, axes = _figure(1, 2, (10, 3.6))
    for axis, name, title in ((axes[0, 0], "loss_gene", "gene"), (axes[0, 1], "loss_count", "count")):
        for prefix, style, label in (
            ("train", {"lw": 0.8, "alpha": 0.8}, "training"),
            ("val", {"marker": "o"}, "held out"),
        ):
            points = [(line["step"], line[f"{prefix}/{name}"]) for line in lines if f"{prefix}/{name}" in line]
            if points:
                axis.plot(*zip(*points), label=label, **style)
        axis.set(xlabel="step", ylabel="nats a gene", title=f"{title} loss")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=130)


def embedding_picture(
    path: Path, datasets: Sequence[Dataset], embeddings: Mapping[str, Mapping[str, np.ndarray]]
) -> None:
    """First two principal components of each shown representation, once coloured by cell type and once by species."""
    shown = [name for name in SHOWN if name in embeddings]
    label_C = np.concatenate([dataset.label_C for dataset in datasets]).astype(str)
    species_C = np.concatenate([np.full(len(dataset.cells), dataset.name) for dataset in datasets])
    order_C = np.random.default_rng(0).permutation(len(label_C))
    figure, axes = _figure(len(shown), 2, (11, 4.2 * len(shown)))
    for row, name in enumerate(shown):
        xy_C2 = plane(np.concatenate([embeddings[name][dataset.name] for dataset in datasets]))
        for axis, by_C, title in ((axes[row, 0], label_C, "cell type"), (axes[row, 1], species_C, "species")):
            _scatter(axis, xy_C2[order_C], by_C[order_C])
            axis.set(
                title=f"{TITLES[name].replace(chr(10), ' ')}: by {title}",
                xticks=[],
                yticks=[],
                xlabel="PC 1",
                ylabel="PC 2",
            )
    figure.savefig(path, dpi=120)


def plane(embedding_CD: np.ndarray) -> np.ndarray:
    """float64 (C, 2): the first two principal components of the z-scored coordinates."""
    spread_D = embedding_CD.std(0)
    z_CD = (embedding_CD - embedding_CD.mean(0)) / np.where(spread_D > 0, spread_D, 1)
    _, axes_DD = np.linalg.eigh(z_CD.T @ z_CD)
    return z_CD @ axes_DD[:, ::-1][:, :2]


def _scatter(axis: Any, xy_C2: np.ndarray, by_C: np.ndarray) -> None:
    """One colour a value, the legend outside."""
    names = np.unique(by_C)
    colours = need("matplotlib").colormaps["tab10" if len(names) <= 10 else "tab20"]
    number_C = np.searchsorted(names, by_C)
    axis.scatter(*xy_C2.T, c=colours(number_C % 20), s=5, linewidths=0)
    for number, name in enumerate(names[:20]):
        axis.scatter([], [], color=colours(number % 20), s=20, label=name or "(no label)")
    axis.legend(frameon=False, fontsize=7, bbox_to_anchor=(1.0, 1.0), loc="upper left")


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure without a display, and its axes (rows, columns)."""
    figure = need("matplotlib.figure").Figure(figsize=size, layout="constrained")
    need("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)
