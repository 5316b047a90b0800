"""Runs that go wrong: said once, counted, refused by name, or stopped with a capsule that can be computed again."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from toy import TASK, load, settings

from grpo_contracts import PolicyVersion
from grpo_loss import TrainState
from grpo_trainer.assemble import assemble
from grpo_trainer.assemble.cautions import cautions
from grpo_trainer.report import replay
from grpo_trainer.rewards.functions import RewardError
from grpo_trainer.run import checkpoint
from grpo_trainer.run.capsule import CapsuleError, read_capsule
from grpo_trainer.run.checkpoint import Checkpoints, ResumeRefused
from grpo_trainer.run.folder import RunFolder
from grpo_trainer.run.health import Diverged, Health, StaleWeights
from grpo_trainer.run.progress import Progress
from grpo_trainer.run.state import HealthMemory, LoopState
from grpo_trainer.settings.schema import Settings
from grpo_trainer.train import train

FINE = {
    "frac_reward_zero_std": 0.5,
    "completions/clipped_ratio": 0.5,
    "sampling_logp_difference/mean": 1e-7,
    "finite": 1.0,
    "skipped_in_a_row": 0.0,
}


class Watched:
    """A `Health` of some settings and everything it says."""

    def __init__(self, folder: Path, *sets: str) -> None:
        given = load([], [f"run.dir={folder / 'run'}", *sets])
        self.shown = io.StringIO()
        self.folder = RunFolder(given, {})
        self.memory = HealthMemory()
        self.health = Health(given, self.folder, Progress(9, stream=self.shown), self.memory)
        self.warnings = self.memory.warnings
        self.steps = 0

    def step(self, **wrong: float) -> dict[str, float]:
        self.steps += 1
        return self.health.watch(self.steps, FINE | {name.replace("__", "/"): value for name, value in wrong.items()})


@pytest.mark.parametrize(
    ("wrong", "after", "text"),
    [
        (
            {"frac_reward_zero_std": 1.0},
            5,
            "for 5 steps all rewards within each group were equal, so nothing was learned",
        ),
        (
            {"completions__clipped_ratio": 1.0},
            1,
            "100% of the completions reached rollout.max_new_tokens=16",
        ),
        ({"completions__clipped_ratio": 0.6}, 1, "60% of the completions reached"),
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


def test_what_comes_and_goes_is_warned_of_a_few_times(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    for _ in range(9):
        watched.step(finite=0.5)
        watched.step()
    assert [warning.partition(":")[0] for warning in watched.warnings] == ["step 1", "step 3", "step 5"]
    assert ["not repeated" in warning for warning in watched.warnings] == [False, False, True]
    watched.step(completions__clipped_ratio=1.0)  # another thing
    assert len(watched.warnings) == 4


@pytest.mark.parametrize(
    ("step", "reward_B", "scored_B", "warned"),
    [(1, [0, 0], [True, True], True), (1, [0, 1], [True, True], False), (2, [0, 0], [True, True], False),
     (1, [0, 0], [False, False], False)],
)  # fmt: skip
def test_a_first_step_without_any_reward_shows_what_the_policy_wrote(
    tmp_path: Path, step: int, reward_B: list[float], scored_B: list[bool], warned: bool
) -> None:
    watched = Watched(tmp_path)
    scored: Any = SimpleNamespace(reward_BN=np.array(reward_B)[:, None], scored_B=np.array(scored_B))
    transcript: Any = SimpleNamespace(completions=("I think\x1b it is 7.", "no"))
    watched.health.check_rewards(step, scored, transcript)
    assert len(watched.warnings) == warned
    if warned:
        assert "I think\\x1b it is 7." in watched.warnings[0].replace("\\\\", "\\")
        assert "prompt.instruction" in watched.warnings[0]


@pytest.mark.parametrize(
    ("sets", "sizes", "words"),
    [
        ((), {}, None),
        (("rollout.top_p=0.9", "rollout.min_p=0.1"), {}, "rollout.top_p=0.9 and rollout.min_p=0.1 samples"),
        (("rollout.top_k=5",), {}, "loss.correction=truncate"),
        (("rollout.top_k=5", "loss.correction=truncate"), {}, None),
        (("optimizer.learning_rate=3e-4",), {"parameters": 10**9}, "optimizer.learning_rate=0.0003 is far from"),
        (("optimizer.learning_rate=1e-10",), {"parameters": 10**9}, "is far from what recipes use"),
        (("optimizer.learning_rate=1e-6",), {"parameters": 10**9}, None),
        (("optimizer.learning_rate=3e-5", "model.lora.rank=8"), {"parameters": 10**9}, None),
        (("optimizer.learning_rate=3e-7", "model.lora.rank=8"), {"parameters": 10**9}, "to train adapters"),
        (("optimizer.learning_rate=1e-2", "optimizer.name=sgd"), {"parameters": 10**9}, None),
        ((), {"dropped": 20}, "20 of 120 training problems are longer than data.max_prompt_length"),
        ((), {"dropped": 1}, None),
    ],
)
def test_what_a_practitioner_would_warn_of(sets: tuple[str, ...], sizes: dict[str, int], words: str | None) -> None:
    found = list(cautions(load([], [*sets]), **{"parameters": 10**6, "kept": 100, "dropped": 0, **sizes}))
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


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
    crash = {"function": "own:f", "kind": "crash", "rows": [3, 4], "message": "crashed", "completion": "a"}
    watched.health.reward_failures(1, [crash, {**crash, "kind": "shape", "rows": []}])
    watched.health.reward_failures(1, [{**crash, "rows": []}])
    assert len(watched.warnings) == 2  # one of each kind
    assert "reward function 'own:f' crashed" in watched.shown.getvalue()
    counts = watched.step()
    assert counts["reward_failures/crash"] == 3
    assert counts["reward_failures/shape"] == 1
    assert watched.step()["reward_failures/crash"] == 0
    lines = (watched.folder.path / "reward_failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 1, 1]
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
    given = settings(toy_policy, folder, "optimizer.learning_rate=1e15", "loss.epochs=4", "checkpoint.every=2")
    with pytest.raises(Diverged, match=r"3 updates in a row up to step 1.*replay .*capsule-000001\.zip") as caught:
        train(given, TASK)
    assert str(folder / "checkpoints" / "step_1") in str(caught.value)
    return folder


def test_a_capsule_holds_the_step(diverged: Path) -> None:
    capsule, batch = read_capsule(diverged / "capsule-000001.zip")
    assert capsule.step == 1
    assert capsule.settings.run.dir == str(diverged)
    assert capsule.metrics["finite"] == 0.25
    assert capsule.metrics["skipped_in_a_row"] == 3
    assert "was skipped" in capsule.warnings[-1]
    assert {"jax", "grpo-loss", "python"} <= capsule.versions.keys()
    assert len(batch.advantage) == 16
    assert sorted(path.name for path in diverged.iterdir() if path.name.startswith(("capsule", "tmp"))) == [
        "capsule-000001.zip"
    ]


def test_a_replay_says_what_was_not_finite_and_where(diverged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main(TASK, [str(diverged / "capsule-000001.zip")]) == 0
    said = capsys.readouterr().out
    assert "on 1 x cpu" in said
    assert "update 1: log-probability: " in said
    assert "loss of micro-batch 1 of " in said
    assert "gradient embed: " in said
    assert "the update is refused" in said
    assert "parameters are not the capsule's" not in said


def test_the_cause_comes_before_its_consequences(toy_policy: Path, tmp_path: Path, diverged: Path) -> None:
    capsule, batch = read_capsule(diverged / "capsule-000001.zip")
    run = assemble(settings(toy_policy, tmp_path / "fine"), TASK, devices=jax.devices()[:1])
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
        replay.main(TASK, [str(tmp_path / "capsule.zip")])


def test_a_run_goes_on_past_failing_rewards(toy_policy: Path, tmp_path: Path) -> None:
    given = settings(toy_policy, tmp_path / "run", "steps=1", "reward.functions=[graders:rare]")
    assert train(given, TASK) == 0
    (line,) = (json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert line["reward_failures/exception"] == 1
    assert line["unscored"] == 1 / 16
    (record,) = (json.loads(text) for text in (tmp_path / "run" / "reward_failures.jsonl").read_text().splitlines())
    assert record["step"] == 1
    assert "ValueError: too rare" in record["message"]
    assert {"prompt", "completion", "answer"} <= record.keys()


def test_too_many_failing_rewards_stop_the_run(toy_policy: Path, tmp_path: Path) -> None:
    sets = ("steps=1", "reward.functions=[graders:rare]", "reward.max_unscored=0.01")
    with pytest.raises(RewardError, match=r"1 of 16 did.*'graders:rare' raised ValueError: too rare"):
        train(settings(toy_policy, tmp_path / "run", *sets), TASK)
    assert (tmp_path / "run" / "reward_failures.jsonl").is_file()
    assert "too rare" in (tmp_path / "run" / "error.txt").read_text()


IDENTITY = {"parameters": "ab"}
NOW = {"grpo-loss": "0.1.3", "jax": "0.10.2", "optax": "0.2.8"}
ZERO = jax.numpy.zeros((), jax.numpy.int32)


def loop(step: int, params: Any) -> LoopState:
    """The state of a run after this step, with these parameters and no optimizer."""
    return LoopState(TrainState(params, (), ZERO, ZERO + 0), step=step)


def checkpoints(folder: Path, versions: Mapping[str, str] = NOW, **options: Any) -> Checkpoints:
    return Checkpoints(folder, keep=9, versions=versions, **options)


def saved(folder: Path, *steps: int) -> TrainState:
    """Write a checkpoint of each step, whose parameters are the step; return what they are read like."""
    kept = checkpoints(folder)
    for step in steps:
        kept.save(loop(step, {"w": jax.numpy.full(2, step)}), IDENTITY, Settings())
    kept.close()
    return loop(0, {"w": jax.numpy.zeros(2, jax.numpy.int32)}).train


def test_what_the_loop_carries_survives_json() -> None:
    train_state = loop(7, {"w": jax.numpy.arange(3.0)}).train
    memory = HealthMemory(warnings=["step 2: hot"], streak={"gap": 3}, given={"gap": 1}, skipped=2)
    before = LoopState(
        train_state,
        step=7,
        problems={"next_index": 28},
        accuracy={"before": {"correct": 3, "total": 8}},
        seconds=12.5,
        phases={"rollout": 3.25, "update": 4.5},
        health=memory,
    )
    after = LoopState.from_notes(train_state, json.loads(json.dumps(before.notes())))
    assert after == before
    assert after.train is train_state
    assert after.health is not memory
    assert {item.name for item in fields(LoopState)} - {"train"} == before.notes().keys()  # nothing is left behind


def test_a_checkpoint_holds_the_loops_notes(tmp_path: Path) -> None:
    state = saved(tmp_path)
    kept = checkpoints(tmp_path)
    before = loop(3, {"w": jax.numpy.full(2, 3)})
    before.health.warnings.append("step 1: cold")
    kept.save(before, IDENTITY, Settings(steps=9))
    before.health.warnings.append("step 4: too late for the checkpoint of step 3")
    kept.wait()
    restored = kept.restore(state, IDENTITY)
    assert restored is not None
    after = LoopState.from_notes(restored.state, restored.notes)
    assert (after.step, after.health.warnings) == (3, ["step 1: cold"])
    assert restored.settings["steps"] == 9


def test_checkpoints_of_incompatible_libraries(tmp_path: Path) -> None:
    state = saved(tmp_path, 3)
    near, far = NOW | {"grpo-loss": "0.1.9", "jax": "0.11.0"}, NOW | {"grpo-loss": "0.2.0"}
    assert checkpoints(tmp_path, near).restore(state, IDENTITY) is not None
    with pytest.raises(ResumeRefused, match=r"grpo-loss: checkpoint 0\.1\.3, here 0\.2\.0.*\n.*any_version=true"):
        checkpoints(tmp_path, far).restore(state, IDENTITY)
    forced = checkpoints(tmp_path, far, any_version=True).restore(state, IDENTITY)
    assert forced is not None
    assert forced.step == 3


def test_one_checkpoint_and_no_other(tmp_path: Path) -> None:
    state = saved(tmp_path, 1, 2)
    first = checkpoints(tmp_path).restore(state, IDENTITY, at=1)
    assert first is not None
    assert first.state.params["w"].tolist() == [1, 1]
    assert checkpoints(tmp_path).restore(state, IDENTITY, at=7) is None


def test_what_one_process_cannot_read_all_step_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state = saved(tmp_path, 1, 2)
    # Process 1 of 2 reads the notes of step 2 but not its arrays; this one reads everything.
    others = iter([False, True, False, False])
    monkeypatch.setattr(checkpoint, "jax", SimpleNamespace(process_count=lambda: 2, tree=jax.tree))
    monkeypatch.setattr(
        "grpo_trainer.run.checkpoint.multihost_utils.process_allgather",
        lambda mine: np.asarray([mine, [next(others), False]]),
    )
    restored = checkpoints(tmp_path).restore(state, IDENTITY)
    assert restored is not None
    assert restored.step == 1
    assert restored.state.params["w"].tolist() == [1, 1]
    assert "step_2 is damaged (process 1 could not read its part)" in caplog.text
    assert list(others) == []
