"""Which bump a change requires: public signatures and golden values, compared with the last release."""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from packaging.version import Version

from .history import extract
from .meaning import GOLDEN, changed_meanings
from .surface import compare
from .workspace import Workspace, read_workspace


class Level(IntEnum):
    """Which part of a version goes up."""

    PATCH = 0
    MINOR = 1
    MAJOR = 2


@dataclass(frozen=True)
class Verdict:
    """What changed in a package since a released tree.

    Args:
        signatures: breaking changes of the public surface.
        meanings: golden cases whose value changed.
        added: new public names.
    """

    signatures: tuple[str, ...]
    meanings: tuple[str, ...]
    added: tuple[str, ...]

    @property
    def breaking(self) -> bool:
        """Whether code written against the released tree may fail or get other values."""
        return bool(self.signatures or self.meanings)

    def demands(self, version: Version) -> Level:
        """The smallest honest bump from a version. Before 1.0 a minor may break and a patch may add."""
        if version.major == 0:
            return Level.MINOR if self.breaking else Level.PATCH
        return Level.MAJOR if self.breaking else Level.MINOR if self.added else Level.PATCH

    def lines(self) -> list[str]:
        """What changed, one line each."""
        return [
            *(f"signature  {text}" for text in self.signatures),
            *(f"meaning    {text}" for text in self.meanings),
            *(f"added      {text}" for text in self.added),
        ]


def judge(released: Path, candidate: Workspace, library: str, *, python: Path | str = sys.executable) -> Verdict:
    """Compare a library in the working tree with a released tree.

    Args:
        released: the tree of the release, with its golden cases.
        candidate: the working tree.
        library: name of the package.
        python: an interpreter with the libraries' third-party requirements.

    Raises:
        ReleaseError: one of the trees lacks the package, or the interpreter lacks a requirement.
    """
    package = candidate[library]
    change = compare(read_workspace(released)[library].sources, package.sources, package.module)
    meanings = changed_meanings(released / GOLDEN, library, tree=candidate.root, python=python)
    return Verdict(change.breaking, tuple(meanings), change.added)


def judge_since(ref: str, candidate: Workspace, library: str) -> Verdict:
    """`judge` against a commit of the working tree's repository."""
    with tempfile.TemporaryDirectory() as folder:
        return judge(extract(candidate.root, ref, Path(folder)), candidate, library)


def raised(version: Version, level: Level) -> Version:
    """The next version at a level."""
    major, minor, patch = version.release
    parts = {Level.MAJOR: (major + 1, 0, 0), Level.MINOR: (major, minor + 1, 0), Level.PATCH: (major, minor, patch + 1)}
    return Version(".".join(map(str, parts[level])))
