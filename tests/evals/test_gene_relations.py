"""Gene relations: recall by hand, its two tails on noise, and tables that cannot be used."""

import numpy as np
import pandas as pd
import pytest
from bench import bench, cells_of, dataset

from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError
from tftrain.evals import gene_relations
from tftrain.evals.contract import GeneVectors

G = 300
IDS = [f"g{row}" for row in range(G)]


def table(tmp_path, pairs, sources=None):
    frame = pd.DataFrame(pairs, columns=["gene_a", "gene_b"])
    if sources is not None:
        frame["source"] = sources
    path = tmp_path / "relations.tsv"
    frame.to_csv(path, sep="\t", index=False)
    return str(path)


def random_pairs(rng, n=2000):
    return [(IDS[a], IDS[b]) for a, b in rng.integers(0, G, (n, 2)) if a != b]


def run(path, **vectors):
    genes = {model: GeneVectors(IDS, of) for model, of in vectors.items()}
    return gene_relations.run(bench([], {}, genes=genes, relations=path, bootstraps=200))


def by_variant(findings, model="random", dataset="relations"):
    return {row.variant: row for row in findings.rows if (row.model, row.dataset) == (model, dataset)}


@pytest.mark.parametrize("width", [32, 400])
def test_random_vectors_recall_what_the_tails_hold(tmp_path, width):
    values = {}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        path = table(tmp_path, random_pairs(rng))
        found = by_variant(run(path, random=rng.normal(size=(G, width))))
        assert set(found) == {f"{kind}, tails {share} %" for kind in ("raw", "PCA 256") for share in (10, 5)}
        for variant, row in found.items():
            assert row.chance == (0.10 if "10 %" in variant else 0.05)
            assert row.low <= row.chance <= row.high
            values.setdefault(variant, []).append(row.value)
    for variant, of in values.items():
        assert np.mean(of) == pytest.approx(0.10 if "10 %" in variant else 0.05, abs=0.006)


def test_recall_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(G, 16))
    pairs = random_pairs(rng, 400)
    found = by_variant(run(table(tmp_path, pairs), random=vectors))
    named = sorted({gene for pair in pairs for gene in pair})
    x = vectors[[IDS.index(gene) for gene in named]]
    x = x - x.mean(0)
    cosine = np.corrcoef(x) * 0 + (x @ x.T) / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(x, axis=1))
    low, high = np.percentile(cosine[np.triu_indices(len(named), 1)], [5, 95])
    distinct = {tuple(sorted((named.index(a), named.index(b)))) for a, b in pairs}
    hits = [not low < cosine[a, b] < high for a, b in distinct]
    assert found["raw, tails 10 %"].value == pytest.approx(np.mean(hits))
    assert found["raw, tails 10 %"].n == len(distinct)


def test_related_genes_that_lie_together_are_recalled(tmp_path):
    rng = np.random.default_rng(0)
    family = np.arange(G) // 3
    vectors = rng.normal(size=(G // 3, 20))[family] + 0.2 * rng.normal(size=(G, 20))
    pairs = [(IDS[a], IDS[b]) for a in range(G) for b in range(a) if family[a] == family[b]]
    found = run(table(tmp_path, pairs), trained=vectors, random=rng.normal(size=(G, 20)))
    assert by_variant(found, "trained")["raw, tails 5 %"].low > 0.95
    gain = next(
        row for row in found.rows if row.metric == "recall_gain" and row.variant == "raw, tails 5 % over random"
    )
    assert gain.low > 0.8


def test_sources_stand_apart_and_their_mean_weighs_them_alike(tmp_path):
    rng = np.random.default_rng(0)
    pairs = random_pairs(rng, 300)
    sources = ["A"] * 200 + ["B"] * (len(pairs) - 210) + ["tiny"] * 10
    found = run(table(tmp_path, pairs, sources), random=rng.normal(size=(G, 8)))
    of = {row.dataset: row.value for row in found.rows if row.variant == "raw, tails 10 %"}
    assert set(of) == {"A", "B", "mean of sources"}
    assert of["mean of sources"] == pytest.approx((of["A"] + of["B"]) / 2)
    assert any("tiny left out: 10 pairs" in note for note in found.notes)


def test_many_genes_are_judged_by_random_pairs(monkeypatch):
    vectors = np.random.default_rng(0).normal(size=(G, 8))
    exact = gene_relations.Cosines(vectors, 0).all_A
    monkeypatch.setattr(gene_relations, "MAX_PAIRS", 20_000)
    drawn = gene_relations.Cosines(vectors, 0).all_A
    assert len(drawn) == 20_000
    assert np.quantile(drawn, [0.025, 0.975]) == pytest.approx(np.quantile(exact, [0.025, 0.975]), abs=0.02)


def test_baselines_are_of_the_same_genes():
    vocab = Vocab.of(["a", "b", "c"], np.eye(3, dtype=np.float32))
    data = dataset("s", np.random.default_rng(0), n=2, vocab=vocab)
    rows = [{0: 3, 1: 1}, {2: 5}, {1: 2}, {0: 1, 2: 2}]
    object.__setattr__(data, "fit_cells", cells_of(rows))
    got = gene_relations.baseline_vectors([data], vocab, seed=0)
    assert set(got) == {"random", "protein", "pca"}
    assert all(len(of.vector_GD) == 3 for of in got.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [("gene\tgene_b\nx\ty\n", "no column gene_a; it has gene, gene_b"), (None, "no file at")],
)
def test_poor_tables_are_refused(tmp_path, text, message):
    path = tmp_path / "table.tsv"
    if text:
        path.write_text(text)
    with pytest.raises(CellsError, match=message):
        gene_relations.read_relations(str(path))


def test_genes_without_a_vector_are_said(tmp_path):
    path = table(tmp_path, [("h1", "h2")] * 30)
    found = run(path, random=np.random.default_rng(0).normal(size=(G, 4)))
    assert not found.rows
    assert any("0 of 2 genes" in note for note in found.notes)
