"""YAML as recipes use it: plain values only, by YAML 1.2's rules, so that `1e-3` is a number and `no` is text.

PyYAML follows YAML 1.1, where `1e-3` is text, `on` is true, `1:30` is 90 and a key given twice is silently the
last one.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+0123456789."),
    ),
}
"""YAML 1.2's core schema: pattern and first characters of each kind of scalar that is not text."""


class _Reader(yaml.SafeLoader):
    """Safe YAML: builds dicts, lists, text, numbers, booleans and null only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                problem = "a key must be a word"
            elif key.value in seen:
                problem = f"key `{key.value}` is given twice"
            else:
                seen.add(key.value)
                continue
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


class _Writer(yaml.SafeDumper):
    """Writes what `_Reader` reads back equal."""

    def ignore_aliases(self, data: object) -> bool:
        return True


# Assigned, not inherited: the inherited tables are YAML 1.1's.
_Reader.yaml_implicit_resolvers = {}
_Writer.yaml_implicit_resolvers = {}
for _kind, (_pattern, _first) in _SCALARS.items():
    for _dialect in (_Reader, _Writer):
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), _first)
# 1.1 reads a leading zero as octal.
_Reader.add_constructor("tag:yaml.org,2002:int", lambda reader, node: int(node.value))
# Lists on one line: thirty initial states are not thirty lines.
_Writer.add_representer(
    list, lambda writer, items: writer.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)
)


def parse_yaml(text: str) -> Any:
    """The plain value that the text writes.

    Raises:
        ValueError: not YAML, or a key given twice; one line, with the line's number.
    """
    try:
        return yaml.load(text, Loader=_Reader)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        raise ValueError(f"{error.problem}{line}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


def render_yaml(value: object) -> str:
    """YAML text that `parse_yaml` reads back to an equal value; keys keep their order."""
    return yaml.dump(value, Dumper=_Writer, sort_keys=False, width=110, allow_unicode=True)
