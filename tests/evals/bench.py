"""A bench whose answers are known: cells of made-up species with labels, donors and embeddings."""

import numpy as np

from tftrain.cells.contract import Cells
from tftrain.cells.vocab import Vocab
from tftrain.evals.contract import Bench, Dataset


def cells_of(rows, *, source=0, obs=None):
    """Cells from one {gene: count} a cell."""
    start = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    return Cells(
        start.astype(np.int64),
        np.array([gene for row in rows for gene in row], np.int32),
        np.array([count for row in rows for count in row.values()], np.int32),
        np.full(len(rows), source, np.int16),
        np.arange(len(rows), dtype=np.int64),
        obs or {},
    )


def dataset(name, rng, *, n=240, labels=("x", "y", "z"), donors=8, is_seen=True, vocab=None):
    """One gene a cell; labels and donors at random."""
    label_C = rng.choice(np.array(labels, object), n)
    donor_C = np.array([f"{name}-{d}" for d in rng.integers(0, donors, n)], object)
    rows = [{0: 1}] * n
    vocab = vocab or Vocab.of(["g0", "g1"], np.eye(2, dtype=np.float32))
    fit = cells_of(rows) if is_seen else Cells.empty()
    return Dataset(name, cells_of(rows), fit, vocab, is_seen, label_C, donor_C)


def bench(datasets, embeddings, **kwargs):
    return Bench(datasets=datasets, embeddings=embeddings, **{"bootstraps": 400, **kwargs})


def informative(dataset, rng, *, width=6, noise=0.3):
    """An embedding whose first coordinates are the label's number."""
    code = np.array([ord(label[0]) for label in dataset.label_C], float)
    values = rng.normal(0, noise, (len(code), width))
    values[:, 0] += code
    values[:, 1] += (code == ord("y")) * 2
    return values.astype(np.float32)
