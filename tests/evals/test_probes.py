"""Cell types and transfer: against scikit-learn directly, at chance on noise, and what they say of poor data."""

import numpy as np
import pytest
from bench import bench, dataset, informative
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tftrain.errors import RecipeError
from tftrain.evals import celltypes, transfer
from tftrain.evals.extra import need

REFERENCES = {"logistic": LogisticRegression(max_iter=1000), "knn5": KNeighborsClassifier(5)}


def rows_of(findings, **wanted):
    return [row for row in findings.rows if all(getattr(row, key) == value for key, value in wanted.items())]


@pytest.mark.parametrize("variant", REFERENCES)
def test_cell_types_equal_scikit_learn_fold_by_fold(variant):
    rng = np.random.default_rng(0)
    data = dataset("s", rng)
    x = informative(data, rng, noise=0.8)
    found = celltypes.run(bench([data], {"trained": {"s": x}}))
    y = data.label_C.astype(str)
    pooled, values = y.copy(), []
    for fit, predict in StratifiedGroupKFold(5).split(x, y, data.donor_C):
        pooled[predict] = make_pipeline(StandardScaler(), REFERENCES[variant]).fit(x[fit], y[fit]).predict(x[predict])
        values.append(f1_score(y[predict], pooled[predict], average="macro"))
    folds = rows_of(found, variant=variant, metric="macro_f1")
    assert [row.value for row in folds if row.fold >= 0] == pytest.approx(values)
    (total,) = [row for row in folds if row.fold == -1]
    assert total.value == pytest.approx(f1_score(y, pooled, average="macro"))
    assert total.low < total.value < total.high
    assert (total.resampled, total.n) == ("donors", 240)
    (mean,) = rows_of(found, variant=variant, metric="macro_f1_fold_mean")
    assert mean.value == pytest.approx(np.mean(values))
    prediction = next(p for p in found.predictions if p["variant"] == variant)
    assert np.array_equal(prediction["predicted"], pooled)


@pytest.mark.parametrize("variant", REFERENCES)
def test_transfer_equals_scikit_learn(variant):
    rng = np.random.default_rng(1)
    a, b = dataset("a", rng, labels=("w", "x", "y")), dataset("b", rng, labels=("x", "y", "z"), is_seen=False)
    x = {"a": informative(a, rng, noise=0.8), "b": informative(b, rng, noise=0.8)}
    found = transfer.run(bench([a, b], {"trained": x}))
    fit, query = np.isin(a.label_C, ["x", "y"]), np.isin(b.label_C, ["x", "y"])
    model = make_pipeline(StandardScaler(), REFERENCES[variant]).fit(x["a"][fit], a.label_C[fit].astype(str))
    expected = f1_score(b.label_C[query].astype(str), model.predict(x["b"][query]), average="macro")
    (row,) = rows_of(found, variant=variant)
    assert (row.dataset, row.n) == ("a -> b", query.sum())
    assert row.value == pytest.approx(expected)


def test_transfer_pairs():
    rng = np.random.default_rng(0)
    data = [dataset("a", rng), dataset("b", rng), dataset("c", rng, is_seen=False)]
    x = {"trained": {d.name: informative(d, rng) for d in data}}
    names = dict.fromkeys(row.dataset for row in transfer.run(bench(data, x)).rows)
    assert set(names) == {"a -> b", "b -> a", "a -> c", "b -> c", "a + b -> c"}
    unseen = [dataset("a", rng, is_seen=False), dataset("b", rng, is_seen=False)]
    assert {row.dataset for row in transfer.run(bench(unseen, x)).rows} == {"a -> b", "b -> a"}


@pytest.mark.parametrize("labels", [("x", "y"), tuple("abcdefgh")])
def test_noise_scores_chance(labels):
    """The mean over seeds of noise lies at chance, and most intervals hold chance."""
    gaps, holds = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        data = [dataset(name, rng, n=400, labels=labels, donors=10, is_seen=name == "a") for name in "ab"]
        x = {"random": {d.name: rng.normal(size=(400, 16)) for d in data}}
        setting = bench(data, x, seed=seed)
        for found in (celltypes.run(setting), transfer.run(setting)):
            for row in rows_of(found, metric="macro_f1", fold=-1, variant="logistic"):
                gaps.append(row.value - row.chance)
                holds.append(row.low <= row.chance <= row.high)
    assert abs(np.mean(gaps)) < 0.015
    # Below 0.95: ten donors are few for a percentile bootstrap, and cross-validated noise leans below chance.
    assert np.mean(holds) >= 0.7


def test_rare_classes_are_dropped_and_listed():
    rng = np.random.default_rng(0)
    data = dataset("s", rng)
    data.label_C[:9], data.label_C[9:12] = "rare", ""
    found = celltypes.run(bench([data], {"trained": {"s": informative_or_zero(data, rng)}}))
    assert found.notes == ["s: cells of classes left out: (no label): 3, rare: 9"]
    assert {row.n for row in rows_of(found, fold=-1)} == {228}
    assert "rare" not in found.predictions[0]["truth"]


def informative_or_zero(data, rng):
    return rng.normal(size=(len(data.label_C), 4))


@pytest.mark.parametrize(
    ("labels", "donors", "note"),
    [(("x",), 8, "1 classes of 8 donors"), (("x", "y"), 1, "2 classes of 1 donors")],
)
def test_data_that_decides_nothing_is_left_out_and_said(labels, donors, note):
    rng = np.random.default_rng(0)
    data = dataset("s", rng, labels=labels, donors=donors)
    found = celltypes.run(bench([data], {"trained": {"s": rng.normal(size=(240, 3))}}))
    assert not found.rows
    assert note in found.notes[0]


def test_no_class_in_common_is_said():
    rng = np.random.default_rng(0)
    data = [dataset("a", rng, labels=("x", "y")), dataset("b", rng, labels=("u", "v"))]
    found = transfer.run(bench(data, {"trained": {d.name: rng.normal(size=(240, 3)) for d in data}}))
    assert not found.rows
    assert "0 classes in common" in found.notes[0]


def test_a_missing_library_names_the_extra():
    with pytest.raises(RecipeError, match=r"'no_such_library', which is not installed: pip install 'tftrain\[eval\]'"):
        need("no_such_library")
