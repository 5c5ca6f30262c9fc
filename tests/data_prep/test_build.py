"""Files become stores in the Census layout, whole or not at all."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import time

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tiledbsoma

from data_prep.build import BuildConfig, build, species_name
from data_prep.cli import main
from tftrain.cells.read import read_rows
from tftrain.cells.source import HoldoutConfig, QcConfig, SourceConfig, open_source
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError


def write_h5ad(path, X, genes, *, obs=None, var=None, dtype=np.float32, layout="csr"):
    X = np.asarray(X)
    frame = pd.DataFrame({"species": "Mus musculus", **(obs or {})}, index=[f"{path.stem}-{c}" for c in range(len(X))])
    matrix = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[layout](X.astype(dtype))
    anndata.AnnData(matrix, frame, pd.DataFrame(var or {}, index=genes)).write_h5ad(path)
    return path


def counts(n_cells, n_genes, seed=0):
    return np.random.default_rng(seed).poisson(0.7, (n_cells, n_genes))


def frames(path):
    with tiledbsoma.Experiment.open(str(path)) as experiment:
        rna = experiment.ms["RNA"]
        X = rna.X["raw"].read().coos().concat().to_scipy().tocsr()
        return X, experiment.obs.read().concat().to_pandas(), rna.var.read().concat().to_pandas()


def test_files_of_one_species_are_united(tmp_path):
    A, B = counts(20, 4, 1), counts(30, 3, 2)
    files = [
        write_h5ad(tmp_path / "a.h5ad", A, ["g1.2", "g2", "g3", "g4"], obs={"donor_id": "x", "stage": "s1", "age": 3}),
        write_h5ad(
            tmp_path / "b.h5ad", B, ["g4.1", "g5", "g1"], obs={"batch": "y", "is_primary_data": False}, layout="csc"
        ),
    ]
    said = []
    (built,) = build(tmp_path / "out", files, show=said.append)
    assert (built.path.name, built.species, built.n_cells, built.n_genes) == (
        "mus_musculus.soma",
        "mus_musculus",
        50,
        5,
    )
    X, obs, var = frames(built.path)
    expected = np.zeros((50, 5))
    expected[:20, :4], expected[20:, [3, 4, 0]] = A, B
    np.testing.assert_array_equal(X.toarray(), expected)
    assert var.feature_id.tolist() == ["g1", "g2", "g3", "g4", "g5"]
    assert var.n_measured_obs.tolist() == [50, 20, 20, 50, 30]
    assert var.nnz.tolist() == (expected > 0).sum(axis=0).tolist()
    np.testing.assert_array_equal(obs.raw_sum, expected.sum(axis=1))
    np.testing.assert_array_equal(obs.nnz, (expected > 0).sum(axis=1))
    assert obs.soma_joinid.tolist() == list(range(50))
    assert obs.dataset_id.tolist() == ["a"] * 20 + ["b"] * 30
    assert obs.obs_id.tolist()[19:21] == ["a-19", "b-0"]
    assert obs.donor_id.tolist() == ["x"] * 20 + ["y"] * 30
    assert obs.is_primary_data.tolist() == [True] * 20 + [False] * 30
    assert obs.stage.tolist() == ["s1"] * 20 + ["unknown"] * 30
    assert obs.age.tolist()[:20] == [3.0] * 20
    assert obs.age.isna().tolist() == [False] * 20 + [True] * 30
    assert set(obs.cell_type) == set(obs.assay) == {"unknown"}
    assert obs.n_measured_vars.tolist() == [4] * 20 + [3] * 30
    assert any("b.h5ad: obs has no donor_id: batch stands for it (1 values)" in line for line in said)
    assert any("a.h5ad: obs has no is_primary_data: True" in line for line in said)


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.uint16])
def test_a_store_reads_back_as_cells(tmp_path, layout, dtype):
    A = counts(40, 30)
    files = [write_h5ad(tmp_path / "a.h5ad", A, [f"g{i}" for i in range(30)], dtype=dtype, layout=layout)]
    (built,) = build(tmp_path / "out", files, show=lambda line: None)
    vocab = Vocab.of([f"g{i}" for i in range(30)], np.zeros((30, 2), np.float32))
    source = open_source(
        SourceConfig(str(built.path), "m"), vocab, qc=QcConfig(1, 0), holdout=HoldoutConfig(fraction=0)
    )
    cells = read_rows(source, source.train_joinid_N)
    got = sp.csr_matrix((cells.count_N, cells.gene_N, cells.cell_start_C1), shape=(len(cells), 30)).toarray()
    np.testing.assert_array_equal(got, A[source.train_joinid_N])


def test_raw_is_taken_where_there_is_one(tmp_path):
    A = counts(10, 4)
    path = write_h5ad(tmp_path / "a.h5ad", A, ["g1", "g2", "g3", "g4"])
    data = anndata.read_h5ad(path)
    data.raw = data
    data = data[:, :2].copy()
    data.X = data.X * 0.5
    data.write_h5ad(path)
    (built,) = build(tmp_path / "out", [path], show=lambda line: None)
    np.testing.assert_array_equal(frames(built.path)[0].toarray(), A)


def test_species_each_get_a_store_and_a_folder_is_taken_whole(tmp_path):
    (tmp_path / "in").mkdir()
    for name, species in (("a", "Homo sapiens"), ("b", "mus_musculus"), ("c", "Homo sapiens")):
        write_h5ad(tmp_path / "in" / f"{name}.h5ad", counts(5, 3), ["g1", "g2", "g3"], obs={"species": species})
    built = build(tmp_path / "out", [tmp_path / "in"], show=lambda line: None)
    assert {b.path.name: b.n_cells for b in built} == {"homo_sapiens.soma": 10, "mus_musculus.soma": 5}
    assert sorted(os.listdir(tmp_path / "out")) == ["homo_sapiens.soma", "mus_musculus.soma"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Homo sapiens", "homo_sapiens"), ("  C. elegans (N2) ", "c_elegans_n2"), ("mus_musculus",) * 2],
)
def test_species_names(text, expected):
    assert species_name(text) == expected


def test_symbols_are_mapped_by_a_table(tmp_path):
    rows = "E1.3,ABC,3,1200,protein_coding\nE2,DEF,1,800,lncRNA\nE3,TWO,1,1,x\nE4,TWO,1,1,x\nE5,GHI,1,77,x\n"
    table = tmp_path / "genes.csv.gz"
    table.write_bytes(gzip.compress(rows.encode()))
    A = counts(9, 6)
    var = {"ensembl_id": ["", "E2", "", "", "E5.9", ""]}
    path = write_h5ad(tmp_path / "a.h5ad", A, ["ABC", "old name", "TWO", "nothing", "x", "GHI"], var=var)
    said = []
    (built,) = build(tmp_path / "out", [path], BuildConfig(gene_tables={"mus_musculus": str(table)}), show=said.append)
    X, _, var = frames(built.path)
    assert var.feature_id.tolist() == ["E1", "E2", "E5"]
    assert var.feature_length.tolist() == [1200, 800, 77]
    np.testing.assert_array_equal(X.toarray(), A[:, [0, 1, 4]])
    assert [line for line in said if "gene" in line][:4] == [
        "a.h5ad: 1 genes mapped by their symbol",
        "a.h5ad: 1 symbols name several genes of the table and are left out",
        "a.h5ad: 1 symbols name a gene that another column has and are left out",
        "a.h5ad: 3 of 6 genes have no gene id and are left out",
    ]


def test_transcripts_are_added_up_on_request(tmp_path):
    A = counts(12, 4)
    path = write_h5ad(tmp_path / "a.h5ad", A, ["g1.1", "g2", "g1.2", "g3"])
    (built,) = build(tmp_path / "out", [path], BuildConfig(sum_duplicates=True), show=lambda line: None)
    X, obs, var = frames(built.path)
    assert var.feature_id.tolist() == ["g1", "g2", "g3"]
    expected = np.stack([A[:, 0] + A[:, 2], A[:, 1], A[:, 3]], axis=1)
    np.testing.assert_array_equal(X.toarray(), expected)
    np.testing.assert_array_equal(obs.nnz, (expected > 0).sum(axis=1))
    assert set(obs.n_measured_vars) == {3}


def changed(X, at, value):
    X = X.astype(np.float64)
    X[at] = value
    return X


GENES = ["g1", "g2", "g3", "g4"]
REFUSED = {
    "fractional": (
        changed(counts(5, 4), (3, 2), 0.5),
        GENES,
        {},
        r"a.h5ad: cell a-3 \(row 3\), gene g3, X: 0.5 is not a raw",
    ),
    "negative": (
        changed(counts(5, 4), (4, 0), -2),
        GENES,
        {},
        r"cell a-4 \(row 4\), gene g1, X: -2.0 is not a raw count",
    ),
    "nan": (
        changed(counts(5, 4), (0, 1), np.nan),
        GENES,
        {},
        r"cell a-0 \(row 0\), gene g2, X: nan is not a raw count",
    ),
    "too large": (
        changed(counts(5, 4), (0, 1), 2**25),
        GENES,
        {},
        r"a count of 33,554,432 .* exactly up to 16,777,216",
    ),
    "no gene ids": (counts(5, 4), list("0123"), {}, r"a.h5ad: no gene ids in its index .*var has no columns"),
    "repeated ids": (
        counts(5, 4),
        ["g1.1", "g2", "g1.4", "g3"],
        {},
        r"1 gene ids occur more than once .*\(g1\).*--sum-dup",
    ),
    "two species": (counts(2, 4), GENES, {"obs": {"species": ["a", "b"]}}, r"names 2 species \(a, b\); split the file"),
    "no such column": (
        counts(2, 4),
        GENES,
        {"config": BuildConfig(gene_col_name="x")},
        r"var has no column 'x'; it has none",
    ),
    "no species": (
        counts(2, 4),
        GENES,
        {"config": BuildConfig(species_column="kind")},
        r"obs has no column kind that says the species; it has species. Give --species",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_files_leave_nothing(tmp_path, name):
    X, genes, settings, message = REFUSED[name]
    good = write_h5ad(tmp_path / "good.h5ad", counts(5, 4), GENES, obs={"species": "first"})
    path = write_h5ad(tmp_path / "a.h5ad", X, genes, obs=settings.get("obs"), dtype=np.float64)
    if name == "no species":
        good = path
    with pytest.raises(CellsError, match=message):
        build(tmp_path / "out", [good, path][good is path :], settings.get("config"), show=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: [folder / "none.h5ad"], "none.h5ad: no such file"),
        (lambda folder: [folder], "no .h5ad file in this folder"),
        (lambda folder: [(folder / "x.h5ad").write_text("text") and folder / "x.h5ad"], "x.h5ad: not an HDF5 file"),
    ],
)
def test_inputs_that_are_none(tmp_path, make, message):
    with pytest.raises(CellsError, match=message):
        build(tmp_path / "out", make(tmp_path), show=lambda line: None)


def test_building_again(tmp_path):
    path = write_h5ad(tmp_path / "a.h5ad", counts(5, 4), GENES)
    said = []
    assert build(tmp_path / "out", [path], show=said.append)[0].is_new
    store = tmp_path / "out" / "mus_musculus.soma"
    before = sorted((p, p.stat().st_mtime_ns) for p in store.rglob("*"))
    assert not build(tmp_path / "out", [path], show=said.append)[0].is_new
    assert said[-1].endswith("was built from the same input and stays as it is")
    assert sorted((p, p.stat().st_mtime_ns) for p in store.rglob("*")) == before
    write_h5ad(path, counts(6, 4, seed=5), GENES)
    with pytest.raises(
        CellsError, match=r"mus_musculus.soma is there already, from other input; --append adds .* --replace"
    ):
        build(tmp_path / "out", [path], show=said.append)
    assert build(tmp_path / "out", [path], BuildConfig(replace=True), show=said.append)[0].n_cells == 6
    assert frames(store)[0].shape[0] == 6


def test_command(tmp_path, capsys):
    path = write_h5ad(tmp_path / "a.h5ad", counts(5, 4), GENES)
    assert main(["build", str(tmp_path / "out"), str(path), "--species", "Danio rerio"]) == 0
    assert "danio_rerio.soma: 5 cells, 4 genes" in capsys.readouterr().out
    assert main(["build", str(tmp_path / "out2"), str(tmp_path / "b.h5ad")]) == 2
    assert capsys.readouterr().err == f"tftrain-data: {tmp_path / 'b.h5ad'}: no such file\n"


def assert_equal_stores(path, expected):
    (X, obs, var), (want_X, want_obs, want_var) = frames(path), frames(expected)
    np.testing.assert_array_equal(X.toarray(), want_X.toarray())
    pd.testing.assert_frame_equal(obs.astype(object), want_obs[obs.columns].astype(object), check_dtype=False)
    pd.testing.assert_frame_equal(var, want_var)


def make_files(folder, n_files=3, n_cells=12):
    folder.mkdir(exist_ok=True)
    return [
        write_h5ad(
            folder / f"{i}.h5ad",
            counts(n_cells, 6, seed=i),
            [f"g{g}" for g in range(2 * i, 2 * i + 6)],
            obs={"donor_id": f"d{i}", "cell_type": [f"type {c % (i + 2)}" for c in range(n_cells)]},
        )
        for i in range(n_files)
    ]


def test_files_are_appended(tmp_path):
    files = make_files(tmp_path / "in")
    (all_at_once,) = build(tmp_path / "all", files, show=lambda line: None)
    build(tmp_path / "out", files[:1], show=lambda line: None)
    (built,) = build(tmp_path / "out", files, BuildConfig(append=True), show=lambda line: None)
    assert (built.n_cells, built.is_new) == (36, True)
    assert_equal_stores(built.path, all_at_once.path)
    said = []
    assert not build(tmp_path / "out", files[1:2], BuildConfig(append=True), show=said.append)[0].is_new
    assert said[-1].endswith("stays as it is")
    assert os.listdir(tmp_path / "out") == ["mus_musculus.soma"]


def test_a_refused_file_leaves_the_store_that_was_there(tmp_path):
    files = make_files(tmp_path / "in", 2)
    (built,) = build(tmp_path / "out", files, show=lambda line: None)
    before = frames(built.path)[0].toarray()
    bad = write_h5ad(tmp_path / "bad.h5ad", changed(counts(5, 4), (3, 2), 0.5), GENES, dtype=np.float64)
    with pytest.raises(CellsError, match=r"bad.h5ad: cell bad-3 \(row 3\), gene g3, X: 0.5"):
        build(tmp_path / "out", [bad], BuildConfig(append=True), show=lambda line: None)
    assert os.listdir(tmp_path / "out") == ["mus_musculus.soma"]
    np.testing.assert_array_equal(frames(built.path)[0].toarray(), before)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_build_that_ended_early_is_continued(tmp_path, signal_number):
    """The first file is done, and a part of the second is written, when the build ends."""
    files = make_files(tmp_path / "in", 1)
    big = counts(40_000, 30, seed=9)
    files.append(write_h5ad(tmp_path / "in" / "big.h5ad", big, [f"g{g}" for g in range(30)]))
    small_writes = "import sys; from data_prep import build, cli; build._VALUES_PER_WRITE = 1; sys.exit(cli.main())"
    command = [sys.executable, "-c", small_writes, "build", str(tmp_path / "out"), *map(str, files)]
    building = tmp_path / "out" / ".mus_musculus.soma.building"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(building.glob("ms/RNA/X/raw/__commits/*.wrt"))) < 3:
        time.sleep(0.005)
    process.send_signal(signal_number)
    process.wait()
    assert building.exists()
    assert not (tmp_path / "out" / "mus_musculus.soma").exists()
    said = []
    (built,) = build(tmp_path / "out", files, show=said.append)
    assert [line for line in said if "continues after 1 of 2 files" in line]
    (expected,) = build(tmp_path / "all", files, show=lambda line: None)
    assert_equal_stores(built.path, expected.path)
    assert os.listdir(tmp_path / "out") == ["mus_musculus.soma"]
