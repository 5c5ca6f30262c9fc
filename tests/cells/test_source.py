"""Which cells of a store train, and what is said of a store that cannot be used."""

from __future__ import annotations

import pickle
import shutil

import numpy as np
import pytest
from stores import make_store, make_vocab

from tftrain.cells.holdout import holdout_fraction
from tftrain.cells.source import (
    HoldoutConfig,
    QcConfig,
    SourceConfig,
    close_experiments,
    heldout_sample,
    open_source,
    open_sources,
)
from tftrain.errors import CellsError, RecipeError

VOCAB = make_vocab([f"G{g}" for g in range(40)])
NO_QC, NO_HOLDOUT = QcConfig(0, 0), HoldoutConfig(fraction=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(make_store(tmp_path_factory.mktemp("source") / "a.soma"))


def opened(uri, **settings):
    settings = {"qc": NO_QC, "holdout": NO_HOLDOUT, **settings}
    return open_source(SourceConfig(str(uri), "mus_musculus"), VOCAB, **settings)


def test_all_cells(store):
    source = opened(store)
    np.testing.assert_array_equal(source.train_joinid_N, np.arange(300))
    np.testing.assert_array_equal(source.row_of_var, np.arange(40))
    assert (source.name, source.species, source.n_cells, len(source.heldout)) == (
        "mus_musculus",
        "mus_musculus",
        300,
        0,
    )
    assert source.describe().startswith("mus_musculus: 300 of 300 cells train (none dropped); 40 of 40 genes have")


@pytest.mark.parametrize(
    ("obs_filter", "expected"),
    [
        ("", range(300)),
        (None, range(300)),
        ("is_primary_data == True", range(300)),
        ("donor_id == 'd1'", range(30, 60)),
        ("assay in ['assay 0', 'assay 2'] and soma_joinid < 9", [0, 2, 3, 5, 6, 8]),
    ],
)
def test_obs_filter(store, obs_filter, expected):
    source = opened(store, obs_filter=obs_filter)
    assert source.train_joinid_N.tolist() == list(expected)
    assert source.dropped["not matched by the obs filter"] == 300 - len(list(expected))


def test_qc_counts_what_it_drops(tmp_path):
    nnz = np.full(300, 500)
    nnz[:7] = 199
    nnz[7] = 0
    raw_sum = np.tile([900.0, 1100.0], 150)
    raw_sum[[100, 200]] = 10_000  # beyond 3 SD of the cells with enough genes
    raw_sum[:8] = 1e9  # does not widen the SD: dropped before it is taken
    store = make_store(tmp_path / "qc.soma", obs={"nnz": nnz, "raw_sum": raw_sum})
    source = opened(store, qc=QcConfig())
    assert source.dropped == {
        "not matched by the obs filter": 0,
        "with fewer than 200 expressed genes": 8,
        "with a total count beyond 3 SD": 2,
        "held out": 0,
    }
    assert set(range(300)) - set(source.train_joinid_N.tolist()) == {*range(8), 100, 200}
    off = opened(store)
    assert off.dropped["without a count"] == 1
    assert len(off.train) == 299


def test_holdout_takes_whole_donors_by_their_hash(store):
    fractions = {f"d{d}": holdout_fraction("mus_musculus", f"d{d}") for d in range(10)}
    source = opened(store, holdout=HoldoutConfig(fraction=0.5))
    held = {donor for donor, at in fractions.items() if at < 0.5}
    assert 0 < len(held) < 10
    assert set(source.heldout_joinid_M // 30) == {int(donor[1:]) for donor in held}
    assert sorted([*source.train_joinid_N, *source.heldout_joinid_M]) == list(range(300))
    assert source.heldout_values == fractions
    assert holdout_fraction("homo_sapiens", "d0") != fractions["d0"]
    more = opened(store, holdout=HoldoutConfig(fraction=0.7))
    assert set(source.heldout_joinid_M) <= set(more.heldout_joinid_M)


def test_holdout_by_value(store):
    source = opened(store, holdout=HoldoutConfig(column="assay", values=["assay 1"]))
    assert source.heldout_joinid_M.tolist() == list(range(1, 300, 3))


def test_heldout_sample_is_in_proportion_and_fixed(store, tmp_path):
    other = make_store(tmp_path / "b.soma", n_cells=60)
    configs = [SourceConfig(store, "mus_musculus"), SourceConfig(str(other), "mus_musculus")]
    holdout = HoldoutConfig(values=["d0", "d1"])
    sources = open_sources(configs, VOCAB, qc=NO_QC, holdout=holdout)
    assert [source.name for source in sources] == ["mus_musculus", "mus_musculus-2"]
    assert [source.index for source in sources] == [0, 1]
    assert [len(part) for part in heldout_sample(sources, 1000)] == [60, 12]
    sample = heldout_sample(sources, 18)
    assert [len(part) for part in sample] == [15, 3]
    assert all(set(part) <= set(source.heldout_joinid_M) for part, source in zip(sample, sources))
    np.testing.assert_array_equal(sample[0], heldout_sample(sources, 18)[0])


def test_digest_follows_the_cells_not_the_place(store, tmp_path):
    moved = shutil.copytree(store, tmp_path / "elsewhere.soma")
    recounted = make_store(tmp_path / "c.soma", obs={"raw_sum": np.arange(300.0)})
    renamed = make_store(tmp_path / "r.soma", gene_ids=[*(f"G{g}" for g in range(39)), "other"])
    first = opened(store)
    assert opened(moved).digest == first.digest
    assert opened(recounted).digest != first.digest
    assert opened(renamed).digest != first.digest
    assert opened(store, obs_filter="soma_joinid > 0").digest != first.digest


def test_a_source_pickles_small(store):
    source = opened(store, holdout=HoldoutConfig(fraction=0.5))
    assert source.train_joinid_N.sum() > 0
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.train_joinid_N, source.train_joinid_N)
    assert len(pickle.dumps(source)) < 6000


def test_versions_and_unknown_genes(tmp_path):
    ids = [f"G{g}.{g + 1}" for g in range(20)] + [f"other{g}" for g in range(20)]
    source = opened(make_store(tmp_path / "v.soma", gene_ids=ids))
    np.testing.assert_array_equal(source.row_of_var, [*range(20), *[-1] * 20])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"obs_filter": "cell_typ == 'x'"},
            r"obs cannot be read with data.obs_filter .*cell_typ.*; obs has soma_joinid, .*nnz",
        ),
        ({"obs_filter": "donor_id =="}, r"obs cannot be read with data.obs_filter 'donor_id =='"),
        ({"obs_filter": "donor_id == 'x'"}, r"matches none of 300 cells; an empty data.obs_filter takes all"),
        ({"holdout": HoldoutConfig("donor", 0.1)}, r"obs has no column donor; it has soma_joinid, donor_id"),
        ({"obs_columns": ["tissue"]}, r"obs has no column tissue; it has"),
        ({"qc": QcConfig(1000, 0)}, r"no cell passes the filter and QC \(300 with fewer than 1000 expressed genes\)"),
        (
            {"holdout": HoldoutConfig("assay", values=["assay 0", "assay 1", "assay 2"])},
            r"all 300 chosen cells are held out",
        ),
    ],
)
def test_refusals(store, settings, message):
    with pytest.raises(CellsError, match=message):
        opened(store, **settings)


def test_missing_qc_columns_name_the_rule(tmp_path):
    store = make_store(tmp_path / "bare.soma", drop_obs=["nnz", "raw_sum"])
    with pytest.raises(CellsError, match=r"no column nnz, raw_sum; .*data.qc.min_expressed_genes=0 does without nnz"):
        opened(store, qc=QcConfig())
    assert len(opened(store).train) == 300


@pytest.mark.parametrize(
    ("holdout", "message"),
    [
        (
            HoldoutConfig(fraction=1e-6),
            r"fraction 1e-06 holds out no cell: donor_id has 10 values \(d\d.*; a fraction of 0\.",
        ),
        (HoldoutConfig(values=["d77"]), r"values \['d77'\] holds out no cell: .*name one of them; .*fraction=0"),
    ],
)
def test_an_empty_holdout_names_its_donors(store, holdout, message):
    with pytest.raises(CellsError, match=message):
        open_sources([SourceConfig(store, "mus_musculus")], VOCAB, qc=NO_QC, holdout=holdout)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [f"X{g}" for g in range(40)],
            r"none of its 40 gene ids \(X0, X1, X2, ...\) is in the vocabulary of 40 .*\(G0, G1, G2",
        ),
        ([*(f"G{g}" for g in range(39)), "G3.7"], r"1 gene ids occur more than once without their version \(G3\)"),
    ],
)
def test_gene_ids_that_cannot_be_used(tmp_path, ids, message):
    with pytest.raises(CellsError, match=message):
        opened(make_store(tmp_path / "ids.soma", gene_ids=ids))


def test_no_store(tmp_path):
    with pytest.raises(CellsError, match=r"nothing.soma: no SOMA experiment can be opened there"):
        opened(tmp_path / "nothing.soma")


@pytest.mark.parametrize(
    "make", [lambda: QcConfig(-1), lambda: HoldoutConfig(fraction=1.0), lambda: HoldoutConfig(max_cells=0)]
)
def test_settings_out_of_range(make):
    with pytest.raises(RecipeError, match=r"it must be"):
        make()


def test_a_store_that_changed_is_seen_after_closing(tmp_path):
    path = make_store(tmp_path / "s.soma", n_cells=30)
    assert opened(path).n_cells == 30
    close_experiments()
    shutil.rmtree(path)
    make_store(path, n_cells=40)
    assert opened(path).n_cells == 40
