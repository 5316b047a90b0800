"""The whole loop on a toy policy: it runs, measures, goes on where it stopped, and refuses what cannot work."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from toy import TASK, metrics, settings

from grpo_mesh import AXES, digest
from grpo_sampler import load_pretrained
from grpo_trainer import cli
from grpo_trainer.assemble import assemble
from grpo_trainer.evaluate.command import evaluate_command
from grpo_trainer.evaluate.records import read_records
from grpo_trainer.report.export import ExportError
from grpo_trainer.run.checkpoint import CheckpointError, Checkpoints, ResumeRefused
from grpo_trainer.run.folder import versions
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.schema import Settings
from grpo_trainer.train import fit, train

MEASURED = ("steps=4", "eval.before=true", "eval.after=true", "eval.every=2", "checkpoint.every=2")


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, keep=9, versions=versions("grpo-toy"))


def last_state_digest(given: Settings, folder: Path) -> str:
    run = assemble(given, TASK)
    restored = checkpoints(folder / "checkpoints").restore(run.state, run.identity)
    assert restored is not None
    return digest(restored.state)


@pytest.fixture(scope="module")
def uninterrupted(toy_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "whole"
    assert train(settings(toy_policy, folder, *MEASURED), TASK) == 0
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
    sets = ("steps=30", "optimizer.learning_rate=2e-2", "log.completions=0")
    assert train(settings(toy_policy, folder, *sets), TASK) == 0
    rewards = [line["reward"] for line in metrics(folder)]
    assert np.mean(rewards[-5:]) > 3 * np.mean(rewards[:5])


@pytest.mark.parametrize("left", ["whole", "no report", "no summary", "cut"])
def test_a_run_that_was_killed_at_its_end_leaves_all_of_it(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], left: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    if left != "whole":
        (folder / "report.html").unlink()
    if left == "no summary":
        (folder / "summary.json").unlink()
    if left == "cut":
        os.truncate(folder / "summary.json", 99)
        os.truncate(folder / "completions.jsonl", 99)
    assert train(settings(toy_policy, folder, *MEASURED), TASK) == 0
    assert (folder / "report.html").read_text().rstrip().endswith("</html>")
    summary, whole = (json.loads((path / "summary.json").read_text()) for path in (folder, uninterrupted))
    assert summary["state_digest"] == whole["state_digest"]
    assert metrics(folder) == metrics(uninterrupted)
    assert summary.get("missing_records") == ({"completions.jsonl": "steps 1 to 4"} if left == "cut" else None)
    assert ("has no record of steps 1 to 4" in capsys.readouterr().out) == (left == "cut")


def test_a_run_without_its_checkpoints_starts_again_and_says_so(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()
    assert train(settings(toy_policy, folder, *MEASURED), TASK) == 0
    assert "metrics.jsonl goes up to step 4 and the newest checkpoint to step 0" in capsys.readouterr().out
    assert metrics(folder) == metrics(uninterrupted)


def test_groups_without_signal_are_not_computed(toy_policy: Path, tmp_path: Path) -> None:
    sets = ("reward.functions=[sevens]", "steps=3", "rollout.prompts=2", "rollout.group_size=2", "loss.rows=2")
    assert train(settings(toy_policy, tmp_path / "idle", *sets), TASK) == 0
    lines = metrics(tmp_path / "idle")
    assert 1 in [line["packing/idle"] for line in lines]
    for line in lines:
        # Both groups have one length limit, so a share of groups is about one of tokens only where it is 0 or 1.
        assert (line["packing/idle"] == 1) == (line["frac_reward_zero_std"] == 1) == ("entropy" not in line)
        assert (line["packing/idle"] == 0) == (line["frac_reward_zero_std"] == 0)
        assert line["finite"] == 1
        assert line["denominator"] == line["tokens"]
        assert line["grad_norm"] > 0 or line["packing/idle"] == 1


def test_prompt_slots_fit_the_prompts_of_a_batch(toy_policy: Path, tmp_path: Path) -> None:
    def first_step(name: str, *sets: str) -> dict[str, Any]:
        assert train(settings(toy_policy, tmp_path / name, "steps=1", "data.max_prompt_length=96", *sets), TASK) == 0
        return metrics(tmp_path / name)[0]

    padded, fitted = first_step("padded"), first_step("fitted", "loss.prompt_sizes=6")
    assert fitted["packing/positions_per_token"] < padded["packing/positions_per_token"]
    for name in ("loss", "grad_norm", "entropy", "update_norm"):
        np.testing.assert_allclose(fitted[name], padded[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_sizes_of_micro_batches_change_nothing_but_the_padding(toy_policy: Path, tmp_path: Path) -> None:
    def steps(name: str, *sets: str) -> list[dict[str, Any]]:
        few = ("steps=2", "data.max_prompt_length=96", "loss.rows=4", "eval.before=false", "eval.after=false")
        assert train(settings(toy_policy, tmp_path / name, *few, *sets), TASK) == 0
        return metrics(tmp_path / name)

    one, several = steps("one"), steps("several", "loss.sizes=3")
    for before, after in zip(one, several, strict=True):
        assert after["packing/positions_per_token"] < before["packing/positions_per_token"]
        for name in ("rows", "prompts", "head"):
            assert after[f"packing/positions_per_token/{name}"] >= 1
        for name in ("loss", "grad_norm", "entropy", "update_norm"):
            np.testing.assert_allclose(after[name], before[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_logits_in_other_chunks_are_the_same_update(toy_policy: Path, tmp_path: Path) -> None:
    def first_step(name: str, *sets: str) -> dict[str, Any]:
        assert train(settings(toy_policy, tmp_path / name, "steps=1", *sets), TASK) == 0
        return metrics(tmp_path / name)[0]

    whole, parts = first_step("whole", "loss.rows=32"), first_step("parts", "loss.rows=32", "loss.chunk=32")
    assert parts["packing/positions_per_token/head"] < whole["packing/positions_per_token/head"]
    for name in ("loss", "grad_norm", "entropy", "update_norm"):
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_kl_term_learns_from_every_group(toy_policy: Path, tmp_path: Path) -> None:
    sets = ("reward.functions=[sevens]", "loss.reference=initial", "loss.kl_coefficient=0.1", "steps=1")
    assert train(settings(toy_policy, tmp_path / "kl", *sets), TASK) == 0
    assert [line["packing/idle"] for line in metrics(tmp_path / "kl")] == [0]


class Killed(BaseException):
    """Not an error of the run's: it leaves as a kill does, without a word."""


def kill(given: Settings, *, step: int) -> None:
    """Run until the update of this step; what was being saved is saved."""
    run, left = assemble(given, TASK), [step]

    def update(state: Any, batch: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            raise Killed
        return run.plan.update(state, batch)

    kept = checkpoints(Path(given.run.dir) / "checkpoints")
    with pytest.raises(Killed):
        fit(replace(run, plan=replace(run.plan, update=update)), checkpoints=kept)
    kept.close()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    given = settings(toy_policy, folder, *MEASURED)
    kill(given, step=3)
    assert [line["step"] for line in metrics(folder)] == [0, 1, 2]
    assert train(given, TASK) == 0
    assert metrics(folder) == metrics(uninterrupted)
    assert (folder / "completions.jsonl").read_text() == (uninterrupted / "completions.jsonl").read_text()
    whole = settings(toy_policy, uninterrupted, *MEASURED)
    assert last_state_digest(given, folder) == last_state_digest(whole, uninterrupted)


def test_steps_after_the_last_checkpoint_are_done_again(toy_policy: Path, tmp_path: Path) -> None:
    """A kill two steps after the last checkpoint: the run goes back to it, and its lines with it."""
    folder = tmp_path / "torn"
    given = settings(toy_policy, folder, "steps=4", "checkpoint.every=2")
    kill(given, step=4)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    before = metrics(folder)
    assert train(given, TASK) == 0
    assert metrics(folder)[:3] == before
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]


def test_another_policy_may_not_go_on_from_a_checkpoint(toy_policy: Path, uninterrupted: Path) -> None:
    run = assemble(settings(toy_policy, uninterrupted, *MEASURED), TASK)
    other = {**run.identity, "parameters": "0" * 64}
    with pytest.raises(ResumeRefused, match="parameters"):
        checkpoints(uninterrupted / "checkpoints").restore(run.state, other)


def test_a_run_goes_on_with_corrected_problems_where_that_is_asked_for(
    toy_policy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"question": f"{n} + 1?", "answer": f"={n + 1}"} for n in range(8)]

    def write(split: str, **other: str) -> None:
        text = "".join(json.dumps(line | (other if n == 0 else {})) + "\n" for n, line in enumerate(lines))
        (tmp_path / f"{split}.jsonl").write_text(text)

    def go(*sets: str) -> int:
        own = (f"data.source={tmp_path}", "data.train_size=0")
        return train(settings(toy_policy, tmp_path / "run", *MEASURED, *own, *sets), TASK)

    write("train")
    write("test", question="9 + 9?", answer="=18")
    assert go("steps=2") == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    write("train", answer="one, =1")
    write("test", question="8 + 8?", answer="=16")
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
    run = assemble(settings(toy_policy, uninterrupted, *MEASURED), TASK)
    assert checkpoints(tmp_path / "none").restore(run.state, run.identity, donate=True) is None
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))
    restored = checkpoints(uninterrupted / "checkpoints").restore(run.state, run.identity, donate=True)
    assert restored is not None
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(run.state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(restored.state))


def test_a_damaged_checkpoint_is_stepped_over(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(uninterrupted / "checkpoints", copy)
    newest = max(copy.iterdir(), key=lambda path: int(path.name.removeprefix("step_")) if path.is_dir() else -1)
    largest = max((newest / "state").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else -1)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    run = assemble(settings(toy_policy, uninterrupted, *MEASURED), TASK)
    restored = checkpoints(copy).restore(run.state, run.identity)
    assert restored is not None
    assert restored.step == 2
    assert newest.name in caplog.text


def test_several_updates_a_rollout(toy_policy: Path, tmp_path: Path) -> None:
    kl = ("loss.kl_coefficient=0.1", "loss.reference=initial")
    several = ("loss.epochs=2", "loss.minibatches=2", "optimizer.learning_rate=1e-2")
    assert train(settings(toy_policy, tmp_path / "kl", *kl, *several), TASK) == 0
    first, second = metrics(tmp_path / "kl")
    assert first["kl"] > 0  # the second of four updates has moved
    assert second["kl"] > 0
    assert first["importance_ratio/max"] > 1


def test_evaluating_a_policy_and_a_run(
    toy_policy: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(toy_policy, tmp_path / "unused", *MEASURED)
    summary = json.loads((uninterrupted / "summary.json").read_text())
    for checkpoint, name, when in (
        (None, str(toy_policy), "before"),
        (uninterrupted, f"{uninterrupted} after step 4", "after"),
    ):
        assert evaluate_command(given, TASK, checkpoint=checkpoint) == 0
        line = capsys.readouterr().out.splitlines()[-1]
        correct = round(summary[f"accuracy_{when}"] * 8)
        assert line.startswith(f"{name}: held-out accuracy {summary[f'accuracy_{when}']:.1%}")
        assert f"{correct} of 8" in line
    with pytest.raises(CheckpointError, match="holds no checkpoint to evaluate"):
        evaluate_command(given, TASK, checkpoint=tmp_path)
    assert not (tmp_path / "unused").exists()


def test_a_run_is_measured_with_its_own_settings(
    uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(TASK, ["eval", "--checkpoint", str(uninterrupted)]) == 0
    assert " of 8)" in capsys.readouterr().out
    assert cli.main(TASK, ["eval", "--checkpoint", str(tmp_path / "typo")]) == 2
    assert "typo" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_exported_policy_is_the_runs(toy_policy: Path, uninterrupted: Path, tmp_path: Path) -> None:
    assert cli.main(TASK, ["export", str(uninterrupted), str(tmp_path / "policy")]) == 0
    given = settings(toy_policy, uninterrupted, *MEASURED)
    run = assemble(given, TASK)
    restored = checkpoints(uninterrupted / "checkpoints").restore(run.state, run.identity)
    assert restored is not None
    _, params = load_pretrained(tmp_path / "policy")
    assert digest(params) == digest(restored.state.params)
    assert cli.main(TASK, ["export", str(uninterrupted), str(tmp_path / "other"), "--step", "7"]) == 1
    # It can be trained on like any other policy.
    again = assemble(settings(tmp_path / "policy", tmp_path / "again"), TASK)
    assert again.identity["parameters"] == digest(restored.state.params)
    assert again.tokenizer.get_vocab() == run.tokenizer.get_vocab()


def test_a_run_exports_its_policy_at_its_end(toy_policy: Path, tmp_path: Path) -> None:
    target = tmp_path / "models" / "mine"
    sets = ("checkpoint.every=1", f"checkpoint.export={target}", "eval.before=true", "eval.after=true")
    assert train(settings(toy_policy, tmp_path / "run", "steps=1", *sets), TASK) == 0
    first = digest(load_pretrained(target)[1])
    card = (target / "README.md").read_text()
    for text in (
        "held-out accuracy before |",
        "held-out accuracy after, lenient |",
        "after against before, by problem |",
    ):
        assert text in card
    # With more steps the run exports again, in the place of its own export and of nothing else.
    assert train(settings(toy_policy, tmp_path / "run", "steps=2", *sets), TASK) == 0
    assert digest(load_pretrained(target)[1]) != first
    (target / "README.md").write_text("something of somebody")
    with pytest.raises(ExportError, match="must be an empty or a new folder"):
        train(settings(toy_policy, tmp_path / "run", "steps=3", *sets), TASK)
    assert (target / "README.md").read_text() == "something of somebody"


def test_records_of_a_run_say_what_was_won_and_lost(uninterrupted: Path) -> None:
    summary = json.loads((uninterrupted / "summary.json").read_text())
    before, after = (read_records(uninterrupted / "evaluations" / f"step_{step}.jsonl") for step in (0, 4))
    assert summary["paired"]["problems"] == len(before) == len(after) == 8
    for when, records in (("before", before), ("after", after)):
        assert sum(record.greedy.judgement.strict for record in records) == summary[f"accuracy_{when}"] * 8
    gain = summary["accuracy_after"] - summary["accuracy_before"]
    assert summary["paired"]["strict"]["mean"] == pytest.approx(gain, abs=1e-6)
    assert "difference, problem by problem" in (uninterrupted / "report.html").read_text()


def test_dry_run_samples_nothing(toy_policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(settings(toy_policy, tmp_path / "dry"), TASK, dry_run=True) == 0
    assert "dry run" in capsys.readouterr().out
    assert not (tmp_path / "dry").exists()


def test_rows_that_do_not_divide_over_devices_are_refused(
    toy_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def three_devices(*_: Any) -> AbstractMesh:
        return AbstractMesh((3, 1, 1), AXES)

    monkeypatch.setattr("grpo_trainer.assemble.run.make_mesh", three_devices)
    with pytest.raises(ConfigError, match=r"loss\.rows must be a multiple of dp·fsdp = 3 .* got 4\. Use 6"):
        assemble(settings(toy_policy, tmp_path / "rows"), TASK)


def test_the_data_order_does_not_depend_on_interruptions(toy_policy: Path, tmp_path: Path) -> None:
    run = assemble(settings(toy_policy, tmp_path / "order"), TASK)
    stream = run.problems
    seen = [next(stream).prompts.prompt_id_P for _ in range(10)]
    assert sorted(np.concatenate(seen)) == list(range(40))


def test_decoding_compiles_in_the_first_step_alone(toy_policy: Path, tmp_path: Path) -> None:
    counts = []
    for steps in (1, 3):
        folder = tmp_path / str(steps)
        assert train(settings(toy_policy, folder, f"steps={steps}"), TASK) == 0
        counts.append(json.loads((folder / "summary.json").read_text())["compiled_programs"])
    assert counts[0] == counts[1]
