"""Seconds of each phase of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from grpo_mesh import deadline
from grpo_trainer.run.progress import Progress

__all__ = ["Clock"]


class Clock:
    """Times the phases of one step and shows the one under way.

    Args:
        progress: shows the phase under way.
        limit: seconds a phase may take in a job of several processes before the missing ranks are named.
        totals: seconds of each phase over all steps; every phase is added to it.
    """

    def __init__(self, progress: Progress, *, limit: float, totals: dict[str, float]) -> None:
        self._progress, self._limit, self._totals = progress, limit, totals
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str, *, together: bool = True) -> Iterator[None]:
        """Time the block under this name; host work and device work alike, since every phase ends on the host.

        Args:
            name: of the phase.
            together: whether the processes of a job meet at its beginning; False for what the first one does alone.
        """
        begun = time.perf_counter()
        with self._progress.phase(name), deadline(name, self._limit) if together else nullcontext():
            yield
        took = time.perf_counter() - begun
        for seconds in (self.seconds, self._totals):
            seconds[name] = seconds.get(name, 0.0) + took
