"""The parts of an evaluation as Ray tasks: every representation of every data set, and every task, side by side.

In: data sets and the names of representations; then the bench. Out: the same arrays and findings as in one process. A
part that fails raises its own error here. Each part that embeds loads the checkpoint for itself.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tftrain.cluster import RayConfig, worker_environment
from tftrain.embed import load_embedder
from tftrain.evals import baselines, models
from tftrain.evals.contract import Bench, Dataset, Findings


def represent(
    checkpoint: str,
    datasets: Sequence[Dataset],
    names: Sequence[str],
    config: RayConfig,
    *,
    seed: int,
    fresh_seed: int,
    orthologs: str | None,
) -> dict[str, dict[str, np.ndarray]]:
    """Representation -> data set -> (C, D), in the order of `names`."""
    import ray

    embed = _remote(_embed, config, gpus=1 if config.use_gpu else 0)
    fit = _remote(_fit, config)
    one = {dataset.name: ray.put(dataset) for dataset in datasets}
    every = ray.put(list(datasets))
    parts: dict[str, Any] = {
        name: {of: embed.remote(checkpoint, name, dataset, fresh_seed) for of, dataset in one.items()}
        if name in ("trained", "untrained")
        else fit.remote(name, every, seed, orthologs)
        for name in names
    }
    return {
        name: {of: get(ref) for of, ref in part.items()} if isinstance(part, dict) else get(part)
        for name, part in parts.items()
    }


def start_tasks(bench: Bench, modules: Mapping[str, str], config: RayConfig) -> dict[str, Any]:
    """Task -> its findings to come. `modules` names the module of each task; none of them may need the model itself."""
    import ray

    judge = _remote(_judge, config)
    shared = ray.put(dataclasses.replace(bench, score={}))
    return {name: judge.remote(module, shared) for name, module in modules.items()}


def _remote(function: Any, config: RayConfig, gpus: float = 0) -> Any:
    import ray

    environment = {"env_vars": worker_environment(config)}
    return ray.remote(function).options(
        num_cpus=config.cpus_per_worker, num_gpus=gpus, max_retries=config.max_failures, runtime_env=environment
    )


def get(ref: Any) -> Any:
    """The result, or the part's own error."""
    import ray

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None


def _embed(checkpoint: str, name: str, dataset: Dataset, fresh_seed: int) -> np.ndarray:
    embedder = load_embedder(checkpoint)
    return models.embed(embedder if name == "trained" else models.untrained(embedder, fresh_seed), dataset)


def _fit(name: str, datasets: list[Dataset], seed: int, orthologs: str | None) -> dict[str, np.ndarray]:
    return baselines.BASELINES[name](datasets, seed=seed, orthologs=orthologs)


def _judge(module: str, bench: Bench) -> Findings:
    return importlib.import_module(module).run(bench)
