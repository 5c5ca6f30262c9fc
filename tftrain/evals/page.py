"""`report.html`: one page that needs nothing but itself.

In: a verdict, the embeddings and what metrics.json holds. Out: HTML in the order of a reader's questions: who wins and
by how much, each figure with its interval, which classes, which confusions, what it looks like, which species, and what
to hold against it. No figure is computed here but per-class F1 and confusion counts, from the predictions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tftrain.evals import baselines, figures, headlines, scores
from tftrain.evals.contract import Dataset, Findings, Row
from tftrain.evals.extra import need
from tftrain.evals.headlines import HEADLINES, ORACLES, Line
from tftrain.evals.paired import TRAINED

MAX_LINES_SHOWN = 24
"""Data sets of a task whose classes and confusions have a block of their own; the rest is in predictions.parquet."""


@dataclass(frozen=True)
class Block:
    """One line of the verdict table."""

    line: Line
    best: str | None
    gain: Row | None
    oracle: str | None

    @property
    def word(self) -> str:
        """What the interval of the difference says."""
        if self.gain is None or self.gain.low is None or self.gain.high is None:
            return "no interval"
        return "better" if self.gain.low > 0 else "worse" if self.gain.high < 0 else "no clear difference"


def render(
    findings: Findings,
    datasets: Sequence[Dataset],
    summary: Mapping[str, Any],
    *,
    plane: Mapping[str, np.ndarray],
    plane_title: str,
    losses: Sequence[tuple[str, Sequence[tuple[str, Sequence[float], Sequence[float]]]]] = (),
) -> str:
    """The page. `plane` holds the (C, 2) coordinates that are shown of a representation."""
    lines = headlines.lines(findings.rows, datasets)
    zero_shot, fitted = verdict_blocks(lines, datasets)
    models = [m for m in baselines.TITLES if any(m in line.rows for line in lines)]
    context = {
        "summary": summary,
        "datasets": summary["datasets"],
        "sentences": summary["sentences"],
        "blocks": [
            ("Zero-shot: none of these representations saw a judged cell", zero_shot),
            ("Fitted on the judged cells (without their labels)", fitted),
        ],
        "groups": bar_groups(lines),
        "classes": class_blocks(findings, lines, models),
        "planes": planes(datasets, plane),
        "plane_title": plane_title,
        "heats": species_heats(lines, models),
        "every": every_line(findings.rows),
        "models": models,
        "title_of": title,
        "TRAINED": TRAINED,
        "has_oracle": any(model in ORACLES for model in models),
        "losses": [(name, figures.curve(f"{name} loss by step", series)) for name, series in losses],
    }
    return fill("report.html", context)


def fill(template: str, context: Mapping[str, Any]) -> str:
    """A template of `pages/` with everything escaped that is not said to be safe."""
    jinja = need("jinja2")
    environment = jinja.Environment(
        loader=jinja.PackageLoader("tftrain.evals", "pages"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(context)


def title(model: str) -> str:
    """How the page names a representation."""
    return baselines.TITLES.get(model, model.replace("_", " ")).replace("\n", " ")


def verdict_blocks(lines: Sequence[Line], datasets: Sequence[Dataset]) -> tuple[list[Block], list[Block]]:
    """The model against the best baseline that saw no judged cell, and against the best that was fitted on them."""
    blocks: tuple[list[Block], list[Block]] = ([], [])
    for line in lines:
        if TRAINED not in line.rows:
            continue
        others = [model for model in line.rows if model != TRAINED and model not in ORACLES]
        saw = {
            model for model in others if headlines.saw_judged_cells(model, line.headline.task, line.dataset, datasets)
        }
        oracle = next((model for model in line.rows if model in ORACLES), None)
        for into, allowed in ((blocks[0], [m for m in others if m not in saw]), (blocks[1], sorted(saw))):
            best = line.best(allowed)
            if best is not None or (into is blocks[0] and not saw):
                into.append(Block(line, best, line.gains.get(best or ""), oracle))
    return blocks


def bar_groups(lines: Sequence[Line]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(headline, [(data set, SVG)])."""
    groups: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        shown = [
            figures.Bar(title(model).rstrip("*"), _kind(model), row.value, row.low, row.high)
            for model, row in line.rows.items()
        ]
        svg = figures.bars(f"{line.headline.title}, {line.dataset}", shown, line.chance)
        groups.setdefault(line.headline.title, []).append((line.dataset, svg))
    return list(groups.items())


def _kind(model: str) -> str:
    return "own" if model == TRAINED else "oracle" if model in ORACLES else "baseline"


def class_blocks(findings: Findings, lines: Sequence[Line], models: Sequence[str]) -> list[dict[str, Any]]:
    """Per-class F1 of every representation, with support, and the trained model's confusion matrix, a data set each."""
    headline = {(h.task, h.variant): h for h in HEADLINES if h.metric == "macro_f1"}
    by_line: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for part in findings.predictions:
        if (part["task"], part["variant"]) in headline:
            by_line.setdefault((str(part["task"]), str(part["dataset"])), {})[str(part["model"])] = part
    order = [(line.headline.task, line.dataset) for line in lines if line.headline.metric == "macro_f1"]
    blocks = []
    for task, dataset in sorted(by_line, key=lambda key: order.index(key) if key in order else len(order)):
        parts = by_line[task, dataset]
        columns = [*(m for m in models if m in parts), *(m for m in parts if m not in models)]
        truth_C = np.asarray(next(iter(parts.values()))["truth"])
        classes, _, *_ = scores.numbered(truth_C, *(np.asarray(part["predicted"]) for part in parts.values()))
        f1_of = {model: class_f1(parts[model], classes) for model in columns}
        support_K = np.array([(truth_C == name).sum() for name in classes])
        shown = parts.get(TRAINED) or parts[columns[0]]
        blocks.append(
            {
                "task": task,
                "dataset": dataset,
                "models": columns,
                "rows": [(name, int(support_K[k]), [f1_of[m][k] for m in columns]) for k, name in enumerate(classes)],
                "confusion": confusion_figure(shown, classes, f"{task}, {dataset}"),
            }
        )
    return blocks[:MAX_LINES_SHOWN]


def class_f1(part: Mapping[str, Any], classes: np.ndarray) -> np.ndarray:
    """float64 (K): F1 of each class; 0 for a class that is never hit."""
    table_KK = _confusion(part, classes)
    both_K = table_KK.sum(0) + table_KK.sum(1)
    return 2 * np.diagonal(table_KK) / np.maximum(both_K, 1)


def _confusion(part: Mapping[str, Any], classes: np.ndarray) -> np.ndarray:
    truth, guess = (np.searchsorted(classes, np.asarray(part[key]).astype(str)) for key in ("truth", "predicted"))
    return scores.confusion(truth, guess, len(classes))


def confusion_figure(part: Mapping[str, Any], classes: np.ndarray, where: str) -> str:
    """Rows are true classes; the shade is the share of the row, the number counts cells."""
    table_KK = _confusion(part, classes)
    share_KK = table_KK / np.maximum(table_KK.sum(1, keepdims=True), 1)
    names = [name or "(no label)" for name in classes]
    alt = f"Confusion of {title(str(part['model']))}, {where}: share of each true class that is predicted as each class"
    return figures.heat(alt, share_KK, names, names, text_RK=table_KK)


def planes(datasets: Sequence[Dataset], plane: Mapping[str, np.ndarray]) -> list[tuple[str, list, list]]:
    """(by what, [(name, colour)], [(representation, alt text, PNG address)])."""
    label_C = np.concatenate([dataset.label_C for dataset in datasets]).astype(str)
    species_C = np.concatenate([np.full(len(dataset.cells), dataset.name) for dataset in datasets])
    made = []
    for by, group_C in (("label", label_C), ("data set", species_C)):
        names, number_C = np.unique(group_C, return_inverse=True)
        legend = [(name or "(none)", figures.colour(k)) for k, name in enumerate(names)]
        pictures = []
        for model, xy_C2 in plane.items():
            alt = f"{len(xy_C2):,} cells in two dimensions of {title(model)}, coloured by {by} ({len(names)} of them)"
            pictures.append((title(model), alt, figures.points(xy_C2, number_C, len(names))))
        made.append((by, legend, pictures))
    return made


def species_heats(lines: Sequence[Line], models: Sequence[str]) -> list[tuple[str, str]]:
    """(representation, SVG): macro-F1 of labels fitted on the row and predicted on the column; on the diagonal, by
    donors held out within the data set."""
    f1 = [
        line for line in lines if line.headline.metric == "macro_f1" and line.headline.task in ("celltypes", "transfer")
    ]
    transfers = [line for line in f1 if line.headline.task == "transfer"]
    if not transfers:
        return []
    columns = list(dict.fromkeys(line.dataset.split(" -> ")[-1] for line in f1))
    columns.sort()
    rows = list(dict.fromkeys([*columns, *(line.dataset.split(" -> ")[0] for line in transfers)]))
    made = []
    for model in models:
        value_RK = np.full((len(rows), len(columns)), np.nan)
        for line in f1:
            if model in line.rows:
                fitted, _, target = line.dataset.rpartition(" -> ")
                value_RK[rows.index(fitted or target), columns.index(target)] = line.rows[model].value
        if np.isfinite(value_RK).any():
            alt = f"Macro-F1 of {title(model)}, fitted on the row's species and predicted on the column's"
            made.append((title(model), figures.heat(alt, value_RK, rows, columns)))
    return made


def every_line(rows: Sequence[Row]) -> list[tuple[str, list[str], list[dict[str, Any]]]]:
    """(task, models, lines) of every figure over all folds that is no gain."""
    found: dict[str, dict[tuple[str, str, str], dict[str, Row]]] = {}
    for row in rows:
        if row.fold == -1 and not row.metric.endswith("_gain"):
            key = (row.dataset, row.metric, row.variant)
            found.setdefault(row.task, {}).setdefault(key, {})[row.model] = row
    made = []
    for task, lines in found.items():
        models = headlines.in_order({model for of in lines.values() for model in of})
        shown = [
            {"key": key, "rows": [of.get(model) for model in models], "row": next(iter(of.values()))}
            for key, of in lines.items()
        ]
        made.append((task, models, shown))
    return made
