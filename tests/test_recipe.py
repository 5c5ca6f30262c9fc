"""Recipes are strictly typed; an error names the line, the value got and the nearest valid key."""

import os
import stat
from pathlib import Path

import pytest

from tftrain.errors import RecipeError
from tftrain.recipe import MAY_CHANGE, difference, dump, load, parse

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))

SMALL = """\
task: pretrain
out: runs/${seed}
seed: 3
data:
  sources:
    - {uri: a.soma, species: homo_sapiens}
    - {uri: b.soma, species: mus_musculus, weight: 0.5}
  protein_tables: [a.h5, b.h5]
model: {layers: 2, heads: 2, width: 32}
optim: {lr: 1e-3}
train: {steps: 10, cells_per_step: 16, tokens_per_gpu: 4096}
"""


def test_defaults_yaml_and_overrides_in_that_order():
    recipe = parse(SMALL, overrides=["train.steps=20", "data.sources[1].weight=2", "optim.betas=[0.8,0.9]"])
    assert recipe.out == "runs/3", "interpolation"
    assert recipe.train.steps == 20, "override over YAML"
    assert recipe.data.sources[1].weight == 2.0
    assert recipe.data.sources[0].weight == 1.0, "default of the dataclass"
    assert recipe.optim.lr == 1e-3
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.model.arch == "transcriptformer"
    assert recipe.model.layers == 2


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("seed: 3", "sed: 3"), "r.yaml:3: unknown key sed; did you mean seed?"),
        (
            ("species: mus_musculus", "specie: x"),
            "r.yaml:7: unknown key data.sources.1.specie; did you mean data.sources.1.species?",
        ),
        (("layers: 2", "layrs: 2"), "r.yaml:9: unknown key model.layrs; did you mean model.layers?"),
        (("layers: 2", "zzz: 2"), "valid here: layers, heads"),
        (("layers: 2", "layers: two"), "r.yaml:9: model.layers is 'two': input should be a valid integer"),
        (("layers: 2", "layers: 2.5"), "model.layers is 2.5"),
        (("heads: 2", "heads: 3"), "model.width is 32, not a multiple of model.heads (3)"),
        (("steps: 10, ", "steps: '10', "), "train.steps is '10'"),
        (("task: pretrain", "task: pretran"), "r.yaml:1: task is 'pretran'; known tasks: pretrain, finetune"),
        (("{layers: 2", "{arch: bert, layers: 2"), "known architectures: transcriptformer"),
        (("  protein_tables: [a.h5, b.h5]\n", ""), "data.protein_tables is required"),
        (("seed: 3", "seed: 3\nseed: 4"), "r.yaml:4: seed is given twice, first in line 3"),
        (("out: runs/${seed}", "out: runs/${sede}"), "r.yaml:2: "),
        (("seed: 3", "seed: [3"), "r.yaml:"),
        (("weight: 0.5", "weight: heavy"), "r.yaml:7: data.sources.1.weight is 'heavy'"),
    ],
)
def test_errors_name_line_value_and_remedy(change, expected):
    text = SMALL.replace(*change)
    assert text != SMALL
    with pytest.raises(RecipeError) as error:
        parse(text, origin="r.yaml")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stepz=1", "override 'train.stepz=1': unknown key train.stepz; did you mean train.steps?"),
        ("train.steps=many", "override 'train.steps=many': train.steps is 'many'"),
        ("train.steps", "not of the form key=value"),
        ("data.sources.7.weight=1", "data.sources has 2 entries"),
    ],
)
def test_an_override_is_checked_like_the_file(override, expected):
    with pytest.raises(RecipeError) as error:
        parse(SMALL, overrides=[override])
    assert expected in str(error.value)


def test_dump_is_a_recipe_that_reads_back_equal():
    recipe = parse(SMALL)
    text = dump(recipe)
    assert text.startswith("#!/usr/bin/env -S tftrain run\n")
    assert dump(parse(text)) == text
    assert difference(recipe, parse(text)) == []


def test_difference_names_what_a_run_computes_and_nothing_else():
    before = parse(SMALL)
    after = parse(
        SMALL, overrides=["optim.lr=2e-3", "ray.num_workers=4", "train.tokens_per_gpu=8192", "data.sources.1.weight=1"]
    )
    assert difference(before, after) == ["data.sources.1.weight: 0.5 -> 1.0", "optim.lr: 0.001 -> 0.002"]
    assert "ray" in MAY_CHANGE


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at"):
        load(tmp_path / "absent.yaml")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_is_a_program(path):
    load(path)
    assert path.read_text().startswith("#!/usr/bin/env -S tftrain run\n")
    assert os.stat(path).st_mode & stat.S_IXUSR
