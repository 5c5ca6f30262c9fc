"""The one assembly line: a recipe and a rank become a trainer. Pretraining, adapters and evaluation go through it.

In: a checked recipe. Out: opened data (`open_data`), a Trainer that continues where its checkpoints end (`assemble`),
or the lines that `tftrain check` prints (`derive`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

from tftrain import tuning
from tftrain.cells.contract import Cells
from tftrain.cells.labels import Labels
from tftrain.cells.plan import Plan
from tftrain.cells.source import Source, open_sources
from tftrain.cells.storage import resolved
from tftrain.cells.stream import heldout_cells, stream_steps
from tftrain.cells.vocab import Vocab
from tftrain.errors import RecipeError
from tftrain.models.arch import Architecture, architecture
from tftrain.pretrained import open_vocab
from tftrain.recipe import FinetuneRecipe, TrainRecipe, difference, dump, parse, to_dict
from tftrain.training import lora
from tftrain.training.average import Average
from tftrain.training.checkpoint import CheckpointStore, Progress, load_average, load_weights, read_manifest
from tftrain.training.engine import build_engine
from tftrain.training.folder import Folder
from tftrain.training.group import Group, join_group
from tftrain.training.ledger import Ledger
from tftrain.training.meter import peak_tflops
from tftrain.training.metrics import MetricsWriter
from tftrain.training.plain import Engine
from tftrain.training.prefetch import Prefetch
from tftrain.training.profile import Profile
from tftrain.training.provenance import system
from tftrain.training.resume import How, apply_weights, check_manifest, how_to_resume, restore
from tftrain.training.trainer import Trainer, stable_seed

GIB = 2**30
R = TypeVar("R", bound=TrainRecipe)


@dataclass(frozen=True)
class Data:
    """What a run reads: its genes, its stores with the chosen cells, and the order of all training cells."""

    vocab: Vocab
    sources: Sequence[Source]
    plan: Plan
    total_steps: int
    labels: Labels | None = None
    """What a head is to learn; none: there is no head."""
    notes: Sequence[str] = ()
    """What a reader must know of the labels."""


def open_data(recipe: TrainRecipe) -> Data:
    """Opens protein tables and stores. Raises CellsError or RecipeError for what cannot be trained on."""
    vocab = open_vocab(recipe)
    data = recipe.data
    obs_columns = architecture(recipe.model.arch).obs_columns(recipe.model)
    if isinstance(recipe, FinetuneRecipe) and recipe.head:
        obs_columns = tuple(dict.fromkeys((*obs_columns, recipe.head.label)))
    sources = open_sources(
        data.sources,
        vocab,
        obs_filter=data.obs_filter,
        qc=data.qc,
        holdout=data.holdout,
        obs_columns=obs_columns,
    )
    plan = Plan(tuple(source.plan_source for source in sources), recipe.seed, data.order, recipe.train.cells_per_step)
    if recipe.ray.most_workers > data.order.lanes:
        raise RecipeError(
            f"ray.num_workers is {recipe.ray.num_workers} and data.order.lanes is {data.order.lanes}: "
            "a worker needs a lane; lower ray.num_workers, or raise data.order.lanes before a run begins (it is fixed)"
        )
    steps = recipe.train.steps
    total_steps = steps if steps is not None else plan.n_steps(recipe.train.epochs or 0)
    labels, notes = tuning.read_labels(recipe, sources) if isinstance(recipe, FinetuneRecipe) else (None, ())
    return Data(vocab, sources, plan, total_steps, labels, notes)


class Channel(Protocol):
    """Where a worker's words go; see `launch.Channel`."""

    def report(self, step: int, total_steps: int, metrics: Mapping[str, float]) -> None:
        """Shows how far the run is."""
        ...

    def say(self, line: str) -> None:
        """Shows a line of text."""
        ...

    def is_stop_asked(self) -> bool:
        """Whether the run was asked to save and to end."""
        ...


def run_worker(payload: Mapping[str, str], channel: Channel) -> str:
    """One rank of a training: `payload["recipe"]` is the resolved recipe. Returns `finished` or `stopped`."""
    recipe = parse(payload["recipe"])
    assert isinstance(recipe, TrainRecipe)
    group = join_group()
    trainer, writer = assemble(recipe, open_data(recipe), group, channel)
    is_done = False
    try:
        outcome = trainer.run()
        is_done = True
        if outcome == "stopped" and trainer.store and group.rank == 0:
            step = trainer.progress.step
            channel.say(f"stopped at step {step} of {trainer.total_steps}: saved {trainer.store.folder_of(step).uri}")
        return outcome
    finally:
        if writer:
            writer.close(exit_code=0 if is_done else 1)


def assemble(recipe: TrainRecipe, data: Data, group: Group, channel: Channel) -> tuple[Trainer, MetricsWriter | None]:
    """The trainer of one rank, restored from the newest finished checkpoint of `recipe.out` if any. Collective.

    Equal recipes give equal weights at the start on every rank. The writer of metrics is rank 0's alone; close it.
    Raises CheckpointError where the checkpoint belongs to other genes, other cells or another order.
    """
    identity = {
        "arch": recipe.model.arch,
        "genes_hash": data.vocab.genes_hash,
        "table_hash": data.vocab.table_hash,
        "plan_fingerprint": data.plan.fingerprint,
        "plan": data.plan.describe(),
    }
    torch.manual_seed(stable_seed(recipe.seed, "weights"))
    if isinstance(recipe, FinetuneRecipe):
        arch, module, more = tuning.begin(recipe, data.vocab, data.labels)
        identity |= more
        channel.say(lora.trainable_share(module))
    else:
        arch = architecture(recipe.model.arch)
        module = arch.build(recipe.model, data.vocab)
        if recipe.engine.activation_checkpointing:
            arch.checkpoint_activations(module)
    heldout = _heldout(recipe, data, group)
    store = CheckpointStore(recipe.out, recipe.checkpoint, recipe_text=dump(recipe), identity=identity)
    latest = group.agree(store.latest() if group.rank == 0 else None)
    manifest = read_manifest(latest) if latest else {}
    progress = Progress.of(manifest)
    # Reading begins now, so that the first cells are there when the engine is.
    steps = Prefetch(_steps(recipe, data, group, progress), lambda cells_and_cursor: cells_and_cursor, depth=1)
    early = None
    try:
        engine = _restored(recipe, module, data, group, channel, identity, latest, manifest)
        if isinstance(recipe, FinetuneRecipe):
            tuning.equip(store, recipe, module, arch, data.vocab, data.sources, group, heldout)
            early = tuning.early_stop(recipe, group, progress.step)
    except BaseException:
        steps.close()
        raise
    average = None
    if recipe.train.ema_decay is not None:
        saved = load_average(latest) if latest and group.rank == 0 else None
        average = Average(engine, recipe.train.ema_decay, recipe.train.ema_every_steps, saved)
    writer = None
    if group.rank == 0:
        writer = MetricsWriter(
            recipe.out,
            recipe.wandb,
            resume_step=progress.step,
            wandb_run_id=manifest.get("wandb_run_id"),
            run_config={"recipe": to_dict(recipe), "data": identity, "system": system(group)},
        )
        store.identity["wandb_run_id"] = writer.wandb_run_id
    names = [source.name for source in data.sources]
    ledger = Ledger(recipe.out, group, names, resume_step=progress.step) if recipe.data.ledger else None

    def report(step: int, metrics: dict[str, float]) -> None:
        assert writer is not None, "only rank 0 reports"
        writer.write(step, metrics)
        channel.report(step, data.total_steps, metrics)

    trainer = Trainer(
        engine=engine,
        architecture=arch,
        model_config=recipe.model,
        vocab=data.vocab,
        config=recipe.train,
        optim=recipe.optim,
        total_steps=data.total_steps,
        seed=recipe.seed,
        steps=steps,
        heldout=heldout,
        report=report,
        store=store,
        ledger=ledger,
        progress=progress,
        epoch_of=lambda cursor: epochs_before(data.plan, cursor),
        source_names=names,
        is_stop_asked=channel.is_stop_asked,
        on_saved=writer.checkpoint if writer else None,
        average=average,
        early=early,
        is_heldout_first=isinstance(recipe, FinetuneRecipe),
        profile=Profile(recipe.profile, recipe.out, group.rank) if recipe.profile else None,
        device_tflops=recipe.engine.peak_tflops or peak_tflops(group.device, engine.precision),
    )
    return trainer, writer


def _steps(recipe: TrainRecipe, data: Data, group: Group, progress: Progress) -> Iterator[tuple[Cells, int]]:
    """This rank's cells of every step that is left."""
    return stream_steps(
        data.plan,
        data.sources,
        rank=group.rank,
        world=group.world_size,
        cursor=progress.cursor,
        stop_cursor=data.plan.cursor_after(data.total_steps),
        config=recipe.data.stream,
    )


def _restored(
    recipe: TrainRecipe,
    module: nn.Module,
    data: Data,
    group: Group,
    channel: Channel,
    identity: Mapping[str, Any],
    latest: Folder | None,
    manifest: Mapping[str, Any],
) -> Engine:
    """The engine of `module`, with its weights or all that this number of ranks can take from the checkpoint
    `latest`."""
    how: How | None = None
    if latest:
        check_manifest(manifest, identity, latest.uri)
        stage, precision = recipe.engine.stage_on(group.device), recipe.engine.precision_on(group.device)
        how = how_to_resume(manifest, zero_stage=stage, world_size=group.world_size, precision=precision)
        if how == "weights":
            apply_weights(module, load_weights(latest), latest.uri)
        if group.rank == 0:
            channel.say(
                f"continues at step {manifest['step']} of {data.total_steps}: {_HOW[how]} of {latest.uri} "
                f"({manifest['world_size']} ranks at ZeRO stage {manifest['zero_stage']} -> "
                f"{group.world_size} at {stage})"
            )
    engine = build_engine(module, recipe.engine, recipe.optim, group)
    if latest and how:
        restore(engine, latest, how)
    return engine


_HOW = {
    "shards": "weights and optimiser",
    "universal": "weights and optimiser, converted for another number of workers,",
    "weights": "weights alone (AdamW's moments begin anew: the ZeRO stage or precision changed)",
}


def _heldout(recipe: TrainRecipe, data: Data, group: Group) -> Cells:
    holdout = recipe.data.holdout
    if not holdout.is_on:
        return Cells.empty(data.sources[0].obs_columns)
    return heldout_cells(data.sources, group.rank, group.world_size, holdout.max_cells)


def epochs_before(plan: Plan, cursor: int) -> float:
    """Passes over the data that lie before the cursor."""
    epoch, _ = plan.position(cursor)
    return epoch + float(Fraction(cursor - plan.epoch_start(epoch), plan.epoch_cells(epoch)))


def with_absolute_paths(recipe: R) -> R:
    """The recipe with every local path made absolute, since workers run in directories of their own, and every alias of
    a Census build pinned.
    """

    def absolute(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().absolute())

    data = dataclasses.replace(
        recipe.data,
        sources=[dataclasses.replace(s, uri=absolute(s.uri)) for s in map(resolved, recipe.data.sources)],
        protein_tables=[absolute(path) for path in recipe.data.protein_tables],
    )
    recipe = dataclasses.replace(recipe, out=absolute(recipe.out), data=data)
    return cast(R, tuning.with_absolute_paths(recipe)) if isinstance(recipe, FinetuneRecipe) else recipe


def derive(recipe: TrainRecipe) -> list[str]:
    """What follows from a recipe, a line a fact; what needs absent tables or stores is named as absent.

    Raises CellsError or RecipeError where tables or stores are there and cannot be used.
    """
    if isinstance(recipe, FinetuneRecipe) and recipe.model is None:
        absent = tuning.absent(recipe)
        return absent or derive(tuning.resolve(recipe))
    data = recipe.data
    absent = [path for path in data.protein_tables if "://" not in path and not Path(path).exists()]
    if not absent:
        vocab: Vocab | None = open_vocab(recipe)
    elif data.n_genes and data.protein_width:
        vocab = Vocab.placeholder(data.n_genes, data.protein_width)
    else:
        vocab = None
    lines = [f"protein tables: {len(absent)} of {len(data.protein_tables)} absent, first {absent[0]}"] if absent else []
    if vocab is None:
        lines.append("model: its size needs the tables, or data.n_genes and data.protein_width")
    else:
        lines += _model_lines(recipe, architecture(recipe.model.arch), vocab)
    missing = [source.uri for source in data.sources if "://" not in source.uri and not Path(source.uri).exists()]
    if missing or absent:
        lines += [f"stores: {len(missing)} of {len(data.sources)} absent, first {missing[0]}"] if missing else []
        length = f"{recipe.train.steps:,} steps" if recipe.train.steps else f"{recipe.train.epochs:g} epochs"
        return [*lines, f"run: {length} of {recipe.train.cells_per_step:,} cells; its data order needs the stores"]
    return [*lines, *_data_lines(recipe, open_data(recipe))]


def _model_lines(recipe: TrainRecipe, arch: Architecture, vocab: Vocab) -> list[str]:
    module = arch.build(recipe.model, vocab, device="meta")
    if isinstance(recipe, FinetuneRecipe) and recipe.lora:
        lora.wrap(module, recipe.lora, arch.lora_targets(module))
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    frozen = sum(t.numel() for t in [*module.parameters(), *module.buffers()] if not t.requires_grad)
    longest = recipe.model.genes_per_cell + 1
    flop = arch.forward_flop(recipe.model, vocab, longest)
    return [
        f"vocabulary: {vocab.n_genes:,} genes, protein vectors {vocab.protein_width} wide",
        f"parameters: {trained:,} trained, {frozen:,} frozen",
        f"memory: weights, gradients and AdamW in fp32 {trained * 16 / GIB:.2f} GiB over all ranks, "
        f"frozen table {frozen * 4 / GIB:.2f} GiB a rank",
        f"arithmetic: a cell of {longest:,} tokens takes {flop / 1e9:,.1f} GFLOP forward, "
        f"{3 * flop / 1e9:,.1f} in training",
    ]


def _data_lines(recipe: TrainRecipe, data: Data) -> list[str]:
    epoch_cells = data.plan.epoch_cells(0)
    heldout = sum(len(source.heldout) for source in data.sources)
    return [
        *(source.describe() for source in data.sources),
        f"order: {epoch_cells:,} cells an epoch in {data.plan.order.lanes} lanes, {heldout:,} cells held out, "
        f"fingerprint {data.plan.fingerprint[:12]}",
        f"run: {data.total_steps:,} steps of {recipe.train.cells_per_step:,} cells "
        f"({epochs_before(data.plan, data.plan.cursor_after(data.total_steps)):.2f} epochs) "
        f"on {_workers(recipe)} workers",
        *data.notes,
    ]


def _workers(recipe: TrainRecipe) -> str:
    least, most = max(1, recipe.ray.least_workers), max(1, recipe.ray.most_workers)
    return str(most) if least == most else f"{least} to {most}"


def refuse_another_run(recipe: TrainRecipe) -> None:
    """Raises RecipeError where `recipe.out` holds a run of a recipe that computes something else."""
    folder = Folder.at(recipe.out)
    if not folder.exists(RECIPE_FILE):
        return
    before = parse(folder.read_text(RECIPE_FILE), origin=f"{recipe.out}/{RECIPE_FILE}")
    changed = difference(before, recipe)
    if changed:
        listed = "\n".join(f"  {line}" for line in changed)
        raise RecipeError(
            f"{recipe.out} holds a run of another recipe:\n{listed}\n"
            "set these back to continue it, or choose another `out` (or delete this one)"
        )


RECIPE_FILE = "recipe.yaml"
"""In the run folder: the resolved recipe that the run was begun with."""
