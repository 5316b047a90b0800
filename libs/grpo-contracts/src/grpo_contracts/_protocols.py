"""What others may implement: a rollout backend and a reward function, each in ten lines."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from ._provenance import PolicyVersion
from ._stages import Prompts, Rollout


@runtime_checkable
class RolloutBackend(Protocol):
    """Draws completions: `start` once, `update_weights` and `generate` any number of times, then `close`."""

    def start(self) -> None:
        """Acquire what generating needs: caches, processes, connections. Called once, before anything else."""
        ...

    def update_weights(self, params: Any, policy: PolicyVersion) -> None:
        """Generate from these parameters from now on.

        Args:
            params: the policy's parameters, a pytree of arrays; may be donated once this returns.
            policy: their version; every later Rollout carries it.
        """
        ...

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        """Sample a group of completions for each prompt.

        Args:
            prompts: P prompts.
            group_size: completions of each, G.
            seed, step: with prompt, sample and position, all that the draws depend on.

        Returns:
            A valid Rollout of B = P * G rows.
        """
        ...

    def close(self) -> None:
        """Release what `start` acquired. May be called twice."""
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
            answers: the dataset's answer to the problem of each row.
            extra: anything else that the caller knows about each row; accept `**extra` to be safe from additions.

        Returns:
            B rewards; None where a reward could not be computed: the row is then unscored, which is not the same as 0.
        """
        ...
