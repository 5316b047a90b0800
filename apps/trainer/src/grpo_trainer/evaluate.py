"""Held-out accuracy: every problem once, decoded greedily, judged by GSM8K's own rule and by the last number."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from grpo_contracts import FinishReason, PolicyIdentity
from grpo_trainer.run.accuracy import Accuracy
from grpo_trainer.settings.schema import Config
from grpo_gsm8k.grading import BUILT_IN
from grpo_mesh import digest

if TYPE_CHECKING:
    from grpo_trainer.assemble.run import Assembly


@dataclass(frozen=True)
class Evaluation:
    """Greedy accuracy on held-out problems.

    Args:
        strict: right by GSM8K's rule, the number after `####`.
        flexible: right by the last number of the completion.
        formatted: completions that end in one `#### n` line.
        truncated: share of completions that reached the limit.
        mean_length: tokens of a completion.
    """

    strict: Accuracy
    flexible: Accuracy
    formatted: Accuracy
    truncated: float
    mean_length: float

    def metrics(self) -> dict[str, float]:
        """As in metrics.jsonl."""
        return {
            "eval/accuracy": self.strict.share,
            "eval/accuracy_flexible": self.flexible.share,
            "eval/format": self.formatted.share,
            "eval/clipped_ratio": self.truncated,
            "eval/mean_length": self.mean_length,
        }

    def record(self) -> dict[str, Any]:
        """As in the checkpoint's notes and summary.json."""
        return {"correct": self.strict.correct, "total": self.strict.total, **self.metrics()}

    def __str__(self) -> str:
        return (
            f"held-out accuracy {self.strict}, last number {self.flexible.share:.1%}, form {self.formatted.share:.1%}"
        )


def evaluate(run: Assembly, params: Any) -> Evaluation:
    """Decode every held-out problem greedily and judge it.

    Args:
        run: the assembled run.
        params: of the policy.

    Returns:
        The evaluation; the same parameters give the same one.
    """
    asked = run.held_out
    rollout = run.sampler.generate(
        params,
        asked.prompts,
        group_size=1,
        seed=0,
        step=0,
        policy=PolicyIdentity(0, digest(params)),
        law=run.greedy,
    )
    completions = run.rewards.texts(rollout, range(len(rollout.tokens_BT)))
    given = {
        "prompts": [problem.question for problem in asked.problems],
        "completions": completions,
        "answers": [problem.answer for problem in asked.problems],
        "finished": [bool(reason == FinishReason.STOP) for reason in rollout.finish_B],
    }
    total = len(completions)
    strict, loose, formed = (
        Accuracy(sum(value == 1.0 for value in BUILT_IN[name](**given)), total)
        for name in ("answer", "flexible", "format")
    )
    return Evaluation(
        strict,
        loose,
        formed,
        truncated=float(np.mean(rollout.finish_B == FinishReason.LENGTH)),
        mean_length=float(rollout.completion_length_B.mean()),
    )


def evaluate_command(config: Config, *, checkpoint: str | None = None) -> int:
    """Print the held-out accuracy of a policy.

    Args:
        config: names the policy (`model.path`) and the problems.
        checkpoint: run folder whose newest checkpoint is measured in its place.

    Returns:
        Exit code 0.
    """
    from pathlib import Path

    from grpo_trainer.assemble.run import assemble
    from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints

    run = assemble(config)
    for line in run.description:
        print(line, flush=True)
    params, name = run.state.params, config.model.path
    if checkpoint is not None:
        # A reader: nothing of the run may be deleted, and any problems may be put to it.
        checkpoints = Checkpoints(Path(checkpoint) / "checkpoints", keep=1_000_000, any_data=True)
        restored = checkpoints.restore(run.state, run.identity, donate=True)
        if restored is None:
            raise CheckpointError(f"{checkpoint} holds no checkpoint to evaluate")
        params, name = restored.state.params, f"{checkpoint} after step {restored.step}"
    result = evaluate(run, params)
    if jax.process_index() == 0:
        print(f"{name}: {result}")
    return 0
