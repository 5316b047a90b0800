"""Seconds, temporary bytes and tokens/s of one policy update, side by side with tunix's GRPO update.

    hatch run bench:update                                              # this stack alone
    hatch run bench:update --tunix "$(hatch run peers:which python)"    # and google-tunix, in an environment of its own
    hatch run bench:update --memory                                     # compiles a 0.5B update for its temporaries

32 sequences in groups of 8, prompts of 64 to 96 tokens, 128 new tokens, float32, AdamW with clipping, no KL. tunix runs
the body of its trainer's step (`PeftTrainer._train_step`) on its own `grpo_loss_fn` and Qwen3, jitted with donation.
Medians over all turns are compared; a token is one that counts in the loss.
"""

import json
from typing import Any

import numpy as np

from tunix_parts import tunix_example, tunix_network, tunix_update
from turns import benchmark_parser, compare, timed
from workload import GROUP_SIZE, LONGEST_PROMPT, MODELS, PAD, network

GROUPS, NEW_TOKENS = 4, 128


def main() -> None:
    sides = {"ours": ours, "tunix": tunix}
    parser = benchmark_parser(__doc__, sides)
    parser.add_argument("--memory", action="store_true", help="temporaries of a 0.5B update; nothing runs")
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8], help="rows of a micro-batch, for --memory")
    options = parser.parse_args()
    if options.memory:
        for rows in options.rows:
            size = real_size_bytes(rows) / 1e9
            print(f"temporaries of a 0.5B update, 8 x 1,024 tokens, {rows} rows at a time: {size:.2f} GB", flush=True)
    elif options.side:
        print(json.dumps(sides[options.side](options.models[0], options.lengths[0], options.repeats)))
    else:
        compare(__file__, options, describe)


def describe(side: dict, median: float) -> str:
    return f"{side['tokens'] / median:,.0f} tokens/s, {side['bytes'] / 1e9:.2f} GB temporaries{side.get('note', '')}"


def rollout(model: str, lengths: str) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], np.ndarray]:
    """Prompts [P, T] right-padded, their lengths [P], completions and advantages [B]; both sides get the same."""
    rng = np.random.default_rng(0)
    B = GROUPS * GROUP_SIZE
    length_P = rng.integers(64, LONGEST_PROMPT + 1, GROUPS).astype(np.int32)
    length_B = np.full(B, NEW_TOKENS) if lengths == "full" else np.minimum(rng.geometric(1 / 40, B), NEW_TOKENS)
    tokens_BT = rng.integers(2, MODELS[model]["vocab_size"], (B, LONGEST_PROMPT + NEW_TOKENS)).astype(np.int32)
    tokens_PT = tokens_BT[::GROUP_SIZE, :LONGEST_PROMPT]
    tokens_PT = np.where(np.arange(LONGEST_PROMPT) < length_P[:, None], tokens_PT, PAD)
    rows = zip(tokens_BT, np.repeat(length_P, GROUP_SIZE), length_B)
    completions = [tokens_T[start : start + length] for tokens_T, start, length in rows]
    return tokens_PT, length_P, completions, rng.normal(size=B).astype(np.float32)


def train_batch(model: str, lengths: str) -> Any:
    """The rollout as this stack's update consumes it."""
    import grpo_contracts as gc

    tokens_PT, length_P, completions, advantage_B = rollout(model, lengths)
    prompts = gc.Prompts(tokens_PT, length_P, np.arange(GROUPS, dtype=np.int32), MODELS[model]["vocab_size"], PAD)
    drawn = gc.from_completions(
        prompts,
        completions,
        [np.zeros(len(completion)) for completion in completions],
        group_size=GROUP_SIZE,
        sampling=gc.SamplingParams(),
        policy=gc.PolicyVersion(0, ""),
        max_new_tokens=NEW_TOKENS,
    )
    return gc.TrainBatch(gc.Scored.from_rewards(drawn, {"none": [0.0] * len(completions)}), advantage_B)


def temporary_bytes(compiled: Any) -> int:
    return compiled.memory_analysis().temp_size_in_bytes


def make_policy_update(
    config: Any, optimizer: Any = None, *, chunk: int | None = None, **options: Any
) -> tuple[Any, Any, Any]:
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
        return grpo_loss.token_logp(hidden_RTD, model.unembedding, micro.target_RT, mask_RT=micro.mask_RT, chunk=chunk)

    optimizer = optax.adamw(1e-6) if optimizer is None else optimizer
    return grpo_loss.make_update(forward, grpo_loss.make_loss(), optimizer), optimizer, params


def ours(model: str, lengths: str, repeats: int) -> dict:
    import jax

    import grpo_loss

    config, params = network(model)
    update, optimizer, _ = make_policy_update(config)
    batch = train_batch(model, lengths)

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
    first = grpo_loss.pack(batch, shape=shapes)
    compiled = update.lower(state, first).compile()

    def step(_: int) -> None:
        nonlocal state
        state, metrics = compiled(state, grpo_loss.pack(batch, shape=shapes))
        jax.block_until_ready((state, metrics))

    micro = first.micro
    return timed(step, repeats) | {
        "tokens": int(micro.mask_RT.sum()),
        "bytes": temporary_bytes(compiled),
        "note": f", fill {first.fill:.0%}, {int(first.count)} micro-batches of {micro.tokens_RT.shape[1:]} tokens, "
        f"{micro.prompt_length_P.shape[1]} prompts",
    }


def tunix(model: str, lengths: str, repeats: int) -> dict:
    import jax
    from flax import nnx

    policy = tunix_network(model)
    optimizer, train_step = tunix_update(policy)
    tokens_PT, length_P, completions, advantage_B = rollout(model, lengths)
    completions_BT = np.full((len(completions), NEW_TOKENS), PAD, np.int32)
    for row_T, completion in zip(completions_BT, completions):
        row_T[: len(completion)] = completion
    prompts_BT, length_B = np.repeat(tokens_PT, GROUP_SIZE, 0), np.repeat(length_P, GROUP_SIZE)
    example = tunix_example(prompts_BT, length_B, completions_BT, advantage_B)
    compiled = nnx.jit(train_step, donate_argnums=(0, 1))
    graphdef, state = nnx.split((policy, optimizer))

    def pure(state, example):
        policy, optimizer = nnx.merge(graphdef, state)
        out = train_step(policy, optimizer, example)
        return nnx.state((policy, optimizer)), out

    whole = jax.jit(pure, donate_argnums=0).lower(state, example).compile()
    return timed(lambda _: jax.block_until_ready(compiled(policy, optimizer, example)), repeats) | {
        "tokens": int((completions_BT != PAD).sum()),
        "bytes": temporary_bytes(whole),
    }


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
