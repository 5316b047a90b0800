"""Keep-a-Changelog files: reading their sections, and turning [Unreleased] into a release."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass

from packaging.version import Version

_HEADING = re.compile(r"^## \[(?P<title>[^\]]+)\](?: - (?P<date>\S+))?\s*$")
_UNRELEASED = "Unreleased"


@dataclass(frozen=True)
class Section:
    """One `## [title] - date` of a changelog.

    Args:
        title: a version, or `Unreleased`.
        date: as written, empty where there is none.
        entries: its list items.
    """

    title: str
    date: str
    entries: tuple[str, ...]


def sections(text: str) -> list[Section]:
    """The sections of a changelog in their order, newest first."""
    heads: list[tuple[str, str]] = []
    bodies: list[list[str]] = []
    for line in text.splitlines():
        if match := _HEADING.match(line):
            heads.append((match["title"], match["date"] or ""))
            bodies.append([])
        elif bodies and line.startswith(("- ", "* ")):
            bodies[-1].append(line)
    return [Section(title, date, tuple(body)) for (title, date), body in zip(heads, bodies)]


def unreleased(text: str) -> tuple[str, ...]:
    """The entries under [Unreleased]."""
    return next((section.entries for section in sections(text) if section.title == _UNRELEASED), ())


def released(text: str) -> list[Section]:
    """The sections that are releases."""
    return [section for section in sections(text) if section.title != _UNRELEASED]


def problems(text: str, version: Version) -> list[str]:
    """Check a changelog whose newest release should be `version`; return one phrase for each problem."""
    done = released(text)
    if not done:
        return [f"has no section '## [{version}] - YYYY-MM-DD'"]
    wrong = []
    if done[0].title != str(version):
        wrong.append(f"newest section must be [{version}], the version in pyproject.toml: got [{done[0].title}]")
    for section in done:
        try:
            datetime.date.fromisoformat(section.date)
        except ValueError:
            wrong.append(f"section [{section.title}] must have a date like 2026-11-23: got {section.date!r}")
        if not section.entries:
            wrong.append(f"section [{section.title}] is empty")
    titles = [section.title for section in sections(text)]
    if len(set(titles)) < len(titles):
        wrong.append(f"has two sections of one name: {', '.join(sorted({t for t in titles if titles.count(t) > 1}))}")
    return wrong


def release(text: str, version: Version, day: datetime.date) -> str:
    """The changelog with `[Unreleased]` turned into a release, and an empty `[Unreleased]` above it."""
    heading = f"## [{_UNRELEASED}]"
    return text.replace(heading, f"{heading}\n\n## [{version}] - {day.isoformat()}", 1)
