"""cluster.yaml is valid by Ray's own schema and offers GPU workers and CPU-only readers."""

import copy
from pathlib import Path

import pytest
import yaml

CLUSTER = yaml.safe_load((Path(__file__).parents[1] / "cluster.yaml").read_text())


def validated(config: dict) -> dict:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it():
    assert set(validated(CLUSTER)["available_node_types"]) == {"head", "gpu", "reader"}


def test_ray_refuses_a_misspelt_key():
    config = copy.deepcopy(CLUSTER)
    config["available_node_types"]["reader"]["max_wrkers"] = 3
    with pytest.raises(Exception, match="max_wrkers"):
        validated(config)


def test_the_head_starts_in_the_repository():
    """`ray job submit recipes/x.yaml` looks the path up where `ray start` ran."""
    assert any("cd ~/tftrain" in line and "--head" in line for line in CLUSTER["head_start_ray_commands"])
