"""The driver: starts the workers of a run on Ray (or one in this process), shows how far they are, reports their
errors.

In: a worker function by import path and its payload. Out: what rank 0's worker returned; or its error, in one line,
where it is one that the user can act on. Workers talk to the driver through a Channel: metrics, lines of text, errors.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from tftrain import errors
from tftrain.errors import RecipeError, TftrainError, TrainingError
from tftrain.recipe import RayConfig


class Channel(Protocol):
    """What a worker function gets beside its payload. Only rank 0's reports are shown."""

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Moves the progress line. Returns at once."""
        ...

    def say(self, line: str) -> None:
        """Prints one line above the progress line. Returns at once."""
        ...


Worker = Callable[[Mapping[str, Any], Channel], Any]
"""Runs one rank: joins the others by `training.group.join_group` and returns something small and picklable."""


class Display:
    """The progress of a run: a live line on a terminal; elsewhere a line now and then. Is itself a Channel."""

    SILENT_S = 10.0
    """Least seconds between two lines where there is no terminal; lines with a held-out loss always appear."""

    def __init__(self, title: str = "train", console: Console | None = None):
        self._title = title
        self._console = console or Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._shown_step, self._shown_at = -1, -math.inf
        self._shown_heldout: float | None = None
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, line: str) -> None:
        """Prints one line, above the live line where there is one."""
        self._console.print(line, markup=False, highlight=False)

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Shows step `step` of `total_steps`; nothing new is shown for a step that was shown."""
        if step == self._shown_step:
            return
        now = time.monotonic()
        self._first = self._first or (step, now)
        text = _summary(metrics)
        if self._console.is_terminal:
            self._show_live(step, total_steps, text)
        elif (
            step == total_steps
            or now - self._shown_at >= self.SILENT_S
            or metrics.get("val/loss") != self._shown_heldout
        ):
            done, seconds = step - self._first[0], now - self._first[1]
            left = f"{_clock(seconds / done * (total_steps - step))} left" if done else "starting"
            self._console.print(
                f"{self._title} {step}/{total_steps}  {text}  {left}", markup=False, highlight=False, soft_wrap=True
            )
            self._shown_at, self._shown_heldout = now, metrics.get("val/loss")
        self._shown_step = step

    def _show_live(self, step: int, total_steps: int, text: str) -> None:
        if self._bar is None:
            columns = [TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()]
            columns += [
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            ]
            self._bar = Progress(*columns, console=self._console, speed_estimate_period=120)
            self._bar.start()
        if self._task is None:
            # Remaining time counts from the step that this run began at, which a resumed run did not start from.
            self._task = self._bar.add_task(self._title, total=total_steps, completed=step, numbers=text)
        self._bar.update(self._task, completed=step, total=total_steps, numbers=text)


def _summary(metrics: Mapping[str, float]) -> str:
    """`loss 3.214  val 3.301  120 cells/s`, of what there is."""
    shown = (("train/loss", "loss {:.4f}"), ("val/loss", "val {:.4f}"), ("perf/cells_per_s", "{:,.0f} cells/s"))
    return "  ".join(text.format(metrics[name]) for name, text in shown if name in metrics)


def _clock(seconds: float) -> str:
    """`1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def launch(
    worker: str | Worker,
    payload: Mapping[str, Any],
    config: RayConfig,
    *,
    out: str,
    title: str = "train",
    reader_cpus: float = 0.0,
) -> Any:
    """Runs `worker(payload, channel)` on `config.num_workers` ranks; returns what rank 0 returned.

    `worker` is `package.module:function`, imported by each worker. With 0 workers it runs here, without Ray. A killed
    worker or node restarts all of them, `config.max_failures` times; an error of the input (TftrainError) does not,
    and is raised here as it was there. `reader_cpus` are the CPUs that reading takes beside the workers: a cluster
    without them is refused.
    """
    with Display(title) as display:
        if config.num_workers == 0:
            os.environ["DS_ACCELERATOR"] = "cuda" if config.use_gpu else "cpu"
            with _log_to(display):
                return _resolve(worker)(payload, display)
        with _cluster(config, reader_cpus, display):
            return _launch_on_ray(worker, payload, config, out, display)


def _launch_on_ray(
    worker: str | Worker, payload: Mapping[str, Any], config: RayConfig, out: str, display: Display
) -> Any:
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    relay = ray.remote(num_cpus=0)(_Relay).remote()
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={"worker": worker, "payload": dict(payload), "relay": relay},
        torch_config=TorchConfig(backend="nccl" if config.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=config.use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker, **({"GPU": 1} if config.use_gpu else {})},
            placement_strategy=config.placement,
        ),
        # Ray Train writes nothing of ours here: our checkpoints have their own marker and their own place.
        run_config=RunConfig(  # type: ignore[call-arg]
            name="ray",
            storage_path=out if "://" in out else str(Path(out).absolute()),
            failure_config=FailureConfig(max_failures=config.max_failures),
            worker_runtime_env={"env_vars": _worker_environment(config)},
        ),
    )
    fitting = _Fitting(trainer.fit)
    while fitting.is_running(for_s=0.5):
        _show_news(relay, display)
        # Raised while Ray is still restarting the workers, who then see it and end: nobody waits for them.
        _raise_failure(relay)
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

    def __init__(self, relay: Any, *, is_heard: bool):
        self._relay, self._is_heard = relay, is_heard

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        if self._is_heard:
            self._relay.report.remote(step, total_steps, dict(metrics))

    def say(self, line: str) -> None:
        if self._is_heard:
            self._relay.say.remote(line)


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
def _cluster(config: RayConfig, reader_cpus: float, display: Display) -> Iterator[None]:
    """A connection to Ray: the one at hand, a running cluster's, or a local cluster for the time of the block."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    if not address:
        # A local cluster in Ray's default token mode would leave a token behind that changes how clusters start later.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    import ray

    needed_cpus = config.num_workers * config.cpus_per_worker + reader_cpus
    is_ours = not ray.is_initialized()
    if is_ours and not address and config.local_cpus is not None and config.local_cpus < needed_cpus:
        raise RecipeError(
            f"ray.local_cpus is {config.local_cpus} and {config.num_workers} workers with their readers need "
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
        for kind, needed in (("CPU", needed_cpus), ("GPU", config.num_workers if config.use_gpu else 0)):
            if needed > has.get(kind, 0):
                display.say(
                    f"waiting: the run needs {needed:g} {kind}s, the Ray cluster has {has.get(kind, 0):g} so far"
                )
        yield
    finally:
        if is_ours:
            ray.shutdown()


def _worker_environment(config: RayConfig) -> dict[str, str]:
    """Of a worker process, set before it imports anything."""
    return {
        "DS_ACCELERATOR": "cuda" if config.use_gpu else "cpu",
        "OMP_NUM_THREADS": str(max(1, int(config.cpus_per_worker))),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning",
    }


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
