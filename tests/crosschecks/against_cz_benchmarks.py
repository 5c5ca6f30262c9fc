"""Cell types and transfer of a finished evaluation against cz-benchmarks 0.15.1, on the same cells and folds.

cz-benchmarks takes other versions of our libraries, so it lives in an environment of its own:

    python3.11 -m venv /tmp/cz && /tmp/cz/bin/pip install cz-benchmarks==0.15.1
    /tmp/cz/bin/python tests/crosschecks/against_cz_benchmarks.py RUN/evaluation

In: embeddings.h5ad and metrics.parquet of an evaluation with `by_cell: true`. Out: a line for each representation,
data set and classifier with both figures; exit code 1 where one differs by more than its limit. Its label prediction
scales without centring and stops logistic regression after 100 iterations, before it has converged; ours centres and
stops after 1000. It is run once as it is, and once with ours of these two, which must then give the same figures: the
folds, classes and scores are the same. Only transfers whose two species have the same classes are
compared: it fits on all classes of one species, ours on those that both have.
"""

import functools
import itertools
import sys
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

warnings.filterwarnings("ignore")
LIMIT = {"logistic as it is": 0.02, "logistic": 1e-9, "knn5": 1e-9}
OURS = {"lr": "logistic", "knn": "knn5"}
MIN_CELLS = 10


def main(folder: str) -> int:
    """Prints the comparison; returns the exit code."""
    cells = ad.read_h5ad(Path(folder) / "embeddings.h5ad")
    rows = pd.read_parquet(Path(folder) / "metrics.parquet")
    lines = [*label_prediction(cells, rows), *cross_species(cells, rows)]
    table = pd.DataFrame(lines, columns=["task", "data", "representation", "classifier", "ours", "theirs"])
    table["difference"] = table.ours - table.theirs
    print(table.to_string(index=False, float_format=lambda value: f"{value:.4f}"))
    is_over = table.difference.abs() > table.classifier.map(LIMIT)
    for (task, classifier), of in table.groupby(["task", "classifier"]):
        print(
            f"{task}, {classifier}: {len(of)} figures, greatest difference {of.difference.abs().max():.6f}, limit "
            f"{LIMIT[classifier]:g}"
        )
    return int(not len(table) or is_over.any())


def label_prediction(cells, rows):
    """Mean over five folds by cell of macro-F1."""
    from czbenchmarks.tasks import label_prediction as module

    as_it_is = (module.LogisticRegression, module.StandardScaler, "logistic as it is")
    as_ours = (
        functools.partial(module.LogisticRegression, max_iter=1000),
        functools.partial(lambda scaler, with_mean: scaler(), module.StandardScaler),
        "logistic",
    )
    for name, representation in itertools.product(cells.obs.dataset.unique(), cells.obsm):
        at = (cells.obs.dataset == name) & (cells.obs.label != "")
        given = module.MetadataLabelPredictionTaskInput(
            labels=pd.Series(cells.obs.label[at].astype(str).to_numpy()), n_folds=5, min_class_size=MIN_CELLS
        )
        x = np.asarray(cells.obsm[representation])[at.to_numpy()]
        for module.LogisticRegression, module.StandardScaler, said in (as_it_is, as_ours):
            task = module.MetadataLabelPredictionTask(random_seed=42)
            results = pd.DataFrame(task._run_task(x, given).results)
            for theirs, ours in OURS.items():
                value = results[results.classifier == theirs].f1.mean()
                found = value_of(rows, representation, name, "celltypes", "macro_f1_fold_mean", f"{ours} by cell")
                if found is not None and (theirs == "lr" or said == "logistic"):
                    yield "celltypes", name, representation, said if theirs == "lr" else ours, found, value


def cross_species(cells, rows):
    """Macro-F1 of every ordered pair with the same classes."""
    from czbenchmarks.tasks.single_cell.cross_species_label_prediction import CrossSpeciesLabelPredictionTask

    task = CrossSpeciesLabelPredictionTask(random_seed=42)
    for a, b in itertools.permutations(cells.obs.dataset.unique(), 2):
        of = [cells[kept(cells, name)] for name in (a, b)]
        labels = [part.obs.label.astype(str).reset_index(drop=True) for part in of]
        if set(labels[0]) != set(labels[1]):
            continue
        for representation in cells.obsm:
            x = [np.asarray(part.obsm[representation]) for part in of]
            for result in task._run_cross_species_classification(x[0], labels[0], x[1], labels[1], a, b):
                ours = OURS.get(result["classifier"])
                found = value_of(rows, representation, f"{a} -> {b}", "transfer", "macro_f1", ours) if ours else None
                if found is not None:
                    yield "transfer", f"{a} -> {b}", representation, ours, found, result["f1"]


def kept(cells, name):
    """bool: cells of the data set whose class has at least MIN_CELLS cells there."""
    is_of = (cells.obs.dataset == name).to_numpy() & (cells.obs.label != "").to_numpy()
    n = cells.obs.label[is_of].value_counts()
    return is_of & cells.obs.label.isin(n[n >= MIN_CELLS].index).to_numpy()


def value_of(rows, model, dataset, task, metric, variant):
    """Ours, or None where it was not judged."""
    wanted = {"model": model, "dataset": dataset, "task": task, "metric": metric, "variant": variant, "fold": -1}
    at = np.logical_and.reduce([rows[key] == value for key, value in wanted.items()])
    return float(rows.value[at].iloc[0]) if at.any() else None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
