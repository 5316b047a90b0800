"""A published model on this machine: rollout against transformers' `generate`, update against a plain PyTorch loop;
and what padding costs: the update with several sizes of micro-batches, and with one.

    hatch run models:fetch smollm2-135m-instruct
    hatch run bench:real --torch "$(hatch run oracles:which python)"

4 prompts of grade-school problems, 8 samples each, up to 200 new tokens at temperature 1, float32. Rollouts count to
each end token. The update is of our own rollout with random advantages, so that nothing can be left out, and both
sides get the same file: ours in rows of 400 tokens with shared prompts, a micro-batch's logits at once and five sizes
of micro-batches, as with `loss.chunk=1600 loss.sizes=5`, and no remat; PyTorch in padded micro-batches of 8 sequences
whose prompts are repeated, with logits of completion positions only. Both clip gradients and take one AdamW step. For
`padding`, prompt slots have 256 tokens, as in a run whose `data.max_prompt_length` leaves room, and the sides are
`loss.sizes=5` and `loss.sizes=1`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from bench_update import make_policy_update
from turns import take_turns, timed

ROW, ROWS, SLOTS = 400, 4, 2  # tokens of a packed row; rows and prompts of a micro-batch
BLOCKS, LONGEST_PROMPT = 4, 256  # blocks of a row; tokens of a prompt slot of the sides of `padding`
SIDES = {"rollout": ("ours", "transformers"), "update": ("ours", "pytorch"), "padding": ("sizes", "one-size")}
PEERS = ("transformers", "pytorch")  # that run in the environment of --torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct", help="a folder in Hugging Face layout")
    parser.add_argument("--torch", metavar="PYTHON", help="python of an environment with torch and transformers")
    parser.add_argument("--questions", metavar="FILE", help="JSON lines with `question`, such as GSM8K's")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=1, help="fresh processes of each side")
    parser.add_argument("--repeats", type=int, default=2, help="timed calls in each process, after a first one")
    parser.add_argument("--only", choices=list(SIDES))
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        folder = Path(options.folder)
        (folder / "note").write_text("")
        found = timed(RUNS[options.side](options, folder), options.repeats)
        print(json.dumps(found | {name: (folder / name).read_text() for name in ("tokens", "note")}))
        return
    with tempfile.TemporaryDirectory() as name:
        write_prompts(options, Path(name))
        for part, (mine, theirs) in SIDES.items():
            if options.only in (None, part):
                compare(part, mine, theirs, options, name)


def compare(part: str, mine: str, theirs: str, options: argparse.Namespace, folder: str) -> None:
    """Print the tokens/s of both sides, and the ratio."""
    sides = {f"{part}-{mine}": sys.executable}
    if peer := options.torch if theirs in PEERS else sys.executable:
        sides[f"{part}-{theirs}"] = peer
    names = ("model", "prompts", "samples", "new_tokens", "repeats")
    case = [word for key in names for word in (f"--{key.replace('_', '-')}", str(getattr(options, key)))]
    if part != "rollout" and not (Path(folder) / "batch.npz").exists():
        take_turns({"rollout-ours": sys.executable}, 1, [*case, "--folder", folder], script=__file__)
    seconds, last = take_turns(sides, options.turns, [*case, "--folder", folder], script=__file__)
    speed = {}
    for side, values in seconds.items():
        median = statistics.median(values)
        speed[side] = int(last[side]["tokens"]) / median
        beside = f"{last[side]['note']}first call {last[side]['first']:.1f} s"
        print(f"{side}: {median:.1f} s, {speed[side]:,.1f} tokens/s ({beside})", flush=True)
    if len(speed) == 2:
        ours, peer = speed.values()
        print(f"{part} ratio: {ours / peer:.2f}", flush=True)


def write_prompts(options: argparse.Namespace, folder: Path) -> None:
    """The prompts as the model's template puts them, right-padded, for both sides."""
    from transformers import AutoTokenizer

    if options.questions:
        lines = Path(options.questions).read_text(encoding="utf-8").splitlines()
        questions = [json.loads(line)["question"] for line in lines[: options.prompts]]
    else:
        from grpo_gsm8k.task import TASK

        questions = [problem.question for problem in TASK.problems("embedded", "test", options.prompts)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    turns = [[{"role": "user", "content": f"{question}\nThink step by step."}] for question in questions]
    ids = [tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False) for turn in turns]
    length_P = np.array([len(tokens) for tokens in ids], np.int32)
    tokens_PT = np.zeros((len(ids), int(length_P.max())), np.int32)
    for row_T, tokens in zip(tokens_PT, ids):
        row_T[: len(tokens)] = tokens
    np.savez(folder / "prompts.npz", tokens=tokens_PT, length=length_P, end=tokenizer.eos_token_id)


# -- rollouts ------------------------------------------------------------------------------------------------------


def rollout_ours(options: argparse.Namespace, folder: Path) -> Callable[[int], object]:
    import grpo_contracts as gc
    from grpo_sampler import Sampler, load_pretrained

    given = np.load(folder / "prompts.npz")
    config, params = load_pretrained(options.model, dtype="float32")
    prompt_id_P = np.arange(len(given["length"]), dtype=np.int32)
    prompts = gc.Prompts(given["tokens"], given["length"], prompt_id_P, config.vocab_size, 0)
    sampler = Sampler(
        config,
        gc.SamplingParams(stop_ids=(int(given["end"]),)),
        max_prompt_length=prompts.tokens_PT.shape[1],
        max_new_tokens=options.new_tokens,
        slots=options.prompts * options.samples,
    )

    def call(turn: int) -> None:
        rollout = sampler.generate(params, prompts, group_size=options.samples, seed=0, step=turn)
        B = len(rollout.total_length_B)
        scored = gc.Scored.from_rewards(rollout, {"none": [0.0] * B})
        advantage_B = np.random.default_rng(0).normal(size=B).astype(np.float32)
        gc.save_batch(gc.TrainBatch(scored, advantage_B), folder / "batch.npz")
        (folder / "tokens").write_text(str(int(rollout.loss_mask_BT.sum())))

    return call


def rollout_transformers(options: argparse.Namespace, folder: Path) -> Callable[[int], object]:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    given = np.load(folder / "prompts.npz")
    end = int(given["end"])
    causal = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    longest = given["tokens"].shape[1]
    ids = np.full((len(given["length"]), longest), end, np.int64)
    mask = np.zeros_like(ids)
    for row, flags, tokens, length in zip(ids, mask, given["tokens"], given["length"]):
        row[longest - length :], flags[longest - length :] = tokens[:length], 1
    ids_BT, mask_BT = (torch.from_numpy(np.repeat(part, options.samples, 0)) for part in (ids, mask))

    def call(turn: int) -> None:
        torch.manual_seed(turn)
        with torch.inference_mode():
            out = causal.generate(
                ids_BT,
                attention_mask=mask_BT,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=options.new_tokens,
                eos_token_id=end,
                pad_token_id=end,
            )[:, longest:].numpy()
        ended = np.cumsum(out == end, axis=1) - (out == end)
        (folder / "tokens").write_text(str(int((ended == 0).sum())))

    return call


# -- updates -------------------------------------------------------------------------------------------------------


def update_ours(
    options: argparse.Namespace, folder: Path, *, longest_prompt: int | None = None, sizes: int = 5
) -> Callable[[int], object]:
    import jax
    import optax

    import grpo_contracts as gc
    import grpo_loss
    from grpo_sampler import load_pretrained

    batch = cast(gc.TrainBatch, gc.load_batch(folder / "batch.npz"))
    config, params = load_pretrained(options.model, dtype="float32")
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6))
    update, _, _ = make_policy_update(config, optimizer, chunk=ROW * ROWS)
    shape = grpo_loss.PackShape.for_rollout(
        sequences=options.prompts * options.samples,
        groups=options.prompts,
        max_prompt_length=longest_prompt or batch.scored.rollout.tokens_BT.shape[1] - options.new_tokens,
        max_new_tokens=options.new_tokens,
        row_length=ROW,
        rows=ROWS,
        prompts=SLOTS,
        blocks=BLOCKS,
        sizes=sizes,
    )
    state = grpo_loss.init_state(params, optimizer)

    def call(_: int) -> None:
        nonlocal state
        packed = grpo_loss.pack(batch, shape=shape)
        state, metrics = update(state, packed)
        jax.block_until_ready((state, metrics))
        (folder / "tokens").write_text(str(int(packed.micro.mask_RT.sum())))
        parts = grpo_loss.computed_positions(packed, vocabulary=config.vocab_size)
        computed, live = np.add(parts["rows"], parts["prompts"])
        (folder / "note").write_text(f"{computed / live:.2f} positions for each one needed, ")

    return call


def update_pytorch(options: argparse.Namespace, folder: Path) -> Callable[[int], object]:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM

    import grpo_contracts as gc

    batch = cast(gc.TrainBatch, gc.load_batch(folder / "batch.npz"))
    rollout = batch.scored.rollout
    tokens_BT = torch.from_numpy(np.asarray(rollout.tokens_BT).astype(np.int64))
    mask_BT = torch.from_numpy(np.array(rollout.loss_mask_BT))
    total_B = np.asarray(rollout.total_length_B)
    advantage_B = torch.from_numpy(np.asarray(batch.advantage))
    causal = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(causal.parameters(), lr=1e-6)
    size, tokens = 8, int(mask_BT.sum())

    def call(_: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        for start in range(0, len(tokens_BT), size):
            rows = slice(start, start + size)
            longest = int(total_B[rows].max())
            ids, mask = tokens_BT[rows, :longest], mask_BT[rows, :longest]
            first = int(mask.int().argmax(1).min())
            attention = torch.arange(longest) < torch.from_numpy(total_B[rows])[:, None]
            # Logits of the positions before completion tokens only.
            out = causal(ids, attention_mask=attention.long(), logits_to_keep=torch.arange(first - 1, longest - 1))
            logp = torch.log_softmax(out.logits, -1).gather(-1, ids[:, first:, None])[..., 0]
            ratio = torch.exp(logp - logp.detach())
            advantage = advantage_B[rows, None]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
            (-(surrogate * mask[:, first:]).sum() / tokens).backward()
        torch.nn.utils.clip_grad_norm_(causal.parameters(), 1.0)
        optimizer.step()
        (folder / "tokens").write_text(str(tokens))

    return call


RUNS = {
    "rollout-ours": rollout_ours,
    "rollout-transformers": rollout_transformers,
    "update-ours": update_ours,
    "update-pytorch": update_pytorch,
    "padding-sizes": partial(update_ours, longest_prompt=LONGEST_PROMPT),
    "padding-one-size": partial(update_ours, longest_prompt=LONGEST_PROMPT, sizes=1),
}

if __name__ == "__main__":
    main()
