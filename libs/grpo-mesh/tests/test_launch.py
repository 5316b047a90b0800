import sys
import time

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
