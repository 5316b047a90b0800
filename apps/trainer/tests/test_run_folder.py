"""The run folder: each step once, one owner, and settings that cannot change unnoticed."""

import json
import math
import os
import re
import subprocess
import sys
import time
import types
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy import load

from grpo_trainer.evaluate.accuracy import Accuracy
from grpo_trainer.report.page import write_report
from grpo_trainer.run.files import name_steps, read_lines
from grpo_trainer.run.folder import RunFolder, versions
from grpo_trainer.settings.errors import ConfigError, RunFolderError

VERSIONS = {"python": "3.11.4", "grpo-loss": "0.3.0"}


@pytest.fixture
def config(tmp_path):
    def make(*sets: str):
        return load([], [f"run.dir={tmp_path / 'run'}", "log.tensorboard=false", *sets])

    return make


def steps(folder: RunFolder) -> list[int]:
    return [record["step"] for record in read_lines(folder.path / "metrics.jsonl")]


def test_a_run_leaves_its_settings_metrics_and_summary(config):
    with RunFolder(config(), VERSIONS) as folder:
        assert not folder.resumed
        folder.start(0)
        folder.log(0, {"eval/accuracy": 0.3})
        numbers = {"reward": np.float32(0.5), "count": np.int64(3), "grad_norm": math.nan, "flag": True}
        folder.log(1, numbers)  # pyright: ignore[reportArgumentType] - what numpy and jax give in practice
        folder.completions(1, [{"prompt": "a", "completion": "\ud800é", "reward": 1.0}])
        folder.summary(
            steps=60,
            seconds=1.23456,
            device="cpu",
            accuracy={
                "before": {"correct": 30, "total": 100, "eval/format": 0.4},
                "after": {"correct": 60, "total": 100},
            },
            skipped=0,
        )
        assert folder.finished
    assert load([str(folder.path / "config.yaml")]) == config()
    first, second = read_lines(folder.path / "metrics.jsonl")
    assert first.items() >= {"step": 0, "eval/accuracy": 0.3}.items()
    assert second.items() >= {"step": 1, "reward": 0.5, "count": 3, "grad_norm": None, "flag": 1}.items()
    summary = json.loads((folder.path / "summary.json").read_text())
    assert summary["accuracy_before"] == 0.3
    assert summary["accuracy_after_interval"] == [round(b, 6) for b in Accuracy(60, 100).interval]
    assert summary["format_before"] == 0.4
    assert summary["seconds"] == 1.235
    assert summary["versions"] == VERSIONS
    (record,) = read_lines(folder.path / "completions.jsonl")
    assert record["completion"].endswith("é")


def test_a_resumed_run_has_each_step_once(config):
    with RunFolder(config(), VERSIONS) as folder:
        folder.start(0)
        for step in range(8):
            folder.log(step, {"reward": step / 3})
            folder.completions(step, [{"completion": str(step)}])
    before = (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    with (folder.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 8, "rew')  # killed in the middle of a line
    with RunFolder(config(), VERSIONS) as folder:
        assert folder.resumed
        folder.start(5)
        assert (folder.path / "metrics.jsonl").read_bytes().splitlines(keepends=True) == before[:6]
        folder.log(6, {"reward": 0.0})
    assert steps(folder) == [0, 1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in read_lines(folder.path / "completions.jsonl")] == [0, 1, 2, 3, 4, 5]


def test_starting_from_nothing_starts_afresh(config):
    for _ in range(2):
        with RunFolder(config(), VERSIONS) as folder:
            folder.start(0)
            folder.log(0, {"eval/accuracy": 0.1})
            folder.log(1, {"reward": 0.1})
            assert steps(folder) == [0, 1]


def events_of(run: Path) -> list[Any]:
    """TensorBoard's events of a run, file by file."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    events = []
    for file in sorted((run / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # length (8 bytes), its checksum (4), the event, its checksum (4)
            size = int.from_bytes(data[:8], "little")
            events.append(event_pb2.Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return events


def test_tensorboard_events_are_purged_on_resume(config, tmp_path):
    for first in (0, 2):
        with RunFolder(config("log.tensorboard=true"), VERSIONS) as folder:
            folder.start(first)
            for step in range(first + 1, first + 4):
                folder.log(step, {"reward": step})
    events = events_of(tmp_path / "run")
    assert [event.step for event in events if event.summary.value] == [1, 2, 3, 3, 4, 5]
    # TensorBoard drops what came before a session start at or after its step.
    assert [event.step for event in events if event.HasField("session_log")] == [3]


def test_tensorboard_events_survive_a_clock_that_is_set(config, tmp_path, monkeypatch):
    """A thread that waits until some time of day waits for decades, or dies."""
    hours, clock = iter([24 * 366 * 40, -24 * 366 * 40, 1]), time.time
    with RunFolder(config("log.tensorboard=true"), VERSIONS) as folder:
        folder.start(0)
        for step, by in enumerate(hours, 1):
            monkeypatch.setattr(time, "time", lambda by=by: clock() + 3600 * by)
            folder.log(step, {"reward": step, "entropy": 0.5})
            # In the file at once.
            assert [event.step for event in events_of(tmp_path / "run") if event.summary.value][-1] == step
    values = [{value.tag: value.simple_value for value in event.summary.value} for event in events_of(tmp_path / "run")]
    assert [value for value in values if value] == [{"reward": step, "entropy": 0.5} for step in (1, 2, 3)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_tensorboard_on_a_full_disk_ends_the_run_in_a_sentence(config, tmp_path):
    with RunFolder(config("log.tensorboard=true"), VERSIONS) as folder:
        folder.start(0)
        folder.log(1, {"reward": 1})
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, folder._tensorboard._file)
        os.close(full)
        with pytest.raises(RunFolderError, match=r"cannot be written: .*No space left"):
            folder.log(2, {"reward": 2})
    assert [event.step for event in events_of(tmp_path / "run") if event.summary.value] == [1]


def test_other_settings_are_refused(config):
    with RunFolder(config(), VERSIONS):
        pass
    with pytest.raises(ConfigError, match=r"rollout.prompts: 4 there, 8 now"):
        RunFolder(config("rollout.prompts=8"), VERSIONS)
    with pytest.raises(ConfigError, match="steps: 60 there, 30 now"):
        RunFolder(config("steps=30"), VERSIONS)
    for free in ("log.completions=0", "checkpoint.every=7", "cpu_devices=2", "mesh=dp:2", "steps=100"):
        with RunFolder(config(free, "steps=100"), VERSIONS) as folder:
            assert folder.resumed


def test_a_longer_run_keeps_its_schedule(config):
    with RunFolder(config("optimizer.schedule=cosine"), VERSIONS) as folder:
        assert folder.settings.optimizer.decay_steps == 60
    with RunFolder(config("optimizer.schedule=cosine", "steps=100"), VERSIONS) as folder:
        assert (folder.settings.steps, folder.settings.optimizer.decay_steps) == (100, 60)
    with pytest.raises(ConfigError, match=r"optimizer\.decay_steps: 60 there, 90 now"):
        RunFolder(config("optimizer.schedule=cosine", "steps=100", "optimizer.decay_steps=90"), VERSIONS)


def test_a_longer_run_is_not_finished(config):
    with RunFolder(config(), VERSIONS) as folder:
        folder.summary(steps=60, seconds=1, device="cpu")
    with RunFolder(config(), VERSIONS) as folder:
        assert folder.finished
    with RunFolder(config("steps=61"), VERSIONS) as folder:
        assert not folder.finished


def test_a_folder_in_use_is_refused(config, tmp_path):
    with RunFolder(config(), VERSIONS):
        with pytest.raises(RunFolderError, match=f"process {os.getpid()}"):
            RunFolder(config(), VERSIONS)
        # A process that is not the writer takes no part in this.
        RunFolder(config(), VERSIONS, writer=False, processes=2).close()
    RunFolder(config(), VERSIONS).close()


def test_a_killed_process_gives_its_folder_back(config, tmp_path):
    script = (
        "import os, sys\nfrom grpo_trainer.run.folder import RunFolder\nfrom toy import load\n"
        "RunFolder(load([], ['run.dir=' + sys.argv[1]]), {})\nos.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    assert subprocess.run(command, check=False, cwd=Path(__file__).parent).returncode == -9
    with RunFolder(config(), VERSIONS) as folder:
        assert folder.resumed


def test_processes_that_do_not_write_write_nothing(config):
    with RunFolder(config(), VERSIONS, writer=False, processes=2) as folder:
        folder.start(0)
        folder.log(1, {"reward": 1.0})
        folder.completions(1, [{"completion": "x"}])
        folder.summary(steps=60, seconds=1, device="cpu")
    assert not folder.path.exists()


def test_auto_resumes_what_is_unfinished(tmp_path):
    config = load([], ["log.tensorboard=false"])
    with RunFolder(config, VERSIONS, root=tmp_path) as first:
        first.start(0)
        # In use: the second run of the same settings gets a folder of its own.
        with RunFolder(config, VERSIONS, root=tmp_path) as second:
            assert second.path != first.path
            second.summary(steps=60, seconds=1, device="cpu")
    with RunFolder(load([], ["log.tensorboard=false", "seed=1"]), VERSIONS, root=tmp_path) as other:
        assert not other.resumed
    with RunFolder(config, VERSIONS, root=tmp_path) as again:
        assert again.resumed
        assert again.path == first.path
    with pytest.raises(ConfigError, match="all 2 processes"):
        RunFolder(config, VERSIONS, root=tmp_path, processes=2)


def test_errors_are_kept_with_the_run(config):
    with pytest.raises(ZeroDivisionError) as caught, RunFolder(config(), VERSIONS) as folder:
        raise ZeroDivisionError("the sum of nothing")
    assert "the sum of nothing" in (folder.path / "error.txt").read_text()
    assert str(folder.path / "error.txt") in caught.value.__notes__[0]
    with RunFolder(config(), VERSIONS):
        assert not (folder.path / "error.txt").exists()


def test_unwritable_places_are_named(config, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunFolderError, match="cannot be written"):
        RunFolder(config(), VERSIONS)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_that_says_so(config):
    with RunFolder(config(), VERSIONS) as folder:
        folder.start(0)
        (folder.path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(RunFolderError, match="No space left"):
            folder.log(1, {"reward": 1.0})


def fill(folder: RunFolder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        folder.log(step, {"reward": step / 8})
        if step:
            folder.completions(
                step, [{"prompt": "1 + 1?", "completion": str(step), "reward": 1.0, "rewards": {"a": 1}}]
            )


DAMAGED = ["nonsense", "[1]", '{"reward": 1}', '{"step": null}', '{"step": 1e999}', "[" * 100_000, "\0" * 9, "9" * 5000]


@pytest.mark.parametrize("line", [*DAMAGED, '{"step": 2, "reward": "x"}', '{"step": 2, "reward": 1%s}' % ("0" * 400)])
def test_a_damaged_line_of_metrics_is_left_out_and_its_step_is_named(config, caplog, line):
    with RunFolder(config(), VERSIONS) as folder:
        folder.start(0)
        fill(folder, 0, 3)
        file = folder.path / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join([*lines[:2], line + "\n", lines[3]]))
        damaged = file.read_bytes()
        (note,) = folder.start(3)
        assert note == "metrics.jsonl has no record of step 2: lost. The summary and the report will say so"
        assert steps(folder) == [0, 1, 3]
        assert (folder.path / "damaged" / "metrics.jsonl").read_bytes() == damaged
        assert "metrics.jsonl: 1 lines are not records of a run; the file as it was is kept as" in caplog.text
        assert folder.summary(steps=3, seconds=1, device="cpu")["missing_records"] == {"metrics.jsonl": "step 2"}
        assert "lost from metrics.jsonl step 2" in " ".join(
            re.sub("<.*?>", " ", write_report(folder.path).read_text()).split()
        )


@pytest.mark.parametrize("line", [*DAMAGED, '{"step": 2, "completion": 3}', '{"step": 2, "rewards": [1]}'])
def test_a_damaged_line_of_completions_is_left_out_and_its_step_is_named(config, line):
    with RunFolder(config(), VERSIONS) as folder:
        folder.start(0)
        fill(folder, 0, 2)
        file = folder.path / "completions.jsonl"
        file.write_text(file.read_text().splitlines(keepends=True)[0] + line + "\n")
        write_report(folder.path)
        assert folder.start(2) == [
            "completions.jsonl has no record of step 2: lost. The summary and the report will say so"
        ]


@pytest.mark.parametrize("cut", ["half", "all", "gone"])
def test_records_that_a_checkpoint_covers_and_a_file_does_not_are_named(config, cut):
    with RunFolder(config(), VERSIONS) as folder:
        folder.start(0)
        fill(folder, 0, 6)
        file = folder.path / "metrics.jsonl"
        os.truncate(file, file.stat().st_size - 50 if cut == "half" else 0)
        if cut == "gone":
            file.unlink()
        (note,) = folder.start(6)
        assert f"metrics.jsonl has no record of step{' 6' if cut == 'half' else 's 0 to 6'}: lost" in note
        fill(folder, 7, 8)
        summary = folder.summary(steps=8, seconds=1, device="cpu")
        assert summary["missing_records"] == {"metrics.jsonl": "step 6" if cut == "half" else "steps 0 to 6"}


def test_nothing_is_missing_from_a_whole_history(config):
    with RunFolder(config(), VERSIONS) as folder:
        assert folder.start(0) == []
        fill(folder, 0, 3)
        assert folder.start(3) == []
        assert "missing_records" not in folder.summary(steps=3, seconds=1, device="cpu")


@pytest.mark.parametrize(
    ("last", "every", "step", "finished", "kept"),
    # Saved at 2, 4 and 6, each complete once the next is begun: at step 7, that of 4 must be there.
    [
        (7, 2, 4, False, False),
        (7, 2, 2, False, True),
        (3, 2, 0, False, False),
        (5, 0, 0, False, False),
        (5, 0, 0, True, True),
    ],
)
def test_steps_are_done_again_aloud_and_a_lost_history_is_kept(config, last, every, step, finished, kept):
    with RunFolder(config(f"checkpoint.every={every}", "log.completions=0"), VERSIONS) as folder:
        folder.start(0)
        fill(folder, 0, last)
        old = (folder.path / "metrics.jsonl").read_bytes()
        if finished:
            folder.summary(steps=last, seconds=1, device="cpu")
        (note,) = folder.start(step)
        assert note.startswith(f"metrics.jsonl goes up to step {last} and the newest checkpoint to step {step}")
        assert f"{'steps' if last > step + 1 else 'step'} {step + 1} to {last} will be done again" in note
        assert ("later checkpoints are gone" in note) == kept
        assert (folder.path / "damaged").exists() == kept
        if kept:
            assert (folder.path / "damaged" / "metrics.jsonl").read_bytes() == old


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "3", "", '{"steps": "x"}', '{"steps": 60, "seconds": 1, "device": "cpu", "accuracy_after": "all"}'],
)
def test_a_damaged_summary_is_named_and_written_anew(config, caplog, text):
    with RunFolder(config(), VERSIONS) as folder:
        (folder.path / "summary.json").write_text(text)
        assert not folder.finished
        assert "summary.json is damaged" in caplog.text
        folder.summary(steps=60, seconds=1, device="cpu")
        assert folder.finished


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_history_that_cannot_be_read_now_is_not_damaged(config):
    with RunFolder(config(), VERSIONS) as folder:
        fill(folder, 0, 3)
        (folder.path / "metrics.jsonl").chmod(0)
        with pytest.raises(RunFolderError, match="cannot be read now"):
            folder.start(3)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda lock, other: lock.symlink_to(other), id="link"),
        pytest.param(lambda lock, other: lock.symlink_to(other / "nowhere"), id="broken link"),
        pytest.param(lambda lock, other: os.mkfifo(lock), id="pipe"),
        pytest.param(lambda lock, other: lock.mkdir(), id="folder"),
    ],
)
def test_only_a_plain_file_is_locked(config, tmp_path, make):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "run").mkdir()
    make(tmp_path / "run" / "lock", tmp_path / "mine")
    with pytest.raises(RunFolderError, match=r"run/lock must be a plain file, .*: remove it"):
        RunFolder(config(), VERSIONS)
    assert (tmp_path / "mine").read_text() == "precious"


@pytest.mark.parametrize(
    ("given", "text"), [([3], "step 3"), ([1, 2], "steps 1 to 2"), ([9, 1, 2, 3, 7], "steps 1 to 3, 7, 9")]
)
def test_steps_in_words(given, text):
    assert name_steps(given) == text


def test_damaged_settings_are_named(config):
    with RunFolder(config(), VERSIONS) as folder:
        pass
    (folder.path / "config.yaml").write_text("stepps: 3\n")
    with pytest.raises(RunFolderError, match=r"config\.yaml"):
        RunFolder(config(), VERSIONS)
    (folder.path / "config.yaml").unlink()
    RunFolder(config(), VERSIONS).close()  # and the refused one left no lock behind


def test_wandb_is_optional(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        RunFolder(config("log.wandb=true"), VERSIONS) as folder,
        pytest.raises(ConfigError, match=r"grpo-trainer\[wandb\]"),
    ):
        folder.start(0)


def test_wandb_gets_metrics_and_the_same_run_after_a_resume(config, monkeypatch):
    started, logged = [], []
    run = types.SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: logged.append("finished"), summary={}
    )
    module = types.ModuleType("wandb")
    module.init = lambda **options: started.append(options) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for first in (0, 1):
        with RunFolder(config("log.wandb=true"), VERSIONS) as folder:
            folder.start(first)
            folder.log(first + 1, {"reward": 1.0, "kl": math.inf})
            folder.summary(steps=first, seconds=1, device="cpu")
    assert logged == [(1, {"reward": 1.0}), "finished", (2, {"reward": 1.0}), "finished"]
    assert started[0]["id"] == started[1]["id"]
    assert run.summary["device"] == "cpu"


@pytest.mark.parametrize("app", ["grpo-trainer", "grpo-of-nobody"])
def test_versions_of_everything_that_decides_a_result(app):
    found = versions(app)
    assert found["grpo-loss"] == metadata.version("grpo-loss")
    assert {"python", "jax", "jaxlib", "numpy", "optax", "grpo-trainer", "grpo-sampler"} <= found.keys()
    assert "grpo-of-nobody" not in found  # a task in a script of one's own


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # scipy.stats.binomtest(correct, total).proportion_ci(method="wilson")
    [
        (0, 10, 0.0, 0.2775328),
        (10, 10, 0.7224672, 1.0),
        (30, 100, 0.2189489, 0.3958485),
        (500, 1000, 0.4690696, 0.5309304),
    ],
)
def test_wilson_intervals(correct, total, low, high):
    assert Accuracy(correct, total).interval == pytest.approx((low, high), abs=1e-7)


@pytest.mark.parametrize(("correct", "total"), [(-1, 3), (4, 3), (0, 0)])
def test_accuracy_of_nothing(correct, total):
    with pytest.raises(ValueError, match="correct <= total"):
        Accuracy(correct, total)


@pytest.mark.parametrize(
    ("reason", "expected", "words"),
    [
        (None, RunFolderError, "cannot be written: .*No space"),
        (ValueError("the checkpoint could not be written"), ValueError, "the checkpoint"),
    ],
)
def test_a_logger_that_cannot_be_closed_hides_nothing(config, monkeypatch, reason, expected, words):
    def run():
        with RunFolder(config("log.tensorboard=true"), VERSIONS) as folder:
            folder.start(0)
            close = folder._tensorboard.close

            def fail():
                close()
                raise OSError(28, "No space left on device")

            monkeypatch.setattr(folder._tensorboard, "close", fail)
            if reason is not None:
                raise reason

    with pytest.raises(expected, match=words):
        run()
    RunFolder(config(), VERSIONS).close()  # the lock was let go
