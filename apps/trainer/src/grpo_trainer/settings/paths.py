"""Paths that a person gives: what can be wrong with them before anything is opened."""

from __future__ import annotations

import os
import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grpo_trainer.settings.schema import Settings

__all__ = ["argument_path", "folder_fault", "path_fault", "path_faults", "writing_to"]

# Settings that hold a path; some may hold a name or a Hub id instead.
_PATHS = (
    "run.dir",
    "data.source",
    "data.test_source",
    "data.filter.pass_rate.records",
    "prompt.examples_file",
    "model.path",
    "loss.reference",
    "compilation_cache",
)
_LONGEST, _LONGEST_NAME = 4096, 255  # bytes, on Linux and macOS
_UNREADABLE = re.compile(r"[\[\]\\]" if os.sep == "/" else r"[\[\]]")  # what orbax's storage reads as a pattern
_VARIABLE = re.compile(r"\$\{\w*\}?|\$[A-Za-z_]\w*")


def path_fault(path: str) -> str | None:
    """Say why no file can have this path.

    Args:
        path: as it was written, perhaps with ``~``.

    Returns:
        A clause such as "must not be longer than ..."; None if the path may be used.
    """
    if variable := _VARIABLE.search(path):
        return (
            f"must be written out, because variables are not expanded here: got {variable[0]!r} in {path[:200]!r}. On "
            "the command line the shell expands $NAME outside single quotes"
        )
    if "\0" in path:
        return f"must not hold a null character: got {path[:200]!r}"
    whole = os.path.expanduser(path)
    if whole.startswith("~"):
        user = whole.partition("/")[0]
        if not Path(user).exists():
            return f"must begin with a home directory that exists: got {user[:200]!r}"
    longest = max((len(os.fsencode(name)) for name in re.split(r"[/\\]", whole)), default=0)
    if longest > _LONGEST_NAME or len(os.fsencode(whole)) > _LONGEST:
        return (
            f"must be at most {_LONGEST} bytes long, and each name in it {_LONGEST_NAME}: got {whole[:60]!r}..., "
            f"{len(whole)} characters"
        )
    return None


def folder_fault(path: str) -> str | None:
    """Say why checkpoints under this path could not be read back.

    Args:
        path: of a folder.

    Returns:
        A clause, or None if they can.
    """
    if odd := _UNREADABLE.search(path):
        return f"must have no {odd[0]!r} in its path: got {path[:200]!r}. Checkpoints written there cannot be read back"
    return None


def path_faults(settings: Settings) -> Iterator[str]:
    """Say which settings cannot be paths.

    Args:
        settings: each section valid by itself.

    Yields:
        Sentences that name the key.
    """
    for key in _PATHS:
        if fault := path_fault(attrgetter(key)(settings)):
            yield f"{key} {fault}"
    if fault := folder_fault(settings.run.dir):
        yield f"run.dir {fault}"


def argument_path(text: str) -> Path:
    """Read a path from the command line; the `type` of an `argparse` argument.

    Args:
        text: as it was written.

    Returns:
        The path, with ``~`` expanded.

    Raises:
        ArgumentTypeError: no file can have this path.
    """
    if fault := path_fault(text):
        raise ArgumentTypeError(fault)
    return Path(os.path.expanduser(text))


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """Turn an operating system error while the block writes into a sentence about the folder."""
    try:
        yield
    except OSError as error:
        from grpo_trainer.settings.errors import ConfigError  # imports numpy, which `--print-config` does without

        raise ConfigError(
            f"{folder} cannot be written: {error}. Name a folder that can be made, on a disk with room"
        ) from error
