"""Runs a function on W gloo ranks, each a process of this machine, and returns what every rank returned."""

from __future__ import annotations

import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.multiprocessing


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[W]: `function(*arguments)` of each rank. `function` stands at the top of its module. An error of any rank is
    raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank_main, args=(world, port, folder, function, arguments), nprocs=world)
        return [pickle.loads((Path(folder) / f"{rank}.pkl").read_bytes()) for rank in range(world)]


def _rank_main(rank: int, world: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)
    (Path(folder) / f"{rank}.pkl").write_bytes(pickle.dumps(function(*arguments)))
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
