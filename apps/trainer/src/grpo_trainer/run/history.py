"""Whether a run's records and its checkpoints tell the same story, and what to say where they do not."""

from collections.abc import Iterator
from pathlib import Path

from grpo_trainer.run.files import copy_aside, name_steps, read_lines
from grpo_trainer.settings.schema import Settings

__all__ = ["missing_records", "steps_done_again"]


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
