"""From defaults, YAML and `--set a.b=value` to one checked `Settings`; and back to YAML.

Strict on purpose: an unknown or repeated key, or a value of the wrong type, is refused in one message that names
the key, the nearest valid one, and what was expected.
"""

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from grpo_trainer.settings.keys import (
    checked_keys,
    config_error,
    explain,
    field_of,
    leaves,
    refuse,
    section_of,
    shorten,
    unknown_key,
)
from grpo_trainer.settings.paths import path_fault
from grpo_trainer.settings.schema import Settings
from grpo_trainer.settings.strict_yaml import LONGEST_TEXT, parse_yaml, write_yaml
from grpo_trainer.task import Task

__all__ = ["DEFAULTS", "changed_keys", "dump", "flat", "load", "load_saved", "preset_files"]

DEFAULTS = "laptop"  # the preset that holds a task's defaults


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
    faults: list[str] = []
    files = [partial(_from_file, name, preset_files(task)) for name in (DEFAULTS, *configs)]
    for layer in [*files, *(partial(_assigned, assignment) for assignment in sets)]:
        try:
            _merge(merged, layer())
        except config_error() as fault:
            faults.append(str(fault))
    if faults:
        refuse("\n".join(dict.fromkeys(faults)))
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
    return _validated(_from_file(str(file), {}))


def dump(settings: Settings) -> str:
    """The resolved settings as YAML that `load` reads back to an equal one."""
    return write_yaml(settings.model_dump())


def flat(settings: Settings) -> dict[str, Any]:
    """Dotted key -> value, in the order of the schema."""
    return dict(leaves(settings.model_dump()))


def changed_keys(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ -> (old, new)."""
    before, after = flat(old), flat(new)
    return {key: (before[key], after[key]) for key in after if before[key] != after[key]}


def preset_files(task: Task) -> dict[str, Path]:
    """Presets that `--config` takes by name."""
    return {file.stem: file for file in sorted((task.folder / "presets").glob("*.yaml"))}


def _from_file(name: str, presets: Mapping[str, Path]) -> dict[str, Any]:
    source, text = _read(name, presets)
    return checked_keys(parse_yaml(text, source), source)


def _read(name: str, presets: Mapping[str, Path]) -> tuple[str, str]:
    source = f"preset {name}" if name in presets else name
    if name not in presets and (fault := path_fault(name)):
        refuse(f"--config {fault}")
    path = presets[name] if name in presets else Path(name).expanduser()
    try:
        if not path.is_file():
            near = difflib.get_close_matches(name, presets, n=1, cutoff=0.5)
            guess = f" Did you mean {near[0]}?" if near else ""
            refuse(f"--config must be a YAML file or a preset ({', '.join(presets)}): got {name!r}.{guess}")
        if path.stat().st_size > LONGEST_TEXT:
            refuse(f"--config {name} must be at most {LONGEST_TEXT:,} bytes: it has {path.stat().st_size:,}")
        return source, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        refuse(f"--config {name} cannot be read: {error}")


def _validated(merged: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        refuse("\n".join(dict.fromkeys(explain(error))))


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
        refuse(f"the task {task.name}: `weights` names {unknown[0]!r}, which is not in its `rewards`")
    functions = reward.get("functions") or list(task.weights)
    if not isinstance(functions, list) or not all(isinstance(name, str) for name in functions):
        return merged  # the schema says what is wrong with it
    for name in functions:
        module, colon, function = name.partition(":")
        own = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
        if name not in task.rewards and not own:
            built_in = ", ".join(f"`{known}`" for known in task.rewards)
            refuse(f"reward.functions must hold {built_in} or module:function: got {name!r}")
    weights = reward.get("weights") or [task.weights.get(name, 1.0) for name in functions]
    return merged | {"reward": reward | {"functions": functions, "weights": weights}}


def _assigned(assignment: str) -> dict[str, Any]:
    key, equals, text = assignment.partition("=")
    key = key.strip()
    if not equals or not key:
        refuse(f"--set must look like key=value, such as rollout.group_size=8: got {shorten(repr(assignment))}")
    field = field_of(key)
    if field is None and section_of(key) is None:
        refuse(unknown_key(key, "--set"))
    value: Any = text
    # Text stays text: a mesh of 1,-1,1 or a folder called 2026 needs no quotes on the command line.
    annotation = None if field is None else field.annotation
    is_text = annotation is str or (annotation == str | None and text != "null")
    if not is_text or text[:1] in ("'", '"'):
        if len(text) > LONGEST_TEXT:
            refuse(f"--set {key} must have at most {LONGEST_TEXT:,} characters: got {len(text):,}")
        value = parse_yaml(text, f"--set {key}", document=False)
    for part in reversed(key.split(".")):
        value = {part: value}
    return checked_keys(value, "--set")


def _merge(into: dict[str, Any], layer: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in layer.items():
        if isinstance(value, dict) and isinstance(into.get(name), dict) and section_of(prefix + name):
            # New weights are made for new functions; those of an earlier layer belonged to the earlier functions.
            if name == "reward" and "functions" in value and "weights" not in value:
                into[name].pop("weights", None)
            _merge(into[name], value, f"{prefix}{name}.")
        else:
            into[name] = dict(value) if isinstance(value, dict) else value
