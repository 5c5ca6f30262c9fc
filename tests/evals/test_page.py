"""The report in a real browser: it asks for nothing, every figure can be read aloud, tables sort by a click."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from bench import bench, dataset, informative
from rich.console import Console
from sklearn.metrics import f1_score

from tftrain.errors import RecipeError
from tftrain.evals import celltypes, compare, files, headlines, page, transfer
from tftrain.evals.contract import Findings, Row
from tftrain.evals.report import Verdict
from tftrain.recipe import EvaluateConfig

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

PROBE = """
<script>
var refused = [];
document.addEventListener("securitypolicyviolation", function (e) { refused.push(e.blockedURI); });
</script>
"""
QUESTIONS = """
<script>
window.addEventListener("load", function () {
  var table = document.querySelector("table.verdict");
  var column = function (k) {
    return Array.from(table.tBodies[0].rows).map(function (row) {
      return row.cells[k].dataset.v || row.cells[k].textContent.trim();
    });
  };
  var heads = table.querySelectorAll("thead th");
  var before = column(2);
  heads[2].querySelector("button").click();
  var down = column(2), said = heads[2].getAttribute("aria-sort");
  heads[2].querySelector("button").click();
  var up = column(2);
  heads[1].querySelector("button").click();
  var words = column(1);
  var out = document.createElement("script");
  out.type = "application/json";
  out.id = "answers";
  out.textContent = JSON.stringify({
    before: before, down: down, up: up, words: words, said: said, cleared: !heads[2].hasAttribute("aria-sort"),
    requests: performance.getEntriesByType("resource")
      .map(function (e) { return e.name; })
      .filter(function (n) { return !n.startsWith("data:"); }),
    refused: refused,
    images: Array.from(document.images).map(function (i) { return [i.alt, i.naturalWidth]; }),
    drawings: Array.from(document.querySelectorAll("svg")).map(function (s) {
      return [s.getAttribute("role"), s.getAttribute("aria-label"), s.getBoundingClientRect().width];
    }),
    figures: document.querySelectorAll("figure").length,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth
  });
  document.body.appendChild(out);
});
</script>
"""


@pytest.fixture(scope="module")
def verdict():
    """Two species of which one was trained on, four representations, one class of very few cells."""
    rng = np.random.default_rng(0)
    data = [dataset("sim_a", rng, n=200), dataset("sim_<b>", rng, n=160, is_seen=False)]
    data[0].label_C[:4] = "rare & odd"
    x = {
        "trained": {d.name: informative(d, rng, noise=0.5) for d in data},
        "untrained": {d.name: informative(d, rng, noise=2.0) for d in data},
        "pca": {d.name: informative(d, rng, noise=0.9) for d in data},
        "random": {d.name: rng.normal(size=(len(d.cells), 4)) for d in data},
    }
    setting = bench(data, x, bootstraps=100)
    found, more = celltypes.run(setting), transfer.run(setting)
    both = Findings(found.rows + more.rows, found.predictions + more.predictions, found.notes + more.notes)
    return Verdict(both, data, "runs/made-up", 0, ["celltypes/sim_a/macro_f1 is 0.5, below 0.9"]), x


@pytest.fixture(scope="module")
def folder(verdict, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    lines = [
        {"step": s, "train/loss_gene": 7 / s, "train/loss_count": 3 / s, "val/loss_gene": 7.5 / s} for s in range(1, 9)
    ]
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    files.write(str(out), *verdict, EvaluateConfig(), facts={"layout": "tftrain", "genes_hash": "ab"})
    return out


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "evaluation" / "report.html").read_text()


class Tags(HTMLParser):
    """Every start tag with its attributes, and whether all that opened was closed."""

    VOID = ("meta", "img", "br", "rect", "path", "line", "polyline")

    def __init__(self, text):
        super().__init__()
        self.found, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag, tag


def test_the_page_is_whole_and_names_nothing_outside(html):
    tags = Tags(html)
    assert tags.open == []
    addresses = [a[key] for _, a in tags.found for key in ("src", "href", "xlink:href", "data", "action") if key in a]
    assert addresses
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    assert not re.search(r"@import|url\(|<link|<iframe|fetch\(|XMLHttp", html)


def test_every_figure_says_what_it_shows(html):
    figures = [(tag, a) for tag, a in Tags(html).found if tag in ("svg", "img")]
    assert len(figures) > 8
    for tag, a in figures:
        assert len(a["alt"] if tag == "img" else a["aria-label"]) > 20


def test_order_of_the_page_and_its_caveats(html):
    ids = re.findall(r'<h2 id="(\w+)"', html)
    assert ids == ["verdict", "bars", "classes", "planes", "species", "caveats", "figures", "origin"]
    assert "Fitted on the judged cells" in html
    assert "An illustration" in html
    assert "cells of classes left out: rare &amp; odd: 4" in html
    assert "celltypes/sim_a/macro_f1 is 0.5, below 0.9" in html
    assert "<b>" not in html


def test_blocks_set_apart_what_was_fitted_on_judged_cells(verdict):
    of, _ = verdict
    zero_shot, fitted = page.verdict_blocks(of.lines(), of.datasets)
    assert {(b.line.dataset, b.best) for b in fitted} == {("sim_<b>", "pca"), ("sim_a -> sim_<b>", "pca")}
    best = {b.line.dataset: b.best for b in zero_shot if b.line.headline.task == "celltypes"}
    assert best == {"sim_a": "pca", "sim_<b>": "untrained"}
    for block in [*zero_shot, *fitted]:
        own, other = block.line.rows["trained"].value, block.line.rows[block.best].value
        assert block.gain.value == pytest.approx(own - other)
        assert block.gain.low <= block.gain.value <= block.gain.high
        assert block.word == (
            "better" if block.gain.low > 0 else "worse" if block.gain.high < 0 else "no clear difference"
        )


def test_class_f1_is_scikit_learns(verdict):
    of, _ = verdict
    for part in of.findings.predictions:
        classes = np.unique(np.concatenate([part["truth"], part["predicted"]]))
        expected = f1_score(part["truth"], part["predicted"], average=None, labels=classes)
        assert page.class_f1(part, classes) == pytest.approx(expected)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser(html, tmp_path):
    (tmp_path / "page.html").write_text(
        html.replace("<title>", PROBE + "<title>").replace("</body>", QUESTIONS + "</body>")
    )
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path}/profile",
            "--window-size=1280,2000",
            "--virtual-time-budget=5000",
            "--dump-dom",
            f"file://{tmp_path}/page.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    answers = json.loads(re.search(r'id="answers">(.*?)</script>', done.stdout, re.DOTALL).group(1))
    numbers = [float(value) for value in answers["before"]]
    assert len(numbers) == 3
    assert [float(value) for value in answers["down"]] == sorted(numbers, reverse=True)
    assert [float(value) for value in answers["up"]] == sorted(numbers)
    assert answers["said"] == "descending"
    assert answers["cleared"]
    assert answers["words"] == ["sim_<b>", "sim_a", "sim_a -> sim_<b>"]
    assert answers["requests"] == []
    assert answers["refused"] == []
    assert len(answers["images"]) + len(answers["drawings"]) == answers["figures"]
    assert all(len(alt) > 20 and width > 100 for alt, width in answers["images"])
    assert all(role == "img" and len(alt) > 20 and width > 50 for role, alt, width in answers["drawings"])
    assert answers["wide"] <= 0, "the page itself does not scroll sideways"


def test_runs_stand_side_by_side(folder, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(folder / "evaluation", other / "evaluation")
    summary = json.loads((other / "evaluation" / "metrics.json").read_text())
    summary["seed"] = 1
    summary["datasets"][0]["cells_sha256"] = "another"
    for row in summary["rows"]:
        if (row["model"], row["task"], row["fold"]) == ("trained", "celltypes", -1):
            row["value"] = 0.123
    (other / "evaluation" / "metrics.json").write_text(json.dumps(summary))
    shared = compare.compare([str(folder), str(other)], str(tmp_path / "both.html"), console=Console(width=120))
    first = next(line for line in shared if line.headline.task == "celltypes")
    assert first.own[1].value == 0.123
    assert first.own[0].value > 0.5
    assert first.winner == 0
    assert first.best[0][0] == "PCA"
    printed = capsys.readouterr().out
    assert "note: other: other cells of sim_a were judged" in printed
    assert "note: other: seed 1" in printed
    html = (tmp_path / "both.html").read_text()
    assert Tags(html).open == []
    assert "0.123" in html
    assert "sim_&lt;b&gt;" in html
    assert (
        len(compare.compare([str(folder / "evaluation")], str(tmp_path / "one.html"), console=Console(quiet=True))) == 3
    )
    with pytest.raises(RecipeError, match="holds no evaluation"):
        compare.compare([str(tmp_path)], str(tmp_path / "none.html"), console=Console(quiet=True))


def test_lower_is_better_where_it_is():
    rows = [
        Row(model, "s", "likelihood", "gene_nll", "held-out", value, 10)
        for model, value in [("trained", 2.0), ("unigram", 3.0), ("unigram_pooled", 2.5)]
    ]
    (line,) = headlines.lines(rows)
    assert line.best(list(line.rows)) == "trained"
    assert line.best(["unigram", "unigram_pooled"]) == "unigram_pooled"
