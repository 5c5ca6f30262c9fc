"""The seam between the trainer and an architecture: what a folder under `models/` provides.

The trainer never sees a token, a loss formula or a module's name. It hands Cells to `collate`, the resulting batches to
the module, and takes back sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.errors import CheckpointError, RecipeError


class Batch(Protocol):
    """One micro-batch: packed cells, ready for the module. Passed to `module(batch)` as the only argument."""

    n_cells: int
    n_tokens: int
    """Input tokens, padding not counted."""
    n_scored: int
    """Genes that the loss covers."""

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`."""
        ...


class Architecture(Protocol):
    """One line of `ARCHITECTURES` names a module-level object of this form."""

    name: str
    Config: type
    """A dataclass: the `model:` block of a recipe, without `arch`."""

    def build(self, config: Any, vocab: Vocab, *, device: torch.device | str = "cpu") -> nn.Module:
        """The module with fresh weights (torch's global generator). `module(batch)` returns a dict of scalar sums.

        The dict holds `loss` (the sum over scored genes whose gradient is taken) and the sums it consists of, detached
        (`loss_gene`, `loss_count`), each to be divided by the number of scored genes by the caller. On "meta" nothing
        is allocated and the protein table of `vocab` is not read.
        """
        ...

    def obs_columns(self, config: Any) -> tuple[str, ...]:
        """Columns of obs that `collate` reads."""
        ...

    def set_genes(self, module: nn.Module, config: Any, vocab: Vocab) -> None:
        """Puts another vocabulary's protein vectors into the module. What was trained for single genes then belongs to
        other genes, so that only embeddings have a meaning. Raises CheckpointError for vectors of another width."""
        ...

    def tokens_of(self, cells: Cells, config: Any) -> np.ndarray:
        """int64 (C): tokens that each cell takes in a batch; 0 for a cell that cannot be in one."""
        ...

    def collate(
        self, cells: Cells, config: Any, vocab: Vocab, *, seed: int, shuffle_genes: bool, max_tokens: int
    ) -> Sequence[Batch]:
        """Packs the cells, in order, into as few batches of at most `max_tokens` as first-fit in order gives.

        `seed` and a cell's (source, joinid) alone decide its gene order and truncation, so that a batch does not depend
        on the number of ranks. Raises CellsError for a cell without any gene. A cell longer than `max_tokens` is a
        RecipeError.
        """
        ...

    def empty(self, config: Any, vocab: Vocab) -> Batch:
        """A batch without scored genes that still runs forward and backward, for a rank that has run out of cells."""
        ...

    def embed(self, module: nn.Module, batch: Batch, keys: Sequence[str]) -> dict[str, Tensor]:
        """Outputs in embedding mode without gradients: see the architecture's own `embed` for its keys."""
        ...

    def gene_vectors(self, module: nn.Module, config: Any) -> Tensor:
        """(G, D) a vector of each gene of the vocabulary, from parameters alone: no cell is read."""
        ...

    def forward_flop(self, config: Any, vocab: Vocab, n_tokens: int) -> float:
        """FLOP (2 x multiply-add) of the forward pass of a cell of `n_tokens` tokens; training takes about 3 x that."""
        ...

    def checkpoint_activations(self, module: nn.Module) -> None:
        """From now on a training pass keeps each block's input alone and computes the rest again when it is needed."""
        ...

    def lora_targets(self, module: nn.Module) -> list[str]:
        """Names of modules that an adapter wraps unless the recipe says otherwise."""
        ...


def load_state(module: nn.Module, state: Mapping[str, Tensor], where: str | Path, *, check_only: bool = False) -> None:
    """Copies `state` into the module's parameters. Frozen tables (non-persistent buffers) are no part of it.

    Raises CheckpointError naming `where`, the key, and the shape got and expected, before anything is copied.
    `check_only` compares and copies nothing, which works on "meta".
    """
    expected = module.state_dict()
    for problem, keys in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if keys:
            named = ", ".join(sorted(keys)[:3])
            raise CheckpointError(
                f"{where} {problem} {len(keys)} of the model's weights ({named}{', ...' if len(keys) > 3 else ''}); "
                "configuration and weights do not belong together"
            )
    for key, value in state.items():
        if value.shape != expected[key].shape:
            raise CheckpointError(
                f"{where}: {key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}; "
                "configuration or vocabulary and weights do not belong together"
            )
    if not check_only:
        module.load_state_dict(dict(state), strict=True)


def architecture(name: str) -> Architecture:
    """The architecture called `name`; raises RecipeError with the known names."""
    import importlib

    try:
        module = importlib.import_module(ARCHITECTURES[name])
    except KeyError:
        raise RecipeError(f"model.arch is {name!r}; known architectures: {', '.join(ARCHITECTURES)}") from None
    return module.ARCHITECTURE


ARCHITECTURES = {"transcriptformer": "tftrain.models.transcriptformer"}
