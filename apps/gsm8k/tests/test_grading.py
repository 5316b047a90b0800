"""Rewards: numbers as people write them, GSM8K's own rule on GSM8K's own text, functions of one's own."""

import json
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_contracts import FinishReason, PolicyVersion, Rollout, SamplingParams
from grpo_gsm8k import grading as reward
from grpo_gsm8k.embedded.tokenizer import load_tokenizer, make_tokenizer
from grpo_trainer.rewards.functions import RewardError, final_answer, last_number, load_function
from grpo_trainer.data.sources import Record
from grpo_trainer.data.stream import Asked
from grpo_trainer.rewards.scoring import Rewards
from grpo_trainer.settings.schema import Reward

GSM8K = Path(__file__).parents[4] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("18", 18),
        ("1,080", 1080),
        ("-5", -5),
        ("$3.50", "3.5"),
        ("18.00", 18),
        ("$1,234,567.80", "1234567.8"),
        ("-$5", -5),
        ("$-5", -5),
        ("$ 5", 5),
        ("+7", 7),
        ("−7", -7),
        (".5", "0.5"),
        ("18.", 18),
        ("20%", 20),
        ("€9", 9),
        ("007", 7),
        ("12 apples", 12),
    ],
)
def test_numbers_as_people_write_them(written: str, value: int | str) -> None:
    assert final_answer(f"So it is.\n#### {written}") == Decimal(value)
    assert last_number(f"1 and 2 make {written}") == Decimal(value)


@pytest.mark.parametrize("text", ["", "18", "#### ", "#### none", "### 18", "#### -", "#### $", "#### --5"])
def test_no_final_answer(text: str) -> None:
    assert final_answer(text) is None


def test_the_first_mark_counts() -> None:
    assert final_answer("#### 3\n#### 4") == 3


@given(text=st.text())
def test_no_text_breaks_the_judges(text: str) -> None:
    for judge in reward.BUILT_IN.values():
        assert judge(prompts=["q"], completions=[text], answers=["#### 3"]) in ([0.0], [1.0])


def test_answer_and_flexible() -> None:
    completions = ["a\n#### 1,080", "it is 1080", "#### 5\n1080", "no"]
    given_ = {"prompts": [""] * 4, "completions": completions, "answers": ["<<90*12=1080>>1080\n#### 1,080"] * 4}
    assert reward.answer(**given_) == [1.0, 0.0, 0.0, 0.0]
    assert reward.flexible(**given_) == [1.0, 1.0, 1.0, 0.0]


def test_unscored_without_an_answer_to_compare_with() -> None:
    assert reward.answer(completions=["#### 1"], answers=["?"]) == [None]
    assert reward.flexible(completions=["#### 1"], answers=["?"]) == [None]


@pytest.mark.parametrize(
    ("text", "finished", "value"),
    [
        ("a\n#### 5", True, 1.0),
        ("#### 5", True, 1.0),
        ("a\n#### $1,000.50", True, 1.0),
        ("a\n#### 5\n", True, 1.0),
        ("a\n#### 5", False, 0.0),
        ("a #### 5", True, 0.0),
        ("a\n#### 5 apples", True, 0.0),
        ("#### 5\nmore", True, 0.0),
        ("#### 4\n#### 5", True, 0.0),
        ("a\n####", True, 0.0),
        ("a", True, 0.0),
    ],
)
def test_format(text: str, finished: bool, value: float) -> None:
    assert reward.format(completions=[text], finished=[finished]) == [value]


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's files in {GSM8K}")
@pytest.mark.parametrize("split", ["train", "test"])
def test_on_gsm8k_itself(split: str) -> None:
    golds = [json.loads(line)["answer"] for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    given_ = {"prompts": [""] * len(golds), "completions": golds, "answers": golds}
    assert set(reward.answer(**given_)) == {1.0}
    assert set(reward.flexible(**given_)) == {1.0}
    assert set(reward.format(**given_)) == {1.0}
    for gold in golds:  # the data set's own reading
        assert final_answer(gold) == Decimal(gold.split("#### ")[1].strip().replace(",", ""))


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_grader.py").write_text(
        "import math\nlimit = 3\ndef brief(*, completions, **_):\n    return [1.0] * 3\n"
    )
    (tmp_path / "my_broken.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert load_function("my_grader:brief")(completions=[]) == [1.0] * 3
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
def judged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rewards, Rollout, Asked]:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')
    tokenizer = load_tokenizer(folder)
    rewards = Rewards.from_config(Reward(), tokenizer)
    texts = ["a\n#### 5", "a\n#### 6", "it is 5", "a\n#### 7"]
    ids = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in texts]
    ids[3] = ids[3][:-1]  # cut by the limit
    B, T = 4, 3 + max(map(len, ids))
    tokens_BT = np.zeros((B, T), np.int32)
    mask_BT = np.zeros((B, T), bool)
    for b, row in enumerate(ids):
        tokens_BT[b, :3] = 7
        tokens_BT[b, 3 : 3 + len(row)] = row
        mask_BT[b, 3 : 3 + len(row)] = True
    lengths = np.array([3 + len(row) for row in ids], np.int32)
    zeros = np.zeros((B, T), np.float32)
    finish = np.array([FinishReason.STOP] * 3 + [FinishReason.LENGTH], np.int8)
    rollout = Rollout(
        tokens_BT,
        np.full(B, 3, np.int32),
        lengths,
        mask_BT,
        zeros,
        zeros,
        finish,
        np.array([0, 0, 1, 1], np.int32),
        np.array([0, 1, 0, 1], np.int32),
        np.array([0, 0, 1, 1], np.int32),
        2,
        SamplingParams(stop_ids=(2,)),
        PolicyVersion(4, ""),
        len(tokenizer),
        0,
    )
    problems = (Record("one?", "#### 5", "x:1"), Record("two?", "#### 7", "x:2"))
    return rewards, rollout, Asked(None, problems)  # type: ignore[arg-type]


def test_score(judged: tuple[Rewards, Rollout, Asked]) -> None:
    rewards, rollout, asked = judged
    assert rewards.texts(rollout, [0, 3]) == ["a\n#### 5", "a\n#### 7"]
    scored = rewards.score(rollout, asked)
    assert scored.names == ("answer", "format")
    np.testing.assert_array_equal(scored.reward_BN, [[1, 1], [0, 1], [0, 0], [1, 0]])
    np.testing.assert_allclose(scored.reward_B, [1.1, 0.1, 0.0, 1.0])


def test_functions_see_what_is_promised(judged: tuple[Rewards, Rollout, Asked]) -> None:
    rewards, rollout, asked = judged
    seen = {}

    def mine(**given_: object) -> list[float]:
        seen.update(given_)
        return [0.5] * 4

    Rewards({"mine": mine}, {"mine": 1.0}, 0.0, rewards.tokenizer).score(rollout, asked)
    assert seen["prompts"] == ["one?", "one?", "two?", "two?"]
    assert seen["answers"] == ["#### 5", "#### 5", "#### 7", "#### 7"]
    assert seen["finished"] == [True, True, True, False]
    assert seen["step"] == 4


def test_too_many_unscored_rows_and_wrong_lengths(judged: tuple[Rewards, Rollout, Asked]) -> None:
    rewards, rollout, asked = judged

    def build(values: object, share: float = 0.5) -> Rewards:
        return Rewards({"mine": lambda **_: values}, {"mine": 1.0}, share, rewards.tokenizer)  # type: ignore[arg-type,return-value]

    assert build([1.0, None, None, 1.0]).score(rollout, asked).scored_B.tolist() == [True, False, False, True]
    with pytest.raises(RewardError, match=r"2 of 4 did\. The first is 'a\\n#### 6'"):
        build([1.0, None, None, 1.0], 0.4).score(rollout, asked)
    for values in ([1.0] * 3, 1.0, None, "1111"):
        with pytest.raises(RewardError, match=r"4 of 4 did.*list of 4 rewards, one a completion: got"):
            build(values).score(rollout, asked)


def test_failures_are_told_with_the_text_that_caused_them(judged: tuple[Rewards, Rollout, Asked]) -> None:
    rewards, rollout, asked = judged
    told: list[dict[str, object]] = []
    mine = Rewards({"mine": lambda **_: [1.0, "x", np.float32(2), True]}, {"mine": 1.0}, 0.5, rewards.tokenizer)  # type: ignore[arg-type,dict-item,list-item]
    scored = mine.score(rollout, asked, told.extend)
    np.testing.assert_array_equal(scored.reward_B, [1, 0, 2, 1])
    np.testing.assert_array_equal(scored.scored_B, [True, False, True, True])
    (record,) = told
    assert record["kind"] == "shape"
    assert record["rows"] == [1]
    assert (record["prompt"], record["completion"], record["answer"]) == ("one?", "a\n#### 6", "#### 5")
