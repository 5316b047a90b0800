"""The generator: right arithmetic, disjoint splits, GSM8K's fields."""

import json
import re
from pathlib import Path

import pytest

from grpo_gsm8k.embedded.problems import MOST_EASY, WordProblem, generate, main, split_of, write_splits
from grpo_gsm8k.embedded.templates import TEMPLATES
from grpo_gsm8k.task import TASK
from grpo_trainer.data.sources import DataError
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.task import Split

CALCULATION = re.compile(r"<<(\d+)([-+*/])(\d+)=(\d+)>>(\d+)")


@pytest.fixture(scope="module")
def train() -> list[WordProblem]:
    return generate("train", 6_000)


@pytest.fixture(scope="module")
def test() -> list[WordProblem]:
    return generate("test", 1_500)


def test_every_template_is_drawn(train: list[WordProblem], test: list[WordProblem]) -> None:
    names = {template.name for template in TEMPLATES}
    assert len(names) == len(TEMPLATES) >= 20
    assert {problem.template.name for problem in train} == names
    assert {problem.template.name for problem in test} == names


def test_worked_steps_are_right(train: list[WordProblem]) -> None:
    for problem in train:
        *steps, final = problem.answer.split("\n")
        assert 1 <= len(steps) <= 3
        value = ""
        for step in steps:
            (left, operator, right, value, written), *more = CALCULATION.findall(step)
            assert not more
            assert value == written
            a, b = int(left), int(right)
            assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator] == int(value)
        assert final == f"#### {value}"
        assert 0 < int(value) < 1000


def test_mistakes_end_in_another_answer(train: list[WordProblem]) -> None:
    wrong = [problem for problem in train if problem.mistaken is not None]
    assert len(wrong) > 0.8 * len(train)
    for problem in wrong:
        assert problem.mistaken is not None
        assert problem.mistaken.rsplit("#### ")[1] != problem.answer.rsplit("#### ")[1]


def test_train_and_test_share_neither_texts_nor_numbers(train: list[WordProblem], test: list[WordProblem]) -> None:
    assert not {p.question for p in train} & {p.question for p in test}
    assert not {tuple(sorted(p.numbers)) for p in train} & {tuple(sorted(p.numbers)) for p in test}
    assert len({p.question for p in train}) == len(train)


def test_split_does_not_see_the_order_of_numbers() -> None:
    assert all(split_of((a, b)) == split_of((b, a)) for a in range(30) for b in range(30))


def test_deterministic_prefixes_and_seeds(train: list[WordProblem]) -> None:
    assert generate("train", 50) == train[:50]
    assert generate("train", 50, seed=1) != train[:50]


def test_ten_thousand_problems_are_all_different() -> None:
    assert len({problem.question for problem in generate("train", 10_000)}) == 10_000


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file cannot be written"):
        main(TASK, [str(tmp_path / "file"), "--train", "3", "--test", "1"])


def test_written_as_gsm8k_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(TASK, [str(tmp_path), "--train", "30", "--test", "10"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")]
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 30
    assert all(set(row) == {"question", "answer"} for row in rows)
    first = (tmp_path / "test.jsonl").read_bytes()
    write_splits(tmp_path, train=30, test=10)
    assert (tmp_path / "test.jsonl").read_bytes() == first


def test_easy_problems_are_one_calculation() -> None:
    easy = TASK.problems("embedded-easy", "test", 300)
    assert len({problem.question for problem in easy}) == 300
    for problem in easy:
        calculation, final = problem.answer.split("\n")
        left, operator, right, equals, value = calculation.split(" ")
        a, b = int(left), int(right)
        assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[operator] == int(value)
        assert (equals, final) == ("=", f"#### {value}")
    assert not {p.question for p in easy} & {p.question for p in TASK.problems("embedded-easy", "train", 3_000)}


@pytest.mark.parametrize(
    ("source", "split", "most"), [("embedded", "train", 100_000), ("embedded-easy", "test", 2_000)]
)
def test_absurd_numbers_of_problems_are_refused(source: str, split: Split, most: int) -> None:
    setting = {"train": "data.train_size with prompt.examples", "test": "eval.problems"}[split]
    for limit in (most + 1, 10**30):
        with pytest.raises(DataError, match=f"{setting} must be at most {most:,}, .*got {limit:,}"):
            TASK.problems(source, split, limit)


@pytest.mark.parametrize("count", ["-1", "10001"])
def test_files_of_absurd_size_are_not_begun(tmp_path: Path, count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(TASK, [str(tmp_path / "new"), "--test", count])
    assert "--test must be 0 to 10,000: got" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_as_many_easy_problems_as_may_be_asked_for_exist() -> None:
    assert len({problem.question for problem in TASK.problems("embedded-easy", "test", MOST_EASY["test"])}) == 2_000
