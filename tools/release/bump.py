"""Raising a version: refused if the change requires a larger step, else written to every file that repeats it."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from . import changelog
from .history import releases, settled, tag_of
from .verdict import Level, Verdict, judge_since, raised
from .workspace import Package, ReleaseError, Workspace


@dataclass(frozen=True)
class Bump:
    """A raised version.

    Args:
        version: the new one.
        tag: the tag to set once the change is merged.
        since: commit it was compared with; None for a first release, the trainer and the apps.
        verdict: what changed since then.
        left: what remains to be done, one sentence each.
    """

    version: Version
    tag: str
    since: str | None
    verdict: Verdict | None
    left: tuple[str, ...]


def bump(workspace: Workspace, name: str, level: Level, *, since: str | None = None, day: datetime.date) -> Bump:
    """Raise a package's version in its pyproject.toml, its changelog and every exact pin of it.

    Args:
        workspace: the working tree.
        name: the package.
        level: which part goes up.
        since: commit to compare a library with; None: its last tag, or without tags the last commit at which its
            changelog had nothing unreleased.
        day: date of the release.

    Raises:
        ReleaseError: the change requires a higher level, or the changelog has nothing under [Unreleased]. Nothing is
            written.
    """
    package = workspace[name]
    since = (since or _last_release(workspace, package)) if package.is_library else None
    verdict = None if since is None else judge_since(since, workspace, name)
    if verdict is not None and level < (needed := verdict.demands(package.version)):
        changes = "\n".join(f"  {line}" for line in verdict.lines())
        raise ReleaseError(
            f"{name} {package.version}: a {level.name.lower()} release would break users who rely on its version. "
            f"The change requires {needed.name.lower()}:\n{changes}"
        )
    text = package.changelog.read_text()
    if not changelog.unreleased(text):
        raise ReleaseError(
            f"{package.changelog.relative_to(workspace.root)} must say under '## [Unreleased]' what this release "
            "changes: it is empty."
        )
    version = raised(package.version, level)
    edits = {
        package.changelog: changelog.release(text, version, day),
        package.project_file: _replace(
            package.project_file, f'version = "{package.version}"', f'version = "{version}"'
        ),
    }
    for user in workspace.assemblies:
        if name in workspace.own(user):
            edits[user.project_file] = _replace(
                user.project_file, f'"{name}=={package.version}"', f'"{name}=={version}"'
            )
    for path, content in edits.items():
        path.write_text(content)
    return Bump(version, tag_of(name, version), since, verdict, tuple(_left(workspace, name, version)))


def _last_release(workspace: Workspace, package: Package) -> str | None:
    tagged = list(releases(workspace.root, package).values())
    if tagged:
        return tagged[-1]
    return next(settled(workspace.root, [package.changelog.relative_to(workspace.root)]), None)


def _replace(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    if text.count(old) != 1:
        raise ReleaseError(f"{path} must contain {old} exactly once: it does {text.count(old)} times.")
    return text.replace(old, new)


def _left(workspace: Workspace, name: str, version: Version) -> list[str]:
    ranges = {library.name: workspace.own(library).get(name) for library in workspace.libraries}
    return [
        f"{user} requires {requirement}, which excludes {version}: widen the range and bump {user} too"
        for user, requirement in ranges.items()
        if requirement is not None and not requirement.specifier.contains(version)
    ]
