"""Reading problems from JSONL, Parquet or a Hub data set. Every fault is reported with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from grpo_contracts import GrpoError
from grpo_trainer.task import Problem, Split

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class DataError(GrpoError, ValueError):
    """Problems cannot be read; the message names the file and the line."""


def read_problems(source: str, split: Split, *, limit: int = 0) -> list[Problem]:
    """Read a split of a data set whose rows have the text fields ``question`` and ``answer``.

    Args:
        source: a JSONL or Parquet file (whatever the split); a folder with train.jsonl and test.jsonl; or a Hub id.
        split: which one.
        limit: at most so many, from the beginning; 0 is all.

    Returns:
        The problems in the order of the file, with every further field as a column.

    Raises:
        DataError: there is no such source, a line is not a problem, a question comes twice, or there is none.
    """
    path = _locate(source, split)
    rows = _parquet_rows(path) if path.suffix == ".parquet" else _jsonl_rows(path)
    problems = _checked(rows, limit)
    if not problems:
        raise DataError(f"{path} must hold at least one problem: it is empty")
    return problems


def digest(problems: Iterable[Problem]) -> str:
    """Identify a data set by its contents, wherever it was read.

    Args:
        problems: in order.

    Returns:
        sha256 of their questions and answers, in hexadecimal.
    """
    total = sha256()
    for problem in problems:
        total.update(json.dumps([problem.question, problem.answer]).encode() + b"\n")
    return total.hexdigest()


def _locate(source: str, split: Split) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        file = path / f"{split}.jsonl"
        if not file.is_file():
            held = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
            raise DataError(f"the folder {path} must hold {split}.jsonl: it holds {held}")
        return file
    if path.is_file():
        return path
    if _HUB_ID.fullmatch(source) and path.suffix != ".jsonl":
        return _download(source, split)
    raise DataError(
        f"a data source must be `embedded`, a JSONL file, a folder with {split}.jsonl, or a hub id such as "
        f"OWNER/NAME: there is no {source}"
    )


def _download(repository: str, split: Split) -> Path:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        files = HfApi().list_repo_files(repository, repo_type="dataset")
        name = _choose(files, split)
        if name is None:
            raise DataError(
                f"the hub data set {repository} must have one JSONL or Parquet file of split {split}: "
                f"it has {', '.join(files)}"
            )
        return Path(hf_hub_download(repository, name, repo_type="dataset"))
    except (HfHubHTTPError, OSError) as error:
        raise DataError(
            f"{repository} is neither a file or folder here nor a data set that the hub gives out: {error}. "
            "Without a network, download it elsewhere and pass the folder"
        ) from error


def _choose(files: Sequence[str], split: Split) -> str | None:
    """The split's file; of several configurations `main`, `default` or none at all is meant."""
    fitting = [
        name
        for name in files
        if re.fullmatch(rf"((main|default|data)/)?{split}(-00000-of-00001)?\.(jsonl|parquet)", name)
    ]
    return min(fitting, key=lambda name: (not name.endswith(".jsonl"), name), default=None)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        place = f"{path}:{number}"
        if not line.strip():
            raise DataError(f"{place} must hold a problem: the line is empty. Remove it")
        try:
            yield place, json.loads(line)
        except UnicodeDecodeError as error:
            raise DataError(f"{place} must be UTF-8: {error}") from error
        except json.JSONDecodeError as error:
            raise DataError(f"{place} must be one JSON object a line: {error.msg} at column {error.colno}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        from pyarrow import parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError(f"{path} is Parquet, which needs pyarrow: pip install pyarrow") from error
    for number, row in enumerate(parquet.read_table(path).to_pylist(), 1):
        yield f"{path}:{number}", row


def _checked(rows: Iterable[tuple[str, Any]], limit: int) -> list[Problem]:
    problems: list[Problem] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place} must be a JSON object with question and answer: got {type(row).__name__}")
        for field in ("question", "answer"):
            if field not in row:
                raise DataError(f"{place} must have the field {field!r}: it has {', '.join(map(repr, row)) or 'none'}")
            if not isinstance(row[field], str) or not row[field].strip():
                raise DataError(f"{place}: {field} must be a text that is not empty: got {row[field]!r}")
        question = row["question"]
        if question in seen:
            raise DataError(f"{place} must not repeat the question of {seen[question]}: {question[:60]!r}. Remove one")
        seen[question] = place
        columns = {name: value for name, value in row.items() if name not in ("question", "answer")}
        problems.append(Problem(question, row["answer"], place, columns))
        if limit and len(problems) == limit:
            break
    return problems
