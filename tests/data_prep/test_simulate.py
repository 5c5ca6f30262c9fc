"""The simulated atlas has what it says it has."""

import json
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

from data_prep.cli import main
from data_prep.simulate import (
    LINEAGES,
    NOTICE,
    Programs,
    SimulationConfig,
    SpeciesConfig,
    draw_orthogroups,
    simulate_atlas,
)
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError

SMALL = SimulationConfig(
    seed=3,
    species=(
        SpeciesConfig("sim_a", 500, 8, 400.0),
        SpeciesConfig("sim_b", 400, 6, 250.0),
        SpeciesConfig("sim_c", 300, 6, 300.0),
    ),
)
NAMES = [species.name for species in SMALL.species]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("atlas")
    simulate_atlas(out, SMALL)
    return out


@pytest.fixture(scope="module")
def atlas(folder):
    return {name: ad.read_h5ad(folder / f"{name}.h5ad") for name in NAMES}


@pytest.fixture(scope="module")
def orthologs(folder):
    return pd.read_csv(folder / "orthologs.tsv", sep="\t")


def test_files_say_that_they_are_simulated(folder, atlas):
    assert json.loads((folder / "simulation.json").read_text())["notice"] == NOTICE
    assert "SIMULATED" in NOTICE
    assert all(bool(cells.uns["simulated"]) and cells.uns["notice"] == NOTICE for cells in atlas.values())


def test_counts_are_raw_and_cells_complete(atlas):
    for species, cells in zip(SMALL.species, atlas.values()):
        assert cells.shape == (species.n_cells, SMALL.n_orthogroups + SMALL.n_own_genes)
        assert (cells.X.data >= 1).all()
        assert (cells.X.data == np.floor(cells.X.data)).all()
        assert cells.obs.donor_id.nunique() == species.n_donors
        assert set(cells.obs.cell_type) == set(Programs().types)
        assert set(cells.obs.lineage) == set(LINEAGES)
        n_genes = np.asarray((cells.X > 0).sum(1)).ravel()
        assert 50 < np.median(n_genes) < 250


def test_species_share_no_gene_id(atlas):
    ids = [set(cells.var_names) for cells in atlas.values()]
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]
    assert not ids[1] & ids[2]


def test_orthologs_are_one_to_one_and_own_genes_have_none(atlas, orthologs):
    for name, cells in atlas.items():
        of = orthologs[orthologs.species == name]
        assert of.gene_id.is_unique
        assert of.orthogroup.is_unique
        assert len(of) == SMALL.n_orthogroups
        assert len(set(cells.var_names) - set(of.gene_id)) == SMALL.n_own_genes


def test_protein_vectors_of_an_orthogroup_are_close(folder, orthologs):
    vocab = Vocab.load([folder / f"{name}_gene.h5" for name in NAMES])
    unit_GE = vocab.protein_GE() / np.linalg.norm(vocab.protein_GE(), axis=1, keepdims=True)
    row = pd.Series(range(vocab.n_genes), index=vocab.gene_ids)
    pairs = orthologs[orthologs.species == "sim_a"].merge(orthologs[orthologs.species == "sim_c"], on="orthogroup")
    a, c = row[pairs.gene_id_x].to_numpy(), row[pairs.gene_id_y].to_numpy()
    same = (unit_GE[a] * unit_GE[c]).sum(1)
    other = (unit_GE[a] * unit_GE[np.roll(c, 1)]).sum(1)
    assert same.min() > 0.8
    assert np.percentile(other, 95) < 0.5
    with h5py.File(folder / "sim_a_gene.h5") as file:
        assert set(file) == {"keys", "arrays"}


def test_counts_are_overdispersed(atlas):
    """Within a type and donor the variance of an abundant gene exceeds its mean by about mean^2 / r."""
    cells = atlas["sim_a"]
    group = cells.obs.groupby(["cell_type", "donor_id"], observed=True).indices
    counts_CG = max((cells.X[rows].toarray() for rows in group.values()), key=len)
    mean_G, variance_G = counts_CG.mean(0), counts_CG.var(0, ddof=1)
    abundant_G = mean_G > 5
    assert abundant_G.sum() >= 5
    assert np.median(variance_G[abundant_G] / mean_G[abundant_G]) > 2


def test_programs_mark_their_types(atlas, orthologs):
    programs = Programs()
    shared = draw_orthogroups(np.random.default_rng([SMALL.seed, 0]), SMALL, programs)
    gene_of = orthologs[orthologs.species == "sim_b"].set_index("orthogroup").gene_id
    cells = atlas["sim_b"]
    share = pd.DataFrame(cells.X.toarray() / cells.X.sum(1).A1[:, None], columns=cells.var_names)
    for name in programs.types:
        markers = gene_of[[f"OG{o:05d}" for o in np.flatnonzero(shared.loading_PO[programs.index(name)])]]
        inside, outside = (share.loc[is_in, markers].to_numpy().mean() for is_in in _inside_outside(cells, name))
        assert inside > 4 * outside, name


def _inside_outside(cells, name):
    is_type_C = (cells.obs.cell_type == name).to_numpy()
    return is_type_C, ~is_type_C


def test_donors_differ_and_housekeeping_dominates(atlas):
    cells = atlas["sim_a"]
    share_CG = cells.X.toarray() / cells.X.sum(1).A1[:, None]
    top = np.sort(share_CG.mean(0))[::-1]
    assert 0.2 < top[: SMALL.n_housekeeping].sum() < 0.7
    donors = cells.obs.donor_id.cat.codes.to_numpy()
    abundant_G = share_CG.mean(0) >= top[SMALL.n_housekeeping]
    shuffled = np.random.default_rng(0).permutation(donors)
    spread, null = (
        np.log([share_CG[by == d][:, abundant_G].mean(0) for d in range(8)]).std(0).mean() for by in (donors, shuffled)
    )
    assert spread > 1.5 * null


def test_species_differ_in_depth_and_composition(atlas):
    depth = {name: np.median(cells.X.sum(1).A1) for name, cells in atlas.items()}
    assert depth["sim_a"] > depth["sim_c"] > depth["sim_b"]
    shares = [cells.obs.cell_type.value_counts(normalize=True).sort_index() for cells in atlas.values()]
    assert abs(shares[0] - shares[1]).max() > 0.02


def test_the_seed_decides_everything(folder, atlas, tmp_path):
    simulate_atlas(tmp_path / "same", SMALL)
    simulate_atlas(tmp_path / "other", replace(SMALL, seed=4))
    for name in NAMES:
        same, other = (ad.read_h5ad(tmp_path / which / f"{name}.h5ad") for which in ("same", "other"))
        assert (same.X != atlas[name].X).nnz == 0
        assert same.obs.equals(atlas[name].obs)
        assert (other.X != atlas[name].X).nnz > 0
    tables = [Vocab.load([at / "sim_a_gene.h5"]).table_hash for at in (folder, tmp_path / "same", tmp_path / "other")]
    assert tables[0] == tables[1] != tables[2]


def test_a_finished_folder_stays_and_another_simulation_is_refused(tmp_path):
    first = simulate_atlas(tmp_path, SMALL)
    written = [path.stat().st_mtime_ns for path in first]
    assert simulate_atlas(tmp_path, SMALL) == first
    assert [path.stat().st_mtime_ns for path in first] == written
    with pytest.raises(CellsError, match=r"holds another simulation, see .*simulation.json; remove"):
        simulate_atlas(tmp_path, replace(SMALL, seed=9))


def test_too_many_programs_are_refused(tmp_path):
    with pytest.raises(CellsError, match="n_orthogroups is 100, the programs and housekeeping genes need"):
        simulate_atlas(tmp_path, replace(SMALL, n_orthogroups=100))


def test_the_command_builds_stores_and_says_what_they_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("data_prep.simulate.SimulationConfig", lambda seed: replace(SMALL, seed=seed))
    for _ in range(2):
        assert main(["simulate", str(tmp_path / "cells"), "--seed", "5"]) == 0
        assert NOTICE in capsys.readouterr().out
    assert all((tmp_path / "cells" / f"{name}.soma").is_dir() for name in NAMES)
