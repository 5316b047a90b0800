"""Collective phases with a deadline: missing ranks are named, and a phase that hangs ends the process."""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import Iterator

from grpo_mesh import _runtime
from grpo_mesh._errors import DeadlineError, HostsError
from grpo_mesh._hosts import abort

DEADLINE_EXIT = 124  # as timeout(1)
_ANSWER = 1.0  # seconds for the other ranks, whose clocks ran out at the same time, to report where they are
_visits: collections.Counter[str] = collections.Counter()


def barrier(phase: str, seconds: float) -> None:
    """Waits until every process has reached this phase. In a job of one process it returns at once.

    Args:
        phase: name of the phase; all processes go through the same phases in the same order.
        seconds: how long to wait for the others, more than 0.

    Raises:
        DeadlineError: names the ranks that did not come, and the phase where each was last seen.
        HostsError: `seconds` is not positive, or the job is already failing.
    """
    _check_seconds(phase, seconds)
    if _runtime.started():
        _meet(phase, seconds)


@contextlib.contextmanager
def deadline(phase: str, seconds: float) -> Iterator[None]:
    """Runs a collective phase with a deadline: `with deadline("update", 300): ...`.

    All processes meet at its start. Python cannot interrupt a device that waits for a collective. If the body takes
    longer than `seconds`, this process therefore prints which ranks have not finished, with the line of code that each
    of them is at, and exits with code 124.
    Wait for the results inside the body (`jax.block_until_ready`); otherwise only the dispatch is timed.

    Args:
        phase: name of the phase.
        seconds: for the meeting, and again for the body; more than 0.

    Raises:
        DeadlineError: not every process came to the start in time.
        HostsError: `seconds` is not positive, or the job is already failing.
    """
    _check_seconds(phase, seconds)
    if not _runtime.started():
        yield
        return
    folder = _meet(phase, seconds)
    timer = threading.Timer(seconds, _give_up, (phase, folder, seconds))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _runtime.put(f"{folder}/done/{_runtime.rank()}", "")


def _check_seconds(phase: str, seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise HostsError(f"phase {phase!r}: seconds must be more than 0 and finite: got {seconds}.")


def _meet(phase: str, seconds: float) -> str:
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
        # Everyone is here, so nobody reads the entries of the visit before any more.
        _runtime.remove(f"grpo_mesh/phase/{phase}/{_visits[phase] - 1}")
    return folder


def _absent(folder: str) -> tuple[int, ...]:
    present = {int(rank) for rank in _runtime.entries(folder)}
    return tuple(rank for rank in range(_runtime.process_count()) if rank not in present)


def _give_up(phase: str, folder: str, seconds: float) -> None:
    # If one rank is late, all that take part in its collective are: the line that each is at shows whom they wait for.
    _runtime.put(f"{folder}/where/{_runtime.rank()}", _main_thread())
    time.sleep(_ANSWER)
    where = _runtime.entries(f"{folder}/where")
    late = "; ".join(f"rank {rank} ({where.get(str(rank), 'does not answer')})" for rank in _absent(f"{folder}/done"))
    abort(DEADLINE_EXIT, f"phase {phase!r} must end within {seconds:g} s; not finished: {late}.")


def _main_thread() -> str:
    """The line of code that this process is at, such as "at train.py:81 in _run"."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "has no main thread any more"
    code = frame.f_code
    return f"at {code.co_filename.rpartition('/')[2]}:{frame.f_lineno} in {code.co_name}"
