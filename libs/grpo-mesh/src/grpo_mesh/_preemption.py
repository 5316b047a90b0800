"""Signals: the first asks the process to save and stop, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL, "try again later": the same command resumes
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Whether the process was asked to stop. `signal` is the signal that this process received, None without one."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def requested(self) -> bool:
        """Returns whether any process of the job was asked to stop; all processes must call it, and get one answer."""
        requested = self.signal is not None
        if jax.process_count() == 1:
            return requested
        return bool(np.any(multihost_utils.process_allgather(np.asarray(requested))))


@contextlib.contextmanager
def preemption() -> Iterator[Preemption]:
    """Listens to SIGTERM and SIGINT while the block runs; enter it in the main thread.

    A second signal ends the process immediately, with code 128 + its number and without any cleanup. Write checkpoints
    to a temporary name and rename them, so that the last one stays whole.

    Yields:
        The `Preemption` to ask between steps.
    """
    state = Preemption()
    # Python runs signal handlers between two of its own instructions: not while the main thread waits for a device, or
    # forever for a lost peer. The thread that reads this pipe waits for nothing else.
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    listener = threading.Thread(target=_listen, args=(read_end, state), name="signals", daemon=True)
    listener.start()
    handlers = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    wakeup_before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield state
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(write_end)
        listener.join()
        os.close(read_end)


def _listen(read_end: int, state: Preemption) -> None:
    while byte := os.read(read_end, 1):
        if byte[0] in _SIGNALS:
            if state.signal is not None:
                os._exit(128 + byte[0])
            state.signal = signal.Signals(byte[0])


def _ignore(number: int, frame: FrameType | None) -> None:
    """Leaves the signal to the pipe. Without a handler in Python the process would end, and the pipe stay empty."""
