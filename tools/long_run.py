"""A long run, watched from outside: does memory stay flat, do steps keep their time, does nothing recompile?

    hatch run bench:long-run --steps 2000 --out runs/long

Trains with the laptop preset and what `--set` adds, without evaluations, and samples the resident memory of the whole
process tree. Writes samples.jsonl and long-run.png beside the run, and prints how its second and last quarters differ.
`--report` draws and prints again from an existing folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from grpo_trainer.run.files import read_lines, read_summary
from grpo_trainer.settings.layers import load_saved

SECONDS_BETWEEN_SAMPLES = 1.0
WRITING = ("logging", "checkpoint")  # phases that only write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=Path("runs/long"), help="folder of the run and its samples")
    parser.add_argument(
        "--set", dest="sets", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="as of `train`"
    )
    parser.add_argument("--report", action="store_true", help="run nothing; report on the folder")
    options = parser.parse_args()
    code = 0 if options.report else watch(options.out, options.steps, options.sets)
    steps = read_lines(options.out / "run" / "metrics.jsonl")
    samples = read_lines(options.out / "samples.jsonl")
    if len(steps) < 8 or len(samples) < 8:
        sys.exit(f"quarters need at least 8 steps and 8 samples: got {len(steps)} and {len(samples)}")
    draw(options.out / "long-run.png", steps, samples)
    every = load_saved(options.out / "run" / "config.yaml").checkpoint.every
    print(report(steps, samples, read_summary(options.out / "run"), every))
    sys.exit(code)


def watch(out: Path, steps: int, sets: Sequence[str]) -> int:
    """Run `train` to its end, sampling its memory; return its exit code."""
    out.mkdir(parents=True, exist_ok=True)
    settings = [f"run.dir={out / 'run'}", f"steps={steps}"]
    settings += ["eval.before=false", "eval.after=false", "eval.every=0", *sets]
    command = [sys.executable, "-m", "grpo_gsm8k.cli", "train", *[f"--set={setting}" for setting in settings]]
    lines = Lines(out / "run" / "metrics.jsonl")
    started = time.monotonic()
    with (out / "log").open("ab") as log, (out / "samples.jsonl").open("w") as samples:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        while run.poll() is None:
            sample = {"seconds": time.monotonic() - started, "step": lines.count(), "bytes": resident(run.pid)}
            samples.write(json.dumps(sample) + "\n")
            samples.flush()
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    print(f"the run ended with code {run.returncode}; its output is in {out / 'log'}")
    return run.returncode


class Lines:
    """Counts the lines of a growing file, reading each byte once."""

    def __init__(self, file: Path) -> None:
        self._file, self._read, self._count = file, 0, 0

    def count(self) -> int:
        if self._file.exists():
            with self._file.open("rb") as file:
                file.seek(self._read)
                new = file.read()
            self._read += len(new)
            self._count += new.count(b"\n")
        return self._count


def resident(pid: int) -> int:
    """Bytes of a process and its descendants; 0 once it is gone."""
    try:
        root = psutil.Process(pid)
        return sum(process.memory_info().rss for process in [root, *root.children(recursive=True)])
    except psutil.NoSuchProcess:
        return 0


def quarter(items: Sequence[dict[str, Any]], number: int, steps: int) -> list[dict[str, Any]]:
    """The items of one quarter of the run, 1 to 4."""
    return [item for item in items if (number - 1) * steps < 4 * item["step"] <= number * steps]


def report(
    steps: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]], summary: dict[str, Any], every: int
) -> str:
    """The second and the last quarter side by side, and what logging and a checkpoint every `every` steps cost."""
    last = steps[-1]["step"]

    def row(name: str, of: Sequence[dict[str, Any]], key: str, middle: Any, scale: float, form: str) -> str:
        second, fourth = (middle([item[key] * scale for item in quarter(of, n, last)]) for n in (2, 4))
        return f"| {name} | {second:{form}} | {fourth:{form}} | {fourth / second - 1:+.1%} |"

    alive = [sample for sample in samples if sample["bytes"]]
    compiled = [step["compiled_programs"] for step in steps]
    final = next(step["step"] for step in steps if step["compiled_programs"] == compiled[-1])
    lines = [
        f"{last} steps",
        "| | second quarter | last quarter | change |",
        "| --- | --- | --- | --- |",
        row("resident memory, mean, MiB", alive, "bytes", statistics.fmean, 2**-20, ",.1f"),
        row("seconds of a step, median", steps, "seconds", statistics.median, 1.0, ".3f"),
        row("tokens of a step, mean", steps, "tokens", statistics.fmean, 1.0, ",.0f"),
        row("tokens/s, median", steps, "tokens_per_second", statistics.median, 1.0, ",.0f"),
        f"compiled programs: {compiled[-1]:g}, the last at step {final}",
    ]
    if phases := summary.get("seconds_by_phase"):
        working = sum(seconds for name, seconds in phases.items() if name not in (*WRITING, "evaluation"))
        costs = ", ".join(f"{name} {phases.get(name, 0.0) / working:.2%}" for name in WRITING)
        lines.append(f"of the time of steps ({working:.1f} s): {costs}")
    after = [step["seconds"] for step in steps[1:] if every and step["step"] % every == 1]
    others = [step["seconds"] for step in steps[1:] if every and step["step"] % every > 1]
    if after and others:
        # A checkpoint is written in the background, which slows the next step.
        slow, usual = statistics.median(after), statistics.median(others)
        lines.append(
            f"the step after a checkpoint takes {slow:.3f} s, others {usual:.3f} s (medians): "
            f"{(slow - usual) / (every * usual):+.2%} of the time of steps"
        )
    return "\n".join(lines)


def draw(file: Path, steps: Sequence[dict[str, Any]], samples: Sequence[dict[str, Any]]) -> None:
    """Draw memory, step time and compiled programs over the steps, with the quarters marked."""
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(10, 9), layout="constrained")
    memory, seconds, programs = figure.subplots(3, sharex=True)
    alive = [sample for sample in samples if sample["bytes"]]
    memory.plot([sample["step"] for sample in alive], [sample["bytes"] / 2**20 for sample in alive], linewidth=1)
    memory.set_ylabel("resident memory, MiB")
    memory.set_ylim(bottom=0)
    x = [step["step"] for step in steps]
    each = [step["seconds"] for step in steps]
    seconds.plot(x, each, ".", markersize=2, alpha=0.5)
    usual = sorted(each)[int(0.98 * (len(each) - 1))]
    seconds.set_ylim(0, 1.5 * usual)  # one slow step, such as one that compiles, would flatten all others
    window = max(1, len(each) // 40)
    seconds.plot(x, [statistics.median(each[max(0, n - window) : n + window + 1]) for n in range(len(each))])
    seconds.set_ylabel("seconds of a step; running median")
    programs.step(x, [step["compiled_programs"] for step in steps], where="post")
    programs.set_ylabel("compiled programs")
    programs.set_ylim(bottom=0)
    programs.set_xlabel("step")
    for axis in (memory, seconds, programs):
        axis.grid(alpha=0.3)
        for share in (0.25, 0.5, 0.75):
            axis.axvline(share * x[-1], color="grey", linewidth=0.8, linestyle=":")
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    main()
