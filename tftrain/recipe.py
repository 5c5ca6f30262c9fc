"""Recipes: typed YAML. Composes the config dataclasses that live beside the code they configure.

In: a YAML file (dataclass defaults < YAML < `key=value` overrides). Out: a frozen recipe whose every key, type and
contradiction was checked, or a RecipeError that names file, line, the value got and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from tftrain import typed_yaml
from tftrain.cells.plan import OrderConfig
from tftrain.cells.source import HoldoutConfig, QcConfig, SourceConfig
from tftrain.cells.stream import StreamConfig
from tftrain.cluster import RayConfig
from tftrain.errors import RecipeError
from tftrain.models.arch import architecture
from tftrain.models.heads import HeadConfig
from tftrain.training.checkpoint import CheckpointConfig
from tftrain.training.early import EarlyStopConfig
from tftrain.training.engine import EngineConfig
from tftrain.training.lora import LoraBlock
from tftrain.training.metrics import WandbConfig
from tftrain.training.optim import OptimConfig
from tftrain.training.profile import ProfileConfig
from tftrain.training.trainer import TrainConfig

SHEBANG = "#!/usr/bin/env -S tftrain run\n"


@dataclass(frozen=True)
class DataConfig:
    """Which cells and genes a run sees."""

    sources: list[SourceConfig]
    protein_tables: list[str]
    """`<species>_gene.h5` files; their genes, in this order, are the vocabulary."""
    n_genes: int | None = None
    """Genes that the tables must hold together. With both, `tftrain check` sizes the model without the tables."""
    protein_width: int | None = None
    """Width that the tables must have; 2560 for the ESM-2 model of the published vocabularies."""
    obs_filter: str = "is_primary_data == True"
    """Cells to keep, in SOMA's value-filter syntax; empty keeps all."""
    qc: QcConfig = field(default_factory=QcConfig)
    holdout: HoldoutConfig = field(default_factory=HoldoutConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    ledger: bool = False
    """Record every trained cell by step and rank under `<out>/ledger`, for `tftrain-data audit`; 5 bytes a cell."""


@dataclass(frozen=True)
class EvalSource:
    """Cells of which none was trained on."""

    uri: str
    """A SOMA store or an `.h5ad` file."""
    species: str
    protein_table: str | None = None
    """Of a species that the model has not seen; none: its genes are among the model's."""


@dataclass(frozen=True)
class EvaluateConfig:
    """What is asked of a model, on which cells, beside which baselines. Sources that were trained on are judged by
    their held-out cells (`data.holdout`)."""

    tasks: list[str] = field(default_factory=lambda: ["likelihood", "celltypes", "transfer"])
    """Of likelihood, celltypes, transfer, condition, scib, species_or_type, gene_relations."""
    baselines: list[str] = field(default_factory=lambda: ["untrained", "random", "pca", "protein_mean"])
    """Of untrained, random, pca, protein_mean, log_counts, scvi (which needs the extra eval-baselines), ortholog_pca
    (an oracle, which needs `orthologs`)."""
    unseen: list[EvalSource] = field(default_factory=list)
    label: str = "cell_type"
    """Column of obs that classifiers predict."""
    donor: str = "donor_id"
    """Column of obs whose values stay together in a fold and in a bootstrap."""
    by_cell: bool = True
    """Judge cell types on folds that mix donors too, for comparison with published figures; doubles that task's
    time."""
    condition: str | None = None
    """Column of obs that the task condition predicts, such as disease or treatment."""
    batch: str | None = None
    """Column of obs whose values the task scib wants mixed; none: `donor`."""
    orthologs: str | None = None
    """TSV with the columns gene_id and orthogroup, for the oracle alone."""
    relations: str | None = None
    """TSV with the columns gene_a, gene_b and, where there are several, source: pairs that belong together, for the
    task gene_relations."""
    max_cells: int = 2000
    """Judged cells of a data set."""
    fit_cells: int = 4000
    """Training cells of a source that PCA and unigram are fitted on."""
    bootstraps: int = 1000
    """Resamples of an interval."""
    scib_cells: int = 10_000
    """Cells of a subsample of the task scib; never more than half of a data set, so that subsamples differ."""
    scib_seeds: int = 10
    """Subsamples of the task scib."""
    projection: Literal["pca", "umap"] = "pca"
    """How the report draws representations in two dimensions; umap takes about half a minute."""
    fail_below: dict[str, float] = field(default_factory=dict)
    """`task/dataset/metric` or `task/dataset/metric/variant` -> least value of the trained model; what falls short is
    named and the command ends with exit code 1."""

    def __post_init__(self) -> None:
        for name in ("max_cells", "fit_cells", "bootstraps", "scib_cells", "scib_seeds"):
            if getattr(self, name) < 1:
                raise RecipeError(f"evaluate.{name} is {getattr(self, name)}; it must be at least 1")
        if "ortholog_pca" in self.baselines and self.orthologs is None:
            raise RecipeError(
                "evaluate.baselines has ortholog_pca, which needs evaluate.orthologs; name the table or drop it"
            )
        for task, key in (("condition", "condition"), ("gene_relations", "relations")):
            if task in self.tasks and getattr(self, key) is None:
                raise RecipeError(f"evaluate.tasks has {task}, which needs evaluate.{key}; give it or drop the task")


@dataclass(frozen=True)
class BesideConfig:
    """Evaluations of saved checkpoints while the training goes on, as tasks of the same Ray cluster."""

    every_saves: int = 1
    """Each so-many-th checkpoint (of `checkpoint.save_every_steps`) is judged as `evaluate` says."""
    cpus: float = 1.0
    """That Ray reserves for an evaluation; they must be free beside workers and readers."""

    def __post_init__(self) -> None:
        if self.every_saves < 1 or self.cpus <= 0:
            raise RecipeError(
                f"evaluate_beside.every_saves is {self.every_saves} and evaluate_beside.cpus is {self.cpus:g}; "
                "the first must be at least 1, the second above 0"
            )


@dataclass(frozen=True)
class TrainRecipe:
    """`task: pretrain`."""

    out: str
    """Run folder, or `scheme://` location: checkpoints, metrics, pictures. The same recipe with it continues."""
    data: DataConfig
    train: TrainConfig
    model: Any = None
    """`arch` and the fields of that architecture's Config."""
    task: Literal["pretrain", "finetune"] = "pretrain"
    seed: int = 0
    prepare: list[str] = field(default_factory=list)
    """Command lines that the driver runs, in order, before it opens the stores; each must be repeatable."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    ray: RayConfig = field(default_factory=RayConfig)
    profile: ProfileConfig | None = None
    """Steps of which a trace is written; none: none."""
    evaluate: EvaluateConfig | None = None
    """What follows the training; none: nothing."""
    evaluate_beside: BesideConfig | None = None
    """Judges checkpoints on the way, too; none: only the last one."""

    def __post_init__(self) -> None:
        if self.evaluate_beside is None:
            return
        lacks = [
            text
            for text, is_there in (
                ("what to evaluate: give an `evaluate` block", self.evaluate is not None),
                ("checkpoints on the way: set checkpoint.save_every_steps", self.checkpoint.save_every_steps),
                ("a Ray cluster: set ray.num_workers to 1 or more", self.ray.most_workers),
            )
            if not is_there
        ]
        if lacks:
            raise RecipeError(f"evaluate_beside needs {' and '.join(lacks)}")


@dataclass(frozen=True)
class FinetuneDataConfig(DataConfig):
    """Which cells a fine-tuning sees: `files`, of which stores are built behind it, or `sources`."""

    sources: list[SourceConfig] = field(default_factory=list)
    """None: the stores that are built from `files`."""
    protein_tables: list[str] = field(default_factory=list)
    """None: those of the checkpoint. Otherwise those first, and tables of new species after them."""
    files: list[str] = field(default_factory=list)
    """`.h5ad` files with raw counts, or folders of them; `tftrain-data build` makes stores in `<out>/cells`."""
    species: str | None = None
    """Of all files; none: their obs column `species` or `organism` says it."""
    species_from: str | None = None
    """Another column of obs that does."""
    gene_col_name: str | None = None
    """Column of var with gene ids; none: ensembl_id, or else the index."""
    gene_table: list[str] = field(default_factory=list)
    """`[SPECIES=]TABLE` of gene ids and symbols, for files with symbols."""
    sum_duplicates: bool = False
    """Add up columns whose gene ids differ in their version alone."""

    def __post_init__(self) -> None:
        if not self.files and not self.sources:
            raise RecipeError("data.files and data.sources are both empty; name .h5ad files (data.files=[my.h5ad])")


@dataclass(frozen=True, kw_only=True)
class FinetuneRecipe(TrainRecipe):
    """`task: finetune`: a trained model goes on with other cells, whole or by adapters, for another aim or the same."""

    data: FinetuneDataConfig
    init_from: str
    """Run folder or checkpoint of ours, or a folder in the published layout. The model block is taken from it."""
    lora: LoraBlock | None = None
    """Adapters; none: every weight is trained."""
    head: HeadConfig | None = None
    """A classifier or regressor on cell embeddings; none: the generative objective alone."""
    early_stop: EarlyStopConfig | None = None
    """When to stop before the last step; the best checkpoint is then what is used later. None: at the last step."""
    task: Literal["pretrain", "finetune"] = "finetune"

    def __post_init__(self) -> None:
        if self.early_stop and not (self.data.holdout.is_on and self.train.heldout_every_steps):
            raise RecipeError("early_stop needs held-out cells: set data.holdout and train.heldout_every_steps")
        if self.lora and self.lora.use_dora and self.engine.zero_stage == 3:
            raise RecipeError(
                "lora.use_dora needs whole weights and engine.zero_stage is 3, which spreads them; set it to 0, 1 or 2"
            )


@dataclass(frozen=True)
class EvaluateRecipe:
    """`task: evaluate`: the evaluation of a checkpoint that exists."""

    checkpoint: str
    """Folder in the published layout, or a run folder or checkpoint of ours."""
    out: str
    """Folder for the report."""
    evaluate: EvaluateConfig
    task: Literal["evaluate"] = "evaluate"
    seed: int = 0
    ray: RayConfig | None = None
    """Where representations and tasks run side by side, `num_workers` at a time on a local cluster; none: one after
    another in this process."""
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass(frozen=True)
class EmbedRecipe:
    """`task: embed`: what `tftrain embed` does, as a file."""

    checkpoint: str
    """Folder in the published layout, or a run folder or checkpoint of ours."""
    cells: str
    """`.h5ad` file with raw counts."""
    out: str
    """`.h5ad` file to write."""
    task: Literal["embed"] = "embed"
    seed: int = 0
    emb_type: Literal["cell", "cge"] = "cell"
    """Cell embeddings, or contextual gene embeddings beside them."""
    output_keys: list[str] = field(default_factory=lambda: ["embeddings"])
    """Of embeddings, llh, gene_llh."""
    pretrained_embedding: str | None = None
    """Protein table of a species that the model has not seen."""
    gene_col_name: str | None = None
    """Column of var with gene ids; none: ensembl_id, or else the index."""


@dataclass(frozen=True)
class PredictRecipe:
    """`task: predict`: what `tftrain predict` does, as a file."""

    checkpoint: str
    """Run folder or checkpoint of a fine-tuning with a head."""
    cells: str
    """`.h5ad` file with raw counts."""
    out: str
    """`.h5ad` file to write."""
    task: Literal["predict"] = "predict"
    seed: int = 0
    unknown: bool = True
    """Call cells `unknown` whose likeliest class is less probable than the threshold of the checkpoint."""
    gene_col_name: str | None = None
    """Column of var with gene ids; none: ensembl_id, or else the index."""


Recipe = TrainRecipe | EmbedRecipe | EvaluateRecipe | PredictRecipe
TASKS: dict[str, type] = {
    "pretrain": TrainRecipe,
    "finetune": FinetuneRecipe,
    "embed": EmbedRecipe,
    "evaluate": EvaluateRecipe,
    "predict": PredictRecipe,
}

MAY_CHANGE = (
    "ray",
    "wandb",
    "checkpoint",
    "prepare",
    "profile",
    "evaluate",
    "evaluate_beside",
    "data.stream",
    "data.ledger",
    "engine.zero_stage",
    "engine.activation_checkpointing",
    "engine.compile",
    "engine.peak_tflops",
    "train.tokens_per_gpu",
    "train.log_every_steps",
    "train.skip_nonfinite",
)
"""Keys that decide how a run is carried out but not what it computes: they may differ when a run is continued."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file, with `key=value` overrides applied. Raises RecipeError."""
    path = Path(path)
    if not path.is_file():
        raise RecipeError(f"no recipe at {path}; a recipe is a YAML file such as recipes/quickstart.yaml")
    return parse(path.read_text(), origin=str(path), overrides=overrides)


def parse(text: str, *, origin: str = "recipe", overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in YAML `text`; `origin` stands before line numbers in errors."""
    return typed_yaml.read(text, _schema, origin=origin, overrides=overrides, defaults={"seed": 0, "task": "pretrain"})


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `parse` reads back equal, itself a program."""
    return SHEBANG + yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain values of JSON types; `task` first."""
    values = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return {"task": values.pop("task"), **values}


def difference(before: Recipe, after: Recipe) -> list[str]:
    """One line `key: old -> new` for each key that changes what a run computes. Empty: `after` may continue it."""
    old, new = dict(_leaves(to_dict(before))), dict(_leaves(to_dict(after)))
    changed = [key for key in {**old, **new} if old.get(key, _ABSENT) != new.get(key, _ABSENT)]
    return [
        f"{key}: {old.get(key, _ABSENT)} -> {new.get(key, _ABSENT)}"
        for key in changed
        if not any(key == free or key.startswith(free + ".") for free in MAY_CHANGE)
    ]


_ABSENT = "(absent)"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; an empty list or mapping is a leaf."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from _leaves(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _schema(resolved: dict, place: Callable[..., str]) -> type:
    """The dataclass of the recipe's task, with `model` typed by its architecture."""
    task = resolved["task"]
    if task not in TASKS:
        raise RecipeError(f"{place('task')}: task is {task!r}; known tasks: {', '.join(TASKS)}")
    schema = TASKS[task]
    if "model" not in {f.name for f in dataclasses.fields(schema)}:
        return schema
    if schema is FinetuneRecipe and resolved.get("model") is None:
        return schema
    model = resolved.setdefault("model", {})
    if not isinstance(model, dict):
        raise RecipeError(f"{place('model')}: model is a mapping with the key `arch`, got {model!r}")
    arch = model.setdefault("arch", "transcriptformer")
    try:
        config = architecture(arch).Config
    except RecipeError as error:
        raise RecipeError(f"{place('model', 'arch')}: {error}") from None
    block = dataclasses.make_dataclass(config.__name__, [("arch", str, arch)], bases=(config,), frozen=True)
    return dataclasses.make_dataclass(schema.__name__, [("model", block)], bases=(schema,), frozen=True, kw_only=True)
