"""The dependency graph as text, from metadata alone."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement

from .workspace import Package, Workspace


def graph(workspace: Workspace) -> str:
    """Draw what every package requires: its sisters first, each expanded where it first appears, then third parties.

    Args:
        workspace: the packages.

    Returns:
        One tree for each package that no other requires.
    """
    required = {name for package in workspace.packages.values() for name in workspace.own(package)}
    drawn: set[str] = set()
    return "\n".join(
        line
        for name, top in workspace.packages.items()
        if name not in required
        for line in (f"{name} {top.version}", *_below(workspace, top, "", drawn))
    )


def _below(workspace: Workspace, package: Package, indent: str, drawn: set[str]) -> Iterator[str]:
    own = list(workspace.own(package).values())
    # Third parties that a sister brings anyway are drawn below the sister.
    inherited = {r.name for sister in own for r in workspace.foreign(workspace[sister.name])}
    children: list[Requirement] = [*own, *(r for r in workspace.foreign(package) if r.name not in inherited)]
    for index, requirement in enumerate(children):
        last = index == len(children) - 1
        name = requirement.name
        yield f"{indent}{'└── ' if last else '├── '}{name} {_format(requirement)}"
        if name in workspace.packages and name not in drawn:
            drawn.add(name)
            yield from _below(workspace, workspace[name], indent + ("    " if last else "│   "), drawn)


def _format(requirement: Requirement) -> str:
    return ",".join(sorted(map(str, requirement.specifier), reverse=True)) or "(any version)"
