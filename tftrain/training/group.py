"""The ranks of a run and the few words they exchange: facts of a step, objects, a barrier.

In: an already joined torch process group (Ray Train's), the environment of one (RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), or neither: then this process is rank 0 of 1. Shapes: W ranks, K numbers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


@dataclass(frozen=True)
class Group:
    """This process among the ranks. Every method but the properties is collective: all ranks must call it."""

    rank: int
    world_size: int
    device: torch.device

    def share(self, numbers_K: Sequence[float]) -> list[list[float]]:
        """[W][K]: the numbers of every rank, in float64."""
        mine = torch.tensor(list(numbers_K), dtype=torch.float64, device=self.device)
        all_WK = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(all_WK, mine)
        return torch.stack(all_WK).tolist()

    def total(self, numbers_K: Sequence[float]) -> list[float]:
        """[K]: the sum over ranks of each number, in float64 and in the order of ranks."""
        return [sum(column) for column in zip(*self.share(numbers_K))]

    def gather(self, value: T) -> list[T]:
        """[W]: the (small, picklable) value of every rank."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def barrier(self) -> None:
        """Returns when every rank has called it."""
        self.share([0.0])


def training_device() -> torch.device:
    """CUDA where DeepSpeed's own switch DS_ACCELERATOR says so or, without it, where a GPU is visible; else the CPU."""
    wanted = os.environ.get("DS_ACCELERATOR") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cpu":
        return torch.device("cpu")
    # Ray Train has set the current device of each worker already.
    return torch.device("cuda", torch.cuda.current_device())


def join_group(device: torch.device | None = None) -> Group:
    """Joins this process to the group described above, once; gloo on a CPU and NCCL on a GPU."""
    device = device or training_device()
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Group(dist.get_rank(), dist.get_world_size(), device)
