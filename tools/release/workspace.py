"""The packages of this repository, read from their pyproject files: names, versions, what each requires."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).parents[2]


class ReleaseError(RuntimeError):
    """A release step cannot be done; the message says what must hold."""


@dataclass(frozen=True)
class Package:
    """One package of the repository.

    Args:
        folder: where its pyproject.toml lies.
        metadata: the `[project]` table.
        is_library: libraries are compared, swapped and ranged; the app is pinned to them.
    """

    folder: Path
    metadata: dict[str, Any]
    is_library: bool

    @property
    def name(self) -> str:
        """As on an index: `grpo-loss`."""
        return self.metadata["name"]

    @property
    def module(self) -> str:
        """As it is imported: `grpo_loss`."""
        return self.name.replace("-", "_")

    @cached_property
    def version(self) -> Version:
        """The version the working tree would release."""
        try:
            return Version(self.metadata["version"])
        except InvalidVersion as error:
            raise ReleaseError(f"{self.name}: version must be like 0.2.0: got {self.metadata['version']!r}.") from error

    @cached_property
    def requirements(self) -> list[Requirement]:
        """What it declares, without extras."""
        return [Requirement(line) for line in self.metadata["dependencies"]]

    @property
    def sources(self) -> Path:
        """The folder that goes on the import path."""
        return self.folder / "src"

    @property
    def changelog(self) -> Path:
        """Its Keep-a-Changelog file."""
        return self.folder / "CHANGELOG.md"

    @property
    def wheel(self) -> str:
        """File name of the wheel this tree builds."""
        return f"{self.module}-{self.version}-py3-none-any.whl"

    @property
    def sdist(self) -> str:
        """File name of the source distribution this tree builds."""
        return f"{self.module}-{self.version}.tar.gz"


@dataclass(frozen=True)
class Workspace:
    """All packages of one tree, libraries before the app.

    Args:
        root: the tree.
        packages: by name.
    """

    root: Path
    packages: dict[str, Package]

    @property
    def libraries(self) -> list[Package]:
        """The packages that can be installed alone."""
        return [package for package in self.packages.values() if package.is_library]

    @property
    def app(self) -> Package:
        """The package that pins the libraries."""
        (app,) = (package for package in self.packages.values() if not package.is_library)
        return app

    def __getitem__(self, name: str) -> Package:
        if name not in self.packages:
            raise ReleaseError(f"no package {name!r} here. There are {', '.join(self.packages)}.")
        return self.packages[name]

    def own(self, package: Package) -> dict[str, Requirement]:
        """What a package requires of its sisters, by name."""
        return {r.name: r for r in package.requirements if r.name in self.packages}

    def foreign(self, package: Package) -> list[Requirement]:
        """What a package requires of third parties."""
        return [r for r in package.requirements if r.name not in self.packages]

    def test_requirements(self, package: Package) -> list[str]:
        """What the tests of a library need beside it: its environment in the root pyproject.toml."""
        environments = tomllib.loads((self.root / "pyproject.toml").read_text())["tool"]["hatch"]["envs"]
        key = str(package.folder.relative_to(self.root)) if package.is_library else "default"
        return environments[key]["dependencies"]


def read_workspace(root: Path = ROOT) -> Workspace:
    """Read every `libs/*/pyproject.toml` and `apps/*/pyproject.toml` of a tree.

    Args:
        root: the tree.

    Returns:
        The workspace.

    Raises:
        ReleaseError: nothing is there.
    """
    packages: dict[str, Package] = {}
    for kind in ("libs", "apps"):
        for path in sorted((root / kind).glob("*/pyproject.toml")):
            metadata = tomllib.loads(path.read_text())["project"]
            packages[metadata["name"]] = Package(path.parent, metadata, is_library=kind == "libs")
    if not packages:
        raise ReleaseError(f"{root} must hold libs/*/pyproject.toml: found none.")
    return Workspace(root, packages)
