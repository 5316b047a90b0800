"""Useful tokens/s of rollouts, side by side with google-tunix's own sampler and transformers' `generate`.

    hatch run bench:rollout                                                         # this stack alone
    hatch run bench:rollout --tunix "$(hatch run peers:which python)" --transformers "$(hatch run oracles:which python)"

The whole table with both peers takes an hour on two cores, nearly all of it the peers on `small`. For a part of it:
`--models tiny --new-tokens 128 --turns 1 --repeats 3`.

Prompts of 64 to 96 tokens, groups of 8, float32, random weights, temperature 1, whole vocabulary, log-probabilities
recorded. `full`: every sequence runs to the limit. `geometric`: each sequence has its own limit, geometric with mean
40. The peers cannot end single rows without a stop token, and their batches wait for the longest row in any case, so
they run to the longest limit, and only tokens within the limits count as useful. First calls include compilation:
`cold` with an empty compilation cache, `cached` in a second process with that cache.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from tunix_parts import tunix_network, tunix_sampler
from turns import benchmark_parser, launch, take_turns, timed
from workload import GROUP_SIZE, LONGEST_PROMPT, MODELS, PAD, force_devices, network, workload


def main() -> None:
    sides = {"ours": ours, "tunix": tunix, "transformers": transformers}
    parser = benchmark_parser(__doc__, [*sides, "machine"])
    parser.add_argument("--transformers", metavar="PYTHON", help="python of an environment with torch and transformers")
    parser.add_argument("--sequences", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--devices", type=int, help="forced CPU devices of this stack; default 2 for tiny, 1 for small")
    options = parser.parse_args()
    case = options.models[0], options.sequences[0], options.new_tokens[0], options.lengths[0]
    if options.side is None:
        compare_rollouts(options)
    elif options.side == "machine":
        print(json.dumps(machine()))
    else:
        limit_B = workload(*case)[2]
        measured = timed(sides[options.side](*case, options), options.repeats)
        print(json.dumps(measured | {"useful": int(limit_B.sum()), "longest": int(limit_B.max())}))


def compare_rollouts(options: argparse.Namespace) -> None:
    sides = {"ours": sys.executable}
    sides |= {"tunix": options.tunix} if options.tunix else {}
    sides |= {"transformers": options.transformers} if options.transformers else {}
    rooflines = launch(sys.executable, "machine", [], script=__file__)
    print(f"machine: {rooflines['flops'] / 1e9:.0f} GFLOP/s, {rooflines['bytes'] / 1e9:.1f} GB/s", flush=True)
    cases = itertools.product(options.models, options.sequences, options.new_tokens, options.lengths)
    for model, sequences, new_tokens, lengths in cases:
        case = ["--models", model, "--sequences", str(sequences), "--new-tokens", str(new_tokens), "--lengths", lengths]
        case += ["--devices", str(options.devices)] if options.devices else []
        with tempfile.TemporaryDirectory() as cache:
            first = {
                kind: launch(sys.executable, "ours", [*case, "--repeats", "0"], script=__file__, cache=cache)["first"]
                for kind in ("cold", "cached")
            }
        case += ["--repeats", str(options.repeats)]
        seconds, last = take_turns(sides, options.turns, case, script=__file__)
        report(f"{model} {sequences} x {new_tokens} {lengths}", model, seconds, last, first, rooflines)


def report(title: str, model: str, seconds: dict, last: dict, first: dict, rooflines: dict) -> None:
    median = {side: statistics.median(values) for side, values in seconds.items()}
    for side, value in median.items():
        useful = last[side]["useful"]
        line = f"{title} {side}: {useful / value:,.0f} tokens/s"
        if side == "ours":
            line += f", first call {first['cold']:.1f} s cold, {first['cached']:.1f} s cached"
            weights = parameters(model)
            flops = 2 * weights * useful / value / rooflines["flops"]
            # Every step of every batch reads the weights once; there are at least as many as the longest sequence has.
            read = 4 * weights * last[side]["longest"] / value / rooflines["bytes"]
            line += f", {flops:.0%} of the FLOP roofline, weights alone {read:.0%} of the bandwidth"
        else:
            line += f", first call {last[side]['first']:.1f} s"
            line += f", ratio {(last['ours']['useful'] / median['ours']) / (useful / value):.2f}"
        print(line, flush=True)


def parameters(model: str) -> int:
    """Weights a token is multiplied with, the unembedding included."""
    m = MODELS[model]
    D, attention = m["width"], m["head_size"] * 2 * (m["query_heads"] + m["kv_heads"])
    return m["layers"] * D * (attention + 3 * m["mlp_width"]) + D * m["vocab_size"]


def ours(
    model: str, sequences: int, new_tokens: int, lengths: str, options: argparse.Namespace
) -> Callable[[int], object]:
    devices = force_devices(model, options.devices)
    import jax

    from grpo_contracts import Prompts, SamplingParams
    from grpo_sampler import Sampler

    config, params = network(model)
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    prompts = Prompts(tokens_PT, length_P, np.arange(len(length_P), dtype=np.int32), config.vocab_size, PAD)
    sampler = Sampler(
        config,
        SamplingParams(),
        max_prompt_length=LONGEST_PROMPT,
        max_new_tokens=new_tokens,
        slots=sequences,
        pad_id=PAD,
        mesh=jax.make_mesh((devices,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,)) if devices > 1 else None,
    )
    limit_PG = limit_B.reshape(-1, GROUP_SIZE)
    return lambda turn: sampler.generate(
        params, prompts, group_size=GROUP_SIZE, seed=0, step=turn, max_new_tokens=limit_PG
    )


def tunix(model: str, sequences: int, new_tokens: int, lengths: str, _: argparse.Namespace) -> Callable[[int], object]:
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    sampler, sample = tunix_sampler(model, tunix_network(model), tokens_PT, length_P, new_tokens)
    return lambda turn: sample(sampler, turn, int(limit_B.max()))


def transformers(
    model: str, sequences: int, new_tokens: int, lengths: str, _: argparse.Namespace
) -> Callable[[int], object]:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import Qwen3Config, Qwen3ForCausalLM

    m = MODELS[model]
    config = Qwen3Config(
        vocab_size=m["vocab_size"],
        hidden_size=m["width"],
        intermediate_size=m["mlp_width"],
        num_hidden_layers=m["layers"],
        num_attention_heads=m["query_heads"],
        num_key_value_heads=m["kv_heads"],
        head_dim=m["head_size"],
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=PAD,
    )
    causal = Qwen3ForCausalLM(config).eval()
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    ids = np.full((sequences, LONGEST_PROMPT), PAD, np.int64)
    for b, (tokens, n) in enumerate(zip(np.repeat(tokens_PT, GROUP_SIZE, 0), np.repeat(length_P, GROUP_SIZE))):
        ids[b, LONGEST_PROMPT - n :] = tokens[:n]
    mask = torch.from_numpy((ids != PAD).astype(np.int64))

    def call(turn: int) -> None:
        torch.manual_seed(turn)
        with torch.inference_mode():
            causal.generate(
                torch.from_numpy(ids),
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(limit_B.max()),
                return_dict_in_generate=True,
                output_logits=False,
            )

    return call


def machine() -> dict:
    """Peak of a large matrix product, and of reading memory, through the same compiler."""
    import jax
    import jax.numpy as jnp

    def best(function: Callable, *arguments: jax.Array) -> float:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arguments))
        times = []
        for _ in range(7):
            start = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            times.append(time.perf_counter() - start)
        return min(times)

    square, long = jnp.ones((2048, 2048)), jnp.ones((64, 1_000_000))
    return {
        "flops": 2 * 2048**3 / best(jnp.matmul, square, square),
        "bytes": long.nbytes / best(lambda x: x.max(-1), long),
    }


if __name__ == "__main__":
    main()
