"""The unigram baselines against hand-computed tables, and the model's own count loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from bench import bench, cells_of
from scipy.stats import poisson

from tftrain.cells.vocab import Vocab
from tftrain.evals import likelihood
from tftrain.evals.contract import Dataset, Scores

# Four genes; gene 3 is in no training cell.
FIT = cells_of([{0: 2, 1: 4}, {0: 4}, {0: 6, 2: 1}, {1: 2}])
FREQUENCY = np.array([3, 2, 1, 0])
SHARE = np.array([3, 2, 1, 0.5]) / 6.5
JUDGED = cells_of([{0: 3, 1: 5}, {2: 2, 3: 1}, {1: 7}])


def test_shares_and_means_by_hand():
    assert np.array_equal(likelihood.gene_frequency(FIT, 4), FREQUENCY)
    assert likelihood.smoothed_share(FREQUENCY) == pytest.approx(SHARE)
    assert likelihood.mean_count_where_expressed(FIT, 4) == pytest.approx([4, 3, 1, 19 / 6])


def test_gene_nll_by_hand():
    got = likelihood.gene_nll(JUDGED, SHARE)
    assert got == pytest.approx([-math.log(SHARE[g]) for g in (0, 1, 2, 3, 1)])


def test_no_repeat_is_the_mean_over_all_orders():
    """Sampling without replacement, enumerated; the estimate averages over random orders."""
    cells = cells_of([{0: 1, 1: 1, 3: 1}])
    exact = []
    for order in itertools.permutations([SHARE[0], SHARE[1], SHARE[3]]):
        left, nll = 1.0, 0.0
        for p in order:
            nll -= math.log(p / left)
            left -= p
        exact.append(nll)
    rng = np.random.default_rng(0)
    got = np.mean([likelihood.gene_nll_no_repeat(cells, SHARE, rng).sum() for _ in range(2000)])
    assert got == pytest.approx(np.mean(exact), rel=0.01)


def test_no_repeat_of_the_whole_vocabulary_ends_certain():
    cells = cells_of([{0: 1, 1: 1, 2: 1, 3: 1}])
    got = likelihood.gene_nll_no_repeat(cells, SHARE, np.random.default_rng(0))
    assert got[-1] == pytest.approx(0, abs=1e-9)


def test_count_nll_is_a_zero_truncated_poisson():
    mean_G = np.array([4.0, 3.0, 1.0, 2.0])
    got = likelihood.count_nll(JUDGED, mean_G)
    mu = [8 * 4 / 7, 8 * 3 / 7, 3 * 1 / 3, 3 * 2 / 3, 7.0]
    expected = [-(poisson.logpmf(c, m) - math.log1p(-math.exp(-m))) for c, m in zip([3, 5, 2, 1, 7], mu)]
    assert got == pytest.approx(expected)


def test_count_nll_is_the_models_when_it_knows_only_the_gene():
    from tftrain.models.transcriptformer.loss import count_nll, expected_count

    mean_G = np.array([4.0, 3.0, 1.0, 2.0])
    cell_S = torch.from_numpy(np.repeat(np.arange(3), JUDGED.n_expressed_C))
    logit_S = torch.from_numpy(np.log(mean_G)[JUDGED.gene_N])
    mu_S = expected_count(logit_S, cell_S, torch.tensor([8.0, 3.0, 7.0], dtype=torch.float64))
    model = count_nll(mu_S, torch.from_numpy(JUDGED.count_N).double(), eps=1e-12, exact=True)
    assert likelihood.count_nll(JUDGED, mean_G) == pytest.approx(model.numpy(), rel=1e-6)


def test_clipping_changes_fit_and_judged_counts():
    assert likelihood.clipped(JUDGED, 4).count_N.tolist() == [3, 4, 2, 1, 4]
    assert likelihood.clipped(JUDGED, None) is JUDGED


@pytest.mark.parametrize(("n", "blocks"), [(1, 1), (7, 7), (128, 128), (129, 65), (1000, 125)])
def test_blocks_hold_every_cell_once_in_order(n, blocks):
    cells = cells_of([{0: c + 1} for c in range(n)])
    parts = likelihood.in_blocks(cells)
    assert len(parts) == blocks
    assert np.concatenate([part.count_N for part in parts]).tolist() == list(range(1, n + 1))


def _dataset(is_seen=True):
    vocab = Vocab.of(["a", "b", "c", "d"], np.eye(4, dtype=np.float32))
    label = np.array(["x"] * 3, object)
    return Dataset("s", JUDGED, FIT if is_seen else cells_of([]), vocab, is_seen, label, label)


def test_rows_and_gain_by_hand():
    def perfect(dataset, blocks):
        n = np.array([block.n_expressed_C.sum() for block in blocks])
        return Scores(n * 0.5, n * 0.25, n)

    findings = likelihood.run(bench([_dataset()], {}, score={"trained": perfect}))
    value = {(row.model, row.metric, row.variant): row.value for row in findings.rows}
    unigram = np.mean([-math.log(SHARE[g]) for g in (0, 1, 2, 3, 1)])
    assert value["trained", "gene_nll", "held-out"] == pytest.approx(0.5)
    assert value["unigram", "gene_nll", "held-out"] == pytest.approx(unigram)
    assert value["trained", "gene_nll_gain", "over unigram"] == pytest.approx(unigram - 0.5)
    assert value["unigram_no_repeat", "gene_nll", "held-out"] < value["unigram", "gene_nll", "held-out"]
    assert ("unigram_pooled", "count_nll", "held-out") not in value
    assert not findings.notes


def test_cut_cells_and_unseen_species_are_said():
    def cut(dataset, blocks):
        return Scores(np.ones(len(blocks)), np.ones(len(blocks)), np.ones(len(blocks), np.int64))

    findings = likelihood.run(bench([_dataset()], {}, score={"trained": cut}))
    assert any("trained scores 3 of 5 expressed genes" in note for note in findings.notes)
    unseen = likelihood.run(bench([_dataset(is_seen=False)], {}, score={"trained": cut}))
    assert not unseen.rows
    assert "no judged source was trained on" in unseen.notes[0]
