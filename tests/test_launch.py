"""Workers on Ray and in this process: equal losses, a killed worker is survived, errors of the input arrive in one
line.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from tftrain.errors import CellsError, RecipeError, TrainingError
from tftrain.launch import Display, launch
from tftrain.recipe import RayConfig
from tftrain.training.metrics import read_metrics

WORKER = "toy_worker:train"
N_STEPS = 10


def _payload(out: Path, **more: Any) -> dict[str, Any]:
    return {"out": str(out), "n_steps": N_STEPS, **more}


def _losses(out: Path) -> list[tuple[int, float, float | None]]:
    return [(line["step"], line["train/loss"], line.get("val/loss")) for line in read_metrics(str(out))]


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    out = tmp_path_factory.mktemp("in_process")
    result = launch(WORKER, _payload(out), RayConfig(num_workers=0), out=str(out))
    assert result == {"outcome": "finished", "began_at": 0, "world_size": 1}
    return _losses(out)


def test_two_ray_workers_with_one_killed_equal_one_process(
    ray_cluster: str, tmp_path: Path, in_process: list, capsys: pytest.CaptureFixture
) -> None:
    config = RayConfig(num_workers=2, max_failures=1)
    result = launch(WORKER, _payload(tmp_path, kill_after=6), config, out=str(tmp_path))
    assert result == {"outcome": "finished", "began_at": 4, "world_size": 2}
    got, expected = _losses(tmp_path), in_process
    assert [step for step, *_ in got] == list(range(1, N_STEPS + 1))
    np.testing.assert_allclose([loss for _, loss, _ in got], [loss for _, loss, _ in expected], rtol=1e-5)
    assert [step for step, _, heldout in got if heldout] == [5, 10]
    np.testing.assert_allclose([h for *_, h in got if h], [h for *_, h in expected if h], rtol=1e-5)
    printed = capsys.readouterr().out
    assert "rank 0 of 2" in printed
    assert "train 10/10  loss " in printed


def test_a_bug_shows_its_traceback(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)failed for good after 0 restarts .*a bug of ours"):
        launch(WORKER, _payload(tmp_path, is_bug=True), RayConfig(num_workers=1, max_failures=0), out=str(tmp_path))


def test_an_error_of_the_input_arrives_as_it_was(ray_cluster: str, tmp_path: Path) -> None:
    with pytest.raises(CellsError, match=r"^source a: cell 7 has count -1; counts are whole numbers above 0$"):
        launch(WORKER, _payload(tmp_path, bad_rank=1), RayConfig(num_workers=2, max_failures=3), out=str(tmp_path))


def test_a_local_cluster_too_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RecipeError, match=r"ray.local_cpus is 1 and 2 workers with their readers need 3 CPUs"):
        launch(WORKER, {}, RayConfig(num_workers=2, local_cpus=1), out=str(tmp_path), reader_cpus=1)


def test_lines_without_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    display = Display("pretrain", console)
    for step in range(1, 101):
        heldout = {"val/loss": 3.5} if step >= 50 else {}
        display.report(step, 100, {"train/loss": 4.0, "perf/cells_per_s": 1234.4, **heldout})
    display.say("saved [step 100]")
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("  ")[0] for line in lines] == [
        "pretrain 1/100",
        "pretrain 50/100",
        "pretrain 100/100",
        "saved [step 100]",
    ]
    assert lines[0] == "pretrain 1/100  loss 4.0000  1,234 cells/s  starting"
    assert "val 3.5000" in lines[1]
    assert lines[2].endswith("0:00:00 left")


def test_a_live_line_on_a_terminal() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    with Display("pretrain", console) as display:
        display.report(40, 100, {"train/loss": 4.0})
        display.say("a line")
        display.report(100, 100, {"train/loss": 3.0})
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "a line" in text
    assert "100/100" in text
    assert "loss 3.0000" in text
