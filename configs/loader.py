"""Reads a recipe: a YAML file, the files it extends, and `part.key=value` overrides; every mistake is one clear line.

    extends: quickstart.yaml          # optional; relative to this file; this file's keys win
    tasks:
      train_init_states: 0..29        # a range, both ends included; also inside a list: [0..4, 9]

Values are read by YAML 1.2's rules (`configs.dialect`) and never converted: text is not a number, true is not 1.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from configs.describe import describe_recipe, expected_value, part_of, takes_integers
from configs.dialect import parse_yaml, render_yaml
from configs.policy import FlowPart, PolicyPart, unread_settings
from configs.schema import Recipe

_RECIPES = Path(__file__).parent
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_LONGEST_RANGE = 100_000


class RecipeError(ValueError):
    """A recipe, or an override, that cannot be used; one line saying where, what and what was expected."""


class _Layer(NamedTuple):
    source: str
    """A file or an override, as errors name it."""
    tree: dict[str, Any]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, merge and check a recipe.

    Args:
        path: a YAML file.
        overrides: `part.key=value`, the value as YAML; later ones win.

    Raises:
        RecipeError: the file is missing or not YAML, a key is unknown, or a value is not what it must be.
    """
    layers = _file_layers(Path(path), ())
    layers += [_override_layer(text) for text in overrides]
    trees = [_checked(Recipe, layer.tree, "", layer.source) for layer in layers]
    overriding = len(layers) - len(overrides)
    merged: dict[str, Any] = {}
    for over in (*trees[:overriding], reduce(_merged, trees[overriding:], {})):
        merged = _merged(_without_unread(merged, over), over)
    try:
        return Recipe.model_validate_json(json.dumps(merged), strict=True)
    except ValidationError as error:
        lines = [_explain(dict(detail), layers) for detail in error.errors()]
    raise RecipeError("; ".join(lines))


def dump_recipe(recipe: Recipe, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_recipe` reads back to an equal recipe.

    Raises:
        OSError: the file cannot be written.
    """
    path.write_text(render_yaml(recipe.model_dump(mode="json")), encoding="utf-8")


def _file_layers(path: Path, extending: tuple[Path, ...]) -> list[_Layer]:
    """The layers of a file, deepest base first."""
    here = path.resolve()
    if here in extending:
        chain = " -> ".join(step.name for step in (*extending[extending.index(here) :], here))
        raise RecipeError(f"{path}: `extends` goes in a circle: {chain}")
    tree = _parsed(_read(path), str(path))
    base = tree.pop("extends", None)
    own = [_Layer(str(path), tree)]
    if base is None:
        return own
    if not isinstance(base, str):
        raise RecipeError(f"{path}: `extends` = {json.dumps(base)}: expected one file name")
    return _file_layers(path.parent / base, (*extending, here)) + own


def _read(path: Path) -> str:
    if not path.exists():
        shipped = {recipe.name: recipe for recipe in sorted(_RECIPES.glob("*.yaml"))}
        near = difflib.get_close_matches(path.name, shipped, n=1, cutoff=0.5)
        hint = (
            f"did you mean configs/{near[0]}?" if near else f"configs/ holds {', '.join(shipped) or 'none'}"
        )
        raise RecipeError(f"recipe {path} does not exist; {hint}")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error


def _parsed(text: str, source: str) -> dict[str, Any]:
    try:
        tree = parse_yaml(text)
    except ValueError as error:
        raise RecipeError(f"{source}: not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise RecipeError(f"{source}: expected keys and values, such as `name: my-run`, got {_shown(tree)}")
    return tree


def _override_layer(text: str) -> _Layer:
    source = f"override {text}"
    path, equals, value = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"{source}: expected part.key=value, for example preference.beta=0.05")
    try:
        tree = parse_yaml(value)
    except ValueError as error:
        raise RecipeError(f"{source}: the value is not YAML: {error}") from error
    for key in reversed(keys):
        tree = {key: tree}
    return _Layer(source, tree)


def _checked(part: type[BaseModel], tree: Mapping[Any, Any], prefix: str, source: str) -> dict[str, Any]:
    """The tree with its ranges spelled out, once every key is known to the schema."""
    checked: dict[str, Any] = {}
    for key, value in tree.items():
        info = part.model_fields.get(key) if isinstance(key, str) else None
        if info is None:
            _refuse_key(part, f"{prefix}{key}", source)
        path, inner = f"{prefix}{key}", part_of(info)
        if inner is None:
            checked[key] = _spelled_out(value, info, path, source)
        elif isinstance(value, Mapping):
            checked[key] = _checked(inner, value, f"{path}.", source)
        else:
            known = ", ".join(inner.model_fields)
            raise RecipeError(f"{source}: `{path}` = {_shown(value)}: expected a part with keys {known}")
    return checked


def _refuse_key(part: type[BaseModel], path: str, source: str) -> NoReturn:
    """Name the nearest key: in the same part, else anywhere (a key in the wrong part, or no part at all)."""
    name = path.rpartition(".")[2]
    prefix = path.removesuffix(name)
    near = [prefix + match for match in difflib.get_close_matches(name, part.model_fields, n=1, cutoff=0.6)]
    if not near:
        near = [row.path for row in describe_recipe() if row.path.rpartition(".")[2] == name]
    hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(part.model_fields)}"
    raise RecipeError(f"{source}: unknown key `{path}`; {hint}")


def _spelled_out(value: Any, info: FieldInfo, path: str, source: str) -> Any:
    """The value itself, with ranges replaced by their numbers where the field is a list of whole numbers."""
    where = f"{source}: `{path}` = {_shown(value)}"
    if isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected {expected_value(info)}; it is a value, not a part")
    items = value if isinstance(value, list) else [value]
    for item in items:
        if isinstance(item, float) and not math.isfinite(item):
            raise RecipeError(f"{where}: expected {expected_value(info)}, and finite")
        if not isinstance(item, str | int | float | None):
            raise RecipeError(f"{where}: expected {expected_value(info)}")
    if not takes_integers(info):
        return value
    numbers: list[Any] = []
    for item in items:
        found = _RANGE.fullmatch(item) if isinstance(item, str) else None
        if found is None:
            numbers.append(item)
            continue
        first, last = int(found[1]), int(found[2])
        if not first <= last < first + _LONGEST_RANGE:
            raise RecipeError(f"{where}: a range runs upwards, such as 0..29 (30 numbers), got {item}")
        numbers += range(first, last + 1)
    is_list = isinstance(value, list) or numbers != items
    return numbers if is_list else value


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged


def _without_unread(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe `under`, less the settings of its policy that meant something and no longer do once `over` has
    chosen another paradigm or version: who changes that need not know what was set for the old one."""
    before, after = ({"policy": {}, **tree}["policy"] for tree in (under, _merged(under, over)))
    gone = _unread(after).keys() - _unread(before).keys()
    kept: dict[str, Any] = {}
    for key, value in before.items():
        if isinstance(value, Mapping):
            kept[key] = {inner: v for inner, v in value.items() if f"{key}.{inner}" not in gone}
        elif key not in gone:
            kept[key] = value
    return {**under, "policy": kept} if "policy" in under else dict(under)


def _unread(policy: Mapping[str, Any]) -> dict[str, str]:
    plain = PolicyPart.model_fields["paradigm"].default, FlowPart.model_fields["version"].default
    return unread_settings(policy.get("paradigm", plain[0]), policy.get("flow", {}).get("version", plain[1]))


def _explain(detail: Mapping[str, Any], layers: Sequence[_Layer]) -> str:
    """One of pydantic's complaints in the words of the recipe: where, path, value, expected."""
    keys = [key for key in detail["loc"] if isinstance(key, str)]
    path = ".".join(keys)
    source = next((x.source for x in reversed(layers) if _holds(x.tree, keys)), layers[-1].source)
    help_of = {row.path: row for row in describe_recipe()}
    if detail["type"] == "missing":
        about = f" ({help_of[path].type}: {help_of[path].description})" if path in help_of else ""
        return f"{source}: `{path}` is missing{about}"
    if detail["type"] == "value_error":
        part = f"`{path}`: " if path else ""  # a check of the whole recipe has no path
        return f"{source}: {part}{detail['ctx']['error']}"
    row = help_of[path]
    reason = f"; {detail['msg']}" if detail["type"] in ("too_short", "string_pattern_mismatch") else ""
    return f"{source}: `{path}` = {_shown(detail['input'])}: expected {row.type} ({row.description}){reason}"


def _holds(tree: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
