"""The packages of this repository, read from their pyproject files: names, versions, requirements."""

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
        folder: where its pyproject.toml is.
        metadata: the `[project]` table.
        is_library: libraries require each other by range; the trainer and the apps pin exactly.
    """

    folder: Path
    metadata: dict[str, Any]
    is_library: bool

    @property
    def name(self) -> str:
        """The distribution: `grpo-loss`."""
        return self.metadata["name"]

    @property
    def module(self) -> str:
        """The import name: `grpo_loss`."""
        return self.name.replace("-", "_")

    @cached_property
    def version(self) -> Version:
        """The version that a release of this tree would have."""
        try:
            return Version(self.metadata["version"])
        except InvalidVersion as error:
            raise ReleaseError(f"{self.name}: version must be like 0.2.0: got {self.metadata['version']!r}.") from error

    @cached_property
    def requirements(self) -> list[Requirement]:
        """Declared dependencies, without extras."""
        return [Requirement(line) for line in self.metadata["dependencies"]]

    @cached_property
    def extras(self) -> list[Requirement]:
        """Declared dependencies of all extras."""
        groups = self.metadata.get("optional-dependencies", {})
        return [Requirement(line) for lines in groups.values() for line in lines]

    @property
    def project_file(self) -> Path:
        """Its pyproject.toml."""
        return self.folder / "pyproject.toml"

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
        """File name of the wheel built from this tree."""
        return f"{self.module}-{self.version}-py3-none-any.whl"

    @property
    def sdist(self) -> str:
        """File name of the source distribution built from this tree."""
        return f"{self.module}-{self.version}.tar.gz"

    def contents(self) -> dict[str, bytes]:
        """Every source file, by its path in `sources`."""
        return {
            str(path.relative_to(self.sources)): path.read_bytes()
            for path in sorted(self.sources.rglob("*"))
            if path.is_file() and "__pycache__" not in path.parts
        }


@dataclass(frozen=True)
class Workspace:
    """All packages of one tree, in an order in which each follows those it requires.

    Args:
        root: the tree.
        packages: by name.
    """

    root: Path
    packages: dict[str, Package]

    @property
    def libraries(self) -> list[Package]:
        """The packages that require their sisters by range."""
        return [package for package in self.packages.values() if package.is_library]

    @property
    def assemblies(self) -> list[Package]:
        """The packages that pin their sisters exactly: the trainer, then the apps."""
        return [package for package in self.packages.values() if not package.is_library]

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
        """What a package's tests need beside it, according to the root pyproject.toml."""
        root = tomllib.loads((self.root / "pyproject.toml").read_text())
        environment = root["tool"]["hatch"]["envs"].get(str(package.folder.relative_to(self.root)), {})
        return [*root["dependency-groups"]["tests"], *environment.get("dependencies", ())]


def read_workspace(root: Path = ROOT) -> Workspace:
    """Read every `libs/*/pyproject.toml` and `apps/*/pyproject.toml` of a tree.

    Args:
        root: the tree.

    Returns:
        The workspace.

    Raises:
        ReleaseError: there are none, or they require each other in a circle.
    """
    waiting = [
        Package(path.parent, tomllib.loads(path.read_text())["project"], is_library=kind == "libs")
        for kind in ("libs", "apps")
        for path in sorted((root / kind).glob("*/pyproject.toml"))
    ]
    if not waiting:
        raise ReleaseError(f"{root} must hold libs/*/pyproject.toml: found none.")
    packages: dict[str, Package] = {}
    while waiting:
        names = {package.name for package in waiting}
        ready = [package for package in waiting if names.isdisjoint(r.name for r in package.requirements)]
        if not ready:
            raise ReleaseError(f"packages must not require each other in a circle: {', '.join(sorted(names))} do.")
        packages |= {package.name: package for package in ready}
        waiting = [package for package in waiting if package.name not in packages]
    return Workspace(root, packages)
