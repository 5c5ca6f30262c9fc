"""Gates: figures of the trained model that must not be below a limit, or the command exits with 1.

In: `evaluate.fail_below`, a mapping of `task/dataset/metric` or `task/dataset/metric/variant` to a limit, such as
`celltypes/homo_sapiens/macro_f1: 0.5` or `celltypes/homo_sapiens/macro_f1_gain/logistic over pca: 0.0`. Without a
variant it is that of the verdict. Out: a line for each limit that is not reached; a figure that does not exist, or is
no number, reaches none.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

from tftrain.errors import RecipeError
from tftrain.evals.contract import Row
from tftrain.evals.headlines import HEADLINES
from tftrain.evals.paired import TRAINED

LOWER_IS_BETTER = tuple(dict.fromkeys(h.metric for h in HEADLINES if not h.is_greater_better))


def check_keys(fail_below: Mapping[str, float], tasks: Sequence[str]) -> None:
    """Raises RecipeError for a key of another form, of a task that does not run, or where lower is better."""
    for key in fail_below:
        parts = key.split("/")
        if len(parts) not in (3, 4):
            raise RecipeError(
                f"evaluate.fail_below has {key!r}; a key is task/dataset/metric or task/dataset/metric/variant, such "
                "as celltypes/homo_sapiens/macro_f1"
            )
        if parts[0] not in tasks:
            raise RecipeError(f"evaluate.fail_below has {key!r}; evaluate.tasks is {', '.join(tasks)}")
        if parts[2] in LOWER_IS_BETTER:
            raise RecipeError(
                f"evaluate.fail_below has {key!r}, where lower is better; give a gain, such as "
                f"{parts[0]}/{parts[1]}/{parts[2]}_gain/over unigram: 0.0"
            )


def shortfalls(rows: Sequence[Row], fail_below: Mapping[str, float]) -> list[str]:
    """A line for each limit that the trained model's figure does not reach."""
    found = {
        "/".join((row.task, row.dataset, row.metric, row.variant)): row.value
        for row in rows
        if row.model == TRAINED and row.fold == -1
    }
    short = []
    for key, limit in fail_below.items():
        full = key if key.count("/") == 3 else f"{key}/{_headline_variant(key, found)}"
        value = found.get(full)
        if value is None:
            near = difflib.get_close_matches(full, found, n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]}?" if near else ""
            short.append(f"{key} must be at least {limit:g}: there is no such figure{hint}")
        elif not value >= limit:
            short.append(f"{key} is {value:.4g}, below {limit:g}")
    return short


def _headline_variant(key: str, found: Mapping[str, float]) -> str:
    """The verdict's variant of the figure, or else the only one that there is."""
    task, _, metric = key.split("/")
    for headline in HEADLINES:
        if (headline.task, headline.metric) == (task, metric):
            return headline.variant
    only = [full.split("/", 3)[3] for full in found if full.startswith(f"{key}/")]
    return only[0] if len(only) == 1 else ""
