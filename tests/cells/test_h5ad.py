"""Reading .h5ad files: encodings, gene ids, raw, and every refusal; real files of ../shared/data where they are."""

from __future__ import annotations

from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from tftrain.cells.contract import Cells
from tftrain.cells.h5ad import H5adFile, check_counts, match_genes, read_h5ad
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError

DATA = Path(__file__).parents[3] / "shared" / "data"
VOCAB = Vocab.of(["G2", "G0", "G5"], np.ones((3, 2)))
COUNTS_CG = np.array([[1, 0, 2, 0, 7], [0, 0, 0, 3, 0], [0, 9, 4, 0, 1], [0, 0, 0, 0, 0]])
IDS = ["G0.1", "", "G2", "G9", "G5.3"]


def write(path, matrix=COUNTS_CG, ids=IDS, encode=sp.csr_matrix, dtype=np.float32, column="ensembl_id", raw=None):
    n_cells, n_genes = np.shape(matrix)
    symbols = [f"symbol{n}" for n in range(n_genes)]
    var = pd.DataFrame({column: ids}, index=symbols) if column else pd.DataFrame(index=ids)
    assay = pd.Categorical([["10x", None][n % 2] for n in range(n_cells)])
    obs = pd.DataFrame({"assay": assay, "score": np.arange(n_cells) / 2}, index=[f"cell{n}" for n in range(n_cells)])
    adata = anndata.AnnData(X=encode(np.asarray(matrix, dtype)), obs=obs, var=var)
    if raw is not None:
        adata.raw = anndata.AnnData(X=sp.csr_matrix(np.asarray(raw, np.float32)), obs=obs, var=var)
    adata.write_h5ad(path)
    return path


def read(path, vocab=VOCAB, *, gene_col_name=None, obs_columns=(), block_cells=2, use_raw=None) -> Cells:
    with H5adFile(path, use_raw=use_raw) as file:
        match = match_genes(file, vocab, gene_col_name)
        return Cells.concat(list(read_h5ad(file, vocab, match, obs_columns=obs_columns, block_cells=block_cells)))


@pytest.mark.parametrize("block_cells", [1, 2, 3, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("encode", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["CSR", "CSC", "dense"])
def test_encodings(tmp_path, encode, dtype, block_cells):
    cells = read(write(tmp_path / "a.h5ad", encode=encode, dtype=dtype), obs_columns=["assay"], block_cells=block_cells)
    # Columns 1 (no id) and 3 (not in the vocabulary) are left out; column order is kept, rows are the vocabulary's.
    assert cells.cell_start_C1.tolist() == [0, 3, 3, 5, 5]
    assert cells.gene_N.tolist() == [1, 0, 2, 0, 2]
    assert cells.count_N.tolist() == [1, 2, 7, 4, 1]
    assert cells.joinid_C.tolist() == [0, 1, 2, 3]
    assert cells.obs["assay"].tolist() == ["10x", "", "10x", ""]
    dtypes = [cells.cell_start_C1.dtype, cells.gene_N.dtype, cells.count_N.dtype, cells.source_C.dtype]
    assert dtypes == [np.int64, np.int32, np.int32, np.int16]


def test_columns_are_counted(tmp_path):
    with H5adFile(write(tmp_path / "a.h5ad")) as file:
        match = match_genes(file, VOCAB)
    assert match.row_of_column_G.tolist() == [1, -1, 0, -1, 2]
    assert match.describe() == "3 of 5 genes used; left out 1 not in the vocabulary and 1 without gene id"


def test_unsorted_and_repeated_entries_of_a_row(tmp_path):
    path = write(tmp_path / "a.h5ad")
    with h5py.File(path, "r+") as file:
        del file["X/indices"], file["X/data"], file["X/indptr"]
        file["X/indices"], file["X/data"] = np.array([4, 0, 4, 2], np.int32), np.array([1, 5, 2, 0], np.float32)
        file["X/indptr"] = np.array([0, 3, 4, 4, 4], np.int32)
    cells = read(path)
    assert cells.cell_start_C1.tolist() == [0, 2, 2, 2, 2]
    assert (cells.gene_N.tolist(), cells.count_N.tolist()) == ([1, 2], [5, 3])


@pytest.mark.parametrize(
    ("column", "gene_col_name"), [("ensembl_id", None), ("ensembl_id", "ensembl_id"), ("gid", "gid"), (None, None)]
)
def test_where_gene_ids_are_looked_for(tmp_path, column, gene_col_name):
    cells = read(write(tmp_path / "a.h5ad", column=column), gene_col_name=gene_col_name)
    assert cells.count_N.tolist() == [1, 2, 7, 4, 1]


@pytest.mark.parametrize(
    ("with_raw", "use_raw", "expected"),
    [(True, None, 14), (True, True, 14), (True, False, 1), (False, None, 1), (False, False, 1)],
)
def test_raw(tmp_path, with_raw, use_raw, expected):
    path = write(tmp_path / "a.h5ad", raw=14 * COUNTS_CG if with_raw else None)
    assert read(path, use_raw=use_raw).count_N[0] == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5, "0.5"), (-1, "-1.0"), (np.nan, "nan"), (np.inf, "inf"), (2.0**31, "2.147")],
)
@pytest.mark.parametrize("encode", [sp.csr_matrix, sp.csc_matrix, np.asarray], ids=["CSR", "CSC", "dense"])
@pytest.mark.parametrize("gene", [2, 3], ids=["gene of the vocabulary", "another gene"])
def test_refuses_what_is_no_count_wherever_it_is(tmp_path, encode, value, shown, gene):
    matrix = COUNTS_CG.astype(np.float32)
    matrix[2, gene] = value
    path = write(tmp_path / "a.h5ad", matrix=matrix, encode=encode)
    with pytest.raises(CellsError) as error:
        read(path)
    for part in (str(path), "cell2", "row 2", f"symbol{gene}", shown, "not a raw count", "Give raw counts"):
        assert part in str(error.value)


def test_check_counts_reports_the_first_bad_value():
    def describe(cell, n):
        return f"file, cell {cell}, value {n}"

    start_C1 = np.array([0, 2, 2, 5])
    check_counts(np.array([0.0, 1, 2, 3, 2.0**31 - 128]), start_C1, describe)
    check_counts(np.array([], np.float32), np.array([0]), describe)
    check_counts(np.array([1, 2, 3, 4, 5], np.uint64), start_C1, describe)
    with pytest.raises(CellsError, match=r"file, cell 2, value 3: 1.5 is not a raw count .* 2 of 5 values"):
        check_counts(np.array([1, 1, 1, 1.5, -1]), start_C1, describe)
    with pytest.raises(CellsError, match="cell 0, value 1: -3"):
        check_counts(np.array([1, -3, 1, 1, 1], np.int8), start_C1, describe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": ["", "", "", "", ""]}, "no gene ids in var column 'ensembl_id'"),
        ({"ids": ["0", "1", "2", "3", "4"], "column": None}, "no gene ids in its index"),
        ({"ids": ["X1", "X2", "X3", "X4", ""]}, r"none of its 4 gene ids \(X1, X2, X3, \.\.\.\) is among the 3"),
        ({"ids": ["G0.1", "G0.2", "G2", "G3", ""]}, r"1 gene ids occur more than once .* \(G0\)"),
    ],
)
def test_refuses_gene_ids(tmp_path, options, message):
    path = write(tmp_path / "a.h5ad", **options)
    with pytest.raises(CellsError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_refuses_files_and_columns(tmp_path):
    path = write(tmp_path / "a.h5ad")
    with pytest.raises(CellsError, match=r"obs has no column 'donor_id'; it has assay, score"):
        read(path, obs_columns=["donor_id"])
    with pytest.raises(CellsError, match=r"var has no column 'gid'; it has ensembl_id"):
        read(path, gene_col_name="gid")
    with pytest.raises(CellsError, match="has no raw"):
        read(path, use_raw=True)
    with pytest.raises(CellsError, match="no such file"):
        read(tmp_path / "b.h5ad")
    (tmp_path / "c.h5ad").write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CellsError, match="not an HDF5 file, or damaged"):
        read(tmp_path / "c.h5ad")
    with pytest.raises(CellsError, match="holds no cells"):
        read(write(tmp_path / "d.h5ad", matrix=COUNTS_CG[:0]))
    with h5py.File(tmp_path / "e.h5ad", "w") as file:
        file["X"], file["var"], file["obs"] = COUNTS_CG, np.zeros(5), np.zeros(4)
    with pytest.raises(CellsError, match=r"of anndata's form before 0\.7"):
        read(tmp_path / "e.h5ad")
    with h5py.File(path, "r+") as file:
        file["X/indices"][0] = 77
    with pytest.raises(CellsError, match="rows 0 to 2 cannot be read"):
        read(path)


@pytest.mark.parametrize("name", ["fly_gut_log1p_not_counts", "human_lung_ipsc_rsem_fractional"])
def test_refuses_the_real_files_that_are_no_counts(name):
    path = DATA / "negative" / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with H5adFile(path) as file:
        ids = [gene_id for gene_id in file.gene_ids() if gene_id]
    vocab = Vocab.of(ids, np.ones((len(ids), 1)))
    with pytest.raises(CellsError, match=rf"{name}\.h5ad: cell .* gene .* is not a raw count"):
        read(path, vocab)


def test_refuses_the_real_file_of_transcripts():
    """Columns of *P. falciparum* are transcripts (`PF3D7_1427400.1` and `.2`), so ids repeat without the version."""
    path = DATA / "plasmodium_falciparum_idc_mca.h5ad"
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    with H5adFile(path) as file, pytest.raises(CellsError, match=r"45 gene ids occur more than once .*PF3D7_1427400"):
        match_genes(file, VOCAB)


COUNT_FILES = [path for path in sorted(DATA.glob("*.h5ad")) if "falciparum" not in path.name]


@pytest.mark.parametrize("path", COUNT_FILES, ids=lambda path: path.stem)
def test_reads_the_real_files_that_are_counts(path):
    """Sums equal those that anndata reads; columns without an id are left out."""
    with H5adFile(path) as file:
        ids = [gene_id for gene_id in file.gene_ids() if gene_id]
        vocab = Vocab.of(ids, np.ones((len(ids), 1)))
        match = match_genes(file, vocab)
        n_values = total = n_cells = 0
        for block in read_h5ad(file, vocab, match, obs_columns=["assay", "cell_type"]):
            n_cells += len(block)
            n_values += len(block.gene_N)
            total += int(block.count_N.sum())
        assert n_cells == file.n_cells
    adata = anndata.read_h5ad(path)
    kept = adata.X[:, match.row_of_column_G >= 0]
    assert (n_values, total) == ((kept > 0).sum(), kept.sum(dtype=np.float64))
    assert match.n_unknown == 0
