"""The Ray cluster of a run: what a recipe asks of it, and the connection to it.

In: the recipe's `ray:` block. Out: a connection for the time of a run, and the environment of a worker process.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from tftrain.errors import RecipeError


@dataclass(frozen=True)
class RayConfig:
    """What a job asks of the Ray cluster."""

    num_workers: int | list[int] = 1
    """Training workers (ranks), one GPU each with `use_gpu`; 0 runs one rank in the calling process without Ray.
    `[least, most]`: as many as the cluster has room for, and another number when that changes (a lost node, a new one);
    each change goes on from the newest checkpoint.
    """
    use_gpu: bool = False
    cpus_per_worker: float = 1.0
    max_failures: int = 3
    """Restarts of the worker group after a killed worker or node before the job gives up."""
    resize_every_s: float = 60.0
    """With `[least, most]`: seconds between two looks whether the cluster has room for another number of workers."""
    address: str | None = None
    """Of a running cluster; none: RAY_ADDRESS, or else a local cluster of this machine for the time of the run."""
    local_cpus: int | None = None
    """CPUs that a local cluster offers; none: what its workers and readers ask for. Without effect on a running one."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray spreads the workers over nodes."""

    def __post_init__(self) -> None:
        if isinstance(self.num_workers, list):
            if len(self.num_workers) != 2 or not 1 <= self.num_workers[0] <= self.num_workers[1]:
                raise RecipeError(
                    f"ray.num_workers is {self.num_workers}; give one number, or [least, most] with 1 <= least <= most"
                )
        elif self.num_workers < 0:
            raise RecipeError(f"ray.num_workers is {self.num_workers}; it must be at least 0")

    @property
    def least_workers(self) -> int:
        """Without these the run waits."""
        return self.num_workers[0] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def most_workers(self) -> int:
        """There are never more."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers


@contextlib.contextmanager
def connected(config: RayConfig, reader_cpus: float, say: Callable[[str], None]) -> Iterator[None]:
    """A connection to Ray: the one at hand, a running cluster's, or a local cluster for the time of the block.

    `reader_cpus` are the CPUs that reading takes beside the workers. Raises RecipeError for a local cluster without
    them; on a running one, which may grow, `say` is told what the run waits for.
    """
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        # A local cluster in Ray's default token mode would leave a token behind that changes how clusters start later.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray

    needed_cpus = config.most_workers * config.cpus_per_worker + reader_cpus
    is_ours = not ray.is_initialized()
    if is_ours and not address and config.local_cpus is not None and config.local_cpus < needed_cpus:
        raise RecipeError(
            f"ray.local_cpus is {config.local_cpus} and {config.most_workers} workers with their readers need "
            f"{needed_cpus:g} CPUs; raise it (they are shares of time, not cores), or lower ray.num_workers, "
            "ray.cpus_per_worker or data.stream.reader_cpus"
        )
    if is_ours:
        # Ray refuses num_cpus beside the address of a running cluster.
        n_cpus = config.local_cpus or max(os.cpu_count() or 1, math.ceil(needed_cpus))
        local: dict[str, Any] = {} if address else {"num_cpus": n_cpus}
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.WARNING,
            include_dashboard=None if address else False,
            **local,
        )
    for name in ("ray.train", "ray.data"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        has = ray.cluster_resources()
        least_cpus = config.least_workers * config.cpus_per_worker + reader_cpus
        for kind, needed in (("CPU", least_cpus), ("GPU", config.least_workers if config.use_gpu else 0)):
            if needed > has.get(kind, 0):
                say(f"waiting: the run needs {needed:g} {kind}s, the Ray cluster has {has.get(kind, 0):g} so far")
        yield
    finally:
        if is_ours:
            ray.shutdown()


def worker_environment(config: RayConfig) -> dict[str, str]:
    """Of a worker process, set before it imports anything."""
    return {
        "DS_ACCELERATOR": "cuda" if config.use_gpu else "cpu",
        "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }
