"""Low-rank adapters by PEFT: wrapped around a module before its engine exists, saved and read in PEFT's own format.

In: a module and the recipe's `lora:` block. Out: the same module with adapters inside it, of which alone the
parameters require a gradient; and the folder `adapter/` (adapter_config.json, adapter_model.safetensors), which
`peft.PeftModel.from_pretrained(base_module, folder)` reads. PEFT is imported where it is used: it takes seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tftrain.errors import CheckpointError, RecipeError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
NAME = "default"
"""Of the one adapter, in the names of parameters."""
PREFIX = "base_model.model."
"""Before every key of PEFT's files."""
BEGINS_AT_ZERO = (".lora_B.", ".lora_embedding_A")
"""Marks of the half of each adapter that is zero before training, so that the adapter then adds nothing."""


@dataclass(frozen=True)
class LoraBlock:
    """Which adapters, in PEFT's names."""

    r: int = 8
    """Rank of an adapter."""
    lora_alpha: float = 16.0
    """What an adapter adds is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    target_modules: list[str] | None = None
    """Names of linear or embedding modules, or ends of names (`linear1` is that of every block). None: what the
    architecture proposes."""
    modules_to_save: list[str] | None = None
    """Modules that are trained whole and saved with the adapter, such as the rows of new genes."""
    use_dora: bool = False
    """Weight-decomposed adapters (DoRA); not under ZeRO-3."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (rsLoRA)."""

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha <= 0:
            raise RecipeError(f"lora.r is {self.r} and lora.lora_alpha is {self.lora_alpha:g}; both must be above 0")
        if not 0 <= self.lora_dropout < 1:
            raise RecipeError(f"lora.lora_dropout is {self.lora_dropout:g}; it must be at least 0 and below 1")
        if self.target_modules == []:
            raise RecipeError("lora.target_modules is empty; name modules, or leave it out for the usual ones")


def wrap(module: nn.Module, block: LoraBlock, default_targets: Sequence[str]) -> None:
    """Puts adapters into `module` (torch's global generator) and freezes everything else but `modules_to_save`.

    Raises RecipeError for a name that matches no module, with those that there are, and for a module of a kind that
    no adapter fits.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    targets = list(default_targets) if block.target_modules is None else block.target_modules
    named = dict(module.named_modules())
    fitting = [name for name, child in named.items() if type(child) in (nn.Linear, nn.Embedding)]
    for key, given, possible in (
        ("target_modules", targets, fitting),
        ("modules_to_save", block.modules_to_save or [], [name for name in named if name]),
    ):
        for target in given:
            matched = [name for name in named if name == target or name.endswith(f".{target}")]
            if not matched:
                raise RecipeError(f"lora.{key} has {target!r}, which matches no module; there are {_listed(possible)}")
            unfit = [name for name in matched if name not in possible]
            if unfit:
                raise RecipeError(
                    f"lora.{key} has {target!r}, and {unfit[0]} is a {type(named[unfit[0]]).__name__}, which takes no "
                    f"adapter; name it as lora.modules_to_save, or of {_listed(possible)}"
                )
    LoraModel(
        module,
        LoraConfig(
            r=block.r,
            lora_alpha=block.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=block.lora_dropout,
            target_modules=targets,
            modules_to_save=block.modules_to_save,
            use_dora=block.use_dora,
            use_rslora=block.use_rslora,
        ),
        NAME,
    )


def _listed(names: Sequence[str]) -> str:
    """The ends of the names, each once: `linears.0` stands for that of every block."""
    ends = dict.fromkeys(_end(name) for name in names)
    return ", ".join(ends)


def _end(name: str) -> str:
    """The last part of a dotted name that is no number, and what follows it."""
    parts = name.split(".")
    at = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[at:])


def trainable_share(module: nn.Module) -> str:
    """`trains 9,216 of 120,000 parameters (7.68 %)`."""
    counts = [(p.numel(), p.requires_grad) for p in module.parameters()]
    trained, total = sum(n for n, is_trained in counts if is_trained), sum(n for n, _ in counts)
    return f"trains {trained:,} of {total:,} parameters ({100 * trained / max(1, total):.2f} %)"


def is_wrapped(module: nn.Module) -> bool:
    """Whether the module holds an adapter."""
    return hasattr(module, "peft_config")


def names_in_file(module: nn.Module) -> dict[str, str]:
    """Name of each trained parameter of a wrapped module -> its key in PEFT's file."""
    from peft import get_peft_model_state_dict

    # PEFT renames what it is given: a tensor a name, told apart by its value, shows what becomes of each.
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    marked = {name: torch.tensor(float(number)) for number, name in enumerate(names)}
    renamed = get_peft_model_state_dict(module, state_dict=marked, adapter_name=NAME)
    found = {names[int(value)]: f"{PREFIX}{key}" for key, value in renamed.items()}
    assert found.keys() == set(names), f"PEFT does not save {set(names) - found.keys()}"
    return found


def save(module: nn.Module, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes `weights` (of the trained parameters of a wrapped module, by their names) in PEFT's format."""
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = module.peft_config[NAME]  # type: ignore[index, union-attr]
    was_for_inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(folder))
    finally:
        config.inference_mode = was_for_inference
    keys = names_in_file(module)
    state = {keys[name]: weights[name].detach().cpu().contiguous() for name in keys}
    save_file(state, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def read(folder: Path) -> dict[str, Tensor]:
    """What PEFT's weight file holds, by its keys."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def unmoved(state: Mapping[str, Tensor]) -> list[str]:
    """Keys of tensors of PEFT's file that are empty, or zero where training moves every one away from zero."""
    is_begun = {key: any(mark in f"{key}." for mark in BEGINS_AT_ZERO) for key in state}
    return [key for key, value in state.items() if not value.numel() or (is_begun[key] and not value.any())]


def merged(module: nn.Module, folder: Path) -> nn.Module:
    """`module`, whose weights are the base, with the adapter in `folder` added to them. Raises CheckpointError."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(module, str(folder)).merge_and_unload()  # type: ignore[arg-type, operator]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{folder}: PEFT cannot read the adapter: {str(error).splitlines()[0]}") from error
