"""`data.filter`: which training problems are kept, by column and by measured pass rate."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from toy import TASK, load, settings

from grpo_trainer import cli
from grpo_trainer.assemble import assemble
from grpo_trainer.data.filter import filter_problems
from grpo_trainer.data.sources import DataError
from grpo_trainer.evaluate.records import Answer, Record, read_records
from grpo_trainer.run.checkpoint import ResumeRefused
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.layers import dump, load_saved
from grpo_trainer.settings.schema import FilterSettings
from grpo_trainer.task import Judgement, Problem
from grpo_trainer.train import train

COLUMNS: list[dict[str, Any]] = [
    {"level": 1, "kind": "sum", "hard": False},
    {"level": 2.5, "kind": "product", "hard": True},
    {"level": 5, "kind": "sum", "hard": True},
    {"level": None, "kind": "", "hard": None},
    {"kind": 1},
]
PROBLEMS = [Problem(f"{n} + 1?", f"={n + 1}", f"train.jsonl:{n + 1}", columns) for n, columns in enumerate(COLUMNS)]


def kept(**filters: Any) -> list[int]:
    found, _ = filter_problems(PROBLEMS, FilterSettings.model_validate(filters))
    return [PROBLEMS.index(problem) for problem in found]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"column": "level", "min": 2}, [1, 2]),
        ({"column": "level", "max": 2.5}, [0, 1]),
        ({"column": "level", "min": 2.5, "max": 2.5}, [1]),
        ({"column": "level", "values": [1, 5]}, [0, 2]),
        ({"column": "kind", "values": ["sum", ""]}, [0, 2, 3]),
        ({"column": "kind", "values": [1]}, [4]),
        ({"column": "hard", "values": [True]}, [1, 2]),
    ],
)
def test_problems_are_kept_by_column(filters: dict[str, Any], expected: list[int]) -> None:
    assert kept(**filters) == expected


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"column": "levels", "min": 1}, r"got 'levels'\. Did you mean 'level'\? .* they have hard, kind, level$"),
        ({"column": "subject", "min": 1}, r"got 'subject'\. Besides question and answer they have hard, kind, level$"),
        ({"column": "level", "min": 6}, "of 5, none has a 'level' from 6 to inf. The column holds 1, 2.5, 5, None"),
        (
            {"column": "kind", "min": 0},
            r"train\.jsonl:1: the column 'kind' must hold numbers .*: got 'sum'\. List what",
        ),
        ({"column": "hard", "min": 0}, r"train\.jsonl:1: the column 'hard' must hold numbers .*: got False"),
        ({"column": "kind", "values": ["sum", "sums"]}, r"must occur in the column 'kind': 'sums' does not\. It holds"),
        ({"column": "level", "values": [True]}, "True does not. It holds 1, 2.5, 5, None"),
    ],
)
def test_columns_that_cannot_be_filtered_by_are_said(filters: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        kept(**filters)


def record(number: int, solved: int, *, samples: int = 4, **other: str) -> Record:
    def answer(right: bool) -> Answer:
        return Answer("", Judgement(strict=right, lenient=True, formed=True), "stop", 1)

    drawn = tuple(answer(n < solved) for n in range(samples))
    problem = PROBLEMS[number % len(PROBLEMS)]
    fields = {"question": problem.question, "gold": problem.answer, **other}
    return Record(number, "here", prompt_tokens=3, greedy=answer(True), samples=drawn, **fields)


def written(folder: Path, *records: Record) -> str:
    file = folder / "records.jsonl"
    file.write_text("".join(one.line("some") for one in records))
    return str(file)


def test_problems_are_kept_by_pass_rate(tmp_path: Path) -> None:
    """By the strict rule of the samples, both bounds included; a problem that was not measured is left out."""
    file = written(tmp_path, *(record(n, solved) for n, solved in enumerate([0, 1, 3, 4])))
    assert kept(pass_rate={"records": file, "min": 0.25, "max": 0.75}) == [1, 2]
    assert kept(pass_rate={"records": file, "max": 0.5}) == [0, 1]
    assert kept(pass_rate={"records": file, "min": 0.75}) == [2, 3]
    both = FilterSettings.model_validate(
        {"column": "kind", "values": ["sum", 1], "pass_rate": {"records": file, "min": 0.5}}
    )
    found, words = filter_problems(PROBLEMS, both)
    assert found == [PROBLEMS[2]]
    assert words == ("data.filter left out 4 of 5: 2 by the column kind, 1 by pass rate, 1 that the records lack")
    assert len(filter_problems(PROBLEMS, both, by_pass_rate=False)[0]) == 3


def test_records_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    def refused(file: str, says: str, **bounds: float) -> None:
        with pytest.raises(DataError, match=says):
            kept(pass_rate={"records": file, "min": 0.1, **bounds})

    refused(str(tmp_path), "records must be a file that `eval --split train` wrote: there is no ")
    other = written(tmp_path, record(0, 1, question="another?"))
    refused(other, r"must be of these problems: .* holds 1 other ones, such as 'another\?'")
    refused(written(tmp_path, record(0, 1, gold="=7")), r"train\.jsonl:1: .* there the answer is '=7', here '=1'")
    refused(written(tmp_path, record(0, 0, samples=0)), "holds greedy answers only. Measure with .*eval.samples=8")
    none = written(tmp_path, record(0, 0), record(1, 4), record(2, 4))
    refused(none, "of 3 measured ones, none has a rate from 0.1 to 0.9; 1 were never solved and 2 always", max=0.9)
    refused(written(tmp_path, record(0, 1), record(2, 1)), r"records\.jsonl:2 must be a record")
    (tmp_path / "torn.jsonl").write_text(record(0, 1).line("some") + '{"torn')
    assert kept(pass_rate={"records": str(tmp_path / "torn.jsonl"), "min": 0.1}) == [0]
    (tmp_path / "empty.jsonl").touch()
    refused(str(tmp_path / "empty.jsonl"), r"empty\.jsonl:1 must be a record of `eval --split train`")


def test_a_measured_policy_trains_on_what_it_solves_sometimes(
    toy_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a user does it: `eval --split train` measures, and prints the settings that use it."""
    monkeypatch.chdir(tmp_path)

    class Sevens(type(TASK)):
        """Right with a 7 in it, as one in twelve of the toy policy's completions are."""

        def judge(self, completion: str, problem: Problem, *, finished: bool) -> Judgement:
            return Judgement(strict="7" in completion, lenient=False, formed=True, read=completion)

    task = Sevens()
    small = ("data.train_size=30", "rollout.max_new_tokens=8", "eval.problems=4", "cpu_devices=0", "loss.rows=2")
    command = ["eval", str(toy_policy), "--split", "train", "--set", *small]
    assert cli.main(task, command) == 0
    assert "no pass rates without samples: set eval.samples" in capsys.readouterr().out
    assert cli.main(task, [*command, "eval.samples=4"]) == 0
    shown = capsys.readouterr().out
    assert "problems embedded: 30 to train on, each greedily and in 4 samples" in shown
    assert f"{toy_policy}: accuracy on training problems" in shown
    solved = re.search(r"in none of 4 samples (\d+) problems, in some (\d+), in all (\d+)", shown)
    assert solved is not None
    keep = re.search(r"keep {5}--set (\S+) (\S+) (\S+)", shown)
    assert keep is not None
    file = Path(keep[1].partition("=")[2])
    rates = {one.question: sum(answer.judgement.strict for answer in one.samples) for one in read_records(file)}
    between = [question for question, right in rates.items() if 0 < right < 4]
    assert len(rates) == 30
    assert 0 < len(between) == int(solved[2]) < 30

    def of(*sets: str) -> Any:
        return settings(toy_policy, tmp_path / "run", "data.train_size=30", "rollout.prompts=2", *sets)

    filtered = of(*keep.groups())
    run = assemble(filtered, task)
    assert [problem.question for problem in run.problems.questions.problems] == between
    assert f"data.filter left out {30 - len(between)} of 30: {30 - len(between)} by pass rate" in run.description[1]
    assert assemble(of(), task).identity["problems"] != run.identity["problems"]


def test_a_run_does_not_go_on_with_another_filter(toy_policy: Path, tmp_path: Path) -> None:
    lines = [{"question": f"{n} + 1?", "answer": f"={n + 1}", "level": n} for n in range(8)]
    for split, some in (("train", lines[:6]), ("test", lines[6:])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in some))

    def measured(*rights: int) -> None:
        problems = [Problem(line["question"], line["answer"], "") for line in lines[:6]]
        some = [
            record(n, right, question=problems[n].question, gold=problems[n].answer) for n, right in enumerate(rights)
        ]
        written(tmp_path, *some)

    def go(*sets: str) -> int:
        rate = (f"data.filter.pass_rate.records={tmp_path / 'records.jsonl'}", "data.filter.pass_rate.min=0.5")
        own = (f"data.source={tmp_path}", "checkpoint.every=1", "rollout.prompts=2", "loss.rows=2")
        return train(settings(toy_policy, tmp_path / "run", *own, *rate, *sets), TASK)

    measured(4, 4, 0, 0, 4, 4)
    assert go("steps=1") == 0
    for sets in (["data.filter.pass_rate.min=0.6"], ["data.filter={column: level, max: 4}"]):
        with pytest.raises(ConfigError, match=r"holds a run with other settings[^$]*data\.filter\."):
            go("steps=2", *sets)
    measured(4, 4, 0, 4, 4, 4)
    with pytest.raises(ResumeRefused, match="problems: checkpoint"):
        go("steps=2")
    measured(4, 2, 0, 1, 4, 4)  # the same problems remain
    assert go("steps=2") == 0


def test_values_keep_their_kinds_in_saved_settings(tmp_path: Path) -> None:
    given = load([], ["data.filter={column: hard, values: [true, 1, 2.5, '1']}"])
    (tmp_path / "config.yaml").write_text(dump(given))
    assert [type(value) for value in load_saved(tmp_path / "config.yaml").data.filter.values] == [bool, int, float, str]
