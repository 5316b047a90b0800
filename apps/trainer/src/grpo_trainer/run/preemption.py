"""Signals: the first asks the run to finish its step and save, the second ends it at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again later", and the same command does
_ASKING = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Whether the run was asked to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def requested(self) -> bool:
        """True once any process of the run was asked to stop; every process hears the same answer."""
        asked = self.signal is not None
        if jax.process_count() == 1:
            return asked
        return bool(np.any(multihost_utils.process_allgather(np.asarray(asked))))


@contextmanager
def preemption() -> Iterator[Preemption]:
    """Listens to SIGTERM and SIGINT for as long as the block runs; to be entered in the main thread.

    Yields:
        the `Preemption` to ask between steps. A second signal ends the process immediately, with nothing
        cleaned up: checkpoints are renamed into place whole, so the last one stays good.
    """
    state = Preemption()
    # Python runs signal handlers between two of its own instructions: not while the main thread waits for a device, or
    # for ever for a peer that is gone. What arrives on this pipe is heard by a thread that waits for nothing else.
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)
    listener = threading.Thread(target=_listen, args=(ear, state), name="signals", daemon=True)
    listener.start()
    previous = {number: signal.signal(number, _leave_it_to_the_pipe) for number in _ASKING}
    heard_before = signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    try:
        yield state
    finally:
        signal.set_wakeup_fd(heard_before)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(mouth)
        listener.join()
        os.close(ear)


def _listen(ear: int, state: Preemption) -> None:
    while byte := os.read(ear, 1):
        if byte[0] in _ASKING:
            if state.signal is not None:
                os._exit(128 + byte[0])
            state.signal = signal.Signals(byte[0])


def _leave_it_to_the_pipe(number: int, frame: FrameType | None) -> None:
    """Without a handler in Python nothing would be written to the pipe, and the process would end."""
