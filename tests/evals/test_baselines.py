"""Baseline representations by hand, and what PCA can and cannot know."""

from dataclasses import replace

import numpy as np
import pytest
from bench import bench, cells_of, dataset

from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError
from tftrain.evals import baselines, transfer

N_GENES = 30


def species(name, seed, *, is_seen, n=300):
    """Six types with profiles that all species share; gene ids of the species alone."""
    rng = np.random.default_rng(seed)
    proteins_GE = np.random.default_rng(7).normal(size=(N_GENES, 5)).astype(np.float32)
    vocab = Vocab.of([f"{name}{g}" for g in range(N_GENES)], proteins_GE)
    data = dataset(name, rng, n=n, labels=tuple("uvwxyz"), is_seen=is_seen, vocab=vocab)
    means = dict(zip("uvwxyz", np.random.default_rng(8).gamma(1, 5, (6, N_GENES))))
    counts = np.array([rng.poisson(means[label]) for label in data.label_C])
    counts[:, 0] += 1
    cells = cells_of([{g: c for g, c in enumerate(row) if c} for row in counts])
    return replace(data, cells=cells, fit_cells=cells if is_seen else cells_of([]))


def test_protein_mean_by_hand():
    vocab = Vocab.of(["a", "b", "c"], np.array([[1, 0], [0, 1], [2, 2]], np.float32))
    data = dataset("s", np.random.default_rng(0), n=2, vocab=vocab)
    data = replace(data, cells=cells_of([{0: 3, 1: 1}, {2: 5}]))
    got = baselines.protein_mean([data], seed=0)["s"]
    assert got == pytest.approx(np.array([[0.75, 0.25], [2, 2]]))


def test_log_normalised_keeps_the_total_of_dropped_genes():
    cells = cells_of([{0: 1, 1: 3}, {2: 4}])
    got = baselines.log_normalised(cells, np.array([1, -1, 0]), 2).toarray()
    assert got == pytest.approx(np.array([[0, np.log1p(2500)], [np.log1p(10_000), 0]]))


def test_random_depends_on_the_seed_alone():
    data = [dataset("s", np.random.default_rng(0))]
    first, again, other = (baselines.random(data, seed=seed)["s"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def _orthologs(tmp_path, names="ab"):
    lines = [f"{name}{g}\tOG{g}" for name in names for g in range(N_GENES)]
    path = tmp_path / "orthologs.tsv"
    path.write_text("gene_id\torthogroup\n" + "\n".join(lines) + "\n")
    return str(path)


def test_pca_transfers_through_orthologs_and_not_without(tmp_path):
    data = [species("a", 0, is_seen=True), species("b", 1, is_seen=False)]
    x = {
        "pca": baselines.pca(data, seed=0),
        "ortholog_pca": baselines.ortholog_pca(data, seed=0, orthologs=_orthologs(tmp_path)),
    }
    rows = {(row.model, row.variant): row for row in transfer.run(bench(data, x)).rows}
    assert rows["ortholog_pca", "logistic"].value > 0.95
    assert rows["pca", "logistic"].value < 0.5


def test_pca_is_scikit_learns(tmp_path):
    from sklearn.decomposition import PCA

    data = [species("a", 0, is_seen=True)]
    dense = baselines.log_normalised(data[0].cells, np.arange(N_GENES), N_GENES).toarray()
    got = baselines.ortholog_pca(data, seed=0, orthologs=_orthologs(tmp_path, "a"))["a"]
    expected = PCA(N_GENES - 1).fit_transform(dense)
    assert got.shape == expected.shape
    assert np.abs(got[:, :5]) == pytest.approx(np.abs(expected[:, :5]), abs=5e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gene\torthogroup\nx\ty\n", "no column gene_id; it has gene, orthogroup"),
        ("gene_id\torthogroup\nx\t1\nx\t2\n", "gene x is in more than one orthogroup"),
    ],
)
def test_poor_ortholog_tables_are_refused(tmp_path, text, message):
    (tmp_path / "table.tsv").write_text(text)
    with pytest.raises(CellsError, match=message):
        baselines.read_orthologs(str(tmp_path / "table.tsv"))
    with pytest.raises(CellsError, match="no file at"):
        baselines.read_orthologs(str(tmp_path / "absent.tsv"))
