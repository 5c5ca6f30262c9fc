"""`tftrain embed`: a checkpoint and an .h5ad file -> an .h5ad file with embeddings.

Out: obs with its names and columns as they were; obsm['embeddings']; uns['llh'] and obsm['gene_llh'] if asked for;
uns['cge_*'] for contextual gene embeddings (MODEL.md 1.6); uns['tftrain'] says how it was made. Cells are read,
embedded and written block by block. The file appears whole or not at all.

Shapes: C cells, L genes kept of a cell, D width, N genes of all cells together.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import nn

from tftrain import __version__
from tftrain.cells.contract import Cells
from tftrain.cells.h5ad import GeneMatch, H5adFile, match_genes, read_h5ad
from tftrain.cells.vocab import Vocab
from tftrain.errors import CheckpointError, RecipeError
from tftrain.models.arch import Architecture
from tftrain.pretrained import TrainedHead, load_pretrained

OUTPUT_KEYS = ("embeddings", "llh", "gene_llh")
EMBEDDING_TYPES = ("cell", "cge")
BLOCK_CELLS = 1024
"""Cells read, sorted by length and written together."""
TOKENS_PER_BATCH = {"cuda": 65_536}
TOKENS_PER_BATCH_ELSEWHERE = 8_192


@dataclass(frozen=True)
class Embedder:
    """A trained model with the genes it is to read."""

    architecture: Architecture
    config: Any
    vocab: Vocab
    module: nn.Module
    origin: str
    """The checkpoint, as given."""
    has_likelihoods: bool
    """False where the genes are not those that the heads were trained on."""
    facts: dict[str, str]
    """Provenance: hashes, step, tables."""
    reading: dict[str, Any]
    """How the checkpoint's publisher reads cells: `gene_col_name`, `use_raw`; empty for our own."""
    head: TrainedHead | None = None
    """What the checkpoint tells of a cell beside its embedding, if anything."""

    def outputs(self, cells: Cells, keys: Sequence[str], *, max_tokens: int | None = None) -> dict[str, np.ndarray]:
        """float32 outputs of cells: `embeddings` (C, D), `llh` (C), `gene_llh` (C, L, zeros after the last gene), and
        `cge` (N, D) with `cge_cell` and `cge_row` (N). A cell without genes has zeros, NaN for `llh`, no row of `cge`.
        """
        n_tokens_C = self.architecture.tokens_of(cells, self.config)
        index_K = np.flatnonzero(n_tokens_C > 0)
        if "cge" not in keys:
            # Cells of one length make dense batches; gene embeddings keep the cells' order.
            index_K = index_K[np.argsort(n_tokens_C[index_K], kind="stable")]
        device = next(self.module.parameters()).device
        default = TOKENS_PER_BATCH.get(device.type, TOKENS_PER_BATCH_ELSEWHERE)
        limit = max(max_tokens or default, int(n_tokens_C.max(initial=0)))
        batches = self.architecture.collate(
            cells.take(index_K), self.config, self.vocab, seed=0, shuffle_genes=False, max_tokens=limit
        )
        width, n_kept = self.config.width, self.config.genes_per_cell
        shapes = {"embeddings": (len(cells), width), "llh": (len(cells),), "gene_llh": (len(cells), n_kept)}
        out = {key: np.zeros(shapes[key], np.float32) for key in keys if key in shapes}
        if "llh" in out:
            out["llh"][:] = np.nan
        cge: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        first = 0
        for batch in batches:
            got = self.architecture.embed(self.module, batch.to(device), keys)
            host = {key: value.float().cpu().numpy() for key, value in got.items()}
            cell_K = index_K[first : first + batch.n_cells]
            first += batch.n_cells
            for key in ("embeddings", "llh"):
                if key in out:
                    out[key][cell_K] = host[key]
            n_genes_K = np.minimum(cells.n_expressed_C[cell_K], n_kept)
            cell_N = np.repeat(cell_K, n_genes_K)
            if "gene_llh" in out:
                at_N = np.arange(len(cell_N)) - np.repeat(np.cumsum(n_genes_K) - n_genes_K, n_genes_K)
                out["gene_llh"][cell_N, at_N] = host["gene_llh"]
            if "cge" in keys:
                cge.append((host["cge"], cell_N, batch.gene_row_S))  # type: ignore[attr-defined]
        if "cge" in keys:
            empty = (np.zeros((0, width), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int32))
            for key, parts in zip(("cge", "cge_cell", "cge_row"), zip(*(cge or [empty]))):
                out[key] = np.concatenate(parts)
        return out


def load_embedder(
    checkpoint: str | Path, *, pretrained_embedding: str | Path | None = None, device: str | None = None
) -> Embedder:
    """A published-layout folder, a checkpoint of ours, or a run folder of ours (see `pretrained`), ready on `device`
    (None: CUDA where there is one).

    `pretrained_embedding` replaces the model's genes by those of a protein table. Raises CheckpointError for a folder
    that is none of these, is unfinished, or does not fit its own configuration and vocabulary.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_pretrained(checkpoint)
    arch, config, vocab, module = model.architecture, model.config, model.vocab, model.build()
    facts = {**model.facts, "protein_tables": "\n".join(vocab.files)}
    if pretrained_embedding is not None:
        vocab = Vocab.load([pretrained_embedding])
        arch.set_genes(module, config, vocab)
        facts |= {"pretrained_embedding": str(pretrained_embedding), "pretrained_genes_hash": vocab.genes_hash}
    module.requires_grad_(False).eval().to(target)
    is_own = pretrained_embedding is None
    return Embedder(arch, config, vocab, module, str(checkpoint), is_own, facts, dict(model.reading), model.head)


@dataclass(frozen=True)
class EmbedSummary:
    """What `embed_h5ad` did, for the terminal."""

    n_cells: int
    n_without_genes: int
    """Cells without any gene of the vocabulary; their embedding is zero."""
    n_truncated: int
    """Cells with more genes than the model keeps."""
    cells_per_s: float
    genes: str


def embed_h5ad(
    checkpoint: str | Path,
    cells: str | Path,
    out: str | Path,
    *,
    emb_type: str = "cell",
    output_keys: Sequence[str] = ("embeddings",),
    pretrained_embedding: str | Path | None = None,
    gene_col_name: str | None = None,
    use_raw: bool | None = None,
    max_tokens: int | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> EmbedSummary:
    """Embeds the cells of one file; see the top of this file for what is written.

    Deterministic on a CPU; a cell's outputs do not depend on its neighbours beyond rounding. A head that no output
    needs does not run. Raises RecipeError for unknown keys, CheckpointError for a checkpoint that cannot be used and
    for likelihoods of a new species, CellsError for cells that cannot be used.
    """
    keys = _checked_keys(emb_type, output_keys, pretrained_embedding)
    cells, out = Path(cells), Path(out)
    if out.resolve() == cells.resolve():
        raise RecipeError(f"{out} is the input too; name another output file")
    console = console or Console(stderr=True)
    embedder = load_embedder(checkpoint, pretrained_embedding=pretrained_embedding, device=device)
    use_raw = embedder.reading.get("use_raw") if use_raw is None else use_raw
    with H5adFile(cells, use_raw=use_raw) as file:
        if gene_col_name is None and embedder.reading.get("gene_col_name") in file.var.columns:
            gene_col_name = embedder.reading["gene_col_name"]
        match = match_genes(file, embedder.vocab, gene_col_name)
        console.print(f"{cells}: {file.n_cells:,} cells; {match.describe()}", highlight=False, soft_wrap=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
        try:
            summary = _embed_into(partial, embedder, file, match, keys, max_tokens, console)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    _print_summary(console, summary, embedder, out)
    return summary


def _checked_keys(
    emb_type: str, output_keys: Sequence[str], pretrained_embedding: str | Path | None
) -> tuple[str, ...]:
    if emb_type not in EMBEDDING_TYPES:
        raise RecipeError(f"embedding type {emb_type!r} is unknown; choose one of {', '.join(EMBEDDING_TYPES)}")
    unknown = [key for key in output_keys if key not in OUTPUT_KEYS]
    if unknown or not output_keys:
        raise RecipeError(f"output keys {list(output_keys)} must be some of {', '.join(OUTPUT_KEYS)}")
    scores = [key for key in output_keys if key != "embeddings"]
    if scores and pretrained_embedding is not None:
        raise CheckpointError(
            f"{', '.join(scores)} cannot be computed with {pretrained_embedding}: the model has trained no count bias "
            "and no gene row for its genes, so the values would be those of other genes; ask for embeddings only"
        )
    return (*dict.fromkeys(output_keys), *(("cge",) if emb_type == "cge" else ()))


def _embed_into(
    path: Path,
    embedder: Embedder,
    file: H5adFile,
    match: GeneMatch,
    keys: Sequence[str],
    max_tokens: int | None,
    console: Console,
) -> EmbedSummary:
    """Writes the whole output to `path`."""
    n_without_genes = n_truncated = 0
    n_kept, began = embedder.config.genes_per_cell, time.monotonic()
    obs_columns = embedder.architecture.obs_columns(embedder.config)
    blocks = read_h5ad(file, embedder.vocab, match, obs_columns=obs_columns, block_cells=BLOCK_CELLS)
    columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
    with _Output(path, file.obs, embedder, keys) as output, Progress(*columns, console=console) as progress:
        task = progress.add_task("embedding", total=file.n_cells)
        for block in blocks:
            output.write(int(block.joinid_C[0]), embedder.outputs(block, keys, max_tokens=max_tokens))
            n_without_genes += int((block.n_expressed_C == 0).sum())
            n_truncated += int((block.n_expressed_C > n_kept).sum())
            progress.advance(task, len(block))
        summary = EmbedSummary(
            file.n_cells,
            n_without_genes,
            n_truncated,
            file.n_cells / max(time.monotonic() - began, 1e-9),
            match.describe(),
        )
        output.finish(_provenance(embedder, file, summary, keys))
    return summary


class _Rate(ProgressColumn):
    """Cells a second, empty until there is one."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.1f} cells/s" if task.speed else "")


def _provenance(embedder: Embedder, file: H5adFile, summary: EmbedSummary, keys: Sequence[str]) -> dict[str, str]:
    return {
        "version": __version__,
        "checkpoint": embedder.origin,
        **embedder.facts,
        "cells": file.path,
        "layer": "raw/X" if file.is_raw else "X",
        "genes": summary.genes,
        "genes_kept_per_cell": str(embedder.config.genes_per_cell),
        "cells_truncated": str(summary.n_truncated),
        "cells_without_genes": str(summary.n_without_genes),
        "output_keys": ",".join(keys),
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _print_summary(console: Console, summary: EmbedSummary, embedder: Embedder, out: Path) -> None:
    lines = [f"{out}: {summary.n_cells:,} cells at {summary.cells_per_s:,.1f} cells/s"]
    if summary.n_truncated:
        share, kept = summary.n_truncated / summary.n_cells, embedder.config.genes_per_cell
        lines.append(
            f"{summary.n_truncated:,} cells ({share:.1%}) express more than {kept:,} genes and were cut at that"
        )
    if summary.n_without_genes:
        lines.append(f"{summary.n_without_genes:,} cells express no gene of the vocabulary; their embedding is zero")
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


class _Output:
    """The output file, filled from the first cell to the last."""

    def __init__(self, path: Path, obs: pd.DataFrame, embedder: Embedder, keys: Sequence[str]) -> None:
        self._path, self._obs, self._vocab, self._keys = path, obs, embedder.vocab, keys
        self._llh_C = np.full(len(obs), np.nan, np.float32)
        width, n_kept = embedder.config.width, embedder.config.genes_per_cell
        # Without X, and so without var: what the published tool writes too.
        anndata.AnnData(obs=obs).write_h5ad(path)
        self._file = h5py.File(path, "r+")
        if "embeddings" in keys:
            self._array("obsm/embeddings", (len(obs), width))
        if "gene_llh" in keys:
            self._array("obsm/gene_llh", (len(obs), n_kept), compression="lzf")
        if "cge" in keys:
            self._array("uns/cge_embeddings", (0, width), maxshape=(None, width))
            self._array("uns/cge_cell_indices", (0,), maxshape=(None,), dtype=np.int64)
            text = h5py.string_dtype()
            self._array("uns/cge_gene_names", (0,), maxshape=(None,), dtype=text, encoding="string-array")

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *unused: object) -> None:
        self._file.close()

    def write(self, first: int, outputs: dict[str, np.ndarray]) -> None:
        """The outputs of cells `first`, `first` + 1, ..."""
        for key in ("embeddings", "gene_llh"):
            if key in self._keys:
                self._file[f"obsm/{key}"][first : first + len(outputs[key])] = outputs[key]
        if "llh" in self._keys:
            self._llh_C[first : first + len(outputs["llh"])] = outputs["llh"]
        if "cge" in self._keys:
            names = np.array(self._vocab.gene_ids, object)[outputs["cge_row"]]
            self._append("uns/cge_embeddings", outputs["cge"])
            self._append("uns/cge_cell_indices", outputs["cge_cell"] + first)
            self._append("uns/cge_gene_names", names)

    def finish(self, provenance: dict[str, str]) -> None:
        """Writes what is known at the end only."""
        if "llh" in self._keys:
            frame = pd.DataFrame({"llh": self._llh_C}, index=self._obs.index)
            anndata.io.write_elem(self._file, "uns/llh", frame)
        anndata.io.write_elem(self._file, "uns/tftrain", provenance)
        self._file.flush()

    def _array(
        self, name: str, shape: tuple[int, ...], *, dtype: Any = np.float32, encoding: str = "array", **options: Any
    ) -> None:
        dataset = self._file.create_dataset(name, shape, dtype, **options)
        dataset.attrs["encoding-type"], dataset.attrs["encoding-version"] = encoding, "0.2.0"

    def _append(self, name: str, values: np.ndarray) -> None:
        dataset = self._file[name]
        dataset.resize(len(dataset) + len(values), axis=0)
        dataset[len(dataset) - len(values) :] = values
