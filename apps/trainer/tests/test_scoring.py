"""From a rollout to rewards: the text that functions see, what stays unscored, and who is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import TASK, load
from transformers import PreTrainedTokenizerBase

from grpo_contracts import FinishReason, PolicyVersion, Rollout, SamplingParams
from grpo_trainer.data.tokenizer import load_tokenizer
from grpo_trainer.rewards.functions import RewardError, load_function
from grpo_trainer.rewards.scoring import Rewards, Transcript, transcribe
from grpo_trainer.task import Problem

TEXTS = ("=5", "is =6", "it is 5", "=7, no: ")
PROBLEMS = (Problem("one?", "=5", "x:1", {"numbers": [2, 3]}), Problem("two?", "=7", "x:2", {"level": 4}))


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grader.py").write_text(
        "import math\nlimit = 3\ndef brief(*, completions, **_):\n    return [1.0] * 3\n"
    )
    (tmp_path / "my_broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("my_grader:brief")(prompts=[], completions=[], answers=[]) == [1.0] * 3
    for name, message in [
        ("my_grader:breif", "has no 'breif'; it has brief"),
        ("my_grader:limit", "must be callable: got int"),
        ("my_graderr:brief", "it was not found"),
        ("my_broken:brief", "'not_there_at_all' that it imports was not found"),
        ("my_grader", "module:function"),
        (":brief", "module:function"),
        ("my_grader:", "module:function"),
    ]:
        with pytest.raises(RewardError, match=message):
            load_function(name)


@pytest.fixture(scope="module")
def tokenizer(toy_policy: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(toy_policy)


@pytest.fixture(scope="module")
def rollout(tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """Two groups of two; the last completion is cut by the limit, the others end with their stop token."""
    stop = tokenizer.eos_token_id
    assert isinstance(stop, int)
    ids = [[*tokenizer.encode(text), stop] for text in TEXTS]
    ids[3] = ids[3][:-1]
    B, T = 4, 3 + max(map(len, ids))
    tokens_BT, mask_BT = np.zeros((B, T), np.int32), np.zeros((B, T), bool)
    for b, row in enumerate(ids):
        tokens_BT[b, :3] = 7
        tokens_BT[b, 3 : 3 + len(row)] = row
        mask_BT[b, 3 : 3 + len(row)] = True
    zero_BT, group_B = np.zeros((B, T), np.float32), np.array([0, 0, 1, 1], np.int32)
    return Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=np.full(B, 3, np.int32),
        total_length_B=np.array([3 + len(row) for row in ids], np.int32),
        loss_mask_BT=mask_BT,
        logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        finish_B=np.array([FinishReason.STOP] * 3 + [FinishReason.LENGTH], np.int8),
        prompt_id_B=group_B,
        sample_B=np.array([0, 1, 0, 1], np.int32),
        group_B=group_B,
        group_size=2,
        sampling=SamplingParams(stop_ids=(stop,)),
        policy=PolicyVersion(4, ""),
        vocab_size=len(tokenizer),
        pad_id=0,
    )


@pytest.fixture(scope="module")
def transcript(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> Transcript:
    return transcribe(rollout, PROBLEMS, tokenizer)


def returning(values: Any, share: float = 0.5) -> Rewards:
    return Rewards({"mine": lambda **_: values}, {"mine": 1.0}, share)


def test_a_transcript_is_the_text_without_its_stop_token(transcript: Transcript) -> None:
    assert transcript.completions == TEXTS
    assert transcript.finished == (True, True, True, False)
    assert transcript.lengths == tuple(len(text) + (n < 3) for n, text in enumerate(TEXTS))  # a token a byte
    assert [judgement.strict for judgement in transcript.judgements(TASK)] == [True, False, False, True]
    assert [judgement.formed for judgement in transcript.judgements(TASK)] == [True, False, False, False]


def test_functions_see_what_is_promised(rollout: Rollout, transcript: Transcript) -> None:
    seen: dict[str, Any] = {}

    def mine(**given: Any) -> list[float | None]:
        seen.update(given)
        return [0.5] * 4

    Rewards({"mine": mine}, {"mine": 1.0}, 0.0).score(rollout, transcript)
    assert seen == {
        "prompts": ["one?", "one?", "two?", "two?"],
        "answers": ["=5", "=5", "=7", "=7"],
        "completions": list(TEXTS),
        "finished": [True, True, True, False],
        "lengths": list(transcript.lengths),
        "step": 4,
        "numbers": [[2, 3], [2, 3], None, None],  # the data set's further columns
        "level": [None, None, 4, 4],
    }


def test_rewards_are_weighted_together(rollout: Rollout, transcript: Transcript) -> None:
    given = load([], ["reward.functions=[right, digits]", "reward.weights=[2, 0.5]"])
    scored = Rewards.start(given.reward, TASK, max_new_tokens=16).score(rollout, transcript)
    assert scored.names == ("right", "digits")
    shares = [1 / 2, 1 / 5, 1 / 7, 1 / 8]
    np.testing.assert_allclose(scored.reward_BN, np.transpose([[1, 0, 0, 1], shares]), rtol=1e-6)
    np.testing.assert_allclose(scored.reward_B, 2 * np.array([1, 0, 0, 1]) + 0.5 * np.array(shares), rtol=1e-6)


def test_long_completions_are_punished(rollout: Rollout, transcript: Transcript) -> None:
    """DAPO's soft overlong punishment, on lengths of 3, 6, 8 and 8 of at most 10 tokens: none up to 10 - 4."""
    plain = load([], ["reward.functions=[digits]"]).reward
    given = plain.model_copy(update={"weights": (0.0,), "overlong_buffer": 4, "overlong_penalty": 3.0})
    scored = Rewards.start(given, TASK, max_new_tokens=10).score(rollout, transcript)
    assert scored.names == ("digits", "overlong")
    assert transcript.lengths == (3, 6, 8, 8)
    np.testing.assert_allclose(scored.reward_B, 3 * np.array([0, 0, -2 / 4, -2 / 4]))
    assert Rewards.start(plain, TASK, max_new_tokens=10).score(rollout, transcript).names == ("digits",)


def test_too_many_unscored_rows_and_wrong_lengths(rollout: Rollout, transcript: Transcript) -> None:
    scored = returning([1.0, None, None, 1.0]).score(rollout, transcript)
    assert scored.scored_B.tolist() == [True, False, False, True]
    with pytest.raises(RewardError, match=r"2 of 4 did\. The first is 'is =6'"):
        returning([1.0, None, None, 1.0], 0.4).score(rollout, transcript)
    for values in ([1.0] * 3, 1.0, None, "1111"):
        with pytest.raises(RewardError, match=r"4 of 4 did.*list of 4 rewards, one a completion: got"):
            returning(values).score(rollout, transcript)


def test_failures_are_reported_with_the_text_that_caused_them(rollout: Rollout, transcript: Transcript) -> None:
    records: list[dict[str, Any]] = []
    scored = returning([1.0, "x", np.float32(2), True]).score(rollout, transcript, records.extend)
    np.testing.assert_array_equal(scored.reward_B, [1, 0, 2, 1])
    np.testing.assert_array_equal(scored.scored_B, [True, False, True, True])
    (record,) = records
    assert record["kind"] == "shape"
    assert record["rows"] == [1]
    assert (record["prompt"], record["completion"], record["answer"]) == ("one?", "is =6", "=5")


def test_none_of_one_function_means_what_the_settings_say(rollout: Rollout, transcript: Transcript) -> None:
    """Two functions for two kinds of problems, and one that failed at a row."""
    functions = {"sums": lambda **_: [0.25, None, None, "x"], "words": lambda **_: [None, 2.0, None, 1.0]}
    weights = {"sums": 2.0, "words": 0.5}
    records: list[dict[str, Any]] = []
    scored = Rewards(functions, weights, 1.0).score(rollout, transcript, records.extend)
    assert not scored.scored_B.any()
    assert [(record["function"], record["kind"], record["rows"]) for record in records] == [
        ("sums", "shape", [3]),
        ("sums", "none", [1]),
        ("words", "none", [0]),
    ]
    assert "set reward.skip_none=true" in records[1]["message"]

    records.clear()
    scored = Rewards(functions, weights, 1.0, skip_none=True).score(rollout, transcript, records.extend)
    np.testing.assert_array_equal(scored.scored_B, [True, True, False, False])
    np.testing.assert_array_equal(scored.reward_B, [0.5, 1.0, 0, 0])
    assert [record["kind"] for record in records] == ["shape"]
    with pytest.raises(RewardError, match=r"4 of 4 did.*'sums' returned None for 2 of 4.*reward\.skip_none=true"):
        Rewards({**functions, "sums": lambda **_: [0.25, None, None, None]}, weights, 0.1).score(rollout, transcript)
