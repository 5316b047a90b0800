"""The dependency graph as text, from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement

from .workspace import Package, Workspace


def graph(workspace: Workspace) -> str:
    """Draw what every package requires, sisters first and opened up, third parties as leaves.

    Args:
        workspace: the packages.

    Returns:
        One tree a package that no other requires.
    """
    required = {name for package in workspace.packages.values() for name in workspace.own(package)}
    tops = [package for name, package in workspace.packages.items() if name not in required]
    return "\n".join(line for top in tops for line in (f"{top.name} {top.version}", *_below(workspace, top, "")))


def _below(workspace: Workspace, package: Package, indent: str) -> Iterator[str]:
    own = list(workspace.own(package).values())
    inherited = {r.name for sister in own for r in workspace.foreign(workspace[sister.name])}
    # What a sister brings anyway is drawn there; a leaf here is a dependency that would go with this package.
    leaves = [r for r in workspace.foreign(package) if r.name not in inherited]
    children: list[Requirement] = [*own, *leaves]
    for index, requirement in enumerate(children):
        last = index == len(children) - 1
        yield f"{indent}{'└── ' if last else '├── '}{requirement.name} {_written(requirement)}"
        if requirement.name in workspace.packages:
            yield from _below(workspace, workspace[requirement.name], indent + ("    " if last else "│   "))


def _written(requirement: Requirement) -> str:
    return ",".join(sorted(map(str, requirement.specifier), reverse=True)) or "(any version)"
