"""What a library costs somebody who installs it alone: megabytes, dependencies, milliseconds to import."""

from __future__ import annotations

import resource
import statistics
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from . import fresh
from .workspace import Package, Workspace

_REPEATS = 5


@dataclass(frozen=True)
class Weight:
    """One library alone in its environment.

    Args:
        library: its name.
        own_bytes: the library without its requirements.
        all_bytes: the whole environment without byte code.
        dependencies: number of distributions besides the library.
        import_ms: median wall-clock time of `import` in milliseconds, without the interpreter's start.
        import_cpu_ms: the same in CPU time, which a busy machine does not inflate.
    """

    library: str
    own_bytes: int
    all_bytes: int
    dependencies: int
    import_ms: float
    import_cpu_ms: float


def weigh(workspace: Workspace, wheels: Path, scratch: Path) -> Iterator[Weight]:
    """Install each library alone and measure it.

    Args:
        workspace: the tree.
        wheels: folder of its built wheels.
        scratch: an empty folder for environments.

    Yields:
        One weight for each library, as soon as it is measured.
    """
    for package in workspace.libraries:
        python = fresh.create(scratch / package.name)
        fresh.install_packages(python, workspace, [package], wheels)
        yield _weigh_environment(python, package)


def _weigh_environment(python: Path, package: Package) -> Weight:
    own = fresh.where(python, package.module)
    site = own.parent
    bare, loaded = _cost(python, "pass"), _cost(python, f"import {package.module}")
    return Weight(
        package.name,
        _size(own),
        _size(site),
        len(list(site.glob("*.dist-info"))) - 1,
        loaded[0] - bare[0],
        loaded[1] - bare[1],
    )


def table(weights: Iterable[Weight]) -> Iterator[str]:
    """Format weights as the lines of a Markdown table, each as soon as it is measured."""
    yield "| library | itself, kB | with dependencies, MB | dependencies | import, ms | import, CPU ms |"
    yield "|---|---|---|---|---|---|"
    for w in weights:
        yield (
            f"| {w.library} | {w.own_bytes / 1e3:.0f} | {w.all_bytes / 1e6:.0f} | {w.dependencies} "
            f"| {w.import_ms:.0f} | {w.import_cpu_ms:.0f} |"
        )


def _cost(python: Path, code: str) -> tuple[float, float]:
    """Median wall-clock and CPU milliseconds of running code in a new interpreter, without the first run."""
    timer = f"import time; t = time.perf_counter(); exec({code!r}); print(time.perf_counter() - t)"
    wall, cpu = [], []
    for _ in range(_REPEATS + 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([str(python), "-I", "-c", timer], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall.append(float(done.stdout) * 1e3)
        cpu.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3)
    return statistics.median(wall[1:]), statistics.median(cpu[1:])


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
