"""Programs compiled for a slice up to their schedule, each in a process of its own, which ends there.

The TPU compiler cannot be asked to stop before it generates code, where it spends nineteen twentieths of its time. A
process can be ended: `python -m grpo_trainer.assemble.preflight.apart`, started by `Compilers`, imports what it needs
once and forks for every program. The fork replies with the program's figures as soon as the compiler has written its
schedule and its buffers, and ends while code is being generated.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import jax
from pydantic import TypeAdapter

from grpo_mesh import SupervisedProcess, make_mesh, slice_devices
from grpo_mesh.preflight import Measured, Program, compile_only, measure
from grpo_sampler import ModelConfig
from grpo_trainer.assemble.blueprint import blueprint
from grpo_trainer.assemble.preflight.programs import CompilerError, programs
from grpo_trainer.report.terminal import printable
from grpo_trainer.settings.schema import Settings

__all__ = ["Compilers", "main"]

_MOST_AT_ONCE = 4  # each takes 1 to 2 GB of memory
_SHOWN = 2_000  # characters of what a process printed


@dataclass(frozen=True)
class _Request:
    """A program of the blueprint of these settings and this model on a slice."""

    settings: Settings
    model: ModelConfig
    slice_name: str
    program: str


@dataclass(frozen=True)
class _Reply:
    """Figures of a program, or why there are none."""

    program: str
    measured: Measured | None = None
    failed: str = ""


_REQUEST, _REPLY = TypeAdapter(_Request), TypeAdapter(_Reply)


class Compilers:
    """Processes that compile programs up to their schedule. As a context, they end where it does.

    Args:
        model: dimensions of the policy.
        slice_name: the slice to compile for.
    """

    def __init__(self, model: ModelConfig, slice_name: str) -> None:
        self._model, self._slice_name = model, slice_name
        self._idle: list[_Compiler] = []

    def measure(self, wanted: Sequence[Program], settings: Settings) -> Generator[Measured, None, None]:
        """Compile programs, some at once.

        Args:
            wanted: of `programs`, of a blueprint of these settings.
            settings: of the run, resolved.

        Yields:
            What each needs and does, in the order given, as `grpo_mesh.preflight.measure(..., code=False)` tells it.

        Raises:
            CompilerError: the compiler failed for another reason than a lack of memory.
        """
        measured: dict[str, Measured] = {}
        waiting, running = deque(wanted), deque[tuple[Program, _Compiler]]()
        try:
            while waiting or running:
                while waiting and len(running) < _at_once():
                    program = waiting.popleft()
                    running.append((program, self._idle.pop() if self._idle else _Compiler()))
                    running[-1][1].ask(_Request(settings, self._model, self._slice_name, program.name))
                program, compiler = running[0]
                figures = compiler.answer(program.name)
                self._idle.append(running.popleft()[1])
                beside = program.beside(measured) if callable(program.beside) else program.beside
                measured[program.name] = replace(figures, beside=beside)
                yield measured[program.name]
        finally:
            for _, compiler in running:
                compiler.end()

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        while self._idle:
            self._idle.pop().end()


class _Compiler:
    """The process of `main`, seen from outside."""

    def __init__(self) -> None:
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `end`
        command = [sys.executable, "-P", "-m", "grpo_trainer.assemble.preflight.apart"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._printed}
        # What a program leaves that is given up half-way goes with the process, unless a signal ends this one first.
        self._folder = tempfile.TemporaryDirectory(prefix="grpo-trainer-", ignore_cleanup_errors=True)
        self._asked_at = 0  # how much was printed before
        self._process = SupervisedProcess(command, env={**os.environ, "TMPDIR": self._folder.name}, **pipes)

    def ask(self, request: _Request) -> None:
        assert self._process.stdin is not None
        self._asked_at = self._printed.seek(0, os.SEEK_END)
        with contextlib.suppress(BrokenPipeError):  # a process that has ended does not answer
            self._process.stdin.write(_REQUEST.dump_json(request) + b"\n")
            self._process.stdin.flush()

    def answer(self, name: str) -> Measured:
        assert self._process.stdout is not None
        reply = _Reply("")
        while reply.program != name:  # one that ended badly after its reply has sent another
            line = self._process.stdout.readline()
            if not line.endswith(b"\n"):
                reply = _Reply(name, failed=f"its process ended with code {self._ended()}")
            else:
                reply = _REPLY.validate_json(line)
        if reply.measured is not None:
            return reply.measured
        self._printed.seek(self._asked_at)
        printed = printable(self._printed.read().decode("utf-8", "backslashreplace").strip())
        note = f". It printed: {printed[-_SHOWN:]}" if printed else ""
        raise CompilerError(f"the compiler failed at program {name!r}: {reply.failed}{note}")

    def end(self) -> None:
        self._ended()
        self._folder.cleanup()
        for file in (self._process.stdin, self._process.stdout, self._printed):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):  # of a request that was not read
                    file.close()

    def _ended(self) -> int:
        return self._process.end()


def main() -> None:
    """Answer the requests on standard input, one a line, on standard output."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever else is printed is no reply
    for line in sys.stdin.buffer:
        if (child := os.fork()) == 0:
            replies.write(_REPLY.dump_json(_compile(_REQUEST.validate_json(line))) + b"\n")
            os._exit(0)  # code is being generated, in a thread that nothing can stop
        _, status = os.waitpid(child, 0)
        if status:
            failed = f"its process ended with code {os.waitstatus_to_exitcode(status)}"
            replies.write(_REPLY.dump_json(_Reply(_REQUEST.validate_json(line).program, failed=failed)) + b"\n")


def _compile(request: _Request) -> _Reply:
    compile_only(request.slice_name)
    mesh = make_mesh(request.settings.mesh, slice_devices(request.slice_name))
    plan = blueprint(request.settings, request.model, mesh)
    [program] = [program for program in programs(plan) if program.name == request.program]
    try:
        [measured] = measure([replace(program, beside=0)], code=False)
    except jax.errors.JaxRuntimeError as error:
        return _Reply(request.program, failed=str(error).splitlines()[0])
    return _Reply(request.program, measured)


def _at_once() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _MOST_AT_ONCE)


if __name__ == "__main__":
    main()
