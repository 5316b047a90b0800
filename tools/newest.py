"""Runs the tests on the newest Python of this machine from 3.12 on, with the newest packages it can have.

    hatch run test-newest libs/grpo-mesh

Looks for `python3.N` on the path, in pyenv and among uv's Pythons (`uv python install 3.13`), and has hatch make the
environment `newest` with it. `--if-present` ends with 0 where there is none, as CI asks.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

OLDEST, NEWEST = 12, 14  # the minor versions that this is for


def main(arguments: list[str]) -> int:
    python = next(found(), None)
    if python is None:
        print(
            f"no Python 3.{OLDEST} to 3.{NEWEST} here: install one, for instance by `uv python install 3.{NEWEST - 1}`"
        )
        return 0 if "--if-present" in arguments else 1
    arguments = [argument for argument in arguments if argument != "--if-present"]
    print(f"testing on {python}", flush=True)
    return subprocess.call(["hatch", "run", "newest:test", *arguments], env=os.environ | {"HATCH_PYTHON": python})


def found() -> Iterator[str]:
    """The interpreters that start, newest first."""
    for minor in range(NEWEST, OLDEST - 1, -1):
        for candidate in (f"python3.{minor}", *map(str, Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))):
            yield from interpreter([candidate])
        yield from interpreter(
            ["uv", "run", "--no-project", "--no-python-downloads", "--python", f"3.{minor}", "python"]
        )


def interpreter(command: list[str]) -> list[str]:
    """The path of the interpreter that a command starts; none if it does not start."""
    try:
        done = subprocess.run(
            [*command, "-c", "import sys; print(sys.executable)"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return []
    return [done.stdout.strip()] if done.returncode == 0 else []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
