"""Stand-in protein vectors, for trying a model on cells whose real ESM-2 table is not at hand.

In: SOMA stores (their gene ids) and, if given, a table of orthologs. Out: `<species>_gene.h5` files.
They hold no biology beyond the orthologs: a gene's vector is random, drawn from its id, and orthologs share a centre.
A model trained on them learns co-expression, and can relate species only through the orthologs of the table.
Shapes: G genes, E width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from tftrain.cells.vocab import strip_version, write_protein_table
from tftrain.errors import CellsError

ORTHOLOG_SHARE = 0.9
"""Share of a vector's variance that orthologs have in common; the expected cosine of a pair."""


def stand_in_tables(
    stores: Sequence[str | Path], out: str | Path, *, orthologs: str | Path | None = None, width: int = 128
) -> list[Path]:
    """Writes one `<store name>_gene.h5` a store into the folder `out`; returns their paths.

    `orthologs` is a (gzipped) table with a header; each row's cells that are gene ids of a store form one group.
    Deterministic: a gene's vector depends on its id, its group and `width` alone.
    """
    import tiledbsoma as soma

    ids_of_store: dict[Path, list[str]] = {}
    for store in map(Path, stores):
        if not soma.Experiment.exists(str(store)):
            raise CellsError(f"{store} is not a SOMA experiment; build one with `tftrain-data build`")
        with soma.Experiment.open(str(store)) as experiment:
            table = experiment.ms["RNA"].var.read(column_names=["feature_id"]).concat()
        ids_of_store[store] = [strip_version(gene_id) for gene_id in table["feature_id"].to_pylist()]
    known = {gene_id for ids in ids_of_store.values() for gene_id in ids}
    group_of = ortholog_groups(orthologs, known) if orthologs is not None else {}
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for store, ids in ids_of_store.items():
        path = out / f"{store.name.removesuffix('.soma')}_gene.h5"
        write_protein_table(path, ids, stand_in_vectors(ids, group_of, width))
        paths.append(path)
    return paths


def ortholog_groups(table: str | Path, known: set[str]) -> dict[str, str]:
    """Gene id -> name of its ortholog group (the row's first known id); a gene in several rows keeps the first."""
    frame = pd.read_csv(table, sep=None, engine="python", dtype=str)
    group_of: dict[str, str] = {}
    for row in frame.itertuples(index=False):
        members = [cell for cell in row if cell in known]
        if len(members) > 1:
            name = group_of.get(members[0], members[0])
            for member in members:
                group_of.setdefault(member, name)
    if not group_of:
        raise CellsError(f"{table}: no row holds gene ids of two stores; its columns are {', '.join(frame.columns)}")
    return group_of


def stand_in_vectors(gene_ids: Sequence[str], group_of: Mapping[str, str], width: int) -> np.ndarray:
    """float32 (G, E): sqrt(s) centre of the group + sqrt(1 - s) own noise, each standard normal / sqrt(E).

    s is ORTHOLOG_SHARE.
    """
    vectors_GE = np.empty((len(gene_ids), width), np.float32)
    for row, gene_id in enumerate(gene_ids):
        own_E = _normal_of("gene " + gene_id, width)
        group = group_of.get(gene_id)
        if group is None:
            vectors_GE[row] = own_E
        else:
            centre_E = _normal_of("group " + group, width)
            vectors_GE[row] = np.sqrt(ORTHOLOG_SHARE) * centre_E + np.sqrt(1 - ORTHOLOG_SHARE) * own_E
    return vectors_GE / np.sqrt(width, dtype=np.float32)


def _normal_of(name: str, width: int) -> np.ndarray:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    return np.random.default_rng(seed).standard_normal(width, dtype=np.float32)
