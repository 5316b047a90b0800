"""The process between a program and the one that started it: `python -I -S _supervisor.py LIFELINE MEMORY PROGRAM...`.

It runs the program in a session of its own and ends as the program does, with its exit code or by its signal. The
read end LIFELINE of a pipe is closed when the process that holds its other end dies, however it dies. Then, or when
the program has ended, everything that the program started is killed: its process group, and on Linux also what has
left that group or lost its parents. MEMORY bytes are the limit for the data of each process; 0 sets none.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from types import FrameType

_CHECK_SECONDS = 1.0  # a process forked from the parent may hold the lifeline open after the parent's death
_KILL_SECONDS = 10.0  # a process that waits for a dead disk cannot be killed
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_CANNOT_START = 127  # as a shell
_LINUX = sys.platform.startswith("linux")
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def main(lifeline: int, memory: int, command: list[str]) -> None:
    """Run the program until it ends or the lifeline is closed, then end as it did."""
    parent = os.getppid()
    os.set_inheritable(lifeline, False)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, *_FORWARDED):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ignore)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process
    child = _start(command, memory)
    for descriptor in (0, 1):  # the program's own: a reader sees their end when the program ends
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    events = select.poll()
    for descriptor in (lifeline, wake_read):
        events.register(descriptor, select.POLLIN)
    status = None
    while status is None:
        ready = dict(events.poll(1000 * _CHECK_SECONDS))
        if lifeline in ready or os.getppid() != parent:
            break
        for number in os.read(wake_read, 64) if wake_read in ready else b"":
            if number in _FORWARDED:
                _kill_group(child, number)
        status = _reap(child)
    _end_like(_kill_all(child, status))


def _start(command: list[str], memory: int) -> int:
    """Start the program; end this process if that is impossible."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
                signal.signal(number, signal.SIG_DFL)
            if memory:
                resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
            os.execvp(command[0], command)
        except (OSError, ValueError) as error:
            os.write(write_end, str(error).encode("utf-8", "backslashreplace"))
        finally:
            os._exit(_CANNOT_START)
    os.close(write_end)
    problem = os.read(read_end, 1000)  # nothing, once the program runs
    os.close(read_end)
    if problem:
        sys.stderr.write(f"cannot start {command[0]!r}: {problem.decode()}\n")
        sys.stderr.flush()
        os._exit(_CANNOT_START)
    return child


def _reap(child: int) -> int | None:
    """Collect all processes that ended; the status of the program, if it is among them."""
    status = None
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG)) != (0, 0):
            status = ended[1] if ended[0] == child else status
    return status


def _kill_all(child: int, status: int | None) -> int:
    """Kill the program and its descendants; the program's status."""
    _kill_group(child, signal.SIGKILL)
    until = time.monotonic() + _KILL_SECONDS
    while True:
        found = _reap(child)
        status = found if status is None else status
        left = _descendants() if _LINUX else [child] if status is None else []
        if not left or time.monotonic() > until:
            return signal.SIGKILL if status is None else status
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _kill_group(leader: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _descendants() -> list[int]:
    """Processes below this one, dead ones too.

    Dead ones may still have children: a process whose first thread has ended while others have not, and one that dies
    after its child was read.
    """
    children: dict[int, list[int]] = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                parent = file.read().rpartition(b")")[2].split()[1]
        except (OSError, ValueError):
            continue  # it ended in between
        children.setdefault(int(parent), []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found[1:]


def _end_like(status: int) -> None:
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):  # SIGKILL needs no reset
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _prctl(option: int, value: int) -> None:
    if _LINUX:
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Leaves the signal to the pipe, which needs a handler in Python."""


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
