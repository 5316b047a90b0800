"""Wheels and source distributions: built from the tree, and inspected."""

from __future__ import annotations

import email.message
import email.parser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from .history import tracked_files
from .workspace import Package, ReleaseError, Workspace

_SDIST_EXTRA = {"PKG-INFO", ".gitignore", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
_REQUIRED_METADATA = (
    "Summary",
    "Description-Content-Type",
    "License-Expression",
    "License-File",
    "Author",
    "Keywords",
    "Classifier",
    "Requires-Python",
    "Project-URL",
)


def uv(*arguments: str, cwd: Path | None = None) -> str:
    """Run uv and return its output.

    Raises:
        ReleaseError: uv is missing, or fails; the message is its own.
    """
    found = shutil.which("uv", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        raise ReleaseError("uv must be on the PATH: `pip install uv`, or use `hatch run release:...`.")
    done = subprocess.run([found, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ReleaseError(f"uv {' '.join(arguments)} failed:\n{done.stderr.strip()}")
    return done.stdout


def build(packages: list[Package], target: Path, *, wheels_only: bool = False) -> list[Path]:
    """Build a source distribution of every package, and a wheel from each source distribution.

    A wheel built that way proves that the source distribution is complete.

    Args:
        packages: what to build.
        target: folder for the files.
        wheels_only: build the wheels directly from the tree, which is faster.

    Returns:
        The files, each wheel after its source distribution.

    Raises:
        ReleaseError: a build failed.
    """
    files: list[Path] = []
    for package in packages:
        uv("build", "--quiet", *(("--wheel",) if wheels_only else ()), "--out-dir", str(target), str(package.folder))
        files += [target / package.wheel] if wheels_only else [target / package.sdist, target / package.wheel]
    return files


def inspect(workspace: Workspace, package: Package, folder: Path) -> list[str]:
    """Check that a package's two built files contain what they should and nothing else.

    Args:
        workspace: the tree they were built from, a git repository.
        package: the package.
        folder: of the files.

    Returns:
        One sentence for each problem.
    """
    known = tracked_files(workspace.root, package.folder)
    found = [f"{package.wheel}: {text}" for text in _wheel(package, folder / package.wheel, known)]
    return found + [f"{package.sdist}: {text}" for text in _sdist(package, folder / package.sdist, known)]


def twine_check(files: list[Path]) -> list[str]:
    """Ask twine whether an index would accept and render built files; return its complaints."""
    command = [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else [f"twine check: {(done.stdout + done.stderr).strip()}"]


def _wheel(package: Package, path: Path, known: set[str]) -> Iterator[str]:
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        metadata_folder = f"{package.module}-{package.version}.dist-info/"
        expected = {name.removeprefix("src/") for name in known if name.startswith(f"src/{package.module}/")}
        expected |= {metadata_folder + name for name in ("METADATA", "WHEEL", "RECORD", "licenses/LICENSE")}
        if "scripts" in package.metadata:
            expected.add(f"{metadata_folder}entry_points.txt")
        yield from _difference(names, expected)
        if f"{package.module}/py.typed" not in names:
            yield f"{package.module}/py.typed is missing: without it the package is untyped for its users"
        if f"{metadata_folder}METADATA" in names:
            text = wheel.read(f"{metadata_folder}METADATA").decode()
            yield from _metadata(email.parser.HeaderParser().parsestr(text), text.partition("\n\n")[2])


def _sdist(package: Package, path: Path, known: set[str]) -> Iterator[str]:
    with tarfile.open(path) as archive:
        top = f"{package.module}-{package.version}/"
        names = {member.name.removeprefix(top) for member in archive.getmembers() if member.isfile()}
    yield from _difference(names, {name for name in known if name.startswith(("src/", "tests/"))} | _SDIST_EXTRA)


def _difference(names: set[str], expected: set[str]) -> Iterator[str]:
    yield from (f"contains {name}, which is not in git or does not belong there" for name in sorted(names - expected))
    yield from (f"lacks {name}" for name in sorted(expected - names))


def _metadata(fields: email.message.Message, readme: str) -> Iterator[str]:
    yield from (f"METADATA lacks {field}" for field in _REQUIRED_METADATA if not fields[field])
    if "Typing :: Typed" not in (fields.get_all("Classifier") or []):
        yield "METADATA lacks the classifier 'Typing :: Typed'"
    if len(readme.split()) < 20:
        yield "the README, which is the package's page on an index, has fewer than 20 words"
