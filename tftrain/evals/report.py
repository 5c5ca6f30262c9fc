"""The verdict on the terminal.

Every figure of it stands beside chance, the baselines on the same cells and its 95 % interval; the lines below the
tables say who wins, whoever it is.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import Console
from rich.table import Table

from tftrain.evals import headlines
from tftrain.evals.baselines import TITLES
from tftrain.evals.contract import Dataset, Findings, Row
from tftrain.evals.headlines import ORACLES, Line

_OF_OTHER_TABLES = ("macro_f1", "gene_nll", "count_nll")


@dataclass(frozen=True)
class Verdict:
    """The findings of one checkpoint with what they are of."""

    findings: Findings
    datasets: Sequence[Dataset]
    checkpoint: str
    seed: int
    shortfalls: list[str] = field(default_factory=list)
    """Limits of `evaluate.fail_below` that were not reached."""

    def value(self, model: str, dataset: str, task: str, metric: str, variant: str) -> Row | None:
        """The row over all folds, or None."""
        wanted = (model, dataset, task, metric, variant, -1)
        for row in self.findings.rows:
            if (row.model, row.dataset, row.task, row.metric, row.variant, row.fold) == wanted:
                return row
        return None

    def letters(self) -> dict[str, str]:
        """A short name of every data set, for tables."""
        few = len(self.datasets) <= len(string.ascii_uppercase)
        return {d.name: string.ascii_uppercase[i] if few else d.name for i, d in enumerate(self.datasets)}

    def lines(self) -> list[Line]:
        """Every headline on every data set."""
        return headlines.lines(self.findings.rows, self.datasets)

    def sentences(self) -> list[str]:
        """One sentence a line of the F1 table: who beats whom, and whether a baseline or the oracle wins."""
        letters = self.letters()
        return [
            f"{_where(line)} {_lettered(line.dataset, letters)}: {_judgement(line.rows)}"
            for line in self.lines()
            if line.headline.metric == "macro_f1" and "trained" in line.rows and len(line.rows) > 1
        ]


def _where(line: Line) -> str:
    return "cell types" if line.headline.task == "celltypes" else line.headline.task


def _judgement(rows: Mapping[str, Row]) -> str:
    """`trained 0.71 beats ...; best is a baseline: ...; below the oracle: ...`."""
    own = rows["trained"].value
    others = sorted(((row.value, model) for model, row in rows.items() if model != "trained"), reverse=True)
    beaten = [f"{_short(model)} {value:.2f}" for value, model in others if value < own]
    better = [f"{_short(model)} {value:.2f}" for value, model in others if value >= own and model not in ORACLES]
    oracle = [f"{_short(model)} {value:.2f}" for value, model in others if value >= own and model in ORACLES]
    parts = [f"trained {own:.2f} beats {', '.join(beaten) or 'nothing'}"]
    if better:
        parts.append(f"a baseline is better or equal: {', '.join(better)}")
    if oracle:
        parts.append(f"the oracle is better or equal: {', '.join(oracle)}")
    return "; ".join(parts)


def _short(model: str) -> str:
    return TITLES[model].replace("\n", " ").rstrip("*")


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Prints both tables, the sentences and the notes; fits 80 columns."""
    letters = verdict.letters()
    for dataset in verdict.datasets:
        how = "trained on; its held-out donors are judged" if dataset.is_seen else "no cell of it was trained on"
        _say(console, f"{letters[dataset.name]} = {dataset.name}: {len(dataset.cells):,} cells, {how}")
    lines = verdict.lines()
    tables = (
        _likelihood_table(verdict, letters),
        _f1_table([line for line in lines if line.headline.metric == "macro_f1"], verdict),
        _other_table([line for line in lines if line.headline.metric not in _OF_OTHER_TABLES], verdict),
    )
    for table in filter(None, tables):
        # Many representations need more than a narrow terminal: lines then run on, but no figure is cut off.
        console.print(table, width=max(console.width, 24 + 9 * len(table.columns)), crop=False)
    if any(row.model in ORACLES for row in verdict.findings.rows):
        _say(console, "* an oracle: it is told which genes are orthologs, which no model is")
    for line in verdict.sentences():
        _say(console, f"- {line}")
    for note in verdict.findings.notes:
        _say(console, f"note: {note}")
    for line in verdict.shortfalls:
        _say(console, f"fell short: {line}")


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def _likelihood_table(verdict: Verdict, letters: Mapping[str, str]) -> Table | None:
    rows = [row for row in verdict.findings.rows if row.task == "likelihood"]
    if not rows:
        return None
    table = plain_table(f"Held-out NLL, nats a gene, lower is better (seed {verdict.seed})")
    for title in (
        "",
        "trained",
        "unigram",
        "gain over unigram [95 %]",
        "unigram,\nall species",
        "unigram,\nno repeats",
    ):
        table.add_column(title, justify="right" if title else "left")
    for dataset in dict.fromkeys(row.dataset for row in rows):
        for metric, title in (("gene_nll", "gene"), ("count_nll", "count")):
            of = {row.model: row for row in rows if row.dataset == dataset and row.metric == metric}
            gain = verdict.value("trained", dataset, "likelihood", f"{metric}_gain", "over unigram")
            cells = [
                f"{of[model].value:.3f}" if model in of else ""
                for model in ("trained", "unigram", "unigram_pooled", "unigram_no_repeat")
            ]
            cells.insert(2, f"{gain.value:+.3f} \\[{gain.low:+.3f}, {gain.high:+.3f}]" if gain else "")
            table.add_row(f"{letters[dataset]}: {title}", *cells)
    return table


def _f1_table(lines: Sequence[Line], verdict: Verdict) -> Table | None:
    if not lines:
        return None
    table = plain_table(f"Macro-F1 of logistic regression, 95 % interval below it (seed {verdict.seed})")
    table.add_column("", no_wrap=True)
    models = [model for model in TITLES if any(model in line.rows for line in lines)]
    for model in models:
        table.add_column(TITLES[model], justify="right", no_wrap=True)
    table.add_column("chance", justify="right", no_wrap=True)
    for line in lines:
        rows = [line.rows.get(model) for model in models]
        best = max(row.value for row in rows if row)
        is_transfer = line.headline.task == "transfer"
        title = ("" if is_transfer else f"{_where(line)} ") + _lettered(line.dataset, verdict.letters())
        cells = ["" if row is None else _figure(row, row.value == best) for row in rows]
        table.add_row(title, *cells, "" if line.chance is None else f"{line.chance:.2f}")
    return table


def _other_table(lines: Sequence[Line], verdict: Verdict) -> Table | None:
    """The headlines of the other tasks: the model, the best baseline, and the difference."""
    if not lines:
        return None
    table = plain_table(f"Other headlines, 95 % interval below (seed {verdict.seed})")
    table.add_column("")
    for title in ("trained", "best baseline", "difference", "chance"):
        table.add_column(title, justify="right", no_wrap=True)
    for line in lines:
        own, others = line.rows.get("trained"), [m for m in line.rows if m != "trained" and m not in ORACLES]
        best = line.best(others)
        gain = line.gains.get(best or "")
        table.add_row(
            f"{line.headline.title}: {_lettered(line.dataset, verdict.letters())}",
            "" if own is None else _figure(own, False),
            "" if best is None else f"{_short(best)} {_figure(line.rows[best], False)}",
            "" if gain is None else f"{gain.value:+.2f}\n[dim]{gain.low:+.2f} to {gain.high:+.2f}[/]",
            "" if line.chance is None else f"{line.chance:.2f}",
        )
    return table


def plain_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)


def _lettered(dataset: str, letters: Mapping[str, str]) -> str:
    """`A + B -> C` of a data set's name."""
    sides = dataset.split(" -> ")
    return " -> ".join(" + ".join(letters.get(name, name) for name in side.split(" + ")) for side in sides)


def _figure(row: Row, is_best: bool) -> str:
    value = f"[bold green]{row.value:.2f}[/]" if is_best else f"{row.value:.2f}"
    if row.low is None or row.high is None:
        return value
    # Without the leading zero, so that six representations fit 80 columns.
    low, high = (f"{bound:.2f}".removeprefix("0") for bound in (row.low, row.high))
    return f"{value}\n[dim]{low}-{high}[/]"
