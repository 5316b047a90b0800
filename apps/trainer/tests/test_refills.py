"""Groups that teach nothing are replaced by further ones: which are kept, and a run with refills is still exact."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import TASK, metrics, settings

from grpo_contracts import FinishReason, PolicyVersion, Rollout, SamplingParams, Scored, validate
from grpo_trainer.assemble import assemble
from grpo_trainer.rewards.refill import choose_groups, count_with_signal
from grpo_trainer.rewards.scoring import Transcript
from grpo_trainer.run.checkpoint import Checkpoints
from grpo_trainer.run.folder import versions
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Problem
from grpo_trainer.train import fit, train

G, T = 2, 5


def draw(first: int, *rewards: tuple[float | None, float | None]) -> tuple[Scored, Transcript]:
    """A batch of groups of two, whose prompts and tokens are the group's number, counted from `first`."""
    groups = len(rewards)
    number_B = np.repeat(np.arange(first, first + groups, dtype=np.int32), G)
    zero_BT, B = np.zeros((groups * G, T), np.float32), groups * G
    rollout = Rollout(
        tokens_BT=np.repeat(number_B[:, None], T, 1),
        prompt_length_B=np.full(B, 2, np.int32),
        total_length_B=np.full(B, T, np.int32),
        loss_mask_BT=np.broadcast_to(np.arange(T) >= 2, (B, T)).copy(),
        logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        finish_B=np.full(B, FinishReason.LENGTH, np.int8),
        prompt_id_B=number_B,
        sample_B=np.tile(np.arange(G, dtype=np.int32), groups),
        group_B=np.repeat(np.arange(groups, dtype=np.int32), G),
        group_size=G,
        sampling=SamplingParams(),
        policy=PolicyVersion(3, "ab" * 32),
        vocab_size=100,
        pad_id=0,
    )
    scored = Scored.from_rewards(rollout, {"mine": [value for pair in rewards for value in pair]})
    texts = tuple(f"{number}.{sample}" for number in range(first, first + groups) for sample in range(G))
    problems = tuple(Problem(f"{number}?", f"={number}", f"x:{number}") for number in number_B)
    return scored, Transcript(problems, texts, (False,) * B, (3,) * B, step=3)


SAME, ALSO_SAME, DIFFERENT, UNSCORED, HALF = (1.0, 1.0), (0.0, 0.0), (0.0, 1.0), (None, None), (None, 1.0)


def test_groups_with_signal_are_counted() -> None:
    scored, _ = draw(1, SAME, DIFFERENT, UNSCORED, ALSO_SAME, DIFFERENT, HALF)
    assert count_with_signal(scored) == 2  # of one score there is nothing to compare


@pytest.mark.parametrize(
    ("draws", "kept"),
    [
        ([[SAME, DIFFERENT, ALSO_SAME]], [1, 2, 3]),
        ([[SAME, DIFFERENT, ALSO_SAME], [DIFFERENT, SAME, SAME]], [1, 2, 4]),
        ([[SAME, SAME, SAME], [DIFFERENT, DIFFERENT, SAME], [DIFFERENT, DIFFERENT, SAME]], [4, 5, 7]),
        ([[UNSCORED, SAME, SAME], [SAME, HALF, DIFFERENT]], [1, 2, 6]),
    ],
)
def test_groups_with_signal_come_first_and_stay_in_order(draws: list[Any], kept: list[int]) -> None:
    batches = [draw(1 + 3 * n, *rewards) for n, rewards in enumerate(draws)]
    scored, transcript = choose_groups(batches, 3)
    validate(scored, level="values")
    rollout = scored.rollout
    assert rollout.prompt_id_B.tolist() == np.repeat(kept, G).tolist()
    assert rollout.tokens_BT.tolist() == [[number] * T for number in np.repeat(kept, G)]
    assert rollout.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert rollout.sample_B.tolist() == [0, 1] * 3
    rewards = [pair for batch in draws for pair in batch]
    expected = [value for number in kept for value in rewards[number - 1]]
    assert [value if there else None for value, there in zip(scored.reward_B, scored.scored_B)] == expected
    assert transcript.completions == tuple(f"{number}.{sample}" for number in kept for sample in range(G))
    assert [problem.answer for problem in transcript.problems] == [f"={number}" for number in np.repeat(kept, G)]
    assert transcript.step == 3


def test_every_array_keeps_its_shape_and_type() -> None:
    """What is learned from has one shape, whatever was drawn: nothing compiles anew."""
    (first, _), *others = [draw(1, SAME, DIFFERENT), draw(3, DIFFERENT, SAME), draw(5, SAME, SAME)]
    scored, _ = choose_groups([(first, draw(1, SAME, DIFFERENT)[1]), *others], 2)
    for before, after in ((first, scored), (first.rollout, scored.rollout)):
        for item in fields(before):
            old, new = getattr(before, item.name), getattr(after, item.name)
            if isinstance(old, np.ndarray):
                assert (new.shape, new.dtype) == (old.shape, old.dtype), item.name


SETS = ("steps=4", "rollout.refills=3", "reward.functions=[sevens]", "log.completions=16", "checkpoint.every=1")


def given(policy: Path, folder: Path, *more: str) -> Settings:
    return settings(policy, folder, *SETS, *more)


@pytest.fixture(scope="module")
def refilled(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a random policy and a reward that few of its completions earn."""
    folder = tmp_path_factory.mktemp("refills") / "run"
    assert train(given(toy_policy, folder), TASK) == 0
    return folder


def completions(folder: Path, step: int) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    return [record for record in records if record["step"] == step]


def test_a_step_draws_until_its_groups_have_signal(refilled: Path) -> None:
    for line in metrics(refilled):
        drawn = line["rollout/drawn_groups"]
        assert drawn in (4, 8, 12, 16)
        # It stopped at the bound, or with a batch full of signal.
        assert drawn == 16 or line["frac_reward_zero_std"] == 0
    assert max(line["rollout/drawn_groups"] for line in metrics(refilled)) > 4


def test_the_batch_of_a_step_is_the_first_groups_with_signal(toy_policy: Path, refilled: Path, tmp_path: Path) -> None:
    """Step 1 by hand: the initial policy on the first problems in their order, a group at a time."""
    drawn = int(metrics(refilled)[0]["rollout/drawn_groups"])
    # A run whose one step draws them all, and keeps them all.
    alone = settings(
        toy_policy, tmp_path / "all", "steps=1", f"rollout.prompts={drawn}", "reward.functions=[sevens]",
        f"log.completions={4 * drawn}",
    )  # fmt: skip
    assert train(alone, TASK) == 0
    every = completions(tmp_path / "all", 1)
    groups = [every[n : n + 4] for n in range(0, len(every), 4)]
    signal = [len({record["reward"] for record in group}) > 1 for group in groups]
    order = sorted(range(drawn), key=lambda n: (not signal[n], n))
    expected = [record["completion"] for n in sorted(order[:4]) for record in groups[n]]
    assert [record["completion"] for record in completions(refilled, 1)] == expected


def test_refills_never_recompile(refilled: Path) -> None:
    lines = [json.loads(line) for line in (refilled / "metrics.jsonl").read_text().splitlines()]
    assert len({line["compiled_programs"] for line in lines[1:]}) == 1


def test_a_resumed_run_with_refills_is_exact(toy_policy: Path, refilled: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def update(state: Any, batch: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            raise Killed
        return run.plan.update(state, batch)

    folder, left = tmp_path / "torn", 3
    run = assemble(given(toy_policy, folder), TASK)
    kept = Checkpoints(folder / "checkpoints", keep=2, versions=versions("grpo-toy"))
    with pytest.raises(Killed):
        fit(replace(run, plan=replace(run.plan, update=update)), checkpoints=kept)
    kept.close()
    assert [line["step"] for line in metrics(folder)] == [1, 2]
    assert train(given(toy_policy, folder), TASK) == 0
    assert metrics(folder) == metrics(refilled)
    assert (folder / "completions.jsonl").read_text() == (refilled / "completions.jsonl").read_text()
    digests = [json.loads((path / "summary.json").read_text())["state_digest"] for path in (folder, refilled)]
    assert digests[0] == digests[1]
