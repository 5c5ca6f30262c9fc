"""Gates: which limits are reached, and keys that can never be."""

import pytest

from tftrain.errors import RecipeError
from tftrain.evals import gates
from tftrain.evals.contract import Row


def row(model, task, metric, variant, value, fold=-1):
    return Row(model, "s", task, metric, variant, value, 100, 0.1, fold)


ROWS = [
    row("trained", "celltypes", "macro_f1", "logistic", 0.7),
    row("trained", "celltypes", "macro_f1", "knn5", 0.4),
    row("trained", "celltypes", "macro_f1", "logistic", 0.1, fold=0),
    row("pca", "celltypes", "macro_f1", "logistic", 0.9),
    row("trained", "celltypes", "macro_f1_gain", "logistic over pca", -0.2),
    row("trained", "species_or_type", "log_ratio", "", float("nan")),
]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, []),
        ({"celltypes/s/macro_f1": 0.7}, []),
        ({"celltypes/s/macro_f1": 0.75}, ["celltypes/s/macro_f1 is 0.7, below 0.75"]),
        ({"celltypes/s/macro_f1/knn5": 0.5}, ["celltypes/s/macro_f1/knn5 is 0.4, below 0.5"]),
        (
            {"celltypes/s/macro_f1_gain/logistic over pca": 0.0},
            ["celltypes/s/macro_f1_gain/logistic over pca is -0.2, below 0"],
        ),
        ({"species_or_type/s/log_ratio": -5.0}, ["species_or_type/s/log_ratio is nan, below -5"]),
        (
            {"celltypes/t/macro_f1": 0.1},
            [
                "celltypes/t/macro_f1 must be at least 0.1: there is no such figure; did you mean "
                "celltypes/s/macro_f1/logistic?"
            ],
        ),
    ],
)
def test_shortfalls(limits, expected):
    assert gates.shortfalls(ROWS, limits) == expected


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("macro_f1", "a key is task/dataset/metric"),
        ("scib/s/nmi", r"evaluate\.tasks is likelihood, celltypes"),
        ("likelihood/s/gene_nll", "where lower is better; give a gain"),
    ],
)
def test_keys_that_can_never_be_reached_are_refused(key, message):
    with pytest.raises(RecipeError, match=message):
        gates.check_keys({key: 0.5}, ["likelihood", "celltypes"])
