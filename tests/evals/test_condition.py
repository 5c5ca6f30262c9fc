"""Condition: macro-F1 and AUROC against scikit-learn, at chance on noise, and what it says of poor data."""

from dataclasses import replace

import numpy as np
import pytest
from bench import bench, dataset
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from tftrain.evals import condition


def of_donors(data, names=("ill", "well")):
    """The same data with a condition a donor, in turn."""
    number = {donor: k for k, donor in enumerate(np.unique(data.donor_C.astype(str)))}
    by_cell = [names[number[donor] % len(names)] for donor in data.donor_C]
    return replace(data, condition_C=np.array(by_cell, object))


def rows_of(findings, **wanted):
    return [row for row in findings.rows if all(getattr(row, key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def judged():
    """Conditions that a representation half knows, and what was found."""
    rng = np.random.default_rng(3)
    data = of_donors(dataset("s", rng, n=400, donors=10))
    x = rng.normal(size=(400, 5)) + 0.7 * (data.condition_C == "ill")[:, None]
    return data, x, condition.run(bench([data], {"trained": {"s": x}, "random": {"s": rng.normal(size=(400, 5))}}))


def reference(data, x):
    """Out-of-fold predictions and probabilities of `well` by scikit-learn alone."""
    y = data.condition_C.astype(str)
    predicted, p = y.copy(), np.zeros(len(y))
    for fit, query in StratifiedGroupKFold(5).split(x, y, data.donor_C.astype(str)):
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, class_weight="balanced"))
        model.fit(x[fit], y[fit])
        predicted[query], p[query] = model.predict(x[query]), model.predict_proba(x[query])[:, 1]
    return y, predicted, p


def test_figures_equal_scikit_learn(judged):
    data, x, found = judged
    y, predicted, p = reference(data, x)
    (f1,) = rows_of(found, model="trained", metric="macro_f1")
    assert f1.value == pytest.approx(f1_score(y, predicted, average="macro"))
    assert f1.low < f1.value < f1.high
    assert f1.resampled == "donors"
    per_type = []
    for label in "xyz":
        at = data.label_C == label
        (row,) = rows_of(found, model="trained", metric="auroc", variant=label)
        assert row.value == pytest.approx(roc_auc_score(y[at] == "well", p[at]))
        assert row.n == at.sum()
        per_type.append(row.value)
    (mean,) = rows_of(found, model="trained", metric="auroc", variant="mean of cell types")
    assert mean.value == pytest.approx(np.mean(per_type))
    assert mean.low > 0.5
    (gain,) = rows_of(found, metric="auroc_gain", variant="mean of cell types over random")
    assert gain.low > 0


def test_several_conditions_are_one_against_the_rest():
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abc"), 120)
    p = rng.random((120, 3))
    value, sample = condition.auroc(
        p, truth, np.array(list("abc")), np.arange(120), rng.multinomial(120, [1 / 120] * 120, 50)
    )
    assert value == pytest.approx(roc_auc_score(truth, p / p.sum(1, keepdims=True), multi_class="ovr"), abs=0.05)
    assert value == pytest.approx(np.mean([roc_auc_score(truth == name, p[:, k]) for k, name in enumerate("abc")]))
    assert sample.std() > 0


def test_a_resample_is_the_area_of_the_cells_repeated():
    rng = np.random.default_rng(1)
    truth, p, unit = rng.choice(list("ab"), 60), rng.random((60, 2)).round(1), rng.integers(0, 6, 60)
    weight = np.array([[2, 0, 1, 1, 3, 1], [1, 1, 1, 1, 1, 1]])
    _, sample = condition.auroc(p, truth, np.array(["a", "b"]), unit, weight)
    often = weight[0][unit]
    t, q = np.repeat(truth, often), np.repeat(p, often, axis=0)
    expected = np.mean([roc_auc_score(t == name, q[:, k]) for k, name in enumerate("ab")])
    assert sample == pytest.approx(
        [expected, np.mean([roc_auc_score(truth == n, p[:, k]) for k, n in enumerate("ab")])]
    )


def test_noise_scores_chance():
    f1, auroc, holds = [], [], []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        data = of_donors(dataset("s", rng, n=400, donors=12))
        found = condition.run(bench([data], {"random": {"s": rng.normal(size=(400, 8))}}, seed=seed))
        for row in [*rows_of(found, metric="macro_f1"), *rows_of(found, variant="mean of cell types")]:
            (f1 if row.metric == "macro_f1" else auroc).append(row.value - row.chance)
            holds.append(row.low <= row.chance <= row.high)
    assert abs(np.mean(f1)) < 0.02
    # Pooled out-of-fold probabilities of noise lean below one half, by about 0.01.
    assert abs(np.mean(auroc)) < 0.03
    assert np.mean(holds) >= 0.7


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda data: replace(data, condition_C=None), "no column of conditions"),
        (lambda data: of_donors(data, ("ill",)), "1 conditions; it takes 2"),
        (lambda data: of_donors(data, ("",)), "0 conditions; it takes 2"),
        (lambda data: of_donors(data, tuple("abcdefgh")), "0 conditions; it takes 2"),
    ],
)
def test_poor_data_is_left_out_and_said(change, note):
    rng = np.random.default_rng(0)
    data = change(dataset("s", rng, donors=8))
    found = condition.run(bench([data], {"random": {"s": rng.normal(size=(240, 3))}}))
    assert not found.rows
    assert any(note in line for line in found.notes)
