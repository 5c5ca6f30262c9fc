"""The libraries of the `eval` extra, imported where they are used and never by a trainer."""

from __future__ import annotations

import importlib
from types import ModuleType

from tftrain.errors import RecipeError


def need(module: str) -> ModuleType:
    """The imported module; raises RecipeError naming the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise RecipeError(
            f"evaluation needs the package {error.name!r}, which is not installed: pip install 'tftrain[eval]'"
        ) from None
