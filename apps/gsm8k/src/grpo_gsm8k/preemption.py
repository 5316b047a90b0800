"""Signals: the first asks the run to finish its step and save, the second ends it at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: "try again later", and the same command does


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
    """Listens to SIGTERM and SIGINT for as long as the block runs.

    Yields:
        the `Preemption` to ask between steps. A second signal ends the process immediately, with nothing
        cleaned up: checkpoints are renamed into place whole, so the last one stays good.
    """
    state = Preemption()

    def hear(number: int, frame: FrameType | None) -> None:
        if state.signal is not None:
            os._exit(128 + number)
        state.signal = signal.Signals(number)

    previous = {number: signal.signal(number, hear) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield state
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
