"""Does a representation tell cells apart by species or by cell type?

Protocol: all data sets together, the classes that each of them has with at least MIN_CELLS cells, as many cells of
every species x class as the rarest has (at most MAX_CELLS), drawn by the seed. PCA to 50 components of the embedding,
never two-dimensional coordinates. Unique R2 of type: what an additive linear model of type and species explains of
the total variance less what species alone explains; of species likewise. Headline: ln(unique R2 of type / of
species), with a bootstrap of donors within each species; above 0 type says more. Noise does not give 0 but about
ln((K - 1) / (S - 1)), which stands as chance. Beside it the shares of the 15 nearest cells that are of the same type
and of the same species; of the same type among the 15 nearest cells of *other species*; cell-type and species
silhouettes (s + 1) / 2; and by scib-metrics `ilisi_knn` of species and `clisi_knn` of type. PCA and neighbours are
not made anew in a resample.

Shapes: C cells, D components, K types, S species, P columns of the design, U units drawn, R resamples.
"""

from __future__ import annotations

import math

import numpy as np

from tftrain.evals import paired, scores
from tftrain.evals.celltypes import kept_cells
from tftrain.evals.contract import Bench, Dataset, Findings
from tftrain.evals.extra import need

NAME = "species_or_type"
COMPONENTS = 50
NEIGHBOURS = 15
MIN_CELLS = 10
MAX_CELLS = 200
Key = tuple[str, str]
"""(metric, variant)"""
Values = dict[Key, dict[str, float]]


def run(bench: Bench) -> Findings:
    """Rows of the data set `all species`, or a note where there are no two species with two classes in common."""
    findings = Findings([])
    names = [dataset.name for dataset in bench.datasets]
    drawn = balanced(bench.datasets, bench.seed)
    shared = np.unique(drawn[0][1]) if drawn else np.zeros(0)
    if len(names) < 2 or len(shared) < 2:
        findings.notes.append(
            f"{NAME}: left out: {len(shared)} classes with {MIN_CELLS} cells in each of {len(names)} data sets; it "
            "takes 2 in each of 2"
        )
        return findings
    type_C = np.concatenate([label_C for _, label_C in drawn])
    species_C = np.repeat(names, [len(cells) for cells, _ in drawn])
    donor_C = np.concatenate([d.donor_C[cells].astype(str) for d, (cells, _) in zip(bench.datasets, drawn)])
    unit_C, weight_RU, resampled = units_within(species_C, donor_C, bootstraps=bench.bootstraps, seed=bench.seed)
    values: Values = {}
    samples: dict[Key, dict[str, np.ndarray]] = {}
    for model, of_dataset in bench.embeddings.items():
        x_CD = components(np.concatenate([of_dataset[name][cells] for name, (cells, _) in zip(names, drawn)]))
        value, sample_R = _of_model(x_CD, type_C, species_C, unit_C, weight_RU)
        for key in value:
            values.setdefault(key, {})[model] = value[key]
            samples.setdefault(key, {})[model] = sample_R.get(key, np.zeros(0))
    chance = chances(len(shared), len(names), len(type_C))
    for key, of_model in values.items():
        has_interval = all(len(sample_R) for sample_R in samples[key].values())
        findings.rows.extend(
            paired.rows(
                NAME,
                "all species",
                *key,
                of_model,
                samples[key],
                n=len(type_C),
                chance=chance.get(key),
                resampled=resampled if has_interval else "",
                interval=scores.bounds if has_interval else lambda _: (None, None),
            )
        )
    return findings


def _of_model(
    x_CD: np.ndarray, type_C: np.ndarray, species_C: np.ndarray, unit_C: np.ndarray, weight_RU: np.ndarray
) -> tuple[dict[Key, float], dict[Key, np.ndarray]]:
    """(metric, variant) -> value, and -> resamples (R) of those that have an interval."""
    once_1C, each_C = np.ones((1, len(x_CD))), np.arange(len(x_CD))
    (type_r2,), (species_r2,) = unique_r2(x_CD, type_C, species_C, each_C, once_1C)
    type_R, species_R = unique_r2(x_CD, type_C, species_C, unit_C, weight_RU)
    value: dict[Key, float] = {("log_ratio", ""): float(np.log(type_r2 / species_r2))}
    value |= {("unique_r2", "type"): float(type_r2), ("unique_r2", "species"): float(species_r2)}
    sample_R: dict[Key, np.ndarray] = {("log_ratio", ""): np.log(type_R / species_R)}
    n_U = np.bincount(unit_C, minlength=weight_RU.shape[1])
    for key, value_C in neighbourhoods(x_CD, type_C, species_C).items():
        value[key] = float(value_C.mean())
        sample_R[key] = (weight_RU @ np.bincount(unit_C, value_C, len(n_U))) / (weight_RU @ n_U)
    return value | _lisi(x_CD, type_C, species_C), sample_R


def chances(n_types: int, n_species: int, n_cells: int) -> dict[Key, float]:
    """What noise gives in balanced data, where that is known."""
    return {
        ("log_ratio", ""): math.log((n_types - 1) / (n_species - 1)),
        ("unique_r2", "type"): (n_types - 1) / (n_cells - 1),
        ("unique_r2", "species"): (n_species - 1) / (n_cells - 1),
        ("same_among_15_nearest", "type"): (n_cells / n_types - 1) / (n_cells - 1),
        ("same_among_15_nearest", "species"): (n_cells / n_species - 1) / (n_cells - 1),
        ("same_type_among_15_nearest_of_other_species", ""): 1 / n_types,
    }


def balanced(datasets: list[Dataset], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(cell numbers, their classes) of each data set: the shared classes, as many cells of each as the rarest has."""
    kept = [kept_cells(dataset, []) for dataset in datasets]
    labels = [dataset.label_C[cells].astype(str) for dataset, cells in zip(datasets, kept)]
    shared = set.intersection(*(set(np.unique(of)) for of in labels)) if labels else set()
    if not shared:
        return []
    n = min(MAX_CELLS, *(int((of == name).sum()) for of in labels for name in shared))
    rng = np.random.default_rng([seed, 37])
    drawn = []
    for cells, of in zip(kept, labels):
        at = np.concatenate([rng.choice(np.flatnonzero(of == name), n, replace=False) for name in sorted(shared)])
        drawn.append((cells[at], of[at]))
    return drawn


def units_within(
    species_C: np.ndarray, donor_C: np.ndarray, *, bootstraps: int, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """A bootstrap within each species: the unit of each cell, draws of units (R, U), and what is drawn: donors, or
    cells where a species has too few."""
    names = np.unique(species_C)
    is_enough = all(len(np.unique(donor_C[species_C == name])) >= scores.MIN_DONORS for name in names)
    key_C = np.char.add(np.char.add(species_C.astype(str), "\t"), donor_C) if is_enough else np.arange(len(donor_C))
    units, first_U, unit_C = np.unique(key_C, return_index=True, return_inverse=True)
    weight_RU = np.zeros((bootstraps, len(units)))
    rng = np.random.default_rng(seed)
    for name in names:
        of_U = np.flatnonzero(species_C[first_U] == name)
        weight_RU[:, of_U] = rng.multinomial(len(of_U), np.full(len(of_U), 1 / len(of_U)), size=bootstraps)
    return unit_C, weight_RU, "donors" if is_enough else "cells"


def components(x_CD: np.ndarray) -> np.ndarray:
    """float64 (C, at most 50): principal components of the centred embedding."""
    centred_CD = x_CD.astype(np.float64) - x_CD.mean(0, dtype=np.float64)
    left, size, _ = np.linalg.svd(centred_CD, full_matrices=False)
    return left[:, :COMPONENTS] * size[:COMPONENTS]


def unique_r2(
    x_CD: np.ndarray, type_C: np.ndarray, species_C: np.ndarray, unit_C: np.ndarray, weight_RU: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(R) of type and (R) of species, by least squares from sums over units, so that a resample needs no cell."""
    types, species = (np.unique(of)[1:] for of in (type_C, species_C))
    design_CP = np.column_stack(
        [np.ones(len(x_CD)), *(type_C == name for name in types), *(species_C == name for name in species)]
    ).astype(float)
    P, U = design_CP.shape[1], weight_RU.shape[1]
    order = np.argsort(unit_C, kind="stable")
    start_U = np.searchsorted(unit_C[order], np.arange(U))
    cross_CPP = design_CP[:, :, None] * design_CP[:, None, :]
    gram_UPP = np.add.reduceat(cross_CPP[order], start_U)
    with_x_UPD = np.add.reduceat((design_CP[:, :, None] * x_CD[:, None, :])[order], start_U)
    total_U = np.add.reduceat((x_CD**2).sum(1)[order], start_U)
    gram_RPP, total_R = np.tensordot(weight_RU, gram_UPP, 1), weight_RU @ total_U
    with_x_RPD = (weight_RU @ with_x_UPD.reshape(U, -1)).reshape(len(weight_RU), P, -1)
    n_type = len(types)

    def explained(columns: list[int]) -> np.ndarray:
        """(R): sum of squares that the columns explain."""
        right_RpD = with_x_RPD[:, columns]
        gram_Rpp = gram_RPP[:, columns][:, :, columns]
        return np.einsum(
            "rpd,rpq,rqd->r", right_RpD, np.linalg.pinv(gram_Rpp, hermitian=True), right_RpD, optimize=True
        )

    one, of_type, of_species = [0], list(range(1, 1 + n_type)), list(range(1 + n_type, P))
    variance_R = total_R - explained(one)
    both_R = explained(one + of_type + of_species)
    floor = 1e-12
    type_R = np.maximum((both_R - explained(one + of_species)) / variance_R, floor)
    species_R = np.maximum((both_R - explained(one + of_type)) / variance_R, floor)
    return type_R, species_R


def neighbourhoods(x_CD: np.ndarray, type_C: np.ndarray, species_C: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """(metric, variant) -> value of each cell (C)."""
    neighbors, metrics = need("sklearn.neighbors"), need("sklearn.metrics")
    k = min(NEIGHBOURS, len(x_CD) - 1)
    near_CK = neighbors.NearestNeighbors(n_neighbors=k).fit(x_CD).kneighbors(return_distance=False)
    across_C = np.zeros(len(x_CD))
    for name in np.unique(species_C):
        own, others = np.flatnonzero(species_C == name), np.flatnonzero(species_C != name)
        found = neighbors.NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(others))).fit(x_CD[others])
        near = others[found.kneighbors(x_CD[own], return_distance=False)]
        across_C[own] = (type_C[near] == type_C[own, None]).mean(1)
    return {
        ("same_among_15_nearest", "type"): (type_C[near_CK] == type_C[:, None]).mean(1),
        ("same_among_15_nearest", "species"): (species_C[near_CK] == species_C[:, None]).mean(1),
        ("same_type_among_15_nearest_of_other_species", ""): across_C,
        ("silhouette", "type"): (metrics.silhouette_samples(x_CD, type_C) + 1) / 2,
        ("silhouette", "species"): (metrics.silhouette_samples(x_CD, species_C) + 1) / 2,
    }


def _lisi(x_CD: np.ndarray, type_C: np.ndarray, species_C: np.ndarray) -> dict[tuple[str, str], float]:
    """iLISI of species and cLISI of type on the 90 nearest cells."""
    scib = need("scib_metrics")
    graph = need("sklearn.neighbors").NearestNeighbors(n_neighbors=min(90, len(x_CD))).fit(x_CD)
    distance_CK, index_CK = graph.kneighbors(x_CD)
    near = need("scib_metrics.nearest_neighbors").NeighborsResults(index_CK, distance_CK)
    return {
        ("ilisi_knn", "species"): float(scib.ilisi_knn(near, species_C)),
        ("clisi_knn", "type"): float(scib.clisi_knn(near, type_C)),
    }
