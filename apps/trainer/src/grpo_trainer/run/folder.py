"""What a run leaves behind: its settings, one line of metrics a step, sampled completions, a summary.

Files only grow by whole lines, and a resumed run first cuts them back to the step it goes on from, so that every step
stands in them once however often the run was killed.
"""

import json
import math
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib import import_module, metadata
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo_trainer.evaluate.accuracy import Accuracy
from grpo_trainer.run.files import (
    cut_back,
    lock,
    missing_records,
    read_summary,
    replace,
    steps_done_again,
    writing,
)
from grpo_trainer.settings.changes import continued, differences
from grpo_trainer.settings.errors import ConfigError, RunFolderError
from grpo_trainer.settings.layers import dump, load_saved
from grpo_trainer.settings.schema import Settings

__all__ = ["RunFolder", "matched_settings", "summarize_accuracy", "versions"]


class RunFolder:
    """One run's folder, held by this process until it is closed; a context manager.

    An exception that leaves the `with` block is written to error.txt and noted on the exception.

    Args:
        settings: of the run; `run.dir=auto` continues the newest unfinished run of these settings under `root`, or
            starts one.
        versions: installed ones, for the summary.
        writer: False on all processes but the first of a many-process run: nothing is locked or written.
        processes: how many processes the run has; with more than one, run.dir must be named.
        root: where `auto` looks and starts.

    Raises:
        ConfigError: the folder holds a run with other settings, or run.dir=auto with several processes.
        RunFolderError: the folder is in use by a live process, cannot be written, or is damaged.
    """

    def __init__(
        self,
        settings: Settings,
        versions: Mapping[str, str],
        *,
        writer: bool = True,
        processes: int = 1,
        root: str | os.PathLike[str] = "runs",
    ) -> None:
        if settings.run.dir == "auto":
            if processes > 1:
                raise ConfigError(f"run.dir must name a folder that all {processes} processes see: got auto")
            self.path = _auto(settings, Path(root))
        else:
            self.path = Path(settings.run.dir).expanduser()
        self.settings, self._versions = settings, dict(versions)
        self._writer = writer
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._lock: int | None = None
        self.resumed = (self.path / "config.yaml").is_file()
        if not writer:
            return
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock = lock(self.path)
        try:
            if self.resumed:
                self.settings = _matched(self.path, settings)
            with writing(self.path):
                replace(self.path / "config.yaml", dump(self.settings))
                (self.path / "error.txt").unlink(missing_ok=True)
        except BaseException:
            self.close()
            raise

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.path / "checkpoints"

    def evaluation(self, step: int) -> Path:
        """File of the records of the evaluation after a step."""
        return self.path / "evaluations" / f"step_{step}.jsonl"

    @property
    def finished(self) -> bool:
        """Whether a summary says that the run reached its last step."""
        return read_summary(self.path).get("steps", 0) >= self.settings.steps

    def start(self, step: int, *, prompt: str = "") -> list[str]:
        """Go on after `step` (0: from the beginning): cut back what was written past it, open the loggers.

        Args:
            step: the last step that the restored checkpoint contains.
            prompt: one whole prompt as the model sees it, kept as prompt.txt.

        Returns:
            Sentences about steps that are done again, and about those whose records are lost.

        Raises:
            ConfigError: log.wandb is set and wandb is not installed.
            RunFolderError: the files cannot be written.
        """
        if not self._writer:
            return []
        with writing(self.path):
            notes = [*steps_done_again(self.path, self.settings, step)]
            for name in ("metrics.jsonl", "completions.jsonl", "reward_failures.jsonl"):
                cut_back(self.path / name, step)
            notes += [
                f"{file} has no record of {text}: lost. The summary and the report will say so"
                for file, text in missing_records(self.path, self.settings, step).items()
            ]
            (self.path / "summary.json").unlink(missing_ok=True)
            if prompt:
                replace(self.path / "prompt.txt", prompt)
            if self.settings.log.tensorboard:
                from grpo_trainer.report.events import Events  # half a second, which no other command needs

                self._tensorboard = Events(
                    self.path / "tensorboard",
                    suffix=f".{step}.{os.getpid()}",
                    purge=step + 1 if self.resumed else None,
                )
        if self.settings.log.wandb:
            self._wandb = _wandb(self.path, self.settings)
        return notes

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one step's metrics; call it before that step's checkpoint is saved, or a kill between loses the line.

        Args:
            step: 1 for the first step; 0 for what is measured before it.
            metrics: name -> number; a number that is not finite becomes null.
        """
        if not self._writer:
            return
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._append("metrics.jsonl", [{"step": step, "time": round(time.time(), 3), **numbers}])
        finite = {name: value for name, value in numbers.items() if value is not None}
        if self._tensorboard is not None:
            with writing(self.path):
                self._tensorboard.scalars(step, finite)
        if self._wandb is not None:
            self._wandb.log(finite, step=step)

    def completions(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Write sampled completions.

        Args:
            step: that sampled them.
            samples: each with `prompt`, `completion`, `reward`, and what else is known (`rewards`, `answer`, `finish`).
        """
        if self._writer and samples:
            self._append("completions.jsonl", [{"step": step, **sample} for sample in samples])

    def reward_failures(self, step: int, failures: Sequence[Mapping[str, Any]]) -> None:
        """Write what reward functions failed at.

        Args:
            step: whose completions they were.
            failures: each as `Rewards.score` reports it.
        """
        if self._writer and failures:
            self._append("reward_failures.jsonl", [{"step": step, **failure} for failure in failures])

    def summary(
        self,
        *,
        steps: int,
        seconds: float,
        device: str,
        accuracy: Mapping[str, Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write summary.json: the run is finished.

        Args:
            steps: done.
            seconds: of all of the run's processes, one after another.
            device: such as "2 x cpu".
            accuracy: evaluations named `before` and `after`, each with `correct` and `total` and what else it has to
                say (`eval/format` becomes `format_before`).
            more: further JSON values.

        Returns:
            What was written.
        """
        summary: dict[str, Any] = {"steps": steps, "seconds": round(seconds, 3), "device": device}
        summary |= summarize_accuracy(accuracy or {})
        if missing := missing_records(self.path, self.settings, steps):
            more["missing_records"] = missing
        summary |= {**more, "versions": self._versions}
        if self._writer:
            with writing(self.path):
                replace(self.path / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        if self._wandb is not None:
            self._wandb.summary.update(summary)
        return summary

    def close(self) -> None:
        """Flush the loggers and let other processes have the folder."""
        tensorboard, self._tensorboard = self._tensorboard, None
        try:
            if tensorboard is not None:
                with writing(self.path):
                    tensorboard.close()
            if self._wandb is not None:
                self._wandb.finish()
                self._wandb = None
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Nobody reads the output any more, as after `| head -1`: that is no failure of the run.
        if isinstance(error, Exception) and not isinstance(error, BrokenPipeError) and self._writer:
            file = self.path / "error.txt"
            try:
                file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
                error.add_note(f"full traceback: {file}")
            except OSError as failure:
                # The disk may be what failed; the error itself must still reach the user.
                error.add_note(f"(the traceback could not be saved: {failure})")
        try:
            self.close()
        except RunFolderError:
            if error is None:
                raise  # otherwise what ended the run must reach the user, and it was the same disk most likely

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        text = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
        with writing(self.path):
            descriptor = os.open(self.path / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                left = memoryview(text.encode("utf-8", "backslashreplace"))
                while left:
                    left = left[os.write(descriptor, left) :]
            finally:
                os.close(descriptor)


def summarize_accuracy(accuracy: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What summary.json says of the evaluations before and after.

    Args:
        accuracy: as of `RunFolder.summary`.
    """
    summary: dict[str, Any] = {}
    for name in ("before", "after"):
        record = dict(accuracy.get(name) or {})
        measured = Accuracy(record.pop("correct"), record.pop("total")) if record else None
        summary |= {f"{key.removeprefix('eval/')}_{name}": value for key, value in record.items()}
        summary[f"accuracy_{name}"] = measured and round(measured.share, 6)
        summary[f"accuracy_{name}_interval"] = measured and [round(bound, 6) for bound in measured.interval]
        summary[f"problems_{name}"] = measured and measured.total
    return summary


def matched_settings(settings: Settings, *, root: str | os.PathLike[str] = "runs") -> Settings:
    """The settings that a run goes on with, compared before anything heavy is loaded; nothing is written.

    Args:
        settings: resolved.
        root: as of `RunFolder`.

    Returns:
        They, with the schedule of the run that is continued; as they are, for a new run.

    Raises:
        ConfigError: the folder holds a run with other settings.
        RunFolderError: its config.yaml cannot be read.
    """
    path = _auto(settings, Path(root)) if settings.run.dir == "auto" else Path(settings.run.dir).expanduser()
    return _matched(path, settings) if (path / "config.yaml").is_file() else settings


def versions(distribution: str) -> dict[str, str]:
    """Installed versions of Python, the trainer, an app, and everything they declare.

    Args:
        distribution: of the app; one that is not installed, such as a script's, has no version to record.
    """
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    ours = [distribution, "grpo-trainer"]
    declared = [re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0] for name in ours for line in _requirements(name)]
    for name in sorted({*ours, *declared, "jaxlib", "libtpu"}):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed
    return found


def _requirements(distribution: str) -> list[str]:
    try:
        return metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []


def _matched(path: Path, settings: Settings) -> Settings:
    """The settings to go on with in a folder; refuses those of another run."""
    file = path / "config.yaml"
    try:
        old = load_saved(file)
    except ConfigError as error:
        raise RunFolderError(f"{file} is not the settings of a run of this version: {error}") from error
    settings = continued(old, settings)
    if bad := differences(old, settings):
        listed = "".join(f"\n  {key}: {old!r} there, {new!r} now" for key, (old, new) in bad.items())
        hint = "\nIf the problems were corrected, checkpoint.any_data=true lets data.* change."
        raise ConfigError(
            f"run.dir={path} holds a run with other settings; name another folder, or undo:{listed}"
            + (hint if all(key.startswith("data.") for key in bad) else "")
        )
    return settings


def _auto(settings: Settings, root: Path) -> Path:
    """The newest unfinished run with these settings that nobody is running; or a new folder."""
    for folder in sorted(root.glob("*/config.yaml"), reverse=True):
        path = folder.parent
        if read_summary(path):
            continue
        try:
            _matched(path, settings)
            os.close(lock(path))
        except (ConfigError, RunFolderError):
            continue
        return path
    name = sha256(dump(settings).encode()).hexdigest()[:6]
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    taken = sum(1 for _ in root.glob(f"{stem}*"))
    return root / (f"{stem}-{taken}" if taken else stem)


def _number(value: Any) -> int | float | None:
    # numpy and jax scalars too: they answer item().
    plain = value.item() if hasattr(value, "item") else value
    if isinstance(plain, bool | int):
        return int(plain)
    return float(plain) if math.isfinite(plain) else None


def _wandb(path: Path, settings: Settings) -> Any:
    try:
        wandb = import_module("wandb")
    except ImportError as error:
        raise ConfigError("log.wandb needs wandb: pip install 'grpo-trainer[wandb]', or set log.wandb=false") from error
    # The same folder is the same run there, also after a resume.
    identity = sha256(str(path.absolute()).encode()).hexdigest()[:16]
    return wandb.init(
        project="grpo-trainer",
        id=identity,
        name=path.name,
        dir=str(path),
        resume="allow",
        config=settings.model_dump(mode="json"),
    )
