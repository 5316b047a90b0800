"""Which training problems a run keeps: by a column of the data set, and by how often a policy solved them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_trainer.data.sources import DataError
from grpo_trainer.evaluate.records import Record, read_records

if TYPE_CHECKING:
    from grpo_trainer.settings.schema import FilterSettings, PassRateSettings
    from grpo_trainer.task import Problem

__all__ = ["filter_problems"]

_LISTED = 10  # names or values in a message


def filter_problems(
    problems: Sequence[Problem], settings: FilterSettings, *, by_pass_rate: bool = True
) -> tuple[list[Problem], str]:
    """Keep the problems that `data.filter` asks for.

    Args:
        problems: of the training split.
        settings: the section ``data.filter``.
        by_pass_rate: apply ``data.filter.pass_rate`` too.

    Returns:
        Those that are kept, in order, and what was left out, in words; empty if nothing is filtered.

    Raises:
        DataError: there is no such column, its values do not compare, the records are not those of these problems, or
            no problem is left.
    """
    kept, reasons = list(problems), []
    if settings.column:
        kept = _by_column(kept, settings)
        reasons.append(f"{len(problems) - len(kept):,} by the column {settings.column}")
    if settings.pass_rate.records and by_pass_rate:
        before = len(kept)
        kept, unmeasured = _by_pass_rate(kept, settings.pass_rate)
        reasons.append(f"{before - len(kept) - unmeasured:,} by pass rate")
        reasons += [f"{unmeasured:,} that the records lack"] if unmeasured else []
    if not reasons:
        return kept, ""
    return kept, f"data.filter left out {len(problems) - len(kept):,} of {len(problems):,}: {', '.join(reasons)}"


def _by_column(problems: Sequence[Problem], settings: FilterSettings) -> list[Problem]:
    column, columns = settings.column, sorted({name for problem in problems for name in problem.columns})
    if column not in columns:
        near = difflib.get_close_matches(column, columns, n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise DataError(
            f"data.filter.column must be a column of the training problems: got {column!r}.{guess} Besides question "
            f"and answer they have {_some(columns)}"
        )
    values = [problem.columns.get(column) for problem in problems]
    held = sorted({repr(value) for value in values})
    if settings.values:
        if absent := [wanted for wanted in settings.values if not any(_same(wanted, value) for value in values)]:
            raise DataError(
                f"data.filter.values must occur in the column {column!r}: {absent[0]!r} does not. It holds "
                f"{_some(held)}"
            )
        chosen = [any(_same(wanted, value) for wanted in settings.values) for value in values]
    else:
        low = float("-inf") if settings.min is None else settings.min
        high = float("inf") if settings.max is None else settings.max
        chosen = [
            value is not None and low <= _number(value, problem, column) <= high
            for value, problem in zip(values, problems)
        ]
        if not any(chosen):
            raise DataError(
                f"data.filter must keep at least one problem: of {len(problems):,}, none has a {column!r} from "
                f"{low:g} to {high:g}. The column holds {_some(held)}"
            )
    return [problem for problem, is_chosen in zip(problems, chosen) if is_chosen]


def _by_pass_rate(problems: Sequence[Problem], settings: PassRateSettings) -> tuple[list[Problem], int]:
    """The problems whose measured rate is in the range, and how many were not measured."""
    recorded = {record.question: record for record in _read(Path(settings.records).expanduser())}
    rates: dict[str, float] = {}
    for problem in problems:
        if (record := recorded.get(problem.question)) is None:
            continue
        if record.gold != problem.answer:
            raise DataError(
                f"{problem.place}: data.filter.pass_rate.records must be of these problems: there the answer is "
                f"{record.gold[-60:]!r}, here {problem.answer[-60:]!r}. Measure again with `eval --split train`"
            )
        rates[problem.question] = sum(answer.judgement.strict for answer in record.samples) / len(record.samples)
    if not rates:
        raise DataError(
            f"data.filter.pass_rate.records must be of these problems: {settings.records} holds {len(recorded):,} "
            f"other ones, such as {next(iter(recorded))[:60]!r}. Measure with `eval --split train`"
        )
    kept = [problem for problem in problems if settings.min <= rates.get(problem.question, -1.0) <= settings.max]
    if not kept:
        never, always = (sum(rate == bound for rate in rates.values()) for bound in (0.0, 1.0))
        raise DataError(
            f"data.filter.pass_rate must keep at least one problem: of {len(rates):,} measured ones, none has a rate "
            f"from {settings.min:g} to {settings.max:g}; {never:,} were never solved and {always:,} always. Choose a "
            "wider range, or measure another policy"
        )
    return kept, sum(problem.question not in rates for problem in problems)


def _read(file: Path) -> list[Record]:
    if not file.is_file():
        raise DataError(
            f"data.filter.pass_rate.records must be a file that `eval --split train` wrote: there is no "
            f"{file.absolute()}"
        )
    try:
        records, lines = read_records(file), file.read_bytes().count(b"\n")
    except OSError as error:
        raise DataError(f"data.filter.pass_rate.records cannot be read: {error}") from error
    if len(records) < max(1, lines):
        raise DataError(
            f"{file}:{len(records) + 1} must be a record of `eval --split train`, of the problem {len(records)} of its "
            "data set: it is not. Measure again (data.filter.pass_rate.records)"
        )
    if not records[0].samples:
        raise DataError(
            f"data.filter.pass_rate.records must hold samples: {file} holds greedy answers only. Measure with "
            "`eval --split train --set eval.samples=8`"
        )
    return records


def _number(value: Any, problem: Problem, column: str) -> float | Decimal:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
        raise DataError(
            f"{problem.place}: the column {column!r} must hold numbers for data.filter.min and data.filter.max: got "
            f"{repr(value)[:100]}. List what to keep in data.filter.values instead"
        )
    return value


def _same(wanted: Any, value: Any) -> bool:
    """Whether they are equal, where 1 is not true."""
    return isinstance(wanted, bool) == isinstance(value, bool) and wanted == value


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED:,} more" if len(names) > _LISTED else ""
    return (", ".join(name[:60] for name in names[:_LISTED]) or "nothing") + more
