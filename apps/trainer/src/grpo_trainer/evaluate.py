"""Held-out accuracy: every problem once, decoded greedily, judged by the task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_contracts import FinishReason, PolicyVersion
from grpo_mesh import digest
from grpo_trainer.assemble import Run, assemble
from grpo_trainer.report.accuracy import Accuracy
from grpo_trainer.rewards.scoring import transcribe
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task

__all__ = ["Evaluation", "evaluate", "evaluate_command"]


@dataclass(frozen=True)
class Evaluation:
    """Greedy accuracy on held-out problems.

    Args:
        strict: right by the rule that results are published by.
        lenient: right, however the answer is put.
        formed: completions in the form that was asked for.
        truncated: share of completions that reached the limit.
        mean_length: tokens of a completion.
    """

    strict: Accuracy
    lenient: Accuracy
    formed: Accuracy
    truncated: float
    mean_length: float

    def metrics(self) -> dict[str, float]:
        """As in metrics.jsonl."""
        return {
            "eval/accuracy": self.strict.share,
            "eval/accuracy_flexible": self.lenient.share,
            "eval/format": self.formed.share,
            "eval/clipped_ratio": self.truncated,
            "eval/mean_length": self.mean_length,
        }

    def record(self) -> dict[str, Any]:
        """As in the checkpoint's notes and summary.json."""
        return {"correct": self.strict.correct, "total": self.strict.total, **self.metrics()}

    def __str__(self) -> str:
        return f"held-out accuracy {self.strict}, lenient {self.lenient.share:.1%}, form {self.formed.share:.1%}"


def evaluate(run: Run, params: Any) -> Evaluation:
    """Decode every held-out problem greedily and have the task judge it.

    Args:
        run: the assembled run.
        params: of the policy.

    Returns:
        The evaluation; the same parameters give the same one.
    """
    asked = run.held_out
    rollout = run.plan.sampler.generate(
        params,
        asked.prompts,
        group_size=1,
        seed=0,
        step=0,
        policy=PolicyVersion(0, digest(params)),
        sampling=run.plan.greedy,
    )
    judgements = transcribe(rollout, asked.problems, run.tokenizer, run.settings.rollout.stop).judgements(run.task)
    total = len(judgements)
    return Evaluation(
        Accuracy(sum(judgement.strict for judgement in judgements), total),
        Accuracy(sum(judgement.lenient for judgement in judgements), total),
        Accuracy(sum(judgement.formed for judgement in judgements), total),
        truncated=float(np.mean(rollout.finish_B == FinishReason.LENGTH)),
        mean_length=float(rollout.completion_length_B.mean()),
    )


def evaluate_command(settings: Settings, task: Task, *, checkpoint: Path | None = None) -> int:
    """Print the held-out accuracy of a policy.

    Args:
        settings: name the policy (`model.path`) and the problems.
        task: reads the problems and judges the answers.
        checkpoint: run folder whose newest checkpoint is measured instead; the settings are then the run's.

    Returns:
        Exit code 0.
    """
    run = assemble(settings, task)
    for line in run.description[:-1]:  # all but the steps, which nobody takes here
        print(line, flush=True)
    params, name = run.state.params, settings.model.path
    if checkpoint is not None:
        # Any problems may be put to it.
        restored = Checkpoints.reader(checkpoint / "checkpoints").restore(run.state, None, donate=True)
        if restored is None:
            raise CheckpointError(f"{checkpoint} holds no checkpoint to evaluate")
        params, name = restored.state.params, f"{checkpoint} after step {restored.step}"
    result = evaluate(run, params)
    if jax.process_index() == 0:
        print(f"{name}: {result}")
    return 0
