"""h5ad files -> one SOMA experiment a species, in the CELLxGENE Census layout.

In: .h5ad files with raw counts. Out: `OUT/<species>.soma` with obs (Census column names), ms/RNA/var and ms/RNA/X/raw.
All stores of a call appear at its end, or none does. A build that was killed or interrupted is continued by the same
command, file by file. Stores that exist and were built from the same input are left as they are. Genes of files of one
species are united in the order of their first appearance.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import tiledbsoma
from rich.console import Console
from rich.progress import Progress

from data_prep.census import fill_obs, join_obs
from data_prep.genes import GeneTable, map_genes
from data_prep.store import progress_bar
from data_prep.writer import FILES_KEY, INPUT_KEY, StoreWriter, recover
from tftrain.cells.h5ad import H5adFile
from tftrain.cells.storage import first_line
from tftrain.errors import CellsError

LAYOUT_VERSION = 1
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
    append: bool = False
    """Add the files that a store does not have yet to it: its cells keep their joinids, new ones follow."""


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
    repeated gene ids, a species that cannot be told, or a store of other input that stands in the way; a store that
    was begun is then not left behind.
    """
    config, out = config or BuildConfig(), Path(out)
    paths = h5ad_files(inputs)
    tables = {species: GeneTable.load(path) for species, path in config.gene_tables.items()}
    files = [_survey(path, config, tables, show) for path in paths]
    by_species: dict[str, list[_File]] = {}
    for file in files:
        by_species.setdefault(file.species, []).append(file)
    built: list[Built] = []
    finish: list[Callable[[], None]] = []
    with progress_bar(console or Console(stderr=True)) as progress:
        try:
            for species, of_species in by_species.items():
                table = tables.get(species, tables.get(""))
                store, finish_store = _build_store(out / f"{species}.soma", of_species, config, table, progress, show)
                built.append(store)
                finish.append(finish_store)
        except CellsError:
            # What is refused will be refused again: only an interrupt leaves something to continue.
            for species in by_species:
                shutil.rmtree(_building(out / f"{species}.soma"), ignore_errors=True)
            with contextlib.suppress(OSError):
                out.rmdir()
            raise
        for finish_store in finish:
            finish_store()
    for store in built:
        if store.is_new:
            show(f"{store.path}: {store.n_cells:,} cells, {store.n_genes:,} genes")
    return built


def h5ad_files(inputs: Sequence[str | Path]) -> list[Path]:
    """The files, with those of folders. Raises CellsError for an empty folder, or a file given twice."""
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


def _file_digest(file: _File) -> str:
    """Of a file's content and the gene ids given to its columns."""
    digest = hashlib.blake2b(str(LAYOUT_VERSION).encode(), digest_size=16)
    with open(file.path, "rb") as stream:
        digest.update(hashlib.file_digest(stream, "blake2b").digest())
    digest.update(json.dumps([Path(file.path).name, file.gene_id_G]).encode())
    return digest.hexdigest()


def _input_digest(files: Sequence[str]) -> str:
    """Of the files that make a store, in their order."""
    return hashlib.blake2b("\n".join(files).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class _Base:
    """A finished store that is there already."""

    digest: str
    files: list[str]
    """Digests of the files that it was built from; empty in stores of before they were kept."""
    obs: pd.DataFrame
    var: pd.DataFrame


def _base(target: Path) -> _Base | None:
    """The store at `target`; None where nothing is there. Raises CellsError for what is no store of `build`."""
    recover(target)
    if not target.exists():
        return None
    try:
        with tiledbsoma.Experiment.open(str(target)) as experiment:
            obs, var = (frame.read().concat().to_pandas() for frame in (experiment.obs, experiment.ms["RNA"].var))
            files = json.loads(experiment.metadata.get(FILES_KEY, "[]"))
            return _Base(experiment.metadata[INPUT_KEY], files, obs, var)
    except (tiledbsoma.SOMAError, tiledbsoma.DoesNotExistError, KeyError, TypeError) as error:
        raise CellsError(
            f"{target} is there already and is no finished store of `build` ({first_line(error)}); remove it, give "
            "another OUT, or --replace"
        ) from error


def _build_store(
    target: Path,
    files: Sequence[_File],
    config: BuildConfig,
    table: GeneTable | None,
    progress: Progress,
    show: Callable[[str], None],
) -> tuple[Built, Callable[[], None]]:
    """One species' store: left as it is, continued, begun, or extended by the files that it does not have yet.

    Call what comes back to put it in its place.
    """
    base = None if config.replace else _base(target)
    digests = [_file_digest(file) for file in files]
    if base is not None:
        if base.digest == _input_digest(digests) or (config.append and set(digests) <= set(base.files)):
            show(f"{target} was built from the same input and stays as it is")
            return Built(target, files[0].species, len(base.obs), len(base.var), is_new=False), lambda: None
        if not config.append or not base.files:
            raise CellsError(
                f"{target} is there already, from other input; --append adds the files that it does not have, "
                "--replace builds it again; or remove it, or give another OUT"
            )
        files = [file for file, digest in zip(files, digests) if digest not in base.files]
        digests = [*base.files, *(digest for digest in digests if digest not in base.files)]
    n_before = 0 if base is None else len(base.obs)
    n_cells = n_before + sum(file.n_cells for file in files)
    if not n_cells:
        raise CellsError(f"{', '.join(file.path for file in files)}: no cells")
    order = list(
        dict.fromkeys(
            [*([] if base is None else base.var["feature_id"]), *(i for file in files for i in file.gene_id_G if i)]
        )
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    writer = StoreWriter.open(
        _building(target), n_cells, len(order), _input_digest(digests), base=None if base is None else target
    )
    if writer.n_done:
        show(f"{target}: continues after {writer.n_done} of {len(files)} files")
    task = progress.add_task(target.stem, total=sum(file.n_cells for file in files))
    first_cell = n_before
    for number, file in enumerate(files):
        if number >= writer.n_done:
            _write_counts(writer, file, order, first_cell, lambda n: progress.advance(task, n))  # type: ignore[arg-type]
            writer.commit()
        else:
            progress.advance(task, file.n_cells)  # type: ignore[arg-type]
        first_cell += file.n_cells

    def finish() -> None:
        facts = {FILES_KEY: json.dumps(digests)}
        writer.finish(_joined_obs(base, files), _joined_var(base, files, order, table), target, facts)

    return Built(target, files[0].species, n_cells, len(order), is_new=True), finish


def _building(target: Path) -> Path:
    return target.with_name(f".{target.name}.building")


def _joined_obs(base: _Base | None, files: Sequence[_File]) -> pd.DataFrame:
    parts = [file.obs.assign(n_measured_vars=len(set(filter(None, file.gene_id_G)))) for file in files]
    if base is not None:
        parts.insert(0, base.obs.drop(columns=["soma_joinid", "raw_sum", "nnz", "raw_mean_nnz"]))
    obs = join_obs(parts)
    obs.insert(0, "soma_joinid", np.arange(len(obs)))
    return obs


def _joined_var(
    base: _Base | None, files: Sequence[_File], order: Sequence[str], table: GeneTable | None
) -> pd.DataFrame:
    names = {gene_id: name for file in reversed(files) for gene_id, name in zip(file.gene_id_G, file.name_G)}
    length = {} if table is None else table.length_of_id
    if base is not None:
        names |= dict(zip(base.var["feature_id"], base.var["feature_name"]))
        if "feature_length" in base.var:
            length = {**length, **dict(zip(base.var["feature_id"], base.var["feature_length"]))}
    var = pd.DataFrame({"soma_joinid": np.arange(len(order)), "feature_id": list(order)})
    var["feature_name"] = [names[gene_id] for gene_id in order]
    if length:
        var["feature_length"] = [length.get(gene_id, 0) for gene_id in order]
    return var


def _write_counts(
    writer: StoreWriter, file: _File, order: Sequence[str], first_cell: int, advance: Callable[[int], None]
) -> None:
    """The counts of one file, some million values a write."""
    number = {gene_id: joinid for joinid, gene_id in enumerate(order)}
    joinid_G = np.array([number.get(gene_id, -1) for gene_id in file.gene_id_G], np.int64)
    writer.n_measured_obs_G[np.unique(joinid_G[joinid_G >= 0])] += file.n_cells
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
                writer.write(*_values(waiting, joinid_G))
                waiting = []
            advance(block.shape[0])
    if waiting:
        writer.write(*_values(waiting, joinid_G))


def _values(
    blocks: Sequence[tuple[int, sp.csr_matrix]], joinid_G: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, genes and counts of blocks that follow each other; columns of one gene are added up."""
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
    return row_N, column_N, value_N
