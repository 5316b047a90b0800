"""The demo end to end: the embedded policy on the embedded problems, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_gsm8k import cli
from grpo_gsm8k.embedded.problems import generate, write_splits
from grpo_gsm8k.task import TASK
from grpo_trainer.data.sources import digest, read_problems


def test_embedded_problems_are_the_same_as_jsonl(tmp_path: Path) -> None:
    write_splits(tmp_path, train=40, test=20)
    assert digest(read_problems(str(tmp_path), "train")) == digest(TASK.problems("embedded", "train", 40))
    assert digest(read_problems(str(tmp_path), "test")) == digest(TASK.problems("embedded", "test", 20))
    assert len(TASK.problems("embedded", "test", 0)) == 1_024
    first = TASK.problems("embedded", "train", 1)[0]
    assert (first.question, first.place) == (generate("train", 1)[0].question, "embedded train:1")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "run"
    small = ("steps=2", "cpu_devices=0", "rollout.prompts=8", "eval.problems=24", "eval.every=0", "log.completions=8")
    assert cli.main(["train", "--set", f"run.dir={folder}", *small]) == 0
    return folder


def test_the_embedded_policy_earns_rewards_from_the_first_step(run: Path) -> None:
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1
    assert first["reward/answer"] > 0.1
    assert first["reward/format"] > 0.5
    assert first["reward"] == pytest.approx(first["reward/answer"] + 0.1 * first["reward/format"], abs=1e-6)
    assert first["accuracy"] == pytest.approx(first["reward/answer"], abs=1e-6)
    assert 0 < first["frac_reward_zero_std"] < 1


def test_the_summary_counts_right_answers(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for when in ("before", "after"):
        right = summary[f"accuracy_{when}"] * 24
        assert right == pytest.approx(round(right), abs=1e-3)
        assert round(summary[f"accuracy_flexible_{when}"] * 24) >= round(right) > 0
    assert summary["versions"]["grpo-gsm8k"]


def test_what_was_read_is_kept_with_each_completion(run: Path) -> None:
    records = [json.loads(line) for line in (run / "completions.jsonl").read_text().splitlines()]
    assert len(records) == 16
    for record in records:
        assert record["right"] == (record["rewards"]["answer"] == 1.0)
        assert record["read"].startswith(("####", "last number")) or record["read"] == ""
    assert np.mean([record["finish"] == "stop" for record in records]) > 0.5
    assert (run / "report.html").is_file()


def test_a_finished_run_can_be_measured_again(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    arguments = ["--set", "cpu_devices=0", "rollout.prompts=8", "eval.problems=24"]
    assert cli.main(["eval", "--checkpoint", str(run), *arguments]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"{run} after step 2: held-out accuracy {summary['accuracy_after']:.1%}")
