"""Reading problems from JSONL, Parquet or a Hub data set. Every fault is reported with its line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any

from grpo_contracts import GrpoError
from grpo_trainer.data.hub import HubError, download, is_hub_id
from grpo_trainer.task import Problem, Split

_LONGEST_LINE = 10_000_000  # bytes of one problem with all of its columns
_FOLDERS = ("", "main", "default", "data")  # where a snapshot of a Hub data set holds its files
_SHARD = r"{split}(-\d{{5}}-of-(?P<shards>\d{{5}}))?\.(jsonl|parquet)"
_LISTED = 20  # names of files in a message


class DataError(GrpoError, ValueError):
    """Problems cannot be read; the message names the file and the line."""


def read_problems(source: str, split: Split, *, limit: int = 0) -> list[Problem]:
    """Read a split of a data set whose rows have the text fields ``question`` and ``answer``.

    Args:
        source: a JSONL or Parquet file (whatever the split); a folder with train.jsonl and test.jsonl, or as the Hub or
            ``save_to_disk`` of `datasets` lays it out; or a Hub id.
        split: which one.
        limit: at most so many, from the beginning; 0 is all.

    Returns:
        The problems in the order of the file, with every further field as a column.

    Raises:
        DataError: there is no such source, a line is not a problem, a question comes twice, or there is none.
    """
    try:
        files = _locate(source, split)
        problems = _checked((row for file in files for row in _rows(file)), limit)
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error}") from error
    if not problems:
        raise DataError(f"{files[0]} must hold at least one problem: it is empty")
    return problems


def check_limit(source: str, split: Split, limit: int, most: int) -> None:
    """Refuse to generate more problems than there are.

    Args:
        source: that generates problems, such as ``embedded``.
        split: which one.
        limit: as of `Task.problems`.
        most: problems that the split can have.

    Raises:
        DataError: `limit` is above `most`.
    """
    if limit > most:
        setting = "data.train_size with prompt.examples" if split == "train" else "eval.problems"
        raise DataError(f"{setting} must be at most {most:,}, all that {source!r} generates: got {limit:,}")


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


def _locate(source: str, split: Split) -> list[Path]:
    """The files that hold a split, in order."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path, split)
    if path.is_file():
        return [path]
    if path.suffix not in (".jsonl", ".parquet") and is_hub_id(source):
        wanted = [f"{folder}/{split}*".lstrip("/") for folder in _FOLDERS]
        try:
            return _in_folder(download(source, "dataset", wanted), split)
        except HubError as error:
            raise DataError(f"{source} is not a file or folder here, and {error}") from error
    raise DataError(
        f"a data source must be `embedded`, a JSONL or Parquet file, a folder with {split}.jsonl, or a hub id such as "
        f"OWNER/NAME: there is no {path.absolute()}"
    )


def _in_folder(folder: Path, split: Split) -> list[Path]:
    """The split's files: JSONL before Parquet; of several configurations `main`, `default` or none at all is meant."""
    saved = sorted((folder / split).glob("data-*-of-*.arrow"))  # save_to_disk of `datasets`
    if saved:
        return saved
    for place in (folder / name for name in _FOLDERS):
        entries = sorted(place.iterdir()) if place.is_dir() else []
        for suffix in (".jsonl", ".parquet"):
            shards = [
                (file, match)
                for file in entries
                if file.suffix == suffix and (match := re.fullmatch(_SHARD.format(split=split), file.name))
            ]
            whole = [file for file, match in shards if match["shards"] is None]
            if whole:
                return whole[:1]
            if shards and len(shards) != int(shards[0][1]["shards"]):
                raise DataError(
                    f"{place} must hold all {shards[0][1]['shards']} parts of {split}: {len(shards)} are there"
                )
            if shards:
                return [file for file, _ in shards]
    names = sorted(entry.name for entry in folder.iterdir())
    held = ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
    raise DataError(f"the folder {folder} must hold {split}.jsonl or {split}.parquet: it holds {held or 'nothing'}")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix in (".parquet", ".arrow"):
        return _arrow_rows(file)
    return _jsonl_rows(file)


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number in count(1):
            place = f"{path}:{number}"
            line = file.readline(_LONGEST_LINE + 1)
            if not line:
                return
            if len(line) > _LONGEST_LINE:
                raise DataError(f"{place} must have at most {_LONGEST_LINE:,} bytes: it is longer")
            if not line.strip():
                raise DataError(f"{place} must hold a problem: the line is empty. Remove it")
            try:
                yield place, json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(f"{place} must be UTF-8: {error}") from error
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{place} must be one JSON object a line: {error.msg} at column {error.colno}"
                ) from error
            except RecursionError as error:
                raise DataError(f"{place} must be one JSON object a line: its brackets are too deep") from error
            except ValueError as error:  # Python refuses integers of thousands of digits
                raise DataError(f"{place} must hold numbers of at most 4,300 digits: {error}") from error


def _arrow_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        from pyarrow import ipc, parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise DataError(f"{path} needs pyarrow: pip install pyarrow") from error
    number = 0
    try:
        file = ipc.open_stream(path) if path.suffix == ".arrow" else parquet.ParquetFile(path).iter_batches(1024)
        for batch in file:
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:300]
        kind = "an Arrow" if path.suffix == ".arrow" else "a Parquet"
        raise DataError(f"{path} must be {kind} file that is whole: after row {number}: {reason}") from error


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
                raise DataError(f"{place}: {field} must be a text that is not empty: got {repr(row[field])[:100]}")
        _check_text(place, row)
        question = row["question"]
        if question in seen:
            raise DataError(f"{place} must not repeat the question of {seen[question]}: {question[:60]!r}. Remove one")
        seen[question] = place
        columns = {name: value for name, value in row.items() if name not in ("question", "answer")}
        problems.append(Problem(question, row["answer"], place, columns))
        if limit and len(problems) == limit:
            break
    return problems


def _check_text(place: str, row: dict[str, Any]) -> None:
    """Refuse what JSON can escape (``\\ud800``) and no UTF-8 can hold, and what nothing can write again."""
    for name, value in row.items():
        try:
            json.dumps([name, value], ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            shown = ascii(name)[:100]
            raise DataError(f"{place}: {shown} must be Unicode text: it holds half of a surrogate pair") from error
        except RecursionError as error:
            raise DataError(f"{place}: {ascii(name)[:100]} must not be nested so deep") from error
