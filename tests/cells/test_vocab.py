"""Protein tables in the published layout: merging, hashes, and refusals."""

from __future__ import annotations

import pickle

import h5py
import numpy as np
import pytest

from tftrain.cells.vocab import Vocab, strip_version, write_protein_table
from tftrain.errors import CellsError


@pytest.mark.parametrize(
    ("gene_id", "expected"),
    [
        ("ENSG00000139618.12", "ENSG00000139618"),
        ("ENSG00000139618", "ENSG00000139618"),
        (" ENSG1.2 ", "ENSG1"),
        ("YAL068W-A", "YAL068W-A"),
        ("PF3D7_1400200", "PF3D7_1400200"),
        ("gene.with.dots", "gene.with.dots"),
        ("H4C1.2.3", "H4C1.2"),
        ("", ""),
    ],
)
def test_strip_version(gene_id, expected):
    assert strip_version(gene_id) == expected


def table(path, ids, width=3, start=0.0):
    vectors = np.arange(len(ids) * width, dtype=np.float32).reshape(len(ids), width) + start
    write_protein_table(path, ids, vectors)
    return vectors


def test_merges_files_in_order_and_the_first_duplicate_wins(tmp_path):
    first = table(tmp_path / "a_gene.h5", ["Z1.4", "B2", "A3"])
    second = table(tmp_path / "b_gene.h5", ["B2.9", "C4"], start=100)
    vocab = Vocab.load([tmp_path / "a_gene.h5", tmp_path / "b_gene.h5"])
    assert vocab.gene_ids == ("Z1", "B2", "A3", "C4")
    assert vocab.file_of_gene_G.tolist() == [0, 0, 0, 1]
    assert (vocab.n_genes, vocab.protein_width) == (4, 3)
    np.testing.assert_array_equal(vocab.protein_GE(), np.concatenate([first, second[1:]]))
    assert vocab.rows(["C4.1", "B2", "nowhere", ""]).tolist() == [3, 1, -1, -1]
    assert vocab.rows([]).dtype == np.int32
    swapped = Vocab.load([tmp_path / "b_gene.h5", tmp_path / "a_gene.h5"])
    assert swapped.gene_ids == ("B2", "C4", "Z1", "A3")
    assert swapped.genes_hash != vocab.genes_hash
    assert swapped.table_hash != vocab.table_hash


def test_hashes_tell_ids_from_vectors(tmp_path):
    one, two = Vocab.of(["A", "B"], np.eye(2)), Vocab.of(["A", "B"], 2 * np.eye(2))
    assert one.genes_hash == two.genes_hash
    assert one.table_hash != two.table_hash
    write_protein_table(tmp_path / "t.h5", {"A": np.array([1, 0]), "B": np.array([0, 1])})
    again = Vocab.load([tmp_path / "t.h5"])
    assert (again.genes_hash, again.table_hash) == (one.genes_hash, one.table_hash)


def test_pickles_without_its_table(tmp_path, monkeypatch):
    ids = [f"G{n}" for n in range(200)]
    table(tmp_path / "t.h5", ids, width=500)
    monkeypatch.chdir(tmp_path)
    vocab = Vocab.load(["t.h5"])
    expected = vocab.protein_GE()
    text = pickle.dumps(vocab)
    assert len(text) < 10_000 < expected.nbytes
    monkeypatch.chdir("/")
    again = pickle.loads(text)
    np.testing.assert_array_equal(again.protein_GE(), expected)
    assert again.genes_hash == vocab.genes_hash
    in_memory = pickle.loads(pickle.dumps(Vocab.of(["A"], np.ones((1, 4)))))
    assert in_memory.protein_GE().tolist() == [[1, 1, 1, 1]]


def test_layout_of_a_written_file(tmp_path):
    table(tmp_path / "t.h5", ["A", "B"])
    with h5py.File(tmp_path / "t.h5") as file:
        assert file["keys"][()].tolist() == [b"A", b"B"]
        assert file["keys"].dtype.kind == "S"
        assert file["arrays/B"][()].tolist() == [3, 4, 5]
        assert file["arrays/B"].dtype == np.float32
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]


def write_raw(path, keys, arrays):
    with h5py.File(path, "w") as file:
        if keys is not None:
            file["keys"] = np.array(keys, "S")
        if arrays is not None:
            group = file.create_group("arrays")
            for key, value in arrays.items():
                group[key] = np.array(value, np.float32)


@pytest.mark.parametrize(
    ("keys", "arrays", "message"),
    [
        (None, {"A": [1]}, r"holds \['arrays'\] where a dataset 'keys'"),
        (["A"], None, r"holds \['keys'\]"),
        ([], {}, "holds no genes"),
        (["A", "B"], {"B": [1]}, "'A' in 'keys' but has no arrays/A"),
        (["A"], {"A": [[1, 2]]}, r"arrays/A has shape \(1, 2\), expected one vector"),
        (["A.1", "B", "A.2"], {"A.1": [1], "B": [1], "A.2": [1]}, r"'A.1' and 'A.2' are both gene 'A'"),
    ],
)
def test_refuses_at_load(tmp_path, keys, arrays, message):
    write_raw(tmp_path / "t.h5", keys, arrays)
    with pytest.raises(CellsError, match=message) as error:
        Vocab.load([tmp_path / "t.h5"])
    assert str(tmp_path / "t.h5") in str(error.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"A": [1, 2]}, "has no vector for gene 'B'"),
        ({"A": [1, 2], "B": [1, 2, 3]}, r"'B' has shape \(3,\), expected \(2,\)"),
        ({"A": [1, 2], "B": [1, np.nan]}, "the vector of 'B' holds NaN"),
        ({"A": [np.inf, 2], "B": [1, 2]}, "the vector of 'A' holds NaN or infinity"),
    ],
)
def test_refuses_when_the_table_is_read(tmp_path, arrays, message):
    write_raw(tmp_path / "t.h5", ["A", "B"], arrays)
    with pytest.raises(CellsError, match=message):
        Vocab.load([tmp_path / "t.h5"]).protein_GE()


def test_refuses_files(tmp_path):
    with pytest.raises(CellsError, match="no protein table given"):
        Vocab.load([])
    with pytest.raises(CellsError, match=r"none\.h5 does not exist"):
        Vocab.load([tmp_path / "none.h5"])
    (tmp_path / "text.h5").write_text("not HDF5")
    with pytest.raises(CellsError, match="not a readable HDF5 file"):
        Vocab.load([tmp_path / "text.h5"])
    table(tmp_path / "a.h5", ["A"], width=3)
    table(tmp_path / "b.h5", ["B"], width=4)
    with pytest.raises(CellsError, match=r"b\.h5: protein vectors are 4 wide, those of .*a\.h5 are 3"):
        Vocab.load([tmp_path / "a.h5", tmp_path / "b.h5"])
    with pytest.raises(CellsError, match="placeholder"):
        Vocab.placeholder(3, 2).protein_GE()
    with pytest.raises(CellsError, match=r"2 gene ids but a protein table of shape \(1, 2\)"):
        Vocab.of(["A", "B"], np.ones((1, 2)))
    with pytest.raises(CellsError, match=r"'A' and 'A\.1' are both"):
        write_protein_table(tmp_path / "c.h5", ["A", "A.1"], np.ones((2, 2)))
    assert not (tmp_path / "c.h5").exists()
