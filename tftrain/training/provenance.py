"""What ran where: versions, source commit and machine, for manifests and for W&B's configuration of a run."""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tftrain.training.group import Group


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    found = {"python": platform.python_version()}
    for name in ("tftrain", "torch", "deepspeed", "ray", "tiledbsoma", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


@cache
def git_commit() -> str | None:
    """The commit of the source tree that runs, or None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def system(group: Group) -> dict[str, Any]:
    """The machine of this rank and the number of ranks."""
    is_cuda = group.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": torch.cuda.get_device_name(group.device) if is_cuda else "cpu",
        "world_size": group.world_size,
        "versions": versions(),
        "git_commit": git_commit(),
    }
