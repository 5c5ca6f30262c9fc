"""metrics.jsonl has each step once, through resumes and cut lines; an offline W&B run holds config, metrics and id."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from tftrain.errors import TrainingError
from tftrain.training.folder import Folder
from tftrain.training.metrics import MetricsWriter, WandbConfig, read_metrics


def test_each_step_once(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path))
    for step in (1, 2, 3, 4):
        writer.write(step, {"train/loss": step / 10})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')
    writer = MetricsWriter(str(tmp_path), resume_step=2)
    writer.write(3, {"train/loss": 7.0})
    assert [(line["step"], line["train/loss"]) for line in read_metrics(str(tmp_path))] == [
        (1, 0.1),
        (2, 0.2),
        (3, 7.0),
    ]
    writer.close()
    MetricsWriter(str(tmp_path)).close()
    assert read_metrics(str(tmp_path)) == [], "a run from the beginning begins a new file"


def test_storage_that_cannot_append(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tftrain.training.folder import Folder

    monkeypatch.setattr(Folder, "local", None)  # as on an object store
    for resume_step in (0, 2):
        writer = MetricsWriter(str(tmp_path), resume_step=resume_step)
        for step in range(resume_step + 1, resume_step + 4):
            writer.write(step, {"train/loss": 1.0})
        writer.close()
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [1, 2, 3, 4, 5]


def test_offline_wandb_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = WandbConfig(mode="offline", project="toy")
    first = MetricsWriter(str(tmp_path), config, run_config={"optim": {"lr": 0.5}})
    first.write(1, {"train/loss": 2.5})
    first.close()
    second = MetricsWriter(str(tmp_path), config, resume_step=1, wandb_run_id=first.wandb_run_id, run_config={})
    second.write(2, {"train/loss": 1.25})
    saved = Folder.at(tmp_path / "checkpoints" / "step_00000002")
    saved.write_text("COMPLETE", "{}")
    second.checkpoint(saved, 2)
    second.close()
    assert second.wandb_run_id == first.wandb_run_id
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{first.wandb_run_id}.wandb"] * 2
    # W&B's service may still be writing for a moment after `finish` has returned.
    deadline = time.monotonic() + 10
    while len(history := wandb_history(files)) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [(row["_step"], row["train/loss"]) for row in history] == [(1, 2.5), (2, 1.25)]
    runs = [record.run for file in files for record in wandb_records(file) if record.HasField("run")]
    config_keys = {item.key: item.value_json for run in runs for item in run.config.update}
    assert json.loads(config_keys["optim"]) == {"lr": 0.5}
    artifacts = [record.request.log_artifact.artifact for file in files for record in wandb_records(file)]
    artifacts += [record.artifact for file in files for record in wandb_records(file)]
    (artifact,) = [artifact for artifact in artifacts if artifact.type == "checkpoint"]
    assert artifact.name == f"checkpoint-{first.wandb_run_id}"
    (entry,) = artifact.manifest.contents
    assert entry.ref == (tmp_path / "checkpoints" / "step_00000002" / "COMPLETE").as_uri(), "nothing is copied"


def test_online_without_a_key_fails_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(
        TrainingError, match=r"W&B could not start in mode online: .*set wandb.mode to offline or disabled"
    ):
        MetricsWriter(str(tmp_path), WandbConfig(mode="online"))


def wandb_history(files: list[Path]) -> list[dict[str, Any]]:
    """Every logged line, in the order of the files."""
    rows = [record.history.item for file in files for record in wandb_records(file) if record.HasField("history")]
    return [{item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows]


def wandb_records(path: Path) -> list:
    """Records of W&B's log: a header of 7 bytes, then LevelDB log blocks of 32 KiB with chunks (crc 4, length 2, kind
    1).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, parts, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of several
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records
