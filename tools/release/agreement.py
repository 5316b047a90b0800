"""Whether versions, pins, ranges, changelogs and tags agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from packaging.requirements import Requirement
from packaging.version import Version

from . import changelog
from .history import git, releases
from .workspace import Package, ReleaseError, Workspace


def disagreements(workspace: Workspace) -> list[str]:
    """Find everything that does not agree.

    Args:
        workspace: the packages of a git repository.

    Returns:
        One sentence for each disagreement; none when a release may be made.

    Raises:
        ReleaseError: the tree is not a git repository.
    """
    found = [
        f"{package.name}: {text}" for package in workspace.packages.values() for text in _check(workspace, package)
    ]
    return [*found, *_floors(workspace)]


def _check(workspace: Workspace, package: Package) -> Iterator[str]:
    if len(package.version.release) != 3 or package.version.is_prerelease or package.version.local:
        yield f"version must be MAJOR.MINOR.PATCH: got {package.version}"
    own = workspace.own(package)
    for name, requirement in own.items():
        yield from (_range(requirement, workspace[name]) if package.is_library else _pin(requirement, workspace[name]))
    if not package.is_library:
        below = {name: sister for sister in own for name in workspace.own(workspace[sister])}
        yield from (f"must also pin {name}, which {below[name]} requires" for name in sorted(below.keys() - own.keys()))
    for requirement in (*workspace.foreign(package), *package.extras):
        operators = {specifier.operator for specifier in requirement.specifier}
        if not operators <= {">=", "!="} or ">=" not in operators:
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
            f"requires {requirement}, which excludes {sister.name} {sister.version} of this tree: "
            "widen the range and bump this library too"
        )
    # A library before 1.0 may break with any minor, so a range that admits the next minor promises what nobody tested.
    release = sister.version.release
    next_breaking = Version(f"0.{release[1] + 1}.0" if release[0] == 0 else f"{release[0] + 1}.0.0")
    if requirement.specifier.contains(next_breaking):
        yield f"requires {requirement}, which admits {next_breaking}, which may break it: use ~= or an upper bound"


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
        yield f"src/ differs from {tag}, and CHANGELOG.md has nothing under [Unreleased]"


def _changed(workspace: Workspace, package: Package, tag: str) -> bool:
    try:
        git(workspace.root, "diff", "--quiet", tag, "--", str(package.sources.relative_to(workspace.root)))
    except ReleaseError:
        return True
    return False


def _floors(workspace: Workspace) -> Iterator[str]:
    users: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for package in workspace.packages.values():
        for requirement in (*workspace.foreign(package), *package.extras):
            users[requirement.name][str(requirement.specifier)].append(package.name)
    for name, by_range in users.items():
        if len(by_range) > 1:
            ranges = "; ".join(f"{range_} in {', '.join(packages)}" for range_, packages in by_range.items())
            yield f"{name} must have one floor in all packages: got {ranges}"
