"""`tftrain predict`: a fine-tuned checkpoint with a head and an .h5ad file -> an .h5ad file with labelled cells.

Out: obs with its names and columns as they were, and, for a label `cell_type`: obs['predicted_cell_type'],
obs['predicted_cell_type_probability'] and obsm['cell_type_probabilities'], whose columns are
uns['cell_type_classes']; for a number obs['predicted_<label>'] alone. uns['tftrain'] says how it was made.

A cell whose likeliest class is less probable than the checkpoint's threshold is called `unknown`. The threshold was
set on the run's held-out cells, of which `head.unknown_fraction` lie below it: of new cells like those about as many
will be called unknown, of cells unlike any that were trained on more, though nothing bounds how many. A cell without
any gene of the vocabulary is `unknown`, with a probability of NaN.

Shapes: C cells, D width, K classes.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import torch
from rich.console import Console

from tftrain import __version__
from tftrain.cells.contract import Cells
from tftrain.cells.h5ad import H5adFile, match_genes, read_h5ad
from tftrain.embed import BLOCK_CELLS, Embedder, load_embedder
from tftrain.errors import CellsError, CheckpointError, RecipeError
from tftrain.models.heads import Head
from tftrain.pretrained import TrainedHead

UNKNOWN = "unknown"


@dataclass(frozen=True)
class PredictSummary:
    """What `predict_h5ad` did."""

    n_cells: int
    n_unknown: int
    """Cells without an answer."""
    threshold: float | None


def predict_h5ad(
    checkpoint: str | Path,
    cells: str | Path,
    out: str | Path,
    *,
    is_unknown_told: bool = True,
    gene_col_name: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> PredictSummary:
    """Labels the cells of one file; see the top of this file.

    Raises CheckpointError for a checkpoint without a head, CellsError for cells that cannot be used, and for columns of
    the answer that the file has already.
    """
    cells, out, console = Path(cells), Path(out), console or Console(stderr=True)
    if out.resolve() == cells.resolve():
        raise RecipeError(f"{out} is the input too; name another output file")
    embedder = load_embedder(checkpoint, device=device)
    if embedder.head is None:
        raise CheckpointError(f"{checkpoint} has no head to predict with; fine-tune one with head.label=... first")
    use_raw = embedder.reading.get("use_raw")
    with H5adFile(cells, use_raw=use_raw) as file:
        if gene_col_name is None and embedder.reading.get("gene_col_name") in file.var.columns:
            gene_col_name = embedder.reading["gene_col_name"]
        match = match_genes(file, embedder.vocab, gene_col_name)
        console.print(f"{cells}: {file.n_cells:,} cells; {match.describe()}", highlight=False, soft_wrap=True)
        obs = file.obs.copy()
        _check_names(cells, obs, embedder.head)
        columns = embedder.architecture.obs_columns(embedder.config)
        blocks = read_h5ad(file, embedder.vocab, match, obs_columns=columns, block_cells=BLOCK_CELLS)
        head = embedder.head.build(embedder.config.width)
        parts = [_outputs(embedder, head, block) for block in blocks]
    out_CK = np.concatenate(parts)
    threshold = embedder.head.unknown["threshold"] if is_unknown_told and embedder.head.unknown else None
    answer = answers(embedder.head, out_CK, threshold, obs)
    answer.uns["tftrain"] = {
        "version": __version__,
        "checkpoint": embedder.origin,
        **embedder.facts,
        "cells": str(cells),
        "genes": match.describe(),
        "unknown_below": "" if threshold is None else f"{threshold:.6g}",
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    _write(answer, out)
    label = f"predicted_{embedder.head.labels.column}"
    told = answer.obs[label]
    n_unknown = int((told == UNKNOWN).sum() if told.dtype == object or told.dtype == "category" else told.isna().sum())
    if embedder.head.labels.task == "classify" and is_unknown_told and threshold is None:
        console.print("no held-out cells set a threshold: no cell is called unknown for its probability")
    below = "" if threshold is None else f" ({UNKNOWN} below {threshold:.3f})"
    console.print(
        f"{out}: {len(obs):,} cells labelled, {n_unknown:,} {UNKNOWN}{below}", highlight=False, soft_wrap=True
    )
    return PredictSummary(len(obs), n_unknown, threshold)


def answers(head: TrainedHead, out_CK: np.ndarray, threshold: float | None, obs: pd.DataFrame) -> anndata.AnnData:
    """Cells without X: obs with the answers in it. `out_CK` are logits, or a standardised number; NaN for a cell
    without genes."""
    labels, obs = head.labels, obs.copy()
    name = f"predicted_{labels.column}"
    if labels.task == "regress":
        obs[name] = out_CK[:, 0] * labels.sd + labels.mean
        return anndata.AnnData(obs=obs)
    exp_CK = np.exp(out_CK - out_CK.max(1, keepdims=True))
    probability_CK = (exp_CK / exp_CK.sum(1, keepdims=True)).astype(np.float32)
    is_empty_C = np.isnan(probability_CK).any(1)
    best_C = np.where(is_empty_C, 0, np.nan_to_num(probability_CK).argmax(1))
    peak_C = probability_CK[np.arange(len(obs)), best_C]
    told_C = np.array(labels.classes, object)[best_C]
    told_C[is_empty_C] = UNKNOWN
    if threshold is not None:
        told_C[peak_C < threshold] = UNKNOWN
    obs[name] = pd.Categorical(told_C, categories=[*labels.classes, UNKNOWN])
    obs[f"{name}_probability"] = peak_C
    answer = anndata.AnnData(obs=obs)
    answer.obsm[f"{labels.column}_probabilities"] = probability_CK
    answer.uns[f"{labels.column}_classes"] = np.array(labels.classes, object)
    return answer


def _outputs(embedder: Embedder, head: Head, cells: Cells) -> np.ndarray:
    """float64 (C, K): what the head says of the cells' embeddings; NaN for a cell without genes."""
    embedding_CD = embedder.outputs(cells, ("embeddings",))["embeddings"]
    with torch.no_grad():
        out_CK = head(torch.from_numpy(embedding_CD)).numpy().astype(np.float64)
    out_CK[cells.n_expressed_C == 0] = np.nan
    return out_CK


def _check_names(path: Path, obs: pd.DataFrame, head: TrainedHead) -> None:
    name = f"predicted_{head.labels.column}"
    for taken in (name, f"{name}_probability"):
        if taken in obs:
            raise CellsError(f"{path}: obs has a column {taken!r} already; rename or drop it, it would be lost")


def _write(answer: anndata.AnnData, out: Path) -> None:
    """The file appears whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        answer.write_h5ad(partial)
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
