"""The files of a run: read back even if damaged, compared with its checkpoints, replaced whole, held by one process."""

import json
import logging
import math
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from grpo_trainer.settings.errors import ConfigError, RunFolderError
from grpo_trainer.settings.schema import Settings

__all__ = [
    "check_run_folder",
    "copy_aside",
    "cut_back",
    "locate_run",
    "lock",
    "missing_records",
    "name_steps",
    "read_lines",
    "read_summary",
    "replace",
    "steps_done_again",
    "writing",
]

log = logging.getLogger(__name__)


def read_lines(file: Path, *, warn: bool = True) -> list[dict[str, Any]]:
    """The records of a JSONL file of a run. Lines that are not records are named in a warning and left out.

    Args:
        file: such as metrics.jsonl or completions.jsonl; may be missing. A last line cut short by a kill is left out.
        warn: False says nothing.

    Returns:
        One dictionary a line.

    Raises:
        RunFolderError: the file cannot be read now.
    """
    records, damaged = _parse(file)
    if damaged and warn:
        few = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        log.warning("%s: %d lines are not records of a run and are left out (line %s)", file, len(damaged), few)
    return records


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json of a run folder; empty while the run is not finished.

    Args:
        folder: of the run.

    Returns:
        As `RunFolder.summary` wrote it; empty, with a warning, if the file is damaged.

    Raises:
        RunFolderError: the file cannot be read now.
    """
    file = folder / "summary.json"
    if not file.is_file():
        return {}
    try:
        summary = {**json.loads(_read(file))}
        fits = _is_summary(summary)
    except _DAMAGE:
        fits, summary = False, {}
    if fits:
        return summary
    log.warning("%s is damaged and is left out: the same command writes it anew", file)
    return {}


def name_steps(steps: Iterable[int]) -> str:
    """Steps in words: "steps 1 to 3, 7"."""
    spans: list[list[int]] = []
    for step in sorted(steps):
        if spans and step == spans[-1][1] + 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    listed = ", ".join(f"{first} to {last}" if first < last else str(first) for first, last in spans)
    return f"step{'s' if len(spans) > 1 or any(first < last for first, last in spans) else ''} {listed}"


# What JSON of another form raises, or JSON nested too deep, or with integers beyond every float.
_DAMAGE = (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError)


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError as error:
        raise RunFolderError(f"{file} cannot be read now: {error}. Make it readable, and try again") from error


def _parse(file: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The records of a file, and the numbers of the lines that are none."""
    records, damaged = [], []
    lines = _read(file).split(b"\n")
    for number, line in enumerate(lines, start=1):
        record: dict[str, Any] = {}
        try:
            record = {**json.loads(line)}
            fits = type(record["step"]) is int and record["step"] >= 0 and _FITS.get(file.name, bool)(record)
        except _DAMAGE:
            fits = False
        if fits:
            records.append(record)
        elif number < len(lines):  # the last one is empty, or was cut short
            damaged.append(number)
    return records, damaged


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))


def _is_completion(record: Mapping[str, Any]) -> bool:
    texts = all(isinstance(record.get(name, ""), str) for name in ("prompt", "completion"))
    return texts and all(map(_is_number, (record.get("reward"), *(record.get("rewards") or {}).values())))


def _is_summary(summary: Mapping[str, Any]) -> bool:
    plain = type(summary["steps"]) is int and isinstance(summary["seconds"], int | float)
    named = isinstance(summary["device"], str) and isinstance(summary.get("versions", {}), dict)
    return (plain and named) and all(
        summary.get(f"accuracy_{name}") is None
        or (0 <= summary[f"accuracy_{name}"] <= 1 and type(count := summary[f"problems_{name}"]) is int and count > 0)
        for name in ("before", "after")
    )


_FITS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "metrics.jsonl": lambda record: all(map(_is_number, record.values())),
    "completions.jsonl": _is_completion,
}


def locate_run(path: Path) -> tuple[Path, int | None] | None:
    """Recognise a run's folder, or that of one of its checkpoints such as RUN/checkpoints/step_40.

    Args:
        path: any.

    Returns:
        The run's folder, and the step of the checkpoint that was named; None for a path that is neither.
    """
    if (path / "config.yaml").is_file() or (path / "checkpoints").is_dir():
        return path, None
    step = re.fullmatch(r"step_(\d+)", path.name)
    inside = step and path.is_dir() and path.absolute().parent.name == "checkpoints"
    return (path.parent.parent, int(step[1])) if step and inside else None


def check_run_folder(path: Path) -> None:
    """Refuse a path that a person took for a run's folder.

    Args:
        path: any.

    Raises:
        ConfigError: there is no run.
    """
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} must be the folder of a run, with its config.yaml")


def lock(path: Path) -> int:
    """Hold the file `path/lock` until the descriptor is closed or the process dies; return the descriptor."""
    file = path / "lock"
    with writing(path):
        # What is not a file of the run's own is neither followed nor emptied.
        if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
            raise RunFolderError(
                f"{file} must be a plain file, which the run locks: remove it, or name another run.dir"
            )
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
    """Leave only the records of steps up to `step` (0: none) in a JSONL file, which may be missing.

    Args:
        file: as of `read_lines`. If it has damaged lines, a copy of it is kept.
        step: the last one to keep.
    """
    records, damaged = _parse(file)
    if damaged:
        copy = copy_aside(file)
        log.warning("%s: %d lines are not records of a run; the file as it was is kept as %s", file, len(damaged), copy)
    kept = [record for record in records if record["step"] <= step] if step else []
    if file.is_file():
        replace(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def copy_aside(file: Path) -> Path:
    """Copy a file of a run to `damaged/` beside it; return the copy."""
    aside = file.parent / "damaged"
    aside.mkdir(exist_ok=True)
    taken = sum(1 for _ in aside.glob(f"{file.name}*"))
    return Path(shutil.copyfile(file, aside / (f"{file.name}.{taken}" if taken else file.name)))


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


def missing_records(path: Path, settings: Settings, step: int) -> dict[str, str]:
    """Steps up to `step` that a run's files should record and do not.

    Args:
        path: folder of the run.
        settings: of the run.
        step: the last one that is done.

    Returns:
        File name -> steps, in words; empty if nothing is missing.
    """
    first = {"metrics.jsonl": 0 if settings.eval.before else 1}
    if settings.log.completions:
        first["completions.jsonl"] = 1
    missing = {}
    for name, begin in first.items():
        steps = set(range(begin, step + 1)) if step else set()
        if lost := steps - {record["step"] for record in read_lines(path / name, warn=False)}:
            missing[name] = name_steps(lost)
    return missing


def steps_done_again(path: Path, settings: Settings, step: int) -> Iterator[str]:
    """What is recorded past the newest checkpoint. Where later checkpoints are lost, copies of the records are kept.

    Args:
        path: folder of the run.
        settings: of the run.
        step: that the newest checkpoint contains; 0 without one.

    Yields:
        A sentence, if there is something.
    """
    file, summary = path / "metrics.jsonl", path / "summary.json"
    last = max((record["step"] for record in read_lines(file, warn=False)), default=0)
    if last <= step:
        return
    text = f"{file.name} goes up to step {last} and the newest checkpoint to step {step}"
    every = settings.checkpoint.every
    # A checkpoint is complete once the next one was begun, and that is begun before the step after it is recorded.
    complete = (last - 1) // every * every - every if every else 0
    if summary.is_file() or complete > step:
        copies = [copy_aside(kept) for kept in (file, path / "completions.jsonl", summary) if kept.is_file()]
        text += f": later checkpoints are gone. The old records are kept in {copies[0].parent}"
    yield f"{text}; {name_steps(range(step + 1, last + 1))} will be done again"
