"""Fresh environments outside the source tree, filled from built wheels, and packages' own tests run in them."""

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
        passed: whether all of them passed.
        summary: the last line of pytest's output.
        output: all of it.
    """

    passed: bool
    summary: str
    output: str

    @property
    def reason(self) -> str:
        """The first line of the last error that pytest shows, or the summary."""
        errors = [line[2:].strip() for line in self.output.splitlines() if line.startswith("E  ")]
        named = [line for line in errors if _ERROR.match(line)]
        return (named or errors or [self.summary])[-1]


def create(folder: Path) -> Path:
    """Create an empty environment of this Python version and return its interpreter."""
    uv("venv", "--quiet", "--no-project", "--python", sys.executable, str(folder))
    return folder / "bin" / "python"


def install(python: Path, requirements: Sequence[str], *, resolution: Resolution = "highest") -> None:
    """Install requirements and their dependencies.

    Args:
        python: interpreter of the environment.
        requirements: PEP 508 lines, or paths of wheels.
        resolution: `lowest-direct` takes the lowest version that each of these lines allows.

    Raises:
        ReleaseError: they contradict each other, or no package index can be reached.
    """
    uv("pip", "install", "--quiet", "--python", str(python), "--resolution", resolution, *requirements)


def swap(python: Path, wheel: Path) -> None:
    """Replace an installed package by a wheel, even if the pins of others forbid that version."""
    uv("pip", "install", "--quiet", "--python", str(python), "--no-deps", "--reinstall", str(wheel))


def install_packages(
    python: Path, workspace: Workspace, packages: Sequence[Package], wheels: Path, *, resolution: Resolution = "highest"
) -> None:
    """Install packages with what they declare and nothing else.

    Their sisters are installed from the wheels given, so that the index cannot supply another version. The third-party
    requirements are named one by one, so that `lowest-direct` applies to them but not to their own dependencies.

    Args:
        python: interpreter of an empty environment.
        workspace: where the packages and their sisters are from.
        packages: what to install.
        wheels: folder of built wheels.
        resolution: newest versions, or the lowest allowed.
    """
    names = dict.fromkeys(name for package in packages for name in (package.name, *workspace.own(package)))
    foreign = dict.fromkeys(str(requirement) for package in packages for requirement in workspace.foreign(package))
    install(python, [*(str(wheels / workspace[name].wheel) for name in names), *foreign], resolution=resolution)


def unpack_tests(sdist: Path, target: Path) -> Path:
    """Unpack a source distribution without `src/`: tests, README and metadata, but nothing that the tests could import.

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
        compiled: folder of jax's persistent compilation cache; None: no cache.
        timeout: seconds.

    Returns:
        How it ended; a timeout is a failure.
    """
    settings = folder / "pytest.ini"
    settings.write_text("[pytest]\nnorecursedirs = oracles\nmarkers =\n    slow: not run here\n")
    # PYTHONPATH would make the source tree importable.
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
        summary = f"did not end within {timeout:.0f} s"
        return Outcome(False, summary, f"{summary}\n{error.stdout or ''}{error.stderr or ''}")
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["pytest printed nothing"]
    return Outcome(done.returncode == 0, lines[-1].strip("= "), done.stdout + done.stderr)


def where(python: Path, module: str) -> Path:
    """The folder from which an environment imports a package."""
    code = f"import importlib.util as u; print(u.find_spec({module!r}).origin)"
    done = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True)
    return Path(done.stdout.strip()).parent
