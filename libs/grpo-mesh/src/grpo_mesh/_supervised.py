"""Programs that do not outlive the process that starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_SUPERVISOR = str(Path(__file__).with_name("_supervisor.py"))
_END_SECONDS = 15.0  # the supervisor gives up after 10


class SupervisedProcess(subprocess.Popen[bytes]):
    """A program that dies with this process, even by SIGKILL, together with everything it started.

    A small supervisor process stands between the two: `pid` is the supervisor's. It passes SIGTERM, SIGINT and SIGHUP
    on to the program's process group, and ends with the program's exit code or by the program's signal. Whatever the
    program leaves behind is killed; outside Linux that is only what stayed in its process group. Needs POSIX.

    Args:
        command: program and arguments. If it cannot be started, that is said on standard error, with exit code 127.
        memory: limit for the data of each of the program's processes, bytes; None sets none. Linux enforces it.
        options: as of `subprocess.Popen`.
    """

    def __init__(self, command: Sequence[str], *, memory: int | None = None, **options: Any) -> None:
        read_end, write_end = os.pipe()
        self._lifeline: int | None = write_end
        supervisor = [sys.executable, "-I", "-S", _SUPERVISOR, str(read_end), str(memory or 0)]
        try:
            super().__init__([*supervisor, *command], pass_fds=(read_end,), start_new_session=True, **options)
        except BaseException:
            self._cut()
            raise
        finally:
            os.close(read_end)

    def end(self) -> int:
        """Kills the program, if it still runs, and everything it started.

        Returns:
            The exit code; that of its own if the program had ended.
        """
        self._cut()
        try:
            return self.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()  # the program dies with its supervisor
            return self.wait()

    def _cut(self) -> None:
        if self._lifeline is not None:
            os.close(self._lifeline)
            self._lifeline = None
