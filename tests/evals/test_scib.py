"""scIB's figures against scikit-learn and a direct LISI; at chance on noise."""

from dataclasses import replace

import igraph
import numpy as np
import pytest
from bench import bench, dataset, informative
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_samples, silhouette_score

from tftrain.evals import scib


@pytest.fixture(scope="module")
def subsample():
    """300 cells of three types in four batches, half told apart; their neighbours and figures."""
    rng = np.random.default_rng(0)
    data = dataset("s", rng, n=300, donors=4)
    x = informative(data, rng, noise=0.8)
    near = scib.Neighbours(x)
    label, batch = data.label_C.astype(str), data.donor_C.astype(str)
    return x, label, batch, near, scib.figures(near, label, batch, seed=0)


def direct_lisi(x, group, perplexity=30, k=90):
    """Korsunsky's LISI by its definition: Gaussian weights of the given perplexity, 1 / sum of squared shares."""
    distance = np.linalg.norm(x[:, None].astype(float) - x[None], axis=-1)
    values = []
    for c in range(len(x)):
        near = np.argsort(distance[c], kind="stable")[:k]
        near = near[near != c]
        d, low, high, beta = distance[c, near], 0.0, np.inf, 1.0
        for _ in range(200):
            p = np.exp(-d * beta)
            p /= p.sum()
            entropy = -(p * np.log(np.maximum(p, 1e-300))).sum()
            if entropy > np.log(perplexity):
                low, beta = beta, beta * 2 if np.isinf(high) else (beta + high) / 2
            else:
                high, beta = beta, (beta + low) / 2
        values.append(1 / sum(p[group[near] == name].sum() ** 2 for name in np.unique(group)))
    return np.median(values)


def contingency(a, b):
    return np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)], float)


def direct_nmi(a, b):
    """2 I(a; b) / (H(a) + H(b))."""
    joint = contingency(a, b) / len(a)
    pa, pb = joint.sum(1), joint.sum(0)
    information = np.nansum(joint * np.log(np.where(joint > 0, joint, 1) / np.outer(pa, pb)))
    return 2 * information / -((pa * np.log(pa)).sum() + (pb * np.log(pb)).sum())


def direct_ari(a, b):
    """Hubert and Arabie's, from pairs."""
    pairs = lambda n: (n * (n - 1) / 2).sum()  # noqa: E731
    table = contingency(a, b)
    both, of_a, of_b = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    expected = of_a * of_b / pairs(np.array([len(a)]))
    return (both - expected) / ((of_a + of_b) / 2 - expected)


def test_lisi_equals_its_definition(subsample):
    x, label, batch, _, found = subsample
    B, K = len(np.unique(batch)), len(np.unique(label))
    assert found["ilisi_knn", ""] == pytest.approx((direct_lisi(x, batch) - 1) / (B - 1), abs=2e-3)
    assert found["clisi_knn", ""] == pytest.approx((K - direct_lisi(x, label)) / (K - 1), abs=2e-3)


def test_silhouettes_equal_scikit_learn(subsample):
    x, label, batch, _, found = subsample
    assert found["silhouette_label", ""] == pytest.approx((silhouette_score(x, label) + 1) / 2, abs=1e-5)
    per_type = [
        1 - np.abs(silhouette_samples(x[label == name], batch[label == name])).mean() for name in np.unique(label)
    ]
    assert found["silhouette_batch", ""] == pytest.approx(np.mean(per_type), abs=1e-5)
    within = [(silhouette_score(x[batch == name], label[batch == name]) + 1) / 2 for name in np.unique(batch)]
    assert found["silhouette_label_within_batch", ""] == pytest.approx(np.mean(within), abs=1e-5)


def test_clusters_score_as_scikit_learn_and_by_hand(subsample):
    _, label, _, near, found = subsample
    links = near.links.tocoo()
    graph = igraph.Graph(n=300, edges=list(zip(links.row.tolist(), links.col.tolist())))
    graph.es["weight"] = links.data.tolist()
    graph.simplify(combine_edges="sum")
    leiden = np.array(
        graph.community_leiden("modularity", weights="weight", resolution=1.0, n_iterations=10).membership
    )
    # Another draw of the same optimisation: the same score, not always the same cluster numbers.
    assert found["nmi", "leiden 1.0"] == pytest.approx(normalized_mutual_info_score(label, leiden), abs=0.06)
    assert direct_nmi(label, leiden) == pytest.approx(normalized_mutual_info_score(label, leiden))
    tuned = next(variant for _, variant in found if variant.startswith("louvain"))
    nmi = [direct_nmi(label, near.louvain(r, 0)) for r in scib.RESOLUTIONS]
    best = near.louvain(scib.RESOLUTIONS[int(np.argmax(nmi))], 0)
    assert found["nmi", tuned] == pytest.approx(max(nmi))
    assert found["ari", tuned] == pytest.approx(direct_ari(label, best))
    assert found["ari", tuned] == pytest.approx(adjusted_rand_score(label, best))


def test_leiden_scores_are_exact_for_its_own_clusters(subsample):
    from scib_metrics.metrics._nmi_ari import _compute_clustering_leiden

    _, label, _, near, found = subsample
    clusters = _compute_clustering_leiden(near.links, 1.0, 0)
    assert found["nmi", "leiden 1.0"] == pytest.approx(direct_nmi(label, clusters))
    assert found["ari", "leiden 1.0"] == pytest.approx(direct_ari(label, clusters))


def test_noise_scores_chance_and_knowledge_beats_it():
    rng = np.random.default_rng(1)
    data = dataset("s", rng, n=640, donors=6)
    x = {"trained": {"s": informative(data, rng)}, "random": {"s": rng.normal(size=(640, 8)).astype(np.float32)}}
    found = scib.run(bench([data], x, scib_seeds=5))
    noise = [row for row in found.rows if row.model == "random" and row.fold == -1]
    assert len(noise) == 9
    # Nine intervals of 95 %: one may miss.
    assert sum(row.low <= row.chance <= row.high for row in noise) >= 8
    assert all(abs(row.value - row.chance) < 0.03 for row in noise)
    gains = {row.metric: row for row in found.rows if row.metric.endswith("_gain")}
    for metric in ("nmi_gain", "ari_gain", "silhouette_label_gain", "clisi_knn_gain"):
        assert gains[metric].low > 0, gains[metric]
    # Batches are random in both: neither mixes better.
    assert gains["ilisi_knn_gain"].low < 0.05


def test_subsamples_keep_shares_and_differ():
    label = np.array(["a"] * 90 + ["b"] * 9 + ["c"])
    first, second = (scib.stratified(label, 50, np.random.default_rng(seed)) for seed in (0, 1))
    assert len(first) == len(set(first)) == 50
    assert [int((label[first] == name).sum()) for name in "abc"] == [45, 4, 1]
    assert [int((label[second] == name).sum()) for name in "abc"] == [45, 4, 1]
    assert not np.array_equal(first, second)


def test_one_batch_and_few_cells_are_said():
    rng = np.random.default_rng(0)
    few = dataset("s", rng, n=300)
    found = scib.run(bench([few], {"random": {"s": rng.normal(size=(300, 3))}}, scib_seeds=2))
    assert not found.rows
    assert "subsamples of 150 cells" in found.notes[0]
    one = replace(dataset("s", rng, n=560), batch_C=np.array(["b"] * 560, object))
    found = scib.run(bench([one], {"random": {"s": rng.normal(size=(560, 3))}}, scib_seeds=1))
    assert "one batch" in found.notes[0]
    assert {row.metric for row in found.rows} == {"nmi", "ari", "silhouette_label", "clisi_knn"}
    assert all(row.low is None for row in found.rows if row.fold == -1)
