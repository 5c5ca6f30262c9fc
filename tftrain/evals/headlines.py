"""Which figure of a task is its headline, and the lines of a verdict: one headline on one data set, every model of it.

In: the rows of all tasks. Out: lines that terminal, page and comparison show alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tftrain.evals import baselines
from tftrain.evals.contract import Dataset, Row
from tftrain.evals.paired import TRAINED, gain_variant

ORACLES = ("ortholog_pca",)
"""Baselines that are told what no model is: named apart when they win."""


@dataclass(frozen=True)
class Headline:
    """A figure that a verdict shows."""

    task: str
    metric: str
    variant: str
    title: str
    is_greater_better: bool = True
    is_noise_a_rival: bool = True
    """False: noise does well without knowing anything (it mixes batches), so that it is no baseline to beat."""


HEADLINES = (
    Headline("likelihood", "gene_nll", "held-out", "held-out gene NLL, nats a gene", False),
    Headline("likelihood", "count_nll", "held-out", "held-out count NLL, nats a gene", False),
    Headline("celltypes", "macro_f1", "logistic", "cell types, macro-F1"),
    Headline("transfer", "macro_f1", "logistic", "transfer, macro-F1"),
    Headline("condition", "macro_f1", "logistic", "condition, macro-F1"),
    Headline("condition", "auroc", "mean of cell types", "condition, AUROC, mean of cell types"),
    Headline("scib", "nmi", "leiden 1.0", "NMI of Leiden clusters"),
    Headline("scib", "ari", "leiden 1.0", "ARI of Leiden clusters"),
    Headline("scib", "silhouette_label", "", "cell-type silhouette (ASW)"),
    Headline("scib", "clisi_knn", "", "cLISI, cell types apart"),
    Headline("scib", "ilisi_knn", "", "iLISI, batches mixed", is_noise_a_rival=False),
    Headline("scib", "silhouette_batch", "", "batch silhouette (scIB)", is_noise_a_rival=False),
    Headline("species_or_type", "log_ratio", "", "ln(unique R² of type / of species)", is_noise_a_rival=False),
    Headline("gene_relations", "recall", "raw, tails 10 %", "gene relations, recall, tails 10 %"),
    Headline("gene_relations", "recall", "raw, tails 5 %", "gene relations, recall, tails 5 %"),
)


@dataclass(frozen=True)
class Line:
    """One headline on one data set."""

    headline: Headline
    dataset: str
    rows: dict[str, Row]
    """Model -> its row over all folds, in the order of `baselines.TITLES`."""
    gains: dict[str, Row]
    """Baseline -> the trained model's gain over it; above zero the trained model is better."""

    @property
    def chance(self) -> float | None:
        """What guessing gets."""
        return next(iter(self.rows.values())).chance

    def best(self, models: Sequence[str]) -> str | None:
        """The best of the models that the line has; noise only where it is a rival."""
        sign = 1 if self.headline.is_greater_better else -1
        found = [m for m in self.rows if m in models and (m != "random" or self.headline.is_noise_a_rival)]
        return max(found, key=lambda model: sign * self.rows[model].value) if found else None


def lines(rows: Sequence[Row], datasets: Sequence[Dataset] = ()) -> list[Line]:
    """The lines of all headlines that have rows, in the order of `HEADLINES`; data sets as they come, transfers to
    unseen species last."""
    unseen = {dataset.name for dataset in datasets if not dataset.is_seen}
    by_key: dict[tuple[str, str, str, str], dict[str, Row]] = {}
    for row in rows:
        if row.fold == -1:
            by_key.setdefault((row.task, row.metric, row.variant, row.dataset), {})[row.model] = row
    made = []
    for headline in HEADLINES:
        key = (headline.task, headline.metric, headline.variant)
        names = [k[3] for k in by_key if k[:3] == key]
        for name in sorted(names, key=lambda d: (d.split(" -> ")[-1] in unseen and " -> " in d, " + " in d)):
            found = by_key[*key, name]
            gains = {
                model: by_key[gain][TRAINED]
                for model in found
                for variant in (gain_variant(headline.variant, model), gain_variant("", model))
                if TRAINED in by_key.get(gain := (headline.task, f"{headline.metric}_gain", variant, name), {})
            }
            made.append(Line(headline, name, {m: found[m] for m in in_order(found)}, gains))
    return made


def in_order(models: Iterable[str]) -> list[str]:
    """As `baselines.TITLES` has them, then the others as they come."""
    models = list(models)
    return [*(m for m in baselines.TITLES if m in models), *(m for m in models if m not in baselines.TITLES)]


def saw_judged_cells(model: str, task: str, dataset: str, datasets: Sequence[Dataset]) -> bool:
    """Whether the representation was fitted on the cells that the line judges (never on their labels)."""
    if task == "gene_relations":
        return False
    target = dataset.split(" -> ")[-1]
    by_name = {d.name: d for d in datasets}
    judged = [by_name[target]] if target in by_name else list(datasets)
    if model == "ortholog_pca":
        return not any(len(d.fit_cells) for d in datasets)
    return model in baselines.FITTED and any(not len(d.fit_cells) for d in judged)
