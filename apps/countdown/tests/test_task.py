"""The judge and the rewards, on right, wrong and hostile completions."""

import json
from pathlib import Path

import pytest

from grpo_countdown.task import TASK
from grpo_trainer.data.sources import DataError
from grpo_trainer.task import Judgement, Problem

PROBLEM = Problem("Reach 13 from 7, 3, 2.", "answer: 7+3*2", "here:1")


def judge(completion: str, *, finished: bool = True) -> Judgement:
    return TASK.judge(completion, PROBLEM, finished=finished)


@pytest.mark.parametrize(
    "completion",
    ["answer: 7+3*2", "7+6=13\nanswer: 3*2+7", "answer:7+3×2", "answer: (7 + 2*3)\n", "so\nanswer: 2*3 + 7  \n\n"],
)
def test_right(completion: str) -> None:
    judgement = judge(completion)
    assert judgement.strict
    assert judgement.lenient
    assert judgement.formed


@pytest.mark.parametrize(
    ("completion", "formed"),
    [
        ("answer: 7+3+2", True),  # misses
        ("answer: 7*2-1", True),  # 1 is not given
        ("answer: 7+7-3+2", True),  # 7 twice
        ("answer: 3*2+3+2+2", True),
        ("answer: 13", True),
        ("answer: 26/2", True),
        ("answer: 7/(3-3)", False),
        ("answer:", False),
        ("", False),
        ("answer: seven", False),
        ("answer: 7+3*2+", False),
        ("answer: 9**9**9", False),
        ("answer: " + "(" * 5_000 + "7" + ")" * 5_000, False),
    ],
)
def test_wrong(completion: str, formed: bool) -> None:
    judgement = judge(completion)
    assert not judgement.strict
    assert not judgement.lenient
    assert judgement.formed == formed


@pytest.mark.parametrize(
    "completion",
    ["The answer is 7+3*2.", "7+3*2 = 13", "Answer: 7+3*2", "**answer: 7+3*2**", "\\boxed{3*2+7}", "answer: 7+3*2=13"],
)
def test_right_without_the_form(completion: str) -> None:
    judgement = judge(completion)
    assert not judgement.strict
    assert judgement.lenient
    assert not judgement.formed


def test_what_comes_after_the_answer_counts() -> None:
    assert not judge("answer: 7+3*2\nor rather\nanswer: 7+3+2").strict
    assert not judge("answer: 7+3*2\nThat was easy.").strict


def test_a_completion_that_was_cut_is_right_but_not_formed() -> None:
    judgement = judge("answer: 7+3*2", finished=False)
    assert judgement.strict
    assert not judgement.formed


def test_an_exact_fraction_on_the_way_is_right() -> None:
    problem = Problem("Reach 10 from 5, 4, 2.", "", "here:1")
    assert TASK.judge("answer: 5/2*4", problem, finished=True).strict
    assert not TASK.judge("answer: 5//2*4", problem, finished=True).lenient


def test_a_number_given_twice_may_be_used_twice() -> None:
    problem = Problem("Reach 8 from 4, 4.", "", "here:1")
    assert TASK.judge("answer: 4+4", problem, finished=True).strict
    assert not TASK.judge("answer: 4+4+4-4", problem, finished=True).strict


@pytest.mark.parametrize("piece", ["(", " ", "1+", "9", "answer: ", "\n", "7+3*2 ", "(7", "٣"])
def test_ten_thousand_characters_are_judged(piece: str) -> None:
    text = (piece * 10_000)[:10_000]
    for completion in (text, f"answer: {text}", f"{text}\nanswer: 7+3+2"):
        assert not judge(completion).strict


def test_rewards_agree_with_the_judge() -> None:
    completions = ["answer: 7+3*2", "answer: 7+3+2", "nothing", "answer: 7+3*2"]
    given = {
        "prompts": [PROBLEM.question] * 4,
        "completions": completions,
        "answers": [PROBLEM.answer] * 4,
        "finished": [True, True, True, False],
    }
    assert TASK.rewards["correct"](**given) == [1, 0, 0, 1]
    assert TASK.rewards["format"](**given) == [1, 1, 0, 0]
    assert set(TASK.weights) == set(TASK.rewards)


def test_embedded_problems_come_with_their_solutions() -> None:
    problems = TASK.problems("embedded", "test", 20)
    assert len(problems) == 20
    for problem in problems:
        assert "each number at most once" in problem.question
        judgement = TASK.judge(problem.answer, problem, finished=True)
        assert judgement.strict
        assert judgement.formed


def test_other_problems_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"question": "Reach 100 from 25, 4, please.", "answer": "answer: 25*4"}) + "\n")
    (problem,) = TASK.problems(str(file), "train", 0)
    assert TASK.judge(problem.answer, problem, finished=True).strict
    file.write_text(json.dumps({"question": "Reach 100.", "answer": "25*4"}) + "\n")
    with pytest.raises(DataError, match=r"mine.jsonl:1: question must be like 'Reach 8 from 9, 7, 6'"):
        TASK.problems(str(file), "train", 0)
