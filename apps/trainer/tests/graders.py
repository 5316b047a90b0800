"""Reward functions for tests, good and bad; imported by name, in processes of their own."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np


def moody(*, completions: list[str], answers: list[str], step: int, **_: Any) -> list[Any]:
    """Does to each completion what it asks for."""
    print("judging", len(completions))  # standard output must stay a user's own
    sys.stdout.flush()
    return [_obey(text) for text in completions]


def _obey(text: str) -> Any:
    match text:
        case "raise":
            raise KeyError("gold")
        case "exit":
            sys.exit("enough")
        case "die":
            print("last words", flush=True)
            os._exit(3)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(1e6)
        case "spin":  # never lets go of the interpreter's lock
            re.match(r"(a+)+$", "a" * 64 + "b")
        case "child":  # in a session of its own
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            print("child", child.pid, flush=True)
            time.sleep(1e6)
        case "daemon":  # a fork holds what this process holds
            if os.fork() == 0:
                os.setsid()
                print("child", os.getpid(), flush=True)
                time.sleep(1000)
            time.sleep(0.5)
            os._exit(3)
        case "forge":
            _write_to_pipes({"number": 1, "values": [9.0], "wrong": {}}, {"values": [9.0]}, 3)
        case "garble":
            _write_to_pipes(b"\xff" * 9)
        case "loud":
            raise ValueError("\x1b]0;title\x07" + "x" * 1_000_000)
        case "large":
            return bytearray(600_000_000) and 1.0
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "none":
            return None
    return 0.5


def _write_to_pipes(*messages: Any) -> None:
    """To every pipe that this process can find."""
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        if descriptor < 3 or not os.path.exists(f"/proc/self/fd/{descriptor}"):
            continue
        if os.readlink(f"/proc/self/fd/{descriptor}").startswith("pipe:"):
            for message in messages:
                data = message if isinstance(message, bytes) else json.dumps(message).encode()
                with contextlib.suppress(OSError):  # the other pipe is for reading
                    os.write(descriptor, data if data is message else len(data).to_bytes(4, "big") + data)


RETURNED: dict[str, Any] = {
    "column": np.ones((3, 1)),
    "scalar": np.float32(1.0),
    "set": {1.0, 2.0, 3.0},
    "mapping": {0: 1.0, 1: 2.0, 2: 3.0},
    "endless": itertools.count(),
    "strings": "123",
    "large": [1e39, 2.0, 10**400],
    "infinite": [math.inf, 2.0, -math.inf],
    "rows": [np.ones(1), 2.0, np.ones(2)],
    "scalars": [np.float32(0.5), True, np.int64(3)],
    "array": np.array([0.5, 1.0, 3.0]),
}


def returns(*, prompts: list[str], **_: Any) -> Any:
    """What its prompt names, for three completions."""
    return RETURNED[prompts[0]]


def short(*, completions: list[str], **_: Any) -> list[float]:
    """One reward too few, but for a single completion."""
    return [1.0] * (len(completions) - 1 or 1)


def slow(*, completions: list[str], **_: Any) -> list[float]:
    """A twentieth of a second each."""
    time.sleep(0.05 * len(completions))
    return [1.0] * len(completions)


def whereabouts(**_: Any) -> list[float]:
    """The process it runs in, and whether that has jax in it."""
    return [os.getpid() + (0.5 if "jax" in sys.modules else 0.0)]


def rare(*, completions: list[str], prompts: list[str], **_: Any) -> list[float]:
    """Cannot stomach the first completion of its life when it comes alone, nor any batch."""
    global _served
    if len(completions) > 1:
        raise ValueError("no batches")
    _served += 1
    if _served == 1:
        raise ValueError("too rare")
    return [len(completions[0]) % 7 / 7]


_served = 0
