"""What comes out of a store is what was put in, cell by cell, and what is no count does not come out."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from stores import count_of, expected_cell, is_expressed, make_store, make_vocab

from tftrain.cells.plan import OrderConfig, Plan
from tftrain.cells.read import heldout_cells, read_rows, read_window, take
from tftrain.cells.source import HoldoutConfig, QcConfig, SourceConfig, close_experiments, open_sources
from tftrain.errors import CellsError

GENES = 40
# Rows of the vocabulary are not the columns of the stores, and it lacks every fifth gene.
KNOWN = [gene for gene in range(GENES) if gene % 5]
VOCAB = make_vocab([f"G{gene}" for gene in reversed(KNOWN)] + ["G-none"])


def open_stores(*paths, **settings):
    settings = {"qc": QcConfig(0, 0), "holdout": HoldoutConfig(fraction=0), **settings}
    configs = [SourceConfig(str(path), f"species {i}") for i, path in enumerate(paths)]
    return open_sources(configs, VOCAB, **settings)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("read")
    return [make_store(folder / f"{i}.soma", store=i, n_cells=n) for i, n in enumerate((300, 90))]


def assert_true_cells(cells, stores_of_cell):
    genes_of_row = [*reversed(KNOWN), None]
    for c in range(len(cells)):
        one = cells.slice(c, c + 1)
        store, joinid = stores_of_cell[c], int(one.joinid_C[0])
        expected = expected_cell(store, joinid, GENES, KNOWN)
        got = {genes_of_row[row]: count for row, count in zip(one.gene_N.tolist(), one.count_N.tolist())}
        assert got == expected
        assert list(got) == sorted(got), "genes stand in the order of the store's columns"


@pytest.mark.parametrize(
    "joinids",
    [[0], [299], range(10, 60), [200, 3, 150, 4], range(299, -1, -1), [0, 128, 256], []],
    ids=["first", "last", "run", "scattered", "backwards", "one a fragment", "none"],
)
def test_rows_come_in_the_order_asked_for(stores, joinids):
    source = open_stores(*stores, obs_columns=["assay"])[0]
    cells = read_rows(source, np.array(list(joinids), np.int64))
    assert cells.joinid_C.tolist() == list(joinids)
    assert (cells.gene_N.dtype, cells.count_N.dtype, cells.source_C.dtype) == (np.int32, np.int32, np.int16)
    assert cells.obs["assay"].tolist() == [f"assay {joinid % 3}" for joinid in joinids]
    assert_true_cells(cells, [0] * len(cells))


def test_a_window_mixes_the_stores(stores):
    sources = open_stores(*stores, obs_columns=["donor_id", "nnz"], obs_filter="donor_id != 'd3'")
    plan = Plan(tuple(s.plan_source for s in sources), 0, OrderConfig(lanes=2, chunk_cells=7, window_cells=200), 20)
    seen = []
    for window in plan.windows(0, plan.epoch_start(1)):
        cells = read_window(sources, window)
        source_C, position_C = window.cells()
        np.testing.assert_array_equal(cells.source_C, source_C)
        expected = [sources[s].train_joinid_N[p] for s, p in zip(source_C, position_C)]
        np.testing.assert_array_equal(cells.joinid_C, expected)
        assert (cells.gene_N.dtype, cells.count_N.dtype) == (np.uint16, np.uint16)
        assert_true_cells(cells, cells.source_C.tolist())
        sizes = np.array([300, 90])[cells.source_C]
        assert cells.obs["donor_id"].tolist() == [f"d{c * 10 // n}" for c, n in zip(cells.joinid_C, sizes)]
        seen += list(zip(cells.source_C.tolist(), cells.joinid_C.tolist()))
    assert len(set(seen)) == len(seen) == 270 + 81


def test_a_window_that_repeats_cells(stores):
    sources = open_sources(
        [SourceConfig(str(stores[1]), "s", weight=3.0)], VOCAB, qc=QcConfig(0, 0), holdout=HoldoutConfig(fraction=0)
    )
    plan = Plan((sources[0].plan_source,), 0, OrderConfig(1, 1000, 1000), 10)
    cells = read_window(sources, next(plan.windows(0, plan.epoch_start(1))))
    assert np.bincount(cells.joinid_C).tolist() == [3] * 90
    assert_true_cells(cells, [1] * 270)


def test_counts_above_16_bits(tmp_path):
    path = make_store(tmp_path / "big.soma", change={(5, 1): 70_000.0, (5, 2): 2.0**24})
    sources = open_stores(path)
    plan = Plan((sources[0].plan_source,), 0, OrderConfig(1, 1000, 1000), 10)
    cells = read_window(sources, next(plan.windows(0, plan.epoch_start(1))))
    assert cells.count_N.dtype == np.int32
    at = int(np.flatnonzero(cells.joinid_C == 5)[0])
    assert {70_000, 2**24} <= set(cells.slice(at, at + 1).count_N.tolist())


def test_a_cell_without_a_known_gene_stays_empty(tmp_path):
    unknown = {(9, gene): 0.0 for gene in KNOWN} | {(9, 0): 4.0}
    source = open_stores(make_store(tmp_path / "e.soma", change=unknown))[0]
    cells = read_rows(source, np.array([8, 9, 10]))
    assert cells.n_expressed_C.tolist()[1] == 0
    assert (cells.n_expressed_C[[0, 2]] > 0).all()


@pytest.mark.parametrize(
    ("value", "shown"), [(0.5, "0.5"), (-1, "-1"), (np.nan, "nan"), (np.inf, "inf"), (2**31, "2147483648")]
)
@pytest.mark.parametrize("gene", [0, 7], ids=["gene not in the vocabulary", "gene of the vocabulary"])
def test_what_is_no_count_is_refused(tmp_path, value, shown, gene):
    source = open_stores(make_store(tmp_path / "bad.soma", change={(123, gene): value}))[0]
    message = rf"bad.soma: cell 123 \(soma_joinid\), gene G{gene}: X/raw holds {shown}, which is not a raw count"
    with pytest.raises(CellsError, match=message):
        read_rows(source, np.arange(100, 200))


def test_a_truncated_store_names_the_fragment(tmp_path):
    path = make_store(tmp_path / "cut.soma")
    source = open_stores(path)[0]
    close_experiments()
    victim = max((path / "ms/RNA/X/raw/__fragments").rglob("a0.tdb"), key=lambda file: file.stat().st_mtime)
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(CellsError, match=rf"cut.soma: X/raw cannot be read at cells 0 to 299: .*{victim.parent.name}"):
        read_rows(source, np.arange(300))
    close_experiments()
    shutil.rmtree(victim.parent)
    with pytest.raises(CellsError, match=r"cut.soma: X/raw cannot be read"):
        read_rows(source, np.arange(300))


def test_take_is_the_contract_s_take(stores):
    cells = read_rows(open_stores(*stores, obs_columns=["assay"])[0], np.arange(50))
    index = np.random.default_rng(0).integers(0, 50, 80)
    got, expected = take(cells, index), cells.take(index)
    for name in ("cell_start_C1", "gene_N", "count_N", "source_C", "joinid_C"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
    np.testing.assert_array_equal(got.obs["assay"], expected.obs["assay"])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_heldout_cells(stores, world):
    sources = open_stores(*stores, holdout=HoldoutConfig(values=["d0", "d4"]))
    parts = [heldout_cells(sources, rank, world, 40) for rank in range(world)]
    seen = [cell for part in parts for cell in zip(part.source_C.tolist(), part.joinid_C.tolist())]
    assert len(set(seen)) == len(seen) == 40
    held = [set(source.heldout_joinid_M.tolist()) for source in sources]
    assert all(joinid in held[source] for source, joinid in seen)
    for part in parts:
        assert_true_cells(part, part.source_C.tolist())


def test_the_formula_of_the_stores_tells_cells_apart():
    rows = {tuple(count_of(0, c, g) if is_expressed(0, c, g) else 0 for g in KNOWN) for c in range(200)}
    assert len(rows) == 200
