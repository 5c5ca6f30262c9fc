"""Which gene a column of a file is: its own id, or the id that a table gives its symbol.

In: names of a file's genes and, if given, a gene table (GENCODE: id, symbol, version, length, biotype). Out: gene ids
without version, "" where a gene has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tftrain.cells.vocab import strip_version
from tftrain.errors import CellsError

_ID_NAMES = ("gene_id", "ensembl_id", "feature_id", "ensembl_gene_id", "id")
_SYMBOL_NAMES = ("gene_name", "feature_name", "symbol", "gene_symbol", "gene", "name")
_LENGTH_NAMES = ("feature_length", "length", "gene_length")


@dataclass(frozen=True)
class GeneTable:
    """A species' genes: symbols and lengths."""

    path: str
    id_of_symbol: dict[str, str]
    """Only symbols that name one gene."""
    ambiguous: frozenset[str]
    """Symbols that name several: never guessed at."""
    length_of_id: dict[str, int]
    ids: frozenset[str]

    @staticmethod
    def load(path: str | Path) -> GeneTable:
        """Reads a CSV or TSV, gzipped or not: with a header that names the columns, or id, symbol, version, length, ...

        Raises CellsError for a file that cannot be read or has no two columns.
        """
        try:
            sep = "\t" if ".tsv" in Path(path).name or ".txt" in Path(path).name else ","
            rows = pd.read_csv(path, sep=sep, header=None, dtype=str, keep_default_na=False)
        except (OSError, ValueError, pd.errors.ParserError) as error:
            raise CellsError(f"{path}: no gene table can be read there ({error})") from error
        if rows.shape[1] < 2:
            raise CellsError(f"{path}: a gene table needs an id and a symbol column, got one (comma or, in .tsv, tab)")
        header = [cell.lower() for cell in rows.iloc[0]]
        at_id, at_symbol, at_length = (_find(header, names) for names in (_ID_NAMES, _SYMBOL_NAMES, _LENGTH_NAMES))
        if at_id is None:
            at_id, at_symbol, at_length = 0, 1, 3 if rows.shape[1] > 3 else None
        elif at_symbol is None:
            raise CellsError(f"{path}: no symbol column ({', '.join(_SYMBOL_NAMES)}); it has {', '.join(header)}")
        else:
            rows = rows.iloc[1:]
        ids = [strip_version(cell) for cell in rows[at_id]]
        ids_of_symbol: dict[str, set[str]] = {}
        for gene_id, symbol in zip(ids, rows[at_symbol]):
            ids_of_symbol.setdefault(symbol, set()).add(gene_id)
        lengths = rows[at_length] if at_length is not None else [""] * len(ids)
        return GeneTable(
            str(path),
            {symbol: next(iter(found)) for symbol, found in ids_of_symbol.items() if symbol and len(found) == 1},
            frozenset(symbol for symbol, found in ids_of_symbol.items() if len(found) > 1),
            {gene_id: int(cell) for gene_id, cell in zip(ids, lengths) if cell.isdigit()},
            frozenset(ids),
        )


def _find(header: Sequence[str], names: Sequence[str]) -> int | None:
    return next((header.index(name) for name in names if name in header), None)


def map_genes(ids: Sequence[str], symbols: Sequence[str], table: GeneTable | None) -> tuple[list[str], list[str]]:
    """Gene ids by column ("" where there is none), and notes on what could not be mapped.

    A column's own id stands where it has one that the table knows, or there is no table. Otherwise its symbol (or what
    stands for its id) is looked up. Where two columns come to the same gene, the first that has it as its own id stays,
    or else the first.
    """
    if table is None:
        found = list(ids)
    else:
        found = [
            own if own in table.ids else table.id_of_symbol.get(own) or table.id_of_symbol.get(symbol) or ""
            for own, symbol in zip(ids, symbols)
        ]
    taken = {gene_id for own, gene_id in zip(ids, found) if own == gene_id and gene_id}
    n_twice = 0
    for column, (own, gene_id) in enumerate(zip(ids, found)):
        if gene_id and own != gene_id:
            if gene_id in taken:
                found[column], n_twice = "", n_twice + 1
            taken.add(gene_id)
    notes = []
    if table is not None:
        mapped = sum(own != gene_id and gene_id != "" for own, gene_id in zip(ids, found))
        several = sum(
            not gene_id and bool({own, symbol} & table.ambiguous) for own, symbol, gene_id in zip(ids, symbols, found)
        )
        notes += [f"{mapped:,} genes mapped by their symbol"] if mapped else []
        notes += [f"{several:,} symbols name several genes of the table and are left out"] if several else []
        notes += [f"{n_twice:,} symbols name a gene that another column has and are left out"] if n_twice else []
    if without := sum(not gene_id for gene_id in found):
        notes.append(f"{without:,} of {len(found):,} genes have no gene id and are left out")
    if not any(found):
        where = f"the gene table {table.path}" if table else "the file"
        examples = ", ".join([own or symbol for own, symbol in zip(ids, symbols)][:3])
        raise CellsError(f"none of {len(ids):,} genes ({examples}, ...) has an id in {where}; is it the right species?")
    return found, notes
