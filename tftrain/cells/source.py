"""A SOMA experiment in the Census layout: which of its cells train, and which vocabulary row each of its genes has.

In: a store (`obs`, `ms/RNA/var`, `ms/RNA/X/raw`), an obs filter, QC and hold-out settings. Out: a Source, small and
picklable; handles are opened where they are used. X itself is only read by read.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tiledbsoma

from tftrain.cells.holdout import HoldoutConfig, held_out
from tftrain.cells.plan import PlanSource, permutation
from tftrain.cells.rows import RowSet
from tftrain.cells.storage import Place, SourceConfig, close_experiments, experiment, first_line, resolved
from tftrain.cells.vocab import Vocab, strip_version
from tftrain.errors import CellsError, RecipeError

__all__ = ["HoldoutConfig", "QcConfig", "Source", "SourceConfig", "close_experiments", "open_source", "open_sources"]

MEASUREMENT, LAYER = "RNA", "raw"


@dataclass(frozen=True)
class QcConfig:
    """Which cells are worth training on; 0 turns a rule off."""

    min_expressed_genes: int = 200
    """Least `nnz` of obs: genes with a count, over all genes of the store. Cells without any count never train."""
    total_counts_within_sd: float = 3.0
    """Least and greatest `raw_sum`, in standard deviations from the mean of the store's cells with enough genes."""

    def __post_init__(self) -> None:
        for name in ("min_expressed_genes", "total_counts_within_sd"):
            if getattr(self, name) < 0:
                raise RecipeError(f"data.qc.{name} is {getattr(self, name)}; it must be 0 (off) or more")


@dataclass(frozen=True)
class Source:
    """A store whose cells have been chosen. Pickles to about a bit a cell; opens its handle where it is used."""

    index: int
    """Number of the source in the recipe: `Cells.source_C`."""
    name: str
    """The species, with a number where several stores hold it; does not depend on where the store lies."""
    species: str
    place: Place
    weight: float
    train: RowSet
    heldout: RowSet
    row_of_var: np.ndarray
    """int32, by soma_joinid of var: row of the gene in the vocabulary, -1 where it has none."""
    digest: str
    """Of the training cells (joinids, raw_sum, nnz), the ordered gene ids and the number of stored values."""
    dropped: dict[str, int]
    """Cells that do not train, by reason."""
    n_cells: int
    """All cells of the store."""
    heldout_values: dict[str, float]
    """Values of the hold-out column met in chosen cells: the fraction from which on each is held out."""
    obs_columns: tuple[str, ...] = ()
    """Columns of obs that come with the cells."""

    @cached_property
    def train_joinid_N(self) -> np.ndarray:
        """int64: sorted soma_joinids of the training cells (8 bytes each; `train` holds the same in a bit)."""
        return self.train.all()

    @cached_property
    def heldout_joinid_M(self) -> np.ndarray:
        """int64: sorted soma_joinids of the held-out cells."""
        return self.heldout.all()

    @property
    def uri(self) -> str:
        """Of its store."""
        return self.place.uri

    @property
    def n_joinids(self) -> int:
        """Every soma_joinid of a chosen cell lies below."""
        return max(self.train.stop, self.heldout.stop)

    @property
    def plan_source(self) -> PlanSource:
        """What the order needs to know of it."""
        return PlanSource(self.name, self.species, len(self.train), self.digest, self.weight)

    def describe(self) -> str:
        """One line: cells that train and why the others do not, genes with a protein vector."""
        known, genes = int((self.row_of_var >= 0).sum()), int((self.row_of_var >= -1).sum())
        why = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items() if n) or "none dropped"
        return (
            f"{self.name}: {len(self.train):,} of {self.n_cells:,} cells train ({why}); "
            f"{known:,} of {genes:,} genes have a protein vector; {self.uri}"
        )

    def __getstate__(self) -> dict[str, Any]:
        hidden = ("train_joinid_N", "heldout_joinid_M")
        return {key: value for key, value in self.__dict__.items() if key not in hidden}


def open_sources(
    configs: Sequence[SourceConfig],
    vocab: Vocab,
    *,
    obs_filter: str | None = "is_primary_data == True",
    qc: QcConfig | None = None,
    holdout: HoldoutConfig | None = None,
    obs_columns: Sequence[str] = (),
) -> list[Source]:
    """All sources of a run, in the recipe's order; deterministic.

    Raises CellsError as `open_source` does, and where a hold-out is asked for but holds no cell of any source.
    """
    qc, holdout = qc or QcConfig(), holdout or HoldoutConfig()
    sources = [
        open_source(
            config,
            vocab,
            obs_filter=obs_filter,
            qc=qc,
            holdout=holdout,
            obs_columns=obs_columns,
            index=index,
            same_species_before=sum(other.species == config.species for other in configs[:index]),
        )
        for index, config in enumerate(configs)
    ]
    if holdout.is_on and not any(len(source.heldout) for source in sources):
        raise _empty_holdout(sources, holdout)
    return sources


def open_source(
    config: SourceConfig,
    vocab: Vocab,
    *,
    obs_filter: str | None = "is_primary_data == True",
    qc: QcConfig | None = None,
    holdout: HoldoutConfig | None = None,
    obs_columns: Sequence[str] = (),
    index: int = 0,
    same_species_before: int = 0,
) -> Source:
    """Chooses the cells of one store.

    obs_filter: SOMA's value-filter syntax; None or "" takes every cell. Raises CellsError where there is no such store,
    obs lacks a column, the filter cannot be read or matches nothing, no cell is left to train on, or no gene is in the
    vocabulary.
    """
    qc, holdout = qc or QcConfig(), holdout or HoldoutConfig()
    config = resolved(config)
    handle = experiment(config.place)
    row_of_var, genes_digest = _vocabulary_rows(handle, config, vocab)
    need = ["soma_joinid"]
    need += ["nnz"] if qc.min_expressed_genes else []
    need += ["raw_sum"] if qc.total_counts_within_sd else []
    need += [holdout.column] if holdout.is_on else []
    _check_columns(handle, config.uri, [*need, *obs_columns])
    # What a Census build has anyway tells two versions of a store apart.
    present = set(handle.obs.schema.names)
    obs = _read_obs(handle, config.uri, [*need, *({"nnz", "raw_sum"} & present - set(need))], obs_filter)
    n_cells = handle.obs.count
    dropped = {"not matched by the obs filter": n_cells - len(obs)}
    obs = _quality(obs, qc, dropped, config.uri)
    is_held_C, thresholds = np.zeros(len(obs), bool), dict[str, float]()
    if holdout.is_on:
        is_held_C, thresholds = held_out(obs[holdout.column], holdout, config.species)
    dropped["held out"] = int(is_held_C.sum())
    joinid_C = obs["soma_joinid"].to_numpy()
    train = obs.filter(pa.array(~is_held_C))
    if not len(train) and len(thresholds) == 1:
        raise _one_donor(config.uri, holdout, next(iter(thresholds)))
    if not len(train):
        raise CellsError(
            f"{config.uri}: all {len(obs):,} chosen cells are held out, none is left to train on; "
            f"lower data.holdout.fraction ({holdout.fraction}) or name fewer data.holdout.values"
        )
    digest = hashlib.blake2b(genes_digest, digest_size=16)
    for name in ("soma_joinid", "raw_sum", "nnz"):
        if name in train.column_names:
            digest.update(np.ascontiguousarray(train[name].to_numpy().astype(np.float64)).tobytes())
    X = handle.ms[MEASUREMENT].X[LAYER]
    assert isinstance(X, tiledbsoma.SparseNDArray)
    digest.update(str(X.nnz).encode())
    return Source(
        index=index,
        name=config.species + (f"-{same_species_before + 1}" if same_species_before else ""),
        species=config.species,
        place=config.place,
        weight=config.weight,
        train=RowSet.of(train["soma_joinid"].to_numpy()),
        heldout=RowSet.of(joinid_C[is_held_C]),
        row_of_var=row_of_var,
        digest=digest.hexdigest(),
        dropped=dropped,
        n_cells=n_cells,
        heldout_values=thresholds,
        obs_columns=tuple(obs_columns),
    )


def _check_columns(handle: tiledbsoma.Experiment, uri: str, need: Sequence[str]) -> None:
    have = handle.obs.schema.names
    if missing := [name for name in dict.fromkeys(need) if name not in have]:
        off = {"nnz": "data.qc.min_expressed_genes", "raw_sum": "data.qc.total_counts_within_sd"}
        rules = [f"{off[name]}=0 does without {name}" for name in missing if name in off]
        raise CellsError(
            f"{uri}: obs has no column {', '.join(missing)}; it has {', '.join(have)}"
            + (f" ({'; '.join(rules)})" if rules else "")
        )


def _read_obs(handle: tiledbsoma.Experiment, uri: str, columns: Sequence[str], obs_filter: str | None) -> pa.Table:
    """The rows that match, in the order of soma_joinid."""
    try:
        table = handle.obs.read(column_names=list(columns), value_filter=obs_filter or None).concat()
    except (tiledbsoma.SOMAError, ValueError, KeyError, SyntaxError, RuntimeError) as error:
        raise CellsError(
            f"{uri}: obs cannot be read with data.obs_filter {obs_filter!r} ({first_line(error)}); "
            f"obs has {', '.join(handle.obs.schema.names)}"
        ) from error
    if not len(table):
        raise CellsError(
            f"{uri}: data.obs_filter {obs_filter!r} matches none of {handle.obs.count:,} cells; "
            "an empty data.obs_filter takes all of them"
        )
    return table.sort_by("soma_joinid")


def _quality(obs: pa.Table, qc: QcConfig, dropped: dict[str, int], uri: str) -> pa.Table:
    """The cells that pass QC; counts the others into `dropped`."""
    if "nnz" in obs.column_names:
        # A cell without any count has nothing to learn from, also where the rule is off.
        least, before = max(1, qc.min_expressed_genes), len(obs)
        obs = obs.filter(pc.greater_equal(obs["nnz"], least))
        reason = f"with fewer than {least} expressed genes" if least > 1 else "without a count"
        dropped[reason] = before - len(obs)
    if qc.total_counts_within_sd and len(obs):
        total_C = obs["raw_sum"].to_numpy().astype(np.float64)
        is_near_C = np.abs(total_C - total_C.mean()) <= qc.total_counts_within_sd * total_C.std()
        dropped[f"with a total count beyond {qc.total_counts_within_sd:g} SD"] = int((~is_near_C).sum())
        obs = obs.filter(pa.array(is_near_C))
    if not len(obs):
        why = "; ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
        raise CellsError(f"{uri}: no cell passes the filter and QC ({why}); loosen data.qc (0 turns a rule off)")
    return obs


def _empty_holdout(sources: Sequence[Source], holdout: HoldoutConfig) -> CellsError:
    """Names the values that there are, and the least fraction that would hold one out."""
    met = {f"{value} ({source.name})": at for source in sources for value, at in source.heldout_values.items()}
    names = sorted(met, key=lambda name: met[name])
    if len(names) == 1 and not holdout.values:
        return _one_donor(sources[0].uri, holdout, next(iter(sources[0].heldout_values)))
    shown = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
    if holdout.values:
        asked = f"data.holdout.values {holdout.values} holds out no cell"
        remedy = "name one of them"
    else:
        asked = f"data.holdout.fraction {holdout.fraction} holds out no cell"
        remedy = f"a fraction of {met[names[0]] + 0.005:.2f} holds out {names[0]}, or name some as data.holdout.values"
    return CellsError(
        f"{asked}: {holdout.column} has {len(names)} values ({shown}); {remedy}; "
        "data.holdout.fraction=0 with no values trains on every cell"
    )


def _one_donor(uri: str, holdout: HoldoutConfig, value: str) -> CellsError:
    return CellsError(
        f"{uri}: all chosen cells have one {holdout.column}, {value}, so none can be held out whole; set "
        "data.holdout.column to a column that tells more apart, or data.holdout.fraction=0 to train on every cell and "
        "judge by none"
    )


def _vocabulary_rows(handle: tiledbsoma.Experiment, config: SourceConfig, vocab: Vocab) -> tuple[np.ndarray, bytes]:
    """Vocabulary row by var joinid (-1: not in it, -2: no such joinid), and a digest of the ordered gene ids."""
    try:
        var_frame = handle.ms[MEASUREMENT].var
        _ = handle.ms[MEASUREMENT].X[LAYER].schema
    except KeyError as error:
        raise CellsError(
            f"{config.uri}: not in the Census layout, {error} is missing; it needs ms/{MEASUREMENT}/var and "
            f"ms/{MEASUREMENT}/X/{LAYER}"
        ) from error
    if "feature_id" not in var_frame.schema.names:
        raise CellsError(
            f"{config.uri}: ms/{MEASUREMENT}/var has no column feature_id with gene ids; "
            f"it has {', '.join(var_frame.schema.names)}"
        )
    var = var_frame.read(column_names=["soma_joinid", "feature_id"]).concat().sort_by("soma_joinid")
    joinid = var["soma_joinid"].to_numpy()
    gene_ids = [strip_version(str(gene_id)) for gene_id in var["feature_id"].to_pylist()]
    row = np.asarray(vocab.rows(gene_ids), np.int32)
    if not (row >= 0).any():
        raise CellsError(
            f"{config.uri}: none of its {len(row):,} gene ids ({', '.join(gene_ids[:3])}, ...) is in the vocabulary of "
            f"{vocab.n_genes:,} genes ({', '.join(list(vocab.gene_ids[:3]))}, ...); is {config.species} the right "
            "species, and is its protein table in data.protein_tables?"
        )
    known, times = np.unique(row[row >= 0], return_counts=True)
    if len(twice := known[times > 1]):
        names = [gene_ids[int(np.flatnonzero(row == r)[0])] for r in twice[:3]]
        raise CellsError(
            f"{config.uri}: {len(twice):,} gene ids occur more than once without their version ({', '.join(names)}); "
            "merge or drop them when the store is built"
        )
    row_of_var = np.full(int(joinid.max()) + 1, -2, np.int32)
    row_of_var[joinid] = row
    return row_of_var, hashlib.blake2b("\n".join(gene_ids).encode()).digest()


def heldout_sample(sources: Sequence[Source], max_cells: int) -> list[np.ndarray]:
    """For each source int64 sorted joinids: at most `max_cells` over all sources, in proportion; same on every rank."""
    total = sum(len(source.heldout) for source in sources)
    joinids, before = [], 0
    for source in sources:
        n = len(source.heldout)
        share = min(n, (before + n) * max_cells // total - before * max_cells // total) if total > max_cells else n
        before += n
        chosen = np.sort(permutation(n, "held-out sample", source.name)[:share])
        joinids.append(source.heldout_joinid_M[chosen] if n else np.zeros(0, np.int64))
    return joinids
