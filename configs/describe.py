"""What every recipe key is: its path, type, default and meaning, read from the schema itself.

`--help` prints these, and the loader's errors quote them, so neither can drift from the schema.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from configs.schema import Recipe


class KeyHelp(NamedTuple):
    """One key of the recipe."""

    path: str
    """Dotted path as an override writes it, e.g. `preference.beta`."""
    type: str
    """What a value may be, in words, e.g. `number > 0`."""
    default: str
    """The default as YAML writes it, or `required`."""
    description: str
    """Meaning and unit."""


def describe_recipe() -> list[KeyHelp]:
    """Every key of the recipe that takes a value, in the schema's order."""
    return _describe(Recipe, "")


def expected_value(info: FieldInfo) -> str:
    """What a field's value may be, in words: `number > 0`, `one of lora, dora`, `list of whole numbers`."""
    bounds = " and ".join(text for text in map(_bound, info.metadata) if text)
    choices = get_args(info.annotation) if get_origin(info.annotation) in (Union, UnionType) else ()
    kinds = [kind for kind in choices or (info.annotation,) if kind is not NoneType]
    words = " or ".join(_type_words(kind) for kind in kinds)
    return f"{words} {bounds}".strip() + (" or null" if NoneType in choices else "")


def part_of(info: FieldInfo) -> type[BaseModel] | None:
    """The part that a field holds, None when it holds a plain value."""
    kind = info.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def takes_integers(info: FieldInfo) -> bool:
    """Whether the field is a list of whole numbers, so that a range such as 0..29 may stand in it."""
    return get_origin(info.annotation) is tuple and get_args(info.annotation)[0] is int


def _describe(part: type[BaseModel], prefix: str) -> list[KeyHelp]:
    rows: list[KeyHelp] = []
    for name, info in part.model_fields.items():
        inner = part_of(info)
        if inner is not None:
            rows += _describe(inner, f"{prefix}{name}.")
            continue
        default = "required" if info.default is PydanticUndefined else _default_text(info.default)
        rows.append(KeyHelp(f"{prefix}{name}", expected_value(info), default, info.description or ""))
    return rows


def _default_text(default: object) -> str:
    return default if isinstance(default, str) else json.dumps(default)


def _bound(limit: object) -> str:
    match limit:
        case Ge(ge=number):
            return f">= {number}"
        case Gt(gt=number):
            return f"> {number}"
        case Le(le=number):
            return f"<= {number}"
        case Lt(lt=number):
            return f"< {number}"
    return ""


def _type_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in inner)
    if origin is tuple:
        return "list of " + _type_words(inner[0]).replace("number", "numbers")
    plain = {int: "whole number", float: "number", str: "text", bool: "true or false"}
    return plain[kind]


def settings_of(recipe: BaseModel) -> dict[str, Any]:
    """Every setting of a recipe by its dotted path, as JSON values."""
    return _flat(recipe.model_dump(mode="json"), "")


def _flat(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
