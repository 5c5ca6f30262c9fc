"""obs of any .h5ad file -> the column names of the CELLxGENE Census.

In: obs of a file. Out: a frame that has every Census column a model or an evaluation asks for, and a note on every
column that had to be filled in.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

UNKNOWN = "unknown"
TEXT_COLUMNS = (
    "assay",
    "cell_type",
    "development_stage",
    "disease",
    "sex",
    "suspension_type",
    "tissue",
    "tissue_general",
)
"""Filled with "unknown" where a file does not have them."""
OWN_COLUMNS = ("soma_joinid", "raw_sum", "nnz", "raw_mean_nnz", "n_measured_vars")
"""Written by the build from the counts themselves, whatever a file says."""


def fill_obs(obs: pd.DataFrame, *, species: str, dataset: str) -> tuple[pd.DataFrame, list[str]]:
    """obs in Census columns, other columns after them, and notes on what was filled in. Rows keep their order."""
    notes, filled = [], {}
    n = len(obs)
    filled["dataset_id"] = _text(obs["dataset_id"]) if "dataset_id" in obs else np.full(n, dataset, object)
    filled["obs_id"] = obs.index.astype(str).to_numpy(object)
    missing = []
    for name in TEXT_COLUMNS:
        if name in obs:
            filled[name] = _text(obs[name])
        else:
            filled[name] = np.full(n, UNKNOWN, object)
            missing.append(name)
    if missing:
        notes.append(f"obs has no {', '.join(missing)}: {UNKNOWN}")
    if "donor_id" in obs:
        filled["donor_id"] = _text(obs["donor_id"])
    elif "batch" in obs:
        filled["donor_id"] = _text(obs["batch"])
        notes.append(f"obs has no donor_id: batch stands for it ({obs['batch'].nunique()} values)")
    else:
        filled["donor_id"] = np.full(n, dataset, object)
        notes.append(f"obs has no donor_id and no batch: all cells are of one donor, {dataset}")
    filled["organism"] = _text(obs["organism"]) if "organism" in obs else np.full(n, species, object)
    if "is_primary_data" in obs:
        filled["is_primary_data"] = _truth(obs["is_primary_data"])
    else:
        filled["is_primary_data"] = np.ones(n, bool)
        notes.append("obs has no is_primary_data: True")
    for name in obs.columns:
        if str(name) not in filled and str(name) not in OWN_COLUMNS:
            filled[str(name)] = _plain(obs[name])
    return pd.DataFrame(filled), notes


def join_obs(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One frame of all parts. A column that some part lacks is "unknown" there, or NaN where it holds numbers."""
    names = list(dict.fromkeys(name for part in parts for name in part.columns))
    joined = {}
    for name in names:
        columns = [part[name] for part in parts if name in part]
        is_number = all(pd.api.types.is_numeric_dtype(column) for column in columns)
        is_truth = len(columns) == len(parts) and all(pd.api.types.is_bool_dtype(column) for column in columns)
        pieces = []
        for part in parts:
            if name not in part:
                pieces.append(np.full(len(part), np.nan if is_number else UNKNOWN, float if is_number else object))
            elif is_truth:
                pieces.append(part[name].to_numpy(bool))
            elif is_number:
                pieces.append(part[name].to_numpy(float if part[name].dtype.kind != "i" else np.int64))
            else:
                pieces.append(part[name].astype(str).to_numpy(object))
        joined[name] = np.concatenate(pieces)
    return pd.DataFrame(joined)


def _text(column: pd.Series) -> np.ndarray:
    values = column.astype(object)
    return np.array([UNKNOWN if value is None or value != value else str(value) for value in values], object)


def _truth(column: pd.Series) -> np.ndarray:
    if pd.api.types.is_bool_dtype(column):
        return column.to_numpy(bool)
    return column.astype(str).str.lower().isin(["true", "1", "1.0"]).to_numpy(bool)


def _plain(column: pd.Series) -> np.ndarray:
    if pd.api.types.is_bool_dtype(column):
        return column.to_numpy(bool)
    if pd.api.types.is_integer_dtype(column) and not column.hasnans:
        return column.to_numpy(np.int64)
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(float)
    return _text(column)
