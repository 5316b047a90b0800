"""The whole app, spread: over eight devices by every kind of mesh, and over two processes; the same run comes out."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "train_in_a_job.py"
SETTINGS = [
    "steps=2", "data.train_size=40", "rollout.prompts=4", "rollout.group_size=4", "rollout.max_new_tokens=16",
    "loss.rows=8", "eval.problems=8", "eval.every=0", "eval.before=false", "eval.after=false", "checkpoint.every=2",
    "log.tensorboard=false", "log.completions=16", f"reward.functions=[{SCRIPT.stem}:share_of_digits]",
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
    """What was measured, without what a clock wrote."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "seconds")
    return [{k: v for k, v in line.items() if not k.startswith(clocks) and "per_second" not in k} for line in lines]


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
    assert [line["step"] for line in steps] == [1, 2]
    for step, its in zip(steps, others, strict=True):
        assert step == pytest.approx(its, rel=1e-5, abs=1e-6)
    gradient, scale = largest_difference(folder, other, "gradient.npz")
    assert gradient <= 2e-6 * max(1.0, scale)
    weights, _ = largest_difference(folder, other, "weights.npz")
    assert weights <= 1e-6
    loss = max(abs(step["loss"] - its["loss"]) for step, its in zip(steps, others))
    return f"loss {loss:.1e}, gradient {gradient:.1e} of {scale:.2g}, weights {weights:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp:8", "fsdp:8", "fsdp:4,tp:2", "dp:2,fsdp:2,tp:2"])
def test_eight_devices_train_as_one(mesh: str, policy: str, alone: Path, tmp_path: Path) -> None:
    launch(1, 8, policy, f"run.dir={tmp_path / 'run'}", f"mesh={mesh}", *SETTINGS)
    print(f"{mesh}: {same_run(tmp_path / 'run', alone)}")


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one_of_four(policy: str, tmp_path: Path) -> None:
    for processes, devices in ((1, 4), (2, 2)):
        run = f"run.dir={tmp_path / str(processes)}"
        launch(processes, devices, policy, run, "mesh=fsdp:-1", *SETTINGS)
    print(f"two processes: {same_run(tmp_path / '2', tmp_path / '1')}")
