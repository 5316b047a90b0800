"""Built wheels in fresh environments, away from the source tree: what somebody who installs them gets."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
from tools.release import fresh
from tools.release.artifacts import build, inspect, twine_check
from tools.release.compat import APP_TESTS, compatibility, last_release, table
from tools.release.history import extract, git
from tools.release.meaning import GOLDEN, changed_meanings
from tools.release.verdict import Level
from tools.release.workspace import ROOT, read_workspace

from deliberate_breaks import BREAKS, break_tree

pytestmark = pytest.mark.slow

WORKSPACE = read_workspace(ROOT)
LIBRARIES = [library.name for library in WORKSPACE.libraries]
# The loop on a toy policy, and what is between it and the user. The rest of the app's tests run in its own tree.
PINNED_TESTS = (*APP_TESTS, "tests/test_cli.py", "tests/test_config.py")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    build(list(WORKSPACE.packages.values()), folder)
    return folder


@pytest.mark.parametrize("name", WORKSPACE.packages)
def test_the_files_hold_what_they_should(name: str, wheels: Path) -> None:
    package = WORKSPACE[name]
    assert inspect(WORKSPACE, package, wheels) == []
    assert twine_check([wheels / package.sdist, wheels / package.wheel]) == []


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_alone_passes_its_own_tests(name: str, wheels: Path, tmp_path: Path) -> None:
    """At the newest and at the lowest versions of its dependencies, side by side: compiling keeps one core busy."""
    package = WORKSPACE[name]

    def alone(resolution: fresh.Resolution) -> tuple[fresh.Outcome, list[str]]:
        folder = tmp_path / resolution
        python = fresh.create(folder / "environment")
        fresh.install_package(python, WORKSPACE, package, wheels, resolution=resolution)
        # Before the tests' own requirements come, which might bring what the library forgot to declare.
        subprocess.run([str(python), "-I", "-c", f"import {package.module}"], check=True)
        assert folder in fresh.where(python, package.module).parents
        fresh.install_test_requirements(python, WORKSPACE, package)
        outcome = fresh.run_tests(python, fresh.unpack_tests(wheels / package.sdist, folder / "tests"))
        # Old versions of what it stands on must not change what it means either.
        return outcome, changed_meanings(ROOT / GOLDEN, name, python=python)

    with ThreadPoolExecutor(2) as both:
        for outcome, changed in both.map(alone, get_args(fresh.Resolution)):
            assert outcome.passed, outcome.output
            assert changed == []


def test_the_app_passes_with_its_exact_pins(wheels: Path, tmp_path: Path) -> None:
    app = WORKSPACE.app
    python = fresh.create(tmp_path / "environment")
    fresh.install_package(python, WORKSPACE, app, wheels)
    fresh.install_test_requirements(python, WORKSPACE, app)
    outcome = fresh.run_tests(python, fresh.unpack_tests(wheels / app.sdist, tmp_path / "tests"), PINNED_TESTS)
    assert outcome.passed, outcome.output


def test_each_library_may_be_swapped_under_the_released_app(tmp_path: Path) -> None:
    rows = list(compatibility(WORKSPACE, tmp_path, repository=ROOT, baseline=last_release(ROOT, WORKSPACE)))
    print(table(rows))
    assert all(row.holds for row in rows), table(rows)


def test_the_matrix_names_three_deliberate_breaks(tmp_path: Path) -> None:
    """A keyword the app passes, a meaning it cannot see, a shape it trips over; one library is left alone."""
    broken = {b.library: b for b in BREAKS if (b.library, b.what) in THREE}
    # A history of its own, so that nothing but the breaks differs whatever was tagged here.
    repository = extract(ROOT, "HEAD", tmp_path / "repository")
    git(repository, "init", "--quiet")
    git(repository, "add", "--all", "--force")
    git(repository, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "all that is")
    tree = extract(repository, "HEAD", tmp_path / "candidate")
    for one in broken.values():
        break_tree(tree, one)
    found = compatibility(read_workspace(tree), tmp_path / "scratch", repository=repository, baseline="HEAD")
    rows = {row.library: row for row in found}
    print(table(list(rows.values())))
    assert rows["grpo-contracts"].honest is None
    for name, one in broken.items():
        row = rows[name]
        assert row.verdict is not None
        assert row.app is not None
        assert row.honest == Level.MINOR
        assert not row.holds, "the candidate calls itself what it is not"
        assert row.app.passed == (one.what == "changed meaning"), row.app.output
        assert bool(row.verdict.signatures) == (one.what != "changed meaning")
        assert bool(row.verdict.meanings)


THREE = {
    ("grpo-loss", "renamed keyword"),
    ("grpo-mesh", "changed meaning"),
    ("grpo-sampler", "changed shape"),
}
