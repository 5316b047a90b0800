"""Useful tokens/s of rollouts, side by side with google-tunix's own sampler and transformers' `generate`.

    hatch run bench:rollout                                                         # this stack alone
    hatch run bench:rollout --tunix "$(hatch run peers:which python)" --transformers "$(hatch run oracles:which python)"

The whole table, both peers, takes an hour on two cores, nearly all of it the peers on `small`. For a part of it:
`--models tiny --new-tokens 128 --turns 1 --repeats 3`.

Prompts of 64 to 96 tokens, groups of 8, float32, random weights, temperature 1, whole vocabulary, log-probabilities
recorded. `full`: every sequence runs to the limit. `geometric`: each sequence has its own limit, geometric with mean
40; peers cannot end rows early without a stop token, and since a batch of theirs waits for its longest row in any case,
they run to the longest limit and only tokens within limits count as useful. Sides take turns, a fresh process each.
First calls include compilation: `cold` with an empty compilation cache, `cached` by a second process with that cache.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np

AXES = ("layers", "width", "mlp_width", "query_heads", "kv_heads", "head_size", "vocab_size")
MODELS: dict[str, dict[str, Any]] = {
    "tiny": dict(zip(AXES, (4, 128, 512, 4, 2, 32, 512))),
    "small": dict(zip(AXES, (8, 512, 1536, 8, 2, 64, 32_000))),
}
GROUP_SIZE, LONGEST_PROMPT, PAD, EOS = 8, 96, 0, 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunix", help="python of an environment with google-tunix")
    parser.add_argument("--transformers", help="python of an environment with torch and transformers")
    parser.add_argument("--models", nargs="+", default=["tiny", "small"], choices=list(MODELS))
    parser.add_argument("--sequences", nargs="+", type=int, default=[32, 128])
    parser.add_argument("--new-tokens", nargs="+", type=int, default=[128, 256])
    parser.add_argument("--lengths", nargs="+", default=["full", "geometric"], choices=["full", "geometric"])
    parser.add_argument("--devices", type=int, help="forced CPU devices of this stack; default 2 for tiny, 1 for small")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--side", choices=["ours", "tunix", "transformers", "machine"], help="one side, printed as JSON"
    )
    options = parser.parse_args()
    if options.side is None:
        compare(options)
        return
    if options.side == "machine":
        print(json.dumps(machine()))
        return
    case = options.models[0], options.sequences[0], options.new_tokens[0], options.lengths[0]
    side = {"ours": ours, "tunix": tunix, "transformers": transformers}[options.side]
    print(json.dumps(side(*case, options)))


def compare(options: argparse.Namespace) -> None:
    sides = {"ours": sys.executable}
    sides |= {"tunix": options.tunix} if options.tunix else {}
    sides |= {"transformers": options.transformers} if options.transformers else {}
    rooflines = launch(sys.executable, "machine", [])
    print(f"machine: {rooflines['flops'] / 1e9:.0f} GFLOP/s, {rooflines['bytes'] / 1e9:.1f} GB/s", flush=True)
    for model in options.models:
        for sequences in options.sequences:
            for new_tokens in options.new_tokens:
                for lengths in options.lengths:
                    case = ["--models", model, "--sequences", str(sequences), "--new-tokens", str(new_tokens)]
                    case += ["--lengths", lengths, "--repeats", str(options.repeats)]
                    case += ["--devices", str(options.devices)] if options.devices else []
                    with tempfile.TemporaryDirectory() as cache:
                        once = [*case, "--repeats", "0"]
                        first = {
                            kind: launch(sys.executable, "ours", once, cache=cache)["first"]
                            for kind in ("cold", "cached")
                        }
                    seconds, last = take_turns(sides, options.turns, case)
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
            # Every step of every batch reads the weights once; the fewest steps are those of the longest sequence.
            read = 4 * weights * last[side]["longest"] / value / rooflines["bytes"]
            line += f", {flops:.0%} of the FLOP roofline, weights alone {read:.0%} of the bandwidth"
        else:
            line += f", first call {last[side]['first']:.1f} s"
            line += f", ratio {(last['ours']['useful'] / median['ours']) / (useful / value):.2f}"
        print(line, flush=True)


def take_turns(
    sides: dict[str, str], turns: int, case: list[str], *, script: str = __file__
) -> tuple[dict[str, list[float]], dict[str, dict]]:
    """All seconds of each side, a fresh process a turn, and the last that each printed."""
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    last: dict[str, dict] = {}
    for _ in range(turns):
        for side, python in sides.items():
            last[side] = launch(python, side, case, script=script)
            seconds[side] += last[side]["seconds"]
    return seconds, last


def launch(python: str, side: str, arguments: list[str], *, script: str = __file__, cache: str | None = None) -> dict:
    command = [python, script, "--side", side, *arguments]
    # What jax calls small stays out of its cache by default; a first call consists of small programs.
    stored = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} if cache else {}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | stored
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    return json.loads(output.splitlines()[-1])


def parameters(model: str) -> int:
    """Weights a token is multiplied with, the unembedding included."""
    m = MODELS[model]
    D, attention = m["width"], m["head_size"] * 2 * (m["query_heads"] + m["kv_heads"])
    return m["layers"] * D * (attention + 3 * m["mlp_width"]) + D * m["vocab_size"]


def workload(model: str, sequences: int, new_tokens: int, lengths: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prompts [P, T] right-padded, their lengths, and the limit of each sequence; the same for all sides."""
    rng = np.random.default_rng(0)
    P = sequences // GROUP_SIZE
    length_P = rng.integers(64, LONGEST_PROMPT + 1, P).astype(np.int32)
    tokens_PT = rng.integers(2, MODELS[model]["vocab_size"], (P, LONGEST_PROMPT)).astype(np.int32)
    tokens_PT[np.arange(LONGEST_PROMPT) >= length_P[:, None]] = PAD
    limit_B = rng.geometric(1 / 40, sequences) if lengths == "geometric" else np.full(sequences, new_tokens)
    return tokens_PT, length_P, np.minimum(limit_B, new_tokens)


def timed(call: Callable[[int], object], limit_B: np.ndarray, repeats: int) -> dict:
    seconds = []
    for turn in range(repeats + 1):
        start = time.perf_counter()
        call(turn)
        seconds.append(time.perf_counter() - start)
    return {"first": seconds[0], "seconds": seconds[1:], "useful": int(limit_B.sum()), "longest": int(limit_B.max())}


def ours(model: str, sequences: int, new_tokens: int, lengths: str, options: argparse.Namespace) -> dict:
    devices = options.devices or {"tiny": 2, "small": 1}[model]
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    import jax
    from flax import nnx

    from grpo_contracts import PolicyVersion, Prompts, SamplingParams
    from grpo_sampler import ModelConfig, Sampler, Transformer, split

    config = ModelConfig(family="qwen3", tied=True, qk_norm=True, **MODELS[model])
    _, params = split(Transformer(config, rngs=nnx.Rngs(0)))
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    prompts = Prompts(tokens_PT, length_P, np.arange(len(length_P), dtype=np.int32), config.vocab_size, PAD)
    mesh = jax.make_mesh((devices,), ("dp",), axis_types=(jax.sharding.AxisType.Auto,)) if devices > 1 else None
    sampler = Sampler(
        config,
        SamplingParams(),
        max_prompt_length=LONGEST_PROMPT,
        max_new_tokens=new_tokens,
        slots=sequences,
        pad_id=PAD,
        mesh=mesh,
    )

    def call(turn: int) -> None:
        sampler.generate(
            params,
            prompts,
            group_size=GROUP_SIZE,
            seed=0,
            step=turn,
            policy=PolicyVersion(0, "00"),
            max_new_tokens=limit_B.reshape(-1, GROUP_SIZE),
        )

    return timed(call, limit_B, options.repeats)


def tunix(model: str, sequences: int, new_tokens: int, lengths: str, options: argparse.Namespace) -> dict:
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    network = tunix_network(model)
    sampler, sample = tunix_sampler(model, network, tokens_PT, length_P, new_tokens)
    return timed(lambda turn: sample(sampler, turn, int(limit_B.max())), limit_B, options.repeats)


def tunix_network(model: str) -> Any:
    """tunix's Qwen3 of these sizes, with random weights."""
    from flax import nnx
    from tunix.models.qwen3 import model as qwen3  # pyright: ignore[reportMissingImports]

    m = MODELS[model]
    config = qwen3.ModelConfig(
        num_layers=m["layers"],
        vocab_size=m["vocab_size"],
        embed_dim=m["width"],
        hidden_dim=m["mlp_width"],
        num_heads=m["query_heads"],
        head_dim=m["head_size"],
        num_kv_heads=m["kv_heads"],
        norm_eps=1e-6,
        rope_theta=10_000,
        use_tied_embedding=True,
    )
    return qwen3.Qwen3(config, rngs=nnx.Rngs(0))


def tunix_sampler(
    model: str, network: Any, tokens_PT: np.ndarray, length_P: np.ndarray, new_tokens: int
) -> tuple[Any, Callable[[Any, int, int], Any]]:
    """tunix's sampler, and a call that draws a group of every prompt: (sampler, seed, steps) -> its output."""
    from tunix.generate import sampler as tunix_sampler  # pyright: ignore[reportMissingImports]

    m = MODELS[model]

    class Numbers:
        """Token ids written as words, for a sampler that takes text only."""

        def encode(self, text: str) -> list[int]:
            return [int(word) for word in text.split()]

        def decode(self, ids: list[int]) -> str:
            return ""

        def bos_id(self) -> int:
            return 0

        def eos_id(self) -> int:
            return m["vocab_size"]  # never drawn: all rows run to the limit

        def pad_id(self) -> int:
            return PAD

    # The prompts are left-padded to a power of two, as tunix does by itself.
    cache = tunix_sampler.CacheConfig(128 + new_tokens, m["layers"], m["kv_heads"], m["head_size"])
    sampler = tunix_sampler.Sampler(network, Numbers(), cache)
    texts = [" ".join(map(str, tokens[:n])) for tokens, n in zip(tokens_PT, length_P) for _ in range(GROUP_SIZE)]

    def sample(sampler: Any, seed: int, steps: int) -> Any:
        return sampler(
            texts,
            max_generation_steps=steps,
            max_prompt_length=128,
            temperature=1.0,
            top_p=1.0,
            return_logprobs=True,
            seed=seed,
        )

    return sampler, sample


def transformers(model: str, sequences: int, new_tokens: int, lengths: str, options: argparse.Namespace) -> dict:
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
    network = Qwen3ForCausalLM(config).eval()
    tokens_PT, length_P, limit_B = workload(model, sequences, new_tokens, lengths)
    ids = np.full((sequences, LONGEST_PROMPT), PAD, np.int64)
    for b, (tokens, n) in enumerate(zip(np.repeat(tokens_PT, GROUP_SIZE, 0), np.repeat(length_P, GROUP_SIZE))):
        ids[b, LONGEST_PROMPT - n :] = tokens[:n]
    mask = torch.from_numpy((ids != PAD).astype(np.int64))

    def call(turn: int) -> None:
        torch.manual_seed(turn)
        with torch.inference_mode():
            network.generate(
                torch.from_numpy(ids),
                attention_mask=mask,
                do_sample=True,
                top_k=0,
                top_p=1.0,
                max_new_tokens=int(limit_B.max()),
                return_dict_in_generate=True,
                output_logits=False,
            )

    return timed(call, limit_B, options.repeats)


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
