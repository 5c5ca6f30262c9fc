"""Counts -> a SOMA store that grows beside its final place, portion by portion, and can be taken up after a kill.

In: portions of rows (a file, a slice of another store). Out: a finished store. What a portion has written is final once
`commit` has noted it; what was written after the last note is thrown away when the store is taken up again. Shapes: C
cells and G genes of the store, N values of a write.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma

from data_prep.store import tiling, write_frame

JOURNAL = "journal.npz"
INPUT_KEY, FILES_KEY = "tftrain_input", "tftrain_files"


class StoreWriter:
    """A store under way at `path`. `open` it, `write` and `commit` each portion from `n_done` on, then `finish`."""

    def __init__(self, path: Path, n_cells: int, n_genes: int, digest: str) -> None:
        self.path, self.digest = path, digest
        self.n_done = 0
        """Portions that need not be written again."""
        self.raw_sum_C = np.zeros(n_cells)
        self.nnz_C = np.zeros(n_cells, np.int64)
        self.nnz_G = np.zeros(n_genes, np.int64)
        self.n_measured_obs_G = np.zeros(n_genes, np.int64)

    @staticmethod
    def open(path: Path, n_cells: int, n_genes: int, digest: str, *, base: Path | None = None) -> StoreWriter:
        """Takes up what was begun from the same input (`digest`), or begins anew.

        base: a finished store whose cells and genes come first; its files are linked to, not copied, since TileDB never
        changes one, and it stays as it is.
        """
        writer = StoreWriter(path, n_cells, n_genes, digest)
        if not writer._take_up():
            shutil.rmtree(path, ignore_errors=True)
            if base is None:
                writer._create()
            else:
                writer._extend(base)
            writer._note()
        return writer

    @property
    def _raw(self) -> Path:
        return Path(tiledbsoma.Experiment.open(str(self.path)).ms["RNA"].X["raw"].uri.removeprefix("file://"))

    def _create(self) -> None:
        with tiledbsoma.Experiment.create(str(self.path)) as experiment:
            rna = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
            shape = (len(self.nnz_C), len(self.nnz_G))
            rna.add_new_collection("X").add_new_sparse_ndarray(
                "raw", type=pa.float32(), shape=shape, platform_config=tiling(*shape)
            )

    def _extend(self, base: Path) -> None:
        """Begins with the cells of `base`; its obs and var are taken out, to be written whole at the end."""
        shutil.copytree(base, self.path, copy_function=os.link)
        with tiledbsoma.Experiment.open(str(self.path)) as experiment:
            obs, var = (frame.read().concat().to_pandas() for frame in (experiment.obs, experiment.ms["RNA"].var))
            folders = [frame.uri.removeprefix("file://") for frame in (experiment.obs, experiment.ms["RNA"].var)]
        with tiledbsoma.Experiment.open(str(self.path), "w") as experiment:
            experiment.ms["RNA"].X["raw"].resize((len(self.nnz_C), len(self.nnz_G)))
        with tiledbsoma.Experiment.open(str(self.path), "d") as experiment:
            del experiment["obs"]
        with tiledbsoma.Measurement.open(str(self.path / "ms" / "RNA"), "d") as rna:
            del rna["var"]
        for folder in folders:
            shutil.rmtree(folder)
        self.raw_sum_C[: len(obs)], self.nnz_C[: len(obs)] = obs["raw_sum"], obs["nnz"]
        self.nnz_G[: len(var)], self.n_measured_obs_G[: len(var)] = var["nnz"], var["n_measured_obs"]

    def _take_up(self) -> bool:
        """Goes back to the last note of the same input; False where there is none."""
        try:
            with np.load(self.path / JOURNAL) as journal:
                if str(journal["digest"]) != self.digest or len(journal["nnz_C"]) != len(self.nnz_C):
                    return False
                self.n_done = int(journal["n_done"])
                for name in ("raw_sum_C", "nnz_C", "nnz_G", "n_measured_obs_G"):
                    setattr(self, name, journal[name])
                kept = set(journal["fragments"].tolist())
            raw = self._raw
        except (OSError, ValueError, KeyError, tiledbsoma.SOMAError, tiledbsoma.DoesNotExistError):
            return False
        for folder, suffix in (("__commits", ".wrt"), ("__fragments", "")):
            for path in (raw / folder).iterdir():
                if path.name.removesuffix(suffix) not in kept:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True

    def write(self, row_N: np.ndarray, gene_N: np.ndarray, count_N: np.ndarray) -> None:
        """One fragment: values in any order, no place twice. Some million at a time: readers open every fragment."""
        if len(row_N):
            columns = {"soma_dim_0": row_N, "soma_dim_1": gene_N, "soma_data": count_N.astype(np.float32)}
            with tiledbsoma.Experiment.open(str(self.path), "w") as experiment:
                raw = experiment.ms["RNA"].X["raw"]
                assert isinstance(raw, tiledbsoma.SparseNDArray)
                raw.write(pa.table({n: pa.array(v) for n, v in columns.items()}))
        self.raw_sum_C += np.bincount(row_N, weights=count_N.astype(np.float64), minlength=len(self.raw_sum_C))
        self.nnz_C += np.bincount(row_N, minlength=len(self.nnz_C))
        self.nnz_G += np.bincount(gene_N, minlength=len(self.nnz_G))

    def commit(self) -> None:
        """The portion is whole: it will not be written again."""
        self.n_done += 1
        self._note()

    def _note(self) -> None:
        part = self.path / f".{JOURNAL}"
        with open(part, "wb") as file:
            np.savez(
                file,
                digest=self.digest,
                n_done=self.n_done,
                fragments=np.array(sorted(path.name for path in (self._raw / "__fragments").iterdir()), str),
                raw_sum_C=self.raw_sum_C,
                nnz_C=self.nnz_C,
                nnz_G=self.nnz_G,
                n_measured_obs_G=self.n_measured_obs_G,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path / JOURNAL)

    def finish(self, obs: pd.DataFrame, var: pd.DataFrame, target: Path, facts: dict[str, str]) -> None:
        """Writes obs and var with what follows from the counts, and puts the store in its place.

        obs (C) and var (G) come without raw_sum, nnz, raw_mean_nnz, n_measured_obs. `facts` become metadata.
        """
        obs = obs.assign(
            raw_sum=self.raw_sum_C, nnz=self.nnz_C, raw_mean_nnz=self.raw_sum_C / np.maximum(self.nnz_C, 1)
        )
        var = var.assign(nnz=self.nnz_G, n_measured_obs=self.n_measured_obs_G)
        with tiledbsoma.Experiment.open(str(self.path), "w") as experiment:
            for key, value in {INPUT_KEY: self.digest, **facts}.items():
                experiment.metadata[key] = value
            _replace_frame(experiment, "obs", obs)
            _replace_frame(experiment.ms["RNA"], "var", var, ("feature_id", "feature_name"))
        (self.path / JOURNAL).unlink()
        put_in_place(self.path, target)


def _replace_frame(parent: Any, name: str, frame: pd.DataFrame, as_values: Sequence[str] = ("obs_id",)) -> None:
    """Writes a frame, also where a killed attempt has left a part of one."""
    folder = Path(parent.uri.removeprefix("file://")) / name
    if folder.exists():
        if name in parent:
            with type(parent).open(parent.uri, "d") as opened:
                del opened[name]
        shutil.rmtree(folder)
    write_frame(parent, name, frame, as_values)


def put_in_place(finished: Path, target: Path) -> None:
    """Renames; a store that stood at `target` is there until the new one can take its place."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    finished.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Puts back a store that a kill between the two renames left aside."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)
