"""Whether versions, pins, ranges, changelogs and tags tell the same story."""

from __future__ import annotations

from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from . import changelog
from .history import git, releases
from .workspace import Package, ReleaseError, Workspace


def disagreements(workspace: Workspace) -> list[str]:
    """Everything that does not agree, one sentence each; empty when a release may be cut.

    Args:
        workspace: the packages of a git repository.

    Raises:
        ReleaseError: the tree is no git repository.
    """
    found: list[str] = []
    for package in workspace.packages.values():
        found += [f"{package.name}: {text}" for text in _of_package(workspace, package)]
    found += _floors(workspace)
    return found


def _of_package(workspace: Workspace, package: Package) -> Iterator[str]:
    if len(package.version.release) != 3 or package.version.is_prerelease or package.version.local:
        yield f"version must be MAJOR.MINOR.PATCH: got {package.version}"
    for name, requirement in workspace.own(package).items():
        yield from (_range(requirement, workspace[name]) if package.is_library else _pin(requirement, workspace[name]))
    for requirement in workspace.foreign(package):
        operators = {specifier.operator for specifier in requirement.specifier}
        if not operators or not operators <= {">=", "!="} or ">=" not in operators:
            yield f"{requirement} must be a floor (>=), with != for versions known to be bad"
    if not package.changelog.exists():
        yield "has no CHANGELOG.md"
    else:
        text = package.changelog.read_text()
        yield from (f"CHANGELOG.md {problem}" for problem in changelog.problems(text, package.version))
        yield from _tags(workspace, package, text)


def _pin(requirement: Requirement, sister: Package) -> Iterator[str]:
    if str(requirement.specifier) != f"=={sister.version}":
        yield f"pins {requirement}: must be {sister.name}=={sister.version}, the version in this tree"


def _range(requirement: Requirement, sister: Package) -> Iterator[str]:
    if not requirement.specifier.contains(sister.version):
        yield (
            f"requires {requirement}, which does not admit {sister.name} {sister.version} of this tree: "
            "widen the range and bump this library too"
        )
    # A library before 1.0 may break with any minor, so a range that admits the next minor promises what nobody tested.
    release = sister.version.release
    next_breaking = Version(f"0.{release[1] + 1}.0" if release[0] == 0 else f"{release[0] + 1}.0.0")
    if requirement.specifier.contains(next_breaking):
        yield f"requires {requirement}, which admits {next_breaking}, which may break it: use ~= or an upper end"


def _tags(workspace: Workspace, package: Package, text: str) -> Iterator[str]:
    tagged = releases(workspace.root, package)
    written = {section.title for section in changelog.released(text)}
    for version, tag in tagged.items():
        if str(version) not in written:
            yield f"tag {tag} has no section [{version}] in CHANGELOG.md"
    if not tagged:
        return
    newest, tag = list(tagged.items())[-1]
    if newest > package.version:
        yield f"tag {tag} is newer than the version in pyproject.toml, {package.version}"
    elif newest == package.version and _changed(workspace, package, tag) and not changelog.unreleased(text):
        yield f"src/ differs from {tag}, and nothing stands under [Unreleased] in CHANGELOG.md"


def _changed(workspace: Workspace, package: Package, tag: str) -> bool:
    sources = str(package.sources.relative_to(workspace.root))
    try:
        git(workspace.root, "diff", "--quiet", tag, "--", sources)
    except ReleaseError:
        return True
    return False


def _floors(workspace: Workspace) -> Iterator[str]:
    floors: dict[str, dict[str, list[str]]] = {}
    for package in workspace.packages.values():
        for requirement in workspace.foreign(package):
            users = floors.setdefault(requirement.name, {}).setdefault(str(requirement.specifier), [])
            users.append(package.name)
    for name, by_range in floors.items():
        if len(by_range) > 1:
            told = "; ".join(f"{range_} in {', '.join(users)}" for range_, users in by_range.items())
            yield f"{name}: one floor for all: got {told}"
