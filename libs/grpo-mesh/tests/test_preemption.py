"""Signals: the first is noted, the second ends the process, whatever it waits for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from grpo_mesh import preemption

# Waits in C for a lock that it holds itself, like a device that waits for a lost peer: no signal interrupts it.
STUCK = """
import ctypes
from grpo_mesh import preemption
with preemption() as stop:
    print("listening", flush=True)
    lock = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_one_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with preemption() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), number)
        while not stop.requested():
            time.sleep(0.001)
        assert stop.signal == number
    assert signal.getsignal(number) is before


def test_a_block_without_signals_leaves_nothing_behind() -> None:
    for _ in range(3):
        with preemption() as stop:
            pass
        assert stop.signal is None
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only on Linux is a lock of zeros valid")
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_a_process_that_is_stuck(second: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", STUCK], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        process.send_signal(signal.SIGTERM)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.5)
        process.send_signal(second)
        assert process.wait(120) == 128 + second
