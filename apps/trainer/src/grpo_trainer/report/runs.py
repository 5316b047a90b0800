"""Several runs on one page: their curves on top of each other, and what each of them learned."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from grpo_trainer.report.curves import plans
from grpo_trainer.report.page import environment, write_report
from grpo_trainer.report.results import Results
from grpo_trainer.report.terminal import printable
from grpo_trainer.run.files import check_run_folder, read_lines, read_summary
from grpo_trainer.settings.changes import differences
from grpo_trainer.settings.layers import flat, load_saved
from grpo_trainer.settings.schema import Settings
from grpo_trainer.task import Task

__all__ = ["main", "write_comparison"]

_HELP = "Write the page of a run, or one page that compares several runs."


@dataclass(frozen=True)
class _RunData:
    name: str
    settings: Settings
    records: list[dict[str, Any]]
    results: Results

    @property
    def steps(self) -> int:
        """Done so far."""
        return max((record["step"] for record in self.records), default=0)


def main(task: Task, arguments: Sequence[str]) -> int:
    """``report``: write the page of a run, or one page that compares several runs.

    Args:
        task: of the runs.
        arguments: of the command line.

    Returns:
        Exit code 0.
    """
    parser = argparse.ArgumentParser(prog=f"grpo-{task.name} report", description=_HELP, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run; it may be unfinished")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="page of several runs; default: comparison.html in the folder that holds all of them",
    )
    given = parser.parse_args(arguments)
    folders = [folder.expanduser() for folder in given.runs]
    for folder in folders:
        check_run_folder(folder)
    if len(folders) == 1 and given.output is None:
        print(f"report: {write_report(folders[0])}")
        return 0
    common = Path(os.path.commonpath([folder.absolute().parent for folder in folders]))
    print(f"report: {write_comparison(folders, given.output or common / 'comparison.html')}")
    return 0


def write_comparison(folders: Sequence[Path], file: Path) -> Path:
    """Write one page with the curves and results of several runs; those that differ only in seed share a curve.

    Args:
        folders: of the runs, finished or not.
        file: where to write.

    Returns:
        Path of the page.

    Raises:
        RunFolderError: a file of a run is damaged.
    """
    runs = [_read(folder, name) for folder, name in zip(folders, _names(folders))]
    groups = _groups(runs)
    curves = {label: [run.records for run in members] for label, members in groups.items()}
    charts = [chart for plan in plans([r for run in runs for r in run.records]) for chart in plan.overlay(curves)]
    page = (
        environment()
        .get_template("runs.html.j2")
        .render(
            count=len(runs),
            settings=_distinct([run for members in groups.values() for run in members]),
            groups=[(label, members, _spread(members)) for label, members in groups.items()],
            averaged=any(len(members) > 1 for members in groups.values()),
            charts=charts,
        )
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8", errors="backslashreplace")
    return file


def _read(folder: Path, name: str) -> _RunData:
    return _RunData(
        name,
        load_saved(folder / "config.yaml"),
        read_lines(folder / "metrics.jsonl"),
        Results.read(folder, read_summary(folder)),
    )


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths where two have the same name."""
    short = [folder.absolute().name for folder in folders]
    chosen = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [printable(name, newlines=False) for name in chosen]


def _groups(runs: Sequence[_RunData]) -> dict[str, list[_RunData]]:
    """Runs that differ only in seed, under the name of the one or of the first."""
    groups: list[list[_RunData]] = []
    for run in runs:
        alike = (group for group in groups if not _other_settings(group[0].settings, run.settings))
        group = next(alike, None)
        if group is None:
            groups.append([run])
        else:
            group.append(run)
    return {
        group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} of other seeds": group
        for group in groups
    }


def _other_settings(one: Settings, other: Settings) -> set[str]:
    # Either way: more steps than before are no difference for a run that goes on.
    return {*differences(one, other), *differences(other, one)} - {"seed"}


def _distinct(runs: Sequence[_RunData]) -> list[tuple[str, list[str]]]:
    """Settings that the runs do not share, with the value of each run."""
    first = runs[0].settings
    keys = {key for run in runs for key in (*_other_settings(first, run.settings), "seed")}
    values = [flat(run.settings) for run in runs]
    rows = [(key, [_text(value[key]) for value in values]) for key in values[0] if key in keys]
    return [(key, texts) for key, texts in rows if len(set(texts)) > 1]


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        value = ", ".join(map(str, value))
    return printable("null" if value is None else str(value), newlines=False)


def _spread(members: Sequence[_RunData]) -> Mapping[str, str] | None:
    """Mean and standard deviation over the seeds of a group; None of one run."""
    if len(members) < 2:
        return None
    shares: dict[str, list[float]] = {}
    for run in members:
        found = {when: accuracy.share for when, accuracy in run.results.accuracies.items()}
        if len(found) == 2:
            found["difference"] = found["after"] - found["before"]
        for name, value in found.items():
            shares.setdefault(name, []).append(value)
    return dict(_written(shares))


def _written(shares: Mapping[str, Sequence[float]]) -> Iterator[tuple[str, str]]:
    for name, values in shares.items():
        deviation = f" ± {100 * stdev(values):.1f}" if len(values) > 1 else ""
        sign, unit = ("+", "points") if name == "difference" else ("", "%")
        yield name, f"{100 * mean(values):{sign}.1f}{deviation} {unit} ({len(values)} seeds)"
