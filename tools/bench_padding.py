"""Positions that an update computes for each one that it needs, on lengths of GSM8K; numpy alone, nothing is compiled.

    hatch run bench:padding --data FOLDER --tokenizer MODEL/tokenizer.json

FOLDER holds GSM8K's train.jsonl. Prompts are its questions and 40 tokens of chat template and instruction; completions
are log-normal (mean 130 tokens, deviation 60), or as long as the reference answers times a spread of 0.3; groups of 8,
prompts of at most 256 tokens, rows of two of the longest completions in four blocks. A live position holds a token that
is needed: of a row, of a prompt (each prompt once), or of the loss (for the head).
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import grpo_contracts as gc
import grpo_loss

GROUP_SIZE, LONGEST_PROMPT, TEMPLATE, VOCABULARY = 8, 256, 40, 49_152
PARTS = ("rows", "prompts", "head")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.json of the policy")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 3, 5, 7], help="sizes of a micro-batch")
    parser.add_argument("--prompts", type=int, nargs="+", default=[4, 8], help="prompts of a step")
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8], help="rows of a micro-batch")
    parser.add_argument("--idle", type=float, default=0.0, help="share of groups without an advantage, left out")
    parser.add_argument("--steps", type=int, default=40)
    options = parser.parse_args()
    question_N, answer_N = token_counts(options.data, options.tokenizer)
    print("| completions | prompts | rows | sizes | rows' | prompts' | head's | rows' and prompts' | micro-batches |")
    print("|---|---|---|---|---|---|---|---|---|")
    for law, longest in (("log-normal", 300), ("reference", 300), ("reference", 200)):
        for prompts in options.prompts:
            batches = list(steps(question_N, answer_N, law, longest, prompts, options.steps, options.idle))
            for rows in options.rows:
                for sizes in options.sizes:
                    figures = " | ".join(measure(batches, prompts, rows, longest, sizes))
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
            spread = np.sqrt(np.log(1 + (60 / 130) ** 2))
            drawn_B = np.exp(rng.normal(np.log(130) - spread**2 / 2, spread, sequences))
        length_B = np.clip(drawn_B.astype(int) + 1, 1, longest)
        moves_P = rng.random(prompts) >= idle
        tokens_PT = np.where(
            np.arange(LONGEST_PROMPT) < length_P[:, None], 2 + rng.integers(0, 1000, (prompts, LONGEST_PROMPT)), 0
        )
        batch = gc.Prompts(tokens_PT.astype(np.int32), length_P, np.arange(prompts, dtype=np.int32), VOCABULARY, 0)
        rollout = gc.from_completions(
            batch,
            [np.full(length, 2, np.int32) for length in length_B],
            [np.zeros(length) for length in length_B],
            group_size=GROUP_SIZE,
            sampling=gc.SamplingParams(),
            policy=gc.PolicyVersion(0, ""),
            max_new_tokens=longest,
        )
        scored = gc.Scored.from_rewards(rollout, {"none": [0.0] * sequences})
        yield gc.TrainBatch(scored, np.repeat(moves_P, GROUP_SIZE).astype(np.float32))


def measure(batches: list[gc.TrainBatch], prompts: int, rows: int, longest: int, sizes: int) -> list[str]:
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
    packed = [grpo_loss.pack(batch, shape=shape, idle=grpo_loss.token_mean) for batch in batches]
    found = [grpo_loss.computed_positions(batch, vocabulary=VOCABULARY) for batch in packed]
    total = {name: np.sum([parts[name] for parts in found], axis=0) for name in PARTS}
    ratios = [total[name] for name in PARTS] + [total["rows"] + total["prompts"]]
    figures = [f"{computed / live:.2f}" for computed, live in ratios]
    return [*figures, f"{np.mean([int(batch.count) for batch in packed]):.1f}"]


if __name__ == "__main__":
    main()
