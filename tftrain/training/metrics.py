"""Where the numbers of a run go: `<out>/metrics.jsonl` and Weights & Biases, under one set of names.

In: (step, metrics) on rank 0. Out: one line a step, each step once, also through resumes. Names: `train/loss,
loss_gene, loss_count, lr, grad_norm, epoch`, `val/loss, ...` (a scored gene, natural logarithm), `perf/step_s,
cells_per_s, tokens_per_s, mfu, data_wait_fraction, memory_peak_gib`; `train/skipped_steps` once there are any.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tftrain.errors import TrainingError
from tftrain.training.folder import Folder

FILE = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
"""What evaluations beside the training found, a line a checkpoint, in the order of steps."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases. The key comes from `wandb login` or WANDB_API_KEY, never from a recipe."""

    mode: Literal["disabled", "offline", "online"] = "disabled"
    """offline writes below `<out>/wandb` for `wandb sync`."""
    project: str = "tftrain"
    entity: str | None = None
    name: str | None = None
    """Shown in the list of runs; none: W&B makes one up."""
    group: str | None = None
    tags: list[str] | None = None


class MetricsWriter:
    """Appends to `metrics.jsonl` and W&B. Rank 0 makes one, after it knows which step the run continues from."""

    SYNC_S = 20.0
    """Most seconds of lines that a killed run loses on storage that cannot append."""

    def __init__(
        self,
        out: str,
        wandb: WandbConfig | None = None,
        *,
        resume_step: int = 0,
        wandb_run_id: str | None = None,
        run_config: Mapping[str, Any] | None = None,
    ):
        """Drops lines after `resume_step`: those steps are done again. `wandb_run_id` is that of the manifest, if any.

        `run_config` (the resolved recipe, hashes, versions) is what W&B shows as the run's configuration.
        """
        self._folder = Folder.at(out)
        self._temporary: tempfile.TemporaryDirectory | None = None
        if self._folder.local is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="tftrain-")
        path = Path(self._temporary.name) / FILE if self._temporary else self._folder.local / FILE  # type: ignore[operator]
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(self._folder) if line["step"] <= resume_step] if resume_step else []
        part = path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, path)
        self._file = open(path, "a")  # noqa: SIM115
        self._n_evaluations = 0
        self._synced_at = time.monotonic()
        self._path = path
        config = wandb or WandbConfig()
        self.wandb_run_id = None if config.mode == "disabled" else wandb_run_id or secrets.token_hex(4)
        """For the manifest of every checkpoint, so that a resumed run continues the same W&B run."""
        self._wandb = self._start_wandb(config, run_config or {}, is_resumed=wandb_run_id is not None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line, flushed to the disk's cache at once. On storage without appending, `sync` copies it there."""
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"{self._path} cannot be written ({error}); make room or repair the storage, then run the same "
                "command again: it continues from the newest checkpoint"
            ) from error
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)
            if "val/loss" in metrics:
                self._log_evaluations()
        if time.monotonic() - self._synced_at > self.SYNC_S:
            self.sync()

    def checkpoint(self, folder: Folder, step: int) -> None:
        """Names a finished checkpoint to W&B as an artifact: a reference to its place, nothing is copied."""
        self.sync()
        if not self._wandb:
            return
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self.wandb_run_id}", type="checkpoint", metadata={"step": step})
        local = folder.local
        artifact.add_reference(local.absolute().as_uri() if local else folder.uri, checksum=False)
        self._wandb.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def _log_evaluations(self) -> None:
        """Tells W&B what has been found since the last time; such values have the checkpoint's step, not today's."""
        lines = read_evaluations(self._folder)
        for line in lines[self._n_evaluations :]:
            self._wandb.log({"eval/step": line["step"], **{k: v for k, v in line.items() if k != "step"}})
        self._n_evaluations = len(lines)

    def sync(self) -> None:
        """Copies the file to storage that cannot append (object stores); nothing to do elsewhere. Call it at
        checkpoints.
        """
        if self._temporary:
            self._folder.write_text(FILE, self._path.read_text())
        self._synced_at = time.monotonic()

    def close(self, exit_code: int = 0) -> None:
        """Ends the W&B run (`exit_code` other than 0 marks it as failed) and the file."""
        self._file.close()
        self.sync()
        if self._temporary:
            self._temporary.cleanup()
        if self._wandb:
            self._log_evaluations()
            self._wandb.finish(exit_code=exit_code)

    def _start_wandb(self, config: WandbConfig, run_config: Mapping[str, Any], *, is_resumed: bool) -> Any:
        if config.mode == "disabled":
            return None
        import wandb

        # An offline run cannot be resumed, only continued under its id: `wandb sync` joins the parts.
        is_online = config.mode == "online"
        folder = str(self._folder.local or tempfile.mkdtemp(prefix="tftrain-wandb-"))
        try:
            run = wandb.init(
                mode=config.mode,
                project=config.project,
                entity=config.entity,
                name=config.name,
                group=config.group,
                tags=config.tags,
                id=self.wandb_run_id,
                resume="allow" if is_online and is_resumed else None,
                config=dict(run_config),
                dir=folder,
                settings=wandb.Settings(silent=True, console="off"),
            )
            run.define_metric("eval/*", step_metric="eval/step")
            return run
        except wandb.errors.Error as error:
            raise TrainingError(
                f"W&B could not start in mode {config.mode}: {error}; log in (`wandb login` or WANDB_API_KEY), "
                "or set wandb.mode to offline or disabled"
            ) from None


def read_metrics(out: Folder | str) -> list[dict[str, Any]]:
    """Every whole line of a run's `metrics.jsonl`, in order; nothing where there is no file. A line cut short is left
    out.
    """
    return _read_lines(out, FILE)


def read_evaluations(out: Folder | str) -> list[dict[str, Any]]:
    """Every line of a run's `evaluations.jsonl`; nothing where there is no file."""
    return _read_lines(out, EVALUATIONS)


def _read_lines(out: Folder | str, name: str) -> list[dict[str, Any]]:
    folder = out if isinstance(out, Folder) else Folder.at(out)
    return list(_whole_lines(folder.read_text(name))) if folder.exists(name) else []


def _whole_lines(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)
