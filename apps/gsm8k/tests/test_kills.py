"""A run that is killed again and again is the uninterrupted run, bit for bit."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

STEPS = 12


def command(policy: Path, folder: Path, cache: Path, *more: str) -> list[str]:
    settings = {
        "model.path": policy,
        "run.dir": folder,
        "compilation_cache": cache,
        "steps": STEPS,
        "cpu_devices": 1,
        "data.train_size": 20,  # more than one epoch
        "rollout.prompts": 4,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 16,
        "loss.rows": 4,
        "optimizer.learning_rate": 0.01,
        "eval.problems": 8,
        "eval.every": 4,
        "checkpoint.every": 1,
        "reward.functions": "[graders:digits]",
    }
    sets = [f"--set={key}={value}" for key, value in settings.items()]
    return [sys.executable, "-m", "grpo_gsm8k.cli", "train", *sets, *more]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    # In the tests' folder, so that `graders` is a module beside the command.
    with log.open("ab") as out:
        return subprocess.Popen(arguments, stdout=out, stderr=out, cwd=Path(__file__).parent)


def result(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """metrics.jsonl and summary.json without what a clock or a cache decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "time", "compiled")
    kept = [{k: v for k, v in line.items() if not k.startswith(timed) and "per_second" not in k} for line in lines]
    summary = json.loads((folder / "summary.json").read_text())
    return kept, {k: v for k, v in summary.items() if not k.startswith(timed)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(toy_policy: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """An uninterrupted run, and how long one takes once its programs are in the cache."""
    folder = tmp_path_factory.mktemp("whole")
    for name in ("cold", "run"):
        begun = time.monotonic()
        run = start(command(toy_policy, folder / name, cache), folder / "log")
        assert run.wait(600) == 0, (folder / "log").read_text()
    return folder / "run", time.monotonic() - begun


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_instants(
    kills: int, toy_policy: Path, cache: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = whole
    chance = random.Random(kills)
    done = round_ = 0
    while done < kills:
        folder = tmp_path / f"run{round_}"
        run = start(command(toy_policy, folder, cache), tmp_path / "log")
        try:
            code = run.wait(chance.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            run.send_signal(signal.SIGKILL)
            run.wait()
            done += 1
            if (folder / "metrics.jsonl").exists():
                last = len((folder / "metrics.jsonl").read_text().splitlines()) - 1
                print(f"kill {done}: after metrics of step {last}")
            continue
        assert code == 0, (tmp_path / "log").read_text()
        assert result(folder) == result(expected)
        round_ += 1
    run = start(command(toy_policy, tmp_path / f"run{round_}", cache), tmp_path / "log")
    assert run.wait(600) == 0, (tmp_path / "log").read_text()
    assert result(tmp_path / f"run{round_}") == result(expected)


def test_a_signal_saves_and_the_same_command_goes_on(
    toy_policy: Path, cache: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    arguments = command(toy_policy, tmp_path / "run", cache, "--set=checkpoint.every=1000")
    run = start(arguments, tmp_path / "log")
    while run.poll() is None and "step 2/" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(600) == 75, (tmp_path / "log").read_text()
    assert "the same command goes on" in (tmp_path / "log").read_text()
    assert start(arguments, tmp_path / "log").wait(600) == 0
    assert result(tmp_path / "run") == result(whole[0])


def test_a_second_run_in_the_same_folder_is_refused(
    toy_policy: Path, cache: Path, whole: tuple[Path, float], tmp_path: Path
) -> None:
    arguments = command(toy_policy, tmp_path / "run", cache)
    first = start(arguments, tmp_path / "first")
    while first.poll() is None and "step 1/" not in (tmp_path / "first").read_text():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # alive, and not done before the second one looks
    second = start(arguments, tmp_path / "second")
    assert second.wait(600) != 0
    first.send_signal(signal.SIGCONT)
    assert "in use by a live process" in (tmp_path / "second").read_text()
    assert first.wait(600) == 0
    assert result(tmp_path / "run") == result(whole[0])
