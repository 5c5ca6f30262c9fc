"""An evaluation on Weights & Biases: its headlines as figures, the verdict as a table, the report as a page.

In: a verdict and its report. Out: one W&B run, that of the training where the checkpoint names it.
"""

from __future__ import annotations

import tempfile
from typing import Any

from tftrain.errors import TrainingError
from tftrain.evals.paired import TRAINED
from tftrain.evals.report import Verdict
from tftrain.training.folder import Folder
from tftrain.training.metrics import WandbConfig

COLUMNS = ("figure", "data", "model", "value", "low", "high", "chance", "n")


def log(config: WandbConfig, verdict: Verdict, html: str, *, out: str, run_id: str | None) -> None:
    """Does nothing in mode `disabled`. Raises TrainingError where W&B cannot start."""
    if config.mode == "disabled":
        return
    import wandb

    folder = str(Folder.at(out).local or tempfile.mkdtemp(prefix="tftrain-wandb-"))
    try:
        run: Any = wandb.init(
            mode=config.mode,
            project=config.project,
            entity=config.entity,
            name=config.name,
            group=config.group,
            tags=config.tags,
            id=run_id,
            # An offline run cannot be resumed: under the same id `wandb sync` joins the parts.
            resume="allow" if run_id and config.mode == "online" else None,
            dir=folder,
            job_type="evaluate",
            settings=wandb.Settings(silent=True, console="off"),
        )
    except wandb.errors.Error as error:
        raise TrainingError(
            f"W&B could not start in mode {config.mode}: {error}; log in (`wandb login` or WANDB_API_KEY), or set "
            "wandb.mode to offline or disabled"
        ) from None
    lines = verdict.lines()
    table = [
        [line.headline.title, line.dataset, model, row.value, row.low, row.high, row.chance, row.n]
        for line in lines
        for model, row in line.rows.items()
    ]
    figures = {
        f"evaluation/{line.headline.task}/{line.dataset}/{line.headline.metric}": line.rows[TRAINED].value
        for line in lines
        if TRAINED in line.rows
    }
    verdicts = wandb.Table(columns=list(COLUMNS), data=table)
    run.log({**figures, "evaluation/verdict": verdicts, "evaluation/report": wandb.Html(html, inject=False)})
    run.finish()
