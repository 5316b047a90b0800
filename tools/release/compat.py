"""The compatibility matrix: the released app with one library at a time swapped for the working tree's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.version import Version

from . import fresh
from .artifacts import build
from .history import extract, git, releases, settled, tag_of
from .verdict import Level, Verdict, judge, raised
from .workspace import Package, ReleaseError, Workspace, read_workspace

# The app's whole loop on a toy policy, through all four libraries: rollout, update, checkpoint, evaluation.
APP_TESTS = ("tests/test_train.py::test_a_run_leaves_what_it_promises",)


@dataclass(frozen=True)
class Row:
    """One library's line of the matrix.

    Args:
        library: the package that was swapped.
        pinned: version the released app pins.
        candidate: version the working tree calls itself.
        verdict: what changed; None where the sources are the same.
        app: how the released app's tests ended with the candidate in place; None where the sources are the same.
    """

    library: str
    pinned: Version
    candidate: Version
    verdict: Verdict | None = None
    app: fresh.Outcome | None = None

    @property
    def honest(self) -> Level | None:
        """The smallest bump that does not lie; None where nothing changed."""
        if self.verdict is None:
            return None
        breaking = Level.MINOR if self.pinned.major == 0 else Level.MAJOR
        demanded = self.verdict.demands(self.pinned)
        return demanded if self.app is None or self.app.passed else max(demanded, breaking)

    @property
    def holds(self) -> bool:
        """Whether nothing breaks, or the candidate's version admits that something does."""
        if self.honest is None or self.honest == Level.PATCH:
            return True
        return self.candidate >= raised(self.pinned, self.honest)


def last_release(repository: Path, candidate: Workspace) -> str:
    """The commit of the app that users have: its newest release in which a library was not yet what it is now.

    So a version that was just raised is compared with the one before it. Releases are the app's tags; in a repository
    without any, the commits at which no changelog had anything unreleased.

    Args:
        repository: where tags and commits are.
        candidate: the working tree.

    Returns:
        A tag or commit; the newest release where all have the libraries of now.

    Raises:
        ReleaseError: nothing was ever released.
    """
    changelogs = [package.changelog.relative_to(candidate.root) for package in candidate.packages.values()]
    tagged = list(reversed(releases(repository, candidate.app).values()))
    newest = None
    for ref in tagged or settled(repository, changelogs):
        newest = newest or ref
        with TemporaryDirectory() as folder:
            before = read_workspace(extract(repository, ref, Path(folder)))
            if any(_sources(before[library.name]) != _sources(library) for library in candidate.libraries):
                return ref
    if newest is None:
        tag = tag_of(candidate.app.name, candidate.app.version)
        raise ReleaseError(
            f"{repository} must hold a release of {candidate.app.name}: there is neither a tag {tag} nor a commit "
            "whose changelogs have nothing unreleased. Fetch the whole history, or name a commit (`--baseline REF`)."
        )
    return newest


def compatibility(
    candidate: Workspace,
    scratch: Path,
    *,
    repository: Path,
    baseline: str,
    tests: Sequence[str] = APP_TESTS,
    say: Callable[[str], None] = print,
) -> Iterator[Row]:
    """Swap each changed library for the candidate and run the released app's tests.

    Args:
        candidate: the working tree.
        scratch: an empty folder for trees, wheels and one environment.
        repository: where tags and commits are.
        baseline: commit of the released app; it also stands for pinned versions that have no tag yet.
        tests: the app's tests to run.
        say: told about each stage.

    Yields:
        A row a library.

    Raises:
        ReleaseError: a build fails, or the app fails on its own pins, which no candidate can mend.
    """
    tree = read_workspace(extract(repository, baseline, scratch / "baseline"))
    released = {package.name: _released(package, repository, tree, scratch) for package in tree.libraries}
    changed = {name for name, package in released.items() if _sources(package) != _sources(candidate[name])}
    python = folder = None
    wheels = scratch / "wheels"
    # Most programs are the same whichever library was swapped, and compiling them is most of the time.
    compiled = scratch / "compiled"
    for name, package in released.items():
        new = candidate[name]
        if name not in changed:
            yield Row(name, package.version, new.version)
            continue
        if python is None or folder is None:
            say(f"the app of {baseline} with its own pins")
            python, folder = _app(tree, released, wheels, scratch)
            if not (outcome := fresh.run_tests(python, folder, tests, compiled=compiled)).passed:
                raise ReleaseError(f"the app must pass with its own pins:\n{outcome.output}")
        say(f"the same with {name} of the working tree")
        (wheel,) = build([new], scratch / "candidates" / name, wheels_only=True)
        fresh.swap(python, wheel)
        app = fresh.run_tests(python, folder, tests, compiled=compiled)
        fresh.swap(python, wheels / package.wheel)
        verdict = judge(package.folder.parents[1], candidate, name, python=python)
        yield Row(name, package.version, new.version, verdict, app)


def table(rows: Sequence[Row]) -> str:
    """The matrix as text, and below it what stands behind each line."""
    head = ("swapped", "pinned", "candidate", "signatures", "meaning", "app", "honest bump")
    cells = [head, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    for row in rows:
        details = row.verdict.lines() if row.verdict else []
        if row.app is not None and not row.app.passed:
            details.append(f"app        {row.app.reason}")
        lines += [f"{row.library}: {detail}" for detail in details]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    start = (row.library, str(row.pinned), str(row.candidate))
    if row.verdict is None or row.honest is None or row.app is None:
        return (*start, "same", "same", "-", "none")
    return (
        *start,
        f"{len(row.verdict.signatures)} broken" if row.verdict.signatures else "hold",
        f"{len(row.verdict.meanings)} changed" if row.verdict.meanings else "holds",
        "passes" if row.app.passed else "fails",
        row.honest.name.lower(),
    )


def _released(package: Package, repository: Path, tree: Workspace, scratch: Path) -> Package:
    """The library as the app pins it: at its tag, or in the baseline where that version has no tag yet."""
    pin = next(iter(tree.own(tree.app)[package.name].specifier)).version
    tag = tag_of(package.name, Version(pin))
    if git(repository, "tag", "--list", tag).strip():
        return read_workspace(extract(repository, tag, scratch / tag))[package.name]
    if str(package.version) != pin:
        raise ReleaseError(f"the app pins {package.name}=={pin}, and there is no tag {tag}: tag that release.")
    return package


def _app(tree: Workspace, released: dict[str, Package], wheels: Path, scratch: Path) -> tuple[Path, Path]:
    """An environment with the app on its own pins, and the folder of its tests."""
    build([tree.app], wheels)
    build(list(released.values()), wheels, wheels_only=True)
    python = fresh.create(scratch / "environment")
    fresh.install_package(python, tree, tree.app, wheels)
    fresh.install_test_requirements(python, tree, tree.app)
    return python, fresh.unpack_tests(wheels / tree.app.sdist, scratch / "app")


def _sources(package: Package) -> dict[str, bytes]:
    return {
        str(path.relative_to(package.sources)): path.read_bytes()
        for path in sorted(package.sources.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
