"""The published checkpoint layout, both ways (MODEL.md 1.7).

    config.json, model_weights.pt, vocabs/assay_vocab.json, vocabs/<species>_gene.h5   <->   config, vocabulary, weights

Weight names are the same on both sides. The published file also holds the frozen protein table, under PROTEIN_KEY.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tftrain.cells.vocab import Vocab, write_protein_table
from tftrain.errors import CheckpointError
from tftrain.models.arch import load_state
from tftrain.models.transcriptformer.config import PAD, UNKNOWN, TranscriptFormerConfig, protein_VE
from tftrain.models.transcriptformer.model import TranscriptFormer

PROTEIN_KEY = "gene_embeddings.embedding.weight"
CONFIG_FILE, WEIGHTS_FILE, VOCAB_FOLDER, ASSAY_FILE = "config.json", "model_weights.pt", "vocabs", "assay_vocab.json"

# (field here, section there, key there). What is not in this table is either derived or has one supported value.
_FIELDS = (
    ("layers", "model_config", "num_layers"),
    ("heads", "model_config", "num_heads"),
    ("width", "model_config", "embed_dim"),
    ("feedforward_width", "model_config", "model_dim"),
    ("gene_head_width", "model_config", "gene_head_hidden_dim"),
    ("genes_per_cell", "model_config", "seq_len"),
    ("dropout", "model_config", "dropout"),
    ("softcap", "model_config", "softcap"),
    ("count_eps", "model_config", "log_counts_eps"),
    ("clip_counts", "data_config", "clip_counts"),
    ("normalize_to_scale", "data_config", "normalize_to_scale"),
    ("special_tokens", "data_config", "special_tokens"),
    ("gene_loss_weight", "loss_config", "gene_id_loss_weight"),
)
_ONLY = (
    ("model_config", "activation", "gelu"),
    ("model_config", "attn_bias", False),
    ("model_config", "fw_bias", False),
    ("model_config", "mu_link_fn", "softmax"),
    ("data_config", "gene_pad_token", PAD),
    ("data_config", "aux_pad_token", UNKNOWN),
)


@dataclass(frozen=True)
class Published:
    """A published checkpoint, read."""

    folder: Path
    config: TranscriptFormerConfig
    vocab: Vocab
    weights: dict[str, Tensor]
    """State dict of the trainable part."""
    protein_VE: Tensor
    """The frozen table as the file holds it, special rows first."""
    raw_config: dict[str, Any]
    """config.json as read: what `save_published` starts from to write the same again."""

    @property
    def data_config(self) -> dict[str, Any]:
        """How the published tool reads cells: gene_col_name, use_raw, ..."""
        return self.raw_config["model"]["data_config"]

    def build(self, device: torch.device | str = "cpu") -> TranscriptFormer:
        """The module with these weights and this table."""
        module = TranscriptFormer(self.config, self.vocab.n_genes, self.vocab.protein_width, device="meta")
        module = module.to_empty(device=device)
        load_state(module, self.weights, self.folder / WEIGHTS_FILE)
        module.set_proteins(self.protein_VE.numpy())
        return module


def is_published(folder: str | Path) -> bool:
    """True for a folder with both files that the published layout has and ours has not."""
    return (Path(folder) / CONFIG_FILE).is_file() and (Path(folder) / WEIGHTS_FILE).is_file()


def load_published(folder: str | Path) -> Published:
    """Reads a published-layout folder whole and checks weights against its configuration and vocabulary.

    Raises CheckpointError for a missing or unreadable file, an unsupported setting, and for weights that are missing,
    unknown or of another shape than config.json and vocabs/ say.
    """
    folder = Path(folder)
    raw = _read_json(folder / CONFIG_FILE)
    config = _config_of(folder, raw)
    vocab = Vocab.load(_vocab_files(folder, raw["model"]["data_config"]))
    weights = _read_weights(folder / WEIGHTS_FILE)
    table = weights.pop(PROTEIN_KEY, None)
    shape = (config.n_special + vocab.n_genes, vocab.protein_width)
    got = "nothing" if table is None else f"shape {tuple(table.shape)}"
    if table is None or tuple(table.shape) != shape:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}: {PROTEIN_KEY} is {got}, expected shape {shape} "
            f"({config.n_special} special tokens + {vocab.n_genes} genes of {VOCAB_FOLDER}/)"
        )
    expected = TranscriptFormer(config, vocab.n_genes, vocab.protein_width, device="meta")
    load_state(expected, weights, folder / WEIGHTS_FILE, check_only=True)
    return Published(folder, config, vocab, weights, table.float(), raw)


def save_published(
    folder: str | Path,
    config: TranscriptFormerConfig,
    vocab: Vocab,
    weights: Mapping[str, Tensor],
    *,
    table: Tensor | None = None,
    raw_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes a folder that the published package loads: fp32 or whatever type `weights` has, protein table included.

    `table` (V, E) replaces the one derived from `vocab`; `raw_config` is a config.json to start from. Raises
    CheckpointError for a folder that is not empty and for weights that do not fit `config` and `vocab`.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; name a new folder")
    expected = TranscriptFormer(config, vocab.n_genes, vocab.protein_width, device="meta")
    load_state(expected, weights, "the weights to export", check_only=True)
    (folder / VOCAB_FOLDER).mkdir(parents=True, exist_ok=True)
    mappings = _write_vocab_files(folder / VOCAB_FOLDER, vocab)
    if config.assays:
        rows = {name: row for row, name in enumerate(config.assays)}
        (folder / VOCAB_FOLDER / ASSAY_FILE).write_text(json.dumps(rows))
    table = torch.from_numpy(protein_VE(config, vocab)) if table is None else table
    state = {PROTEIN_KEY: table, **{name: weight.detach().cpu() for name, weight in weights.items()}}
    torch.save(state, folder / WEIGHTS_FILE)
    (folder / CONFIG_FILE).write_text(json.dumps(_raw_of(config, mappings, raw_config), indent=1))


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; a published checkpoint is a folder with {CONFIG_FILE}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; the checkpoint is incomplete, download or copy it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read ({reason}); download or copy it again") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is not a dict of tensors; it is not a published weight file")
    return dict(state)


def _config_of(folder: Path, raw: Any) -> TranscriptFormerConfig:
    where = folder / CONFIG_FILE
    try:
        sections = {name: raw["model"][name] for name in ("model_config", "data_config", "loss_config")}
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{where} lacks the sections model.model_config, model.data_config and model.loss_config; "
            "it is not a published TranscriptFormer configuration"
        ) from None
    for section, key, only in _ONLY:
        got = sections[section].get(key, only)
        if got != only:
            raise CheckpointError(f"{where}: model.{section}.{key} is {got!r}; only {only!r} is supported")
    values: dict[str, Any] = {}
    for name, section, key in _FIELDS:
        if key not in sections[section]:
            raise CheckpointError(f"{where} has no model.{section}.{key}")
        values[name] = sections[section][key]
    values["softcap"] = float(values["softcap"])
    values["normalize_to_scale"] = float(values["normalize_to_scale"] or 0)
    approximate = sections["loss_config"].get("softplus_approx", True)
    values["count_loss"] = "softplus_approx" if approximate else "exact"
    values["assays"] = _assays_of(folder, sections["data_config"], sections["model_config"])
    return TranscriptFormerConfig(**values)


def _assays_of(folder: Path, data_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> list[str]:
    columns = data_config.get("aux_cols")
    columns = [columns] if isinstance(columns, str) else list(columns or [])
    if columns not in ([], ["assay"]) or model_config.get("aux_len") != len(columns):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: aux_cols is {columns} with aux_len {model_config.get('aux_len')}; "
            "supported are none with 0 and 'assay' with 1"
        )
    if not columns:
        return []
    rows = _read_json(folder / VOCAB_FOLDER / ASSAY_FILE)
    names = sorted(rows, key=rows.__getitem__)
    if [rows[name] for name in names] != list(range(len(names))) or names[:1] != [UNKNOWN]:
        raise CheckpointError(f"{folder / VOCAB_FOLDER / ASSAY_FILE}: rows must be 0, 1, 2, ... with {UNKNOWN!r} = 0")
    return names


def _vocab_files(folder: Path, data_config: Mapping[str, Any]) -> list[Path]:
    # The configured folder is where the publisher's files lay; beside config.json is where they are.
    mappings = data_config.get("esm2_mappings")
    if not mappings:
        raise CheckpointError(f"{folder / CONFIG_FILE} has no model.data_config.esm2_mappings, the list of its genes")
    return [folder / VOCAB_FOLDER / Path(name).name for name in mappings]


def _write_vocab_files(folder: Path, vocab: Vocab) -> list[str]:
    """Copies the tables that made the vocabulary, or writes one from memory; returns their names in order."""
    sources = [Path(path) for path in vocab.files]
    if not all(path.is_file() for path in sources):
        write_protein_table(folder / "vocabulary_gene.h5", vocab.gene_ids, vocab.protein_GE())
        return ["vocabulary_gene.h5"]
    names = [path.name for path in sources]
    if len(set(names)) < len(names):
        names = [f"{index}_{name}" for index, name in enumerate(names)]
    for source, name in zip(sources, names, strict=True):
        shutil.copyfile(source, folder / name)
    return names


def _raw_of(
    config: TranscriptFormerConfig, mappings: list[str], raw_config: Mapping[str, Any] | None
) -> dict[str, Any]:
    raw: dict[str, Any] = copy.deepcopy(dict(raw_config or {"model": _DEFAULT_SECTIONS}))
    model = raw["model"]
    for name, section, key in _FIELDS:
        value = getattr(config, name)
        # The published files write whole numbers without a point.
        is_whole = key in ("softcap", "normalize_to_scale") and value == int(value)
        model[section][key] = int(value) if is_whole else value
    for section, key, only in _ONLY:
        model[section][key] = only
    model["loss_config"]["softplus_approx"] = config.count_loss == "softplus_approx"
    model["model_config"]["aux_len"] = config.assay_tokens_per_cell
    model["data_config"]["aux_cols"] = "assay" if config.assays else None
    model["data_config"]["esm2_mappings"] = mappings
    return raw


_DEFAULT_SECTIONS: dict[str, Any] = {
    "model_type": "transcriptformer",
    "model_config": {"block_len": 128, "compile_block_mask": False},
    "data_config": {
        "aux_vocab_path": VOCAB_FOLDER,
        "esm2_mappings_path": VOCAB_FOLDER,
        "pin_memory": False,
        "gene_col_name": "ensembl_id",
        "filter_to_vocabs": True,
        "filter_outliers": 0.0,
        "pad_zeros": True,
        "n_data_workers": 0,
        "sort_genes": False,
        "randomize_genes": False,
        "min_expressed_genes": 0,
        "use_raw": None,
        "remove_duplicate_genes": False,
    },
    "loss_config": {},
    "inference_config": {
        "output_keys": ["embeddings"],
        "batch_size": 8,
        "obs_keys": ["all"],
        "data_files": None,
        "load_checkpoint": WEIGHTS_FILE,
        "output_path": None,
        "num_gpus": 1,
        "device": "auto",
        "precision": "32",
        "pretrained_embedding": None,
        "emb_type": "cell",
    },
}
