"""Gene id <-> vocabulary row, and the frozen protein vectors of those rows.

In: `<species>_gene.h5` files of the published layout (dataset `keys` of bytes, group `arrays/<key>`).
Out: a Vocab: ordered gene ids, the file each came from, hashes, and the table itself, read when first asked for.
Shapes: G genes, E width of a protein vector.

Rows count genes only. Special tokens belong to an architecture, which puts its own rows before these.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import h5py
import numpy as np

from tftrain.errors import CellsError

_VERSION = re.compile(r"\.[0-9]+$")


def strip_version(gene_id: str) -> str:
    """`ENSG00000139618.12` -> `ENSG00000139618`: removes one trailing dot with digits, and surrounding blanks."""
    return _VERSION.sub("", gene_id.strip())


class Vocab:
    """An ordered set of genes with one protein vector each. Immutable; build it with `load`, `of` or `placeholder`.

    Pickles without its table (a worker reads the files again), unless it was made in memory by `of`.
    """

    def __init__(
        self,
        gene_ids: Sequence[str],
        file_of_gene_G: np.ndarray,
        files: Sequence[str],
        protein_width: int,
        *,
        in_memory_GE: np.ndarray | None = None,
        has_table: bool = True,
    ) -> None:
        self.gene_ids: tuple[str, ...] = tuple(gene_ids)
        """Ids without version, in the order of their rows."""
        self.file_of_gene_G = np.asarray(file_of_gene_G, np.int16)
        """Index into `files` of the table that gave each gene."""
        self.files: tuple[str, ...] = tuple(files)
        """Paths of the tables, in the order in which they were merged."""
        self.protein_width = int(protein_width)
        """E: width of a protein vector."""
        self._in_memory_GE = in_memory_GE
        self._has_table = has_table

    @property
    def n_genes(self) -> int:
        """G."""
        return len(self.gene_ids)

    @cached_property
    def genes_hash(self) -> str:
        """sha256 (hex) of the ordered ids, one a line: what a checkpoint's gene rows belong to."""
        return hashlib.sha256("\n".join(self.gene_ids).encode()).hexdigest()

    @cached_property
    def table_hash(self) -> str:
        """sha256 (hex) of the float32 table, row by row. Reads the table."""
        return hashlib.sha256(np.ascontiguousarray(self.protein_GE()).tobytes()).hexdigest()

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        return {gene_id: row for row, gene_id in enumerate(self.gene_ids)}

    def rows(self, gene_ids: Iterable[str]) -> np.ndarray:
        """int32: the row of each id (version suffixes are ignored), -1 where the vocabulary does not have it."""
        row_of_id = self._row_of_id
        return np.fromiter((row_of_id.get(strip_version(str(gene_id)), -1) for gene_id in gene_ids), np.int32)

    @cached_property
    def _protein_GE(self) -> np.ndarray:
        if self._in_memory_GE is not None:
            return self._in_memory_GE
        if not self._has_table:
            raise CellsError(
                f"this vocabulary of {self.n_genes:,} genes is a placeholder without protein vectors; "
                "name the tables in data.protein_tables"
            )
        table_GE = np.empty((self.n_genes, self.protein_width), np.float32)
        for index, path in enumerate(self.files):
            rows = np.flatnonzero(self.file_of_gene_G == index)
            _read_vectors(Path(path), [self.gene_ids[row] for row in rows], rows, table_GE)
        return table_GE

    def protein_GE(self) -> np.ndarray:
        """float32 (G, E), read from the files at the first call. Raises CellsError for a vector that is missing,
        of another width, or not finite."""
        return self._protein_GE

    def __getstate__(self) -> dict[str, object]:
        kept = ("gene_ids", "file_of_gene_G", "files", "protein_width", "_in_memory_GE", "_has_table")
        return {name: self.__dict__[name] for name in kept}

    def __repr__(self) -> str:
        return f"Vocab({self.n_genes:,} genes x {self.protein_width} from {len(self.files)} files)"

    @staticmethod
    def load(paths: Sequence[str | Path]) -> Vocab:
        """Merges tables in order; a gene that an earlier file has keeps that file's row and vector.

        Only ids and widths are read here. Raises CellsError for a missing file, another layout, widths that differ
        between files, and ids that are equal after the version is stripped within one file.
        """
        if not paths:
            raise CellsError("no protein table given; data.protein_tables needs at least one <species>_gene.h5")
        row_of_id: dict[str, int] = {}
        file_of_gene: list[int] = []
        width = 0
        for index, path in enumerate(map(Path, paths)):
            keys, file_width = _read_header(path)
            if index and file_width != width:
                raise CellsError(
                    f"{path}: protein vectors are {file_width} wide, those of {paths[0]} are {width}; "
                    "make all tables with the same protein model"
                )
            width = file_width
            for gene_id in _unique_ids(path, keys):
                if gene_id not in row_of_id:
                    row_of_id[gene_id] = len(row_of_id)
                    file_of_gene.append(index)
        # Absolute, so that a worker in another directory finds them again.
        files = [str(Path(path).absolute()) for path in paths]
        return Vocab(tuple(row_of_id), np.asarray(file_of_gene, np.int16), files, width)

    @staticmethod
    def of(gene_ids: Sequence[str], protein_GE: np.ndarray) -> Vocab:
        """A vocabulary held in memory: `gene_ids` (G) and their vectors (G, E)."""
        protein_GE = np.asarray(protein_GE, np.float32)
        if protein_GE.ndim != 2 or len(protein_GE) != len(gene_ids):
            raise CellsError(f"{len(gene_ids)} gene ids but a protein table of shape {protein_GE.shape}")
        ids = _unique_ids("the given ids", gene_ids)
        return Vocab(ids, np.zeros(len(ids), np.int16), ("memory",), protein_GE.shape[1], in_memory_GE=protein_GE)

    @staticmethod
    def placeholder(n_genes: int, protein_width: int) -> Vocab:
        """A vocabulary of unnamed genes for building a module on "meta" (counting parameters, `tftrain check`)."""
        ids = [f"gene{row}" for row in range(n_genes)]
        return Vocab(ids, np.zeros(n_genes, np.int16), ("placeholder",), protein_width, has_table=False)


def write_protein_table(
    path: str | Path,
    vectors: Mapping[str, np.ndarray] | Sequence[str],
    protein_GE: np.ndarray | None = None,
    *,
    attributes: Mapping[str, str | int | float] | None = None,
) -> None:
    """Writes the published `<species>_gene.h5` layout: `keys` as bytes, one float32 vector at `arrays/<key>` each.

    Takes either a mapping from gene id to vector, or ids (G) and a matrix (G, E). `attributes` become attributes of the
    file (how the table was made). The file appears complete or not at all.
    """
    ids = list(vectors)
    if isinstance(vectors, Mapping):
        assert protein_GE is None, "a mapping already holds the vectors"
        protein_GE = np.stack([np.asarray(vectors[gene_id], np.float32) for gene_id in ids]) if ids else None
    if protein_GE is None or len(protein_GE) != len(ids) or not ids:
        raise CellsError(f"{path}: {len(ids)} gene ids need as many protein vectors, and at least one")
    _unique_ids(path, ids)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w") as file:
        file.create_dataset("keys", data=np.array([gene_id.encode() for gene_id in ids]))
        arrays = file.create_group("arrays")
        for gene_id, vector_E in zip(ids, np.asarray(protein_GE, np.float32), strict=True):
            arrays.create_dataset(gene_id, data=vector_E)
        file.attrs.update(attributes or {})
    partial.replace(path)


def _unique_ids(where: str | Path, keys: Iterable[str]) -> list[str]:
    """The ids without version; CellsError names the first two keys that become the same."""
    key_of_id: dict[str, str] = {}
    for key in keys:
        gene_id = strip_version(key)
        if gene_id in key_of_id:
            raise CellsError(
                f"{where}: {key_of_id[gene_id]!r} and {key!r} are both gene {gene_id!r} once the version is "
                "stripped; keep one of them"
            )
        key_of_id[gene_id] = key
    return list(key_of_id)


def _open(path: Path) -> h5py.File:
    if not path.is_file():
        raise CellsError(f"protein table {path} does not exist; give the path of a <species>_gene.h5")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise CellsError(f"protein table {path} is not a readable HDF5 file ({error})") from None


def _keys(path: Path, file: h5py.File) -> list[str]:
    if not (isinstance(file.get("keys"), h5py.Dataset) and isinstance(file.get("arrays"), h5py.Group)):
        raise CellsError(
            f"protein table {path} holds {sorted(file)} where a dataset 'keys' and a group 'arrays' are expected; "
            "it is not in the published <species>_gene.h5 layout"
        )
    keys = [key.decode() if isinstance(key, bytes) else str(key) for key in np.atleast_1d(file["keys"][()])]
    if not keys:
        raise CellsError(f"protein table {path} holds no genes")
    return keys


def _read_header(path: Path) -> tuple[list[str], int]:
    with _open(path) as file:
        keys = _keys(path, file)
        if keys[0] not in file["arrays"]:
            raise CellsError(f"protein table {path} lists gene {keys[0]!r} in 'keys' but has no arrays/{keys[0]}")
        shape = file["arrays"][keys[0]].shape
        if len(shape) != 1 or shape[0] < 1:
            raise CellsError(f"protein table {path}: arrays/{keys[0]} has shape {shape}, expected one vector")
        return keys, int(shape[0])


def _read_vectors(path: Path, gene_ids: Sequence[str], rows: np.ndarray, table_GE: np.ndarray) -> None:
    """Fills `table_GE[rows]` with the vectors of `gene_ids`."""
    width = table_GE.shape[1]
    with _open(path) as file:
        key_of_id = {strip_version(key): key for key in _keys(path, file)}
        arrays = file["arrays"]
        for gene_id, row in zip(gene_ids, rows, strict=True):
            key = key_of_id.get(gene_id)
            if key is None or key not in arrays:
                raise CellsError(f"protein table {path} has no vector for gene {gene_id!r}; was the file replaced?")
            vector_E = arrays[key][()]
            if vector_E.shape != (width,):
                raise CellsError(f"protein table {path}: {key!r} has shape {vector_E.shape}, expected ({width},)")
            table_GE[row] = vector_E
    unfinite = rows[~np.isfinite(table_GE[rows]).all(axis=1)]
    if len(unfinite):
        gene_id = gene_ids[int(np.flatnonzero(rows == unfinite[0])[0])]
        raise CellsError(f"protein table {path}: the vector of {gene_id!r} holds NaN or infinity; make it again")
