"""The files of a run: read back, cut back, replaced whole or not at all, and held by one process."""

import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_trainer.settings.errors import RunFolderError

__all__ = ["cut_back", "lock", "read_lines", "read_summary", "replace", "writing"]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file of a run; a last line cut short by a kill is left out.

    Args:
        file: metrics.jsonl or completions.jsonl; may be missing.

    Returns:
        One dictionary a line.

    Raises:
        RunFolderError: a line before the last is not a record.
    """
    if not file.is_file():
        return []
    lines = file.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            records.append({**record, "step": int(record["step"])})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise RunFolderError(f"{file} line {number} is not a record of this run: {error}") from error
    return records


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json of a run folder; empty while the run is not finished.

    Args:
        folder: of the run.

    Returns:
        As `RunFolder.summary` wrote it.

    Raises:
        RunFolderError: the file is damaged.
    """
    file = folder / "summary.json"
    if not file.is_file():
        return {}
    try:
        return {**json.loads(file.read_text(encoding="utf-8"))}
    except (ValueError, TypeError, RecursionError) as error:
        raise RunFolderError(f"{file} is damaged: {error}. Delete it, and the same command goes on") from error


def lock(path: Path) -> int:
    """Hold the file `path/lock` until the descriptor is closed or the process dies; return the descriptor."""
    file = path / "lock"
    with writing(path):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() if sys.platform != "win32" else ""
        os.close(descriptor)
        raise RunFolderError(
            f"{path} is in use by a live process ({holder or 'unknown'}): wait for it, or name another run.dir"
        ) from error
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor


def cut_back(file: Path, step: int) -> None:
    """Leave only the lines of steps up to `step` (0: none) in a JSONL file, which may be missing."""
    if file.is_file():
        kept = [record for record in read_lines(file) if record["step"] <= step] if step else []
        replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def replace(file: Path, text: str) -> None:
    """Write whole or not at all."""
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(file)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an operating system error while writing into a sentence about the run folder."""
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"run folder {path} cannot be written: {error}. The last checkpoint is intact; free space or name another "
            "run.dir, and the same command resumes"
        ) from error
