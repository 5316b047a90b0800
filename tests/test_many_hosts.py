"""The whole app as a job of two processes with two devices each, against one process with four."""

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
    "loss.rows=4", "eval.problems=8", "eval.every=0", "eval.before=false", "eval.after=false", "checkpoint.every=2",
    "log.tensorboard=false", "mesh=fsdp:-1", f"reward.functions=[{SCRIPT.stem}:share_of_digits]",
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
    """What was measured, without what a clock or a compilation cache decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "seconds", "compiled")
    return [{k: v for k, v in line.items() if not k.startswith(clocks) and "per_second" not in k} for line in lines]


@pytest.mark.slow
def test_two_processes_of_two_devices_train_as_one_of_four(tmp_path: Path) -> None:
    launch(1, 1, "make-policy", str(tmp_path / "policy"))
    for processes, devices in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        launch(processes, devices, f"model.path={tmp_path / 'policy'}", f"run.dir={folder}", *SETTINGS)
    one, two = tmp_path / "1", tmp_path / "2"

    # Same tokens, to the last; the rest to f32 rounding, for no order of summation over processes is promised.
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    alone, together = metrics(one), metrics(two)
    assert [line["step"] for line in together] == [1, 2]
    for left, right in zip(alone, together, strict=True):
        assert right == pytest.approx(left, rel=1e-5, abs=1e-7)
    with np.load(one / "weights.npz") as left, np.load(two / "weights.npz") as right:
        assert left.files == right.files
        for name in left.files:
            np.testing.assert_allclose(right[name], left[name], rtol=0, atol=1e-6, err_msg=name)
