"""One optimiser step over many micro-batches. The only file that knows DeepSpeed.

In: a module, micro-batches, the number of genes scored by all ranks together, a learning rate.
Out: sums of the losses over all ranks, the gradient's norm; shards and whole weights for a checkpoint.

Two engines have one interface (`plain.Engine`): `ZeroEngine` (DeepSpeed, any number of ranks) and `PlainEngine` (one
process, nothing but torch), which is the reference that the other is tested against.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tftrain.errors import CheckpointError, RecipeError
from tftrain.models.arch import Batch
from tftrain.training.group import Group
from tftrain.training.optim import OptimConfig, adamw
from tftrain.training.plain import Engine, PlainEngine, StepResult, Sums, bad_batches, clip, set_rate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineConfig:
    """How the optimiser's state, gradients and weights are spread over ranks, and in which precision they compute."""

    zero_stage: int | None = 2
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimiser state, 2 also gradients, 3 also weights. None: no DeepSpeed, one
    process.
    """
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is bf16 on a GPU and fp32 on a CPU. With bf16 the optimiser keeps fp32 weights."""

    activation_checkpointing: bool = False
    """Keep only each block's input for the backward pass and compute the rest again: less memory, about a third more
    arithmetic.
    """
    compile: bool = False
    """Let `torch.compile` fuse what it can. Starting takes minutes longer; pays on a GPU."""
    peak_tflops: float | None = None
    """Of one device in the precision in use, for `perf/mfu`. None: from its data sheet where it is known."""

    def __post_init__(self) -> None:
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise RecipeError(f"engine.peak_tflops is {self.peak_tflops:g}; it must be above 0")
        if self.zero_stage not in (None, 0, 1, 2, 3):
            raise RecipeError(f"engine.zero_stage is {self.zero_stage!r}; it is 0, 1, 2, 3 or null (without DeepSpeed)")

    def precision_on(self, device: torch.device) -> Literal["fp32", "bf16"]:
        """The precision that `auto` stands for on `device`."""
        if self.precision == "auto":
            return "bf16" if device.type == "cuda" else "fp32"
        return self.precision

    def stage_on(self, device: torch.device) -> int | None:
        """The ZeRO stage in use: 0 becomes 1 with bf16, which diverges without fp32 weights in the optimiser."""
        return 1 if self.zero_stage == 0 and self.precision_on(device) == "bf16" else self.zero_stage


def build_engine(module: nn.Module, config: EngineConfig, optim: OptimConfig, group: Group) -> Engine:
    """The engine that `config` asks for, with `module` moved to the group's device.

    Raises RecipeError for a contradiction.
    """
    stage, precision = config.stage_on(group.device), config.precision_on(group.device)
    if config.compile:
        module.compile()
    if stage is None:
        return PlainEngine(module, precision, optim, group)
    if stage != config.zero_stage:
        log.warning("engine: ZeRO stage 0 has no fp32 weights to add bf16 updates to; stage %d is used instead", stage)
    return ZeroEngine(module, stage, precision, optim, group)


class ZeroEngine:
    """DeepSpeed ZeRO, stages 0 to 3."""

    TAG = "ds"

    def __init__(self, module: nn.Module, stage: int, precision: str, optim: OptimConfig, group: Group):
        deepspeed = _import_deepspeed(group)
        self.group, self.zero_stage, self.precision, self.clip_norm = group, stage, precision, optim.clip_norm
        module = module.to(group.device)
        self._is_held = False
        """True: a step clears the gradients and leaves weights and moments as they are."""
        self.deepspeed, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._holdable(adamw(module, optim, is_fused=group.device.type == "cuda")),
            config=_deepspeed_config(module, stage, precision, optim.clip_norm, group),
            dist_init_required=False,
        )
        self.module = self.deepspeed.module

    def step(self, batches: Sequence[Batch], n_scored_total: float, lr: float) -> StepResult:
        engine = self.deepspeed
        engine.train()
        set_rate(engine.optimizer, lr)
        # DeepSpeed averages gradients over ranks, so each rank's share is scaled up by their number.
        scale = self.group.world_size / n_scored_total
        sums = Sums()
        for index, batch in enumerate(batches):
            engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
            out = engine(batch.to(self.group.device))
            engine.backward(out["loss"] * scale, scale_wrt_gas=False)
            sums.add(out)
        totals = sums.totals(self.group)
        is_loss_finite = math.isfinite(totals["loss"])
        grad_norm = clip(self.module, None) if self.zero_stage == 0 else math.nan
        # Stages 1 to 3 look at the gradient by themselves; it must be let go of in any case.
        self._is_held = not is_loss_finite or (self.zero_stage == 0 and not math.isfinite(grad_norm))
        engine.step()
        self._is_held = False
        if self.zero_stage:
            grad_norm = float(engine.get_global_grad_norm())
        return StepResult(totals, grad_norm if is_loss_finite else math.nan, sums.bad_batches())

    def _holdable(self, optimizer: torch.optim.AdamW) -> torch.optim.AdamW:
        step = optimizer.step
        optimizer.step = lambda *args, **kw: None if self._is_held else step(*args, **kw)  # type: ignore[method-assign]
        return optimizer

    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        self.deepspeed.eval()
        sums = Sums()
        with torch.no_grad():
            for batch in batches:
                sums.add(self.deepspeed(batch.to(self.group.device)))
        return sums.totals(self.group)

    def bad_batches(self, batches: Sequence[Batch], *, of_gradient: bool) -> tuple[int, ...]:
        self.deepspeed.eval()
        of_gradient = of_gradient and self.zero_stage != 3

        def forward(batch: Batch) -> dict[str, Tensor]:
            return self.module(batch.to(self.group.device))

        return bad_batches(self.module, forward, batches, of_gradient=of_gradient)

    @contextlib.contextmanager
    def with_weights(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Only the weights that forward passes read are exchanged; the optimiser's own are not touched."""
        own: dict[str, Tensor] = {}
        for name, parameter in self._trained():
            with self._writable(parameter):
                own[name] = parameter.detach().clone()
                if self.group.rank == 0:
                    parameter.data.copy_(weights[name])
        try:
            yield
        finally:
            for name, parameter in self._trained():
                with self._writable(parameter):
                    parameter.data.copy_(own[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)

    @contextlib.contextmanager
    def _writable(self, parameter: nn.Parameter) -> Iterator[None]:
        """The whole parameter; what rank 0 writes is what all ranks have afterwards."""
        import deepspeed

        if self.zero_stage == 3:
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                yield
        else:
            yield
            torch.distributed.broadcast(parameter.data, 0)

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                value = safe_get_full_fp32_param(parameter) if self.zero_stage else parameter.detach()
                if self.group.rank == 0:
                    whole[name] = value.float().cpu().reshape(getattr(parameter, "ds_shape", parameter.shape)).clone()
        return whole

    def save_shards(self, folder: Path) -> None:
        """See Engine.

        An error of writing is raised after the last collective, so that no rank waits for another for ever: every file
        goes through `write_or_note`, and those that DeepSpeed writes by other ways (a copy of its conversion script, a
        file that names the newest tag) are left out.
        """
        writer = self.deepspeed.checkpoint_engine
        errors: list[Exception] = []
        try:
            (folder / self.TAG).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            errors.append(error)
        if any(self.group.gather(bool(errors))):
            raise errors[0] if errors else OSError("another rank could not make its folder")
        write = writer.save

        def write_or_note(state_dict: Any, path: str) -> None:
            try:
                write(state_dict, path)
                _flush_to_disk(path)
            except (OSError, RuntimeError) as error:
                errors.append(error)

        writer.save = write_or_note
        self.deepspeed._copy_recovery_script = lambda path: None
        try:
            self.deepspeed.save_checkpoint(str(folder), tag=self.TAG, exclude_frozen_parameters=True, save_latest=False)
        finally:
            del writer.save
        if errors:
            raise errors[0]

    def load_shards(self, folder: Path) -> None:
        self._load(folder, self.TAG)

    def load_universal(self, folder: Path, *, is_shared: bool) -> None:
        target = folder / "universal"
        problem = None
        if (self.group.rank == 0 or not is_shared) and not target.exists():
            problem = _convert_to_universal(folder / self.TAG, target)
        problems = [text for text in self.group.gather(problem) if text]
        if problems:
            raise CheckpointError(
                f"DeepSpeed could not convert {folder} for {self.group.world_size} ranks: {problems[0]}"
            )
        self.deepspeed._config.load_universal_checkpoint = True
        try:
            self._load(folder, target.name)
        finally:
            self.deepspeed._config.load_universal_checkpoint = False

    def _load(self, folder: Path, tag: str) -> None:
        optimizer = self.deepspeed.optimizer
        settings = [{name: group[name] for name in group if name != "params"} for group in optimizer.param_groups]
        try:
            path, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag, load_module_strict=False)
        except Exception as error:
            raise CheckpointError(f"DeepSpeed cannot read the shards in {folder / tag}: {error}") from error
        if path is None:
            raise CheckpointError(
                f"{folder / tag} holds no DeepSpeed shards; start from another checkpoint or another `out`"
            )
        # DeepSpeed 0.19.8 restores a universal ZeRO-3 checkpoint with the first group's settings (its weight decay) in
        # every group, and one step counter shared by all of them, which then counts once a group. Settings come from
        # the recipe.
        for group, own in zip(optimizer.param_groups, settings):
            group.update(own)
        for state in getattr(optimizer, "optimizer", optimizer).state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()


def _convert_to_universal(source: Path, target: Path) -> str | None:
    """Runs DeepSpeed's converter in a process of its own; returns what went wrong."""
    part = target.with_name(target.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(part)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DS_ACCELERATOR": "cpu"})
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    part.rename(target)
    return None


def _flush_to_disk(path: str) -> None:
    """So that a marker that outlives a power cut does not stand beside empty files."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _deepspeed_config(module: nn.Module, stage: int, precision: str, clip_norm: float | None, group: Group) -> dict:
    """DeepSpeed's own configuration. Batch sizes in it are placeholders: the caller owns accumulation."""
    n_trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    largest = max(p.numel() for p in module.parameters())
    # A bucket is allocated whole: DeepSpeed's 5e8 elements take 2 GB even for a tiny model. Stages 1, 2 want it even.
    bucket = 2 * math.ceil(max(min(n_trainable, 50_000_000), min(largest, 200_000_000)) / 2)
    zero = {
        "stage": stage,
        "overlap_comm": group.device.type == "cuda",
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": clip_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }


def _import_deepspeed(group: Group) -> Any:
    """DeepSpeed, quiet, on the group's device, without compiling any of its operators, and joined to torch's group."""
    os.environ.setdefault("DS_ACCELERATOR", group.device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # The shared-memory operator serves inference only; where it counts as compatible every worker compiles it for 90 s,
    # or dies without ninja. Setting the table also skips DeepSpeed's probe of every compiler and library.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if group.device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    return deepspeed
