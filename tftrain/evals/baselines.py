"""Representations that need no training of ours, on the same cells as the model's.

Each takes the data sets and gives data set -> float32 (C, D). `pca`, `ortholog_pca`, `log_counts` (which genes vary
most) and `scvi` are fitted on the training cells of the seen sources; a species without training cells joins with its
judged cells where its genes would otherwise have no loadings at all (labels are never used). PCA over gene ids has no
gene in common with an unseen species: that it scores chance there is the point. `ortholog_pca` is told the true
orthologs: an oracle, which no model of ours is told.

Shapes: C cells, D width, U genes of the union over species, E protein width.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from tftrain.cells.contract import Cells
from tftrain.errors import CellsError, RecipeError
from tftrain.evals.contract import Dataset
from tftrain.evals.extra import need

Representation = dict[str, np.ndarray]
COMPONENTS = 50
HVG = 2000
"""Genes of `log_counts`."""


def random(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """Normal noise, 64 wide: what a representation that knows nothing scores."""
    rng = np.random.default_rng([seed, 11])
    return {dataset.name: rng.normal(size=(len(dataset.cells), 64)).astype(np.float32) for dataset in datasets}


def pca(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """PCA of log-normalised counts over the union of all species' gene ids."""
    ids = np.unique(np.concatenate([np.asarray(dataset.vocab.gene_ids) for dataset in datasets]))
    columns = {dataset.name: np.searchsorted(ids, np.asarray(dataset.vocab.gene_ids)) for dataset in datasets}
    return _pca(datasets, columns, len(ids), seed=seed, with_unseen=True)


def ortholog_pca(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """PCA of log-normalised counts over orthogroups of the table `orthologs` (gene_id, orthogroup); other genes
    dropped."""
    if orthologs is None:
        raise CellsError(
            "the baseline ortholog_pca needs evaluate.orthologs, a table with the columns gene_id and orthogroup"
        )
    table = read_orthologs(orthologs)
    columns = {
        dataset.name: table.reindex(dataset.vocab.gene_ids).fillna(-1).to_numpy(np.int64) for dataset in datasets
    }
    return _pca(datasets, columns, int(table.max()) + 1, seed=seed, with_unseen=False)


def protein_mean(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """Mean of a cell's protein vectors, weighted by raw counts."""
    means = {}
    for dataset in datasets:
        cells = dataset.cells
        counts_CG = sp.csr_matrix(
            (cells.count_N.astype(np.float32), cells.gene_N, cells.cell_start_C1), (len(cells), dataset.vocab.n_genes)
        )
        total_C = np.asarray(counts_CG.sum(1)).ravel()
        means[dataset.name] = (counts_CG @ dataset.vocab.protein_GE() / total_C[:, None]).astype(np.float32)
    return means


def log_counts(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """Log-normalised counts of the HVG genes that vary most, what a logistic regression without any model sees."""
    ids = np.unique(np.concatenate([np.asarray(dataset.vocab.gene_ids) for dataset in datasets]))
    columns = {dataset.name: np.searchsorted(ids, np.asarray(dataset.vocab.gene_ids)) for dataset in datasets}
    fit = sp.vstack(_fit_matrices(datasets, columns, len(ids), with_unseen=True)).tocsr()
    mean_U = np.asarray(fit.mean(0)).ravel()
    variance_U = np.asarray(fit.multiply(fit).mean(0)).ravel() - mean_U**2
    kept_U = np.sort(np.argsort(-variance_U, kind="stable")[:HVG])
    return {
        dataset.name: log_normalised(dataset.cells, columns[dataset.name], len(ids))[:, kept_U].toarray()
        for dataset in datasets
    }


def need_scvi() -> None:
    """Raises RecipeError where scvi-tools is not installed."""
    if importlib.util.find_spec("scvi") is None:
        raise RecipeError(
            "the baseline scvi needs the package scvi-tools, which is not installed: pip install "
            "'tftrain[eval-baselines]', or drop it from evaluate.baselines"
        )


def scvi(datasets: Sequence[Dataset], *, seed: int, orthologs: str | None = None) -> Representation:
    """The latent means of scVI (30 wide, its other defaults, early stopping) over the union of all species' gene ids;
    without a batch covariate, since judged donors are new to it."""
    need_scvi()
    tools = importlib.import_module("scvi")
    tools.settings.seed = seed
    tools.settings.verbosity = 40
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ids = np.unique(np.concatenate([np.asarray(dataset.vocab.gene_ids) for dataset in datasets]))
    columns = {dataset.name: np.searchsorted(ids, np.asarray(dataset.vocab.gene_ids)) for dataset in datasets}
    fit = sp.vstack(_fit_matrices(datasets, columns, len(ids), with_unseen=True, of=counts_in)).tocsr()
    known = ad.AnnData(fit)
    tools.model.SCVI.setup_anndata(known)
    model = tools.model.SCVI(known, n_latent=30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train(accelerator="cpu", early_stopping=True, enable_progress_bar=False, logger=False)
    return {
        dataset.name: model.get_latent_representation(
            ad.AnnData(counts_in(dataset.cells, columns[dataset.name], len(ids)))
        ).astype(np.float32)
        for dataset in datasets
    }


BASELINES: dict[str, Callable[..., Representation]] = {
    "random": random,
    "pca": pca,
    "ortholog_pca": ortholog_pca,
    "protein_mean": protein_mean,
    "log_counts": log_counts,
    "scvi": scvi,
}
"""The untrained model stands beside these; it needs the architecture, so `run.py` adds it."""
NOT_KEPT = ("log_counts",)
"""Not written to embeddings.h5ad: they are the counts themselves."""

TITLES = {
    "trained": "trained",
    "untrained": "untrained",
    "random": "random",
    "pca": "PCA",
    "log_counts": "log\ncounts",
    "scvi": "scVI",
    "protein_mean": "protein\nmean",
    "protein": "protein\nvector",
    "ortholog_pca": "ortholog\nPCA*",
}
"""How tables and pictures name a representation, in the order in which they show it; * marks an oracle."""

FITTED = ("pca", "log_counts", "scvi")
"""Fitted on the judged cells of a species that has no training cells, though never on their labels."""


def read_orthologs(path: str) -> pd.Series:
    """gene id -> orthogroup number. Raises CellsError for a missing file or column, or a gene in two orthogroups."""
    if not Path(path).is_file():
        raise CellsError(f"evaluate.orthologs: no file at {path}")
    table = pd.read_csv(path, sep="\t")
    missing = {"gene_id", "orthogroup"} - set(table.columns)
    if missing:
        raise CellsError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(table.columns)}")
    twice = table.gene_id[table.gene_id.duplicated()]
    if len(twice):
        raise CellsError(f"{path}: gene {twice.iloc[0]} is in more than one orthogroup; keep one-to-one orthologs")
    return pd.Series(pd.factorize(table.orthogroup)[0], index=table.gene_id.to_numpy())


def counts_in(cells: Cells, column_G: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """float32 (C, U): raw counts, genes of column -1 left out."""
    column_N = column_G[cells.gene_N]
    row_N = np.repeat(np.arange(len(cells)), cells.n_expressed_C)
    kept = column_N >= 0
    return sp.csr_matrix(
        (cells.count_N[kept].astype(np.float32), (row_N[kept], column_N[kept])), shape=(len(cells), n_columns)
    )


def log_normalised(cells: Cells, column_G: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """float32 (C, U): ln(1 + 10,000 x count / the cell's total over all its genes), genes of column -1 left out."""
    total_C = np.bincount(np.repeat(np.arange(len(cells)), cells.n_expressed_C), cells.count_N, len(cells))
    column_N = column_G[cells.gene_N]
    row_N = np.repeat(np.arange(len(cells)), cells.n_expressed_C)
    value_N = np.log1p(1e4 * cells.count_N / np.maximum(total_C, 1)[row_N]).astype(np.float32)
    kept = column_N >= 0
    return sp.csr_matrix((value_N[kept], (row_N[kept], column_N[kept])), shape=(len(cells), n_columns))


def _pca(
    datasets: Sequence[Dataset], columns: dict[str, np.ndarray], n_columns: int, *, seed: int, with_unseen: bool
) -> Representation:
    """Fits on training cells (all judged cells where no data set has any) and projects the judged cells."""
    decomposition = need("sklearn.decomposition")
    matrix = sp.vstack(_fit_matrices(datasets, columns, n_columns, with_unseen=with_unseen)).tocsr()
    n_components = min(COMPONENTS, min(matrix.shape) - 1)
    model = decomposition.PCA(n_components, svd_solver="arpack", random_state=seed).fit(matrix)
    return {
        dataset.name: model.transform(log_normalised(dataset.cells, columns[dataset.name], n_columns)).astype(
            np.float32
        )
        for dataset in datasets
    }


def _fit_matrices(
    datasets: Sequence[Dataset],
    columns: dict[str, np.ndarray],
    n_columns: int,
    *,
    with_unseen: bool,
    of: Callable[[Cells, np.ndarray, int], sp.csr_matrix] = log_normalised,
) -> list[sp.csr_matrix]:
    """What a representation is fitted on: training cells; judged ones of data sets without any, where they join in or
    where no data set has any."""
    fitted = [
        of(dataset.fit_cells if len(dataset.fit_cells) else dataset.cells, columns[dataset.name], n_columns)
        for dataset in datasets
        if len(dataset.fit_cells) or with_unseen
    ]
    return fitted or [of(dataset.cells, columns[dataset.name], n_columns) for dataset in datasets]
