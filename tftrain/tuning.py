"""Fine-tuning: what a recipe leaves to its checkpoint, and a trained model made ready to go on.

In: a FinetuneRecipe. Out: the same recipe with everything in it that workers need (`resolve`); the module with its
adapters and head (`adapted`); the labels of its cells (`read_labels`).
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from torch import nn

from tftrain.cells import labels as label_values
from tftrain.cells.contract import Cells
from tftrain.cells.labels import Labels
from tftrain.cells.read import read_obs, read_rows
from tftrain.cells.source import Source, SourceConfig
from tftrain.cells.vocab import Vocab
from tftrain.errors import CheckpointError, RecipeError
from tftrain.models.arch import Architecture
from tftrain.models.heads import Labeller, LabellingArchitecture
from tftrain.models.transcriptformer.upstream import is_published
from tftrain.pretrained import Pretrained, grown, load_pretrained, own_checkpoint
from tftrain.recipe import SHEBANG, FinetuneDataConfig, FinetuneRecipe, parse, to_dict
from tftrain.training import lora
from tftrain.training.adapter import TunedFiles
from tftrain.training.checkpoint import CheckpointStore
from tftrain.training.early import EarlyStop
from tftrain.training.folder import Folder
from tftrain.training.group import Group
from tftrain.training.metrics import read_metrics
from tftrain.training.trainer import AgreedStep, agree_step

CHECK_CELLS = 8
"""Cells on which an adapter that was read back is compared with the live one."""


def stores_folder(recipe: FinetuneRecipe) -> str:
    """Where stores of `data.files` lie."""
    return f"{recipe.out}/cells"


def build_commands(recipe: FinetuneRecipe) -> list[str]:
    """Command lines that make stores of `data.files`; repeatable. Raises RecipeError for an `out` that is no folder of
    this machine."""
    data = recipe.data
    if not data.files:
        return []
    if "://" in recipe.out:
        raise RecipeError(
            f"data.files makes stores below `out`, which is {recipe.out}; build them with `tftrain-data build` where "
            "the workers find them and name them as data.sources, or give a local `out`"
        )
    options = [f"--gene-table={table}" for table in data.gene_table]
    for flag, value in (
        ("--species", data.species),
        ("--species-from", data.species_from),
        ("--gene-col-name", data.gene_col_name),
    ):
        options += [flag, value] if value else []
    options += ["--sum-duplicates"] if data.sum_duplicates else []
    return [shlex.join(["tftrain-data", "build", stores_folder(recipe), *data.files, *options])]


def with_absolute_paths(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The paths that fine-tuning adds made absolute."""
    files = [str(Path(path).expanduser().absolute()) for path in recipe.data.files]
    origin = recipe.init_from if "://" in recipe.init_from else str(Path(recipe.init_from).expanduser().absolute())
    return dataclasses.replace(recipe, init_from=origin, data=dataclasses.replace(recipe.data, files=files))


def pinned(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """A run folder replaced by the checkpoint that it stands for now. Raises CheckpointError where there is none."""
    if is_published(recipe.init_from):
        return recipe
    return dataclasses.replace(recipe, init_from=own_checkpoint(recipe.init_from).uri)


def resolve(recipe: FinetuneRecipe) -> FinetuneRecipe:
    """The recipe with the model block and the protein tables of its checkpoint, and the stores of its files.

    Raises CheckpointError for a checkpoint that cannot be used, RecipeError for what contradicts it.
    """
    recipe = pinned(recipe)
    base = load_pretrained(recipe.init_from)
    model = {"arch": base.architecture.name, **_plain(base.config)}
    if recipe.model is not None and _plain(recipe.model) != _plain(base.config):
        raise RecipeError(f"model: it is taken from {recipe.init_from} and cannot be another; drop the block")
    tables = recipe.data.protein_tables or list(base.vocab.files)
    data: FinetuneDataConfig = dataclasses.replace(recipe.data, protein_tables=tables, sources=_sources(recipe))
    values = to_dict(dataclasses.replace(recipe, data=data, model=None))
    resolved = parse(SHEBANG + yaml.safe_dump({**values, "model": model}), origin="recipe")
    assert isinstance(resolved, FinetuneRecipe)
    check_genes(resolved, base, Vocab.load(tables))
    return resolved


def _plain(config: Any) -> dict[str, Any]:
    """The fields of an architecture's Config as JSON values, without `arch`."""
    values = json.loads(json.dumps(dataclasses.asdict(config)))
    values.pop("arch", None)
    return values


def _sources(recipe: FinetuneRecipe) -> list[SourceConfig]:
    if not recipe.data.files:
        return recipe.data.sources
    found = sorted(Path(stores_folder(recipe)).glob("*.soma"))
    if not found:
        raise RecipeError(f"{stores_folder(recipe)} holds no store yet: `tftrain run` builds them from data.files")
    sources = [SourceConfig(str(path), path.stem) for path in found]
    if recipe.data.sources and [s.uri for s in recipe.data.sources] != [s.uri for s in sources]:
        raise RecipeError("data.files and data.sources are both given; give one of them")
    return sources


def check_genes(recipe: FinetuneRecipe, base: Pretrained, vocab: Vocab) -> None:
    """Raises CheckpointError unless the genes are those of the checkpoint, or those and then others, whose rows then
    must be trained if their likelihood is."""
    own = base.vocab.gene_ids
    if vocab.gene_ids[: len(own)] != own or vocab.protein_width != base.vocab.protein_width:
        raise CheckpointError(
            f"data.protein_tables hold {vocab.n_genes:,} genes with vectors {vocab.protein_width} wide that do not "
            f"begin with the {len(own):,} of {base.origin} ({base.vocab.protein_width} wide); give its tables first "
            f"({', '.join(base.vocab.files)}) and those of new species after them"
        )
    is_generative = recipe.head is None or recipe.head.generative_weight > 0
    if vocab.n_genes == len(own) or recipe.lora is None or not is_generative:
        return
    module = base.architecture.build(base.config, vocab, device="meta")
    rows = {name.rpartition(".")[0] for name in grown(module, base.weights, vocab.n_genes - len(own))}
    saved = recipe.lora.modules_to_save or []
    frozen = [name for name in sorted(rows) if not any(_is_within(name, target) for target in saved)]
    if frozen:
        raise RecipeError(
            f"{vocab.n_genes - len(own):,} genes are new and their rows of {', '.join(frozen)} would stay untrained: "
            f"set lora.modules_to_save=[{','.join(sorted(rows))}]"
        )


def _is_within(name: str, target: str) -> bool:
    return any(
        name[:stop] == target or name[:stop].endswith(f".{target}")
        for stop in [*(i for i, letter in enumerate(name) if letter == "."), len(name)]
    )


def adapted(recipe: FinetuneRecipe, base: Pretrained, vocab: Vocab, labels: Labels | None) -> nn.Module:
    """The checkpoint's module with adapters and head, of which only what is to be trained requires a gradient."""
    module, arch = base.build(vocab), base.architecture
    if recipe.engine.activation_checkpointing:
        arch.checkpoint_activations(module)
    if recipe.lora:
        lora.wrap(module, recipe.lora, arch.lora_targets(module))
    if recipe.head is None:
        return module
    assert labels is not None, "a head has labels"
    labeller = Labeller(module, recipe.model.width, labels, recipe.head)
    if not recipe.head.generative_weight:
        _freeze_unreached(labeller, LabellingArchitecture(arch, labels, recipe.head).empty(recipe.model, vocab))
    return labeller


def _freeze_unreached(labeller: Labeller, filler: Any) -> None:
    """What the loss does not depend on (the generative heads) is not trained: weight decay alone would move it."""
    labeller(filler)["loss"].backward()
    for name, parameter in labeller.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            if lora.NAME in name.split("."):
                raise RecipeError(
                    f"lora: {name} has no part in the head's loss; drop its module from lora.target_modules and "
                    "lora.modules_to_save, or set head.generative_weight above 0"
                )
            parameter.requires_grad_(False)
        parameter.grad = None


def read_labels(recipe: FinetuneRecipe, sources: Sequence[Source]) -> tuple[Labels | None, list[str]]:
    """The labels of the recipe's head, and notes on them. Raises CellsError for labels that cannot be learnt."""
    head = recipe.head
    if head is None:
        return None, []
    train, heldout = (
        np.concatenate([read_obs(source, getattr(source, name))[head.label] for source in sources])
        for name in ("train_joinid_N", "heldout_joinid_M")
    )
    return label_values.fit(head.label, head.task, train, heldout, is_balanced=head.class_weights == "balanced")


def begin(
    recipe: FinetuneRecipe, vocab: Vocab, labels: Labels | None
) -> tuple[Architecture, nn.Module, dict[str, Any]]:
    """The architecture as the trainer sees it, the module to train, and what the manifest says of where it begins."""
    base = load_pretrained(recipe.init_from)
    module, arch = adapted(recipe, base, vocab, labels), base.architecture
    facts: dict[str, Any] = {"init_from": recipe.init_from, "base_hash": base.weights_hash}
    if recipe.head and labels:
        arch = cast(Architecture, LabellingArchitecture(arch, labels, recipe.head))
        facts["labels"] = json.loads(json.dumps(labels.to_dict()))
    return arch, module, facts


def equip(
    store: CheckpointStore,
    recipe: FinetuneRecipe,
    module: nn.Module,
    arch: Architecture,
    vocab: Vocab,
    sources: Sequence[Source],
    group: Group,
    heldout: Cells,
) -> None:
    """Tells the store of checkpoints what fine-tuning adds to each, and which is best."""
    if recipe.early_stop:
        store.metric = recipe.early_stop.metric
        store.config = dataclasses.replace(store.config, keep_best=store.config.keep_best or 1)
    if not recipe.lora and not recipe.head:
        return

    def packed(cells: Cells) -> AgreedStep:
        kept, limit = cells.take(np.flatnonzero(cells.n_expressed_C)), recipe.train.tokens_per_gpu
        batches = arch.collate(kept, recipe.model, vocab, seed=0, shuffle_genes=True, max_tokens=limit)
        return agree_step(group, batches, arch.empty(recipe.model, vocab))

    some = read_rows(sources[0], sources[0].train_joinid_N[:CHECK_CELLS])
    is_classifier = recipe.head is not None and recipe.head.task == "classify"
    names = ("arch", "genes_hash", "table_hash", "init_from", "base_hash", "labels")
    store.companion = TunedFiles(
        module,
        {name: store.identity[name] for name in names if name in store.identity} | {"head": to_dict(recipe)["head"]},
        check=lambda: packed(some),
        heldout=(lambda: packed(heldout)) if is_classifier else None,
        unknown_fraction=recipe.head.unknown_fraction if recipe.head else 0.0,
    )


def early_stop(recipe: FinetuneRecipe, group: Group, step: int) -> EarlyStop | None:
    """Collective. With what the run's held-out metrics say up to `step`."""
    if recipe.early_stop is None:
        return None
    every = recipe.train.heldout_every_steps
    assert every is not None, "checked with the recipe"
    lines = read_metrics(Folder.at(recipe.out)) if group.rank == 0 and step else []
    past = [line for line in lines if 0 < line["step"] <= step and line["step"] % every == 0]
    return EarlyStop(recipe.early_stop, group.agree([line for line in past if recipe.early_stop.metric in line]))


def absent(recipe: FinetuneRecipe) -> list[str]:
    """What of a recipe cannot be said yet, since its checkpoint or its stores are not there; nothing otherwise."""
    lines = []
    if "://" not in recipe.init_from and not Path(recipe.init_from).exists():
        lines.append(f"init_from: {recipe.init_from} is absent; the model and the genes are taken from it")
    if not recipe.data.sources and not list(Path(stores_folder(recipe)).glob("*.soma")):
        lines += [f"stores: built by `{command}`" for command in build_commands(recipe)]
    return lines
