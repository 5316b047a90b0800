"""Nothing that a supervised program started lives longer than the program or the process that started it."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_mesh import SupervisedProcess, _supervisor

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, and needs a subreaper")

# A program whose descendants do what they can to stay: one in its process group, one in a session of its own, and one
# whose parent is gone. Each writes down its process number.
FAMILY = r"""
import os, signal, sys, time
def stay(*steps):
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for step in steps:
            if step == "session": os.setsid()
            elif os.fork(): os._exit(0)
        os.write(1, b"%d\n" % os.getpid())
        time.sleep(1000)
stay(); stay("session"); stay("session", "orphan")
os.write(1, b"%d\n" % os.getpid())
"""
PARENT = """
import os, signal, subprocess, sys, time
from grpo_mesh import SupervisedProcess, _supervisor
process = SupervisedProcess([sys.executable, "-S", "-c", sys.argv[1]], stdout=subprocess.PIPE)
for _ in range(4):
    print(process.stdout.readline().decode().strip(), flush=True)
"""
STAYS, SPINS = "time.sleep(1000)", "import re; re.match('(a+)+$', 'a' * 64 + 'b')"  # it never lets go of the lock


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter: gone between opening and reading
        return False


def all_gone(pids: list[int]) -> bool:
    until = time.monotonic() + 60
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    return not any(map(alive, pids))


def supervised(code: str, **options: Any) -> SupervisedProcess:
    return SupervisedProcess([sys.executable, "-S", "-c", code], **options)


def family(process: subprocess.Popen[bytes]) -> list[int]:
    assert process.stdout is not None
    return [process.pid, *(int(process.stdout.readline()) for _ in range(4))]


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), signal.SIGSEGV)", -11)])
def test_it_ends_as_its_program_does(code: str, expected: int) -> None:
    assert supervised(f"import os, signal, sys; {code}").wait(60) == expected


def test_a_program_that_is_not_there(capfd: pytest.CaptureFixture[str]) -> None:
    assert SupervisedProcess(["/no/such/program"]).wait(60) == 127
    assert "cannot start '/no/such/program': [Errno 2] No such file" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_the_program(number: signal.Signals) -> None:
    code = (
        "import signal, sys, time\nfor n in (1, 2, 15): signal.signal(n, lambda number, _: sys.exit(100 + number))\n"
        "print('ready', flush=True); time.sleep(1000)"
    )
    process = supervised(code, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(60) == 100 + number


def test_what_a_program_leaves_behind_dies_with_it() -> None:
    process = supervised(FAMILY + "os.read(0, 1)", stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    members = family(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(60) == 0
    assert all_gone(members)


@pytest.mark.parametrize("last", [STAYS, SPINS])
def test_end_kills_all(last: str) -> None:
    process = supervised(FAMILY + last, stdout=subprocess.PIPE)
    members = family(process)
    assert process.end() == -signal.SIGKILL
    assert all_gone(members)
    assert process.end() == -signal.SIGKILL


def test_the_program_dies_with_its_supervisor() -> None:
    # A standard input of its own: that of the tests may be at its end, and the program would end by itself.
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = supervised("import os; print(os.getpid(), flush=True); os.read(0, 1)", **pipes)
    assert process.stdout is not None
    program = int(process.stdout.readline())
    process.kill()
    assert all_gone([process.pid, program])
    assert process.end() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("death", "last"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", SPINS),
        ("os.kill(os.getpid(), signal.SIGSEGV)", STAYS),
        ("os._exit(3)", STAYS),
        ("\nif os.fork(): os._exit(0)\ntime.sleep(20)", SPINS),  # the fork holds the lifeline open
    ],
    ids=["killed", "crashed", "gone", "forked"],
)
def test_nobody_survives_the_death_of_the_parent(death: str, last: str) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", f"{PARENT}\n{death}", FAMILY + last], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    members = family(parent)
    parent.wait(60)
    assert all_gone(members)


def test_memory_is_limited() -> None:
    code = "try:\n  bytearray(200_000_000)\nexcept MemoryError: raise SystemExit(9)"
    assert supervised(code, memory=100_000_000).wait(60) == 9
    assert supervised(code, memory=1_000_000_000).wait(60) == 0


def test_no_descriptor_is_left_open() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        supervised("pass").end()
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_process_whose_parent_dies_while_processes_are_listed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Numbers start again after the highest: the child, 7, is read before its parent, 9, which has died by then.
    stats = {"7": b"7 (sleep) S 9 7", "9": b"9 (python) Z %d 9" % os.getpid(), "8": b"8 (other) S 1 8"}
    monkeypatch.setattr(os, "listdir", lambda _: ["7", "8", "9", "self"])
    monkeypatch.setattr(_supervisor, "open", lambda path, _: io.BytesIO(stats[Path(path).parent.name]), raising=False)
    assert sorted(_supervisor._descendants()) == [7, 9]
