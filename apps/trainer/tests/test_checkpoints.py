"""Whose checkpoint it is, and what becomes of one that cannot be read."""

from __future__ import annotations

import errno
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import TASK, settings

from grpo_trainer.assemble import Run, assemble
from grpo_trainer.run import checkpoint
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints, ResumeRefused
from grpo_trainer.run.state import HealthMemory, LoopState

STEPS = (1, 2)
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
import jax.numpy as jnp
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints
from grpo_trainer.run.state import LoopState
from grpo_trainer.settings.schema import Settings

state = {f"w{i}": jnp.arange(2.0**16) for i in range(24)}  # one write fails, and the others after it
checkpoints = Checkpoints(Path(sys.argv[1]), keep=1, versions={})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    checkpoints.save(LoopState(state, step=1), {}, Settings())
    checkpoints.wait()
except CheckpointError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def run(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return assemble(settings(toy_policy, tmp_path_factory.mktemp("run"), "steps=4"), TASK)


@pytest.fixture
def folder(run: Run, tmp_path: Path) -> Path:
    """Two checkpoints of the run's first state."""
    made = Checkpoints(tmp_path / "checkpoints", keep=9, versions=run.versions)
    for step in STEPS:
        made.save(LoopState(run.state, step=step), run.identity, run.settings)
    made.close()
    return tmp_path / "checkpoints"


def opened(folder: Path, run: Run) -> Checkpoints:
    return Checkpoints(folder, keep=9, versions=run.versions)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        OSError(errno.EMFILE, "Too many open files"),
        ValueError('NOT_FOUND: Error opening "kvstore" [OS error 13: EACCES Permission denied]'),
    ],
    ids=lambda error: type(error).__name__ + str(error.args[0])[:3],
)
def test_what_cannot_be_read_now_is_left_alone(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    before = sorted(folder.rglob("*"))
    monkeypatch.setattr(checkpoint, "_read_state", fail)
    with pytest.raises(CheckpointError, match="cannot be read now"):
        opened(folder, run).restore(run.state, run.identity, settings=run.settings)
    assert sorted(folder.rglob("*")) == before


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def turn_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut, turn_a_bit, Path.unlink])
def test_what_is_proven_bad_is_stepped_over_and_kept(run: Run, folder: Path, damage: Callable[[Path], Any]) -> None:
    files = [path for path in (folder / "step_2" / "state").rglob("*") if path.is_file()]
    largest = max(path.stat().st_size for path in files)
    for file in [path for path in files if path.stat().st_size == largest]:  # orbax may hold a part twice
        damage(file)
    held = {path.name: path.read_bytes() for path in files if path.exists()}
    checkpoints = opened(folder, run)
    restored = checkpoints.restore(run.state, run.identity, settings=run.settings)
    assert restored is not None
    assert restored.step == 1
    checkpoints.set_aside_after(1)
    assert checkpoints.steps == [1]
    aside = folder.parent / "damaged" / "step_2" / "state"
    assert {path.name: path.read_bytes() for path in aside.rglob("*") if path.is_file()} == held
    # A second one of the same step does not replace the first.
    shutil.copytree(folder / "step_1", folder / "step_2")
    again = opened(folder, run)
    again.set_aside_after(1)
    assert sorted(path.name for path in aside.parents[1].iterdir()) == ["step_2", "step_2-1"]


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "9"), ("optimizer.learning_rate", "0.5"), ("rollout.group_size", "3")]
)
def test_a_checkpoint_of_a_run_with_other_settings_is_refused(
    run: Run, folder: Path, toy_policy: Path, key: str, value: str
) -> None:
    other = settings(toy_policy, folder.parent, "steps=4", f"{key}={value}")
    with pytest.raises(ResumeRefused, match=f"{key}: .* in the checkpoint, {value} now"):
        opened(folder, run).restore(run.state, run.identity, settings=other)


@pytest.mark.parametrize("more", ["steps=9", "mesh=auto", "log.completions=0", "checkpoint.keep=7"])
def test_what_may_change_in_a_resume_is_not_refused(run: Run, folder: Path, toy_policy: Path, more: str) -> None:
    other = settings(toy_policy, folder.parent, "steps=4", "optimizer.decay_steps=4", more)
    assert opened(folder, run).restore(run.state, run.identity, settings=other) is not None


def test_a_reader_compares_nothing(run: Run, folder: Path) -> None:
    restored = Checkpoints.reader(folder).restore(run.state, None)
    assert restored is not None
    assert restored.step == 2


def test_the_loops_state_comes_back_from_its_notes(run: Run) -> None:
    memory = HealthMemory(["step 1: a warning"], {"silent": 3}, {"silent": 1}, skipped=2)
    loop = LoopState(run.state, 7, {"next": 3}, {"before": {"correct": 1}}, 1.5, {"rollout": 0.5}, memory)
    assert LoopState.from_notes(run.state, loop.notes()) == loop


@pytest.mark.parametrize("limit", [20_000, 100])
def test_a_write_that_fails_is_said_once(limit: int, tmp_path: Path) -> None:
    """orbax and asyncio would print hundreds of lines of tracebacks beside the sentence."""
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "could not be written" in done.stdout or "writing a checkpoint" in done.stdout
    assert done.stdout.count("\n") == 1


def test_other_errors_of_orbax_are_logged(tmp_path: Path) -> None:
    Checkpoints(tmp_path, keep=1, versions={})
    file = "/site-packages/orbax/checkpoint/checkpoint_manager.py"
    for message, said in (("Deletion of step 3 failed", True), ("Failed to run 2 Handler Commit operations", False)):
        record = logging.LogRecord("absl", logging.ERROR, file, 1, message, None, None)
        assert bool(logging.getLogger("absl").filter(record)) == said
