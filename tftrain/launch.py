"""The driver: starts the workers of a run on Ray (or one in this process), shows how far they are, reports their
errors.

In: a worker function by import path and its payload. Out: what rank 0's worker returned; or its error, in one line,
where it is one that the user can act on. Workers talk to the driver through a Channel: metrics, lines of text, errors.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from tftrain import errors
from tftrain.cells.stream import ALLOCATOR
from tftrain.cluster import RayConfig, connected, worker_environment
from tftrain.display import Channel, Display
from tftrain.errors import TftrainError, TrainingError
from tftrain.stop import Stop

__all__ = ["Channel", "Display", "RayConfig", "Stop", "Worker", "launch"]

Worker = Callable[[Mapping[str, Any], Channel], Any]
"""Runs one rank: joins the others by `training.group.join_group` and returns something small and picklable."""


class Beside(Protocol):
    """What the driver does on the cluster while workers train; see `beside.Beside`."""

    def poll(self, say: Callable[[str], None]) -> None:
        """Called several times a second; returns at once."""
        ...

    def finish(self, say: Callable[[str], None]) -> None:
        """Waits for all that is due."""
        ...

    def cancel(self) -> None:
        """Ends what is under way."""
        ...


def launch(
    worker: str | Worker,
    payload: Mapping[str, Any],
    config: RayConfig,
    *,
    out: str,
    title: str = "train",
    reader_cpus: float = 0.0,
    stop: Stop | None = None,
    beside: Beside | None = None,
) -> Any:
    """Runs `worker(payload, channel)` on `config.num_workers` ranks; returns what rank 0 returned.

    `worker` is `package.module:function`, imported by each worker. With 0 workers it runs here, without Ray. A killed
    worker or node restarts all of them, `config.max_failures` times; an error of the input (TftrainError) does not,
    and is raised here as it was there. `reader_cpus` are the CPUs that reading takes beside the workers: a cluster
    without them is refused. SIGTERM and SIGINT are noted in `stop`, of which the workers learn through their channels.
    `beside` does other things on the cluster meanwhile; they are waited for, unless the run was stopped.
    """
    stop = stop or Stop()
    with Display(title, stop=stop) as display:
        if config.num_workers == 0:
            os.environ["DS_ACCELERATOR"] = "cuda" if config.use_gpu else "cpu"
            with _log_to(display), stop.listening():
                return _resolve(worker)(payload, display)
        with connected(config, reader_cpus, display.say), stop.listening():
            if beside is None:
                return _launch_on_ray(worker, payload, config, out, display, stop, None)
            try:
                outcome = _launch_on_ray(worker, payload, config, out, display, stop, beside)
                if not stop.is_asked:
                    beside.finish(display.say)
                return outcome
            finally:
                beside.cancel()


def _launch_on_ray(
    worker: str | Worker,
    payload: Mapping[str, Any],
    config: RayConfig,
    out: str,
    display: Display,
    stop: Stop,
    beside: Beside | None,
) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # On the driver's own node: it must outlive every other one.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    relay: Any = ray.remote(_Relay).options(num_cpus=0, scheduling_strategy=here).remote()
    n_workers: Any = config.num_workers if isinstance(config.num_workers, int) else tuple(config.num_workers)
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "payload": dict(payload), "relay": relay},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=n_workers,
            elastic_resize_monitor_interval_s=config.resize_every_s,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
            placement_strategy=config.placement,
        ),
        # Ray Train writes nothing of ours here: our checkpoints have their own marker and their own place.
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=out if "://" in out else str(Path(out).absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": {**ALLOCATOR, **worker_environment(config)}},
        ),
    )
    fitting, is_told = _Fitting(trainer.fit), False
    while fitting.is_running(for_s=0.2):
        _show_news(relay, display)
        if beside:
            beside.poll(display.say)
        # Raised while Ray is still restarting the workers, who then see it and end: nobody waits for them.
        _raise_failure(relay)
        if stop.signal and not is_told:
            display.say(f"{stop.signal.name}: saving after the step under way; once more ends at once")
            ray.get(relay.ask_to_stop.remote())
            is_told = True
    _show_news(relay, display)
    _raise_failure(relay)
    error = fitting.error
    if error is None:
        return fitting.result.return_value
    failures = list(getattr(error, "worker_failures", {}).items())
    if not failures:
        raise error
    rank, cause = failures[0]
    raise TrainingError(
        f"the run failed for good after {config.max_failures} restarts (ray.max_failures); "
        f"the last error, of rank {rank}, was:\n{str(cause).strip()}\n"
        f"The same command continues from the newest checkpoint in {out}"
    ) from error


class _Fitting:
    """A Ray Train run in a thread, so that this one stays free to show news and to be interrupted."""

    def __init__(self, fit: Callable[[], Any]):
        self.result: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(fit,), name="ray-train", daemon=True)
        self._thread.start()

    def is_running(self, for_s: float) -> bool:
        """Waits at most so long for the end."""
        self._thread.join(timeout=for_s)
        return self._thread.is_alive()

    def _run(self, fit: Callable[[], Any]) -> None:
        try:
            self.result = fit()
        except BaseException as error:  # raised again by the main thread
            self.error = error


def _run_worker(config: dict[str, Any]) -> Any:
    """One rank, inside a Ray Train worker."""
    import ray
    import ray.train

    relay, rank = config["relay"], ray.train.get_context().get_world_rank()
    if ray.get(relay.failure.remote()) is not None:
        # Ray restarts workers after any error. One of the input would only come again: end here, the driver raises it.
        return None
    channel = _RelayChannel(relay, is_heard=rank == 0)
    try:
        with _log_to(channel):
            return _resolve(config["worker"])(config["payload"], channel)
    except TftrainError as error:
        ray.get(relay.fail.remote(type(error).__name__, str(error)))
        raise
    finally:
        # What was sent last must have arrived before this process ends.
        ray.get(relay.failure.remote())


class _Relay:
    """An actor between workers and driver. It lives as long as the driver."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._progress: tuple[int, int, dict[str, float]] | None = None
        self._failure: tuple[str, str] | None = None
        self._is_stop_asked = False

    def ask_to_stop(self) -> None:
        self._is_stop_asked = True

    def is_stop_asked(self) -> bool:
        return self._is_stop_asked

    def report(self, step: int, total_steps: int, metrics: dict[str, float]) -> None:
        # A line may carry a held-out loss that the ones after it do not: keep what is not replaced.
        self._progress = (step, total_steps, {**(self._progress[2] if self._progress else {}), **metrics})

    def say(self, line: str) -> None:
        self._lines.append(line)

    def fail(self, kind: str, message: str) -> None:
        self._failure = self._failure or (kind, message)

    def failure(self) -> tuple[str, str] | None:
        return self._failure

    def news(self) -> tuple[list[str], tuple[int, int, dict[str, float]] | None]:
        """Lines since the last call, and the newest progress."""
        lines, self._lines = self._lines, []
        return lines, self._progress


class _RelayChannel:
    """A worker's end of the relay."""

    ASK_EVERY_S = 0.3

    def __init__(self, relay: Any, *, is_heard: bool):
        self._relay, self._is_heard = relay, is_heard
        self._answer: Any = None
        self._asked_at = 0.0
        self._is_stop_asked = False

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        if self._is_heard:
            self._relay.report.remote(step, total_steps, dict(metrics))

    def say(self, line: str) -> None:
        if self._is_heard:
            self._relay.say.remote(line)

    def is_stop_asked(self) -> bool:
        """One rank that knows is enough: the trainer tells the others. The answer may be some 0.3 s old."""
        import ray

        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._is_stop_asked, self._answer = ray.get(self._answer), None
        if self._is_heard and self._answer is None and time.monotonic() - self._asked_at > self.ASK_EVERY_S:
            self._answer, self._asked_at = self._relay.is_stop_asked.remote(), time.monotonic()
        return self._is_stop_asked


def _show_news(relay: Any, display: Display) -> None:
    import ray

    lines, progress = ray.get(relay.news.remote())
    for line in lines:
        display.say(line)
    if progress:
        display.report(*progress)


def _raise_failure(relay: Any) -> None:
    """Raises the TftrainError that a worker met, as the same class with the same message."""
    import ray

    failure = ray.get(relay.failure.remote())
    if failure:
        kind, message = failure
        raise getattr(errors, kind, TftrainError)(message)


@contextlib.contextmanager
def _log_to(channel: Channel) -> Iterator[None]:
    """Sends what the package logs in this process to the channel."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            channel.say(record.getMessage())

    handler, log = Handler(logging.INFO), logging.getLogger("tftrain")
    log.addHandler(handler)
    before, log.level = log.level, logging.INFO
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def _resolve(worker: str | Worker) -> Worker:
    if callable(worker):
        return worker
    module, _, name = worker.partition(":")
    return getattr(importlib.import_module(module), name)
