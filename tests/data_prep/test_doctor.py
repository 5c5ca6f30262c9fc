"""The doctor's verdicts: what is fit to train on, what is not, and why."""

from __future__ import annotations

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from data_prep.cli import main
from data_prep.doctor import id_type, inspect
from data_prep.genes import GeneTable
from tftrain.cells.vocab import Vocab, write_protein_table

HUMAN = [f"ENSG{gene:011d}" for gene in range(30)]


def write(path, *, genes=None, obs=None, var=None, change=None, n_cells=20):
    """Poisson counts; `change` sets single values."""
    X = np.random.default_rng(0).poisson(2.0, (n_cells, 30)).astype(np.float64)
    for at, value in (change or {}).items():
        X[at] = value
    frame = pd.DataFrame({"donor_id": "d", "assay": "a", **(obs or {})}, index=[f"c{c}" for c in range(n_cells)])
    var = pd.DataFrame(var or {}, index=HUMAN if genes is None else genes)
    anndata.AnnData(sp.csr_matrix(X), frame, var).write_h5ad(path)
    return path


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (HUMAN, ("homo_sapiens", "Ensembl", 1.0)),
        (["ENSMUSG00000000001", "ENSMUSG00000000002", "Xkr4", ""], ("mus_musculus", "Ensembl", 2 / 3)),
        (["FBgn0000001"], ("drosophila_melanogaster", "FlyBase", 1.0)),
        (["YAL001C", "YAR009C", "YBR160W", "YAL016C-A"], ("saccharomyces_cerevisiae", "SGD", 1.0)),
        (["PF3D7_0100100"], ("plasmodium_falciparum", "PlasmoDB", 1.0)),
        (["TP53", "ACTB"], ("", "", 0.0)),
        ([], ("", "", 0.0)),
    ],
)
def test_kinds_of_ids(ids, expected):
    assert id_type(ids) == expected


def test_a_fit_file(tmp_path):
    change = {(3, gene): 5.0 for gene in range(30)} | {(4, gene): 5.0 for gene in range(30)}  # a pair of twins
    path = write(tmp_path / "a.h5ad", change=change, obs={"organism": "Homo sapiens"})
    vocab = Vocab.of(HUMAN[:24], np.zeros((24, 2), np.float32))
    found = inspect(path, vocab=vocab, genes_per_cell=22, min_expressed_genes=10)
    assert found.is_fit
    assert found.facts["cells"] == 20
    assert found.facts["organism_by_genes"] == "homo_sapiens"
    assert found.facts["organism_by_obs"] == ["Homo sapiens"]
    assert found.facts["genes_in_vocabulary"] == 0.8
    assert found.facts["cells_repeated"] == 1
    assert found.facts["obs_found"] == ["assay", "donor_id", "organism"]
    assert "cell_type" in found.facts["obs_missing"]
    X = anndata.read_h5ad(path).X.toarray()
    assert found.facts["library_size"][2] == np.median(X.sum(axis=1))
    assert found.facts["cells_truncated"] == round(float(((X[:, :24] > 0).sum(axis=1) > 22).mean()), 4)
    assert any("5.0% of the cells repeat the counts" in line for line in found.warnings)


STOPPED = {
    "log1p": ({"change": {(11, 4): 0.6931}}, r"cell c11 (row 11), gene ENSG00000000004, X: 0.6931 is not a raw count"),
    "nan": ({"change": {(19, 29): np.nan}}, "cell c19 (row 19), gene ENSG00000000029, X: nan is not a raw count"),
    "negative": ({"change": {(0, 0): -3}}, "cell c0 (row 0), gene ENSG00000000000, X: -3.0 is not a raw count"),
    "no ids": ({"genes": [str(g) for g in range(30)]}, "no gene ids in its index"),
    "repeated ids": ({"genes": [*HUMAN[:29], HUMAN[0] + ".2"]}, "1 gene ids occur more than once"),
    "other species": (
        {"obs": {"organism": "Mus musculus"}},
        "genes are those of homo_sapiens and obs column 'organism'",
    ),
    "empty": ({"n_cells": 0}, "it holds no cells"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_training_should_not_start(tmp_path, name):
    settings, reason = STOPPED[name]
    found = inspect(write(tmp_path / "a.h5ad", **settings), min_expressed_genes=1)
    assert not found.is_fit
    assert any(reason in line for line in found.stop), found.stop


def test_reasons_that_depend_on_the_recipe(tmp_path):
    path = write(tmp_path / "a.h5ad")
    assert "every cell expresses fewer than 200 genes (at most" in inspect(path).stop[0]
    other = Vocab.of(["ENSG1"], np.zeros((1, 2), np.float32))
    assert "none of its 30 gene ids" in inspect(path, vocab=other, min_expressed_genes=1).stop[0]


def test_symbols_are_told_by_tables(tmp_path):
    symbols = [f"GENE{g}" for g in range(30)]
    tables = {}
    for species, first in (("homo_sapiens", 0), ("mus_musculus", 25)):
        rows = [f"E{g},GENE{g + first},1,100,x" for g in range(30)]
        (tmp_path / f"{species}.csv").write_text("\n".join(rows))
        tables[species] = GeneTable.load(tmp_path / f"{species}.csv")
    found = inspect(write(tmp_path / "a.h5ad", genes=symbols), tables=tables, min_expressed_genes=1)
    assert found.facts["organism_by_genes"] == "homo_sapiens"
    assert any("--gene-table homo_sapiens=TABLE" in line for line in found.warnings)


def test_command(tmp_path, capsys):
    good, bad = write(tmp_path / "good.h5ad"), write(tmp_path / "bad.h5ad", change={(2, 3): 0.5})
    write_protein_table(tmp_path / "p.h5", {gene_id: np.zeros(2) for gene_id in HUMAN})
    arguments = ["--proteins", str(tmp_path / "p.h5"), "--min-genes", "1"]
    assert main(["inspect", str(good), *arguments]) == 0
    assert "good.h5ad" in capsys.readouterr().out
    assert main(["inspect", str(good), str(bad), *arguments, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [file["is_fit"] for file in found] == [True, False]
    assert found[0]["facts"]["genes_in_vocabulary"] == 1.0
    (tmp_path / "cut.h5ad").write_bytes(good.read_bytes()[:2000])
    assert main(["inspect", str(tmp_path / "cut.h5ad")]) == 1
