"""Seconds, temporary bytes and tokens/s of one policy update, side by side with tunix's GRPO update.

    python tools/bench_update.py                              # this stack alone
    python tools/bench_update.py --tunix VENV/bin/python      # and google-tunix 0.1.7, in an environment of its own
    python tools/bench_update.py --memory                     # compiled temporaries of a 0.5B update; nothing runs

32 sequences in groups of 8, prompts of 64 to 96 tokens, 128 new tokens, float32, AdamW with clipping, no KL. tunix runs
the body of its trainer's step (`PeftTrainer._train_step`) on its own `grpo_loss_fn` and Qwen3, jitted with donation.
The two sides take turns, a fresh process each, and medians over all turns are compared; a token is one that counts in
the loss.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from bench_rollout import EOS, GROUP_SIZE, LONGEST_PROMPT, MODELS, PAD, take_turns, tunix_network

GROUPS, NEW_TOKENS = 4, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", help="python of an environment with google-tunix")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=list(MODELS))
    parser.add_argument("--lengths", nargs="+", default=["full", "geometric"], choices=["full", "geometric"])
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8], help="rows of a micro-batch, for --memory")
    parser.add_argument("--side", choices=["ours", "tunix"], help="run one side in this process and print JSON")
    options = parser.parse_args()
    if options.memory:
        for rows in options.rows:
            size = real_size_bytes(rows) / 1e9
            print(f"temporaries of a 0.5B update, 8 x 1,024 tokens, {rows} rows at a time: {size:.2f} GB", flush=True)
    elif options.side:
        run = {"ours": ours, "tunix": tunix}[options.side]
        print(json.dumps(run(options.models[0], options.lengths[0], options.repeats)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    sides = {"ours": sys.executable} | ({"tunix": options.tunix} if options.tunix else {})
    for model in options.models:
        for lengths in options.lengths:
            case = ["--models", model, "--lengths", lengths, "--repeats", str(options.repeats)]
            seconds, last = take_turns(sides, options.turns, case, script=__file__)
            for side, values in seconds.items():
                median = statistics.median(values)
                print(
                    f"{model} {lengths} {side}: {median:.3f} s (min {min(values):.3f}), "
                    f"{last[side]['tokens'] / median:,.0f} tokens/s, {last[side]['bytes'] / 1e9:.2f} GB temporaries"
                    + f" {last[side].get('note', '')}",
                    flush=True,
                )
            if "tunix" in seconds:
                ratio = statistics.median(seconds["tunix"]) / statistics.median(seconds["ours"])
                print(f"{model} {lengths} ratio: {ratio:.2f}", flush=True)


def rollout(vocabulary: int, lengths: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, prompt lengths, total lengths, groups and advantages of one batch; both sides get the same."""
    rng = np.random.default_rng(0)
    B = GROUPS * GROUP_SIZE
    prompt_length_B = np.repeat(rng.integers(64, LONGEST_PROMPT + 1, GROUPS), GROUP_SIZE)
    length_B = np.full(B, NEW_TOKENS) if lengths == "full" else np.minimum(rng.geometric(1 / 40, B), NEW_TOKENS)
    total_length_B = prompt_length_B + length_B
    tokens_BT = rng.integers(2, vocabulary, (B, LONGEST_PROMPT + NEW_TOKENS)).astype(np.int32)
    place_T = np.arange(tokens_BT.shape[1])
    leaders_BT = np.repeat(tokens_BT[::GROUP_SIZE], GROUP_SIZE, axis=0)
    tokens_BT = np.where(place_T < prompt_length_B[:, None], leaders_BT, tokens_BT)
    tokens_BT = np.where(place_T < total_length_B[:, None], tokens_BT, PAD)
    group_B = np.repeat(np.arange(GROUPS), GROUP_SIZE)
    return tokens_BT, prompt_length_B, total_length_B, group_B, rng.normal(size=B).astype(np.float32)


def train_batch(
    tokens_BT: np.ndarray,
    prompt_length_B: np.ndarray,
    total_length_B: np.ndarray,
    group_B: np.ndarray,
    advantage_B: np.ndarray,
) -> Any:
    """A rollout with advantages whose completion tokens all count."""
    from grpo_contracts import PolicyIdentity, Rollout, SamplingLaw, Scored, TrainBatch

    B, T = tokens_BT.shape
    place_T = np.arange(T)
    zero_B, zero_BT = np.zeros(B, np.float32), np.zeros((B, T), np.float32)
    rollout = Rollout(
        tokens_BT=tokens_BT,
        prompt_length_B=prompt_length_B.astype(np.int32),
        total_length_B=total_length_B.astype(np.int32),
        loss_mask_BT=(place_T >= prompt_length_B[:, None]) & (place_T < total_length_B[:, None]),
        logp_BT=zero_BT,
        policy_logp_BT=zero_BT,
        finish_B=np.zeros(B, np.int8),
        prompt_id_B=group_B.astype(np.int32),
        sample_B=np.zeros(B, np.int32),
        group_B=group_B.astype(np.int32),
        group_size=B // len(np.unique(group_B)),
        law=SamplingLaw(),
        policy=PolicyIdentity(0, "00"),
        vocab_size=int(tokens_BT.max()) + 1,
        pad_id=PAD,
    )
    return TrainBatch(Scored.from_rewards(rollout, {"none": zero_B.tolist()}), advantage_B)


def timed(call, repeats: int) -> list[float]:
    seconds = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        call()
        if turn:
            seconds.append(time.perf_counter() - start)
    return seconds


def temporary_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def make_policy_update(config, **options):
    """The stack's update: shared prompts, packed rows, chunked log-probabilities, one compiled program."""
    import optax

    import grpo_loss
    from grpo_sampler import abstract, merge

    graphdef, params = abstract(config, **options)

    def forward(params, micro):
        model = merge(graphdef, params)
        hidden_RTD = model.with_prompts(
            micro.prompt_tokens_PT,
            micro.prompt_length_P,
            micro.tokens_RT,
            micro.positions_RT,
            micro.segment_RT,
            micro.prompt_RC,
        )
        return grpo_loss.token_logp(hidden_RTD, model.unembedding, micro.target_RT, mask_RT=micro.mask_RT)

    optimizer = optax.adamw(1e-6)
    return grpo_loss.make_update(forward, grpo_loss.make_loss(), optimizer), optimizer, params


def ours(name: str, lengths: str, repeats: int) -> dict:
    import jax
    from flax import nnx

    import grpo_loss
    from grpo_sampler import ModelConfig, Transformer, split

    config = ModelConfig(family="qwen3", tied=True, qk_norm=True, **MODELS[name])
    update, optimizer, _ = make_policy_update(config)
    _, params = split(Transformer(config, rngs=nnx.Rngs(0)))
    data = train_batch(*rollout(config.vocab_size, lengths))

    def shape(rows: int, prompts: int, blocks: int) -> grpo_loss.PackShape:
        return grpo_loss.PackShape.for_rollout(
            sequences=GROUPS * GROUP_SIZE,
            groups=GROUPS,
            max_prompt_length=LONGEST_PROMPT,
            max_new_tokens=NEW_TOKENS,
            rows=rows,
            prompts=prompts,
            blocks=blocks,
        )

    # A micro-batch is a group whose completions all run to the limit, or two groups of ordinary lengths.
    shapes = [shape(rows=8, prompts=1, blocks=1), shape(rows=6, prompts=2, blocks=2)]
    state = grpo_loss.init_state(params, optimizer)

    first = grpo_loss.pack(data, shape=shapes)
    compiled = update.lower(state, first).compile()

    def step() -> None:
        nonlocal state
        state, metrics = compiled(state, grpo_loss.pack(data, shape=shapes))
        jax.block_until_ready((state, metrics))

    micro = first.micro
    return {
        "seconds": timed(step, repeats),
        "tokens": int(micro.mask_RT.sum()),
        "bytes": temporary_bytes(compiled),
        "note": f"fill {first.fill:.0%}, {int(first.count)} micro-batches of {micro.tokens_RT.shape[1:]} tokens, "
        f"{micro.prompt_length_P.shape[1]} prompts",
    }


def tunix(name: str, lengths: str, repeats: int) -> dict:
    import jax
    from flax import nnx

    network = tunix_network(name)
    optimizer, train_step = tunix_update(network)
    tokens_BT, prompt_length_B, total_length_B, _, advantage_B = rollout(MODELS[name]["vocab_size"], lengths)
    completions = np.full((len(tokens_BT), NEW_TOKENS), PAD, np.int32)
    for b, (prompt, total) in enumerate(zip(prompt_length_B, total_length_B, strict=True)):
        completions[b, : total - prompt] = tokens_BT[b, prompt:total]
    example = tunix_example(tokens_BT[:, :LONGEST_PROMPT], prompt_length_B, completions, advantage_B)
    compiled = nnx.jit(train_step, donate_argnums=(0, 1))
    graphdef, state = nnx.split((network, optimizer))

    def pure(state, example):
        network, optimizer = nnx.merge(graphdef, state)
        out = train_step(network, optimizer, example)
        return nnx.state((network, optimizer)), out

    whole = jax.jit(pure, donate_argnums=0).lower(state, example).compile()
    return {
        "seconds": timed(lambda: jax.block_until_ready(compiled(network, optimizer, example)), repeats),
        "tokens": int((completions != PAD).sum()),
        "bytes": temporary_bytes(whole),
    }


def tunix_update(network: Any) -> tuple[Any, Any]:
    """tunix's optimizer, and the body of its trainer's step: (network, optimizer, example) -> (loss, norm)."""
    import optax
    from flax import nnx
    from tunix.rl import algo_core  # pyright: ignore[reportMissingImports]
    from tunix.rl.grpo.grpo_learner import GRPOConfig  # pyright: ignore[reportMissingImports]

    optimizer = nnx.Optimizer(network, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)), wrt=nnx.Param)
    algorithm = GRPOConfig(num_generations=GROUP_SIZE, beta=0.0)
    algorithm.temperature = 1.0  # its learner copies this from the rollout's settings

    def loss_fn(network, example):
        return algo_core.grpo_loss_fn(network, example, algo_config=algorithm, pad_id=PAD, eos_id=EOS)

    def train_step(network, optimizer, example):
        (loss, _), gradients = nnx.value_and_grad(loss_fn, has_aux=True)(network, example)
        norm = optax.global_norm(gradients)
        optimizer.update(network, gradients)
        return loss, norm

    return optimizer, train_step


def tunix_example(
    prompts_BT: np.ndarray, length_B: np.ndarray, completions_BT: np.ndarray, advantage_B: np.ndarray
) -> Any:
    """What tunix's step consumes: prompts padded on the left, completions on the right."""
    import jax.numpy as jnp
    from tunix.rl.grpo.grpo_learner import TrainExample  # pyright: ignore[reportMissingImports]

    left_BT = np.full_like(prompts_BT, PAD)
    for row, (tokens, length) in enumerate(zip(prompts_BT, length_B, strict=True)):
        left_BT[row, left_BT.shape[1] - length :] = tokens[:length]
    return TrainExample(
        prompt_ids=jnp.asarray(left_BT),
        prompt_mask=jnp.asarray(left_BT != PAD),
        completion_ids=jnp.asarray(completions_BT),
        completion_mask=jnp.asarray(completions_BT != PAD),
        advantages=jnp.asarray(advantage_B),
        ref_per_token_logps=None,
        old_per_token_logps=None,
    )


def real_size_bytes(rows: int) -> int:
    """Temporaries of a whole update at the shape of a 0.5B model: 8 sequences of 1,024 tokens, 256 of them prompt."""
    import jax

    import grpo_loss
    from grpo_sampler import ModelConfig

    config = ModelConfig(
        family="qwen2",
        vocab_size=151_936,
        width=896,
        mlp_width=4864,
        layers=24,
        query_heads=14,
        kv_heads=2,
        head_size=64,
        tied=True,
        qkv_bias=True,
    )
    update, optimizer, params = make_policy_update(config, remat=True)
    shape = grpo_loss.PackShape.for_rollout(
        sequences=8, groups=1, max_prompt_length=256, max_new_tokens=768, rows=rows, prompts=1
    )
    state = jax.eval_shape(lambda params: grpo_loss.init_state(params, optimizer), params)
    return temporary_bytes(update.lower(state, grpo_loss.abstract_batch(shape)).compile())


if __name__ == "__main__":
    main()
