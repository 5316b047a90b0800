"""The compatibility matrix: the released trainer and apps with one package at a time swapped for the working tree's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement
from packaging.version import Version

from . import fresh
from .artifacts import build
from .history import extract, git, settled, tag_of, tagged
from .verdict import Level, Verdict, judge, raised
from .workspace import Package, ReleaseError, Workspace, read_workspace

# A whole run on a toy policy, through all four libraries: rollout, update, checkpoint, evaluation.
LOOP_TEST = Path("tests/test_train.py"), "test_a_run_leaves_what_it_promises"

Outcomes = Mapping[str, fresh.Outcome]


@dataclass(frozen=True)
class Row:
    """One package's line of the matrix.

    Args:
        swapped: the package.
        pinned: version that the released trainer and apps pin.
        candidate: version of the working tree.
        verdict: what changed; None if the sources are the same. Only libraries are compared; the trainer's is empty.
        forward: the candidate under the released trainer and apps: how their tests ended, by name.
        reverse: the released package under the trainer and apps of the working tree; None: not asked for. It shows
            whether they need the new one, and demands no version.
    """

    swapped: str
    pinned: Version
    candidate: Version
    verdict: Verdict | None = None
    forward: Outcomes | None = None
    reverse: Outcomes | None = None

    @property
    def honest(self) -> Level | None:
        """The smallest honest bump; None if nothing changed."""
        if self.verdict is None or self.forward is None:
            return None
        breaking = Level.MINOR if self.pinned.major == 0 else Level.MAJOR
        demanded = self.verdict.demands(self.pinned)
        return demanded if all(outcome.passed for outcome in self.forward.values()) else max(demanded, breaking)

    @property
    def holds(self) -> bool:
        """Whether nothing breaks, or the candidate's version admits that something does."""
        if self.honest is None or self.honest == Level.PATCH:
            return True
        return self.candidate >= raised(self.pinned, self.honest)


def last_release(repository: Path, candidate: Workspace) -> str:
    """Find the release that users have: the newest in which some library differs from the working tree.

    A version that was just raised is thus compared with the one before it. Releases are the tags of the trainer and
    the apps; in a repository without any, the commits at which no changelog had anything unreleased.

    Args:
        repository: where tags and commits are.
        candidate: the working tree.

    Returns:
        A tag or commit; the newest release if none differs.

    Raises:
        ReleaseError: nothing was ever released.
    """
    changelogs = [package.changelog.relative_to(candidate.root) for package in candidate.packages.values()]
    names = [package.name for package in candidate.assemblies]
    newest = None
    for ref in tagged(repository, names) or settled(repository, changelogs):
        newest = newest or ref
        with TemporaryDirectory() as folder:
            before = read_workspace(extract(repository, ref, Path(folder))).packages
            if any(
                library.name in before and before[library.name].contents() != library.contents()
                for library in candidate.libraries
            ):
                return ref
    if newest is None:
        raise ReleaseError(
            f"{repository} must contain a release: there is neither a tag such as {names[-1]}-v0.1.0 nor a commit "
            "whose changelogs have nothing unreleased. Fetch the whole history, or name a commit (`--baseline REF`)."
        )
    return newest


def compatibility(
    candidate: Workspace,
    scratch: Path,
    *,
    repository: Path,
    baseline: str,
    reverse: bool = False,
    progress: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Swap each changed package for the candidate and run the tests of the released trainer and apps.

    Args:
        candidate: the working tree.
        scratch: an empty folder for trees, wheels and environments.
        repository: where tags and commits are.
        baseline: commit of the released trainer and apps; a pinned version without a tag is taken from it, too.
        reverse: also put each released package under the trainer and apps of the working tree.
        progress: called with a line before each stage.

    Yields:
        One row for each package that the trainer or an app pins.

    Raises:
        ReleaseError: a build failed, or the trainer or an app fails with its own pins, whatever the candidate.
    """
    tree = read_workspace(extract(repository, baseline, scratch / "baseline"))
    pins = {name: requirement for user in tree.assemblies for name, requirement in tree.own(user).items()}
    released = Workspace(
        tree.root,
        {
            name: _at_pin(package, pins[name], repository, scratch) if name in pins else package
            for name, package in tree.packages.items()
        },
    )
    # Most programs are the same whichever package was swapped, and compiling them takes most of the time.
    compiled = scratch / "compiled"
    old = _Installed(f"the release {baseline}", released, candidate, scratch / "released", compiled, progress)
    new = _Installed("the working tree", candidate, candidate, scratch / "candidate", compiled, progress)
    for name in (name for name in released.packages if name in pins and name in candidate.packages):
        before, after = released[name], candidate[name]
        if before.contents() == after.contents():
            yield Row(name, before.version, after.version)
            continue
        forward, verdict = old.swap(after), Verdict((), (), ())
        if after.is_library:
            verdict = judge(before.folder.parents[1], candidate, name, python=old.environment[0])
        yield Row(name, before.version, after.version, verdict, forward, new.swap(before) if reverse else None)


def _at_pin(package: Package, pin: Requirement, repository: Path, scratch: Path) -> Package:
    """The package as the released apps pin it: at its tag, or in the baseline if that version has no tag yet."""
    version = next(iter(pin.specifier)).version
    tag = tag_of(package.name, Version(version))
    if git(repository, "tag", "--list", tag).strip():
        return read_workspace(extract(repository, tag, scratch / tag))[package.name]
    if str(package.version) != version:
        raise ReleaseError(f"the released apps pin {pin}, and there is no tag {tag}: tag that release.")
    return package


@dataclass(frozen=True)
class _Installed:
    """An environment with the trainer and apps on their own pins, made when first needed.

    Args:
        origin: where they are from, for messages.
        workspace: they and the libraries.
        tools: the tree whose test tools run their tests.
        scratch: folder for wheels, tests and the environment.
        compiled: folder of jax's persistent compilation cache.
        progress: called with a line before each stage.
    """

    origin: str
    workspace: Workspace
    tools: Workspace
    scratch: Path
    compiled: Path
    progress: Callable[[str], None]

    @cached_property
    def environment(self) -> tuple[Path, dict[str, Path]]:
        """The interpreter, and folders of the tests by package, once all tests passed."""
        build(self.workspace.libraries, self.scratch, wheels_only=True)
        build(self.workspace.assemblies, self.scratch)
        python = fresh.create(self.scratch / "environment")
        fresh.install_packages(python, self.workspace, self.workspace.assemblies, self.scratch)
        fresh.install(python, self.tools.test_requirements(self.tools.assemblies[0]))
        tests = {
            package.name: fresh.unpack_tests(self.scratch / package.sdist, self.scratch / package.name)
            for package in self.workspace.assemblies
        }
        self.progress(f"{self.origin} with its own pins")
        for name, outcome in self.run(python, tests).items():
            if not outcome.passed:
                raise ReleaseError(f"{name} must pass with its own pins:\n{outcome.output}")
        return python, tests

    def run(self, python: Path, tests: Mapping[str, Path]) -> Outcomes:
        """Run the loop of each package that tests it, and all fast tests of the others."""
        file, name = LOOP_TEST
        return {
            package: fresh.run_tests(
                python,
                folder,
                [f"{file}::{name}" if (folder / file).exists() else "tests"],
                compiled=self.compiled,
            )
            for package, folder in tests.items()
        }

    def swap(self, package: Package) -> Outcomes:
        """Install another version of one package, run the tests of its users, and put the old one back."""
        python, tests = self.environment
        users = [user.name for user in self.workspace.assemblies if package.name in self.workspace.own(user)]
        self.progress(f"{self.origin} with {package.name} {package.version}")
        (wheel,) = build([package], self.scratch / "swapped", wheels_only=True)
        fresh.swap(python, wheel)
        outcomes = self.run(python, {name: tests[name] for name in users})
        fresh.swap(python, self.scratch / self.workspace[package.name].wheel)
        return outcomes


def table(rows: Sequence[Row]) -> str:
    """Format the matrix as text, with the details of each row below it."""
    users = list(dict.fromkeys(name for row in rows for name in row.forward or ()))
    head = ("swapped", "pinned", "candidate", "signatures", "meaning", *users, "honest bump", "reverse")
    cells = [head, *((*_cells(row), *_results(row, users)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    for row in rows:
        lines += [f"{row.swapped}: {detail}" for detail in (row.verdict.lines() if row.verdict else ())]
        for direction, outcomes in (("fails", row.forward), ("fails in reverse", row.reverse)):
            failed = {name: outcome for name, outcome in (outcomes or {}).items() if not outcome.passed}
            lines += [f"{row.swapped}: {name} {direction}: {outcome.reason}" for name, outcome in failed.items()]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.swapped, str(row.pinned), str(row.candidate))
    if row.verdict is None:
        return (*start, "same", "same")
    return (
        *start,
        f"{len(row.verdict.signatures)} broken" if row.verdict.signatures else "hold",
        f"{len(row.verdict.meanings)} changed" if row.verdict.meanings else "holds",
    )


def _results(row: Row, users: Sequence[str]) -> tuple[str, ...]:
    forward, reverse = row.forward or {}, row.reverse
    return (
        *(("passes" if forward[user].passed else "fails") if user in forward else "-" for user in users),
        "none" if row.honest is None else row.honest.name.lower(),
        "-" if reverse is None else "passes" if all(outcome.passed for outcome in reverse.values()) else "fails",
    )
