"""Which settings may change when a run goes on."""

from __future__ import annotations

from typing import Any

from grpo_trainer.settings.layers import changed_keys
from grpo_trainer.settings.schema import Settings

__all__ = ["continued", "differences"]

# Settings that change where a run computes or what it writes, not what it learns: a resume may change them.
_FREE_SECTIONS = ("run.", "log.", "checkpoint.", "health.")
_FREE_KEYS = ("cpu_devices", "mesh", "rollout.mesh", "slices", "compilation_cache", "huge_pages", "phase_timeout")


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """What makes two settings those of different runs.

    Args:
        old: of the run so far.
        new: of the command that would go on with it.

    Returns:
        Dotted key -> (old, new), of every key that must not change. More steps are the same run, continued.
    """
    changed = changed_keys(old, new)
    if new.steps >= old.steps:
        changed.pop("steps", None)
    free = (*_FREE_SECTIONS, "data.") if new.checkpoint.any_data else _FREE_SECTIONS
    return {key: pair for key, pair in changed.items() if key not in _FREE_KEYS and not key.startswith(free)}


def continued(old: Settings, new: Settings) -> Settings:
    """The settings to go on with: a schedule keeps its length when a run gets more steps.

    Args:
        old: of the run so far.
        new: of the command that goes on with it.

    Returns:
        `new`, with the old `optimizer.decay_steps` where the new one is only that of its own steps.
    """
    if new.optimizer.decay_steps != new.updates:
        return new
    optimizer = new.optimizer.model_copy(update={"decay_steps": old.optimizer.decay_steps})
    return new.model_copy(update={"optimizer": optimizer})
