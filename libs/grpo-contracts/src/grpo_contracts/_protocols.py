"""The four phases of a step, each a protocol small enough to implement in ten lines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

from ._stages import Array, PolicyIdentity, Prompts, Rollout, Scored, TrainBatch


@runtime_checkable
class RolloutBackend(Protocol):
    """Draws completions. Its life: `start`, then `update_weights` and `generate` as often as wanted, then `close`."""

    def start(self) -> None:
        """Take what generating needs: caches, processes, connections. Called once, first."""
        ...

    def update_weights(self, params: Any, policy: PolicyIdentity) -> None:
        """Generate from these parameters from now on.

        Args:
            params: the policy's parameters, a pytree of arrays; may be donated once this returns.
            policy: which parameters they are; every later Rollout carries it.
        """
        ...

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        """Sample a group of completions for each prompt.

        Args:
            prompts: P prompts.
            group_size: completions of each, G.
            seed, step: what the draws depend on, with prompt, sample and position, and on nothing else.

        Returns:
            A valid Rollout of B = P * G rows.
        """
        ...

    def close(self) -> None:
        """Give back what `start` took. May be called twice."""
        ...


class RewardFunction(Protocol):
    """Scores completions by their text."""

    def __call__(
        self, *, prompts: list[str], completions: list[str], answers: list[str], **extra: Any
    ) -> list[float | None]:
        """Score each completion.

        Args:
            prompts: the prompt of each of the B rows, as text.
            completions: the completion of each row, as text.
            answers: the data set's answer to each row's problem.
            extra: whatever else the caller knows of each row; take `**extra` to be safe from additions.

        Returns:
            B rewards; None where a reward could not be computed. That row is unscored, which is not the same as 0.
        """
        ...


class AdvantageEstimator(Protocol):
    """Turns rewards into advantages."""

    def __call__(self, scored: Scored) -> Array:
        """Estimate advantages.

        Args:
            scored: B scored rows.

        Returns:
            float32 [B] or [B, T]; 0 on unscored rows and, where [B, T], outside completions.
        """
        ...


class PolicyUpdate(Protocol):
    """Takes optimizer steps on one batch."""

    def __call__(self, state: Any, batch: TrainBatch) -> tuple[Any, Mapping[str, Any]]:
        """Update the policy.

        Args:
            state: whatever the update carries from step to step: parameters, moments, counters. It may be donated.
            batch: what to learn from.

        Returns:
            The new state, and the batch's metrics by name.
        """
        ...
