"""A checkpoint and a recipe's evaluation block -> what the tasks work on: judged cells, embeddings, likelihoods.

Shapes: C cells, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from tftrain.cells.contract import Cells
from tftrain.cells.h5ad import H5adFile, match_genes, read_h5ad
from tftrain.cells.read import read_rows
from tftrain.cells.source import HoldoutConfig, SourceConfig, open_source, open_sources
from tftrain.cells.vocab import Vocab
from tftrain.embed import Embedder
from tftrain.errors import CellsError
from tftrain.evals.contract import Dataset, GeneVectors, Scores
from tftrain.recipe import EvalSource, EvaluateConfig, TrainRecipe, parse
from tftrain.training.checkpoint import read_manifest, read_recipe
from tftrain.training.folder import Folder
from tftrain.training.trainer import stable_seed

TOKENS_PER_BATCH = 8192


def open_datasets(
    embedder: Embedder, recipe: TrainRecipe | None, config: EvaluateConfig, *, seed: int
) -> list[Dataset]:
    """The held-out donors of every source that was trained on (none without `recipe`), then the unseen sources whole.

    At most `max_cells` a data set and `fit_cells` training cells a source, drawn by `seed`. Raises CellsError for a
    missing label or donor column, and where no cell is left to judge.
    """
    asked = [config.label, config.donor, *filter(None, [config.condition, config.batch])]
    columns = tuple(dict.fromkeys([*asked, *embedder.architecture.obs_columns(embedder.config)]))
    datasets = []
    if recipe is not None and recipe.data.holdout.is_on:
        data = recipe.data
        sources = open_sources(
            data.sources,
            embedder.vocab,
            obs_filter=data.obs_filter,
            qc=data.qc,
            holdout=data.holdout,
            obs_columns=columns,
        )
        for source in sources:
            judged = read_rows(source, draw(source.heldout_joinid_M, config.max_cells, seed))
            fit = read_rows(source, draw(source.train_joinid_N, config.fit_cells, seed))
            if len(judged):
                datasets.append(_dataset(source.name, judged, fit, embedder.vocab, config, is_seen=True))
    for number, unseen in enumerate(config.unseen, start=len(datasets)):
        vocab = Vocab.load([unseen.protein_table]) if unseen.protein_table else embedder.vocab
        cells, caveat = _unseen_cells(unseen, vocab, recipe, columns, config.max_cells, seed, number)
        name = _free_name(unseen.species, [dataset.name for dataset in datasets])
        whole = _dataset(name, cells, Cells.empty(columns), vocab, config, is_seen=False)
        datasets.append(dataclasses.replace(whole, caveat=caveat))
    if not datasets:
        raise CellsError(
            "there is no cell to evaluate on: hold donors out (data.holdout) or name stores or files as evaluate.unseen"
        )
    return datasets


def draw(joinid_N: np.ndarray, n: int, seed: int) -> np.ndarray:
    """At most `n` of the joinids, sorted; the same for the same seed."""
    if len(joinid_N) <= n:
        return joinid_N
    return np.sort(np.random.default_rng([seed, 23]).choice(joinid_N, n, replace=False))


def _unseen_cells(
    unseen: EvalSource,
    vocab: Vocab,
    recipe: TrainRecipe | None,
    columns: Sequence[str],
    max_cells: int,
    seed: int,
    number: int,
) -> tuple[Cells, str]:
    """The cells, and what is missing of them."""
    caveat = ""
    if unseen.uri.endswith(".h5ad"):
        with H5adFile(unseen.uri) as file:
            match = match_genes(file, vocab, None)
            caveat = match.describe() if match.n_matched < len(match.row_of_column_G) else ""
            blocks = list(read_h5ad(file, vocab, match, obs_columns=columns))
        cells = Cells.concat(blocks)
        kept = cells.take(draw(np.flatnonzero(cells.n_expressed_C > 0), max_cells, seed))
    else:
        source = open_source(
            SourceConfig(unseen.uri, unseen.species),
            vocab,
            obs_filter=recipe.data.obs_filter if recipe else None,
            qc=recipe.data.qc if recipe else None,
            holdout=HoldoutConfig(fraction=0.0),
            obs_columns=columns,
        )
        kept = read_rows(source, draw(source.train_joinid_N, max_cells, seed))
        kept = kept.take(np.flatnonzero(kept.n_expressed_C > 0))
    return dataclasses.replace(kept, source_C=np.full(len(kept), number, np.int16)), caveat


def _free_name(species: str, taken: Sequence[str]) -> str:
    names = [species, *(f"{species}-{n}" for n in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def _dataset(name: str, cells: Cells, fit: Cells, vocab: Vocab, config: EvaluateConfig, *, is_seen: bool) -> Dataset:
    label_C, donor_C = (text(cells.obs[column]) for column in (config.label, config.donor))
    condition_C, batch_C = (text(cells.obs[column]) if column else None for column in (config.condition, config.batch))
    return Dataset(name, cells, fit, vocab, is_seen, label_C, donor_C, condition_C, batch_C)


def text(column_C: np.ndarray) -> np.ndarray:
    """Object array of strings, "" for what is missing."""
    return np.array(["" if value is None or value != value else str(value) for value in column_C.tolist()], object)


def embed(embedder: Embedder, dataset: Dataset) -> np.ndarray:
    """float32 (C, D): cell embeddings as `tftrain embed` writes them; a data set of other genes brings its own
    proteins."""
    if dataset.vocab is embedder.vocab:
        return embedder.outputs(dataset.cells, ("embeddings",))["embeddings"]
    arch, config, module = embedder.architecture, embedder.config, embedder.module
    try:
        arch.set_genes(module, config, dataset.vocab)
        return dataclasses.replace(embedder, vocab=dataset.vocab).outputs(dataset.cells, ("embeddings",))["embeddings"]
    finally:
        arch.set_genes(module, config, embedder.vocab)


def untrained(embedder: Embedder, seed: int) -> Embedder:
    """The same architecture and genes with fresh weights: those that a training with this seed begins with."""
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(seed, "weights"))
        module = embedder.architecture.build(embedder.config, embedder.vocab)
    device = next(embedder.module.parameters()).device
    return dataclasses.replace(embedder, module=module.requires_grad_(False).eval().to(device))


def score(embedder: Embedder, blocks: Sequence[Cells], *, seed: int) -> Scores:
    """Gene and count NLL of blocks of cells as in training: causal, genes in a random order that `seed` decides."""
    arch, config, module = embedder.architecture, embedder.config, embedder.module
    device = next(module.parameters()).device
    sums = np.zeros((3, len(blocks)))
    with torch.no_grad():
        for number, block in enumerate(blocks):
            longest = int(arch.tokens_of(block, config).max())
            limit = max(TOKENS_PER_BATCH, longest)
            for batch in arch.collate(block, config, embedder.vocab, seed=seed, shuffle_genes=True, max_tokens=limit):
                losses = module(batch.to(device))
                sums[:, number] += float(losses["loss_gene"]), float(losses["loss_count"]), batch.n_scored
    return Scores(sums[0], sums[1], sums[2].astype(np.int64))


def gene_vectors(embedder: Embedder) -> GeneVectors:
    """What the model makes of each gene's protein before it has seen a cell."""
    with torch.no_grad():
        vector_GD = embedder.architecture.gene_vectors(embedder.module, embedder.config)
    return GeneVectors(embedder.vocab.gene_ids, vector_GD.float().cpu().numpy())


def training_recipe(embedder: Embedder) -> TrainRecipe | None:
    """The recipe that the checkpoint was trained by; None for a published one."""
    folder = embedder.facts.get("checkpoint_folder")
    if folder is None:
        return None
    recipe = parse(read_recipe(Folder.at(folder)), origin=f"{folder}/recipe.yaml")
    assert isinstance(recipe, TrainRecipe), "a checkpoint holds a training recipe"
    return recipe


def wandb_run_id(embedder: Embedder) -> str | None:
    """Of the training on W&B, where there is one."""
    folder = embedder.facts.get("checkpoint_folder")
    return read_manifest(Folder.at(folder)).get("wandb_run_id") if folder else None


def located(path: str) -> str:
    """A local path made absolute, a `scheme://` location as it is."""
    return path if "://" in path else str(Path(path).expanduser().absolute())


def absolute(config: EvaluateConfig) -> EvaluateConfig:
    """The block with every local path made absolute."""
    unseen = [
        dataclasses.replace(
            source, uri=located(source.uri), protein_table=source.protein_table and located(source.protein_table)
        )
        for source in config.unseen
    ]
    return dataclasses.replace(
        config,
        unseen=unseen,
        orthologs=config.orthologs and located(config.orthologs),
        relations=config.relations and located(config.relations),
    )
