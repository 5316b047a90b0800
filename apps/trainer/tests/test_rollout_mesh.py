"""A mesh of their own for rollouts: the same run, and settings that do not fit it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from toy import metrics, settings

from grpo_mesh import AXES, make_mesh
from grpo_sampler import ModelConfig
from grpo_trainer.assemble.blueprint import blueprint
from grpo_trainer.settings.changes import differences
from grpo_trainer.settings.errors import ConfigError

TESTS = Path(__file__).parent


@dataclass(frozen=True)
class Chip:
    """A device that is not there."""

    id: int
    platform: str = "tpu"
    process_index: int = 0


def records(policy: Path, folder: Path, *sets: str) -> list[dict[str, Any]]:
    """The metrics of two steps on four devices."""
    small = ("steps=2", "cpu_devices=4", "mesh=dp:2,fsdp:2", "reward.functions=[digits]", "checkpoint.every=0")
    quiet = ("eval.before=false", "eval.after=false", "eval.every=0", "data.train_size=40")
    given = (f"model.path={policy}", f"run.dir={folder}", *small, *quiet, *sets)
    command = [sys.executable, "toy.py", "train", *(f"--set={assignment}" for assignment in given)]
    done = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert ("sampling on dp:2 fsdp:1 tp:2" in done.stdout) == ("rollout.mesh=dp:2,tp:2" in sets)
    return metrics(folder)


# The toy has one key/value head, which tp 2 repeats.
@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), ("model.lora.rank=4", "optimizer.learning_rate=0.01")])
def test_a_run_samples_the_same_on_a_mesh_of_its_own(adapters: tuple[str, ...], toy_policy: Path, tmp_path: Path):
    one = records(toy_policy, tmp_path / "one", *adapters)
    two = records(toy_policy, tmp_path / "two", "rollout.mesh=dp:2,tp:2", *adapters)
    assert [line["reward"] for line in two] == [line["reward"] for line in one]
    for before, after in zip(one, two):
        assert after["entropy"] == pytest.approx(before["entropy"], rel=1e-5)
        assert after["grad_norm"] == pytest.approx(before["grad_norm"], rel=1e-3)
        assert after["sampling_logp_difference/max"] < 1e-4


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rollout.mesh=dp:3"], r"rollout\.mesh: mesh 'dp:3': dp·fsdp·tp = 3·1·1 = 3 but 8 devices"),
        (["rollout.mesh=model:8"], r"rollout\.mesh: .*unknown axis 'model'"),
        (["rollout.mesh=dp:2,tp:4"], r"rollout\.mesh must have tp of 1, 2, .*2 query heads.*got tp 4"),
        (
            ["rollout.mesh=dp:-1", "rollout.prompts=1", "rollout.group_size=4"],
            r"rollout\.prompts x rollout\.group_size must be a multiple of dp·fsdp = 8 of rollout\.mesh='dp:-1'.*got 4",
        ),
        (["rollout.mesh=dp:4,tp:2", "rollout.slots=6"], r"rollout\.slots must be a multiple .* = 4 .*got 6\. Use 8"),
        (["rollout.mesh=dp:4,tp:2", "eval.slots=6"], r"eval\.slots must be a multiple of dp·fsdp = 4 .*got 6"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_by_the_setting(
    sets: list[str], message: str, toy_policy: Path, tmp_path: Path
) -> None:
    mesh = Mesh(np.array([Chip(number) for number in range(8)], dtype=object).reshape(8, 1, 1), AXES)
    with pytest.raises(ConfigError, match=message):
        blueprint(settings(toy_policy, tmp_path, "loss.rows=8", *sets), ModelConfig.from_file(toy_policy), mesh)


def test_a_resume_may_change_it(toy_policy: Path, tmp_path: Path) -> None:
    old, new = settings(toy_policy, tmp_path), settings(toy_policy, tmp_path, "rollout.mesh=dp:2")
    assert not differences(old, new)


def test_exports_and_replays_need_no_such_devices(toy_policy: Path, tmp_path: Path) -> None:
    given = settings(toy_policy, tmp_path, "mesh=dp:2,fsdp:2", "rollout.mesh=dp:2,tp:2").on_any_devices()
    plan = blueprint(given, ModelConfig.from_file(toy_policy), make_mesh(given.mesh, jax.devices()[:1]))
    assert plan.rollout_mesh is plan.mesh
