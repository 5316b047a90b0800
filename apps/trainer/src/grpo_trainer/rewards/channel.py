"""Messages between a run and a reward process: a length in four bytes, and as many bytes of JSON, over a pipe."""

from __future__ import annotations

import json
import math
import os
import selectors
import time
from typing import IO, Any

__all__ = ["receive", "send"]

_LONGEST = 1 << 26  # bytes of a reply that is worth reading; a request is as long as a step's completions


def send(pipe: IO[bytes], message: Any, *, until: float = math.inf) -> None:
    """Write one message; lone surrogates, which a policy may well sample, survive as JSON escapes.

    Args:
        pipe: unbuffered; with a deadline it must not block.
        message: of JSON values; anything else, such as a date in a column, becomes text.
        until: deadline, as of `time.monotonic()`.

    Raises:
        TimeoutError: the other side did not read it in time.
        OSError: the other side is gone.
    """
    data = json.dumps(message, default=str).encode("ascii")
    left = memoryview(len(data).to_bytes(4, "big") + data)
    while left:
        _await(pipe, selectors.EVENT_WRITE, until)
        left = left[os.write(pipe.fileno(), left) :]


def receive(pipe: IO[bytes], *, until: float = math.inf, longest: int = _LONGEST) -> Any:
    """Read one message.

    Args:
        pipe: unbuffered.
        until: deadline, as of `time.monotonic()`.
        longest: bytes that a message may have.

    Returns:
        The message.

    Raises:
        EOFError: the other side is gone.
        TimeoutError: no whole message came in time.
        ValueError: what came is not a message.
    """
    size = int.from_bytes(_read(pipe, 4, until), "big")
    if size > longest:
        raise ValueError(f"a message must have at most {longest} bytes: got one of {size}")
    return json.loads(_read(pipe, size, until))


def _read(pipe: IO[bytes], size: int, until: float) -> bytes:
    data = bytearray()
    while len(data) < size:
        _await(pipe, selectors.EVENT_READ, until)
        part = os.read(pipe.fileno(), size - len(data))
        if not part:
            raise EOFError("the pipe was closed")
        data += part
    return bytes(data)


def _await(pipe: IO[bytes], event: int, until: float) -> None:
    seconds = None if until == math.inf else max(0.0, until - time.monotonic())
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, event)
        if not selector.select(seconds):
            raise TimeoutError("the other side did not answer in time")
