"""One orbax checkpoint holds everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN
from pydantic import ValidationError

from grpo_contracts import GrpoError
from grpo_mesh import digest
from grpo_trainer.run.state import LoopState
from grpo_trainer.settings.changes import differences
from grpo_trainer.settings.errors import ConfigError
from grpo_trainer.settings.paths import folder_fault
from grpo_trainer.settings.schema import Settings

FORMAT = 2

# What of a run's identity may change under a checkpoint, where that is asked for.
_DATA = ("problems", "held_out")

# What orbax, tensorstore and zarr raise for bytes that are missing, cut short or changed, and for what hinders reading.
_READING = (ValueError, OSError, KeyError, TypeError)
# Only a missing part proves damage. Permissions, stale mounts, failing disks and too few descriptors may pass.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
_OS_ERROR = re.compile(r"OS error (\d+)|\[Errno (\d+)\]")
# What orbax logs, with tracebacks, of a write that failed; `save` and `wait` raise it as well.
_FAILED_WRITE = re.compile(
    r"raised an exception|Failed to run \d+ Handler Commit|Finalize thread \(\S+\) failed|Failed to \w+ metadata"
    "|Checkpointer failed: one or more"
)

log = logging.getLogger(__name__)


class CheckpointError(GrpoError, RuntimeError):
    """A checkpoint could not be written or read."""


class ResumeRefused(GrpoError, ValueError):
    """The checkpoint belongs to another run: model, tokenizer, data or settings differ."""


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds.

    Args:
        step: it was taken after.
        state: arrays.
        notes: of the loop, see `LoopState.notes`.
        identity: of the run that wrote it.
        settings: of the run that wrote it, as plain values.
    """

    step: int
    state: Any
    notes: dict[str, Any]
    identity: dict[str, Any]
    settings: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: written in the background, renamed into place whole, verified when read.

    A digest of the state (the same for every sharding) is stored beside it and computed again after reading,
    so a flipped bit or a truncated file is noticed, named, and the previous checkpoint is used.

    Args:
        folder: where the checkpoints live, one sub-folder a step.
        keep: how many of the newest to keep; the one with the best accuracy is kept besides.
        versions: installed ones, recorded and compared.
        any_version: read checkpoints of incompatible library versions too.
        any_data: read checkpoints of runs on other problems too.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        versions: Mapping[str, str],
        any_version: bool = False,
        any_data: bool = False,
    ) -> None:
        if fault := folder_fault(str(folder.absolute())):
            raise ConfigError(f"the folder of checkpoints {fault}")
        _say_failures_once()
        policy = AnyPreservationPolicy(
            [
                LatestN(keep),
                BestN(get_metric_fn=lambda metrics: metrics["accuracy"], n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy,
            cleanup_tmp_directories=True,
            step_prefix="step",
            enable_async_checkpointing=True,
        )
        self._folder, self._versions = folder, dict(versions)
        self._any_version, self._any_data = any_version, any_data
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    @classmethod
    def reader(cls, folder: Path) -> Checkpoints:
        """Checkpoints to be read and not written: nothing of them is deleted, whatever run and versions wrote them."""
        return cls(folder, keep=1_000_000, versions={}, any_version=True, any_data=True)

    def save(
        self, loop: LoopState, identity: Mapping[str, Any], settings: Settings, *, accuracy: float | None = None
    ) -> None:
        """Start writing the checkpoint of `loop.step`; arrays are copied before this returns, so they may be donated.

        Args:
            loop: all that a run needs to go on.
            identity: facts of the run (model, tokenizer, data set, ...) that must be equal when it is read.
            settings: of the run.
            accuracy: held-out accuracy in [0, 1], if it was measured at this step; the best one is kept.

        Raises:
            CheckpointError: the disk is full, the folder is not writable, or the previous write failed.
        """
        step, state = loop.step, loop.train
        if step in self._manager.all_steps():
            return
        # Written in the background, while the run goes on changing its notes: what is sealed must be a copy.
        body = {
            "format": FORMAT,
            "versions": self._versions,
            "state_digest": digest(state),
            "identity": dict(identity),
            "settings": settings.model_dump(mode="json"),
            "notes": json.loads(json.dumps(loop.notes())),
        }
        sealed = {"body": body, "sha256": _sha256(body)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(sealed)),
                metrics=None if accuracy is None else {"accuracy": accuracy},
            )
        except (OSError, ValueError) as error:  # tensorstore says ValueError; it may also be the write before
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {error}. "
                f"Earlier checkpoints are intact: {self._steps_text()}."
            ) from error

    def wait(self) -> None:
        """Blocks until the checkpoint being written is complete on disk.

        Raises:
            CheckpointError: the write failed; earlier checkpoints are intact.
        """
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"writing a checkpoint to {self._folder} failed: {error}. Earlier checkpoints are intact."
            ) from error

    def close(self) -> None:
        """Waits for the last write and lets go of the folder."""
        self.wait()
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps with a checkpoint on disk, ascending."""
        return sorted(self._manager.all_steps())

    def restore(
        self,
        like: Any,
        expected: Mapping[str, Any] | None,
        *,
        settings: Settings | None = None,
        at: int | None = None,
        donate: bool = False,
    ) -> Restored | None:
        """Reads the newest checkpoint that is whole.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings wanted.
            expected: facts of this run (model, tokenizer, data set, ...) that must equal those it was saved with; None:
                not compared.
            settings: of this run, which must be those it was saved with, as far as a resume allows; None: not compared.
            at: read the checkpoint of this step and no other; None: the newest.
            donate: the arrays of `like` are deleted before one that is there is read: a device that a state fills
                cannot hold it twice.

        Returns:
            The state and its notes, or None if there is no checkpoint yet.

        Raises:
            ResumeRefused: the newest whole checkpoint was made by another run; the message shows the difference.
            CheckpointError: there are checkpoints and every one of them is damaged, or one cannot be read now.
        """
        steps = [step for step in self.steps if at in (None, step)]
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        for leaf in jax.tree.leaves(like) if donate and steps else ():
            leaf.delete()
        for step in reversed(steps):
            folder, state = self._manager.directory / f"step_{step}", None
            body, damage = _attempt(partial(_read_notes, folder / "notes"))
            if not damage:
                if settings is not None:
                    self._check_settings(step, body, settings)
                self._check_identity(step, body, body["identity"] if expected is None else expected)
                if self._versions:
                    self._check_versions(step, body["versions"])
                state, damage = _attempt(partial(_read_state, folder / "state", abstract))
            if not damage and digest(state) != body["state_digest"]:
                damage = "its arrays do not match their checksum"
            if not damage:
                return Restored(step, state, body["notes"], body["identity"], body["settings"])
            log.warning("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
        if steps:
            raise CheckpointError(
                f"every checkpoint in {self._folder} is damaged (steps {self._steps_text()}). "
                "Move the folder away to start again from the beginning."
            )
        return None

    def set_aside_after(self, step: int) -> None:
        """Move checkpoints newer than `step`, the damaged ones that `restore` stepped over, to `damaged/` beside."""
        later = [newer for newer in self.steps if newer > step]
        if not later:
            return
        aside = self._folder.absolute().parent / "damaged"
        if jax.process_index() == 0:
            aside.mkdir(exist_ok=True)
            for newer in later:
                taken = sum(1 for _ in aside.glob(f"step_{newer}*"))
                name = f"step_{newer}-{taken}" if taken else f"step_{newer}"
                (self._folder.absolute() / f"step_{newer}").rename(aside / name)
                log.warning("the damaged checkpoint of step %s was moved to %s", newer, aside / name)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints are set aside")
        self._manager.reload()

    def _check_settings(self, step: int, body: Mapping[str, Any], settings: Settings) -> None:
        """Refuse a checkpoint that was moved here from a run with other settings."""
        whose = f"the checkpoint of step {step} in {self._folder}"
        if body["format"] != FORMAT:
            raise ResumeRefused(f"{whose} has format {body['format']}; this program reads {FORMAT}.")
        try:
            saved = Settings.model_validate(body["settings"])
        except ValidationError as error:
            raise ResumeRefused(f"{whose} was made with settings that this version does not have: {error}") from error
        if bad := differences(saved, settings):
            listed = "".join(f"\n  {key}: {old!r} in the checkpoint, {new!r} now" for key, (old, new) in bad.items())
            raise ResumeRefused(
                f"{whose} was made by a run with other settings; name another run.dir, or undo:{listed}"
            )

    def _check_identity(self, step: int, body: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """Refuse what another run left; other problems can be allowed, since the arrays mean the same with them."""
        whose = f"the checkpoint of step {step} in {self._folder}"
        if body["format"] != FORMAT:
            raise ResumeRefused(f"{whose} has format {body['format']}; this program reads {FORMAT}.")
        recorded = body["identity"]
        differing = [key for key in sorted({*recorded, *expected}) if recorded.get(key) != expected.get(key)]
        table = "".join(
            f"\n  {key}: checkpoint {recorded.get(key)!r}, this run {expected.get(key)!r}" for key in differing
        )
        if fixed := [key for key in differing if key not in _DATA]:
            raise ResumeRefused(
                f"{whose} was made by another run:{table}\nWithout the same {', '.join(fixed)} its arrays mean "
                "something else, so no setting allows this. Choose another run.dir, or restore what it was made with."
            )
        if differing and not self._any_data:
            raise ResumeRefused(
                f"{whose} was made by another run:{table}\nChoose another run.dir, restore the problems, or, if they "
                f"were corrected, set checkpoint.any_data=true: step {step + 1} then takes what the order of the new "
                "ones has for it."
            )
        if differing:
            log.warning("the checkpoint of step %s was made on other problems (checkpoint.any_data):%s", step, table)

    def _check_versions(self, step: int, written: Mapping[str, str]) -> None:
        """Refuse what other libraries may mean something else by; say what only changes rounding."""
        here = self._versions
        others = {name: pair for name in written if len(set(pair := (written[name], here.get(name, "none")))) > 1}
        table = "".join(f"\n  {name}: checkpoint {then}, here {now}" for name, (then, now) in others.items())
        bad = [name for name, pair in others.items() if _decides(name) and len({_series(part) for part in pair}) > 1]
        if bad and not self._any_version:
            raise ResumeRefused(
                f"the checkpoint of step {step} in {self._folder} was written by library versions that are not "
                f"compatible with these ({', '.join(bad)}):{table}\nInstall the versions it was written by, or set "
                "checkpoint.any_version=true to try."
            )
        if others:
            log.warning("the checkpoint of step %s was written by other versions; results may differ:%s", step, table)

    def _steps_text(self) -> str:
        return ", ".join(map(str, self.steps)) or "none yet"


@cache
def _say_failures_once() -> None:
    """Leave out what orbax's threads print about a failed write: hundreds of lines, of what `save` and `wait` raise."""

    def is_news(record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            return "exception was never retrieved" not in record.getMessage()
        return "orbax" not in record.pathname or not _FAILED_WRITE.search(record.getMessage())

    def hook(unraisable: Any) -> None:
        # After the first failed write orbax closes its loop, to which tensorstore then reports the others.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    before, sys.unraisablehook = sys.unraisablehook, hook


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """What `read` gives, or what is wrong with the files: the same verdict in every process of a job.

    Each process reads its own part, and damage may be in one of them. They agree before they go on, or those that
    succeeded would wait in the next collective operation for those that did not.

    Raises:
        CheckpointError: a part cannot be read now, which does not make it damaged.
    """
    found, problem, unreadable = None, "", False
    try:
        found = read()
    except Exception as error:
        # orbax wraps what tensorstore says of an array's bytes into a bare Exception.
        cause = error.__cause__ if type(error) is Exception else error
        if not isinstance(cause, _READING):
            raise
        problem = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        code = _os_error(cause)
        unreadable = code is not None and code not in _MISSING
    if jax.process_count() > 1:
        verdicts = np.asarray(multihost_utils.process_allgather(np.asarray([bool(problem), unreadable])))
        others = np.flatnonzero(verdicts[:, 0])
        if len(others) and not problem:
            problem = f"process {others[0]} could not read its part"
        unreadable = bool(verdicts[:, 1].any())
    if unreadable:
        raise CheckpointError(
            f"a checkpoint cannot be read now: {problem[:300]}. It may be whole, so nothing was changed: once it can "
            "be read, the same command resumes the run"
        )
    return found, problem


def _os_error(error: BaseException | None) -> int | None:
    """The operating system's code, where it is one that failed; tensorstore writes it into the text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found[1] or found[2]) if found else None


# Not by the manager, whose reading ends in a barrier: a process that failed would never come to it.
def _read_notes(folder: Any) -> dict[str, Any]:
    with closing(ocp.JsonCheckpointHandler()) as handler:
        sealed = handler.restore(folder)
    if sealed["sha256"] != _sha256(sealed["body"]):
        raise ValueError("its notes do not match their checksum")
    return sealed["body"]


def _read_state(folder: Any, abstract: Any) -> Any:
    with closing(ocp.StandardCheckpointHandler()) as handler:
        return handler.restore(folder, args=ocp.args.StandardRestore(abstract))


def _decides(name: str) -> bool:
    """Whether a library's version decides what the arrays of a checkpoint mean."""
    return name.startswith("grpo-") or name in ("optax", "orbax-checkpoint")


def _series(version: str) -> str:
    """The part of a version that compatible releases share: 0.3 of 0.3.2, 2 of 2.1."""
    major, _, rest = version.partition(".")
    return f"0.{rest.partition('.')[0]}" if major == "0" else major


def _sha256(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
