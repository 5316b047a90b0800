"""The process that runs one reward function: `python -P -m grpo_trainer.rewards.worker`, started by `workers`.

Requests come in on standard input and replies go out on standard output, see `channel`; a reply carries the number of
its request. Both pipes are put out of the function's reach before it is imported: what it prints goes to standard
error, and no process that it starts inherits them. The process ends with its parent, however that ends, and at the
latest when a request's time is over.
"""

from __future__ import annotations

import faulthandler
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from itertools import islice
from typing import IO, Any

from grpo_trainer.report.terminal import printable
from grpo_trainer.rewards.channel import receive, send
from grpo_trainer.rewards.functions import RewardError, load_function

__all__ = ["call_function", "main", "shorten"]

_LONGEST_SHOWN, _LONGEST_MESSAGE = 200, 2_000  # characters
_LONGEST_REQUEST = (1 << 32) - 1
# The squares of rewards are summed in float32. Whatever is beyond this is no reward but an accident.
_LARGEST = 1e12


def main() -> None:
    """Load the function that the first request names, then answer requests until there are no more."""
    pipe_in, pipe_out = _claim_pipes()
    faulthandler.enable()  # a segmentation fault leaves a traceback on standard error
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C asks the run to finish its step, which needs this process
    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(pipe_in, requests), daemon=True).start()
    function = _load(requests.get(), pipe_out)
    while True:
        request = requests.get()
        # In C, so that it also ends a function that never lets go of the interpreter's lock (such as a regular
        # expression that backtracks for ever), and shows where it was.
        faulthandler.dump_traceback_later(request["seconds"], exit=True)
        reply = call_function(function, request["given"])
        faulthandler.cancel_dump_traceback_later()
        send(pipe_out, reply | {"number": request["number"]})


def call_function(function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """Call a reward function that may do anything.

    Args:
        function: of the user.
        given: its keyword arguments.

    Returns:
        `values` (a number, None where unscored) and `wrong` (row -> what was returned in place of a number); or
        `kind` (`exception` or `shape`) and `message`, where there are no values.
    """
    rows = len(given["completions"])
    try:
        returned = function(**given)
        listed = _listed(returned, rows)
        if listed is None or len(listed) != rows:
            message = f"must return a list of {rows} rewards, one a completion: got {_shown(returned)}"
            return {"kind": "shape", "message": message}
        numbers = [_number(value) for value in listed]
        wrong = {row: _shown(listed[row]) for row in range(rows) if listed[row] is not None and numbers[row] is None}
        return {"values": numbers, "wrong": wrong}
    except BaseException as error:  # noqa: BLE001 - the user's own code: it may also call sys.exit
        *_, frame = traceback.extract_tb(error.__traceback__)
        where = f"{os.path.basename(frame.filename)}:{frame.lineno}"
        text = "".join(traceback.format_exception_only(error)).strip()
        hint = "; reward.memory limits the data of its process" if isinstance(error, MemoryError) else ""
        return {"kind": "exception", "message": f"raised {shorten(text)} ({shorten(where)}){hint}"}


def shorten(text: str, longest: int = _LONGEST_MESSAGE) -> str:
    """Cut a text of a reward function to a length that a message may have, and escape what acts on a terminal."""
    shown = printable(text[: longest + 1], newlines=False)
    return shown if len(shown) <= longest else f"{shown[:longest]}..."


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    pipe_in, pipe_out = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    for pipe in (pipe_in, pipe_out):  # `os.dup` keeps them from programs that it starts, and this from its forks
        os.register_at_fork(after_in_child=pipe.close)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return pipe_in, pipe_out


def _listen(pipe: IO[bytes], requests: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            requests.put(receive(pipe, longest=_LONGEST_REQUEST))
    except EOFError:
        os._exit(0)  # the trainer is gone, perhaps killed: whatever the function is doing has no reader


def _load(request: Mapping[str, Any], pipe: IO[bytes]) -> Callable[..., Any]:
    def answer(**reply: Any) -> None:
        send(pipe, reply | {"number": request["number"]})

    sys.path.extend(path for path in request["paths"] if path not in sys.path)
    faulthandler.dump_traceback_later(request["seconds"], exit=True)
    try:
        function = load_function(request["function"])
    except RewardError as error:
        answer(error=shorten(str(error)))
        sys.exit(1)
    except BaseException as error:  # noqa: BLE001 - importing runs the user's own code
        text = "".join(traceback.format_exception_only(error)).strip()
        answer(error=f"reward function {request['function']!r}: importing its module raised {shorten(text)}")
        sys.exit(1)
    faulthandler.cancel_dump_traceback_later()
    answer(ready=True)
    return function


def _listed(returned: Any, rows: int) -> list[Any] | None:
    """The values in their order, or None where there is none; at most one more than there should be."""
    unordered = isinstance(returned, str | bytes | Mapping | set | frozenset)
    if unordered or not hasattr(returned, "__iter__") or getattr(returned, "ndim", 1) != 1:
        return None
    return list(islice(returned, rows + 1))


def _number(value: Any) -> float | None:
    """A real number of a usable size, of numpy, torch or jax as well; None for anything else."""
    if not (hasattr(value, "__float__") or hasattr(value, "__index__")) or getattr(value, "ndim", 0):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return number if math.isfinite(number) and abs(number) <= _LARGEST else None


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and len(shape) != 1:
        return f"an array of shape {shape}" if shape else f"a single number, {shorten(repr(value), _LONGEST_SHOWN)}"
    return shorten(repr(value), _LONGEST_SHOWN)


if __name__ == "__main__":
    main()
