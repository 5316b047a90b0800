"""The whole loop on a toy policy: it runs, measures, goes on where it stopped, and refuses what cannot work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from grpo_mesh import AXES, digest
from runs import assemble
from grpo_trainer.run.checkpoint import Checkpoints, ResumeRefused
from grpo_trainer.settings.errors import ConfigError
from runs import load
from grpo_trainer.settings.schema import Settings
from runs import train


def settings(policy: Path, folder: Path, *more: str) -> Settings:
    return load(
        [],
        [
            f"model.path={policy}",
            f"run.dir={folder}",
            "steps=4",
            "data.train_size=40",
            "rollout.prompts=4",
            "rollout.group_size=4",
            "rollout.max_new_tokens=16",
            "loss.rows=4",
            "eval.problems=8",
            "eval.every=2",
            "checkpoint.every=2",
            "log.tensorboard=false",
            "mesh=dp:-1",
            "reward.functions=[graders:digits]",
            *more,
        ],
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock wrote, and what else a process counts for itself."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    own = ("time", "seconds", "compiled")
    return [{k: v for k, v in line.items() if not k.startswith(own) and "per_second" not in k} for line in lines]


def last_state_digest(config: Settings, folder: Path) -> str:
    run = assemble(config)
    restored = Checkpoints(folder / "checkpoints", keep=9).restore(run.state, run.identity)
    assert restored is not None
    return digest(restored.state)


@pytest.fixture(scope="module")
def uninterrupted(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert train(settings(toy_policy, folder)) == 0
    return folder


def test_a_run_leaves_what_it_promises(uninterrupted: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "completions.jsonl", "summary.json", "report.html", "checkpoints"} <= {
        path.name for path in uninterrupted.iterdir()
    }
    lines = metrics(uninterrupted)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines[1:]:
        assert line["grad_norm"] > 0
        assert line["finite"] == 1
        assert line["importance_ratio/max"] == 1  # one update a rollout: the policy that drew is the one that learns
        assert line["sampling_logp_difference/max"] < 1e-5
    assert "eval/accuracy" in lines[2]
    assert "eval/accuracy" not in lines[3]
    summary = json.loads((uninterrupted / "summary.json").read_text())
    assert summary["problems_before"] == summary["problems_after"] == 8
    assert summary["accuracy_before_interval"][0] <= summary["accuracy_before"]


def test_the_policy_learns_what_is_rewarded(toy_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "learns"
    quiet = ("eval.before=false", "eval.after=false", "eval.every=0", "checkpoint.every=0", "log.completions=0")
    assert train(settings(toy_policy, folder, "steps=30", "optimizer.learning_rate=2e-2", *quiet)) == 0
    rewards = [line["reward"] for line in metrics(folder)]
    assert np.mean(rewards[-5:]) > 3 * np.mean(rewards[:5])


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "torn"
    config = settings(toy_policy, folder)

    class Killed(BaseException):
        pass

    def dies(run: Any, state: Any, batch: Any, step: int) -> Any:
        if step == 2:
            raise Killed
        return learn(run, state, batch, step)

    from grpo_trainer import train as module
    from grpo_trainer.learn import learn

    with monkeypatch.context() as patched:
        patched.setattr(module, "learn", dies)
        with pytest.raises(Killed):
            train(config)
    assert [line["step"] for line in metrics(folder)] == [0, 1, 2]
    assert train(config) == 0
    assert metrics(folder) == metrics(uninterrupted)
    assert last_state_digest(config, folder) == last_state_digest(settings(toy_policy, uninterrupted), uninterrupted)


def test_another_policy_may_not_go_on_from_a_checkpoint(toy_policy: Path, uninterrupted: Path) -> None:
    run = assemble(settings(toy_policy, uninterrupted))
    other = {**run.identity, "parameters": "0" * 64}
    with pytest.raises(ResumeRefused, match="parameters"):
        Checkpoints(uninterrupted / "checkpoints", keep=9).restore(run.state, other)


def test_a_run_goes_on_with_corrected_problems_where_that_is_asked_for(
    toy_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(8)]

    def write(split: str, **other: str) -> None:
        text = "".join(json.dumps(line | (other if n == 0 else {})) + "\n" for n, line in enumerate(lines))
        (tmp_path / f"{split}.jsonl").write_text(text)

    def go(*sets: str) -> int:
        return train(settings(toy_policy, tmp_path / "run", f"data.source={tmp_path}", "data.train_size=0", *sets))

    write("train")
    write("test", question="What is 9 + 9?", answer="#### 18")
    assert go("steps=2") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    write("train", answer="It is 1.\n#### 1")
    write("test", question="What is 8 + 8?", answer="#### 16")
    with pytest.raises(ResumeRefused, match=r"held_out: .*\n.*problems: .*\n.*any_data=true: step 3 then takes"):
        go()
    assert go("checkpoint.any_data=true") == 0
    assert "was made on other problems" in caplog.text
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [0, 1, 2, 3, 4]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["accuracy_before"], summary["problems_after"]) == (None, 8)
    assert go("steps=5") == 0  # what was saved meanwhile is of the problems of now


def test_the_state_makes_room_for_the_one_that_is_read(toy_policy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    run = assemble(settings(toy_policy, uninterrupted))
    assert Checkpoints(tmp_path / "none", keep=9).restore(run.state, run.identity, donate=True) is None
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))
    restored = Checkpoints(uninterrupted / "checkpoints", keep=9).restore(run.state, run.identity, donate=True)
    assert restored is not None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(restored.state))


def test_a_damaged_checkpoint_is_stepped_over(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted / "checkpoints", copy)
    newest = max(copy.iterdir(), key=lambda path: int(path.name.removeprefix("step_")) if path.is_dir() else -1)
    largest = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    run = assemble(settings(toy_policy, uninterrupted))
    restored = Checkpoints(copy, keep=9).restore(run.state, run.identity)
    assert restored is not None
    assert restored.step == 2
    assert newest.name in caplog.text


def test_kl_and_several_updates_a_rollout(toy_policy: Path, tmp_path: Path) -> None:
    config = settings(
        toy_policy,
        tmp_path / "kl",
        "steps=2",
        "loss.kl_coefficient=0.1",
        "loss.reference=initial",
        "loss.epochs=2",
        "loss.minibatches=2",
        "eval.before=false",
        "eval.every=0",
        "optimizer.learning_rate=1e-2",
    )
    assert train(config) == 0
    first, second = metrics(tmp_path / "kl")
    assert first["kl"] > 0  # the second of four updates has moved
    assert second["kl"] > 0
    assert first["importance_ratio/max"] > 1


def test_dry_run_samples_nothing(toy_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(settings(toy_policy, tmp_path / "dry"), dry_run=True) == 0
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_rows_that_do_not_divide_over_devices_are_refused(
    toy_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_devices(*_: Any) -> AbstractMesh:
        return AbstractMesh((3, 1, 1), AXES)

    monkeypatch.setattr("grpo_trainer.assemble.run.make_mesh", three_devices)
    with pytest.raises(ConfigError, match=r"loss\.rows must be a multiple of dp·fsdp = 3 .* got 4\. Use 6"):
        assemble(settings(toy_policy, tmp_path / "rows"))


def test_the_data_order_does_not_depend_on_interruptions(toy_policy: Path, tmp_path: Path) -> None:
    run = assemble(settings(toy_policy, tmp_path / "order"))
    stream = run.problems
    seen = [next(stream).prompts.prompt_id_P for _ in range(10)]
    assert sorted(np.concatenate(seen)) == list(range(40))
