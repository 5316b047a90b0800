"""What a step shows: seconds by phase, and the numbers people know from other GRPO trainers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from grpo_contracts import FinishReason, Scored, TrainBatch
from grpo_trainer.run.progress import Progress
from grpo_mesh import deadline

if TYPE_CHECKING:
    from grpo_trainer.assemble.run import Assembly
    from grpo_trainer.data.stream import Asked


class Clock:
    """Seconds of each phase of one step, shown while it runs.

    Args:
        progress: told which phase is under way.
        limit: seconds a phase may take in a job of several processes, before it ends with the ranks that are missing.
        totals: seconds of each phase over all steps; every phase is added to it.
    """

    def __init__(self, progress: Progress, *, limit: float, totals: dict[str, float]) -> None:
        self._progress, self._limit, self._totals = progress, limit, totals
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, *, together: bool = True) -> Iterator[None]:
        """Time the block under this name; host work and device work alike, since every phase ends on the host.

        Args:
            name: of the phase.
            together: whether the processes of a job meet at its beginning; False for what the first one does alone.
        """
        begun = time.perf_counter()
        with self._progress.phase(name), deadline(name, self._limit) if together else nullcontext():
            yield
        took = time.perf_counter() - begun
        for seconds in (self.seconds, self._totals):
            seconds[name] = seconds.get(name, 0.0) + took


_events: Counter[str] = Counter()


def _hear(event: str, duration_secs: float, **_: Any) -> None:
    _events[event] += 1


jax.monitoring.register_event_duration_secs_listener(_hear)


def step_metrics(batch: TrainBatch, learned: Mapping[str, float], clock: Clock) -> dict[str, float]:
    """One step's line of metrics.jsonl.

    Args:
        batch: what was learned from. Rewards are shown raw, function by function, and weighted together as `reward`.
        learned: the updates' metrics.
        clock: with the phases `rollout`, `reward`, `advantage` and `update` done.

    Returns:
        name -> number; lengths in tokens, times in seconds, log-probabilities in nats.
    """
    scored, rollout = batch.scored, batch.scored.rollout
    length_B = rollout.completion_length_B
    group_std_P = [
        scored.reward_B[mine].std() if mine.any() else 0.0
        for group in np.unique(rollout.group_B)
        for mine in [(rollout.group_B == group) & scored.scored_B]
    ]
    means = {
        name: _mean(scored.reward_BN[:, column], scored.scored_BN[:, column])
        for column, name in enumerate(scored.names)
    }
    seconds = dict(clock.seconds)
    total = sum(seconds.values())
    return {
        "reward": _mean(scored.reward_B, scored.scored_B),
        "reward_std": float(np.mean(group_std_P)),
        "frac_reward_zero_std": float(np.mean(np.asarray(group_std_P) == 0)),
        **{f"reward/{name}": value for name, value in means.items()},
        **({"accuracy": means["answer"]} if "answer" in means else {}),
        "unscored": float(np.mean(~scored.scored_B)),
        "completions/mean_length": float(length_B.mean()),
        "completions/max_length": float(length_B.max()),
        "completions/clipped_ratio": float(np.mean(rollout.finish_B == FinishReason.LENGTH)),
        **learned,
        "tokens": float(length_B.sum()),
        "tokens_per_second": float(length_B.sum()) / total,
        "rollout/tokens_per_second": float(length_B.sum()) / seconds["rollout"],
        "update/tokens_per_second": float(length_B.sum()) / seconds["update"],
        # By this process, or found in the compilation cache: constant once every shape has come.
        "compiled_programs": float(_events["/jax/core/compile/backend_compile_duration"]),
        "seconds": total,
        **{f"seconds/{name}": value for name, value in seconds.items()},
    }


def sample_records(run: Assembly, scored: Scored, asked: Asked, *, count: int) -> list[dict[str, Any]]:
    """Some completions of a step, as text with their rewards, for completions.jsonl and the report.

    Args:
        run: the assembled run.
        scored: of this step.
        asked: the problems of this step.
        count: how many, spread over the groups.

    Returns:
        One record each.
    """
    rollout = scored.rollout
    rows = np.unique(np.linspace(0, len(rollout.tokens_BT) - 1, num=count, dtype=int)) if count else ()
    texts = run.rewards.texts(rollout, rows)
    return [
        {
            "prompt": asked.problems[rollout.group_B[row]].question,
            "completion": text,
            "answer": asked.problems[rollout.group_B[row]].answer,
            "reward": float(scored.reward_B[row]) if scored.scored_B[row] else None,
            "rewards": {
                name: float(scored.reward_BN[row, n]) if scored.scored_BN[row, n] else None
                for n, name in enumerate(scored.names)
            },
            "finish": FinishReason(int(rollout.finish_B[row])).name.lower(),
            "tokens": int(rollout.completion_length_B[row]),
        }
        for row, text in zip(rows, texts)
    ]


def _mean(value_B: np.ndarray, counted_B: np.ndarray) -> float:
    return float(value_B[counted_B].mean()) if counted_B.any() else 0.0
