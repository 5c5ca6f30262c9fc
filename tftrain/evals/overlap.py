"""Do judged cells overlap with training cells? What a reader must hold against every other figure.

In: data sets with a sample of the training cells. Out: a line for each overlap that is found: donors that both have,
and cells with exactly the same genes and counts, under whatever name. Only the sampled training cells are compared, so
silence proves nothing about the rest. Shapes: C cells, F training cells, G genes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.evals.contract import Dataset
from tftrain.evals.models import text

MIN_GENES = 20
"""Cells that express fewer may be equal by chance."""


def notes(datasets: Sequence[Dataset], donor: str, *, is_training_known: bool) -> list[str]:
    """A line for each data set and kind of overlap; one line where the training cells are not known."""
    if not is_training_known:
        return ["which cells the checkpoint was trained on is not recorded in it: the judged cells may be among them"]
    fitted = [dataset for dataset in datasets if len(dataset.fit_cells)]
    if not fitted:
        return ["overlap of judged and training cells was not looked for: the training held no cell out"]
    found = []
    known_F = np.concatenate([np.zeros(0, np.uint64), *(cell_hashes(d.fit_cells, d.vocab) for d in fitted)])
    for dataset in datasets:
        # A donor's name in another species' data is another donor.
        for source in (source for source in fitted if source.vocab is dataset.vocab):
            shared = (set(dataset.donor_C) & set(text(source.fit_cells.obs[donor]))) - {""}
            if shared:
                found.append(
                    f"overlap: {dataset.name}: {len(shared)} values of {donor} are also in the training cells of "
                    f"{source.name}, such as {min(shared)}"
                )
        same_C = np.isin(cell_hashes(dataset.cells, dataset.vocab), known_F)
        same_C &= dataset.cells.n_expressed_C >= MIN_GENES
        if same_C.any():
            found.append(
                f"overlap: {dataset.name}: {same_C.sum():,} of {len(same_C):,} judged cells have the same counts as a "
                f"training cell, such as cell {dataset.cells.joinid_C[np.argmax(same_C)]}"
            )
    return found


def cell_hashes(cells: Cells, vocab: Vocab) -> np.ndarray:
    """uint64 (C): depends on the genes' ids and counts alone, not on their order."""
    of_gene_G = np.array(
        [int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little") for gene in vocab.gene_ids],
        np.uint64,
    )
    with np.errstate(over="ignore"):
        mixed_N = (of_gene_G[cells.gene_N] ^ cells.count_N.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed_N ^= mixed_N >> np.uint64(29)
        total_N1 = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed_N * np.uint64(0xBF58476D1CE4E5B9))])
        return total_N1[cells.cell_start_C1[1:]] - total_N1[cells.cell_start_C1[:-1]]
