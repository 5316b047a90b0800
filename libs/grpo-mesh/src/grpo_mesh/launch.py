"""Runs a job of many processes on this machine: `python -m grpo_mesh.launch --processes 2 -- python train.py`.

Every process gets GRPO_COORDINATOR (host:port), GRPO_PROCESS_COUNT and GRPO_PROCESS_ID, which
`grpo_mesh.initialize()` reads as an explicit job. With `--devices-per-process` they run on that many CPU devices each
(JAX_PLATFORMS=cpu and --xla_force_host_platform_device_count in XLA_FLAGS). Output is prefixed with the rank. When one
process fails, the others are stopped and its code is returned. No process outlives the launcher, however that ends: on
SIGTERM, SIGINT or SIGHUP, or when nobody reads its output any more, it stops them all; a second signal kills them at
once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType

from grpo_mesh._hosts import COORDINATOR, PROCESS_COUNT, PROCESS_ID
from grpo_mesh._startup import FORCED_DEVICES
from grpo_mesh._supervised import SupervisedProcess

GRACE = 5.0  # seconds between asking a process to stop and killing it
EXIT_INTERRUPTED, EXIT_CLOSED_PIPE = 130, 141  # as a shell: 128 + SIGINT, 128 + SIGPIPE
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def launch(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int | None = None,
    grace: float = GRACE,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Starts the processes, streams their output, and stops all when one fails, a signal comes, or nobody reads on.

    Args:
        command: program and arguments, the same for all.
        processes: how many.
        devices_per_process: CPU devices of each; None leaves the choice of devices to jax.
        grace: seconds between SIGTERM and SIGKILL for the rest.
        environment: what they inherit, default `os.environ`.

    Returns:
        0 if all succeed, else the code of the first that failed (128 + signal if it was killed); 130 after a signal,
        141 when standard output was closed or cannot be written.
    """
    inherited = dict(os.environ if environment is None else environment)
    if devices_per_process is not None:
        flags = re.sub(rf"{FORCED_DEVICES}=\d+", "", inherited.get("XLA_FLAGS", "")).split()
        inherited |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*flags, f"{FORCED_DEVICES}={devices_per_process}"]),
        }
    shared = {COORDINATOR: f"127.0.0.1:{_free_port()}", PROCESS_COUNT: str(processes), "PYTHONUNBUFFERED": "1"}
    children: list[SupervisedProcess] = []
    readers: list[threading.Thread] = []
    lock, closed = threading.Lock(), threading.Event()
    with _signals() as received:
        try:
            for rank in range(processes):
                child = SupervisedProcess(
                    command,
                    env=inherited | shared | {PROCESS_ID: str(rank)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
                children.append(child)
                readers.append(threading.Thread(target=_copy, args=(child, rank, lock, closed), daemon=True))
                readers[-1].start()
            return _wait(children, received, closed)
        finally:
            _stop(children, grace, received)
            for reader in readers:
                reader.join(timeout=1)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that came while the block runs. None of them interrupts it, so none interrupts the clean-up."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # signals are the main thread's business
        return
    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]  # nohup ignores SIGHUP
    handlers = {number: signal.signal(number, note) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _wait(children: Sequence[SupervisedProcess], received: Sequence[int], closed: threading.Event) -> int:
    running = dict(enumerate(children))
    while running:
        if received:
            return EXIT_INTERRUPTED
        if closed.is_set():
            return EXIT_CLOSED_PIPE
        for rank, child in list(running.items()):
            if (code := child.poll()) is None:
                continue
            del running[rank]
            if code != 0:
                code = 128 - code if code < 0 else code
                rest = f"; stopping {len(running)} more" if running else ""
                print(f"grpo_mesh.launch: rank {rank} ended with code {code}{rest}", file=sys.stderr, flush=True)
                return code
        time.sleep(0.05)
    return 0


def _stop(children: Sequence[SupervisedProcess], grace: float, received: Sequence[int]) -> None:
    """Ask the processes to end, and kill those that have not after the grace, or at the next signal."""
    before, until = len(received), time.monotonic() + grace
    for child in children:
        child.terminate()
    while any(child.poll() is None for child in children) and time.monotonic() < until and len(received) == before:
        time.sleep(0.05)
    for child in children:
        child.end()


def _copy(child: SupervisedProcess, rank: int, lock: threading.Lock, closed: threading.Event) -> None:
    if child.stdout is None:
        return
    for line in io.TextIOWrapper(child.stdout, errors="replace"):
        try:
            with lock:
                sys.stdout.write(f"[{rank}] {line}" if line.endswith("\n") else f"[{rank}] {line}\n")
                sys.stdout.flush()
        except OSError as error:
            if not isinstance(error, BrokenPipeError):
                print(f"grpo_mesh.launch: the output cannot be written: {error}", file=sys.stderr, flush=True)
            closed.set()
            return


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see `--help`."""
    parser = argparse.ArgumentParser("python -m grpo_mesh.launch", description="Many processes on this machine.")
    parser.add_argument("--processes", type=int, required=True, help="how many processes to start")
    parser.add_argument("--devices-per-process", type=int, help="run on this many CPU devices each")
    parser.add_argument("--grace", type=float, default=GRACE, help="seconds to stop in before being killed (5)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- program and arguments")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1 or (options.devices_per_process or 1) < 1:
        parser.error("give at least one process and device, and a command after --")
    try:
        code = launch(
            command,
            processes=options.processes,
            devices_per_process=options.devices_per_process,
            grace=options.grace,
        )
        sys.stdout.flush()
    except BrokenPipeError:
        code = EXIT_CLOSED_PIPE
    if code == EXIT_CLOSED_PIPE:  # Python's own flush at the end must find a place to write to
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
    return code


if __name__ == "__main__":
    sys.exit(main())
