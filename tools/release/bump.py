"""Raising a version: refused where the change demands more, else written to every file that repeats it."""

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
    """A version raised.

    Args:
        version: the new one.
        tag: what to tag once it is merged.
        since: commit it was compared with, None for a first release or the app.
        verdict: what changed since then.
        left: what is still to do, one sentence each.
    """

    version: Version
    tag: str
    since: str | None
    verdict: Verdict | None
    left: tuple[str, ...]


def bump(workspace: Workspace, name: str, level: Level, *, since: str | None = None, day: datetime.date) -> Bump:
    """Raise a package's version in its pyproject.toml, its changelog and the app's pin.

    Args:
        workspace: the working tree.
        name: the package.
        level: which part goes up.
        since: commit to compare with; None: the package's last tag, or without tags the last commit at which its
            changelog had nothing unreleased.
        day: date of the release.

    Raises:
        ReleaseError: the change demands a higher level, or nothing stands under [Unreleased]. Nothing is written.
    """
    package = workspace[name]
    if since is None and package.is_library:
        since = _last_release(workspace, package)
    verdict = None if since is None or not package.is_library else judge_since(since, workspace, name)
    if verdict is not None and level < (needed := verdict.demands(package.version)):
        listed = "\n".join(f"  {line}" for line in verdict.lines())
        raise ReleaseError(
            f"{name} {package.version}: a {level.name.lower()} release would break whoever trusts its version. "
            f"The change demands {needed.name.lower()}:\n{listed}"
        )
    text = package.changelog.read_text()
    if not changelog.unreleased(text):
        raise ReleaseError(
            f"{package.changelog.relative_to(workspace.root)} must say under '## [Unreleased]' what this release "
            "changes: it says nothing."
        )
    version = raised(package.version, level)
    edits = {
        package.changelog: changelog.release(text, version, day),
        package.folder / "pyproject.toml": _replaced(
            package.folder / "pyproject.toml", f'version = "{package.version}"', f'version = "{version}"'
        ),
    }
    if package.is_library:
        app = workspace.app.folder / "pyproject.toml"
        edits[app] = _replaced(app, f'"{name}=={package.version}"', f'"{name}=={version}"')
    for path, content in edits.items():
        path.write_text(content)
    return Bump(version, tag_of(name, version), since, verdict, tuple(_left(workspace, name, version)))


def _last_release(workspace: Workspace, package: Package) -> str | None:
    tagged = list(releases(workspace.root, package).values())
    if tagged:
        return tagged[-1]
    return next(settled(workspace.root, [package.changelog.relative_to(workspace.root)]), None)


def _replaced(path: Path, old: str, new: str) -> str:
    text = path.read_text()
    if text.count(old) != 1:
        raise ReleaseError(f"{path} must contain {old} exactly once: it does {text.count(old)} times.")
    return text.replace(old, new)


def _left(workspace: Workspace, name: str, version: Version) -> list[str]:
    left = []
    for package in workspace.libraries:
        requirement = workspace.own(package).get(name)
        if requirement is not None and not requirement.specifier.contains(version):
            left.append(f"{package.name} requires {requirement}, which shuts {version} out: widen it and bump it too")
    return left
