"""Species or type: unique R2 against ordinary least squares, purities by hand, at chance on noise."""

import math

import numpy as np
import pytest
from bench import bench, dataset
from sklearn.linear_model import LinearRegression

from tftrain.evals import species_or_type


def rows_of(findings, **wanted):
    return [row for row in findings.rows if all(getattr(row, key) == value for key, value in wanted.items())]


def atlas(seed=0, *, species="ab", labels=("x", "y", "z"), n=300):
    rng = np.random.default_rng(seed)
    return [dataset(name, rng, n=n, labels=labels, donors=6) for name in species], rng


def least_squares_r2(x, *columns):
    design = np.column_stack([(column == name).astype(float) for column in columns for name in np.unique(column)])
    left = x - LinearRegression().fit(design, x).predict(design)
    return 1 - (left**2).sum() / ((x - x.mean(0)) ** 2).sum()


@pytest.mark.parametrize("is_drawn_by_cell", [True, False])
def test_unique_r2_equals_ordinary_least_squares(is_drawn_by_cell):
    rng = np.random.default_rng(0)
    kind, species = rng.choice(list("xyz"), 200), rng.choice(list("ab"), 200)
    x = rng.normal(size=(200, 4)) + 2 * (kind == "x")[:, None] + (species == "a")[:, None]
    unit = np.arange(200) if is_drawn_by_cell else rng.integers(0, 20, 200)
    weight = rng.multinomial(unit.max() + 1, np.full(unit.max() + 1, 1 / (unit.max() + 1)), size=3)
    weight[0] = 1
    of_type, of_species = species_or_type.unique_r2(x, kind, species, unit, weight)
    for r in range(3):
        at = np.repeat(np.arange(200), weight[r][unit])
        both = least_squares_r2(x[at], kind[at], species[at])
        assert of_type[r] == pytest.approx(both - least_squares_r2(x[at], species[at]))
        assert of_species[r] == pytest.approx(both - least_squares_r2(x[at], kind[at]))


def test_who_is_told_apart_decides_the_sign():
    data, rng = atlas()
    code = {d.name: np.array([ord(label) for label in d.label_C], float)[:, None] for d in data}
    noise = {d.name: rng.normal(size=(300, 6)) for d in data}
    x = {
        "trained": {d.name: noise[d.name] + 3 * code[d.name] for d in data},
        "pca": {d.name: noise[d.name] + 5 * (d.name == "a") for d in data},
    }
    found = species_or_type.run(bench(data, x))
    (own,) = rows_of(found, model="trained", metric="log_ratio")
    (other,) = rows_of(found, model="pca", metric="log_ratio")
    assert own.low > 1
    assert other.high < -1
    assert own.resampled == "donors"
    (gain,) = rows_of(found, metric="log_ratio_gain")
    assert gain.variant == "over pca"
    assert gain.low > 0
    (same,) = rows_of(found, model="trained", metric="same_type_among_15_nearest_of_other_species")
    assert same.value > 0.9
    (same,) = rows_of(found, model="pca", metric="same_among_15_nearest", variant="species")
    assert same.value > 0.9


def test_neighbourhoods_by_hand():
    """Four cells on a line, three neighbours each."""
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    kind, species = np.array(list("xyxy")), np.array(list("aabb"))
    found = species_or_type.neighbourhoods(x, kind, species)
    assert found["same_among_15_nearest", "type"] == pytest.approx([1 / 3] * 4)
    assert found["same_type_among_15_nearest_of_other_species", ""] == pytest.approx([0.5] * 4)


def test_noise_scores_chance():
    gaps, holds = {}, []
    for seed in range(5):
        data, rng = atlas(seed, species="abc", labels=tuple("uvwxy"), n=260)
        x = {"random": {d.name: rng.normal(size=(260, 20)) for d in data}}
        for row in species_or_type.run(bench(data, x, seed=seed, bootstraps=200)).rows:
            if row.chance is not None:
                gaps.setdefault((row.metric, row.variant), []).append(row.value - row.chance)
                if row.low is not None:
                    holds.append(row.low <= row.chance <= row.high)
    assert abs(np.mean(gaps["log_ratio", ""])) < 0.1
    for key, values in gaps.items():
        assert abs(np.mean(values)) < 0.1 if key[0] == "log_ratio" else 0.01, key
    assert np.mean(holds) >= 0.8


def test_cells_are_balanced_over_the_shared_classes():
    rng = np.random.default_rng(0)
    data = [dataset("a", rng, labels=("x", "y", "z")), dataset("b", rng, n=90, labels=("x", "y", "w"))]
    drawn = species_or_type.balanced(data, 0)
    counts = [dict(zip(*np.unique(label, return_counts=True))) for _, label in drawn]
    assert counts[0] == counts[1]
    assert set(counts[0]) == {"x", "y"}
    assert len(set(counts[0].values())) == 1
    assert species_or_type.chances(2, 2, 40)["log_ratio", ""] == math.log(1)


@pytest.mark.parametrize("names", ["a", "ab"])
def test_too_little_in_common_is_said(names):
    rng = np.random.default_rng(0)
    labels = {"a": ("x", "y"), "b": ("x", "w")}
    data = [dataset(name, rng, labels=labels[name]) for name in names]
    found = species_or_type.run(bench(data, {"random": {d.name: rng.normal(size=(240, 3)) for d in data}}))
    assert not found.rows
    assert "it takes 2 in each of 2" in found.notes[0]
