"""YAML into frozen dataclasses, strictly: every key, type and contradiction is checked and placed by file and line.

In: YAML text, `key=value` overrides, a function from the raw mapping to the dataclass that it should be. Out: an
instance, or a RecipeError that names file, line, the value got and the nearest valid key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from tftrain.errors import RecipeError


def read(
    text: str,
    schema_of: Callable[[dict, Callable[..., str]], type],
    *,
    origin: str,
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """The instance that `text` describes; `origin` stands before line numbers in errors.

    `defaults` are keys that interpolations may refer to although the text leaves them out. `schema_of` gets the
    resolved mapping and a function that tells where a key stands, for errors of its own. Raises RecipeError.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        places = {key: f"{origin}:{line}" for key, line in _lines(node, (), origin)} if node is not None else {}
        raw = OmegaConf.to_container(OmegaConf.create(text)) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}:{mark.line + 1}" if mark else origin
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    except OmegaConfBaseException as error:
        raise RecipeError(f"{origin}: {_first_line(error)}") from None
    if not isinstance(raw, dict):
        raise RecipeError(f"{origin}: a recipe is a mapping of keys to values, got {type(raw).__name__}")
    _apply(raw, overrides, places)
    for name, default in (defaults or {}).items():
        raw.setdefault(name, default)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(raw), resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"{_place(places, _path_of(error), origin)}: {_first_line(error)}") from None
    assert isinstance(resolved, dict)
    schema = schema_of(resolved, lambda *path: _place(places, path, origin))
    _check_keys(schema, resolved, (), places, origin)
    try:
        return TypeAdapter(schema).validate_json(json.dumps(resolved), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_type_problems(error, places, origin))) from None
    except RecipeError as error:  # a contradiction that a dataclass found in itself
        raise RecipeError(f"{origin}: {error}") from None


def _lines(node: yaml.Node, path: tuple, origin: str) -> Iterator[tuple[tuple, int]]:
    """((key, ...), line) of every key of a composed YAML document; a key given twice is an error of that line."""
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                dotted = ".".join(map(str, (*path, key)))
                raise RecipeError(f"{origin}:{line}: {dotted} is given twice, first in line {seen[key]}")
            seen[key] = line
            yield (*path, key), line
            yield from _lines(value_node, (*path, key), origin)
    elif isinstance(node, yaml.SequenceNode):
        for index, value_node in enumerate(node.value):
            yield (*path, index), value_node.start_mark.line + 1
            yield from _lines(value_node, (*path, index), origin)


def _apply(raw: dict, overrides: Sequence[str], places: dict[tuple, str]) -> None:
    """Sets `a.b.0.c=value` in `raw`, creating mappings on the way; the key check that follows judges the keys."""
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if not equals or not dotted:
            raise RecipeError(f"override {override!r} is not of the form key=value, such as train.steps=100")
        try:
            value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise RecipeError(f"override {override!r}: {_first_line(error)}") from None
        path: tuple = ()
        target: Any = raw
        keys = dotted.replace("[", ".").replace("]", "").split(".")
        for position, key in enumerate(keys):
            step: Any = key
            if isinstance(target, list):
                if not key.isdigit() or int(key) >= len(target):
                    raise RecipeError(
                        f"override {override!r}: {'.'.join(map(str, path))} has {len(target)} entries, "
                        f"numbered from 0; got {key!r}"
                    )
                step = int(key)
            path = (*path, step)
            places[path] = f"override {override!r}"
            if position == len(keys) - 1:
                target[step] = value
            elif isinstance(target, list):
                target = target[step]
            else:
                if not isinstance(target.get(step), dict | list):
                    target[step] = {}
                target = target[step]


def _check_keys(schema: Any, value: Any, path: tuple, places: dict[tuple, str], origin: str) -> None:
    """Raises RecipeError at the first key that the dataclasses do not have, with the nearest one that they do."""
    schema = _without_none(schema)
    if dataclasses.is_dataclass(schema) and isinstance(value, dict):
        hints = typing.get_type_hints(schema)
        names = [f.name for f in dataclasses.fields(schema)]  # type: ignore[arg-type]
        for key, child in value.items():
            if key not in names:
                dotted = ".".join(map(str, (*path, key)))
                near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
                hint = (
                    f"did you mean {'.'.join(map(str, (*path, near[0])))}?"
                    if near
                    else f"valid here: {', '.join(names)}"
                )
                raise RecipeError(f"{_place(places, (*path, key), origin)}: unknown key {dotted}; {hint}")
            _check_keys(hints[key], child, (*path, key), places, origin)
    elif typing.get_origin(schema) is list and isinstance(value, list):
        for index, child in enumerate(value):
            _check_keys(typing.get_args(schema)[0], child, (*path, index), places, origin)


def _without_none(schema: Any) -> Any:
    """`X` of `X | None`, anything else as it is."""
    if typing.get_origin(schema) in (types.UnionType, typing.Union):
        kept = [arg for arg in typing.get_args(schema) if arg is not type(None)]
        return kept[0] if len(kept) == 1 else schema
    return schema


def _type_problems(error: ValidationError, places: dict[tuple, str], origin: str) -> Iterator[str]:
    for problem in error.errors():
        path = problem["loc"]
        dotted = ".".join(map(str, path))
        if problem["type"] == "missing":
            yield f"{_place(places, path, origin)}: {dotted} is required"
        elif problem["type"] == "value_error":
            yield f"{_place(places, path, origin)}: {dotted or 'recipe'}: {problem['ctx']['error']}"
        else:
            message = problem["msg"][0].lower() + problem["msg"][1:]
            yield f"{_place(places, path, origin)}: {dotted} is {problem['input']!r}: {message}"


def _place(places: dict[tuple, str], path: Sequence, origin: str) -> str:
    """`file:line` (or the override) of the longest known prefix of `path`."""
    for length in range(len(path), 0, -1):
        if tuple(path[:length]) in places:
            return places[tuple(path[:length])]
    return origin


def _path_of(error: OmegaConfBaseException) -> tuple:
    dotted = (error.full_key or "").replace("[", ".").replace("]", "")
    return tuple(int(key) if key.isdigit() else key for key in dotted.split(".") if key)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
