"""Reward functions for tests, good and bad; imported by name, in processes of their own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from typing import Any


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
        case "child":
            subprocess.Popen(["sleep", "1000"])
            time.sleep(1e6)
        case "nan":
            return float("nan")
        case "text":
            return "1.0"
        case "none":
            return None
    return 0.5


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
