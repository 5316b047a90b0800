"""Seconds of a whole GRPO step (rollout, reward, update), side by side with the same step made of tunix's own parts.

    python tools/bench_step.py                              # this stack alone
    python tools/bench_step.py --tunix VENV/bin/python      # and google-tunix 0.1.7, in an environment of its own

32 sequences in groups of 8, random prompts of 64 to 96 tokens, 128 new tokens, random weights, float32, AdamW with
clipping, no KL. `full`: every sequence runs to the limit. `geometric`: each has its own limit, geometric with mean 40.
This side is the app's own loop, `grpo_trainer.train`, metrics and completions written as in any run; a step lasts from
one call of the sampler to the next; *tiny* runs on two forced devices, which is the app's default. It draws its four
prompts from 4,000, copies of tunix's four. tunix has no stop per sequence, so its sampler runs to the longest limit and
what lies behind a sequence's own limit is masked; then come its advantages and the body of its trainer's step. The two
sides take turns, a fresh process each.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from bench_rollout import GROUP_SIZE, LONGEST_PROMPT, MODELS, PAD, take_turns, tunix_network, tunix_sampler, workload
from bench_update import tunix_example, tunix_update

SEQUENCES, NEW_TOKENS = 32, 128
# Of each prompt, for a data set of ordinary size: grain takes 6 ms to shuffle one of 4 records, 0.02 one of thousands.
COPIES = 1000
# What a user of this size and these lengths would set: on each device, rows of one group or of two prompts.
ROWS = {
    "full": {"rows": 8, "prompts": 1, "blocks": 1},
    "geometric": {"rows": 6, "prompts": 2, "blocks": 2},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", help="python of an environment with google-tunix")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=["full", "geometric"], choices=["full", "geometric"])
    parser.add_argument("--devices", type=int, help="forced CPU devices of this stack; default 2 for tiny, 1 for small")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the app, as `loss.rows=4`")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", choices=["ours", "tunix"], help="run one side in this process and print JSON")
    options = parser.parse_args()
    if options.side:
        side = {"ours": ours, "tunix": tunix}[options.side]
        print(json.dumps(side(options.models[0], options.lengths[0], options)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    sides = {"ours": sys.executable} | ({"tunix": options.tunix} if options.tunix else {})
    for model in options.models:
        for lengths in options.lengths:
            case = ["--models", model, "--lengths", lengths, "--repeats", str(options.repeats)]
            case += ["--devices", str(options.devices)] if options.devices else []
            case += ["--set", *options.set] if options.set else []
            seconds, last = take_turns(sides, options.turns, case, script=__file__)
            for side, values in seconds.items():
                median = statistics.median(values)
                phases = ", ".join(f"{name} {value:.3f}" for name, value in last[side]["phases"].items())
                print(f"{model} {lengths} {side}: {median:.3f} s (min {min(values):.3f}; {phases})", flush=True)
            if "tunix" in seconds:
                ratio = statistics.median(seconds["tunix"]) / statistics.median(seconds["ours"])
                print(f"{model} {lengths} ratio: {ratio:.2f}", flush=True)


def ours(model: str, lengths: str, options: argparse.Namespace) -> dict:
    devices = options.devices or {"tiny": 2, "small": 1}[model]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    from grpo_trainer import train as loop
    from grpo_trainer.assemble.run import Assembly, assemble
    from grpo_trainer.settings.schema import Settings
    from grpo_trainer.data.stream import ProblemStream, Questions
    from runs import load

    tokens_PT, length_P, limit_B = workload(model, SEQUENCES, NEW_TOKENS, lengths)
    begun: list[float] = []

    class Limited:
        """The run's sampler, told each sequence's limit; it notes when a step begins."""

        def __init__(self, sampler: Any) -> None:
            self.sampler = sampler

        def __getattr__(self, name: str) -> Any:
            return getattr(self.sampler, name)

        def generate(self, *arguments: Any, **keywords: Any) -> Any:
            begun.append(time.perf_counter())
            law = dataclasses.replace(self.sampler.law, stop_ids=())
            limit_PG = limit_B.reshape(-1, GROUP_SIZE)
            return self.sampler.generate(*arguments, law=law, max_new_tokens=limit_PG, **keywords)

    def prepared(config: Settings) -> Assembly:
        run = assemble(config)
        records = run.problems.questions.records
        tokens_NT, length_N = np.tile(tokens_PT, (COPIES, 1)), np.tile(length_P, COPIES)
        size = MODELS[model]["vocab_size"]
        questions = Questions(records, tokens_NT, length_N, size, PAD, 0, run.problems.digest)
        problems = ProblemStream(questions, count=len(length_P), seed=0)
        sampler: Any = Limited(run.sampler)
        return dataclasses.replace(run, problems=problems, sampler=sampler)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_policy(folder / "policy", model)
        problems = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(COPIES * len(length_P))]
        (folder / "problems.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
        settings = {
            "run.dir": folder / "run", "steps": options.repeats + 3, "cpu_devices": 0, "compilation_cache": "''",
            "model.path": folder / "policy", "data.source": folder / "problems.jsonl",
            "data.test_source": folder / "problems.jsonl", "data.max_prompt_length": LONGEST_PROMPT,
            "rollout.prompts": len(length_P), "rollout.group_size": GROUP_SIZE, "rollout.max_new_tokens": NEW_TOKENS,
            "eval.before": "false", "eval.after": "false", "eval.every": 0, "checkpoint.every": 0,
            "optimizer.learning_rate": 1e-6, "loss.row_length": 128, "loss.rows": ROWS[lengths]["rows"] * devices,
            "loss.prompts": ROWS[lengths]["prompts"] * devices, "loss.blocks": ROWS[lengths]["blocks"],
        }  # fmt: skip
        sets = [f"{key}={value}" for key, value in settings.items()] + options.set
        with patch.object(loop, "assemble", prepared):
            loop.train(load([], sets))
        metrics = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    # The first step compiles, the last ends with the run's summary.
    seconds = np.diff(begun)[1:]
    names = [name for name in metrics[-1] if name.startswith("seconds/")]
    phases = {name[8:]: statistics.median(step[name] for step in metrics[2:]) for name in names}
    return {"seconds": seconds.tolist(), "phases": phases | {"fill": metrics[-1]["packing/fill"]}}


def write_policy(folder: Path, model: str) -> None:
    """A random policy in Hugging Face layout, with a tokenizer that its vocabulary holds."""
    from flax import nnx

    from grpo_gsm8k.embedded.tokenizer import make_tokenizer
    from grpo_sampler import ModelConfig, Transformer, save_pretrained, split

    sizes = MODELS[model]
    config = ModelConfig(family="qwen3", tied=True, qk_norm=True, **sizes)
    make_tokenizer(folder, problems=10)
    save_pretrained(folder, config, split(Transformer(config, rngs=nnx.Rngs(0)))[1])


def tunix(model: str, lengths: str, options: argparse.Namespace) -> dict:
    import jax
    from flax import nnx
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]

    tokens_PT, length_P, limit_B = workload(model, SEQUENCES, NEW_TOKENS, lengths)
    network = tunix_network(model)
    sampler, sample = tunix_sampler(model, network, tokens_PT, length_P, NEW_TOKENS)
    optimizer, train_step = tunix_update(network)
    train_step = nnx.jit(train_step, donate_argnums=(0, 1))
    seconds: list[float] = []
    phases: dict[str, list[float]] = {"rollout": [], "reward": [], "update": []}
    for turn in range(options.repeats + 1):
        start = time.perf_counter()
        completions = sample(sampler, turn, int(limit_B.max())).tokens
        drawn = time.perf_counter()
        tokens_BT = np.full((SEQUENCES, NEW_TOKENS), PAD, np.int32)
        for row, (tokens, limit) in enumerate(zip(completions, limit_B)):
            tokens_BT[row, :limit] = np.asarray(tokens)[:limit]
        reward_B = (tokens_BT[:, 0] % 2).astype(np.float32)
        advantage_B = algo_core.compute_advantages(reward_B, GROUP_SIZE)
        judged = time.perf_counter()
        prompts_BT, length_B = np.repeat(tokens_PT, GROUP_SIZE, 0), np.repeat(length_P, GROUP_SIZE)
        example = tunix_example(prompts_BT, length_B, tokens_BT, advantage_B.astype(np.float32))
        jax.block_until_ready(train_step(network, optimizer, example))
        sampler.transformer_state = nnx.variables(network)
        end = time.perf_counter()
        if turn:
            seconds.append(end - start)
            for name, value in zip(phases, (drawn - start, judged - drawn, end - judged)):
                phases[name].append(value)
    return {"seconds": seconds, "phases": {name: statistics.median(values) for name, values in phases.items()}}


if __name__ == "__main__":
    main()
