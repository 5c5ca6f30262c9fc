"""`tftrain export`: any checkpoint -> a folder in the published layout, with adapters merged into the weights.

Out: what the published package and `tftrain embed` load without the base, plus model.safetensors (the same weights
without the protein table) and provenance.json. A task head has no place in that layout and stays behind.
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file

from tftrain import __version__
from tftrain.errors import CheckpointError
from tftrain.models.transcriptformer.upstream import save_published
from tftrain.pretrained import load_pretrained


def export(checkpoint: str | Path, out: str | Path) -> str:
    """Writes the folder and returns a line on it. Raises CheckpointError for a checkpoint that cannot be used, an
    architecture without a published layout, and a folder that is not empty."""
    model = load_pretrained(checkpoint)
    if model.architecture.name != "transcriptformer":
        raise CheckpointError(f"{model.origin}: {model.architecture.name} has no published layout to be exported to")
    module = model.build()
    table = module.gene_embeddings.protein_VE  # type: ignore[union-attr]
    save_published(
        out,
        model.config,
        model.vocab,
        model.weights,
        table=table,  # type: ignore[arg-type]
        raw_config=model.published.raw_config if model.published else None,
    )
    save_file({name: value.contiguous() for name, value in model.weights.items()}, Path(out) / "model.safetensors")
    facts = {"version": __version__, "checkpoint": model.origin, **model.facts}
    (Path(out) / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")
    left = " (its head stays behind: `tftrain predict` needs the run itself)" if model.head else ""
    return f"{out}: {sum(value.numel() for value in model.weights.values()):,} weights{left}"
