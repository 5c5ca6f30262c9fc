"""`tftrain-data inspect`: the data doctor. Reads a whole .h5ad file and says whether training on it should start.

In: a file, a vocabulary and gene tables if there are any. Out: a Finding: facts, warnings, and what forbids training.
Every value of X is looked at. Shapes: C cells, G genes (columns of the file), N values of a block.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Column, Table

from data_prep.census import TEXT_COLUMNS
from data_prep.genes import GeneTable
from tftrain.cells.h5ad import GENE_ID_COLUMN, H5adFile
from tftrain.cells.vocab import Vocab, strip_version
from tftrain.errors import CellsError

ID_TYPES = (
    ("homo_sapiens", "Ensembl", r"ENSG\d{11}"),
    ("mus_musculus", "Ensembl", r"ENSMUSG\d{11}"),
    ("rattus_norvegicus", "Ensembl", r"ENSRNOG\d{11}"),
    ("danio_rerio", "Ensembl", r"ENSDARG\d{11}"),
    ("gallus_gallus", "Ensembl", r"ENSGALG\d{11}"),
    ("oryctolagus_cuniculus", "Ensembl", r"ENSOCUG\d{11}"),
    ("xenopus_tropicalis", "Ensembl", r"ENSXETG\d{11}"),
    ("macaca_mulatta", "Ensembl", r"ENSMMUG\d{11}"),
    ("sus_scrofa", "Ensembl", r"ENSSSCG\d{11}"),
    ("drosophila_melanogaster", "FlyBase", r"FBgn\d{7}"),
    ("caenorhabditis_elegans", "WormBase", r"WBGene\d{8}"),
    ("saccharomyces_cerevisiae", "SGD", r"Y[A-P][LR]\d{3}[WC](-[A-Z])?"),
    ("plasmodium_falciparum", "PlasmoDB", r"PF3D7_(\d{7}|API\d+|MIT\d+).*"),
    ("plasmodium_berghei", "PlasmoDB", r"PBANKA_(\d{7}|API\d+|MIT\d+).*"),
)
"""(species, who gives the ids, what they look like)."""
OBS_COLUMNS = (*TEXT_COLUMNS, "donor_id", "is_primary_data", "organism")
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass
class Finding:
    """What is known of a file. `stop` empty: training may start."""

    path: str
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    stop: list[str] = field(default_factory=list)
    """Reasons not to train, each with place, value and remedy."""

    @property
    def is_fit(self) -> bool:
        """Whether training should start."""
        return not self.stop

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "is_fit": self.is_fit}


def inspect(
    path: str | Path,
    *,
    vocab: Vocab | None = None,
    tables: Mapping[str, GeneTable] | None = None,
    gene_col_name: str | None = None,
    genes_per_cell: int = 2047,
    min_expressed_genes: int = 200,
) -> Finding:
    """Examines one file; never raises for what is wrong inside it.

    tables: gene table by species, to tell the species of files that name genes by symbols.
    """
    finding = Finding(str(path))
    try:
        with H5adFile(path) as file:
            _obs(file, finding)
            ids = _genes(file, finding, gene_col_name, vocab, tables or {})
            _counts(file, finding, ids, vocab, genes_per_cell, min_expressed_genes)
    except CellsError as error:
        finding.stop.append(str(error))
    return finding


def id_type(ids: Sequence[str]) -> tuple[str, str, float]:
    """(species, kind of id, share of the ids that look so) of the kind that most ids look like; "" where none does."""
    sample = [gene_id for gene_id in ids if gene_id]
    best = ("", "", 0.0)
    for species, kind, pattern in ID_TYPES:
        share = sum(re.fullmatch(pattern, gene_id) is not None for gene_id in sample) / max(len(sample), 1)
        if share > best[2]:
            best = (species, kind, share)
    return best


def _obs(file: H5adFile, finding: Finding) -> None:
    have = [str(name) for name in file.obs.columns]
    finding.facts["cells"] = file.n_cells
    finding.facts["layer"] = "raw/X" if file.is_raw else "X"
    finding.facts["obs_found"] = [name for name in OBS_COLUMNS if name in have]
    finding.facts["obs_missing"] = [name for name in OBS_COLUMNS if name not in have]
    if not file.n_cells:
        finding.stop.append(f"{file.path}: it holds no cells")
    if repeated := int(file.obs.index.duplicated().sum()):
        finding.warnings.append(f"{repeated:,} cell names are not unique")
    if "donor_id" not in have and "batch" not in have:
        finding.warnings.append("obs has neither donor_id nor batch: whole donors cannot be held out")
    if "assay" not in have:
        finding.warnings.append("obs has no assay: it will be unknown")


def _genes(
    file: H5adFile,
    finding: Finding,
    gene_col_name: str | None,
    vocab: Vocab | None,
    tables: Mapping[str, GeneTable],
) -> list[str]:
    """Gene ids by column, "" where there is none."""
    facts = finding.facts
    facts["genes"] = len(file.var)
    try:
        ids = file.gene_ids(gene_col_name)
    except CellsError as error:
        finding.stop.append(str(error))
        named = file.var[gene_col_name] if gene_col_name in file.var.columns else file.var.index
        ids = [strip_version(str(gene_id)) for gene_id in named]
    given = [gene_id for gene_id in ids if gene_id]
    facts["gene_ids_from"] = gene_col_name or (GENE_ID_COLUMN if GENE_ID_COLUMN in file.var.columns else "index")
    facts["genes_without_id"] = len(ids) - len(given)
    facts["genes_repeated"] = len(given) - len(set(given))
    species, kind, share = id_type(given)
    facts["id_type"], facts["id_share"] = kind or "symbols or unknown", round(share, 4)
    if share < 0.5:
        found = {name: len(set(given) & table.id_of_symbol.keys()) for name, table in tables.items()}
        best = max(found, key=found.__getitem__, default="")
        species = best if best and found[best] > 0.3 * len(given) else ""
        remedy = f"build with --gene-table {species or 'SPECIES'}=TABLE"
        finding.warnings.append(f"genes are not named by ids of a known kind ({', '.join(given[:3])}, ...): {remedy}")
    facts["organism_by_genes"] = species
    column = next((name for name in ("species", "organism") if name in file.obs.columns), None)
    named_species = sorted(set(file.obs[column].astype(str))) if column else []
    facts["organism_by_obs"] = named_species[:3]
    plain = {re.sub(r"[^a-z0-9]+", "_", name.lower()) for name in named_species}
    if species and plain and plain != {species}:
        finding.stop.append(
            f"{file.path}: its genes are those of {species} and obs column {column!r} says "
            f"{', '.join(named_species[:3])}; correct the column, or give each species a file of its own"
        )
    if vocab is not None:
        known = int((vocab.rows(given) >= 0).sum())
        facts["genes_in_vocabulary"] = round(known / max(len(given), 1), 4)
        if not known:
            finding.stop.append(
                f"{file.path}: none of its {len(given):,} gene ids ({', '.join(given[:3])}, ...) is in the vocabulary "
                f"({', '.join(vocab.gene_ids[:3])}, ...); give the protein table of its species, or map symbols to ids"
            )
        elif known < 0.5 * len(given):
            finding.warnings.append(f"only {known / len(given):.0%} of the genes are in the vocabulary")
    return ids


def _counts(
    file: H5adFile,
    finding: Finding,
    ids: Sequence[str],
    vocab: Vocab | None,
    genes_per_cell: int,
    min_expressed_genes: int,
) -> None:
    is_used_G = np.array([bool(gene_id) for gene_id in ids])
    if vocab is not None:
        is_used_G = vocab.rows(ids) >= 0
    total, n_genes, n_known, hashes = [], [], [], []
    for _, block in file.blocks():  # raises CellsError at the first value that is no count
        total.append(np.asarray(block.sum(axis=1)).ravel())
        n_genes.append(np.diff(block.indptr))
        known_before_N1 = np.concatenate([[0], np.cumsum(is_used_G[block.indices])])
        n_known.append(known_before_N1[block.indptr[1:]] - known_before_N1[block.indptr[:-1]])
        for c in range(block.shape[0]):
            cell = slice(block.indptr[c], block.indptr[c + 1])
            hashes.append(hash((block.indices[cell].tobytes(), block.data[cell].tobytes())))
    if not total:
        return
    total_C, n_genes_C, n_known_C = (np.concatenate(parts) for parts in (total, n_genes, n_known))
    facts = finding.facts
    facts["counts"] = "whole numbers, all of them"
    facts["values"] = int(n_genes_C.sum())
    facts["library_size"] = [float(q) for q in np.quantile(total_C, _QUANTILES)]
    facts["expressed_genes"] = [float(q) for q in np.quantile(n_genes_C, _QUANTILES)]
    facts["cells_truncated"] = round(float((n_known_C > genes_per_cell).mean()), 4)
    facts["cells_below_min_genes"] = round(float((n_genes_C < min_expressed_genes).mean()), 4)
    facts["cells_without_known_gene"] = int((n_known_C == 0).sum())
    expressed = [h for h, n in zip(hashes, n_genes_C) if n]
    facts["cells_repeated"] = len(expressed) - len(set(expressed))
    if not n_known_C.any():
        finding.stop.append(f"{file.path}: no cell expresses any gene that can be used")
    if (n_genes_C < min_expressed_genes).all():
        finding.stop.append(
            f"{file.path}: every cell expresses fewer than {min_expressed_genes} genes (at most {n_genes_C.max()}), so "
            "none would train; lower data.qc.min_expressed_genes (here --min-genes) if the assay measures so few"
        )
    for share, what in (
        (facts["cells_repeated"] / len(total_C), "repeat the counts of another cell exactly"),
        (facts["cells_without_known_gene"] / len(total_C), "express no gene that can be used"),
        (
            facts["cells_below_min_genes"],
            f"express fewer than {min_expressed_genes} genes (data.qc) and will not train",
        ),
        (facts["cells_truncated"], f"express more than {genes_per_cell} genes and will be truncated"),
    ):
        if share:
            finding.warnings.append(f"{share:.1%} of the cells {what}")


def show(findings: Sequence[Finding], console: Console | None = None) -> None:
    """A table of all files, then warnings and reasons."""
    # Rich takes 80 columns where there is no terminal, too few for the table.
    console = console or Console(width=None if sys.stdout.isatty() else 140)
    name = Column("file", min_width=16, overflow="fold")
    table = Table(name, "cells", "genes", "organism", "ids", "known", "genes a cell", "counts a cell", "verdict")
    for finding in findings:
        facts = finding.facts
        middle = (f"{facts[key][2]:,.0f}" if key in facts else "-" for key in ("expressed_genes", "library_size"))
        known = facts.get("genes_in_vocabulary")
        table.add_row(
            Path(finding.path).name,
            *(f"{facts[key]:,}" if key in facts else "-" for key in ("cells", "genes")),
            facts.get("organism_by_genes") or "?",
            facts.get("id_type", "-"),
            "-" if known is None else f"{known:.0%}",
            *middle,
            "train" if finding.is_fit else "STOP",
        )
    console.print(table)
    for finding in findings:
        for text, sign in ((finding.stop, "STOP"), (finding.warnings, "note")):
            for line in text:
                line = line.removeprefix(f"{finding.path}: ")
                console.print(
                    f"{sign} {Path(finding.path).name}: {line}", markup=False, highlight=False, soft_wrap=True
                )
