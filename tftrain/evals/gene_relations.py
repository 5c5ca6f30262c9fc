"""Do vectors of genes that are known to belong together lie together? From parameters alone: no cell is read.

Protocol: `evaluate.relations` names pairs of genes, by source (CORUM, Reactome and the like). All genes of the table
that have a vector; the gene matrix is centred; cosine of all pairs of those genes (of MAX_PAIRS random ones where
there are more). A related pair is recalled where its cosine lies in a tail of that distribution. Two tails are in
use, and each row names its own: at most the 5th or at least the 95th percentile (10 % by chance), and at most the
2.5th or at least the 97.5th (5 % by chance). Once raw, and once after PCA to 256 components (fixed, not the best on
the test). A row a source, and the mean of the sources. The interval draws genes: a pair counts as often as both its
genes are drawn.

Representations: the model, the untrained model, random vectors, the protein vectors that the model starts from, and
the gene loadings of PCA on log-normalised training cells.
Shapes: G genes, D width, P pairs, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from tftrain.cells.vocab import Vocab, strip_version
from tftrain.errors import CellsError
from tftrain.evals import baselines, paired
from tftrain.evals.contract import Bench, Dataset, Findings, GeneVectors
from tftrain.evals.extra import need

NAME = "gene_relations"
TAILS = {"tails 10 %": 0.10, "tails 5 %": 0.05}
COMPONENTS = 256
MAX_PAIRS = 20_000_000
MIN_PAIRS = 20
MEAN = "mean of sources"


def run(bench: Bench) -> Findings:
    """Rows of every source of relations, representation, tail and post-processing."""
    findings = Findings([])
    if bench.relations is None or not bench.genes:
        findings.notes.append(f"{NAME}: left out: {'no table of relations' if bench.genes else 'no gene vectors'}")
        return findings
    table = read_relations(bench.relations)
    ids = sorted(set.intersection(*(set(of.gene_ids) for of in bench.genes.values())))
    named = np.unique(table[["gene_a", "gene_b"]].to_numpy().astype(str))
    ids = [gene for gene in ids if gene in set(named.tolist())]
    pairs = _numbered(table, ids, findings.notes)
    if not pairs:
        findings.notes.append(
            f"{NAME}: left out: {len(ids):,} of {len(named):,} genes of {bench.relations} have a vector, and no source "
            f"has {MIN_PAIRS} pairs of them"
        )
        return findings
    findings.notes.append(f"{NAME}: {len(ids):,} of {len(named):,} genes of the relations have a vector")
    rng = np.random.default_rng([bench.seed, 43])
    weight_RG = rng.multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=bench.bootstraps)
    for variant, is_reduced in (("raw", False), ("PCA 256", True)):
        cosines = {model: Cosines(_matrix(of, ids, is_reduced), bench.seed) for model, of in bench.genes.items()}
        for tail, share in TAILS.items():
            _judge(cosines, pairs, weight_RG, f"{variant}, {tail}", share, findings)
    return findings


def _judge(
    cosines: Mapping[str, Cosines],
    pairs: Mapping[str, np.ndarray],
    weight_RG: np.ndarray,
    variant: str,
    share: float,
    findings: Findings,
) -> None:
    """Appends a row a source and the mean, for every representation, of one variant."""
    values: dict[str, dict[str, float]] = {}
    samples: dict[str, dict[str, np.ndarray]] = {}
    for source, pair_P2 in pairs.items():
        for model, of in cosines.items():
            is_recalled_P = of.in_tails(pair_P2, share)
            values.setdefault(source, {})[model] = float(is_recalled_P.mean())
            samples.setdefault(source, {})[model] = _resampled(is_recalled_P, pair_P2, weight_RG)
    n_pairs = {source: len(pair_P2) for source, pair_P2 in pairs.items()}
    if len(pairs) > 1:
        values[MEAN] = {m: float(np.mean([values[s][m] for s in pairs])) for m in cosines}
        samples[MEAN] = {m: np.nanmean([samples[s][m] for s in pairs], axis=0) for m in cosines}
        n_pairs[MEAN] = sum(n_pairs.values())
    for source, value in values.items():
        findings.rows.extend(
            paired.rows(
                NAME,
                source,
                "recall",
                variant,
                value,
                samples[source],
                n=n_pairs[source],
                chance=share,
                resampled="genes",
            )
        )


class Cosines:
    """Cosines of centred gene vectors (G, D), and where their tails begin."""

    def __init__(self, vector_GD: np.ndarray, seed: int) -> None:
        centred_GD = vector_GD - vector_GD.mean(0)
        length_G1 = np.linalg.norm(centred_GD, axis=1, keepdims=True)
        self.unit_GD = np.divide(centred_GD, length_G1, out=np.zeros_like(centred_GD), where=length_G1 > 0)
        G = len(vector_GD)
        if G * (G - 1) // 2 <= MAX_PAIRS:
            self.all_A = (self.unit_GD @ self.unit_GD.T)[np.triu_indices(G, 1)]
        else:
            rng = np.random.default_rng([seed, 47])
            first_A = rng.integers(0, G, MAX_PAIRS)
            self.all_A = self.of(np.column_stack([first_A, (first_A + rng.integers(1, G, MAX_PAIRS)) % G]))

    def of(self, pair_P2: np.ndarray) -> np.ndarray:
        """float (P): cosine of each pair, in blocks."""
        blocks = [pair_P2[start : start + 500_000] for start in range(0, len(pair_P2), 500_000)]
        return np.concatenate([np.einsum("pd,pd->p", self.unit_GD[b[:, 0]], self.unit_GD[b[:, 1]]) for b in blocks])

    def in_tails(self, pair_P2: np.ndarray, share: float) -> np.ndarray:
        """bool (P): whether the pair lies in the lowest or the highest share / 2 of all pairs."""
        low, high = np.quantile(self.all_A, [share / 2, 1 - share / 2])
        cosine_P = self.of(pair_P2)
        return (cosine_P <= low) | (cosine_P >= high)


def _resampled(is_recalled_P: np.ndarray, pair_P2: np.ndarray, weight_RG: np.ndarray) -> np.ndarray:
    """float (R): recall where each pair weighs the product of its genes' draws."""
    G = weight_RG.shape[1]
    all_GG, hit_GG = (
        sp.csr_matrix((of.astype(float), (pair_P2[:, 0], pair_P2[:, 1])), shape=(G, G))
        for of in (np.ones(len(pair_P2)), is_recalled_P)
    )
    weight_RG = weight_RG.astype(float)
    hit_R, all_R = ((weight_RG * (of.T @ weight_RG.T).T).sum(1) for of in (hit_GG, all_GG))
    return np.divide(hit_R, all_R, out=np.full(len(all_R), np.nan), where=all_R > 0)


def _numbered(table: pd.DataFrame, ids: Sequence[str], notes: list[str]) -> dict[str, np.ndarray]:
    """Source -> int (P, 2) distinct pairs of gene numbers; sources with fewer than MIN_PAIRS are left out and named."""
    number = {gene: row for row, gene in enumerate(ids)}
    kept = {}
    for source, of in table.groupby("source", sort=True):
        both = of[of.gene_a.isin(number) & of.gene_b.isin(number) & (of.gene_a != of.gene_b)]
        pair_P2 = np.column_stack([both.gene_a.map(number), both.gene_b.map(number)]).astype(np.int64).reshape(-1, 2)
        pair_P2 = np.unique(np.sort(pair_P2, axis=1), axis=0)
        if len(pair_P2) >= MIN_PAIRS:
            kept[str(source)] = pair_P2
        else:
            notes.append(
                f"{NAME}: {source} left out: {len(pair_P2)} pairs of genes with a vector; it takes {MIN_PAIRS}"
            )
    return kept


def _matrix(of: GeneVectors, ids: Sequence[str], is_reduced: bool) -> np.ndarray:
    """float64 (G, D) of the genes `ids`, reduced to 256 principal components where it is wider."""
    row = {gene: number for number, gene in enumerate(of.gene_ids)}
    vector_GD = np.asarray(of.vector_GD, np.float64)[[row[gene] for gene in ids]]
    if not is_reduced or min(vector_GD.shape) <= COMPONENTS:
        return vector_GD
    left, size, _ = np.linalg.svd(vector_GD - vector_GD.mean(0), full_matrices=False)
    return left[:, :COMPONENTS] * size[:COMPONENTS]


def read_relations(path: str) -> pd.DataFrame:
    """gene_a, gene_b, source (`relations` where the table has none), versions stripped. Raises CellsError for a missing
    file or column."""
    if not Path(path).is_file():
        raise CellsError(f"evaluate.relations: no file at {path}")
    table = pd.read_csv(path, sep="\t", dtype=str)
    missing = {"gene_a", "gene_b"} - set(table.columns)
    if missing:
        raise CellsError(f"{path}: no column {', '.join(sorted(missing))}; it has {', '.join(table.columns)}")
    if "source" not in table.columns:
        table["source"] = "relations"
    table = table.dropna(subset=["gene_a", "gene_b"]).fillna({"source": "relations"})
    return table.assign(gene_a=table.gene_a.map(strip_version), gene_b=table.gene_b.map(strip_version))


def baseline_vectors(datasets: Sequence[Dataset], vocab: Vocab, *, seed: int) -> dict[str, GeneVectors]:
    """random, protein, and pca where there are training cells of the vocabulary."""
    rng = np.random.default_rng([seed, 13])
    made = {
        "random": GeneVectors(vocab.gene_ids, rng.normal(size=(vocab.n_genes, 64)).astype(np.float32)),
        "protein": GeneVectors(vocab.gene_ids, vocab.protein_GE()),
    }
    fitted = [d.fit_cells for d in datasets if d.vocab is vocab and len(d.fit_cells)]
    if fitted:
        same_G = np.arange(vocab.n_genes)
        matrix = sp.vstack([baselines.log_normalised(cells, same_G, vocab.n_genes) for cells in fitted]).tocsr()
        n = min(baselines.COMPONENTS, min(matrix.shape) - 1)
        model = need("sklearn.decomposition").PCA(n, svd_solver="arpack", random_state=seed).fit(matrix)
        loading_GD = model.components_.T * np.sqrt(model.explained_variance_)
        made["pca"] = GeneVectors(vocab.gene_ids, loading_GD.astype(np.float32))
    return made
