"""Positions that an update computes for each one that it needs, on lengths of GSM8K; numpy alone, nothing is compiled.

    hatch run bench:padding --data FOLDER --tokenizer MODEL/tokenizer.json
    hatch run bench:padding --presets

FOLDER holds GSM8K's train.jsonl. Prompts are its questions and 40 tokens of chat template and instruction; completions
are log-normal (mean 130 tokens, deviation 60), or as long as the reference answers times a spread of 0.3; groups of 8,
prompts of at most 256 tokens, rows of two of the longest completions in four blocks. A live position holds a token that
is needed: of a row, of a prompt (each prompt once), or of the loss (for the head). With `--presets`: the presets for
TPUs, on prompts of 275 to 399 tokens and log-normal completions (mean 200, deviation 90).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import grpo_contracts as gc
import grpo_loss
from grpo_gsm8k.task import TASK
from grpo_mesh import find_slice, parse_mesh
from grpo_trainer.settings.layers import load, preset_files
from grpo_trainer.settings.schema import Settings

GROUP_SIZE, LONGEST_PROMPT, TEMPLATE, VOCABULARY = 8, 256, 40, 49_152
PARTS = ("rows", "prompts", "head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", action="store_true", help="measure the presets for TPUs instead")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json of the policy")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 5, 7], help="sizes of a micro-batch")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 8], help="prompts of a step")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8], help="rows of a micro-batch")
    parser.add_argument("--idle", type=float, default=0.0, help="share of groups without an advantage, left out")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    if options.presets:
        for name in preset_files(TASK):
            measure_preset(name, load(TASK, [name]), options.steps)
        return
    if options.data is None or options.tokenizer is None:
        parser.error("--data and --tokenizer, or --presets")
    question_N, answer_N = token_counts(options.data, options.tokenizer)
    print("| completions | prompts | rows | sizes | rows' | prompts' | head's | rows' and prompts' | micro-batches |")
    print("|---|---|---|---|---|---|---|---|---|")
    for law, longest in (("log-normal", 300), ("reference", 300), ("reference", 200)):
        for prompts in options.prompts:
            batches = list(steps(question_N, answer_N, law, longest, prompts, options.steps, options.idle))
            for rows in options.rows:
                for sizes in options.sizes:
                    shape = grpo_loss.PackShape.for_rollout(
                        sequences=prompts * GROUP_SIZE,
                        groups=prompts,
                        max_prompt_length=LONGEST_PROMPT,
                        max_new_tokens=longest,
                        rows=rows,
                        row_length=2 * longest,
                        blocks=4,
                        sizes=sizes,
                    )
                    figures = " | ".join(measure(batches, shape))
                    print(f"| {law}, to {longest} | {prompts} | {rows} | {sizes} | {figures} |", flush=True)


def token_counts(folder: Path, tokenizer: Path) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each question and of its reference answer."""
    from tokenizers import Tokenizer

    problems = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    encoder = Tokenizer.from_file(str(tokenizer))
    counts = (
        np.array([len(encoding.ids) for encoding in encoder.encode_batch([problem[key] for problem in problems])])
        for key in ("question", "answer")
    )
    question_N, answer_N = counts
    return question_N, answer_N


def steps(
    question_N: np.ndarray, answer_N: np.ndarray, law: str, longest: int, prompts: int, count: int, idle: float
) -> Iterator[gc.TrainBatch]:
    """Train batches with drawn lengths; the tokens themselves mean nothing."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        chosen = rng.integers(0, len(question_N), prompts)
        length_P = np.minimum(question_N[chosen] + TEMPLATE, LONGEST_PROMPT).astype(np.int32)
        sequences = prompts * GROUP_SIZE
        if law == "reference":
            drawn_B = np.repeat(answer_N[chosen], GROUP_SIZE) * np.exp(rng.normal(-0.045, 0.3, sequences))
        else:
            drawn_B = log_normal(rng, 130, 60, sequences)
        length_B = np.clip(drawn_B.astype(int) + 1, 1, longest)
        yield batch_of(rng, length_P, length_B, LONGEST_PROMPT, longest, rng.random(prompts) >= idle)


def log_normal(rng: np.random.Generator, mean: float, deviation: float, count: int) -> np.ndarray:
    spread = np.sqrt(np.log(1 + (deviation / mean) ** 2))
    return np.exp(rng.normal(np.log(mean) - spread**2 / 2, spread, count))


def batch_of(
    rng: np.random.Generator,
    length_P: np.ndarray,
    length_B: np.ndarray,
    longest_prompt: int,
    longest: int,
    moves_P: np.ndarray,
) -> gc.TrainBatch:
    """Prompts and completions of these lengths; prompts that do not move have no advantage."""
    prompts = len(length_P)
    tokens_PT = np.where(
        np.arange(longest_prompt) < length_P[:, None], 2 + rng.integers(0, 1000, (prompts, longest_prompt)), 0
    )
    given = gc.Prompts(tokens_PT.astype(np.int32), length_P, np.arange(prompts, dtype=np.int32), VOCABULARY, 0)
    rollout = gc.from_completions(
        given,
        [np.full(length, 2, np.int32) for length in length_B],
        [np.zeros(length) for length in length_B],
        group_size=len(length_B) // prompts,
        sampling=gc.SamplingParams(),
        policy=gc.PolicyVersion(0, ""),
        max_new_tokens=longest,
    )
    scored = gc.Scored.from_rewards(rollout, {"none": [0.0] * len(length_B)})
    return gc.TrainBatch(scored, np.repeat(moves_P, len(length_B) // prompts).astype(np.float32))


def measure_preset(name: str, settings: Settings, count: int) -> None:
    """Print a line for each slice of a preset."""
    rollout, loss = settings.rollout, settings.loss
    rng, longest_prompt = np.random.default_rng(0), settings.data.max_prompt_length
    batches = []
    for _ in range(count if settings.slices else 0):
        length_P = rng.integers(275, 400, rollout.prompts).astype(np.int32)
        drawn_B = log_normal(rng, 200, 90, rollout.prompts * rollout.group_size)
        length_B = np.clip(drawn_B.astype(int) + 1, 1, rollout.max_new_tokens)
        moves_P = np.ones(rollout.prompts, bool)
        batches.append(batch_of(rng, length_P, length_B, longest_prompt, rollout.max_new_tokens, moves_P))
    for slice_name in settings.slices:
        axes = parse_mesh(settings.mesh, find_slice(slice_name).chips)
        shape = grpo_loss.PackShape.for_rollout(
            sequences=rollout.prompts * rollout.group_size,
            groups=rollout.prompts,
            max_prompt_length=longest_prompt,
            max_new_tokens=rollout.max_new_tokens,
            rows=loss.rows,
            row_length=settings.row_length,
            prompts=loss.prompts or None,
            blocks=loss.blocks,
            shards=axes["dp"] * axes["fsdp"],
            sizes=loss.sizes,
        )
        print(f"| {name} | {slice_name} | {' | '.join(measure(batches, shape))} |", flush=True)


def measure(batches: list[gc.TrainBatch], shape: grpo_loss.PackShape) -> list[str]:
    packed = [grpo_loss.pack(batch, shape=shape, idle=grpo_loss.token_mean) for batch in batches]
    found = [grpo_loss.computed_positions(batch, vocabulary=VOCABULARY) for batch in packed]
    total = {name: np.sum([parts[name] for parts in found], axis=0) for name in PARTS}
    ratios = [total[name] for name in PARTS] + [total["rows"] + total["prompts"]]
    figures = [f"{computed / live:.2f}" for computed, live in ratios]
    return [*figures, f"{np.mean([int(batch.count) for batch in packed]):.1f}"]


if __name__ == "__main__":
    main()
