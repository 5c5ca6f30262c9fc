"""A mirror holds what was chosen of its source, also when it was cut short."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma

from data_prep import mirror as module
from data_prep.cli import main
from data_prep.mirror import mirror
from tftrain.cells.source import QcConfig, SourceConfig, open_source
from tftrain.cells.storage import close_experiments
from tftrain.errors import CellsError

sys.path.insert(0, str(Path(__file__).parents[1] / "cells"))
from stores import count_of, is_expressed, make_store, make_vocab

FILTER = "assay == 'assay 1'"
SILENT = {"show": lambda line: None}


@pytest.fixture
def source(tmp_path):
    """300 cells of 40 genes; cells 1, 4, 7, ... match FILTER. obs lacks raw_sum and nnz."""
    return SourceConfig(str(make_store(tmp_path / "a.soma", drop_obs=["raw_sum", "nnz"])), "s")


def assert_mirrored(path, joinids):
    with tiledbsoma.Experiment.open(str(path)) as experiment:
        obs = experiment.obs.read().concat().to_pandas()
        X = experiment.ms["RNA"].X["raw"].read().coos().concat().to_scipy().toarray()
        var = experiment.ms["RNA"].var.read().concat().to_pandas()
    cell, gene = np.array(joinids)[:, None], np.arange(40)
    expected = np.where(is_expressed(0, cell, gene), count_of(0, cell, gene), 0)
    np.testing.assert_array_equal(X, expected)
    assert obs["origin_joinid"].tolist() == list(joinids)
    assert obs["soma_joinid"].tolist() == list(range(len(joinids)))
    assert obs["donor_id"].tolist() == [f"d{c // 30}" for c in joinids]
    np.testing.assert_array_equal(obs["raw_sum"], expected.sum(axis=1))
    np.testing.assert_array_equal(obs["nnz"], (expected > 0).sum(axis=1))
    assert var["feature_id"].tolist() == [f"G{g}" for g in range(40)]


def test_a_slice_is_copied_and_trains(source, tmp_path):
    out = mirror(source, tmp_path / "m.soma", obs_filter=FILTER, **SILENT)
    assert_mirrored(out, range(1, 300, 3))
    vocab = make_vocab([f"G{g}" for g in range(40)])
    assert len(open_source(SourceConfig(str(out), "s"), vocab, qc=QcConfig(1, 0)).train) > 0
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    assert mirror(source, out, obs_filter=FILTER, **SILENT) == out
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before
    with pytest.raises(CellsError, match=r"m.soma is there already and is no mirror of these cells"):
        mirror(source, out, obs_filter="", **SILENT)


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_mirror_that_ended_early_is_continued(source, tmp_path, monkeypatch, after):
    monkeypatch.setattr(module, "PORTION_CELLS", 30)
    values, calls = module._values, []

    def values_or_die(source, joinid_C):
        calls.append(len(joinid_C))
        if len(calls) == after + 1:
            raise KeyboardInterrupt
        return values(source, joinid_C)

    monkeypatch.setattr(module, "_values", values_or_die)
    with pytest.raises(KeyboardInterrupt):
        mirror(source, tmp_path / "m.soma", obs_filter=FILTER, **SILENT)
    assert not (tmp_path / "m.soma").exists()
    said = []
    mirror(source, tmp_path / "m.soma", obs_filter=FILTER, show=said.append)
    assert said[0].endswith(f"continues after {30 * after} of 100 cells")
    assert len(calls) == 4 + 1, "no portion is read twice but the one that was cut short"
    assert_mirrored(tmp_path / "m.soma", range(1, 300, 3))
    assert sorted(os.listdir(tmp_path)) == ["a.soma", "m.soma"]


@pytest.mark.parametrize(
    ("obs_filter", "message"),
    [
        ("assay == 'none'", "matches none of 300 cells"),
        ("assai == 'x'", "obs cannot be read with the filter .* obs has"),
    ],
)
def test_filters_that_choose_nothing(source, tmp_path, obs_filter, message):
    with pytest.raises(CellsError, match=message):
        mirror(source, tmp_path / "m.soma", obs_filter=obs_filter, **SILENT)
    assert not (tmp_path / "m.soma").exists()


def test_what_is_no_count_is_refused(tmp_path):
    source = SourceConfig(str(make_store(tmp_path / "bad.soma", change={(7, 3): 0.5})), "s")
    with pytest.raises(CellsError, match=r"bad.soma: cell 7 \(soma_joinid\), var 3: X/raw holds 0.5"):
        mirror(source, tmp_path / "m.soma", **SILENT)


def test_command(source, tmp_path):
    out = tmp_path / "m.soma"
    assert main(["mirror", str(out), "--uri", source.uri, "--filter", FILTER, "--max-cells", "5"]) == 0
    assert_mirrored(out, [1, 4, 7, 10, 13])
    with tiledbsoma.Experiment.open(str(out)) as experiment:
        assert json.loads(experiment.metadata["tftrain_origin"])["obs_filter"] == FILTER
    close_experiments()
