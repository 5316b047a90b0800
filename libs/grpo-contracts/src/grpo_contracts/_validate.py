"""Validation: walks a batch's fields (shapes and dtypes), then the table of rules (values)."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from ._errors import broken
from ._rules import RULES
from ._stages import OPTIONAL, STAGES, PolicyIdentity, Rollout, SamplingLaw, Scored, Spec, Stage

LEVELS = ("shapes", "values")
_NESTED: dict[str, type] = {"rollout": Rollout, "scored": Scored, "law": SamplingLaw, "policy": PolicyIdentity}
_ABSENT = object()


def validate(batch: Stage, level: str = "shapes") -> None:
    """Raise unless a batch keeps its contract.

    Args:
        batch: a Prompts, Rollout, Scored or TrainBatch of numpy or jax arrays; the stages it nests are checked first.
        level: `"shapes"` looks at types, shapes and dtypes, moves no data and works on tracers;
            `"values"` looks at every number as well, after fetching the arrays to the host.

    Raises:
        ContractError: the first rule broken, with stage, field, rule, expected, actual and first bad index.
    """
    if not isinstance(level, str) or level not in LEVELS:
        raise broken("validate", "level", "level", f"one of {LEVELS}", repr(level))
    if type(batch) not in STAGES:
        raise broken("validate", "batch", "type", f"one of {[s.__name__ for s in STAGES]}", type(batch).__name__)
    _check_fields(batch, {})
    if level == "values":
        _check_values(_fetch(batch))


def _check_fields(stage: Stage, sizes: dict[str, int]) -> None:
    """Types, shapes and dtypes of one stage; `sizes` binds each axis letter to the size it first had."""
    name = type(stage).__name__
    for field, spec in stage.specs().items():
        value = getattr(stage, field, _ABSENT)
        if value is _ABSENT:
            raise broken(name, field, "present", "set", "nothing")
        if spec.dtype:
            if value is not None or field not in OPTIONAL:
                _check_array(name, field, spec, value, sizes)
        elif field in _NESTED:
            if type(value) is not _NESTED[field]:
                raise broken(name, field, "type", f"a {_NESTED[field].__name__}", f"a {type(value).__name__}")
            if isinstance(value, Stage):
                _check_fields(value, sizes)
        elif field == "names":
            _check_names(name, value, sizes)
        elif type(value) is not int:
            raise broken(name, field, "type", "an int", f"a {type(value).__name__}")


def _check_array(stage: str, field: str, spec: Spec, value: Any, sizes: dict[str, int]) -> None:
    if not _is_array(value):
        raise broken(stage, field, "type", "a numpy or jax array", f"a {type(value).__name__}")
    options = [dims.split() for dims in spec.dims.split("|")]
    fits = [dims for dims in options if len(dims) == value.ndim]
    wanted = (fits or options)[0]
    shape = tuple(sizes.get(axis, axis) for axis in wanted)
    if not fits or any(sizes.get(axis, size) != size for axis, size in zip(wanted, value.shape)):
        expected = f"of shape [{', '.join(map(str, shape))}] ([{spec.dims}])"
        raise broken(stage, field, "shape", expected, tuple(value.shape), hint=_flatten_hint(field, shape, value.shape))
    if 0 in value.shape:
        raise broken(stage, field, "not_empty", "of at least one element an axis", tuple(value.shape))
    if value.dtype != np.dtype(spec.dtype):
        hint = f"Convert it where it is made: `{field}.astype({spec.dtype!r})`."
        raise broken(stage, field, "dtype", f"of dtype {spec.dtype}", str(value.dtype), hint=hint)
    sizes.update(zip(wanted, value.shape))


def _flatten_hint(field: str, wanted: tuple[int | str, ...], got: tuple[int, ...]) -> str:
    grouped = len(got) == len(wanted) + 1 and got[0] * got[1] == wanted[0]
    shape = ", ".join(["-1", *map(str, wanted[1:])])
    return f"Flatten groups first (`{field}.reshape({shape})`)." if grouped else ""


def _check_names(stage: str, names: Any, sizes: dict[str, int]) -> None:
    fine = type(names) is tuple and all(type(name) is str and name for name in names)
    if not fine or len(set(names)) != len(names) or len(names) != sizes.get("N", len(names)):
        expected = f"a tuple of {sizes.get('N', 'N')} different, non-empty strings"
        raise broken(stage, "names", "type", expected, repr(names)[:200])


def _is_array(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return True
    jax = sys.modules.get("jax")  # a jax array can only exist where jax has been imported
    return jax is not None and isinstance(value, jax.Array)


def _fetch(stage: Stage) -> Any:
    """The same stage with every array in numpy, so that the rules below compute on the host."""
    values = {}
    for field, spec in stage.specs().items():
        value = getattr(stage, field)
        if isinstance(value, Stage):
            value = _fetch(value)
        elif spec.dtype and value is not None:
            try:
                value = np.asarray(value)
            except (TypeError, ValueError, RuntimeError) as error:  # tracers, deleted arrays, arrays of other hosts
                reason = str(error).partition("\n")[0]
                hint = "Check values outside jit, on arrays this process can read."
                raise broken(type(stage).__name__, field, "readable", "readable here", reason, hint=hint) from error
        values[field] = value
    return type(stage)(**values)


def _check_values(stage: Any) -> None:
    for field in stage.specs():
        if isinstance(getattr(stage, field), Stage):
            _check_values(getattr(stage, field))
    for rule in RULES:
        if rule.stage is type(stage) and getattr(stage, rule.field) is not None:
            _check_rule(rule, stage)


def _check_rule(rule: Any, stage: Any) -> None:
    verdict = rule.check(stage)
    ok, wanted = verdict if isinstance(verdict, tuple) else (verdict, None)
    ok = np.asarray(ok)
    if ok.all():
        return
    index = tuple(int(i) for i in np.argwhere(~ok)[0])
    actual = _at(getattr(stage, rule.field), index)
    expected = rule.expected if wanted is None else f"{rule.expected} (here {_at(wanted, index)})"
    raise broken(rule.stage.__name__, rule.field, rule.name, expected, actual, index=index or None, hint=rule.hint)


def _at(value: Any, index: tuple[int, ...]) -> Any:
    """The element a verdict speaks about, as plain Python; the whole field where the verdict is one for all of it."""
    if not isinstance(value, np.ndarray):
        return value
    element = value[index]
    return element.item() if element.ndim == 0 else element.tolist()
