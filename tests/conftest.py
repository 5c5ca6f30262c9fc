"""What every test shares: one quiet environment and one small Ray cluster for the whole session.

The environment is set here, before anything imports ray, torch or deepspeed: they read it at import.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("WANDB_MODE", "disabled")
# The toy architecture stands beside the tests that use it; this process and Ray's workers import it.
TRAINING = str(Path(__file__).parent / "training")
os.environ["PYTHONPATH"] = os.pathsep.join([TRAINING, *filter(None, [os.environ.get("PYTHONPATH")])])
sys.path.insert(0, TRAINING)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[str]:
    """Address of a local Ray cluster of 4 (logical) CPUs that lives as long as the test session; this process is
    connected.
    """
    import ray

    # Ray puts unix sockets below this folder: their path must stay under 108 characters.
    folder = tempfile.mkdtemp(prefix="tfray", dir="/tmp")
    context = ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=200 * 1024**2,
        _temp_dir=folder,
        log_to_driver=False,
        logging_level="warning",
    )
    yield context.address_info["address"]
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
