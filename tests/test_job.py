"""`ray job submit` runs a recipe as a program, both ways that the README gives, on a head of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_run import folder, recipe_text

__all__ = ["folder"]

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture
def head(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of a client of a cluster whose head was started in `folder`, with `tftrain` on its PATH."""
    temporary = tempfile.mkdtemp(prefix="tfj", dir="/tmp")
    dashboard, gcs = free_port(), free_port()
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_AUTH_MODE": "disabled", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [f"{BIN}/ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}"]
    command += ["--dashboard-host=127.0.0.1", "--num-cpus=3", "--object-store-memory=100000000"]
    command += [f"--temp-dir={temporary}", "--dashboard-agent-listen-port=0", "--disable-usage-stats"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.STDOUT,
    )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_for_dashboard(address, process)
        yield {**environment, "RAY_API_SERVER_ADDRESS": address}
    finally:
        # Ray takes half a minute to end a head in peace.
        for child in (*psutil.Process(process.pid).children(recursive=True), process):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.wait(timeout=60)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_dashboard(address: str, process: subprocess.Popen, seconds: float = 90) -> None:
    """Returns when jobs can be submitted; the job agent comes up some seconds after the dashboard."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "ray start ended"
        try:
            with urllib.request.urlopen(f"{address}/api/jobs/", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no dashboard at {address} after {seconds} s")


def test_a_recipe_is_a_program_that_ray_submits(folder, head):
    path = folder / "recipes" / "small.yaml"
    path.parent.mkdir()
    path.write_text(
        f"#!/usr/bin/env -S tftrain run\n{recipe_text(folder, ray='ray: {num_workers: 1, cpus_per_worker: 0.5}')}"
    )
    path.chmod(0o755)
    for words, expected in (
        (["--working-dir", str(path.parent), "--", "./small.yaml", "train.steps=3"], "finished: "),
        # Found where the head was started; finished runs say so and train nothing.
        (["recipes/small.yaml", "train.steps=3"], "finished: "),
        (["recipes/small.yaml", "train.stepz=3"], "did you mean train.steps?"),
    ):
        done = subprocess.run(
            [f"{BIN}/ray", "job", "submit", *words],
            cwd=folder,
            env=head,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        printed = done.stdout + done.stderr
        assert expected in printed, printed[-3000:]
        assert (done.returncode == 0) == (expected == "finished: "), printed[-3000:]
    assert (folder / "run" / "checkpoints" / "step_00000003" / "COMPLETE").is_file()
