"""Whether a library still computes what it did: the golden cases of one tree, computed by the sources of another."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from .workspace import ReleaseError, read_workspace

GOLDEN = Path("tests/golden")
_MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def changed_meanings(
    golden: Path,
    library: str,
    *,
    tree: Path | None = None,
    part: str | None = None,
    python: Path | str = sys.executable,
) -> list[str]:
    """Compute a library's golden cases and compare them with the stored values.

    Args:
        golden: a folder `tests/golden`, of this tree or of an older one.
        library: name of the package.
        tree: the tree whose sources compute them; None: the packages installed in `python`'s environment.
        part: which of its cases; None: all.
        python: the interpreter.

    Returns:
        One sentence for each case whose shape, dtype or value differs, or the last line of the error if the cases
        cannot be computed. Empty if no stored value changed, or none is stored.

    Raises:
        ReleaseError: the interpreter lacks a third-party package that the library needs.
    """
    if not (golden / f"{library}.npz").exists():
        return []
    command = [str(python), str(golden / "replay.py"), library, *(() if part is None else ("--part", part))]
    environment = dict(os.environ, JAX_PLATFORMS="cpu", JAX_TRACEBACK_FILTERING="off")
    if tree is not None:
        environment["PYTHONPATH"] = os.pathsep.join(str(path.sources) for path in read_workspace(tree).libraries)
    done = subprocess.run(command, cwd=golden, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    if done.returncode == 1 and done.stdout.strip():
        return done.stdout.strip().splitlines()
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    missing = _MISSING.match(last)
    if missing and missing[1] != library.replace("-", "_"):  # the environment is at fault, not the library
        raise ReleaseError(f"{python} must have {missing[1]} to compute the golden cases: use `hatch run release:...`.")
    return [f"the golden cases cannot be computed: {last}"]
