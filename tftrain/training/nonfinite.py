"""Which cells made a loss or a gradient that is no number, for the message that ends or skips a step.

In: this rank's cells and micro-batches of the step, and what the engine found. Out: a text, the same on all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from tftrain.cells.contract import Cells
from tftrain.models.arch import Batch
from tftrain.training.plain import Engine, StepResult

NAMED = 8
"""Cells that a rank names; of more it gives the number."""


def explain(
    engine: Engine,
    result: StepResult,
    cells: Cells,
    batches: Sequence[Batch],
    *,
    pack: Callable[[Cells], Sequence[Batch]],
    filler: Batch,
    name_of: Callable[[int], str],
) -> str:
    """Collective. Looks at each suspect cell alone: those of a micro-batch with a bad loss or, where every loss is
    finite, the gradients of all cells of the step. `cells` are those that `batches` hold, in order; `pack` makes
    the one batch of one cell; `name_of` names a source by its number.
    """
    is_loss = not math.isfinite(result.sums["loss"])
    starts = np.cumsum([0, *(batch.n_cells for batch in batches)])
    suspects = list(range(len(cells)))
    if is_loss:
        bad = [index for index in result.bad_batches if index < len(batches)]
        suspects = [cell for index in bad for cell in range(starts[index], starts[index + 1])]
    alone = [pack(cells.take(np.array([cell])))[0] for cell in suspects]
    n_rounds = max(engine.group.gather(len(alone)))
    alone += [filler] * (n_rounds - len(alone))
    found = [suspects[i] for i in engine.bad_batches(alone, of_gradient=not is_loss) if i < len(suspects)]
    # A cell that is innocent alone (with dropout off) may not be so among others: then all suspects are named.
    any_found = any(engine.group.gather(bool(found)))
    guilty = found if any_found else suspects
    mine = [f"{name_of(int(cells.source_C[cell]))}:{int(cells.joinid_C[cell])}" for cell in guilty]
    named, n_more = [], 0
    for names, n in engine.group.gather((mine[:NAMED], len(mine))):
        named += names
        n_more += n - len(names)
    which = "cells" if any_found else "one or more of the cells"
    more = f" and {n_more:,} more" if n_more else ""
    return (
        f"the {'loss' if is_loss else 'gradient'} is not finite (loss sum {result.sums['loss']}, "
        f"gradient norm {result.grad_norm}); {which} (source:soma_joinid) {', '.join(named)}{more}"
    )
