"""h5ad files -> one SOMA experiment a species, in the CELLxGENE Census layout.

In: .h5ad files with raw counts. Out: `OUT/<species>.soma` with obs (Census column names), ms/RNA/var and ms/RNA/X/raw.
All stores of a call appear together at the end, or none does. Stores that exist and were built from the same input are
left as they are. Genes of files of one species are united in the order of their first appearance.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import scipy.sparse as sp
import tiledbsoma
from rich.console import Console
from rich.progress import Progress

from data_prep.census import fill_obs, join_obs
from data_prep.genes import GeneTable, map_genes
from data_prep.store import progress_bar, tiling, write_frame
from tftrain.cells.h5ad import H5adFile
from tftrain.errors import CellsError

LAYOUT_VERSION = 1
_INPUT_KEY = "tftrain_input"
_VALUES_PER_WRITE = 8_000_000
_EXACT_IN_FLOAT32 = 2**24


@dataclass(frozen=True)
class BuildConfig:
    """How files become stores."""

    species: str | None = None
    """Species of all files; None reads it from `species_column`."""
    species_column: str | None = None
    """Column of obs with the species; None takes `species`, or else `organism`. "Homo sapiens" becomes homo_sapiens."""
    gene_col_name: str | None = None
    """Column of var with gene ids; None takes `ensembl_id`, or else the index."""
    gene_tables: Mapping[str, str] = field(default_factory=dict)
    """Gene table by species, "" for every other: maps symbols to gene ids."""
    sum_duplicates: bool = False
    """Add up columns whose gene ids differ in their version alone (transcripts of a gene) in place of refusing them."""
    replace: bool = False
    """Build again where a store of other input stands."""


@dataclass(frozen=True)
class _File:
    """What the survey found of one input file."""

    path: str
    species: str
    n_cells: int
    gene_id_G: list[str]
    """Of each column; "" where it is left out."""
    name_G: list[str]
    obs: pd.DataFrame


@dataclass(frozen=True)
class Built:
    """A finished store."""

    path: Path
    species: str
    n_cells: int
    n_genes: int
    is_new: bool
    """False where a store of the same input was there already."""


def build(
    out: str | Path,
    inputs: Sequence[str | Path],
    config: BuildConfig | None = None,
    *,
    show: Callable[[str], None] = print,
    console: Console | None = None,
) -> list[Built]:
    """Builds the stores; `show` gets every default that was filled in and everything left out, line by line.

    inputs: files, or folders whose .h5ad files are taken. Raises CellsError for counts that are none, missing or
    repeated gene ids, a species that cannot be told, or a store of other input that stands in the way; then nothing is
    left behind.
    """
    config, out = config or BuildConfig(), Path(out)
    paths = _h5ad_files(inputs)
    tables = {species: GeneTable.load(path) for species, path in config.gene_tables.items()}
    files = [_survey(path, config, tables, show) for path in paths]
    by_species: dict[str, list[_File]] = {}
    for file in files:
        by_species.setdefault(file.species, []).append(file)
    built: list[Built] = []
    todo: dict[str, str] = {}
    for species, of_species in by_species.items():
        digest = _input_digest(of_species)
        if (found := _existing(out / f"{species}.soma", species, digest, config.replace)) is not None:
            show(f"{found.path} was built from the same input and stays as it is")
            built.append(found)
        else:
            todo[species] = digest
    temporary = {species: out / f".{species}.soma.building" for species in todo}
    is_new_folder = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    console = console or Console(stderr=True)
    try:
        with progress_bar(console) as progress:
            task = progress.add_task("cells", total=sum(file.n_cells for file in files if file.species in todo))
            for species, digest in todo.items():
                shutil.rmtree(temporary[species], ignore_errors=True)
                table = tables.get(species, tables.get(""))
                built.append(_write_store(temporary[species], by_species[species], digest, table, progress, task))
        for species, folder in temporary.items():
            target = out / f"{species}.soma"
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    except BaseException:
        for folder in temporary.values():
            shutil.rmtree(folder, ignore_errors=True)
        if is_new_folder and not any(out.iterdir()):
            out.rmdir()
        raise
    finished = [Built(out / f"{b.species}.soma", b.species, b.n_cells, b.n_genes, b.is_new) for b in built]
    for store in finished:
        if store.is_new:
            show(f"{store.path}: {store.n_cells:,} cells, {store.n_genes:,} genes")
    return finished


def _h5ad_files(inputs: Sequence[str | Path]) -> list[Path]:
    paths: list[Path] = []
    for given in map(Path, inputs):
        found = sorted(given.glob("*.h5ad")) if given.is_dir() else [given]
        if not found:
            raise CellsError(f"{given}: no .h5ad file in this folder")
        paths += found
    if len({path.resolve() for path in paths}) < len(paths):
        raise CellsError("a file is given twice: its cells would be trained on twice")
    return paths


def _survey(path: Path, config: BuildConfig, tables: Mapping[str, GeneTable], show: Callable[[str], None]) -> _File:
    """Everything of a file but its counts."""
    with H5adFile(path) as file:
        species = _species_of(file, config)
        ids = file.gene_ids(config.gene_col_name, may_repeat=config.sum_duplicates)
        names = [str(name) for name in file.var.index]
        if "feature_name" in file.var.columns:
            names = [str(name) for name in file.var["feature_name"]]
        try:
            gene_ids, notes = map_genes(ids, names, tables.get(species, tables.get("")))
        except CellsError as error:
            raise CellsError(f"{path}: {error}") from None
        obs, fills = fill_obs(file.obs, species=species, dataset=path.stem)
        if repeated := sum(map(bool, ids)) - len(set(filter(None, ids))):
            notes.append(f"{repeated:,} columns are added to another of the same gene")
        for note in [*notes, *fills]:
            show(f"{path.name}: {note}")
        return _File(str(path), species, file.n_cells, gene_ids, names, obs)


def _species_of(file: H5adFile, config: BuildConfig) -> str:
    if config.species is not None:
        return species_name(config.species)
    columns = [config.species_column] if config.species_column else ["species", "organism"]
    column = next((name for name in columns if name in file.obs.columns), None)
    if column is None:
        raise CellsError(
            f"{file.path}: obs has no column {' or '.join(columns)} that says the species; it has "
            f"{', '.join(map(str, file.obs.columns))}. Give --species NAME or --species-from COLUMN"
        )
    values = sorted(set(file.obs[column].astype(str)))
    if len(values) != 1:
        raise CellsError(
            f"{file.path}: obs column {column!r} names {len(values)} species ({', '.join(values[:4])}); split "
            "the file, or give --species"
        )
    return species_name(values[0])


def species_name(text: str) -> str:
    """`Homo sapiens` -> `homo_sapiens`: a name fit for a folder and a recipe. Raises CellsError for an empty one."""
    name = re.sub(r"[^a-z0-9]+", "_", text.strip().lower()).strip("_")
    if not name:
        raise CellsError(f"{text!r} is no name of a species")
    return name


def _input_digest(files: Sequence[_File]) -> str:
    """Of the files' contents and the gene ids given to their columns."""
    digest = hashlib.blake2b(str(LAYOUT_VERSION).encode(), digest_size=16)
    for file in files:
        with open(file.path, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "blake2b").digest())
        digest.update(json.dumps([Path(file.path).name, file.gene_id_G]).encode())
    return digest.hexdigest()


def _existing(path: Path, species: str, digest: str, replace: bool) -> Built | None:
    """The finished store of the same input. Raises CellsError for one of other input, unless it is to be replaced."""
    if not path.exists() or replace:
        return None
    try:
        with tiledbsoma.Experiment.open(str(path)) as experiment:
            if experiment.metadata.get(_INPUT_KEY) == digest:
                return Built(path, species, experiment.obs.count, experiment.ms["RNA"].var.count, is_new=False)
    except (tiledbsoma.SOMAError, tiledbsoma.DoesNotExistError, KeyError, TypeError):
        pass  # something else, or damaged: told below
    raise CellsError(f"{path} is there already, from other input; remove it, give another OUT, or --replace")


def _write_store(
    path: Path, files: Sequence[_File], digest: str, table: GeneTable | None, progress: Progress, task: int
) -> Built:
    """One store at `path`, which must not exist."""
    genes = {gene_id: name for file in reversed(files) for gene_id, name in zip(file.gene_id_G, file.name_G)}
    order = list(dict.fromkeys(gene_id for file in files for gene_id in file.gene_id_G if gene_id))
    n_cells = sum(file.n_cells for file in files)
    if not n_cells:
        raise CellsError(f"{', '.join(file.path for file in files)}: no cells")
    with tiledbsoma.Experiment.create(str(path)) as experiment:
        experiment.metadata[_INPUT_KEY] = digest
        rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        raw = rna.add_new_collection("X").add_new_sparse_ndarray(
            "raw", type=pa.float32(), shape=(n_cells, len(order)), platform_config=tiling(n_cells, len(order))
        )
        totals = _Totals.zeros(n_cells, len(order))
        first_cell = 0
        for file in files:
            _write_counts(raw, file, order, first_cell, totals, lambda n: progress.advance(task, n))  # type: ignore[arg-type]
            first_cell += file.n_cells
        obs = join_obs([file.obs for file in files])
        obs.insert(0, "soma_joinid", np.arange(n_cells))
        obs["raw_sum"], obs["nnz"] = totals.raw_sum_C, totals.nnz_C
        obs["raw_mean_nnz"] = totals.raw_sum_C / np.maximum(totals.nnz_C, 1)
        obs["n_measured_vars"] = np.repeat(
            [len(set(filter(None, file.gene_id_G))) for file in files], [file.n_cells for file in files]
        )
        var = pd.DataFrame({"soma_joinid": np.arange(len(order)), "feature_id": order})
        var["feature_name"] = [genes[gene_id] for gene_id in order]
        if table is not None:
            var["feature_length"] = [table.length_of_id.get(gene_id, 0) for gene_id in order]
        var["nnz"], var["n_measured_obs"] = totals.nnz_G, totals.n_measured_obs_G
        write_frame(experiment, "obs", obs)
        write_frame(rna, "var", var, as_values=("feature_id", "feature_name"))
    return Built(path, files[0].species, n_cells, len(order), is_new=True)


@dataclass(frozen=True)
class _Totals:
    """Sums that obs and var of the Census have, filled while counts are written."""

    raw_sum_C: np.ndarray
    nnz_C: np.ndarray
    nnz_G: np.ndarray
    n_measured_obs_G: np.ndarray

    @staticmethod
    def zeros(n_cells: int, n_genes: int) -> _Totals:
        return _Totals(np.zeros(n_cells), *(np.zeros(n, np.int64) for n in (n_cells, n_genes, n_genes)))


def _write_counts(
    raw: tiledbsoma.SparseNDArray,
    file: _File,
    order: Sequence[str],
    first_cell: int,
    totals: _Totals,
    advance: Callable[[int], None],
) -> None:
    """The counts of one file, some million values a write: each write is a fragment that readers must open."""
    number = {gene_id: joinid for joinid, gene_id in enumerate(order)}
    joinid_G = np.array([number.get(gene_id, -1) for gene_id in file.gene_id_G], np.int64)
    totals.n_measured_obs_G[np.unique(joinid_G[joinid_G >= 0])] += file.n_cells
    waiting: list[tuple[int, sp.csr_matrix]] = []
    with H5adFile(file.path) as opened:
        for first, block in opened.blocks():
            if block.nnz and block.data.max() > _EXACT_IN_FLOAT32:
                raise CellsError(
                    f"{file.path}: a count of {block.data.max():,.0f} in rows {first} to {first + block.shape[0]}; "
                    f"Census stores keep counts exactly up to {_EXACT_IN_FLOAT32:,}"
                )
            waiting.append((first_cell + first, block))
            if sum(b.nnz for _, b in waiting) >= _VALUES_PER_WRITE:
                _write_blocks(raw, waiting, joinid_G, totals)
                waiting = []
            advance(block.shape[0])
    if waiting:
        _write_blocks(raw, waiting, joinid_G, totals)


def _write_blocks(
    raw: tiledbsoma.SparseNDArray, blocks: Sequence[tuple[int, sp.csr_matrix]], joinid_G: np.ndarray, totals: _Totals
) -> None:
    row_N = np.concatenate([first + np.repeat(np.arange(b.shape[0]), np.diff(b.indptr)) for first, b in blocks])
    column_N = joinid_G[np.concatenate([b.indices for _, b in blocks])]
    value_N = np.concatenate([b.data for _, b in blocks]).astype(np.float32)
    is_kept_N = column_N >= 0
    row_N, column_N, value_N = row_N[is_kept_N].astype(np.int64), column_N[is_kept_N], value_N[is_kept_N]
    first_row = blocks[0][0]
    if len(set(joinid_G[joinid_G >= 0].tolist())) < (joinid_G >= 0).sum():
        summed = sp.csr_matrix((value_N, (row_N - first_row, column_N)))  # adds values of one place
        value_N, column_N = summed.data, summed.indices.astype(np.int64)
        row_N = first_row + np.repeat(np.arange(summed.shape[0]), np.diff(summed.indptr))
    if len(row_N):
        columns = {"soma_dim_0": row_N, "soma_dim_1": column_N, "soma_data": value_N}
        raw.write(pa.table({name: pa.array(values) for name, values in columns.items()}))
    totals.raw_sum_C[:] += np.bincount(row_N, weights=value_N.astype(np.float64), minlength=len(totals.raw_sum_C))
    totals.nnz_C[:] += np.bincount(row_N, minlength=len(totals.nnz_C))
    totals.nnz_G[:] += np.bincount(column_N, minlength=len(totals.nnz_G))
