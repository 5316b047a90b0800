"""Is the run still learning? A fault is reported once, kept in the summary, or stops the run with a sentence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from grpo_contracts import GrpoError, PolicyVersion, Rollout, Scored, TrainBatch
from grpo_mesh import digest
from grpo_trainer.report.terminal import printable
from grpo_trainer.rewards.scoring import Transcript
from grpo_trainer.rewards.workers import FAILURES
from grpo_trainer.run.capsule import Capsule, write_capsule
from grpo_trainer.run.folder import RunFolder
from grpo_trainer.run.progress import Progress
from grpo_trainer.run.state import HealthMemory
from grpo_trainer.settings.schema import Settings

if TYPE_CHECKING:
    from grpo_trainer.assemble import Run

__all__ = ["Diverged", "Health", "StaleWeights"]

# Mean |sampler - trainer| log-probability of a token, nats: a hundred times what the same arithmetic gives in another
# order, and still far below what moves a ratio across its clip range.
_USUAL_GAP = {"float32": 1e-4, "bfloat16": 0.05}

# A condition that comes and goes for days is reported this often: warnings are kept, and saved with every checkpoint.
_MOST = 3

_MOSTLY = 0.5  # share of completions that are cut, above which the limit decides what is learned
_EXCERPT = 300  # characters of a completion in a warning


class Diverged(GrpoError, RuntimeError):
    """Updates in a row were not finite; the message names the capsule to look into."""


class StaleWeights(GrpoError, RuntimeError):
    """A rollout was drawn from parameters other than the trainer's."""


class Health:
    """Watches the steps of a run.

    Args:
        settings: `health` and what decides how far sampler and trainer may differ.
        folder: of the run.
        progress: where warnings are shown.
        memory: what a resumed run must know; changed in place and saved with each checkpoint.
    """

    def __init__(self, settings: Settings, folder: RunFolder, progress: Progress, memory: HealthMemory) -> None:
        self._memory = memory
        self._settings, self._folder, self._progress = settings, folder, progress
        self._failures: Counter[str] = Counter()
        rollout = settings.rollout
        # With filters, sampler and trainer have different distributions: their gap then measures no rounding error.
        self._compares = rollout.top_k == 0 and rollout.top_p == 1 and rollout.min_p == 0
        self._max_gap = settings.health.max_logp_gap or _USUAL_GAP[settings.model.compute_dtype]

    def check_rollout(self, rollout: Rollout, policy: PolicyVersion) -> None:
        """Refuse completions of other parameters than the trainer's.

        Args:
            rollout: as the sampler gave it.
            policy: of the parameters that are about to be updated.

        Raises:
            StaleWeights: they differ.
        """
        if rollout.policy != policy:
            raise StaleWeights(
                f"a rollout must be drawn from the parameters that learn from it, {_shown(policy)}: this one is of "
                f"{_shown(rollout.policy)}. The sampler was not given the latest parameters; start again from the last "
                "checkpoint"
            )

    def reward_failures(self, step: int, failures: list[dict[str, Any]]) -> None:
        """Count and write down what reward functions failed at, with the texts that caused it; warn of the first ones.

        Args:
            step: 1 for the first.
            failures: as `Rewards.score` reports them.
        """
        for failure in failures:
            self._failures[failure["kind"]] += max(1, len(failure["rows"]))
            name = f"reward {failure['function']} {failure['kind']}"
            if name not in self._memory.given:
                self._warn(
                    step,
                    name,
                    True,
                    f"reward function {failure['function']!r} {failure['message']} (the first such failure; all are in "
                    "reward_failures.jsonl)",
                )
        self._folder.reward_failures(step, failures)

    def check_rewards(self, step: int, scored: Scored, transcript: Transcript) -> None:
        """Warn where every reward of the first step is 0, with what the policy wrote.

        Args:
            step: 1 for the first.
            scored: the step's completions with their rewards.
            transcript: their texts.
        """
        if step == 1 and scored.scored_B.any() and not np.any(scored.reward_BN):
            said = printable(transcript.completions[0][:_EXCERPT], newlines=False)
            self._warn(
                step,
                "unrewarded",
                True,
                f"every reward of the first step is 0: nothing can be learned from it. The policy wrote, for example: "
                f"{said!r}. Does the prompt ask for the form that the rewards read (prompt.instruction)?",
            )

    def watch(self, step: int, learned: Mapping[str, float]) -> dict[str, float]:
        """Look at a step's metrics; warn once of each thing that begins to be wrong, the first few times it does.

        Args:
            step: 1 for the first.
            learned: the step's metrics.

        Returns:
            What to add to them: completions that reward functions failed at, by kind.
        """
        health = self._settings.health
        updates = self._settings.loss.epochs * self._settings.loss.minibatches
        last = int(learned["skipped_in_a_row"])
        self._memory.skipped = self._memory.skipped + last if last == updates else last
        gap = learned.get("sampling_logp_difference/mean", 0.0)
        self._warn(
            step,
            "silent",
            learned["frac_reward_zero_std"] == 1,
            f"for {health.silent_steps} steps all rewards within each group were equal, so nothing was learned. Are "
            "the problems too easy or too hard, or is the reward the same for everything?",
            after=health.silent_steps,
        )
        self._warn(
            step,
            "truncated",
            learned["completions/clipped_ratio"] > _MOSTLY,
            f"{learned['completions/clipped_ratio']:.0%} of the completions reached rollout.max_new_tokens="
            f"{self._settings.rollout.max_new_tokens} and were cut: allow more tokens, or check that the policy knows "
            "its end token",
        )
        self._warn(
            step,
            "gap",
            self._compares and not gap <= self._max_gap,
            f"sampler and trainer differ by {gap:.2g} nats a token on average, more than {self._max_gap:g} "
            "(health.max_logp_gap): the ratio of the first update is not 1",
        )
        self._warn(
            step,
            "skipped",
            learned["finite"] < 1,
            f"an update is not finite and was skipped; {health.max_skipped} in a row stop the run (health.max_skipped)",
        )
        counts = {f"reward_failures/{kind}": float(self._failures[kind]) for kind in FAILURES}
        self._failures.clear()
        return counts

    @property
    def failing(self) -> bool:
        """Whether so many updates in a row were skipped that the run must stop, once its state is saved."""
        return self._memory.skipped >= self._settings.health.max_skipped

    def finish(self, step: int) -> None:
        """Warn at the end of a run in which no step could teach anything, however short it was.

        Args:
            step: the last one.
        """
        silent = self._memory.streak.get("silent", 0)
        if silent == step < self._settings.health.silent_steps:
            text = f"in all {step} steps all rewards within each group were equal, so nothing was learned"
            self._memory.warnings.append(text)
            self._progress.note(f"warning: {text}")

    def stop(self, step: int, run: Run, params: Any, batch: TrainBatch, learned: Mapping[str, float]) -> None:
        """End the run with a capsule of the step that failed.

        Args:
            step: the step just done, 1 for the first; its checkpoint is on disk.
            run: the assembled run.
            params: which the skipped updates left as they were.
            batch: what was to be learned from.
            learned: the step's metrics.

        Raises:
            Diverged: always.
        """
        path = self._folder.path / f"capsule-{step:06}.zip"
        capsule = Capsule(
            step=step,
            settings=self._settings,
            identity=run.identity,
            parameters=digest(params),
            checkpoint=self._folder.checkpoints.name,
            versions=run.versions,
            metrics={name: float(value) for name, value in learned.items()},
            warnings=tuple(self._memory.warnings),
        )
        if jax.process_index() == 0:
            write_capsule(path, capsule, batch)
        raise Diverged(
            f"{self._memory.skipped} updates in a row up to step {step} had a loss, gradient or step that is not "
            f"finite (health.max_skipped={self._settings.health.max_skipped}). The parameters are as before them, "
            f"saved as {self._folder.checkpoints / f'step_{step}'}. See what was not finite, and where: "
            f"hatch run apps/{run.task.name}:replay {path}"
        )

    def _warn(self, step: int, name: str, wrong: bool, text: str, *, after: int = 1) -> None:
        """Warn when a condition has held for `after` steps in a row, at most `_MOST` times a run."""
        memory = self._memory
        memory.streak[name] = memory.streak.get(name, 0) + 1 if wrong else 0
        if memory.streak[name] != after or memory.given.get(name, 0) == _MOST:
            return
        memory.given[name] = memory.given.get(name, 0) + 1
        last = " (not repeated: see metrics.jsonl)" if memory.given[name] == _MOST else ""
        memory.warnings.append(f"step {step}: {text}{last}")
        self._progress.note(f"warning: step {step}: {text}{last}")


def _shown(policy: PolicyVersion) -> str:
    return f"step {policy.step} with digest {policy.digest[:12]}"
