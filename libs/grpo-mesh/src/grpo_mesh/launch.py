"""Runs a job of many processes on this machine: `python -m grpo_mesh.launch --processes 2 -- python train.py`.

Every process gets GRPO_COORDINATOR (host:port), GRPO_PROCESS_COUNT and GRPO_PROCESS_ID, which
`grpo_mesh.initialize()` reads as an explicit job. With `--devices-per-process` they run on that many CPU devices each
(JAX_PLATFORMS=cpu and --xla_force_host_platform_device_count in XLA_FLAGS). Output is prefixed with the rank. When one
process fails, the others are stopped and its code is returned.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from grpo_mesh._hosts import COORDINATOR, PROCESS_COUNT, PROCESS_ID
from grpo_mesh._startup import FORCED_DEVICES

GRACE = 5.0  # seconds between asking a process to stop and killing it


def launch(
    command: Sequence[str],
    *,
    processes: int,
    devices_per_process: int | None = None,
    grace: float = GRACE,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Starts the processes, streams their output, and stops all when one fails.

    Args:
        command: program and arguments, the same for all.
        processes: how many.
        devices_per_process: CPU devices of each; None leaves the choice of devices to jax.
        grace: seconds between SIGTERM and SIGKILL for the rest.
        environment: what they inherit, default `os.environ`.

    Returns:
        0 if all succeed, else the code of the first that failed (128 + signal if it was killed).
    """
    inherited = dict(os.environ if environment is None else environment)
    if devices_per_process is not None:
        flags = re.sub(rf"{FORCED_DEVICES}=\d+", "", inherited.get("XLA_FLAGS", "")).split()
        inherited |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*flags, f"{FORCED_DEVICES}={devices_per_process}"]),
        }
    shared = {COORDINATOR: f"127.0.0.1:{_free_port()}", PROCESS_COUNT: str(processes), "PYTHONUNBUFFERED": "1"}
    children: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    lock = threading.Lock()
    try:
        for rank in range(processes):
            child = subprocess.Popen(
                command,
                env=inherited | shared | {PROCESS_ID: str(rank)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its own children can be stopped with it
            )
            children.append(child)
            readers.append(threading.Thread(target=_copy, args=(child.stdout, rank, lock), daemon=True))
            readers[-1].start()
        code = _wait(children)
    finally:
        _stop(children, grace)
        for reader in readers:
            reader.join(timeout=1)
    return code


def _wait(children: Sequence[subprocess.Popen[str]]) -> int:
    running = dict(enumerate(children))
    while running:
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


def _stop(children: Sequence[subprocess.Popen[str]], grace: float) -> None:
    for child in children:
        _signal(child, signal.SIGTERM)
    until = time.monotonic() + grace
    for child in children:
        try:
            child.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(child, signal.SIGKILL)
            child.wait()


def _signal(child: subprocess.Popen[str], number: int) -> None:
    if child.poll() is None:
        try:
            os.killpg(child.pid, number)
        except ProcessLookupError:
            return  # it ended in between


def _copy(stream: IO[str] | None, rank: int, lock: threading.Lock) -> None:
    for line in stream or ():
        with lock:
            sys.stdout.write(f"[{rank}] {line}" if line.endswith("\n") else f"[{rank}] {line}\n")
            sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


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
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return launch(
            command,
            processes=options.processes,
            devices_per_process=options.devices_per_process,
            grace=options.grace,
        )
    except KeyboardInterrupt:
        return 130
    except FileNotFoundError as error:
        print(f"grpo_mesh.launch: cannot start {command[0]!r}: {error}", file=sys.stderr)
        return 127


if __name__ == "__main__":
    sys.exit(main())
