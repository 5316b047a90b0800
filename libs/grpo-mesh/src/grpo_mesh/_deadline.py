"""Collective phases under a clock: who did not come is named, and a phase that hangs ends the process."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from grpo_mesh import _runtime
from grpo_mesh._errors import DeadlineError
from grpo_mesh._hosts import leave

DEADLINE_EXIT = 124  # as timeout(1)
_ANSWER = 1.0  # seconds in which the other ranks, whose clocks ran out at the same time, tell where they are
_visits: collections.Counter[str] = collections.Counter()


def arrive(phase: str, seconds: float) -> None:
    """Waits until every process has come to this phase. Without a job of several it returns at once.

    Args:
        phase: name of the phase; all processes go through the same phases in the same order.
        seconds: how long to wait for the others.

    Raises:
        DeadlineError: names the ranks that did not come, and the phase where each was last seen.
    """
    if _runtime.started():
        _arrive(phase, seconds)


@contextlib.contextmanager
def deadline(phase: str, seconds: float) -> Iterator[None]:
    """Runs a collective phase under a clock: `with deadline("update", 300): ...`.

    All processes meet at its start. A device that waits for a collective cannot be interrupted from Python; if the body
    takes longer than `seconds`, this process therefore prints which ranks have not finished, with the line of code that
    each of them is at, and exits with code 124.
    Make sure that results are ready before the end (`jax.block_until_ready`), or the clock sees only the dispatch.

    Args:
        phase: name of the phase.
        seconds: for the meeting, and again for the body.

    Raises:
        DeadlineError: not every process came to the start in time.
    """
    if not _runtime.started():
        yield
        return
    folder = _arrive(phase, seconds)
    watch = threading.Timer(seconds, _give_up, (phase, folder, seconds))
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()
    _runtime.put(f"{folder}/done/{_runtime.rank()}", "")


def _arrive(phase: str, seconds: float) -> str:
    _visits[phase] += 1
    folder = f"grpo_mesh/phase/{phase}/{_visits[phase]}"
    _runtime.put(f"{folder}/here/{_runtime.rank()}", "")
    _runtime.put(f"grpo_mesh/last/{_runtime.rank()}", f"{phase!r}, visit {_visits[phase]}")
    started = time.monotonic()
    try:
        _runtime.barrier(folder, seconds)
    except TimeoutError as error:
        missing = _absent(f"{folder}/here")
        last = _runtime.entries("grpo_mesh/last")
        seen = "; ".join(f"rank {rank} was last seen at {last.get(str(rank), 'no phase yet')}" for rank in missing)
        raise DeadlineError(
            f"phase {phase!r}: all {_runtime.process_count()} processes must come within {seconds:g} s; after "
            f"{time.monotonic() - started:.1f} s missing: rank {', '.join(map(str, missing)) or 'none'} ({seen}).",
            missing,
        ) from error
    if _runtime.rank() == 0 and _visits[phase] > 1:
        # Everyone is here, so nobody will look at the visit before this one any more.
        _runtime.remove(f"grpo_mesh/phase/{phase}/{_visits[phase] - 1}")
    return folder


def _absent(folder: str) -> tuple[int, ...]:
    present = {int(rank) for rank in _runtime.entries(folder)}
    return tuple(rank for rank in range(_runtime.process_count()) if rank not in present)


def _give_up(phase: str, folder: str, seconds: float) -> None:
    # All that take part in a collective are late when one is: where each is tells which one they wait for.
    _runtime.put(f"{folder}/where/{_runtime.rank()}", _main_thread())
    time.sleep(_ANSWER)
    where = _runtime.entries(f"{folder}/where")
    late = "; ".join(f"rank {rank} ({where.get(str(rank), 'does not answer')})" for rank in _absent(f"{folder}/done"))
    leave(DEADLINE_EXIT, f"phase {phase!r} must end within {seconds:g} s; not finished: {late}.")


def _main_thread() -> str:
    """The line of code that this process is at, such as "at train.py:81 in _run"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "has no main thread any more"
    code = frame.f_code
    return f"at {code.co_filename.rpartition('/')[2]}:{frame.f_lineno} in {code.co_name}"
