"""One file with all that is needed to compute a failed step again: batch, config, versions, whose parameters."""

from __future__ import annotations

import json
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpo_contracts
from grpo_contracts import GrpoError, TrainBatch
from grpo_trainer.run.files import writing
from grpo_trainer.settings.schema import Settings

__all__ = ["Capsule", "CapsuleError", "read_capsule", "write_capsule"]

_FORMAT = 2
_ABOUT, _BATCH = "capsule.json", "batch.npz"


class CapsuleError(GrpoError, ValueError):
    """A file is not a capsule, or it is damaged."""


@dataclass(frozen=True)
class Capsule:
    """What is in the file besides the batch.

    Args:
        step: whose updates failed, 1 for the first.
        settings: of the run.
        identity: what the checkpoint must agree with.
        parameters: digest of the parameters, which are in the checkpoint.
        checkpoint: folder of the run's checkpoints, beside the capsule; the one of `step` has the parameters.
        versions: of everything installed.
        metrics: of the step; what is not finite is left as it was.
        warnings: of the run until then.
    """

    step: int
    settings: Settings
    identity: dict[str, Any]
    parameters: str
    checkpoint: str
    versions: dict[str, str]
    metrics: dict[str, float]
    warnings: tuple[str, ...]


def write_capsule(path: Path, capsule: Capsule, batch: TrainBatch) -> None:
    """Write a capsule, whole or not at all.

    Args:
        path: the file.
        capsule: about the step.
        batch: that was to be learned from.

    Raises:
        RunFolderError: the file cannot be written.
    """
    about = {**vars(capsule), "format": _FORMAT, "settings": capsule.settings.model_dump(mode="json")}
    part = path.with_name(f".{path.name}.part")
    with writing(path.parent), tempfile.TemporaryDirectory(dir=path.parent) as folder:
        grpo_contracts.save_batch(batch, Path(folder) / _BATCH)
        with zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_ABOUT, json.dumps(about, indent=1))
            archive.write(Path(folder) / _BATCH, _BATCH)
        os.replace(part, path)


def read_capsule(path: Path) -> tuple[Capsule, TrainBatch]:
    """Read a capsule.

    Args:
        path: a file that `write_capsule` wrote.

    Returns:
        What it records, and the batch.

    Raises:
        CapsuleError: no such file, or it is damaged, or of another version of this program.
    """
    try:
        with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
            about = json.loads(archive.read(_ABOUT))
            if about.pop("format") != _FORMAT:
                raise CapsuleError(f"{path} is a capsule of another version; read it with the one that wrote it")
            batch = grpo_contracts.load_batch(archive.extract(_BATCH, folder), level="shapes")
            settings = Settings.model_validate(about["settings"])
            capsule = Capsule(**{**about, "settings": settings, "warnings": tuple(about["warnings"])})
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, CapsuleError):
            raise
        raise CapsuleError(f"{path} must be a capsule, written by a run that stopped: {error}") from error
    if not isinstance(batch, TrainBatch):
        raise CapsuleError(f"{path} must hold a TrainBatch: it holds a {type(batch).__name__}")
    return capsule, batch
