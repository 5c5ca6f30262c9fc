"""How well does the model predict held-out cells of the sources it was trained on, beside the unigram?

Both are scored on the same genes of the same cells, in nats a gene. The gene part: which gene comes next, in random
order. `unigram` knows how often each gene is expressed in the training cells of that *species*; `unigram_pooled` only
over all species together; `unigram_no_repeat` is the species' unigram that also knows that a gene occurs once a cell
(it renormalises over the genes not yet named), the hardest of the three. The count part: the zero-truncated Poisson
likelihood, exact, whose means share the cell's known total by the gene's mean count where it is expressed in the
training cells of that species: what the model's count head reduces to when it looks at nothing but the gene. (A model
with `softplus_approx` reports an upper bound of its own count NLL, so the comparison errs against it.)

Shapes: C cells, N expressed values, G vocabulary, B blocks of cells.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from scipy.special import gammaln

from tftrain.cells.contract import Cells
from tftrain.evals import scores
from tftrain.evals.contract import Bench, Dataset, Findings, Row, Scores

NAME = "likelihood"
BLOCKS = 128
"""Judged cells are scored in about this many blocks; the interval draws blocks."""


def run(bench: Bench) -> Findings:
    """Rows of every seen data set: gene and count NLL of each scorer, and the trained model's gain over each
    baseline."""
    findings = Findings([])
    seen = [dataset for dataset in bench.datasets if dataset.is_seen and len(dataset.cells) and len(dataset.fit_cells)]
    if not bench.score or not seen:
        findings.notes.append(
            f"{NAME}: left out: no judged source was trained on, so the model has no likelihood for it"
        )
        return findings
    pooled_G = np.sum([gene_frequency(dataset.fit_cells, dataset.vocab.n_genes) for dataset in seen], axis=0)
    for dataset in seen:
        blocks = in_blocks(dataset.cells)
        by_model = {name: score(dataset, blocks) for name, score in bench.score.items()}
        n_scored_B = np.array([block.n_expressed_C.sum() for block in blocks])
        for name, scored in by_model.items():
            if not np.array_equal(scored.n_genes_B, n_scored_B):
                findings.notes.append(
                    f"{NAME}: {dataset.name}: {name} scores {scored.n_genes_B.sum()} of {n_scored_B.sum()} expressed "
                    "genes (cells longer than its context are cut at random); the unigram averages over all of them"
                )
        by_model |= unigrams(dataset, blocks, pooled_G, count_limit=bench.count_limit, seed=bench.seed)
        _rows(bench, dataset, by_model, findings)
    return findings


def in_blocks(cells: Cells) -> list[Cells]:
    """The cells, in order, cut into at most BLOCKS runs of equal length (the last may be shorter)."""
    size = math.ceil(len(cells) / BLOCKS)
    return [cells.slice(start, min(start + size, len(cells))) for start in range(0, len(cells), size)]


def unigrams(
    dataset: Dataset, blocks: list[Cells], pooled_G: np.ndarray, *, count_limit: int | None, seed: int
) -> dict[str, Scores]:
    """The three unigram baselines; they share one count model, which only the first carries (the others: NaN)."""
    frequency_G = gene_frequency(dataset.fit_cells, dataset.vocab.n_genes)
    share_G = smoothed_share(frequency_G)
    mean_G = mean_count_where_expressed(clipped(dataset.fit_cells, count_limit), dataset.vocab.n_genes)
    rng = np.random.default_rng([seed, 41])
    n_B = np.array([block.n_expressed_C.sum() for block in blocks])
    unknown_B = np.full(len(blocks), np.nan)
    count_B = np.array([count_nll(clipped(block, count_limit), mean_G).sum() for block in blocks])
    gene_B = np.array([gene_nll(block, share_G).sum() for block in blocks])
    pooled_B = np.array([gene_nll(block, smoothed_share(pooled_G)).sum() for block in blocks])
    no_repeat_B = np.array([gene_nll_no_repeat(block, share_G, rng).sum() for block in blocks])
    return {
        "unigram": Scores(gene_B, count_B, n_B),
        "unigram_pooled": Scores(pooled_B, unknown_B, n_B),
        "unigram_no_repeat": Scores(no_repeat_B, unknown_B, n_B),
    }


def clipped(cells: Cells, limit: int | None) -> Cells:
    """The same cells with counts of at most `limit`."""
    return cells if limit is None else replace(cells, count_N=np.minimum(cells.count_N, limit))


def gene_frequency(cells: Cells, n_genes: int) -> np.ndarray:
    """int64 (G): cells that express each gene."""
    return np.bincount(cells.gene_N, minlength=n_genes)


def smoothed_share(frequency_G: np.ndarray) -> np.ndarray:
    """float64 (G): share of each gene among expressed values. Half a cell is added to the genes that have none, so
    that a gene first met in held-out cells costs much but not infinity; genes that no training cell of this species
    has share that same small mass."""
    weight_G = np.where(frequency_G > 0, frequency_G, 0.0)
    is_absent_G = frequency_G == 0
    if is_absent_G.any():
        weight_G[is_absent_G] = 0.5 / is_absent_G.sum()
    return weight_G / weight_G.sum()


def gene_nll(cells: Cells, share_G: np.ndarray) -> np.ndarray:
    """float64 (N): -ln share of each expressed gene."""
    return -np.log(share_G[cells.gene_N])


def gene_nll_no_repeat(cells: Cells, share_G: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float64 (N): the same in a random order of each cell's genes, renormalised over the genes not yet named."""
    parts = []
    for c in range(len(cells)):
        p = rng.permutation(share_G[cells.gene_N[cells.cell_start_C1[c] : cells.cell_start_C1[c + 1]]])
        left = 1.0 - np.concatenate([[0.0], np.cumsum(p)[:-1]])
        parts.append(np.log(np.maximum(left, p)) - np.log(p))
    return np.concatenate(parts)


def mean_count_where_expressed(cells: Cells, n_genes: int) -> np.ndarray:
    """float64 (G): mean count of each gene over the cells that express it; the mean of all values for a gene of
    none."""
    n_G, total_G = np.bincount(cells.gene_N, minlength=n_genes), np.bincount(cells.gene_N, cells.count_N, n_genes)
    return np.where(n_G > 0, total_G / np.maximum(n_G, 1), cells.count_N.mean())


def count_nll(cells: Cells, mean_G: np.ndarray) -> np.ndarray:
    """float64 (N): zero-truncated Poisson NLL, ln(e^mu - 1) - c ln mu + ln c!, with mu = total x mean_g / sum of
    means."""
    weight_N = mean_G[cells.gene_N]
    cell_N = np.repeat(np.arange(len(cells)), cells.n_expressed_C)
    total_C = np.bincount(cell_N, cells.count_N, len(cells))
    weight_C = np.bincount(cell_N, weight_N, len(cells))
    mu_N = weight_N * (total_C / weight_C)[cell_N]
    log_expm1_N = mu_N + np.log1p(-np.exp(-mu_N))
    return log_expm1_N - cells.count_N * np.log(mu_N) + gammaln(cells.count_N + 1.0)


def _rows(bench: Bench, dataset: Dataset, by_model: dict[str, Scores], findings: Findings) -> None:
    """Appends the NLL of each scorer and the paired gain of `trained` over each other one."""
    for metric, of in (("gene_nll", lambda s: s.gene_B), ("count_nll", lambda s: s.count_B)):
        for model, scored in by_model.items():
            if np.isnan(of(scored)).any():
                continue
            n_B = scored.n_genes_B
            value = float(of(scored).sum() / n_B.sum())
            low, high = scores.interval_ratio(of(scored), n_B, bootstraps=bench.bootstraps, seed=bench.seed)
            n = int(n_B.sum())
            findings.rows.append(
                Row(model, dataset.name, NAME, metric, "held-out", value, n, None, -1, low, high, "blocks")
            )
            trained = by_model.get("trained")
            if trained is None or model == "trained" or not np.array_equal(trained.n_genes_B, n_B):
                continue
            gain_B = of(scored) - of(trained)
            low, high = scores.interval_ratio(gain_B, n_B, bootstraps=bench.bootstraps, seed=bench.seed)
            value = float(gain_B.sum() / n_B.sum())
            findings.rows.append(
                Row(
                    "trained",
                    dataset.name,
                    NAME,
                    f"{metric}_gain",
                    f"over {model}",
                    value,
                    n,
                    0.0,
                    -1,
                    low,
                    high,
                    "blocks",
                )
            )
