"""The keys of the schema: which exist, which one was probably meant, and what each takes."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from grpo_trainer.settings.schema import Settings

__all__ = [
    "checked_keys",
    "config_error",
    "explain",
    "field_of",
    "leaves",
    "refuse",
    "section_of",
    "shorten",
    "unknown_key",
]

_MOST_PROBLEMS = 20  # in one message
_SHOWN = 200  # characters of a value in a message
_NEAR, _BEGINNING = 0.75, 4  # similarity, or letters of its beginning, that make a valid key the one that was meant


def refuse(message: str) -> NoReturn:
    """Raise a `ConfigError`, whose sentence stands alone: not chained to what was being handled."""
    raise config_error()(message) from None


def config_error() -> type[Exception]:
    """`ConfigError`, imported only now: its root lives beside numpy, which would double the time of --print-config."""
    from grpo_trainer.settings.errors import ConfigError

    return ConfigError


def shorten(value: Any) -> str:
    """A value as text, short enough for a message."""
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def field_of(key: str) -> FieldInfo | None:
    """The leaf that a dotted key names, or None."""
    name, _, leaf = key.rpartition(".")
    section = section_of(name) if name else Settings
    return section.model_fields.get(leaf) if section and not section_of(key) else None


def section_of(key: str) -> type[BaseModel] | None:
    """The model of a section such as `rollout` or `model.lora`, or None."""
    section: type[BaseModel] = Settings
    for name in key.split("."):
        annotation = section.model_fields[name].annotation if name in section.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        section = annotation
    return section


def _valid_keys(prefix: str = "") -> list[str]:
    names = (section_of(prefix.rstrip(".")) or Settings).model_fields
    keys = [_valid_keys(f"{prefix}{name}.") if section_of(prefix + name) else [prefix + name] for name in names]
    return [key for part in keys for key in part]


def unknown_key(key: str, source: str) -> str:
    """Say that a key is unknown, and which one was probably meant."""
    near = _nearest(key)
    if near is None:
        name = key.partition(".")[0]
        section = section_of(name)
        where = f"{name} has {', '.join(section.model_fields)}" if section else "--print-config shows all keys"
        return f"{source}: unknown key {shorten(key)!r}: {where}."
    field = field_of(near)
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


def checked_keys(given: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Refuse unknown keys; drop sections left empty (all of their keys commented out)."""
    checked: dict[str, Any] = {}
    problems = []
    for name, value in given.items():
        section = section_of(name)
        if name not in Settings.model_fields:
            dotted = field_of(name) is not None
            problems.append(
                f"{source}: key {name!r} must be written nested, `{name.replace('.', ': {', 1)}: ...}}`."
                if dotted
                else unknown_key(f"{name}.{next(iter(value))}" if isinstance(value, dict) and value else name, source)
            )
        elif section is None:
            checked[name] = value
        elif value is not None:
            checked[name] = value
            problems += _faults_in_section(name, value, source)
    if problems:
        refuse("\n".join(problems))
    return checked


def _faults_in_section(key: str, given: Any, source: str) -> Iterator[str]:
    section = section_of(key) or Settings
    if not isinstance(given, dict):
        leaves = ", ".join(section.model_fields)
        yield f"{source}: {key!r} is a section and must hold keys ({leaves}): got {shorten(repr(given))}."
        return
    for leaf, value in given.items():
        if leaf not in section.model_fields:
            yield unknown_key(f"{key}.{leaf}", source)
        elif section_of(f"{key}.{leaf}"):
            yield from _faults_in_section(f"{key}.{leaf}", value, source)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of each setting in nested ones, in their order."""
    for name, value in tree.items():
        if section_of(prefix + name) is None:
            yield prefix + name, value
        else:
            yield from leaves(value, f"{prefix}{name}.")


def explain(error: ValidationError) -> Iterator[str]:
    """A sentence for each fault that the schema found."""
    problems = error.errors()
    lists = {problem["loc"][:-1] for problem in problems} - {()}
    for problem in problems[:_MOST_PROBLEMS]:
        # A bad item also fails its list: the item says more.
        if problem["loc"] in lists:
            continue
        names = [str(part) for part in problem["loc"]]
        # The rest of the way leads into a list or a mapping.
        key = next((key for n in range(len(names), 0, -1) if field_of(key := ".".join(names[:n]))), "")
        field = field_of(key) if key else None
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
        what = "nothing" if got is None else f"{shorten(repr(got))} ({type(got).__name__})"
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
        if get_origin(item) is Literal:
            return f"a list of {', '.join(map(str, get_args(item)))}"
        kinds = " or ".join(_KINDS[kind] for kind in get_args(item) or (item,) if kind is not int or item is int)
        return f"a list, each of it {kinds}"
    bounds = [f"{sign} {getattr(m, name):g}" for name, sign in _BOUNDS.items() for m in metadata if hasattr(m, name)]
    kinds = [_KINDS.get(kind, str(kind)) for kind in get_args(annotation) or (annotation,)]
    kind = " or ".join(sorted(kinds, key="null".__eq__))
    if field.examples:
        kind = f"empty or like {', '.join(map(str, field.examples))}"
    elif any(getattr(m, "min_length", 0) for m in metadata):
        kind = "non-empty text"
    return " ".join([kind, " and ".join(bounds)]).strip()
