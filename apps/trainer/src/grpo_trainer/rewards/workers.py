"""Reward functions of a user's own, each in its own process: they may raise, hang or crash, and the run goes on.

A function gets all completions of a step in one call, which may take `reward.timeout` seconds. If that call fails, the
function is called again with one completion at a time, for an eighth of the timeout each and the timeout in total. So
each completion that makes the function fail costs that completion and not the step, and a step takes at most twice the
timeout (plus the restarts of a process that died). A completion that fails alone, or is not reached in time, stays
unscored. A function must therefore judge each completion by itself, whatever else is in the list.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from grpo_mesh import SupervisedProcess
from grpo_trainer.report.terminal import printable
from grpo_trainer.rewards.channel import receive, send
from grpo_trainer.rewards.functions import RewardError

__all__ = ["FAILURES", "Failure", "RewardWorker"]

Kind = Literal["exception", "timeout", "crash", "shape", "none"]
FAILURES: tuple[Kind, ...] = ("exception", "timeout", "crash", "shape")  # those of them that are one

_SHARE_OF_ONE = 1 / 8  # of the timeout, for one completion alone
_START_SECONDS = 120.0  # importing torch from a cold network disk takes a minute
_GRACE_SECONDS = 1.0  # for the process to say where it hung, and to end by itself, before it is killed
_OUTPUT_BYTES = 2_000


@dataclass(frozen=True)
class Failure:
    """A call of a reward function that gave no reward.

    Args:
        kind: `exception`, `timeout`, `crash` (the process died), `shape` (no list of as many numbers), or `none` (None
            where another function gave a number).
        rows: completions left unscored by it; none where each of them could be judged alone.
        message: what happened.
        output: the end of what the function printed, with a traceback where a crash or a hang left one.
    """

    kind: Kind
    rows: tuple[int, ...]
    message: str
    output: str = ""


class RewardWorker:
    """One reward function in a process of its own, started at once and again whenever it dies.

    Any thread may call it. The process ends with this object, with `close`, or with this process, even by SIGKILL, and
    all that the function started ends with it.

    Args:
        name: `module:function`, or a built-in's name.
        timeout: seconds for all completions of a step.
        memory: limit for the data of the process, bytes; None sets none.

    Raises:
        RewardError: the function cannot be loaded; says why.
    """

    def __init__(self, name: str, *, timeout: float, memory: int | None = None) -> None:
        self.name = name
        self._timeout, self._memory = timeout, memory
        self._lock = threading.Lock()
        self._end: weakref.finalize | None = None
        self._start()

    def judge(self, given: Mapping[str, Any]) -> tuple[list[float | None], list[Failure]]:
        """Judge the completions of a step.

        Args:
            given: keyword arguments of the function; those that are lists have one entry a completion.

        Returns:
            A reward a completion, None where unscored; and what failed.
        """
        with self._lock:
            return self._judge(given)

    def close(self) -> None:
        """End the process; it leaves neither an orphan nor a zombie."""
        if self._end is not None:
            self._end()

    def _judge(self, given: Mapping[str, Any]) -> tuple[list[float | None], list[Failure]]:
        rows = len(given["completions"])
        values, failures = self._call(given, self._timeout)
        if values is not None or rows == 1:
            return values or [None], failures
        (whole,) = failures
        alone: list[float | None] = [None] * rows
        failures = []
        until = time.monotonic() + self._timeout
        for row in range(rows):
            if time.monotonic() >= until:
                message = (
                    f"not reached within {self._timeout:g} s (reward.timeout) after the whole batch {whole.message}"
                )
                failures.append(Failure(whole.kind, tuple(range(row, rows)), message, whole.output))
                break
            one = {key: [value[row]] if isinstance(value, list) else value for key, value in given.items()}
            value, failed = self._call(one, self._timeout * _SHARE_OF_ONE)
            alone[row] = value[0] if value else None
            failures += [Failure(failure.kind, (row,), failure.message, failure.output) for failure in failed]
        if not failures:
            message = f"{whole.message}; each completion alone could be judged"
            failures = [Failure(whole.kind, (), message, whole.output)]
        return alone, failures

    def _call(self, given: Mapping[str, Any], seconds: float) -> tuple[list[float | None] | None, list[Failure]]:
        """One request. Values, and failures of single rows; or None and the failure of them all."""
        everything = tuple(range(len(given["completions"])))
        if self._process.poll() is not None:
            try:
                self._start()
            except RewardError as error:
                return None, [Failure("crash", everything, f"could not be started again: {error}")]
        begun = time.monotonic()
        try:
            reply = self._exchange({"given": dict(given), "seconds": seconds}, seconds)
            values = _values(reply, len(everything))
        except (EOFError, OSError, ValueError) as error:
            slow = time.monotonic() - begun >= seconds
            code = self._reap(error)
            message = f"crashed: {_died(code)}"
            if slow:
                message = f"took longer than {seconds:g} s and was killed"
            elif isinstance(error, ValueError):
                message = "was killed because its process sent something that is not a reply"
            return None, [Failure("timeout" if slow else "crash", everything, message, self._printed())]
        if values is None:
            return None, [Failure(reply["kind"], everything, reply["message"], self._printed())]
        printed = self._printed() if reply["wrong"] else ""
        return values, [
            Failure("shape", (int(row),), f"must return finite numbers or None: got {shown}", printed)
            for row, shown in reply["wrong"].items()
        ]

    def _start(self) -> None:
        self.close()
        # A file without a name, emptied at every call: a function may print as much as it likes.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        descriptor = self._output.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_APPEND)
        self._process = SupervisedProcess(
            [sys.executable, "-P", "-u", "-m", "grpo_trainer.rewards.worker"],
            memory=self._memory,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            bufsize=0,
        )
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
        self._end = weakref.finalize(self, _end, self._process)
        try:
            paths = [path or os.getcwd() for path in sys.path]
            request = {"function": self.name, "paths": paths, "seconds": _START_SECONDS}
            reply = self._exchange(request, _START_SECONDS)
        except (EOFError, OSError, ValueError) as error:
            code = self._reap(error)
            raise RewardError(
                f"reward function {self.name!r}: the process that imports it {_died(code)} "
                f"(it has {_START_SECONDS:g} s). It printed: {self._printed() or 'nothing'}"
            ) from error
        if "error" in reply:
            self.close()
            raise RewardError(reply["error"])

    def _exchange(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The reply to a request. What comes without its number, left over or forged, is not the reply."""
        pipe_in, pipe_out = self._process.stdin, self._process.stdout
        if pipe_in is None or pipe_out is None:
            raise OSError("the process has no pipes")
        self._output.truncate(0)
        number, until = secrets.randbits(53), time.monotonic() + seconds + _GRACE_SECONDS
        send(pipe_in, {**request, "number": number}, until=until)
        while True:
            reply = receive(pipe_out, until=until)
            if isinstance(reply, dict) and reply.get("number") == number:
                return reply

    def _reap(self, error: Exception) -> int:
        """End the process after this error; its exit code, its own where it is ending by itself."""
        if isinstance(error, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        self.close()
        return self._process.returncode

    def _printed(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - _OUTPUT_BYTES))
        return printable(self._output.read().decode("utf-8", "backslashreplace").strip())


def _values(reply: Mapping[str, Any], rows: int) -> list[float | None] | None:
    """The rewards of a reply, None if it says why there are none; raise ValueError if it is neither."""
    if reply.get("kind") in FAILURES and isinstance(reply.get("message"), str):
        return None
    values = reply.get("values")
    fits = isinstance(values, list) and len(values) == rows and isinstance(reply.get("wrong"), dict)
    if not fits or not all(value is None or (type(value) is float and math.isfinite(value)) for value in values or ()):
        raise ValueError("neither rewards nor a reason")
    return values


def _end(process: SupervisedProcess) -> None:
    """End the process and whatever it started, and collect its exit code; one that is gone already keeps its own."""
    process.end()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _died(code: int) -> str:
    return f"ended with code {code}" if code >= 0 else f"died of {signal.Signals(-code).name}"
