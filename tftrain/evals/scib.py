"""How well do clusters and neighbourhoods of a representation agree with cell types, and are batches mixed?

Protocol: within a data set, classes of at least MIN_CELLS cells; `scib_seeds` subsamples of `scib_cells` cells, never
more than half of a data set (half-samples vary about as the figure itself does), each class by its share. Exact
90-nearest-neighbour graph (Euclidean), a cell among its own neighbours. Figures by scib-metrics, under its names: NMI
and ARI of Leiden clusters at resolution 1 on 15 neighbours; `silhouette_label` (ASW), (s + 1) / 2; `ilisi_knn` and
`clisi_knn`, perplexity 30, scaled; `silhouette_batch`. Beside them: NMI and ARI of Louvain clusters (igraph) at that
of ten resolutions from 0.2 to 2 whose NMI is greatest, tuned on the labels as the variant says;
`silhouette_label_within_batch`, the mean over batches of the cell types' silhouette inside one batch by scikit-learn
(another figure than `silhouette_batch`).

A row is the mean over subsamples; its interval is the mean +- t x standard deviation over them and treats cells, not
donors, as the sample. Chance is the same figure after shuffling the labels (for batch figures: the batches) over the
cells, so that for `ilisi_knn` and `silhouette_batch` it means perfectly mixed batches.

Shapes: C cells, D width, R subsamples.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator

import numpy as np
from scipy.stats import t

from tftrain.evals import paired
from tftrain.evals.celltypes import kept_cells
from tftrain.evals.contract import Bench, Dataset, Findings, Row
from tftrain.evals.extra import need

NAME = "scib"
NEIGHBOURS = 90
CLUSTER_NEIGHBOURS = 15
RESOLUTIONS = tuple(round(0.2 * step, 1) for step in range(1, 11))
LEAST_CELLS = 3 * NEIGHBOURS
"""Of a subsample: in fewer, 90 neighbours are no neighbourhood."""
Figures = dict[tuple[str, str], float]


def run(bench: Bench) -> Findings:
    """Rows of every data set and representation."""
    findings = Findings([])
    for dataset in bench.datasets:
        kept_C = kept_cells(dataset, [])
        n = min(bench.scib_cells, len(kept_C) // 2)
        n_classes = len(np.unique(dataset.label_C[kept_C].astype(str)))
        if n < LEAST_CELLS or n_classes < 2:
            findings.notes.append(
                f"{NAME}: {dataset.name} left out: subsamples of {n} cells of {n_classes} classes; it takes "
                f"{LEAST_CELLS} cells of 2"
            )
            continue
        _judge(bench, dataset, kept_C, n, findings)
    return findings


def _judge(bench: Bench, dataset: Dataset, kept_C: np.ndarray, n: int, findings: Findings) -> None:
    """Appends the rows of one data set: each subsample, then their mean."""
    batch_C = (dataset.donor_C if dataset.batch_C is None else dataset.batch_C).astype(str)
    label_C = dataset.label_C.astype(str)
    if len(np.unique(batch_C[kept_C])) < 2:
        findings.notes.append(f"{NAME}: {dataset.name}: one batch: no iLISI and no batch silhouette")
    got: dict[tuple[str, str], dict[str, list[float]]] = {}
    by_chance: dict[tuple[str, str], dict[str, list[float]]] = {}
    for number in range(bench.scib_seeds):
        rng = np.random.default_rng([bench.seed, 31, number])
        at_C = kept_C[stratified(label_C[kept_C], n, rng)]
        shuffled = rng.permutation(label_C[at_C]), rng.permutation(batch_C[at_C])
        for model, of_dataset in bench.embeddings.items():
            near = Neighbours(of_dataset[dataset.name][at_C])
            for (label, batch), into in (((label_C[at_C], batch_C[at_C]), got), (shuffled, by_chance)):
                for key, value in figures(near, label, batch, seed=bench.seed + number).items():
                    into.setdefault(key, {}).setdefault(model, []).append(value)
    for (metric, variant), of in got.items():
        sample_R = {model: np.array(values) for model, values in of.items()}
        for model, values in of.items():
            findings.rows.extend(
                [
                    Row(model, dataset.name, NAME, metric, variant, value, n, fold=number)
                    for number, value in enumerate(values)
                ]
            )
        findings.rows.extend(
            paired.rows(
                NAME,
                dataset.name,
                metric,
                variant,
                {model: float(values.mean()) for model, values in sample_R.items()},
                sample_R,
                n=n,
                chance={model: float(np.mean(values)) for model, values in by_chance[metric, variant].items()},
                resampled="subsamples",
                interval=spread,
            )
        )


def spread(sample_R: np.ndarray) -> tuple[float | None, float | None]:
    """The mean +- t x standard deviation of the subsamples: where 95 % of half-samples lie."""
    if len(sample_R) < 2:
        return None, None
    reach = float(t.ppf(0.975, len(sample_R) - 1) * sample_R.std(ddof=1))
    return float(sample_R.mean()) - reach, float(sample_R.mean()) + reach


def stratified(label_C: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """`n` sorted cell numbers without repetition, of each class its share (at least one cell); the numbers of each
    class depend on the classes' sizes alone."""
    classes, class_C, n_K = np.unique(label_C, return_inverse=True, return_counts=True)
    exact_K = n * n_K / n_K.sum()
    take_K = np.maximum(np.floor(exact_K).astype(int), 1)
    for k in np.argsort(-(exact_K - np.floor(exact_K)), kind="stable")[: max(n - take_K.sum(), 0)]:
        take_K[k] += 1
    parts = [rng.choice(np.flatnonzero(class_C == k), take_K[k], replace=False) for k in range(len(classes))]
    return np.sort(np.concatenate(parts))


class Neighbours:
    """Cells, their exact neighbour graph and its clusters, made once for all labels that are held against them."""

    def __init__(self, x_CD: np.ndarray) -> None:
        self.x_CD = np.ascontiguousarray(x_CD, np.float32)
        k = min(NEIGHBOURS, len(x_CD))
        graph = need("sklearn.neighbors").NearestNeighbors(n_neighbors=k).fit(self.x_CD)
        distance_CK, index_CK = graph.kneighbors(self.x_CD)
        self.graph = need("scib_metrics.nearest_neighbors").NeighborsResults(index_CK, distance_CK)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.links = self.graph.subset_neighbors(min(CLUSTER_NEIGHBOURS, k)).knn_graph_connectivities
        self._louvain: dict[float, np.ndarray] = {}

    def louvain(self, resolution: float, seed: int) -> np.ndarray:
        """Cluster of each cell by igraph's community_multilevel."""
        if resolution not in self._louvain:
            igraph = need("igraph")
            igraph.set_random_number_generator(random.Random(seed))
            links = self.links.tocoo()
            is_upper = links.row < links.col
            graph = igraph.Graph(
                n=len(self.x_CD), edges=np.column_stack([links.row[is_upper], links.col[is_upper]]).tolist()
            )
            found = graph.community_multilevel(weights=links.data[is_upper].tolist(), resolution=resolution)
            self._louvain[resolution] = np.asarray(found.membership)
        return self._louvain[resolution]


def figures(near: Neighbours, label_C: np.ndarray, batch_C: np.ndarray, *, seed: int) -> Figures:
    """(metric, variant) -> value of one subsample."""
    scib, cluster = need("scib_metrics"), need("sklearn.metrics")
    few = near.graph.subset_neighbors(min(CLUSTER_NEIGHBOURS, near.graph.n_neighbors))
    few.__dict__["knn_graph_connectivities"] = near.links
    leiden = scib.nmi_ari_cluster_labels_leiden(few, label_C, optimize_resolution=False, resolution=1.0, seed=seed)
    found = {(name, "leiden 1.0"): float(leiden[name]) for name in ("nmi", "ari")}
    nmi = {r: cluster.normalized_mutual_info_score(label_C, near.louvain(r, seed)) for r in RESOLUTIONS}
    best = max(nmi, key=lambda r: nmi[r])
    tuned = "louvain, best of 10 resolutions by NMI (tuned on the labels)"
    found["nmi", tuned] = float(nmi[best])
    found["ari", tuned] = float(cluster.adjusted_rand_score(label_C, near.louvain(best, seed)))
    found["silhouette_label", ""] = float(scib.silhouette_label(near.x_CD, label_C))
    found["clisi_knn", ""] = float(scib.clisi_knn(near.graph, label_C))
    if len(np.unique(batch_C)) >= 2:
        found["ilisi_knn", ""] = float(scib.ilisi_knn(near.graph, batch_C))
        found["silhouette_batch", ""] = float(scib.silhouette_batch(near.x_CD, label_C, batch_C))
        within = [
            (float(cluster.silhouette_score(near.x_CD[rows], label_C[rows])) + 1) / 2
            for rows in _batches_of_several_types(label_C, batch_C)
        ]
        if within:
            found["silhouette_label_within_batch", ""] = float(np.mean(within))
    return found


def _batches_of_several_types(label_C: np.ndarray, batch_C: np.ndarray) -> Iterator[np.ndarray]:
    """The cells of each batch with at least two classes and more cells than classes."""
    for batch in np.unique(batch_C):
        rows = np.flatnonzero(batch_C == batch)
        if 2 <= len(np.unique(label_C[rows])) < len(rows):
            yield rows
