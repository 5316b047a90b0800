"""The whole app, spread: over eight devices by every kind of mesh, and over two processes; the same run comes out."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from grpo_sampler import load_pretrained
from grpo_trainer.evaluate.records import read_records

SCRIPT = Path(__file__).parent / "train_in_a_job.py"
SETTINGS = [
    "steps=2", "data.train_size=40", "rollout.prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=16",
    "loss.rows=8", "eval.problems=8", "eval.every=0", "eval.before=false", "eval.after=false", "checkpoint.every=2",
    "log.tensorboard=false", "log.completions=16", "prompt.instruction=",
    f"reward.functions=[{SCRIPT.stem}:share_of_digits]",
]  # fmt: skip


def launch(processes: int, devices: int, *arguments: str) -> str:
    job = ["-m", "grpo_mesh.launch", "--processes", str(processes), "--devices-per-process", str(devices), "--"]
    done = subprocess.run(
        [sys.executable, *job, sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},  # for the reward function that the settings name
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What was measured, without what a clock, a compilation cache or the number of devices decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    other = ("time", "seconds", "compiled", "packing/positions")  # every device has prompt slots of its own
    return [{k: v for k, v in line.items() if not k.startswith(other) and "per_second" not in k} for line in lines]


def largest_difference(left: Path, right: Path, name: str) -> tuple[float, float]:
    """Of the arrays in two files: the largest difference, and the largest number."""
    with np.load(left / name) as ours, np.load(right / name) as theirs:
        assert ours.files == theirs.files
        differences = [float(np.abs(ours[key] - theirs[key]).max()) for key in ours.files]
        return max(differences), max(float(np.abs(theirs[key]).max()) for key in ours.files)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("policies") / "toy"
    launch(1, 1, "make-policy", str(folder))
    return f"model.path={folder}"


@pytest.fixture(scope="module")
def alone(policy: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process with one device."""
    folder = tmp_path_factory.mktemp("runs") / "alone"
    launch(1, 1, policy, f"run.dir={folder}", "mesh=fsdp:-1", *SETTINGS)
    return folder


def same_run(folder: Path, other: Path) -> str:
    """Same tokens, to the last; the rest to f32 rounding, for no order of summation over devices is promised."""
    assert (folder / "completions.jsonl").read_text() == (other / "completions.jsonl").read_text()
    steps, others = metrics(folder), metrics(other)
    assert [line["step"] for line in steps if line["step"]] == [1, 2]  # step 0 is an evaluation
    for step, its in zip(steps, others, strict=True):
        assert step == pytest.approx(its, rel=1e-5, abs=1e-6)
    gradient, scale = largest_difference(folder, other, "gradient.npz")
    assert gradient <= 2e-6 * max(1.0, scale)
    # Adam divides a gradient by its own size: where that is no more than rounding, so is the direction of its step of
    # 3e-4. Of the 6e-4 that two steps may move a weight, 2 % may differ.
    weights, _ = largest_difference(folder, other, "weights.npz")
    assert weights <= 1.2e-5
    loss = max(abs(step["loss"] - its["loss"]) for step, its in zip(steps, others) if step["step"])
    return f"loss {loss:.1e}, gradient {gradient:.1e} of {scale:.2g}, weights {weights:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp:8", "fsdp:8", "fsdp:4,tp:2", "dp:2,fsdp:2,tp:2"])
def test_eight_devices_train_as_one(mesh: str, policy: str, alone: Path, tmp_path: Path) -> None:
    launch(1, 8, policy, f"run.dir={tmp_path / 'run'}", f"mesh={mesh}", *SETTINGS)
    print(f"{mesh}: {same_run(tmp_path / 'run', alone)}")


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one_of_four(policy: str, tmp_path: Path) -> None:
    more = ("eval.before=true", "eval.after=true", "eval.samples=2", "checkpoint.export=auto")
    for processes, devices in ((1, 4), (2, 2)):
        run = f"run.dir={tmp_path / str(processes)}"
        launch(processes, devices, policy, run, "mesh=fsdp:-1", *SETTINGS, *more)
    alone, both = tmp_path / "1", tmp_path / "2"
    print(f"two processes: {same_run(both, alone)}")
    for step in (0, 2):
        records = [read_records(folder / "evaluations" / f"step_{step}.jsonl") for folder in (alone, both)]
        assert records[0] == records[1]
        assert len(records[0]) == 8
    # The first process wrote the policy, and both gathered it.
    (_, ours), (_, theirs) = load_pretrained(both / "export"), load_pretrained(alone / "export")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1.2e-5, rtol=0), ours, theirs)


def start(commands: list[list[str]]) -> list[subprocess.Popen[str]]:
    """A job without a launcher, as on many hosts: nobody stops the others when one ends. One command a rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = {"GRPO_COORDINATOR": f"127.0.0.1:{port}", "GRPO_PROCESS_COUNT": str(len(commands))}
    places = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(SCRIPT.parent)}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ | job | places | {"GRPO_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]


def settings(*given: str) -> list[str]:
    return [part for setting in (*SETTINGS, "cpu_devices=0", "mesh=fsdp:-1", *given) for part in ("--set", setting)]


def outcome(process: subprocess.Popen[str], since: float) -> tuple[int, str, float]:
    output, _ = process.communicate(timeout=580)
    return process.returncode, output, time.monotonic() - since


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_of_a_run_ends_the_other(victim: int, policy: str, tmp_path: Path) -> None:
    command = ["-m", "grpo_gsm8k.cli", "train", *settings(policy, f"run.dir={tmp_path / 'run'}", "steps=100000")]
    children = start([command, command])
    try:
        written = tmp_path / "run" / "metrics.jsonl"
        while not (written.exists() and written.read_text().count("\n") >= 2):
            assert all(child.poll() is None for child in children), children[0].communicate()[0]
            time.sleep(0.1)
        children[victim].send_signal(signal.SIGKILL)
        code, output, seconds = outcome(children[1 - victim], time.monotonic())
    finally:
        for child in children:
            child.kill()
    print(f"rank {victim} killed: the other ended with code {code} after {seconds:.1f} s")
    assert code not in (0, None), output[-3000:]
    # Whoever waits in a collective hears of it from the connection, at once; the others from the coordinator.
    assert "another task died" in output or "another process of this job is gone" in output, output[-3000:]


@pytest.mark.slow
def test_a_process_that_hangs_in_an_update_is_named_by_the_other(policy: str, tmp_path: Path) -> None:
    hanging = [str(SCRIPT), "hang", policy, f"run.dir={tmp_path / 'run'}", "mesh=fsdp:-1", "phase_timeout=30"]
    children = start([[*hanging, *SETTINGS]] * 2)
    try:
        code, output, _ = outcome(children[0], time.monotonic())
        seconds = outcome(children[1], time.monotonic())[2]
    finally:
        for child in children:
            child.kill()
    print(f"hung: rank 0 ended with code {code}, the hanging one {seconds:.1f} s later")
    assert code == 124, output[-3000:]
    assert re.search(r"phase 'update' must end within 30 s; .*rank 1 \(at train_in_a_job\.py:\d+ in <lambda>\)", output)


@pytest.mark.slow
def test_a_process_with_another_setting_is_named_by_both(policy: str, tmp_path: Path) -> None:
    command = ["-m", "grpo_gsm8k.cli", "train"]
    run = settings(policy, f"run.dir={tmp_path / 'run'}")
    began = time.monotonic()
    children = start([[*command, *run], [*command, *run, "--set", "optimizer.learning_rate=1e-5"]])
    try:
        outcomes = [outcome(child, began) for child in children]
    finally:
        for child in children:
            child.kill()
    for rank, (code, output, seconds) in enumerate(outcomes):
        print(f"another setting: rank {rank} ended with code {code}, {seconds:.1f} s after the start")
        assert code == 1, output[-3000:]
        assert "odd: rank 1" in output
        assert "config.optimizer.learning_rate: rank 0: 0.0003; rank 1: 1e-05" in output
