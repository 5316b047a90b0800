"""`grpo-gsm8k train` that writes down what it does and kills itself, by SIGKILL, at the instant it is told to.

    train_and_die.py TRACE KILL --set=steps=12 ...

TRACE is a file that gets one JSON line an event, with the process's rank appended to its name. KILL is JSON: the
`stage` and the `step` at or after which a clock is set, as it begins, to `share` of the seconds that the stage takes
(`first` or `later`: the first visit of a process is slower); and the `ranks` that die. `{}` lets the run finish.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import numpy as np
from jax._src import compilation_cache, compiler

import grpo_mesh
from grpo_contracts import TrainBatch
from grpo_trainer import train
from grpo_trainer.run.checkpoint import Checkpoints, Restored
from grpo_trainer.run.metrics import step_metrics
from grpo_trainer.run.progress import Progress


class Trace:
    """The events of one process, on disk before it goes on: SIGKILL leaves no time to flush."""

    def __init__(self, path: str, kill: Mapping[str, Any], rank: int) -> None:
        self._file = os.open(f"{path}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._kill = kill if rank in kill.get("ranks", ()) else {}
        self._visited: set[str] = set()
        self._stage = ""
        self._writing = threading.Lock()
        self.step = 0  # that is under way

    def write(self, **event: Any) -> None:
        """Append a line."""
        with self._writing:
            self._append(event)

    def _append(self, event: Mapping[str, Any]) -> None:
        os.write(self._file, (json.dumps({"at": time.monotonic(), **event}) + "\n").encode())

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Say what is under way, and die in it if that is due."""
        self.write(stage=name, step=self.step)
        self._stage = name
        kill = self._kill
        if kill and kill["stage"] == name and (self.step >= kill["step"] or name == "restore"):
            self._kill = {}
            seconds = kill["later" if name in self._visited else "first"]
            clock = threading.Timer(kill["share"] * seconds, self._die)
            clock.daemon = True
            clock.start()
        self._visited.add(name)
        yield
        self._stage = ""
        self.write(left=name, step=self.step)

    def _die(self) -> None:
        with self._writing:  # for good: nothing is written after the last words
            self._append({"killed": self._stage, "step": self.step})
            os.kill(os.getpid(), signal.SIGKILL)


def observe(trace: Trace) -> None:
    """Let the loop of `train` go through the trace."""

    class ObservedProgress(Progress):
        def resume(self, step: int) -> None:
            trace.step = step
            super().resume(step)

        @contextmanager
        def phase(self, name: str) -> Iterator[None]:
            trace.step += name == "rollout"
            with trace.stage(name), super().phase(name):
                yield

    class ObservedCheckpoints(Checkpoints):
        def save(self, step: int, state: Any, notes: Mapping[str, Any], **more: Any) -> None:
            trace.write(state=grpo_mesh.digest(state), step=step)
            super().save(step, state, notes, **more)

        def restore(self, like: Any, expected: Mapping[str, Any], **more: Any) -> Restored | None:
            with trace.stage("restore"):
                restored = super().restore(like, expected, **more)
            if restored is not None:
                trace.write(state=grpo_mesh.digest(restored.state), step=restored.step)
            trace.write(resumed=restored.step if restored else 0)
            return restored

    def observed_metrics(batch: TrainBatch, learned: Mapping[str, float], clock: Clock) -> dict[str, float]:
        rollout = batch.scored.rollout
        trace.write(
            step=trace.step,
            policy=rollout.policy.digest,
            tokens=_bits(rollout.tokens_BT, rollout.logp_BT),
            rewards=_bits(batch.scored.reward_B, batch.advantage),
            losses=sha256(json.dumps(dict(learned), sort_keys=True).encode()).hexdigest(),
        )
        return step_metrics(batch, learned, clock)

    train.Progress = ObservedProgress  # pyright: ignore[reportPrivateImportUsage]
    train.Checkpoints = ObservedCheckpoints  # pyright: ignore[reportPrivateImportUsage]
    train.step_metrics = observed_metrics  # pyright: ignore[reportPrivateImportUsage]


def every_rank_caches() -> None:
    """On CPU each rank's programs have other keys, and jax lets rank 0 alone write: the rest would compile anew."""

    def write(key: str, seconds: float, module: str, backend: Any, executable: Any, callbacks: Any) -> None:
        compilation_cache.put_executable_and_time(key, module, executable, backend, int(seconds))

    compiler._cache_write = write


def _bits(*arrays: np.ndarray) -> str:
    return sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


if __name__ == "__main__":
    # A machine that is busy, or frozen for a while, is no dead peer.
    job = grpo_mesh.initialize(heartbeat=900, timeout=900)
    every_rank_caches()
    observe(Trace(sys.argv[1], json.loads(sys.argv[2]), job.rank))
    sys.argv[:] = ["grpo-gsm8k", "train", *sys.argv[3:]]
    runpy.run_module("grpo_gsm8k.cli", run_name="__main__")
