"""From defaults, YAML and `--set a.b=value` to one checked `Settings`; and back to YAML.

Strict on purpose: an unknown or repeated key, or a value of the wrong type, is refused in one message that names
the key, the nearest valid one, and what was expected.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.scanner import ScannerError

from grpo_trainer.settings.paths import path_fault
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task

__all__ = ["DEFAULTS", "changed_keys", "dump", "flat", "load", "load_saved", "preset_files"]

DEFAULTS = "laptop"  # the preset that holds a task's defaults

_LONGEST_FILE = 100_000  # bytes of YAML, or of one value on the command line
_LONGEST_NUMBER = 100  # characters
_DEEPEST = 20  # levels of brackets or indentation
_MOST_PROBLEMS = 20  # in one message
_SHOWN = 200  # characters of a value in a message
_NEAR, _BEGINNING = 0.75, 4  # similarity, or letters of its beginning, that make a valid key the one that was meant


def load(task: Task, configs: Sequence[str] = (), sets: Sequence[str] = ()) -> Settings:
    """Resolve defaults, the task's `laptop` preset, then each YAML, then each `--set`; later ones win.

    Args:
        task: whose presets and reward functions may be named.
        configs: names of presets or paths of YAML files.
        sets: assignments such as "rollout.group_size=16"; the value is read as YAML.

    Returns:
        The checked settings.

    Raises:
        ConfigError: an unknown or repeated key, a wrong type or range, a contradiction, an unreadable file.
    """
    merged: dict[str, Any] = {}
    for name in (DEFAULTS, *configs):
        source, text = _read(name, preset_files(task))
        _merge(merged, _checked_keys(_parse(text, source), source))
    for assignment in sets:
        _merge(merged, _assigned(assignment))
    settings = _validated(_with_prompt(_with_rewards(merged, task), task))
    if settings.optimizer.decay_steps:
        return settings
    # Resolved, so that the saved settings tell a longer run how long its schedule is.
    optimizer = settings.optimizer.model_copy(update={"decay_steps": settings.updates})
    return settings.model_copy(update={"optimizer": optimizer})


def load_saved(file: Path) -> Settings:
    """Read the resolved settings that a run saved.

    Args:
        file: config.yaml of a run's folder.

    Returns:
        The checked settings.

    Raises:
        ConfigError: it cannot be read, or is not the settings of a run of this version.
    """
    source, text = _read(str(file), {})
    return _validated(_checked_keys(_parse(text, source), source))


def dump(settings: Settings) -> str:
    """The resolved settings as YAML that `load` reads back to an equal one."""
    return yaml.dump(_lists(settings.model_dump()), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value, in the order of the schema."""
    return dict(_leaves(settings.model_dump()))


def changed_keys(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> (old, new)."""
    before, after = flat(old), flat(new)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def preset_files(task: Task) -> dict[str, Path]:
    """Presets that `--config` takes by name."""
    return {file.stem: file for file in sorted((task.folder / "presets").glob("*.yaml"))}


def _read(name: str, presets: Mapping[str, Path]) -> tuple[str, str]:
    source = f"preset {name}" if name in presets else name
    if name not in presets and (fault := path_fault(name)):
        _refuse(f"--config {fault}")
    path = presets[name] if name in presets else Path(name).expanduser()
    try:
        if not path.is_file():
            near = difflib.get_close_matches(name, presets, n=1, cutoff=0.5)
            guess = f" Did you mean {near[0]}?" if near else ""
            _refuse(f"--config must be a YAML file or a preset ({', '.join(presets)}): got {name!r}.{guess}")
        if path.stat().st_size > _LONGEST_FILE:
            _refuse(f"--config {name} must be at most {_LONGEST_FILE:,} bytes: it has {path.stat().st_size:,}")
        return source, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        _refuse(f"--config {name} cannot be read: {error}")


def _validated(merged: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        _refuse("\n".join(dict.fromkeys(_explained(error))))


def _with_prompt(merged: dict[str, Any], task: Task) -> dict[str, Any]:
    """The instruction as the run will use it: a policy that ships with the task was taught on bare questions."""
    prompt = merged.get("prompt", {})
    if prompt.get("instruction") is not None:
        return merged
    path = merged.get("model", {}).get("path", Settings().model.path)
    shipped = isinstance(path, str) and path in task.policies
    return merged | {"prompt": prompt | {"instruction": "" if shipped else task.instruction}}


def _with_rewards(merged: dict[str, Any], task: Task) -> dict[str, Any]:
    """Reward functions and weights as the run will use them, so that the saved settings show them."""
    reward = merged.get("reward", {})
    if unknown := [name for name in task.weights if name not in task.rewards]:
        _refuse(f"the task {task.name}: `weights` names {unknown[0]!r}, which is not in its `rewards`")
    functions = reward.get("functions") or list(task.weights)
    if not isinstance(functions, list) or not all(isinstance(name, str) for name in functions):
        return merged  # the schema says what is wrong with it
    for name in functions:
        module, colon, function = name.partition(":")
        own = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if name not in task.rewards and not own:
            built_in = ", ".join(f"`{known}`" for known in task.rewards)
            _refuse(f"reward.functions must hold {built_in} or module:function: got {name!r}")
    weights = reward.get("weights") or [task.weights.get(name, 1.0) for name in functions]
    return merged | {"reward": reward | {"functions": functions, "weights": weights}}


def _assigned(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key:
        _refuse(f"--set must look like key=value, such as rollout.group_size=8: got {_cut(repr(assignment))}")
    field = _field(key)
    if field is None and _section(key) is None:
        _refuse(_unknown(key, "--set"))
    value: Any = text
    # Text stays text: a mesh of 1,-1,1 or a folder called 2026 needs no quotes on the command line.
    annotation = None if field is None else field.annotation
    is_text = annotation is str or (annotation == str | None and text != "null")
    if not is_text or text[:1] in ("'", '"'):
        if len(text) > _LONGEST_FILE:
            _refuse(f"--set {key} must have at most {_LONGEST_FILE:,} characters: got {len(text):,}")
        value = _parse(text, f"--set {key}", document=False)
    for part in reversed(key.split(".")):
        value = {part: value}
    return _checked_keys(value, "--set")


# -- keys ----------------------------------------------------------------------------------------------------------


def _field(key: str) -> FieldInfo | None:
    """The leaf that a dotted key names, or None."""
    name, _, leaf = key.rpartition(".")
    section = _section(name) if name else Settings
    return section.model_fields.get(leaf) if section and not _section(key) else None


def _section(key: str) -> type[BaseModel] | None:
    """The model of a section such as `rollout` or `model.lora`, or None."""
    section: type[BaseModel] = Settings
    for name in key.split("."):
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _valid_keys(prefix: str = "") -> list[str]:
    names = (_section(prefix.rstrip(".")) or Settings).model_fields
    keys = [_valid_keys(f"{prefix}{name}.") if _section(prefix + name) else [prefix + name] for name in names]
    return [key for part in keys for key in part]


def _unknown(key: str, source: str) -> str:
    near = _nearest(key)
    if near is None:
        name = key.partition(".")[0]
        section = _section(name)
        where = f"{name} has {', '.join(section.model_fields)}" if section else "--print-config shows all keys"
        return f"{source}: unknown key {_cut(key)!r}: {where}."
    field = _field(near)
    expected = f", which takes {_expected(field)}: {field.description}" if field else ""
    return f"{source}: unknown key {key!r}. The nearest valid key is {near!r}{expected}."


def _nearest(key: str) -> str | None:
    """The valid key that was probably meant, or None: a guess that is far off misleads."""
    valid = _valid_keys()
    section, _, leaf = key.rpartition(".")
    # `group_size` alone, or `sampler.group_size`: the last part is right and only its section is missing or wrong.
    if same := next((known for known in valid if known.rpartition(".")[2] == leaf), None):
        return same
    # Section and last part are compared apart: a long section that is right must not lend its likeness to the rest.
    leaves = [known.rpartition(".")[2] for known in valid if not section or known.rpartition(".")[0] == section]
    leaves = leaves or [known.rpartition(".")[2] for known in valid]
    near = difflib.get_close_matches(leaf[:_SHOWN], leaves, n=1, cutoff=_NEAR)
    near = near or [known for known in leaves if len(leaf) >= _BEGINNING and known.startswith(leaf)]
    found = [known for known in valid if near and known.rpartition(".")[2] == near[0]]
    return next((known for known in found if known.rpartition(".")[0] == section), found[0] if found else None)


def _cut(value: Any) -> str:
    """A value as text, short enough for a message."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _checked_keys(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Refuse unknown keys; drop sections left empty (all of their keys commented out)."""
    checked: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        section = _section(name)
        if name not in Settings.model_fields:
            dotted = _field(name) is not None
            problems.append(
                f"{source}: key {name!r} must be written nested, `{name.replace('.', ': {', 1)}: ...}}`."
                if dotted
                else _unknown(f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name, source)
            )
        elif section is None:
            checked[name] = value
        elif value is not None:
            checked[name] = value
            problems += _faults_in_section(name, value, source)
    if problems:
        _refuse("\n".join(problems))
    return checked


def _faults_in_section(key: str, given: Any, source: str) -> Iterator[str]:
    section = _section(key) or Settings
    if not isinstance(given, dict):
        leaves = ", ".join(section.model_fields)
        yield f"{source}: {key!r} is a section and must hold keys ({leaves}): got {_cut(repr(given))}."
        return
    for leaf, value in given.items():
        if leaf not in section.model_fields:
            yield _unknown(f"{key}.{leaf}", source)
        elif _section(f"{key}.{leaf}"):
            yield from _faults_in_section(f"{key}.{leaf}", value, source)


def _merge(into: dict[str, Any], layer: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict) and _section(prefix + name):
            # New weights are made for new functions; those of an earlier layer belonged to the earlier functions.
            if name == "reward" and "functions" in value and "weights" not in value:
                into[name].pop("weights", None)
            _merge(into[name], value, f"{prefix}{name}.")
        else:
            into[name] = dict(value) if isinstance(value, dict) else value


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if _section(prefix + name) is None:
            yield prefix + name, value
        else:
            yield from _leaves(value, f"{prefix}{name}.")


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lists(inner) for name, inner in value.items()}
    return list(value) if isinstance(value, tuple) else value


# -- messages ------------------------------------------------------------------------------------------------------


def _refuse(message: str) -> NoReturn:
    # Imported here: the error's root lives in grpo_contracts, whose numpy would double the time of --print-config.
    from grpo_trainer.settings.errors import ConfigError

    raise ConfigError(message) from None


def _explained(error: ValidationError) -> Iterator[str]:
    problems = error.errors()
    lists = {problem["loc"][:-1] for problem in problems} - {()}
    for problem in problems[:_MOST_PROBLEMS]:
        # A bad item also fails its list: the item says more.
        if problem["loc"] in lists:
            continue
        names = [str(part) for part in problem["loc"]]
        # The rest of the way leads into a list or a mapping.
        key = next((key for n in range(len(names), 0, -1) if _field(key := ".".join(names[:n]))), "")
        field = _field(key) if key else None
        if field is None:
            # A contradiction: our own text, which names its keys.
            yield str(problem["msg"]).removeprefix("Value error, ")
            continue
        got = problem["input"]
        item = f" (item {names[-1]})" if isinstance(problem["loc"][-1], int) else ""
        hint = ""
        options = _options(field)
        if options and isinstance(got, str):
            near = difflib.get_close_matches(got, options, n=1, cutoff=0.6)
            hint = f" Did you mean {near[0]}?" if near else ""
        what = "nothing" if got is None else f"{_cut(repr(got))} ({type(got).__name__})"
        yield f"{key} must be {_expected(field)} ({field.description}): got {what}{item}.{hint}"


def _options(field: FieldInfo) -> list[str]:
    return [str(option) for option in get_args(field.annotation)] if get_origin(field.annotation) is Literal else []


_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
_BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def _expected(field: FieldInfo) -> str:
    options = _options(field)
    if options:
        return f"one of {', '.join(options)}"
    annotation, metadata = field.annotation, list(field.metadata)
    while get_origin(annotation) is Annotated:
        annotation, *inner = get_args(annotation)
        metadata += inner
    if get_origin(annotation) is dict:
        return "a mapping of names to values"
    if get_origin(annotation) is tuple:
        if field.examples:
            return f"a list of names like {', '.join(map(str, field.examples))}"
        item = get_args(annotation)[0]
        choice = ", ".join(map(str, get_args(item))) if get_origin(item) is Literal else ""
        kinds = " or ".join(_KINDS[kind] for kind in get_args(item) or (item,) if kind is not int or item is int)
        return f"a list of {choice}" if choice else f"a list, each of it {kinds}"
    bounds = [f"{sign} {getattr(m, name):g}" for name, sign in _BOUNDS.items() for m in metadata if hasattr(m, name)]
    kinds = [_KINDS.get(kind, str(kind)) for kind in get_args(annotation) or (annotation,)]
    kind = " or ".join(sorted(kinds, key="null".__eq__))
    if field.examples:
        kind = f"empty or like {', '.join(map(str, field.examples))}"
    elif any(getattr(m, "min_length", 0) for m in metadata):
        kind = "non-empty text"
    return " ".join([kind, " and ".join(bounds)]).strip()


# -- YAML ----------------------------------------------------------------------------------------------------------


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
                raise ConstructorError(None, None, f"key {_cut(repr(key))} must be text", key_node.start_mark)
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


def _parse(text: str, source: str, *, document: bool = True) -> Any:
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None and document else ""
        _refuse(f"{source}{where}: not valid YAML: {_cut(getattr(error, 'problem', None) or error)}")
    if not document:
        return value
    if value is None:
        return {}
    if not isinstance(value, dict):
        _refuse(f"{source} must hold keys and values, such as `steps: 100`: got {type(value).__name__}")
    return value
