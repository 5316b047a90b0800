"""YAML as the settings read and write it: YAML 1.2's scalars, each key once, no tags, no aliases, no deep nesting."""

import re
from typing import Any

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from grpo_trainer.settings.keys import refuse, shorten

__all__ = ["LONGEST_TEXT", "parse_yaml", "write_yaml"]

LONGEST_TEXT = 100_000  # bytes of a file, or of one value on the command line

_LONGEST_NUMBER = 100  # characters
_DEEPEST = 20  # levels of brackets or indentation


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: 1e-3 is a number, `no` and `on` and 1:30 are text; keys once; no aliases, no tags."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own attribute
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ComposerError(None, None, "aliases (*name) are not read here", event.start_mark)
        # A tag makes PyYAML build what the text may not be: !!int abc, !!timestamp abc.
        if getattr(event, "tag", None) is not None:
            raise ComposerError(None, None, "tags (!!name) are not read here", event.start_mark)
        if self.depth == _DEEPEST:
            raise ComposerError(None, None, f"more than {_DEEPEST} levels deep", event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        # Here and not only in compose_node: what the scanner does with brackets grows with the square of their depth.
        if self.flow_level == _DEEPEST:
            raise ScannerError(None, None, f"more than {_DEEPEST} levels deep", self.get_mark())
        super().fetch_flow_collection_start(TokenClass)

    def construct_scalar(self, node: Any) -> Any:
        value = super().construct_scalar(node)
        if node.tag in _NUMBERS and len(value) > _LONGEST_NUMBER:
            raise ConstructorError(None, None, f"a number has at most {_LONGEST_NUMBER} characters", node.start_mark)
        return value

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, Any] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise ConstructorError(None, None, f"key {shorten(repr(key))} must be text", key_node.start_mark)
            if key in seen:
                message = f"key {key!r} is given twice (first on line {seen[key].line + 1})"
                raise ConstructorError(None, None, message, key_node.start_mark)
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep=True)


class _Dumper(yaml.SafeDumper):
    """Writes short lists on one line."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
_SCALARS = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _name, (_pattern, _first) in _SCALARS.items():
    _starts = [("" if char == "\0" else char) for char in _first]
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts)
_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


def parse_yaml(text: str, source: str, *, document: bool = True) -> Any:
    """Read YAML: a document must hold a mapping; one value of the command line may be anything.

    Raises:
        ConfigError: it is not YAML of the kind above; the message names `source` and the line.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None and document else ""
        refuse(f"{source}{where}: not valid YAML: {shorten(getattr(error, 'problem', None) or error)}")
    if not document:
        return value
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(f"{source} must hold keys and values, such as `steps: 100`: got {type(value).__name__}")
    return value


def write_yaml(tree: dict[str, Any]) -> str:
    """Nested settings as YAML that `parse_yaml` reads back to equal ones."""
    return yaml.dump(_lists(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value
