"""A soak: whatever happens to a run, does it end as if nothing had happened?

    hatch run bench:soak --minutes 120 --seed 0

Trains once undisturbed, and then again and again until the minutes are over while the run is killed (SIGKILL), stopped
(SIGTERM, SIGHUP), loses its reward process, has a full disk for a while and has its clock set. Whatever ends it, the
same command goes on. Every run must end with the state, the metrics (times aside), the completions and the evaluations
of the undisturbed one. Prints what was done, and exits with 1 at the first difference, unexpected exit code, traceback,
hang or surviving process. Linux only.

A full disk is a limit on the size of the run's files (RLIMIT_FSIZE), set and lifted from outside. The clock is the
run's `time.time`, replaced by this script before it starts the run; `time.monotonic` goes on, as on every machine whose
clock is set.
"""

import argparse
import contextlib
import json
import mmap
import os
import random
import re
import resource
import runpy
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

EVERY = 5  # steps between checkpoints
REWARDS = '''
import time

def letters(*, completions, **_):
    """The share of different letters, of a function that takes long enough to be killed in the middle."""
    time.sleep(0.2)
    return [len(set(text)) / max(1, len(text)) for text in completions]
'''
SETS = (
    "reward.functions=[answer, format, soak_rewards:letters]",  # as a user's own: in a process that can be killed
    "reward.weights=[1.0, 0.1, 0.01]",
    "reward.timeout=600",
    f"checkpoint.every={EVERY}",
    "checkpoint.export=auto",
)
# What may happen, and the exit codes that it may cause; a run that was done anyway ends with 0.
SIGNALS = {"SIGKILL": {-9}, "SIGTERM": {75, -15}, "SIGHUP": {75, -1}}
KINDS = (*SIGNALS, "full disk", "reward process killed", "clock set")
FULL_DISK_CODES = {1, 2}
PATIENCE = 900.0  # seconds for an end that was asked for, or for the next sign of life


class SoakError(Exception):
    """What the soak was to find."""


def main() -> None:
    if sys.argv[1:2] == ["--with-clock"]:
        train_with_clock(Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="so long, and until everything happened")
    parser.add_argument("--seed", type=int, default=0, help="of what happens, and when")
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder for the runs")
    parser.add_argument("--app", default="grpo_gsm8k.cli", help="module that trains (default: %(default)s)")
    parser.add_argument(
        "--set", dest="sets", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as of `train`"
    )
    options = parser.parse_args()
    try:
        soak(options.out, options.app, [*SETS, *options.sets], 60 * options.minutes, random.Random(options.seed))
    except SoakError as error:
        sys.exit(f"soak: {error}")


def train_with_clock(clock: Path, app: str, arguments: list[str]) -> None:
    """Be the app, with a clock that is as many seconds off as the file says."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it, and a run heeds that
    with clock.open("r+b") as file:
        offset = mmap.mmap(file.fileno(), 8)
    now, now_ns = time.time, time.time_ns
    time.time = lambda: now() + struct.unpack_from("d", offset)[0]
    time.time_ns = lambda: now_ns() + int(struct.unpack_from("d", offset)[0] * 1e9)
    sys.path[0] = str(clock.parent)  # where the reward function is
    sys.argv[1:] = arguments
    runpy.run_module(app, run_name="__main__", alter_sys=True)


def soak(out: Path, app: str, sets: list[str], seconds: float, chance: random.Random) -> None:
    """Train undisturbed, then disturbed for so long; raise SoakError at the first thing that is wrong."""
    out.mkdir(parents=True)
    (out / "soak_rewards.py").write_text(REWARDS)
    whole = Life(out, "whole", app, sets)
    if code := whole.process.wait():
        raise SoakError(f"the undisturbed run ended with code {code}: see {whole.log}")
    expected, times = outcome(whole.folder), whole.times()
    print(f"undisturbed: {times.steps} steps, {times.startup:.0f} s until the first, then {times.step:.1f} s each")
    print("| minute | run | what | where | then |", "|---|---|---|---|---|", sep="\n", flush=True)
    done, rounds, begun = Counter[str](), 0, time.monotonic()

    def over() -> bool:
        return time.monotonic() > begun + seconds and all(done[kind] for kind in KINDS)

    def write(*cells: object) -> None:
        print(f"| {(time.monotonic() - begun) / 60:.1f} | {' | '.join(map(str, cells))} |", flush=True)

    while not over():
        rounds += 1
        while (life := Life(out, f"run{rounds}", app, sets)).pass_through(times, chance, over, done, write):
            pass
        if differing := [name for name, value in outcome(life.folder).items() if value != expected.get(name)]:
            raise SoakError(f"{life.folder} differs from {whole.folder} in {', '.join(differing)}")
        write(life.name, "done", f"after {times.steps} steps", "everything equal")
    print(f"{done.total()} disturbances, {rounds} runs, each equal to the undisturbed one:", dict(sorted(done.items())))


@dataclass(frozen=True)
class Times:
    """How long an undisturbed run takes.

    Args:
        steps: lines of its metrics.
        startup: seconds until the first one.
        step: seconds of each further one.
    """

    steps: int
    startup: float
    step: float


class Life:
    """One process of a run, from its start to its end."""

    def __init__(self, out: Path, name: str, app: str, sets: list[str]) -> None:
        self.folder, self.log, self._clock = out / name, out / f"{name}.log", out / f"{name}.clock"
        self.name, self._family = name, list[tuple[int, str]]()
        self._clock.write_bytes(bytes(8))
        self._printed = self.log.stat().st_size if self.log.exists() else 0
        self._begun, self._lines = time.monotonic(), list[float]()
        arguments = [f"--set={setting}" for setting in (f"run.dir={self.folder}", *sets)]
        command = [sys.executable, __file__, "--with-clock", str(self._clock), app, "train", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        # A pipe, as the disk may be full.
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def _copy(self) -> None:
        if self.process.stdout is not None:
            with self.log.open("ab", buffering=0) as log:
                for line in self.process.stdout:
                    log.write(line)
                    if re.search(rb"\bstep \d+/\d+ ", line):
                        self._lines.append(time.monotonic())

    def times(self) -> Times:
        """How long it took."""
        self._reader.join()
        first, *_, last = self._lines
        return Times(len(self._lines), first - self._begun, (last - first) / (len(self._lines) - 1))

    def pass_through(
        self,
        times: Times,
        chance: random.Random,
        over: Callable[[], bool],
        done: Counter[str],
        write: Callable[..., None],
    ) -> int:
        """Disturb it at random instants until it ends or the time is over; its exit code."""
        kind, allowed = "nothing", set[int]()  # what a full disk broke may end it later
        while not over():
            # While it starts, or some steps later, so that most of them reach another checkpoint.
            steps, share = chance.choice((0, chance.randint(1, 3 * EVERY))), chance.random()
            goal = len(self._lines) + steps
            while self.process.poll() is None and len(self._lines) < goal and not over():
                self._expect_life()
                time.sleep(0.1)
            wait = share * (times.step if self._lines else times.startup)
            if self._ended(wait) or over():
                break
            chosen = min(KINDS, key=lambda kind: (done[kind], chance.random()))
            where = f"after {len(self._lines)} steps" if self._lines else f"{share:.0%} of starting"
            codes = self._disturb(chosen, times, chance)
            if codes is None:
                continue  # there is no reward process yet
            kind, allowed = chosen, allowed | codes
            done[kind] += 1
            ended = self._ended(PATIENCE) if kind in SIGNALS else self._ended(0)
            if kind in SIGNALS and not ended:
                raise SoakError(f"{self.name} does not end {PATIENCE:g} s after {kind}: see {self.log}")
            code = self.process.poll()
            write(self.name, kind, where, "goes on" if code is None else f"code {code}")
            if code is not None:
                self._check(kind, code, allowed)
                return code
        while not self._ended(1.0):
            self._expect_life()
        self._check(kind, self.process.returncode, allowed)
        return self.process.returncode

    def _ended(self, seconds: float) -> bool:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _expect_life(self) -> None:
        silent = time.monotonic() - max([self._begun, *self._lines[-1:]])
        if silent > PATIENCE:
            raise SoakError(f"{self.name} has done no step for {silent:.0f} s: see {self.log}")

    def _disturb(self, kind: str, times: Times, chance: random.Random) -> set[int] | None:
        """Do it; the exit codes that it may cause, None if it cannot be done now."""
        self._family = descendants(self.process.pid)
        if kind in SIGNALS:
            self.process.send_signal(signal.Signals[kind])
            return SIGNALS[kind]
        if kind == "full disk":
            size = chance.choice((0, 1 << 12, 1 << 20))
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            if not self._ended(chance.uniform(1, 3 * EVERY) * times.step):
                limit = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, limit)
            return FULL_DISK_CODES
        if kind == "clock set":
            month = 30 * 24 * 3600
            self._clock.write_bytes(struct.pack("d", chance.choice((-1, 1)) * chance.choice((1, 3600, month))))
            return set()
        workers = [pid for pid, _ in self._family if b"grpo_trainer.rewards.worker" in command_of(pid)]
        if not workers:
            return None
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(workers), signal.SIGKILL)  # the process itself, or its supervisor
        return set()

    def _check(self, kind: str, code: int, codes: set[int]) -> None:
        """Raise unless it ended as it may, said so in a sentence and left no process behind."""
        patience = time.monotonic() + 60
        while survivors := [pid for pid, since in self._family if started(pid) == since]:
            if time.monotonic() > patience:
                raise SoakError(f"{self.name} is over after {kind}, and its processes {survivors} live on")
            time.sleep(0.1)
        self._reader.join()
        if code not in codes | {0}:
            raise SoakError(f"{self.name} ended with code {code} after {kind}: see {self.log}")
        if b"Traceback (most recent call last)" in self.log.read_bytes()[self._printed :]:
            raise SoakError(f"{self.name} shows a traceback after {kind}: see {self.log}")


def outcome(folder: Path) -> dict[str, Any]:
    """What a run leaves, without what a clock, a cache or the death of a reward process decides."""
    texts = (folder / "completions.jsonl", *sorted((folder / "evaluations").glob("*")))
    return {
        "summary.json, with the digest of the state": settled(json.loads((folder / "summary.json").read_text())),
        "metrics.jsonl": [settled(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "the policy": sha256((folder / "export" / "model.safetensors").read_bytes()).hexdigest(),
        **{str(file.relative_to(folder)): file.read_text() for file in texts},
    }


def settled(numbers: dict[str, Any]) -> dict[str, Any]:
    """Without times, what a process counts for itself, and failures of reward processes."""
    own = ("time", "seconds", "compiled", "reward_failures", "warnings")
    return {name: value for name, value in numbers.items() if not name.startswith(own) and "per_second" not in name}


def descendants(pid: int) -> list[tuple[int, str]]:
    """Processes that this one started, and those that they started, with the ticks at which each began."""
    parents = {int(path.name): stat(int(path.name)) for path in Path("/proc").glob("[0-9]*")}
    family, found = [pid], list[tuple[int, str]]()
    for parent in family:
        children = [child for child, fields in parents.items() if fields and fields[1] == str(parent)]
        family += children
        found += [(child, parents[child][19]) for child in children]
    return found


def stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name; none for a process that is gone or dead."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [] if fields[0] == "Z" else fields


def started(pid: int) -> str:
    return (stat(pid) or [""] * 20)[19]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


if __name__ == "__main__":
    main()
