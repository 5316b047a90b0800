"""Fresh environments outside the source tree, filled from built wheels, and a package's own tests run in them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .artifacts import uv
from .workspace import Package, Workspace

Resolution = Literal["highest", "lowest-direct"]
_ERROR = re.compile(r"[\w.]+(Error|Exception): ")


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended.

    Args:
        passed: whether all of them did.
        summary: the last line of pytest.
        output: all it printed.
    """

    passed: bool
    summary: str
    output: str

    @property
    def reason(self) -> str:
        """The last error pytest shows, without what its message goes on to say; or the summary."""
        errors = [line[2:].strip() for line in self.output.splitlines() if line.startswith("E  ")]
        named = [line for line in errors if _ERROR.match(line)]
        return (named or errors or [self.summary])[-1]


def create(folder: Path) -> Path:
    """Make an empty environment of this Python version and return its interpreter."""
    uv("venv", "--quiet", "--no-project", "--python", sys.executable, str(folder))
    return folder / "bin" / "python"


def install(python: Path, requirements: Sequence[str], *, resolution: Resolution = "highest") -> None:
    """Install requirements and what they need.

    Args:
        python: interpreter of the environment.
        requirements: PEP 508 lines, or paths of wheels.
        resolution: `lowest-direct` takes the lowest version that each of these lines allows.

    Raises:
        ReleaseError: they contradict each other, or no index can be reached.
    """
    uv("pip", "install", "--quiet", "--python", str(python), "--resolution", resolution, *requirements)


def install_test_requirements(python: Path, workspace: Workspace, package: Package) -> None:
    """Install what a package's tests need beside it; what is there already stays as it is."""
    install(python, workspace.test_requirements(package))


def swap(python: Path, wheel: Path) -> None:
    """Put one wheel in the place of its installed version, whatever the others' pins say."""
    uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--reinstall", str(wheel))


def install_package(
    python: Path, workspace: Workspace, package: Package, wheels: Path, *, resolution: Resolution = "highest"
) -> None:
    """Install a package with what it declares and nothing else.

    Its sisters come as the wheels given, so that no index can slip in another version; every third party it declares
    is named, so that `lowest-direct` lowers those and leaves what they need in turn alone.

    Args:
        python: interpreter of an empty environment.
        workspace: where the package and its sisters are from.
        package: what to install.
        wheels: folder of built wheels.
        resolution: newest versions, or the lowest allowed.
    """
    family = [package, *(workspace[name] for name in workspace.own(package))]
    foreign = [str(requirement) for requirement in workspace.foreign(package)]
    install(python, [*(str(wheels / member.wheel) for member in family), *foreign], resolution=resolution)


def unpack_tests(sdist: Path, target: Path) -> Path:
    """Unpack a source distribution without its sources: tests, README and metadata, and nothing they could import.

    Args:
        sdist: the archive.
        target: an empty or absent folder.

    Returns:
        The unpacked folder.
    """
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.name.split("/")[1:2] != ["src"]]
        archive.extractall(target, members=members, filter="data")
    (folder,) = target.iterdir()
    return folder


def run_tests(
    python: Path,
    folder: Path,
    tests: Sequence[str] = ("tests",),
    *,
    compiled: Path | None = None,
    timeout: float = 3600,
) -> Outcome:
    """Run a package's fast tests in a fresh environment, away from the source tree.

    Args:
        python: interpreter with the package and its tests' requirements.
        folder: where `unpack_tests` put them.
        tests: files or folders in it.
        compiled: where jax keeps what it compiled from one run to the next; None: nowhere.
        timeout: seconds.
    """
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\nnorecursedirs = oracles\nmarkers =\n    slow: not run here\n")
    # Editable installs and PYTHONPATH would let the source tree in.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | {"JAX_PLATFORMS": "cpu"}
    if compiled is not None:
        environment |= {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "--import-mode=importlib", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, "-c", str(settings), "--rootdir", str(folder), *tests],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        told = f"did not end within {timeout:.0f} s"
        return Outcome(False, told, f"{told}\n{error.stdout or ''}{error.stderr or ''}")
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["pytest said nothing"]
    return Outcome(done.returncode == 0, lines[-1].strip("= "), done.stdout + done.stderr)


def where(python: Path, module: str) -> Path:
    """The folder an environment imports a package from."""
    code = f"import importlib.util as u; print(u.find_spec({module!r}).origin)"
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent
