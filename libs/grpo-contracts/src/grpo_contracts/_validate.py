"""Validation: the fields of a batch (shapes and dtypes), then the table of rules (values)."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter
from typing import Any

import numpy as np

from ._arrays import describe, is_array, to_numpy
from ._errors import broken
from ._provenance import PolicyVersion, SamplingParams
from ._rules import RULES, Rule
from ._stages import OPTIONAL, STAGES, Rollout, Scored, Spec, Stage

LEVELS = ("shapes", "values")
NESTED: dict[str, type] = {"rollout": Rollout, "scored": Scored, "sampling": SamplingParams, "policy": PolicyVersion}
_ABSENT = object()


def validate(batch: Stage, level: str = "shapes") -> None:
    """Raise unless a batch keeps its contract.

    Args:
        batch: a Prompts, Rollout, Scored or TrainBatch of numpy or jax arrays; the stages inside it are checked first.
        level: `"shapes"` checks types, shapes and dtypes, without moving data, and works on tracers;
            `"values"` also fetches the arrays to the host and checks every number.

    Raises:
        ContractError: the first broken rule, with stage, field, rule, expected, actual and first bad index.
    """
    if not isinstance(level, str) or level not in LEVELS:
        raise broken("validate", "level", "level", f"one of {LEVELS}", describe(level))
    if type(batch) not in STAGES:
        raise broken("validate", "batch", "type", f"one of {[s.__name__ for s in STAGES]}", describe(batch))
    _check_fields(batch, {})
    if level == "values":
        _check_values(fetch(batch))


def _check_fields(stage: Stage, sizes: dict[str, int]) -> None:
    """Checks types, shapes and dtypes of one stage; `sizes` binds each axis letter to its first size."""
    name = type(stage).__name__
    for field, spec in stage.specs().items():
        value = getattr(stage, field, _ABSENT)
        if value is _ABSENT:
            raise broken(name, field, "present", "set", "nothing")
        if spec.dtype:
            if value is not None or field not in OPTIONAL:
                _check_array(name, field, spec, value, sizes)
        elif field in NESTED:
            if type(value) is not NESTED[field]:
                raise broken(name, field, "type", f"a {NESTED[field].__name__}", describe(value))
            if isinstance(value, Stage):
                _check_fields(value, sizes)
        elif field == "names":
            _check_names(name, value, sizes)
        elif type(value) is not int:
            raise broken(name, field, "type", "an int", describe(value))


def _check_array(stage: str, field: str, spec: Spec, value: Any, sizes: dict[str, int]) -> None:
    if not is_array(value):
        raise broken(stage, field, "type", "a numpy or jax array", describe(value))
    options = [dims.split() for dims in spec.dims.split("|")]
    fits = [dims for dims in options if len(dims) == value.ndim]
    wanted = (fits or options)[0]
    shape = tuple(sizes.get(axis, axis) for axis in wanted)
    if not fits or any(sizes.get(axis, size) != size for axis, size in zip(wanted, value.shape)):
        expected = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)}) [{spec.dims}]"
        hint = _flatten_hint(field, shape, value.shape)
        raise broken(stage, field, "shape", expected, tuple(value.shape), hint=hint, verb="have shape")
    if 0 in value.shape:
        raise broken(stage, field, "not_empty", "at least one element per axis", tuple(value.shape), verb="have")
    if value.dtype != np.dtype(spec.dtype):
        hint = f"Convert it where it is made: `{field}.astype({spec.dtype!r})`."
        raise broken(stage, field, "dtype", spec.dtype, str(value.dtype), hint=hint, verb="have dtype")
    sizes.update(zip(wanted, value.shape))


def _flatten_hint(field: str, wanted: tuple[int | str, ...], got: tuple[int, ...]) -> str:
    grouped = len(got) == len(wanted) + 1 and got[0] * got[1] == wanted[0]
    shape = ", ".join(["-1", *map(str, wanted[1:])])
    return f"Flatten groups first (`{field}.reshape({shape})`)." if grouped else ""


def _check_names(stage: str, names: Any, sizes: dict[str, int]) -> None:
    fine = type(names) is tuple and all(type(name) is str and name for name in names)
    if not fine or len(set(names)) != len(names) or len(names) != sizes.get("N", len(names)):
        expected = f"a tuple of {sizes.get('N', 'N')} different, non-empty strings"
        raise broken(stage, "names", "type", expected, describe(names))


def fetch(stage: Stage) -> Any:
    """A stage with all arrays in numpy, and its policy version and sampling parameters in plain Python.

    Args:
        stage: a stage that is valid at level `"shapes"`.

    Returns:
        The same stage, on the host.

    Raises:
        ContractError: an array cannot be read here, or the sampling parameters are invalid.
    """
    values = {}
    for field, spec in stage.specs().items():
        value = getattr(stage, field)
        if isinstance(value, Stage):
            value = fetch(value)
        elif isinstance(value, PolicyVersion):
            value = value.concrete()
        elif isinstance(value, SamplingParams):
            value = replace(value)  # validates itself again: frozen fields can still be overwritten
        elif spec.dtype and value is not None:
            value = to_numpy(value, type(stage).__name__, field)
        values[field] = value
    return type(stage)(**values)


def _check_values(stage: Any) -> None:
    for field in stage.specs():
        if isinstance(getattr(stage, field), Stage):
            _check_values(getattr(stage, field))
    for rule in RULES:
        if rule.stage is type(stage) and attrgetter(rule.field)(stage) is not None:
            _check_rule(rule, stage)


def _check_rule(rule: Rule, stage: Any) -> None:
    outcome = rule.check(stage)
    ok, wanted = outcome if isinstance(outcome, tuple) else (outcome, None)
    ok = np.asarray(ok)
    if ok.all():
        return
    index = tuple(int(i) for i in np.argwhere(~ok)[0])
    actual = _at(attrgetter(rule.field)(stage), index)
    expected = rule.expected if wanted is None else f"{rule.expected} (here {_at(wanted, index)})"
    raise broken(rule.stage.__name__, rule.field, rule.name, expected, actual, index=index or None, hint=rule.hint)


def _at(value: Any, index: tuple[int, ...]) -> Any:
    """The element that a rule rejected, as plain Python; the whole field if the rule judges it as one."""
    if not isinstance(value, np.ndarray):
        return value
    element = value[index]
    return element.item() if element.ndim == 0 else element.tolist()
