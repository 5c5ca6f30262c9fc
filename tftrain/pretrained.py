"""A folder with a trained model -> its architecture, genes and weights, whoever trained it and however.

In: a folder in the published layout, a checkpoint of ours, or a run folder of ours: its newest checkpoint, or the best
one of a fine-tuning with early stopping. Adapters are merged into the weights they belong to, whose hash they name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tftrain.cells.labels import Labels
from tftrain.cells.vocab import Vocab
from tftrain.errors import CellsError, CheckpointError
from tftrain.models.arch import Architecture, architecture, load_state
from tftrain.models.heads import BASE, HEAD, Head
from tftrain.models.transcriptformer.upstream import CONFIG_FILE, Published, is_published, load_published
from tftrain.recipe import FinetuneRecipe, TrainRecipe, parse
from tftrain.training import lora
from tftrain.training.adapter import ADAPTER, HEAD_FILE, HEAD_ONLY, MANIFEST
from tftrain.training.checkpoint import CheckpointConfig, CheckpointStore, load_weights, read_manifest, read_recipe
from tftrain.training.folder import Folder


@dataclass(frozen=True)
class TrainedHead:
    """A task head with what its outputs mean."""

    labels: Labels
    weights: Mapping[str, Tensor]
    unknown: Mapping[str, Any] | None
    """`threshold`, `fraction`, `n_cells`; None where no held-out cells set a threshold."""

    def build(self, width: int) -> Head:
        """The module, ready to be used."""
        head = Head(width, self.labels.n_outputs)
        head.load_state_dict({name.removeprefix(HEAD): value for name, value in self.weights.items()})
        return head.requires_grad_(False).eval()


@dataclass(frozen=True)
class Pretrained:
    """A trained model as its folder holds it; adapters are merged."""

    origin: str
    architecture: Architecture
    config: Any
    vocab: Vocab
    weights: Mapping[str, Tensor]
    """State dict of the architecture's module."""
    facts: Mapping[str, str]
    """Provenance: layout, folder, step, hashes."""
    published: Published | None = None
    """The folder in the published layout that it comes from, at whatever remove."""
    recipe: TrainRecipe | None = None
    """What trained it; None for the published layout."""
    head: TrainedHead | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    """How the checkpoint's publisher reads cells."""

    @cached_property
    def weights_hash(self) -> str:
        """sha256 (hex) of every weight's name, type, shape and bytes, in the order of names."""
        digest = hashlib.sha256()
        for name in sorted(self.weights):
            value = self.weights[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def build(self, vocab: Vocab | None = None) -> nn.Module:
        """The module with these weights, on the CPU.

        `vocab` may have more genes, after those of the checkpoint: their rows are fresh (torch's global generator).
        """
        vocab = vocab or self.vocab
        module = self.architecture.build(self.config, vocab)
        state = dict(self.weights)
        for name in grown(module, state, vocab.n_genes - self.vocab.n_genes):
            own = module.state_dict()[name].clone()
            own[: len(state[name])] = state[name]
            state[name] = own
        load_state(module, state, self.origin)
        if self.published is not None:
            # The publisher's special rows, which are not to be drawn again.
            table = self.published.protein_VE
            buffer = module.gene_embeddings.protein_VE  # type: ignore[union-attr]
            buffer[: len(table)] = table.to(buffer)  # type: ignore[index, arg-type, operator]
        return module


def grown(module: nn.Module, weights: Mapping[str, Tensor], n_new: int) -> list[str]:
    """Names of the weights that have a row a gene and lack those of `n_new` genes."""
    return [
        name
        for name, value in module.state_dict().items()
        if n_new > 0
        and name in weights
        and value.shape[1:] == weights[name].shape[1:]
        and len(value) == len(weights[name]) + n_new
    ]


def load_pretrained(checkpoint: str | Path) -> Pretrained:
    """Reads it. Raises CheckpointError for a folder that is none of these, is unfinished, or does not fit its own
    configuration, genes or base."""
    if is_published(checkpoint):
        published = load_published(checkpoint)
        facts = {"layout": "published", "genes_hash": published.vocab.genes_hash}
        return Pretrained(
            str(checkpoint),
            architecture("transcriptformer"),
            published.config,
            published.vocab,
            published.weights,
            facts,
            published=published,
            reading=published.data_config,
        )
    folder = own_checkpoint(checkpoint)
    manifest = read_manifest(folder)
    recipe = parse(read_recipe(folder), origin=f"{folder.uri}/recipe.yaml")
    if not isinstance(recipe, TrainRecipe):
        raise CheckpointError(f"{folder.uri} holds a recipe of task {recipe.task}, which trains no model")
    vocab = open_vocab(recipe)
    if manifest.get("genes_hash") != vocab.genes_hash:
        raise CheckpointError(
            f"{folder.uri} was trained with other genes than its tables hold now ({', '.join(vocab.files)}); "
            "restore them"
        )
    facts = {
        "layout": "tftrain",
        "checkpoint_folder": folder.uri,
        "step": str(manifest["step"]),
        "genes_hash": vocab.genes_hash,
    }
    arch = architecture(recipe.model.arch)
    if isinstance(recipe, FinetuneRecipe):
        return _tuned(folder, recipe, arch, vocab, facts)
    weights = load_weights(folder, is_averaged=True)
    return Pretrained(folder.uri, arch, recipe.model, vocab, weights, facts, recipe=recipe)


def own_checkpoint(given: str | Path) -> Folder:
    """The checkpoint that a folder of ours stands for; see the top of this file. Raises CheckpointError."""
    folder = Folder.at(given)
    if folder.exists("checkpoints"):
        store = CheckpointStore(folder.uri, CheckpointConfig(), recipe_text="", identity={})
        latest = store.latest()
        if latest is None:
            raise CheckpointError(f"{folder.uri} holds no finished checkpoint yet; train until one is saved")
        recipe = parse(read_recipe(latest), origin=f"{latest.uri}/recipe.yaml")
        if isinstance(recipe, FinetuneRecipe) and recipe.early_stop:
            store.metric = recipe.early_stop.metric
            return store.best() or latest
        return latest
    if not folder.exists():
        raise CheckpointError(f"{folder.uri} does not exist; give the folder of a checkpoint or of a run")
    if not folder.exists("manifest.json") and not folder.exists("COMPLETE"):
        raise CheckpointError(
            f"{folder.uri} is no checkpoint: neither {CONFIG_FILE} with model_weights.pt (published layout) "
            "nor manifest.json (ours) is in it"
        )
    return folder


def open_vocab(recipe: TrainRecipe) -> Vocab:
    """The genes of the recipe's protein tables. Raises CellsError where they are not what the recipe expects."""
    data = recipe.data
    vocab = Vocab.load(data.protein_tables)
    for name, expected, got in (
        ("n_genes", data.n_genes, vocab.n_genes),
        ("protein_width", data.protein_width, vocab.protein_width),
    ):
        if expected is not None and expected != got:
            raise CellsError(
                f"data.{name} is {expected:,} and the protein tables ({', '.join(data.protein_tables)}) have {got:,}; "
                f"use the tables that the recipe means, or set data.{name}={got}"
            )
    return vocab


def _tuned(
    folder: Folder, recipe: FinetuneRecipe, arch: Architecture, vocab: Vocab, facts: dict[str, str]
) -> Pretrained:
    """A fine-tuned checkpoint: its base with the adapter merged, or with the weights that were trained put in."""
    base = load_pretrained(recipe.init_from)
    head = None
    with _extras(folder, recipe) as extras:
        about = json.loads((extras / MANIFEST).read_text()) if extras else {}
        base_hash = about.get("base_hash") or read_manifest(folder).get("base_hash")
        if base_hash != base.weights_hash:
            raise CheckpointError(
                f"{folder.uri} belongs to base weights of hash {base_hash} and {base.origin} has {base.weights_hash}; "
                "restore the checkpoint that it was trained from, or give its place as init_from in its recipe.yaml"
            )
        module = base.build(vocab)
        if recipe.lora:
            assert extras is not None, "a checkpoint with adapters has their folder"
            state = lora.merged(module, extras).state_dict()
        else:
            trained = load_weights(folder, is_averaged=True)
            prefix = BASE if recipe.head else ""
            own = {name.removeprefix(prefix): value for name, value in trained.items() if name.startswith(prefix)}
            state = {**module.state_dict(), **own}
        if recipe.head:
            assert extras is not None, "a checkpoint with a head has its folder"
            head = TrainedHead(Labels.of(about["labels"]), load_file(extras / HEAD_FILE), about.get("unknown"))
    return Pretrained(
        folder.uri,
        arch,
        recipe.model,
        vocab,
        {name: value.detach().clone() for name, value in state.items()},
        {**facts, "init_from": recipe.init_from, "base_hash": base.weights_hash},
        published=base.published,
        recipe=recipe,
        head=head,
        reading=base.reading,
    )


@contextlib.contextmanager
def _extras(folder: Folder, recipe: FinetuneRecipe) -> Iterator[Path | None]:
    """A local folder with what fine-tuning added; None where it added nothing beside the weights."""
    name = ADAPTER if recipe.lora else HEAD_ONLY if recipe.head else None
    if name is None:
        yield None
    elif folder.local is not None:
        yield folder.local / name
    else:
        with tempfile.TemporaryDirectory(prefix="tftrain-") as temporary:
            (folder / name).download(Path(temporary))
            yield Path(temporary)
