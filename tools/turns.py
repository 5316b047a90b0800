"""Sides of a benchmark take turns, a fresh process each, so that a slow minute of the machine slows all of them."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any


def benchmark_parser(description: str | None, sides: Iterable[str]) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", metavar="PYTHON", help="python of an environment with google-tunix")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=["tiny", "small"])
    parser.add_argument("--lengths", nargs="+", default=["full", "geometric"], choices=["full", "geometric"])
    parser.add_argument("--turns", type=int, default=2, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls in each process, after a first one")
    parser.add_argument("--side", choices=list(sides), help="run one side in this process and print JSON")
    return parser


def compare(
    script: str, options: argparse.Namespace, describe: Callable[[dict, float], str], more: tuple[str, ...] = ()
) -> None:
    """Print the seconds of each side, model and kind of lengths, and tunix's ratio to ours.

    Args:
        script: the benchmark's own file; `--side NAME` makes it run one side.
        options: from `benchmark_parser`.
        describe: what a side printed, and its median seconds -> what to say beside them.
        more: further options of each side.
    """
    sides = {"ours": sys.executable} | ({"tunix": options.tunix} if options.tunix else {})
    for model in options.models:
        for lengths in options.lengths:
            case = ["--models", model, "--lengths", lengths, "--repeats", str(options.repeats), *more]
            seconds, last = take_turns(sides, options.turns, case, script=script)
            median = {side: statistics.median(values) for side, values in seconds.items()}
            for side, values in seconds.items():
                beside = describe(last[side], median[side])
                print(f"{model} {lengths} {side}: {median[side]:.3f} s (min {min(values):.3f}; {beside})", flush=True)
            if "tunix" in median:
                print(f"{model} {lengths} ratio: {median['tunix'] / median['ours']:.2f}", flush=True)


def take_turns(
    sides: dict[str, str], turns: int, case: list[str], *, script: str
) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """Run each side in turn; return all seconds of each, and what its last process printed."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    last: dict[str, dict] = {}
    for _ in range(turns):
        for side, python in sides.items():
            last[side] = launch(python, side, case, script=script)
            seconds[side] += last[side]["seconds"]
    return seconds, last


def launch(python: str, side: str, arguments: list[str], *, script: str, cache: str | None = None) -> dict:
    """Run one side of a benchmark in a fresh process, without JAX_ variables of this one; return what it printed."""
    command = [python, script, "--side", side, *arguments]
    # By default jax leaves small programs out of its cache, and a first call consists of small programs.
    stored = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | stored
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def timed(call: Callable[[int], object], repeats: int) -> dict[str, Any]:
    """Seconds of the first call, which compiles, and of `repeats` more; each gets its number."""
    seconds = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        call(turn)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:]}
