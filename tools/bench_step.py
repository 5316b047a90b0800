"""Seconds of a whole GRPO step (rollout, reward, update), side by side with the same step made of tunix's own parts.

    hatch run bench:step                                              # this stack alone
    hatch run bench:step --tunix "$(hatch run peers:which python)"    # and google-tunix, in an environment of its own

32 sequences in groups of 8, random prompts of 64 to 96 tokens, 128 new tokens, random weights, float32, AdamW with
clipping, no KL. `full`: every sequence runs to the limit. `geometric`: each has its own limit, geometric with mean 40.
This side is the trainer itself, `fit(assemble(settings, task))` on GSM8K, with metrics and completions written as in
any run; only its sampler and its problems are replaced. A step lasts from one call of the sampler to the next. *tiny*
runs on two forced devices, the laptop preset's number. It draws its four prompts from 4,000, copies of tunix's four.
tunix has no limit per sequence, so its sampler runs to the longest limit and the tokens behind each sequence's own
limit are masked; its advantages and the body of its trainer's step follow.
"""

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tunix_parts import tunix_example, tunix_network, tunix_sampler, tunix_update
from turns import benchmark_parser, compare
from workload import GROUP_SIZE, LONGEST_PROMPT, PAD, force_devices, network, workload

SEQUENCES, NEW_TOKENS = 32, 128
# Copies of each prompt, for a data set of ordinary size: grain needs 6 ms to shuffle 4 records, but 0.02 ms to take the
# next of thousands.
COPIES = 1000
# What a user would set for this size and these lengths: on each device, rows of one group, or of two prompts.
ROWS = {
    "full": {"rows": 8, "prompts": 1, "blocks": 1},
    "geometric": {"rows": 6, "prompts": 2, "blocks": 2},
}


def main() -> None:
    sides = {"ours": ours, "tunix": tunix}
    parser = benchmark_parser(__doc__, sides)
    parser.add_argument("--devices", type=int, help="forced CPU devices of this stack; default 2 for tiny, 1 for small")
    parser.add_argument("--set", nargs="+", default=[], help="settings of the trainer, such as `loss.rows=4`")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(sides[options.side](options.models[0], options.lengths[0], options)))
        return
    more = ("--devices", str(options.devices)) if options.devices else ()
    compare(__file__, options, describe, (*more, *(("--set", *options.set) if options.set else ())))


def describe(side: dict, _: float) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in side["phases"].items())


def ours(model: str, lengths: str, options: argparse.Namespace) -> dict:
    devices = force_devices(model, options.devices)
    from grpo_gsm8k.task import TASK
    from grpo_trainer.assemble import assemble
    from grpo_trainer.data.stream import ProblemStream
    from grpo_trainer.run.files import read_lines
    from grpo_trainer.settings.layers import load
    from grpo_trainer.train import fit

    tokens_PT, length_P, limit_B = workload(model, SEQUENCES, NEW_TOKENS, lengths)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_policy(folder / "policy", model)
        problems = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(COPIES * len(length_P))]
        (folder / "problems.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
        settings = {
            "run.dir": folder / "run", "steps": options.repeats + 3, "cpu_devices": 0, "compilation_cache": "''",
            "prompt.instruction": "''",
            "model.path": folder / "policy", "data.source": folder / "problems.jsonl",
            "data.test_source": folder / "problems.jsonl", "data.max_prompt_length": LONGEST_PROMPT,
            "rollout.prompts": len(length_P), "rollout.group_size": GROUP_SIZE, "rollout.max_new_tokens": NEW_TOKENS,
            "eval.before": "false", "eval.after": "false", "eval.every": 0, "checkpoint.every": 0,
            "optimizer.learning_rate": 1e-6, "loss.row_length": 128, "loss.rows": ROWS[lengths]["rows"] * devices,
            "loss.prompts": ROWS[lengths]["prompts"] * devices, "loss.blocks": ROWS[lengths]["blocks"],
        }  # fmt: skip
        run = assemble(load(TASK, [], [*(f"{key}={value}" for key, value in settings.items()), *options.set]), TASK)
        questions = replace(
            run.problems.questions, tokens_NT=np.tile(tokens_PT, (COPIES, 1)), length_N=np.tile(length_P, COPIES)
        )
        stream = ProblemStream(questions, count=len(length_P), seed=0)
        sampler: Any = LimitedSampler(run.plan.sampler, limit_B.reshape(-1, GROUP_SIZE))
        fit(replace(run, plan=replace(run.plan, sampler=sampler), problems=stream))
        metrics = read_lines(folder / "run" / "metrics.jsonl")
    names = [name for name in metrics[-1] if name.startswith("seconds/")]
    phases = {name[8:]: statistics.median(step[name] for step in metrics[2:]) for name in names}
    # The first step compiles, and the last ends with the run's summary.
    seconds = np.diff(sampler.called)[1:]
    return {"seconds": seconds.tolist(), "phases": phases | {"fill": metrics[-1]["packing/fill"]}}


class LimitedSampler:
    """A run's sampler that stops each sequence at its own limit, and notes when it was called."""

    def __init__(self, sampler: Any, limit_PG: np.ndarray) -> None:
        self._sampler, self._limit_PG = sampler, limit_PG
        self.called: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def generate(self, *arguments: Any, **keywords: Any) -> Any:
        self.called.append(time.perf_counter())
        endless = replace(self._sampler.sampling, stop_ids=())
        return self._sampler.generate(*arguments, sampling=endless, max_new_tokens=self._limit_PG, **keywords)


def write_policy(folder: Path, model: str) -> None:
    """A random policy in Hugging Face layout, with a tokenizer that its vocabulary holds."""
    from grpo_sampler import save_pretrained
    from grpo_trainer.assemble.teach import make_tokenizer

    make_tokenizer(folder, ["1 + 1?", "#### 2"])
    save_pretrained(folder, *network(model))


def tunix(model: str, lengths: str, options: argparse.Namespace) -> dict:
    import jax
    from flax import nnx
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]

    tokens_PT, length_P, limit_B = workload(model, SEQUENCES, NEW_TOKENS, lengths)
    policy = tunix_network(model)
    sampler, sample = tunix_sampler(model, policy, tokens_PT, length_P, NEW_TOKENS)
    optimizer, train_step = tunix_update(policy)
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
        jax.block_until_ready(train_step(policy, optimizer, example))
        sampler.transformer_state = nnx.variables(policy)
        end = time.perf_counter()
        if turn:
            seconds.append(end - start)
            for name, value in zip(phases, (drawn - start, judged - drawn, end - judged)):
                phases[name].append(value)
    return {"seconds": seconds, "phases": {name: statistics.median(values) for name, values in phases.items()}}


if __name__ == "__main__":
    main()
