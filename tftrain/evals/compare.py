"""Several runs side by side: `tftrain report RUN...`.

In: the `evaluation` folders that runs left behind. Out: a table on the terminal and one HTML page: each headline on
each data set, a column a run, beside the best baseline; and what makes the comparison unfair (other cells, another
seed, other settings). Differences between runs have no interval here: their cells may differ.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from tftrain.errors import RecipeError
from tftrain.evals import headlines, page
from tftrain.evals.contract import Row
from tftrain.evals.extra import need
from tftrain.evals.files import FOLDER
from tftrain.evals.headlines import ORACLES, Headline, Line
from tftrain.evals.paired import TRAINED
from tftrain.evals.report import plain_table
from tftrain.training.folder import Folder


@dataclass(frozen=True)
class Judged:
    """One run's evaluation."""

    name: str
    """The shortest end of the given path that tells the runs apart."""
    summary: dict[str, Any]
    lines: list[Line]


@dataclass(frozen=True)
class Shared:
    """One headline on one data set over all runs; None where a run does not have it."""

    headline: Headline
    dataset: str
    own: list[Row | None]
    best: list[tuple[str, Row] | None]
    """The best baseline of each run, no oracle."""

    @property
    def winner(self) -> int | None:
        """The run whose model has the best value."""
        sign = 1 if self.headline.is_greater_better else -1
        found = [number for number, row in enumerate(self.own) if row is not None]
        return max(found, key=lambda number: sign * self.own[number].value) if found else None  # type: ignore[union-attr]


def compare(runs: Sequence[str], out: str, *, console: Console | None = None) -> list[Shared]:
    """Prints the comparison and writes the page `out`. Raises RecipeError for a folder without an evaluation."""
    console = console or Console()
    need("jinja2")
    judged = [
        Judged(name, summary := read_summary(run), headlines.lines(_rows(summary)))
        for name, run in zip(_names(runs), runs)
    ]
    shared, warnings = side_by_side(judged), differences(judged)
    table = plain_table("The trained model of each run, 95 % interval below; the best baseline of each run last")
    table.add_column("", no_wrap=True)
    for run in judged:
        table.add_column(run.name, justify="right")
    table.add_column("best baseline", justify="right")
    for line in shared:
        cells = [_cell(row, number == line.winner) for number, row in enumerate(line.own)]
        table.add_row(f"{line.headline.title}: {line.dataset}", *cells, _baselines(line))
    console.print(table, width=max(console.width, 80 + 16 * len(judged)), crop=False)
    for warning in warnings:
        console.print(f"note: {warning}", highlight=False, soft_wrap=True, markup=False)
    html = page.fill(
        "comparison.html",
        {
            "runs": judged,
            "lines": shared,
            "warnings": warnings,
            "groups": _groups(judged, shared),
            "baselines_of": _baselines,
        },
    )
    Path(out).write_text(html)
    console.print(f"report: {out}", highlight=False, soft_wrap=True)
    return shared


def read_summary(run: str) -> dict[str, Any]:
    """metrics.json of a run folder or of its evaluation folder."""
    for folder in (Folder.at(run) / FOLDER, Folder.at(run)):
        if folder.exists("metrics.json"):
            return json.loads(folder.read_text("metrics.json"))
    raise RecipeError(
        f"{run} holds no evaluation ({FOLDER}/metrics.json); give the folder of a run whose recipe has `evaluate:`, or "
        "of one with `task: evaluate`"
    )


def side_by_side(judged: Sequence[Judged]) -> list[Shared]:
    """Every headline and data set of any run, in the order in which they come up."""
    keys = list(dict.fromkeys((line.headline, line.dataset) for run in judged for line in run.lines))
    keys.sort(key=lambda key: headlines.HEADLINES.index(key[0]))
    made = []
    for headline, dataset in keys:
        of_run = [
            next((line for line in run.lines if (line.headline, line.dataset) == (headline, dataset)), None)
            for run in judged
        ]
        own = [line.rows.get(TRAINED) if line else None for line in of_run]
        made.append(Shared(headline, dataset, own, [_best(line) for line in of_run]))
    return made


def differences(judged: Sequence[Judged]) -> list[str]:
    """What keeps the figures of two runs from being of the same thing."""
    found = []
    first = judged[0]
    cells = {d["name"]: d.get("cells_sha256") for d in first.summary["datasets"]}
    for run in judged[1:]:
        for dataset in run.summary["datasets"]:
            name = dataset["name"]
            if name in cells and dataset.get("cells_sha256") != cells[name]:
                found.append(f"{run.name}: other cells of {name} were judged than in {first.name}")
        if run.summary["seed"] != first.summary["seed"]:
            found.append(f"{run.name}: seed {run.summary['seed']}, {first.name}: {first.summary['seed']}")
        for key in ("label", "donor", "condition", "batch"):
            own, other = run.summary["evaluate"].get(key), first.summary["evaluate"].get(key)
            if own != other:
                found.append(f"{run.name}: evaluate.{key} is {own}, {first.name}: {other}")
    return found


def _rows(summary: dict[str, Any]) -> list[Row]:
    known = {f.name for f in fields(Row)}
    return [Row(**{key: value for key, value in row.items() if key in known}) for row in summary["rows"]]


def _names(runs: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [[p for p in run.rstrip("/").split(os.sep) if p != FOLDER] or [run] for run in runs]
    for length in range(1, 1 + max(map(len, parts))):
        names = [os.sep.join(of[-length:]) for of in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {run}" for number, run in enumerate(runs, start=1)]


def _best(line: Line | None) -> tuple[str, Row] | None:
    if line is None:
        return None
    best = line.best([model for model in line.rows if model != TRAINED and model not in ORACLES])
    return (page.title(best), line.rows[best]) if best else None


def _baselines(line: Shared) -> str:
    """`PCA 0.71` where all runs agree, else one after another."""
    return "; ".join(dict.fromkeys(f"{best[0]} {best[1].value:.2f}" for best in line.best if best))


def _cell(row: Row | None, is_best: bool) -> str:
    if row is None:
        return ""
    value = f"[bold green]{row.value:.3f}[/]" if is_best else f"{row.value:.3f}"
    return value if row.low is None or row.high is None else f"{value}\n[dim]{row.low:.2f} to {row.high:.2f}[/]"


def _groups(judged: Sequence[Judged], shared: Sequence[Shared]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(headline, [(data set, SVG)]) with a bar a run and one of the first run's best baseline."""
    from tftrain.evals import figures

    groups: dict[str, list[tuple[str, str]]] = {}
    for line in shared:
        bars = [
            figures.Bar(run.name[-16:], "own", row.value, row.low, row.high)
            for run, row in zip(judged, line.own)
            if row is not None
        ]
        best = line.best[0]
        if best is not None:
            bars.append(figures.Bar(best[0].rstrip("*"), "baseline", best[1].value, best[1].low, best[1].high))
        chance = next((row.chance for row in line.own if row is not None), None)
        if bars:
            svg = figures.bars(f"{line.headline.title}, {line.dataset}", bars, chance)
            groups.setdefault(line.headline.title, []).append((line.dataset, svg))
    return list(groups.items())
