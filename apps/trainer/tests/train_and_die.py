"""A training run of the toy task that writes down what it does and kills itself, by SIGKILL, at a given instant.

    train_and_die.py TRACE KILL steps=12 rollout.prompts=4 ...

TRACE is a file that gets one JSON line an event, with the process's rank appended to its name. KILL is JSON: the
`stage` and the `step` at or after which a clock is set, as it begins, to `share` of the seconds that the stage takes
(`first` or `later`: the first visit of a process is slower); and the `ranks` that die. `{}` lets the run finish.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import compilation_cache, compiler
from toy import TASK, load

import grpo_mesh
from grpo_contracts import Rollout, Scored
from grpo_trainer.assemble import Run, assemble
from grpo_trainer.rewards.scoring import Rewards, Transcript
from grpo_trainer.run.checkpoint import Checkpoints, Restored
from grpo_trainer.run.folder import matched_settings
from grpo_trainer.run.progress import Progress
from grpo_trainer.run.state import LoopState
from grpo_trainer.settings.startup import prepare_process
from grpo_trainer.train import fit


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


class ObservedProgress(Progress):
    """Every phase of the loop goes through the trace."""

    def __init__(self, trace: Trace, steps: int, *, enabled: bool) -> None:
        super().__init__(steps, enabled=enabled)
        self._trace = trace

    def resume(self, step: int) -> None:
        """Steps are counted from here."""
        self._trace.step = step
        super().resume(step)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A step begins with its rollout."""
        self._trace.step += name == "rollout"
        with self._trace.stage(name), super().phase(name):
            yield


class ObservedCheckpoints(Checkpoints):
    """Everything saved and read goes through the trace."""

    def __init__(self, trace: Trace, folder: Path, *, keep: int, versions: Mapping[str, str]) -> None:
        super().__init__(folder, keep=keep, versions=versions)
        self._trace = trace

    def save(self, loop: LoopState, *rest: Any, **options: Any) -> None:
        """Write down what is saved first."""
        self._trace.write(state=grpo_mesh.digest(loop.train), step=loop.step)
        super().save(loop, *rest, **options)

    def restore(self, like: Any, expected: Mapping[str, Any] | None, **options: Any) -> Restored | None:
        """Write down what was read."""
        with self._trace.stage("restore"):
            restored = super().restore(like, expected, **options)
        if restored is not None:
            self._trace.write(state=grpo_mesh.digest(restored.state), step=restored.step)
        self._trace.write(resumed=restored.step if restored else 0)
        return restored


@dataclass(frozen=True, kw_only=True)
class ObservedRewards(Rewards):
    """What was sampled, and its rewards, go through the trace."""

    trace: Trace

    def score(self, rollout: Rollout, transcript: Transcript, report: Callable[..., None] | None = None) -> Scored:
        """Score, and write down of what."""
        scored = super().score(rollout, transcript, report)
        self.trace.write(
            step=self.trace.step,
            policy=rollout.policy.digest,
            tokens=_bits(rollout.tokens_BT, rollout.logp_BT),
            rewards=_bits(scored.reward_B, scored.scored_B),
        )
        return scored


def observed(run: Run, trace: Trace) -> Run:
    """The same run, whose rewards and updates go through the trace."""

    def update(state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        state, metrics = run.plan.update(state, batch)
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        losses = sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()
        trace.write(step=trace.step, losses=losses)
        return state, metrics

    return replace(
        run, plan=replace(run.plan, update=update), rewards=ObservedRewards(**vars(run.rewards), trace=trace)
    )


def every_rank_caches() -> None:
    """On CPU each rank's programs have other keys, and jax lets rank 0 alone write: the rest would compile anew."""

    def write(key: str, seconds: float, module: str, backend: Any, executable: Any, callbacks: Any) -> None:
        compilation_cache.put_executable_and_time(key, module, executable, backend, int(seconds))

    compiler._cache_write = write


def _bits(*arrays: np.ndarray) -> str:
    return sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def main(trace: Trace, assignments: list[str]) -> int:
    """Train as the command line does, with everything observed."""
    settings = load([], assignments)
    prepare_process(settings)
    run = assemble(matched_settings(settings), TASK)
    folder = Path(settings.run.dir) / "checkpoints"
    return fit(
        observed(run, trace),
        progress=ObservedProgress(trace, settings.steps, enabled=jax.process_index() == 0),
        checkpoints=ObservedCheckpoints(trace, folder, keep=settings.checkpoint.keep, versions=run.versions),
    )


if __name__ == "__main__":
    # A machine that is busy, or frozen for a while, is no dead peer.
    job = grpo_mesh.initialize(heartbeat=900, timeout=900)
    every_rank_caches()
    sys.exit(main(Trace(sys.argv[1], json.loads(sys.argv[2]), job.rank), sys.argv[3:]))
