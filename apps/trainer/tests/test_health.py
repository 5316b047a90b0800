"""Runs that go wrong: said once, counted, refused by name, or stopped with a capsule that can be computed again."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from grpo_contracts import PolicyVersion
from grpo_trainer.report import replay
from grpo_trainer.rewards.functions import RewardError
from runs import assemble
from grpo_trainer.run.capsule import CapsuleError, read_capsule
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints, ResumeRefused
from grpo_trainer.run.folder import RunFolder
from grpo_trainer.run.health import Diverged, Health, StaleWeights
from grpo_trainer.run.progress import Progress
from runs import load
from grpo_trainer.settings.schema import Settings
from runs import train

FINE = {
    "frac_reward_zero_std": 0.5,
    "completions/clipped_ratio": 0.5,
    "sampling_logp_difference/mean": 1e-7,
    "finite": 1.0,
    "skipped_in_a_row": 0.0,
}


def settings(policy: Path, folder: Path, *more: str) -> Settings:
    return load(
        [],
        [
            f"model.path={policy}",
            f"run.dir={folder}",
            "steps=2",
            "data.train_size=40",
            "rollout.prompts=4",
            "rollout.group_size=4",
            "rollout.max_new_tokens=16",
            "loss.rows=4",
            "eval.problems=8",
            "eval.before=false",
            "eval.after=false",
            "eval.every=0",
            "checkpoint.every=2",
            "log.tensorboard=false",
            "mesh=dp:-1",
            "reward.functions=[graders:digits]",
            "reward.timeout=120",  # a busy machine is no failure of the function
            *more,
        ],
    )


class Watched:
    """A `Health` of some settings and everything it says."""

    def __init__(self, folder: Path, *sets: str) -> None:
        config = load([], [f"run.dir={folder / 'run'}", "log.tensorboard=false", *sets])
        self.shown = io.StringIO()
        self.folder = RunFolder(config)
        self.health = Health(config, self.folder, Progress(9, stream=self.shown), {})
        self.warnings = self.health.warnings
        self.steps = 0

    def step(self, **wrong: float) -> dict[str, float]:
        self.steps += 1
        return self.health.watch(self.steps, FINE | {name.replace("__", "/"): value for name, value in wrong.items()})


@pytest.mark.parametrize(
    ("wrong", "after", "text"),
    [
        ({"frac_reward_zero_std": 1.0}, 5, "no group's rewards differ since 5 steps"),
        ({"completions__clipped_ratio": 1.0}, 1, "reached rollout.max_new_tokens=64 and was cut"),
        ({"sampling_logp_difference__mean": 1e-3}, 1, "0.001 nats a token on average, more than 0.0001"),
        ({"sampling_logp_difference__mean": float("nan")}, 1, "differ by nan"),
        ({"finite": 0.5}, 1, "was skipped; 3 in a row stop the run"),
    ],
)
def test_each_streak_is_warned_of_once(tmp_path: Path, wrong: dict[str, float], after: int, text: str) -> None:
    watched = Watched(tmp_path)
    for _ in range(after - 1):
        watched.step(**wrong)
    assert not watched.warnings
    for _ in range(4):
        watched.step(**wrong)
    (warning,) = watched.warnings
    assert warning.startswith(f"step {after}: ")
    assert text in warning
    assert watched.shown.getvalue() == f"warning: {warning}\n"
    watched.step()
    for _ in range(after):
        watched.step(**wrong)
    assert len(watched.warnings) == 2  # a new streak


def test_what_comes_and_goes_is_told_a_few_times(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for _ in range(9):
        watched.step(finite=0.5)
        watched.step()
    assert [warning.partition(":")[0] for warning in watched.warnings] == ["step 1", "step 3", "step 5"]
    assert ["not told again" in warning for warning in watched.warnings] == [False, False, True]
    watched.step(completions__clipped_ratio=1.0)  # another thing
    assert len(watched.warnings) == 4


def test_a_healthy_step_says_nothing(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    assert set(watched.step().values()) == {0.0}
    assert not watched.warnings
    assert not watched.health.failing


@pytest.mark.parametrize(
    "sets", [("model.compute_dtype=bfloat16",), ("health.max_logp_gap=0.01",), ("rollout.top_p=0.9",)]
)
def test_the_bound_on_the_gap(tmp_path: Path, sets: tuple[str, ...]) -> None:
    watched = Watched(tmp_path, *sets)
    watched.step(sampling_logp_difference__mean=1e-3)
    assert not watched.warnings


def test_skipped_updates_in_a_row_are_counted_over_steps(tmp_path: Path) -> None:
    watched = Watched(tmp_path, "loss.epochs=2", "health.max_skipped=4")
    for tail, failing in [
        (1, False),
        (2, False),
        (1, False),
        (2, False),
        (1, False),
        (0, False),
        (2, False),
        (2, True),
    ]:
        watched.step(finite=0.5, skipped_in_a_row=float(tail))
        assert watched.health.failing == failing, watched.steps


def test_failures_are_counted_and_written_down(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.health.reward_failures(
        1, [{"kind": "crash", "rows": [3, 4], "completion": "a"}, {"kind": "shape", "rows": []}]
    )
    counts = watched.step()
    assert counts["reward_failures/crash"] == 2
    assert counts["reward_failures/shape"] == 1
    assert watched.step()["reward_failures/crash"] == 0
    lines = (watched.folder.path / "reward_failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1]
    watched.folder.start(0)
    assert not (watched.folder.path / "reward_failures.jsonl").read_text()  # a resume starts before them


def test_stale_weights_are_refused(tmp_path: Path) -> None:
    health = Watched(tmp_path).health
    rollout: Any = type("Rollout", (), {"policy": PolicyVersion(3, "ab" * 32)})
    health.check_rollout(rollout, PolicyVersion(3, "ab" * 32))
    for other in (PolicyVersion(4, "ab" * 32), PolicyVersion(3, "cd" * 32)):
        with pytest.raises(StaleWeights, match=f"step {other.step} with digest {other.digest[:12]}.*abababababab"):
            health.check_rollout(rollout, other)


@pytest.fixture(scope="module")
def diverged(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first update throws the parameters out of all bounds: the next three are not finite."""
    folder = tmp_path_factory.mktemp("diverged") / "run"
    with pytest.raises(Diverged, match=r"3 updates in a row up to step 1.*replay .*capsule-000001\.zip") as caught:
        train(settings(toy_policy, folder, "optimizer.learning_rate=1e15", "loss.epochs=4"))
    assert str(folder / "checkpoints" / "step_1") in str(caught.value)
    return folder


def test_a_capsule_holds_the_step(diverged: Path) -> None:
    capsule, batch = read_capsule(diverged / "capsule-000001.zip")
    assert capsule.step == 1
    assert capsule.config.run.dir == str(diverged)
    assert capsule.metrics["finite"] == 0.25
    assert capsule.metrics["skipped_in_a_row"] == 3
    assert "was skipped" in capsule.warnings[-1]
    assert {"jax", "grpo-loss", "python"} <= capsule.versions.keys()
    assert len(batch.advantage) == 16
    assert sorted(path.name for path in diverged.iterdir() if path.name.startswith(("capsule", "tmp"))) == [
        "capsule-000001.zip"
    ]


def test_a_replay_says_what_was_not_finite_and_where(diverged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(diverged / "capsule-000001.zip")]) == 0
    said = capsys.readouterr().out
    assert "on 1 x cpu" in said
    assert "update 1: log-probability: " in said
    assert "loss of micro-batch 1 of " in said
    assert "gradient embed: " in said
    assert "the update is refused" in said
    assert "parameters are not the capsule's" not in said


def test_the_cause_comes_before_its_consequences(toy_policy: Path, tmp_path: Path, diverged: Path) -> None:
    capsule, batch = read_capsule(diverged / "capsule-000001.zip")
    run = assemble(settings(toy_policy, tmp_path / "fine"), devices=jax.devices()[:1])
    assert list(replay.not_finite(run, run.state, batch, 0)) == []
    sick = jax.tree.map(lambda leaf: leaf.copy(), run.state.params)
    sick["layers"]["q"] = sick["layers"]["q"].at[0, 3, 1, 2].set(np.nan)
    findings = list(replay.not_finite(run, replace(run.state, params=sick), batch, 0))
    assert findings[0] == "parameter layers/q: 1 of 1024, first nan at (0, 3, 1, 2)"
    assert findings[1].startswith("update 1: log-probability: ")
    advantage = batch.advantage.copy()
    advantage[5] = np.inf
    findings = list(replay.not_finite(run, run.state, replace(batch, advantage=advantage), 0))
    assert findings[0] == "advantage of row 5: inf, and 0 more"
    assert not any("log-probability" in finding for finding in findings)
    assert capsule.identity == run.identity


@pytest.mark.parametrize("damage", ["missing", "text", "cut", "other", "batch"])
def test_files_that_are_no_capsule(diverged: Path, tmp_path: Path, damage: str) -> None:
    file = tmp_path / "capsule.zip"
    whole = (diverged / "capsule-000001.zip").read_bytes()
    if damage == "text":
        file.write_text("hello")
    elif damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage in ("other", "batch"):
        with zipfile.ZipFile(diverged / "capsule-000001.zip") as old, zipfile.ZipFile(file, "w") as new:
            about = json.loads(old.read("capsule.json"))
            new.writestr("capsule.json", json.dumps(about | ({"format": 0} if damage == "other" else {})))
            new.writestr("batch.npz", b"nothing" if damage == "batch" else old.read("batch.npz"))
    with pytest.raises(CapsuleError, match=r"capsule\.zip"):
        read_capsule(file)


def test_a_capsule_without_its_checkpoint(diverged: Path, tmp_path: Path) -> None:
    (tmp_path / "capsule.zip").write_bytes((diverged / "capsule-000001.zip").read_bytes())
    with pytest.raises(CapsuleError, match=r"needs the parameters in .*step_1: there are none"):
        replay.main([str(tmp_path / "capsule.zip")])


def test_a_run_goes_on_past_failing_rewards(toy_policy: Path, tmp_path: Path) -> None:
    config = settings(toy_policy, tmp_path / "run", "steps=1", "reward.functions=[graders:rare]")
    assert train(config) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["reward_failures/exception"] == 1
    assert line["unscored"] == 1 / 16
    (record,) = (json.loads(text) for text in (tmp_path / "run" / "reward_failures.jsonl").read_text().splitlines())
    assert record["step"] == 1
    assert "ValueError: too rare" in record["message"]
    assert {"prompt", "completion", "answer"} <= record.keys()


def test_too_many_failing_rewards_stop_the_run(toy_policy: Path, tmp_path: Path) -> None:
    config = settings(
        toy_policy, tmp_path / "run", "steps=1", "reward.functions=[graders:rare]", "reward.max_unscored=0.01"
    )
    with pytest.raises(RewardError, match=r"1 of 16 did.*'graders:rare' raised ValueError: too rare"):
        train(config)
    assert (tmp_path / "run" / "reward_failures.jsonl").is_file()
    assert "too rare" in (tmp_path / "run" / "error.txt").read_text()


IDENTITY = {"identity": {"parameters": "ab"}}


def test_checkpoints_of_incompatible_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_trainer.run import checkpoint

    state = {"w": jax.numpy.arange(4.0)}
    now = {"grpo-loss": "0.1.3", "jax": "0.10.2", "optax": "0.2.8"}
    monkeypatch.setattr(checkpoint, "versions", lambda: now)
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(3, state, IDENTITY)
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"grpo-loss": "0.1.9", "jax": "0.11.0"})
    assert checkpoints.restore(state, IDENTITY["identity"]) is not None
    monkeypatch.setattr(checkpoint, "versions", lambda: now | {"grpo-loss": "0.2.0"})
    with pytest.raises(ResumeRefused, match=r"grpo-loss: checkpoint 0\.1\.3, here 0\.2\.0.*\n.*any_version=true"):
        checkpoints.restore(state, IDENTITY["identity"])
    forced = Checkpoints(tmp_path, keep=2, any_version=True).restore(state, IDENTITY["identity"])
    assert forced is not None
    assert forced.step == 3


def test_one_checkpoint_and_no_other(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2):
        checkpoints.save(step, {"w": jax.numpy.full(2, step)}, IDENTITY)
    checkpoints.wait()
    like = {"w": jax.numpy.zeros(2, jax.numpy.int32)}
    first = checkpoints.restore(like, IDENTITY["identity"], at=1)
    assert first is not None
    assert first.state["w"].tolist() == [1, 1]
    assert checkpoints.restore(like, IDENTITY["identity"], at=7) is None
    assert issubclass(CheckpointError, RuntimeError)


def test_what_one_process_cannot_read_all_step_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from grpo_trainer.run import checkpoint

    checkpoints = Checkpoints(tmp_path, keep=9)
    for step in (1, 2):
        checkpoints.save(step, {"w": jax.numpy.full(2, step)}, IDENTITY)
    checkpoints.wait()
    # Process 1 of 2 reads the notes of step 2 but not its arrays; this one reads everything.
    told = iter([False, True, False, False])
    monkeypatch.setattr(checkpoint, "jax", SimpleNamespace(process_count=lambda: 2, tree=jax.tree))
    monkeypatch.setattr(
        "grpo_trainer.run.checkpoint.multihost_utils.process_allgather",
        lambda mine: np.asarray([bool(mine), next(told)]),
    )
    restored = checkpoints.restore({"w": jax.numpy.zeros(2, jax.numpy.int32)}, IDENTITY["identity"])
    assert restored is not None
    assert restored.step == 1
    assert restored.state["w"].tolist() == [1, 1]
    assert "step_2 is damaged (process 1 could not read its part)" in caplog.text
    assert list(told) == []
