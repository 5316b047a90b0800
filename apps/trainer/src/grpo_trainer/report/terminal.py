"""The terminal: text that is safe to show, any encoding, output that cannot be written, and faults of the program."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import traceback
import unicodedata
from types import TracebackType

__all__ = ["OutputError", "drop_output", "explain_faults", "guard_output", "printable"]


class OutputError(OSError):
    """Standard output cannot be written: its disk is full, or its reader went away (`BrokenPipeError` is the cause)."""


class _Output(io.TextIOWrapper):
    """Text output whose failures can be told from those of other files."""

    def write(self, text: str, /) -> int:
        try:
            return super().write(text)
        except OSError as error:
            raise OutputError(*error.args) from error

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            raise OutputError(*error.args) from error


def guard_output() -> None:
    """Make this process's output safe to print to.

    What the terminal's encoding lacks is written as an escape, and a failed write is an `OutputError`. Output that was
    closed before this process began goes nowhere.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    old = sys.stdout
    if isinstance(old, io.TextIOWrapper):
        old.flush()
        buffering, encoding = old.line_buffering, old.encoding
        sys.stdout = sys.__stdout__ = _Output(
            old.detach(), encoding=encoding, errors="backslashreplace", line_buffering=buffering
        )


def drop_output() -> None:
    """Send what is still to be printed nowhere, so that Python's own flush at exit cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def explain_faults(program: str) -> None:
    """Have an uncaught exception say, after its traceback, that it is a fault of the program, and where it was written.

    Args:
        program: its name.
    """

    def explain(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        if any("full traceback:" in str(note) for note in getattr(error, "__notes__", ())):
            where = "it is in the file named there, too"
        else:
            try:
                with tempfile.NamedTemporaryFile(
                    "w", prefix=f"{program}-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
                ) as file:
                    file.write(text)
                where = f"it is in {file.name}, too"
            except OSError as failure:
                where = f"it could not be saved: {failure}"
        with contextlib.suppress(OSError):
            print(
                f"{text}{program}: this is a fault of the program, not of your settings or data. Please report the "
                f"traceback above with the command that led to it; {where}",
                file=sys.stderr,
                flush=True,
            )

    sys.excepthook = explain


def printable(text: str, *, newlines: bool = True) -> str:
    r"""Replace everything invisible that acts on a terminal or reorders a line by a visible escape.

    Args:
        text: anything, such as a sampled completion.
        newlines: keep newlines and tabs; otherwise they are escaped too.

    Returns:
        The text with control characters (ESC becomes \x1b), bidirectional overrides, other format characters and
        lone surrogates escaped.
    """
    kept = "\n\t" if newlines else ""
    return "".join(
        char if char in kept or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escape(char)
        for char in text
    )


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
