"""GSM8K's grading: numbers as people write them, and GSM8K's own rule on GSM8K's own text."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpo_gsm8k import grading
from grpo_gsm8k.grading import final_answer, last_number
from grpo_gsm8k.task import TASK
from grpo_trainer.data.sources import read_problems
from grpo_trainer.task import Judgement, Problem

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
    for judge in TASK.rewards.values():
        assert judge(prompts=["q"], completions=[text], answers=["#### 3"]) in ([0.0], [1.0])


def test_answer_and_flexible() -> None:
    completions = ["a\n#### 1,080", "it is 1080", "#### 5\n1080", "no"]
    given_ = {"prompts": [""] * 4, "completions": completions, "answers": ["<<90*12=1080>>1080\n#### 1,080"] * 4}
    assert grading.answer(**given_) == [1.0, 0.0, 0.0, 0.0]
    assert grading.flexible(**given_) == [1.0, 1.0, 1.0, 0.0]


def test_unscored_without_an_answer_to_compare_with() -> None:
    assert grading.answer(completions=["#### 1"], answers=["?"]) == [None]
    assert grading.flexible(completions=["#### 1"], answers=["?"]) == [None]


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
    assert grading.format(completions=[text], finished=[finished]) == [value]


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's files in {GSM8K}")
@pytest.mark.parametrize("split", ["train", "test"])
def test_on_gsm8k_itself(split: str) -> None:
    golds = [json.loads(line)["answer"] for line in (GSM8K / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    given_ = {"prompts": [""] * len(golds), "completions": golds, "answers": golds}
    assert set(grading.answer(**given_)) == {1.0}
    assert set(grading.flexible(**given_)) == {1.0}
    assert set(grading.format(**given_)) == {1.0}
    for gold in golds:  # the data set's own reading
        assert final_answer(gold) == Decimal(gold.split("#### ")[1].strip().replace(",", ""))


@pytest.mark.skipif(not GSM8K.is_dir(), reason=f"needs GSM8K's files in {GSM8K}")
def test_gsm8k_itself_is_read_whole() -> None:
    assert len(read_problems(str(GSM8K), "train")) == len(TASK.problems(str(GSM8K), "train", 0)) == 7_473
    assert len(TASK.problems(str(GSM8K), "test", 0)) == 1_319


PROBLEM = Problem("How many?", "90 and more.\n#### 1,080", "x:1")


@pytest.mark.parametrize(
    ("text", "finished", "judgement"),
    [
        ("so\n#### 1080", True, Judgement(strict=True, lenient=True, formed=True, read="#### 1080")),
        ("so\n#### 1080", False, Judgement(strict=True, lenient=True, formed=False, read="#### 1080")),
        ("it is 1,080", True, Judgement(strict=False, lenient=True, formed=False, read="last number 1080")),
        ("#### 5\n1080", True, Judgement(strict=False, lenient=True, formed=False, read="#### 5")),
        ("#### 5", True, Judgement(strict=False, lenient=False, formed=True, read="#### 5")),
        ("none", True, Judgement(strict=False, lenient=False, formed=False, read="")),
    ],
)
def test_what_the_task_says_of_a_completion(text: str, finished: bool, judgement: Judgement) -> None:
    assert TASK.judge(text, PROBLEM, finished=finished) == judgement


def test_a_problem_without_an_answer_is_never_right() -> None:
    judgement = TASK.judge("nothing", Problem("How many?", "nobody knows", "x:1"), finished=True)
    assert not judgement.strict
    assert not judgement.lenient
