"""Built wheels in fresh environments, away from the source tree: what a user who installs them gets."""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import pytest
from tools.release import fresh
from tools.release.artifacts import build, inspect, twine_check
from tools.release.compat import LOOP_TEST, compatibility, last_release, table
from tools.release.history import extract, git
from tools.release.meaning import GOLDEN, changed_meanings
from tools.release.verdict import Level
from tools.release.workspace import ROOT, read_workspace

from deliberate_breaks import BREAKS, break_tree

pytestmark = pytest.mark.slow

WORKSPACE = read_workspace(ROOT)
LIBRARIES = [library.name for library in WORKSPACE.libraries]
ASSEMBLIES = [package.name for package in WORKSPACE.assemblies]
# An app's loop on a toy policy, its command line and its settings; for a package without these, all fast tests.
PINNED_TESTS = ("::".join(map(str, LOOP_TEST)), "tests/test_cli.py", "tests/test_settings.py")


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
        fresh.install_packages(python, WORKSPACE, [package], wheels, resolution=resolution)
        # Before the tests' own requirements are installed, which might include what the library forgot to declare.
        subprocess.run([str(python), "-I", "-c", f"import {package.module}"], check=True)
        assert folder in fresh.where(python, package.module).parents
        fresh.install(python, WORKSPACE.test_requirements(package))
        outcome = fresh.run_tests(python, fresh.unpack_tests(wheels / package.sdist, folder / "tests"))
        # Nor may old versions of its dependencies change what it computes.
        return outcome, changed_meanings(ROOT / GOLDEN, name, python=python)

    with ThreadPoolExecutor(2) as both:
        for outcome, changed in both.map(alone, get_args(fresh.Resolution)):
            assert outcome.passed, outcome.output
            assert changed == []


@pytest.mark.parametrize("name", ASSEMBLIES)
def test_the_trainer_and_the_apps_pass_with_their_exact_pins(name: str, wheels: Path, tmp_path: Path) -> None:
    package = WORKSPACE[name]
    python = fresh.create(tmp_path / "environment")
    fresh.install_packages(python, WORKSPACE, [package], wheels)
    subprocess.run([str(python), "-I", "-c", f"import {package.module}"], check=True)
    fresh.install(python, WORKSPACE.test_requirements(package))
    folder = fresh.unpack_tests(wheels / package.sdist, tmp_path / "tests")
    tests = [test for test in PINNED_TESTS if (folder / test.partition("::")[0]).exists()]
    outcome = fresh.run_tests(python, folder, tests or ["tests"])
    assert outcome.passed, outcome.output


def test_each_package_may_be_swapped_under_the_released_apps(tmp_path: Path) -> None:
    rows = list(compatibility(WORKSPACE, tmp_path, repository=ROOT, baseline=last_release(ROOT, WORKSPACE)))
    print(table(rows))
    assert all(row.holds for row in rows), table(rows)


def test_the_matrix_names_three_deliberate_breaks(tmp_path: Path) -> None:
    """A keyword that the trainer passes, a meaning that no app sees, a shape that breaks them; one library is whole."""
    broken = {b.library: b for b in BREAKS if (b.library, b.what) in THREE}
    # A history of its own, so that only the breaks differ, whatever was tagged here.
    repository = extract(ROOT, "HEAD", tmp_path / "repository")
    git(repository, "init", "--quiet")
    git(repository, "add", "--all", "--force")
    git(repository, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "all that is")
    tree = extract(repository, "HEAD", tmp_path / "candidate")
    for one in broken.values():
        break_tree(tree, one)
    found = compatibility(read_workspace(tree), tmp_path / "scratch", repository=repository, baseline="HEAD")
    rows = {row.swapped: row for row in found}
    print(table(list(rows.values())))
    assert rows["grpo-contracts"].honest is rows["grpo-trainer"].honest is None
    for name, one in broken.items():
        row = rows[name]
        assert row.verdict is not None
        assert row.forward
        assert row.honest == Level.MINOR
        assert not row.holds, "the candidate kept its version"
        assert all(outcome.passed for outcome in row.forward.values()) == (one.what == "changed meaning"), row.forward
        assert bool(row.verdict.signatures) == (one.what != "changed meaning")
        assert bool(row.verdict.meanings)


THREE = {
    ("grpo-loss", "renamed keyword"),
    ("grpo-mesh", "changed meaning"),
    ("grpo-sampler", "changed shape"),
}
