"""All that the loop carries from step to step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from grpo_loss import TrainState

__all__ = ["HealthMemory", "LoopState"]


@dataclass
class HealthMemory:
    """What `Health` must know after a resume.

    Args:
        warnings: every warning so far, as in the summary.
        streak: by warning, for how many steps in a row its condition has held.
        given: by warning, how often it was given.
        skipped: updates in a row, up to now, that were not finite.
    """

    warnings: list[str] = field(default_factory=list)
    streak: dict[str, int] = field(default_factory=dict)
    given: dict[str, int] = field(default_factory=dict)
    skipped: int = 0


@dataclass
class LoopState:
    """Saved whole with each checkpoint: arrays as arrays, the rest as JSON.

    Args:
        train: parameters, moments and counters of the optimizer.
        step: finished steps.
        problems: where the stream of problems stands.
        accuracy: evaluations named `before`, `latest` and `after`.
        seconds: that the run took until now, over all of its processes.
        phases: seconds of each phase.
        health: what the run's watch must know.
    """

    train: TrainState
    step: int = 0
    problems: dict[str, Any] = field(default_factory=dict)
    accuracy: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)
    health: HealthMemory = field(default_factory=HealthMemory)

    def notes(self) -> dict[str, Any]:
        """Everything that is not an array, as plain JSON values."""
        plain = {item.name: getattr(self, item.name) for item in fields(self) if item.name not in ("train", "health")}
        return plain | {"health": asdict(self.health)}

    @classmethod
    def from_notes(cls, train: TrainState, notes: dict[str, Any]) -> LoopState:
        """The inverse of `notes`, with the arrays beside them."""
        health = HealthMemory(**notes["health"])
        return cls(train=train, health=health, **{name: value for name, value in notes.items() if name != "health"})
