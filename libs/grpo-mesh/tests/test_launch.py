import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from grpo_mesh.launch import launch, main

PRINT = "import os; print(*(os.environ.get('GRPO_' + k) for k in ('PROCESS_ID', 'PROCESS_COUNT')), flush=True)"


def python(code):
    return [sys.executable, "-S", "-c", code]


def test_every_process_gets_its_rank_and_its_lines_a_prefix(capsys):
    assert launch(python(PRINT), processes=3) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == ["[0] 0 3", "[1] 1 3", "[2] 2 3"]


def test_the_first_failure_stops_the_rest(capsys):
    code = "import os, sys, time; sys.exit(7) if os.environ['GRPO_PROCESS_ID'] == '1' else time.sleep(600)"
    started = time.monotonic()
    assert launch(python(code), processes=3) == 7
    assert time.monotonic() - started < 300  # not 600: they were stopped
    assert "rank 1 ended with code 7; stopping 2 more" in capsys.readouterr().err


def test_a_process_that_ignores_the_request_is_killed():
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "time.sleep(0.5); sys.exit(3) if os.environ['GRPO_PROCESS_ID'] == '0' else time.sleep(600)"
    )
    started = time.monotonic()
    assert launch(python(code), processes=2, grace=0.5) == 3
    assert time.monotonic() - started < 300  # not 600: they were stopped


def test_a_killed_process_gives_the_code_of_a_shell():
    assert launch(python("import os; os.kill(os.getpid(), 9)"), processes=1) == 137


def test_devices_are_forced_without_contradiction(capsys):
    code = "import os; print(*(os.environ[k] for k in ('JAX_PLATFORMS', 'XLA_FLAGS')))"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_use_thunk_runtime=true"}
    assert launch(python(code), processes=1, devices_per_process=2, environment=flags) == 0
    assert (
        capsys.readouterr().out == "[0] cpu --xla_cpu_use_thunk_runtime=true --xla_force_host_platform_device_count=2\n"
    )


def test_the_command_line(capsys):
    assert main(["--processes", "1", "--", *python("raise SystemExit(5)")]) == 5
    assert main(["--processes", "1", "--", "/no/such/program"]) == 127
    with pytest.raises(SystemExit):
        main(["--processes", "1"])


# Ignores SIGTERM, and so does its child, which has a session of its own.
STUBBORN = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
os.write(1, b"%d\\n" % os.getpid())  # one write: unbuffered, `print` makes two, and two processes' mix
time.sleep(1000)
"""


def start(*options, code=STUBBORN) -> Any:
    command = [sys.executable, "-m", "grpo_mesh.launch", "--processes", "2", *options, "--", *python(code)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def all_gone(pids):
    until = time.monotonic() + 60
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.01)
    return not left


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@linux
@pytest.mark.parametrize(
    ("signals", "code"),
    [
        ([signal.SIGTERM, signal.SIGTERM], 130),
        ([signal.SIGHUP, signal.SIGKILL], -9),
        ([signal.SIGSEGV], -11),
    ],
)
def test_no_process_outlives_the_launcher(signals, code):
    launcher = start("--grace", "1000")  # a second signal does not wait for it
    pids = [int(launcher.stdout.readline().split()[1]) for _ in range(4)]
    for number in signals:
        launcher.send_signal(number)
        time.sleep(0.2)  # two signals at once are one
    assert launcher.wait(60) == code
    assert all_gone(pids)


@linux
@pytest.mark.parametrize("both", [False, True])
def test_output_that_nobody_reads_ends_it_quietly(both):
    launcher = start("--grace", "0.5", code="import os, time\nwhile True: print(os.getpid(), flush=True)")
    pids = [int(launcher.stdout.readline().split()[1])]
    launcher.stdout.close()
    if both:
        launcher.stderr.close()
    assert launcher.wait(60) == 141
    assert both or launcher.stderr.read() == ""
    assert all_gone(pids)
