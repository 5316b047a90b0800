"""What was released: tags like `grpo-loss-v0.2.0`, and the tree as it was at one."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from packaging.version import InvalidVersion, Version

from .workspace import Package, ReleaseError


def git(root: Path, *arguments: str) -> bytes:
    """Run git in a tree and return what it printed.

    Raises:
        ReleaseError: git refuses; its own message is passed on.
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
        ReleaseError: a tag of this package that ends in no version.
    """
    found: dict[Version, str] = {}
    for tag in git(root, "tag", "--list", f"{package.name}-v*").decode().split():
        try:
            found[Version(tag.removeprefix(f"{package.name}-v"))] = tag
        except InvalidVersion as error:
            raise ReleaseError(f"tag {tag} must end in a version, as in {package.name}-v0.2.0.") from error
    return dict(sorted(found.items()))


def extract(root: Path, ref: str, target: Path) -> Path:
    """Write the tree of a commit to a folder. The repository is only read: no worktree, no branch.

    Args:
        root: the repository.
        ref: commit, tag or branch.
        target: an empty or absent folder.

    Returns:
        `target`.

    Raises:
        ReleaseError: no such commit.
    """
    with tarfile.open(fileobj=io.BytesIO(git(root, "archive", "--format=tar", ref))) as archive:
        archive.extractall(target, filter="data")
    return target


def tracked_files(root: Path, folder: Path) -> set[str]:
    """Paths under a folder that git knows, relative to it."""
    return set(git(root, "-C", str(folder), "ls-files", "-z", ".").decode().strip("\0").split("\0"))
