"""Stand-in protein vectors: orthologs close, everything else unrelated, the same on every machine."""

import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.standin import ORTHOLOG_SHARE, ortholog_groups, stand_in_tables, stand_in_vectors
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError

sys.path.insert(0, str(Path(__file__).parents[1] / "cells"))
from stores import make_store


@pytest.fixture
def stores(tmp_path):
    return [
        make_store(tmp_path / "a.soma", prefix="A", n_cells=20, n_genes=30),
        make_store(tmp_path / "b.soma", prefix="B", n_cells=20, n_genes=25),
    ]


def test_orthologs_are_close_and_others_are_not(tmp_path, stores):
    table = tmp_path / "orthologs.tsv"
    table.write_text("symbol\ta\tb\n" + "".join(f"S{gene}\tA{gene}\tB{gene}\n" for gene in range(10)))
    paths = stand_in_tables(stores, tmp_path / "proteins", orthologs=table, width=512)
    assert [path.name for path in paths] == ["a_gene.h5", "b_gene.h5"]
    vocab = Vocab.load(paths)
    vectors_GE = vocab.protein_GE()
    cosine_GG = np.corrcoef(vectors_GE)
    pair = cosine_GG[vocab.rows([f"A{g}" for g in range(10)]), vocab.rows([f"B{g}" for g in range(10)])]
    assert np.abs(pair - ORTHOLOG_SHARE).max() < 0.05
    other = cosine_GG[vocab.rows([f"A{g}" for g in range(10, 30)]), :][:, vocab.rows([f"B{g}" for g in range(25)])]
    assert np.abs(other).max() < 0.25, "512 random numbers: std of a cosine 0.044"


def test_a_vector_depends_on_its_gene_alone():
    alone = stand_in_vectors(["ENSG1"], {}, 8)
    among = stand_in_vectors(["ENSG0", "ENSG1"], {}, 8)
    np.testing.assert_array_equal(alone[0], among[1])
    # Pinned: the same on another machine and after an upgrade of numpy.
    np.testing.assert_allclose(alone[0, :3], PINNED, rtol=1e-6)


PINNED = [-0.3878955841064453, -0.005115797743201256, 0.11597824841737747]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda tmp_path, stores: stand_in_tables([tmp_path / "absent.soma"], tmp_path / "p"),
            "absent.soma is not a SOMA",
        ),
        (
            lambda tmp_path, stores: ortholog_groups(write(tmp_path, "x\ty\nA1\tC1\n"), {"A1", "B1"}),
            "no row holds gene ids",
        ),
    ],
)
def test_bad_input(tmp_path, stores, make, message):
    with pytest.raises(CellsError, match=message):
        make(tmp_path, stores)


def write(folder: Path, text: str) -> Path:
    path = folder / "orthologs.tsv"
    path.write_text(text)
    return path
