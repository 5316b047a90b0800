"""The process that runs one reward function: `python -P -m grpo_trainer.rewards.worker`, started by `reward_workers`.

Requests come in on standard input and replies go out on standard output, each a length in four bytes and as many bytes
of JSON. Both pipes are put out of the function's reach before it is imported: what it prints goes to standard error.
The process ends with its parent, however that ends, and at the latest when a request's time is over.
"""

from __future__ import annotations

import faulthandler
import json
import math
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import IO, Any

from grpo_trainer.rewards.functions import RewardError, load_function

__all__ = ["main", "receive", "send"]

_LONGEST_SHOWN = 200


def send(pipe: IO[bytes], message: Any) -> None:
    """Write one message; lone surrogates, which a policy may well sample, survive as JSON escapes."""
    data = json.dumps(message, default=str).encode("ascii")  # a column may hold a date or the like
    pipe.write(len(data).to_bytes(4, "big") + data)
    pipe.flush()


def receive(pipe: IO[bytes]) -> Any:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    head = pipe.read(4)
    data = pipe.read(int.from_bytes(head, "big")) if len(head) == 4 else b""
    if len(head) < 4 or len(data) < int.from_bytes(head, "big"):
        raise EOFError("the pipe was closed in the middle of a message")
    return json.loads(data)


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
        send(pipe_out, reply)


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
        listed = None if isinstance(returned, str | bytes | dict) else _listed(returned)
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
        return {"kind": "exception", "message": f"raised {text} ({where})"}


def _claim_pipes() -> tuple[IO[bytes], IO[bytes]]:
    pipe_in, pipe_out = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return pipe_in, pipe_out


def _listen(pipe: IO[bytes], requests: queue.SimpleQueue[Any]) -> None:
    try:
        while True:
            requests.put(receive(pipe))
    except EOFError:
        os._exit(0)  # the trainer is gone, perhaps killed: whatever the function is doing has no reader


def _load(request: dict[str, Any], pipe: IO[bytes]) -> Callable[..., Any]:
    sys.path.extend(path for path in request["paths"] if path not in sys.path)
    faulthandler.dump_traceback_later(request["seconds"], exit=True)
    try:
        function = load_function(request["function"])
    except RewardError as error:
        send(pipe, {"error": str(error)})
        sys.exit(1)
    except BaseException as error:  # noqa: BLE001 - importing runs the user's own code
        text = "".join(traceback.format_exception_only(error)).strip()
        send(pipe, {"error": f"reward function {request['function']!r}: importing its module raised {text}"})
        sys.exit(1)
    faulthandler.cancel_dump_traceback_later()
    send(pipe, {"ready": True})
    return function


def _listed(returned: Any) -> list[Any] | None:
    return list(returned) if isinstance(returned, Sequence) or hasattr(returned, "__iter__") else None


def _number(value: Any) -> float | None:
    """A finite real number, of numpy, torch or jax as well; None for anything else."""
    if value is None or not (hasattr(value, "__float__") or hasattr(value, "__index__")):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


if __name__ == "__main__":
    main()
