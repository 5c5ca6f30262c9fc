"""Imports go one way: a module may import rooms above its own in this list, never below."""

import ast
from pathlib import Path

import pytest

ROOMS = [
    "errors",
    "stop",
    "typed_yaml",
    "cells",
    "models",
    "training",
    "cluster",
    "recipe",
    "pretrained",
    "tuning",
    "assemble",
    "embed",
    "export",
    "predict",
    "evals",
    "beside",
    "display",
    "launch",
    "run",
    "cli",
]
ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("tftrain", "data_prep") for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> list[str]:
    """Absolute names of every module imported anywhere in the file, inside functions too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).with_suffix("").parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def room(dotted: str) -> str | None:
    """`training` of `tftrain.training.optim`; None for what is not in the house."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "tftrain" and len(parts) > 1 and parts[1] in ROOMS else None


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_points_back(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    modules = imported_modules(path)
    if parts[0] == "tftrain":
        assert not [name for name in modules if name.split(".")[0] == "data_prep"], "tftrain must not import data_prep"
        own = ROOMS.index(parts[1]) if parts[1] in ROOMS else None
        back = [name for name in modules if own is not None and room(name) and ROOMS.index(room(name)) > own]
        assert not back, f"{'.'.join(parts)} imports {back}, which stand below it"


def test_every_room_is_in_the_list():
    rooms = {
        path.relative_to(ROOT / "tftrain").parts[0].removesuffix(".py")
        for path in FILES
        if path.is_relative_to(ROOT / "tftrain")
    }
    assert rooms - {"__init__", "__main__"} == set(ROOMS)


@pytest.mark.parametrize(
    ("room_name", "libraries"),
    [("models", {"ray", "deepspeed", "wandb"}), ("cells", {"torch", "deepspeed", "wandb"}), ("training", {"ray"})],
)
def test_rooms_do_not_know_these_libraries(room_name, libraries):
    for path in FILES:
        if path.relative_to(ROOT).parts[1] == room_name and path.name != "metrics.py":
            used = {name.split(".")[0] for name in imported_modules(path)}
            assert not used & libraries, f"{path} imports {used & libraries}"


def test_only_engine_knows_deepspeed():
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        if "deepspeed" in {n.split(".")[0] for n in imported_modules(path)}
    }
    assert users <= {"tftrain/training/engine.py"}
