"""A run that is killed again and again is the uninterrupted run, bit for bit, in one process and in two."""

from __future__ import annotations

import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy import metrics

TESTS = Path(__file__).parent
STEPS, PROBLEMS, PROMPTS = 12, 20, 4  # more than two epochs
STAGES = ("rollout", "reward", "update", "evaluation", "checkpoint", "restore")
HASHES = ("policy", "tokens", "rewards", "losses", "state")


def assignments(policy: Path, folder: Path, cache: Path, **more: Any) -> list[str]:
    small = {
        "model.path": policy,
        "run.dir": folder,
        "compilation_cache": cache,
        "steps": STEPS,
        "cpu_devices": 0,
        "data.train_size": PROBLEMS,
        "rollout.prompts": PROMPTS,
        "rollout.group_size": 4,
        "rollout.max_new_tokens": 16,
        "loss.rows": 4,
        "optimizer.learning_rate": 0.01,
        "eval.problems": 8,
        "eval.every": 3,
        "checkpoint.every": 1,
        "log.completions": 16,  # every one: what was sampled is compared, and counted
        "log.tensorboard": False,
        "reward.functions": "[toy:digits]",  # as a user's own: in a process of its own
        "reward.timeout": 600,  # a frozen machine is no failure of the function
    }
    return [f"{key}={value}" for key, value in (small | more).items()]


def job(processes: int, devices: int = 1) -> list[str]:
    """A process, or several, with so many devices each; none is given time to clean up once another died."""
    counts = ["--processes", str(processes), "--devices-per-process", str(devices), "--grace", "0"]
    launched = [sys.executable, "-m", "grpo_mesh.launch", *counts, "--"] if (processes, devices) != (1, 1) else []
    return [*launched, sys.executable, "train_and_die.py"]


def train(*sets: str) -> list[str]:
    return [sys.executable, "toy.py", "train", *(f"--set={assignment}" for assignment in sets)]


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    # In the tests' folder, so that `toy` is a module beside the command.
    with log.open("ab") as out:
        return subprocess.Popen(arguments, stdout=out, stderr=out, cwd=TESTS)


def result(folder: Path) -> list[Any]:
    """What a run leaves, without what a clock or a cache decides."""
    summary = json.loads((folder / "summary.json").read_text())
    return [
        metrics(folder),
        {k: v for k, v in summary.items() if not k.startswith(("seconds", "compiled"))},
        (folder / "completions.jsonl").read_text(),
    ]


def events(trace: Path, rank: int = 0) -> list[dict[str, Any]]:
    """What `train_and_die.py` wrote down; a line cut short by the kill is left out."""
    file = trace.with_name(f"{trace.name}.{rank}")
    lines = file.read_text().split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def hashes(trace: Path, rank: int = 0) -> dict[tuple[int, str], str]:
    """(step, what) -> its hash."""
    return {(event["step"], name): event[name] for event in events(trace, rank) for name in HASHES if name in event}


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run.

    Args:
        folder: of the run.
        hashes: (step, what) -> hash, of every rank.
        first, later: seconds that each stage takes, at its first visit by a process and at later ones.
    """

    folder: Path
    hashes: list[dict[tuple[int, str], str]]
    first: dict[str, float]
    later: dict[str, float]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def whole(
    request: pytest.FixtureRequest, toy_policy: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    processes = request.param
    folder = tmp_path_factory.mktemp(f"whole{processes}")
    for name in ("cold", "run"):  # the second one finds its programs compiled, as a run that goes on does
        arguments = [*job(processes), str(folder / f"{name}.trace"), "{}"]
        run = start([*arguments, *assignments(toy_policy, folder / name, cache)], folder / "log")
        assert run.wait(1800) == 0, (folder / "log").read_text()
    trace = folder / "run.trace"
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    begun: dict[str, float] = {}
    for event in events(trace):
        if event.get("stage") in seconds:
            begun[event["stage"]] = event["at"]
        elif event.get("left") in seconds:
            seconds[event["left"]].append(event["at"] - begun[event["left"]])
    assert result(folder / "cold") == result(folder / "run")
    return Whole(
        folder / "run",
        [hashes(trace, rank) for rank in range(processes)],
        {stage: values[0] for stage, values in seconds.items()} | {"restore": 0.5},  # there was nothing to read here
        {stage: statistics.median(values[1:] or values) for stage, values in seconds.items()},
    )


@dataclass(frozen=True, order=True)
class Kill:
    """An instant, and who dies in it."""

    step: int
    share: float
    stage: str
    ranks: tuple[int, ...]


@pytest.mark.parametrize(
    "whole",
    [pytest.param(1, id="one-process"), pytest.param(2, id="two-processes", marks=pytest.mark.slow)],
    indirect=True,
)
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_instants(kills: int, toy_policy: Path, cache: Path, whole: Whole, tmp_path: Path) -> None:
    processes, chance = len(whole.hashes), random.Random(kills)
    victims = [(0,), (1,), (0, 1)] if processes > 1 else [(0,)]
    todo = [
        Kill(chance.randint(1, STEPS - 3), chance.random(), STAGES[n % len(STAGES)], chance.choice(victims))
        for n in range(kills)
    ]
    chance.shuffle(todo)
    # Each row is printed once it is known: of a long test that is cut short, so much is proven.
    head = ("kill", "rank", "instant", "interrupted", "goes on after", "hashes compared, all equal")
    print(f"\n| {' | '.join(head)} |", "|---" * len(head) + "|", sep="\n", flush=True)
    interrupted: Counter[str] = Counter()
    row, rounds = "", 0
    while todo:
        folder = tmp_path / f"run{rounds}"
        rounds += 1
        code = -1
        # The instants of a round ascend, so that a run goes on from kill to kill, and to its end after the last.
        for kill in [*sorted(todo[:10]), None]:
            trace = tmp_path / f"{interrupted.total()}.{rounds}.trace"
            code = run_until(kill, job(processes), trace, assignments(toy_policy, folder, cache), whole)
            compared = [hashes(trace, rank) for rank in range(processes)]
            for mine, expected in zip(compared, whole.hashes):
                assert mine.items() <= expected.items(), f"after {row or 'nothing'}"
            if row:
                resumed = [event["resumed"] for event in events(trace) if "resumed" in event]
                whence = f"step {resumed[0]}" if resumed else "killed while it was read"
                print(f"{row} | {whence} | {sum(map(len, compared))} |", flush=True)
                row = ""
            if code == 0:
                break  # perhaps before the clock of `kill` ran out: then it is for the next round
            assert kill is not None, trace.with_suffix(".log").read_text()
            todo.remove(kill)
            interrupted[events(trace, kill.ranks[0])[-1]["killed"] or "between stages"] += 1
            row = f"| {interrupted.total()} | {described(kill, trace, folder)}"
        assert code == 0
        assert result(folder) == result(whole.folder)
        assert_every_problem_once_an_epoch(folder)
    print(f"{kills} kills, {rounds} runs, everything equal:", dict(interrupted))
    assert interrupted.total() == kills


def run_until(kill: Kill | None, command: list[str], trace: Path, sets: list[str], whole: Whole) -> int:
    """Start a run that dies at this instant; its exit code."""
    orders = vars(kill) | {"first": whole.first[kill.stage], "later": whole.later[kill.stage]} if kill else {}
    arguments = [*command, str(trace), json.dumps(orders), *sets]
    code = start(arguments, trace.with_suffix(".log")).wait(1800)
    if code:
        assert kill, trace.with_suffix(".log").read_text()
        for rank in kill.ranks[:1]:
            assert "killed" in events(trace, rank)[-1], trace.with_suffix(".log").read_text()
    return code


def described(kill: Kill, trace: Path, folder: Path) -> str:
    """Cells of the table: who died, when that was to be, and what was under way."""
    last = events(trace, kill.ranks[0])[-1]
    where = f"{last['killed'] or 'between stages'}, step {last['step']}"
    half = sorted(path.name.split(".")[0] for path in (folder / "checkpoints").glob("*tmp*"))
    writing = f", {half[0].replace('_', ' ')} half written" if half else ""
    return f"{' and '.join(map(str, kill.ranks))} | {kill.share:.0%} of {kill.stage} | {where}{writing}"


def assert_every_problem_once_an_epoch(folder: Path) -> None:
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    asked: dict[int, set[str]] = {}
    for record in records:
        asked.setdefault(record["step"], set()).add(record["prompt"])
    assert list(asked) == list(range(1, STEPS + 1))
    order = [problem for step in asked for problem in sorted(asked[step])]
    for epoch in range(len(order) // PROBLEMS):
        assert Counter(order[epoch * PROBLEMS :][:PROBLEMS]).most_common(1)[0][1] == 1
    assert len(order) > 2 * PROBLEMS


@pytest.mark.parametrize("whole", [1], indirect=True)
def test_a_signal_saves_and_the_same_command_goes_on(
    toy_policy: Path, cache: Path, whole: Whole, tmp_path: Path
) -> None:
    arguments = train(*assignments(toy_policy, tmp_path / "run", cache, **{"checkpoint.every": 1000}))
    run = start(arguments, tmp_path / "log")
    while run.poll() is None and "step 2/" not in (tmp_path / "log").read_text():
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    assert run.wait(600) == 75, (tmp_path / "log").read_text()
    assert "the same command resumes the run" in (tmp_path / "log").read_text()
    assert start(arguments, tmp_path / "log").wait(600) == 0
    assert result(tmp_path / "run") == result(whole.folder)


@pytest.mark.parametrize("whole", [1], indirect=True)
def test_a_second_run_in_the_same_folder_is_refused(
    toy_policy: Path, cache: Path, whole: Whole, tmp_path: Path
) -> None:
    arguments = train(*assignments(toy_policy, tmp_path / "run", cache))
    first = start(arguments, tmp_path / "first")
    while first.poll() is None and "step 1/" not in (tmp_path / "first").read_text():
        time.sleep(0.02)
    first.send_signal(signal.SIGSTOP)  # alive, and not done before the second one looks
    second = start(arguments, tmp_path / "second")
    assert second.wait(600) != 0
    first.send_signal(signal.SIGCONT)
    assert "in use by a live process" in (tmp_path / "second").read_text()
    assert first.wait(600) == 0
    assert result(tmp_path / "run") == result(whole.folder)


@pytest.mark.slow
@pytest.mark.parametrize("whole", [2], indirect=True)
def test_two_processes_step_over_a_damaged_checkpoint(
    toy_policy: Path, cache: Path, whole: Whole, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    for file in (folder / "checkpoints" / f"step_{STEPS}" / "state" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    sets = assignments(toy_policy, folder, cache, steps=STEPS + 1)
    run = start([*job(2), str(tmp_path / "trace"), "{}", *sets], tmp_path / "log")
    assert run.wait(1800) == 0, (tmp_path / "log").read_text()
    assert f"step_{STEPS} is damaged" in (tmp_path / "log").read_text()
    for rank in (0, 1):
        assert [event["resumed"] for event in events(tmp_path / "trace", rank) if "resumed" in event] == [STEPS - 1]
        again = hashes(tmp_path / "trace", rank)
        assert {key: again[key] for key in again if key[0] <= STEPS}.items() <= whole.hashes[rank].items()


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(toy_policy: Path, cache: Path, tmp_path: Path) -> None:
    """On 1 x 2 devices, then 2 x 1, then 1: same problems and tokens; numbers up to the order of float sums."""
    there = {"eval.every": 0, "eval.after": False, "loss.rows": 4}

    def go_on(name: str, processes: int, devices: int, steps: int) -> None:
        sets = assignments(toy_policy, tmp_path / name, cache, **there, steps=steps)
        trace = tmp_path / f"{name}{steps}"
        run = start([*job(processes, devices), str(trace), "{}", *sets], tmp_path / "log")
        assert run.wait(1800) == 0, (tmp_path / "log").read_text()

    go_on("stays", 1, 2, 6)
    for processes, devices, steps in ((1, 2, 2), (2, 1, 4), (1, 1, 6)):
        go_on("moves", processes, devices, steps)
    (stays, _, sampled), (moves, _, sampled_too) = result(tmp_path / "stays"), result(tmp_path / "moves")
    assert sampled_too == sampled
    assert [line["step"] for line in moves] == [line["step"] for line in stays] == list(range(7))
    for left, right in zip(stays, moves):
        assert right == pytest.approx(left, rel=1e-4, abs=1e-6)
    first, last = hashes(tmp_path / "stays6"), hashes(tmp_path / "moves4")
    assert last[2, "state"] == first[2, "state"]  # what was saved by one layout is read by the next bit for bit
