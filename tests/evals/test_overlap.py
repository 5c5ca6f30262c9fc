"""Overlap of training and judged cells is found under other names, and said."""

from dataclasses import replace

import numpy as np
import pytest
from bench import bench, cells_of, dataset

from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError
from tftrain.evals import celltypes, overlap
from tftrain.evals.run import refuse_nonfinite

N_GENES = 60
VOCAB = Vocab.of([f"g{g}" for g in range(N_GENES)], np.eye(N_GENES, dtype=np.float32))


def species(rng, name="s", *, n=20, fit_donors=("d8", "d9"), vocab=VOCAB, is_seen=True):
    """Judged donors d0 to d7 and training donors, all with different counts of 40 genes."""
    counts = rng.integers(1, 50, (2 * n, 40))
    rows = [dict(enumerate(row.tolist())) for row in counts]
    data = dataset(name, rng, n=n, vocab=vocab, is_seen=is_seen)
    fit = cells_of(rows[n:], obs={"donor_id": np.array([fit_donors[i % 2] for i in range(n)], object)})
    donors = np.array([f"d{i % 8}" for i in range(n)], object)
    return replace(data, cells=cells_of(rows[:n]), fit_cells=fit, donor_C=donors)


def test_none_is_no_note():
    assert overlap.notes([species(np.random.default_rng(0))], "donor_id", is_training_known=True) == []


def test_a_shared_donor_is_named():
    data = species(np.random.default_rng(0), fit_donors=("d3", "d9"))
    (note,) = overlap.notes([data], "donor_id", is_training_known=True)
    assert note == "overlap: s: 1 values of donor_id are also in the training cells of s, such as d3"


def test_equal_cells_are_found_under_another_name_and_gene_order():
    rng = np.random.default_rng(0)
    seen = species(rng)
    turned = Vocab.of(VOCAB.gene_ids[::-1], np.eye(N_GENES, dtype=np.float32))
    counts = [
        dict(zip(cells.gene_N.tolist(), cells.count_N.tolist()))
        for cells in (seen.fit_cells.slice(i, i + 1) for i in range(3))
    ]
    same = [{N_GENES - 1 - gene: count for gene, count in reversed(row.items())} for row in counts]
    near = [{**row, next(iter(row)): 99} for row in same]
    other = replace(
        dataset("t", rng, n=6, vocab=turned, is_seen=False), cells=cells_of(same + near), fit_cells=cells_of([])
    )
    notes = overlap.notes([seen, other], "donor_id", is_training_known=True)
    assert notes == ["overlap: t: 3 of 6 judged cells have the same counts as a training cell, such as cell 0"]


def test_what_cannot_be_looked_for_is_said():
    data = replace(species(np.random.default_rng(0)), fit_cells=cells_of([]))
    assert "is not recorded" in overlap.notes([data], "donor_id", is_training_known=False)[0]
    assert "was not looked for" in overlap.notes([data], "donor_id", is_training_known=True)[0]


def test_embeddings_that_are_not_finite_are_refused():
    data = species(np.random.default_rng(0))
    x = np.zeros((20, 3))
    refuse_nonfinite("trained", data, x)
    x[7, 1] = np.nan
    with pytest.raises(CellsError, match=r"s: 1 of 20 cells have no finite embedding by trained, for one cell 7;"):
        refuse_nonfinite("trained", data, x)


def test_a_class_of_one_donor_is_said():
    rng = np.random.default_rng(0)
    data = dataset("s", rng, donors=8)
    data.label_C[data.donor_C == "s-3"] = "lone"
    found = celltypes.run(bench([data], {"trained": {"s": rng.normal(size=(240, 3))}}))
    assert found.notes == ["celltypes: s: classes of a single donor or fold, whose F1 is 0 for any model: lone"]
    assert found.rows
