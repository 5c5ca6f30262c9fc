"""Scores against scikit-learn and against literal tables."""

import numpy as np
import pytest
from sklearn.dummy import DummyClassifier
from sklearn.metrics import confusion_matrix, f1_score

from tftrain.evals import scores


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        ("aabb", "aabb", 1.0),
        ("aabb", "bbaa", 0.0),
        ("aabb", "aaaa", (2 / 3 + 0) / 2),
        ("aab", "aac", (1.0 + 0 + 0) / 3),
        ("abc", "abb", (1.0 + 2 / 3 + 0) / 3),
    ],
)
def test_macro_f1_of_literal_tables(truth, predicted, expected):
    classes, t, p = scores.numbered(np.array(list(truth)), np.array(list(predicted)))
    assert scores.macro_f1(scores.confusion(t, p, len(classes))) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_macro_f1_and_confusion_equal_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    truth, predicted = rng.choice(list("abcdef"), 200), rng.choice(list("abcdxy"), 200)
    classes, t, p = scores.numbered(truth, predicted)
    table = scores.confusion(t, p, len(classes))
    assert np.array_equal(table, confusion_matrix(truth, predicted, labels=classes))
    assert scores.macro_f1(table) == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))


def test_chance_is_that_of_the_stratified_dummy():
    rng = np.random.default_rng(0)
    fit, truth = rng.choice(list("abc"), 3000, p=[0.7, 0.2, 0.1]), rng.choice(list("abc"), 2000, p=[0.4, 0.3, 0.3])
    dummy = [
        f1_score(
            truth, DummyClassifier(strategy="stratified", random_state=s).fit(fit, fit).predict(truth), average="macro"
        )
        for s in range(50)
    ]
    assert scores.chance_f1(truth, fit, seed=1) == pytest.approx(np.mean(dummy), abs=0.004)


@pytest.mark.parametrize(("donors", "drawn"), [(4, "cells"), (5, "donors"), (12, "donors")])
def test_the_interval_draws_donors_where_there_are_enough(donors, drawn):
    rng = np.random.default_rng(0)
    truth = rng.choice(list("abc"), 600)
    predicted = np.where(rng.random(600) < 0.7, truth, rng.choice(list("abc"), 600))
    low, high, got = scores.interval_f1(truth, predicted, rng.integers(0, donors, 600), bootstraps=500, seed=0)
    assert got == drawn
    assert low < f1_score(truth, predicted, average="macro") < high
    assert high - low < 0.2
    again = scores.interval_f1(truth, predicted, rng.integers(0, donors, 600) * 0, bootstraps=500, seed=0)
    assert again == scores.interval_f1(truth, predicted, np.zeros(600), bootstraps=500, seed=0)


def test_the_cell_interval_covers_the_truth():
    """Of 200 samples of 150 cells, about 95 % of intervals hold the population's macro-F1."""
    rng = np.random.default_rng(1)
    truth = rng.choice(3, 200_000)
    predicted = np.where(rng.random(200_000) < 0.6, truth, rng.choice(3, 200_000))
    population = f1_score(truth, predicted, average="macro")
    held = 0
    for _ in range(200):
        at = rng.integers(0, 200_000, 150)
        low, high, _ = scores.interval_f1(truth[at], predicted[at], np.zeros(150), bootstraps=200, seed=0)
        held += low <= population <= high
    assert 0.89 <= held / 200 <= 0.99


def test_donor_bootstrap_is_wider_where_donors_differ():
    """All cells of a donor right or all wrong: the donors are the sample, not the cells."""
    donor = np.repeat(np.arange(10), 50)
    truth = np.tile(np.array(["a", "b"]), 250)
    predicted = np.where(donor < 7, truth, np.where(truth == "a", "b", "a"))
    by_donor = scores.interval_f1(truth, predicted, donor, bootstraps=500, seed=0)
    by_cell = scores.interval_f1(truth, predicted, donor * 0, bootstraps=500, seed=0)
    assert by_donor[1] - by_donor[0] > 3 * (by_cell[1] - by_cell[0])


def test_interval_of_a_ratio_holds_it():
    rng = np.random.default_rng(0)
    bottom = rng.integers(50, 150, 100)
    top = bottom * rng.normal(2, 0.3, 100)
    low, high = scores.interval_ratio(top, bottom, bootstraps=1000, seed=0)
    assert low < top.sum() / bottom.sum() < high
    assert high - low == pytest.approx(4 * 0.3 / np.sqrt(100), rel=0.3)
