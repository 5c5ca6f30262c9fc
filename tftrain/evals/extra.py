"""The libraries of the `eval` extra, imported where they are used and never by a trainer."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from tftrain.errors import RecipeError


def need(module: str) -> ModuleType:
    """The imported module; raises RecipeError naming the extra where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(str(error.name)) from None


def find(module: str) -> None:
    """Raises RecipeError as `need` does, without importing anything."""
    if importlib.util.find_spec(module) is None:
        raise _missing(module)


def _missing(module: str) -> RecipeError:
    return RecipeError(f"evaluation needs the package {module!r}, which is not installed: pip install 'tftrain[eval]'")
