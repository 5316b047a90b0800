"""What was released: tags like `grpo-loss-v0.2.0`, or commits with nothing under [Unreleased]; trees of commits."""

from __future__ import annotations

import io
import subprocess
import tarfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from packaging.version import InvalidVersion, Version

from . import changelog
from .workspace import Package, ReleaseError


def git(root: Path, *arguments: str) -> bytes:
    """Run git in a tree and return its output.

    Raises:
        ReleaseError: git fails; the message is its own.
    """
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, check=False)
    if done.returncode:
        raise ReleaseError(f"git {' '.join(arguments)}: {done.stderr.decode().strip()}")
    return done.stdout


def tag_of(name: str, version: Version) -> str:
    """The tag of a release."""
    return f"{name}-v{version}"


def releases(root: Path, package: Package) -> dict[Version, str]:
    """Every tagged version of a package with its tag, oldest first.

    Raises:
        ReleaseError: a tag of this package does not end in a version.
    """
    found: dict[Version, str] = {}
    for tag in git(root, "tag", "--list", f"{package.name}-v*").decode().split():
        try:
            found[Version(tag.removeprefix(f"{package.name}-v"))] = tag
        except InvalidVersion as error:
            raise ReleaseError(f"tag {tag} must end in a version, as in {package.name}-v0.2.0.") from error
    return dict(sorted(found.items()))


def tagged(root: Path, names: Sequence[str]) -> list[str]:
    """Find the release tags of some packages that HEAD contains, newest first, one for each commit."""
    patterns = [f"--decorate-refs=refs/tags/{name}-v*" for name in names]
    lines = git(root, "log", "--topo-order", "--simplify-by-decoration", *patterns, "--format=%D", "HEAD").decode()
    return [line.split(", ")[0].removeprefix("tag: ") for line in lines.splitlines() if line]


def settled(root: Path, changelogs: Sequence[Path]) -> Iterator[str]:
    """Find commits that count as releases in a repository without tags, newest first.

    At such a commit each changelog that exists has a release and nothing under [Unreleased]. Every later change adds a
    line there, so the newest of these commits is the last one with the released sources.

    Args:
        root: the repository. Only first parents of its HEAD are walked: the commits that were main at the time.
        changelogs: which ones, relative to the root.
    """
    paths = list(map(str, changelogs))

    @cache
    def is_settled(blob: str) -> bool:
        text = git(root, "cat-file", "blob", blob).decode()
        return bool(changelog.released(text)) and not changelog.unreleased(text)

    for commit in git(root, "rev-list", "--first-parent", "HEAD").decode().split():
        blobs = git(root, "ls-tree", "--format=%(objectname)", commit, "--", *paths).decode().split()
        if blobs and all(map(is_settled, blobs)):
            yield commit


def extract(root: Path, ref: str, target: Path) -> Path:
    """Write the tree of a commit to a folder, without a worktree or branch in the repository.

    Args:
        root: the repository.
        ref: commit, tag or branch.
        target: an empty or absent folder.

    Returns:
        `target`.

    Raises:
        ReleaseError: there is no such commit.
    """
    with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "--format=tar", ref))) as archive:
        archive.extractall(target, filter="data")
    return target


def tracked_files(root: Path, folder: Path) -> set[str]:
    """Paths of the tracked files in a folder, relative to it."""
    return set(git(root, "-C", str(folder), "ls-files", "-z", ".").decode().strip("\0").split("\0"))
