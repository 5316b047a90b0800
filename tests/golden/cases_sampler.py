"""What grpo-sampler computes: hidden states of each family, whole distributions, and the very tokens a seed draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_numbers import integers, wave

import grpo_sampler as gs
from grpo_contracts import PolicyVersion, Prompts, SamplingParams

_SIZES: dict[str, Any] = {
    "vocab_size": 23,
    "width": 16,
    "mlp_width": 24,
    "layers": 2,
    "query_heads": 4,
    "kv_heads": 2,
    "head_size": 8,
}
_SCALING = gs.Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=64)
CONFIGS = {
    "qwen2": gs.ModelConfig(family="qwen2", qkv_bias=True, tied=True, **_SIZES),
    "qwen3": gs.ModelConfig(family="qwen3", qk_norm=True, rope_theta=1e6, **_SIZES),
    "llama": gs.ModelConfig(family="llama", rope_scaling=_SCALING, **_SIZES),
}
SAMPLINGS = {
    "plain": SamplingParams(),
    "warm": SamplingParams(temperature=0.7),
    "top-k": SamplingParams(top_k=5),
    "top-p": SamplingParams(top_p=0.8),
    "min-p": SamplingParams(min_p=0.2),
    "all": SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
}
# Sampled tokens are exact only where float32 rounding cannot reach a draw's boundary; the cases keep clear of it.
_PROMPTS = Prompts(
    np.array([[5, 9, 2, 7], [3, 8, 0, 0]], np.int32), np.array([4, 2], np.int32), np.array([6, 1], np.int32), 23, 0
)


def _params(config: gs.ModelConfig) -> tuple[Any, Any]:
    graphdef, shapes = gs.abstract(config)
    leaves, structure = jax.tree.flatten(shapes)
    made = [
        jnp.asarray((1 + 0.1 * wave(*leaf.shape, phase=i)) if leaf.ndim == 1 else 0.5 * wave(*leaf.shape, phase=i))
        for i, leaf in enumerate(leaves)
    ]
    return graphdef, jax.tree.unflatten(structure, made)


def _hidden() -> dict[str, Any]:
    tokens_BT = jnp.asarray(integers(2, 7, below=23))
    segment_BT = jnp.array([[1, 1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
    positions_BT = jnp.array([[0, 1, 2, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5, 6]])
    cases: dict[str, Any] = {}
    for family, config in CONFIGS.items():
        graphdef, params = _params(config)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            cases[f"{family} shape of {jax.tree_util.keystr(path)}"] = np.array(leaf.shape)

        @jax.jit
        def run(params: Any, graphdef: Any = graphdef) -> tuple[jax.Array, ...]:
            model = gs.merge(graphdef, params)
            plain_BTD = model(tokens_BT, positions_BT, segment_BT)
            packed_RTD = model.with_prompts(
                tokens_BT[:, :3],
                jnp.array([3, 2]),
                tokens_BT[:, 3:],
                jnp.array([[3, 4, 3, 0], [2, 3, 4, 5]]),
                jnp.array([[1, 1, 2, 0], [1, 1, 1, 1]]),
                jnp.array([[0], [1]]),
            )
            return plain_BTD, packed_RTD, model.unembedding

        plain_BTD, packed_RTD, cases[f"{family} unembedding"] = run(params)
        # What stands at pads is nobody's promise.
        cases[f"{family} hidden"] = np.where((segment_BT > 0)[..., None], plain_BTD, 0)
        cases[f"{family} with_prompts"] = np.asarray(packed_RTD)[[0, 0, 0, 1, 1, 1, 1], [0, 1, 2, 0, 1, 2, 3]]
    return cases


def _log_probabilities() -> dict[str, Any]:
    logits_BV = jnp.asarray(3 * wave(3, 23))
    compiled = jax.jit(gs.log_probabilities, static_argnames="sampling")
    return {name: compiled(logits_BV, sampling=sampling) for name, sampling in SAMPLINGS.items()}


def _draws() -> dict[str, Any]:
    """Tokens are a function of (seed, step, prompt id, sample, position), so that a resumed run repeats itself."""
    config = CONFIGS["qwen3"]
    _, params = _params(config)
    cases: dict[str, Any] = {}
    sampler = gs.Sampler(config, max_prompt_length=4, max_new_tokens=6, slots=4, sizes=1)
    for name, sampling, seed, step in (
        ("greedy", SamplingParams(temperature=0.0, stop_ids=(2,)), 0, 0),
        ("sampled", SamplingParams(stop_ids=(2,)), 0, 0),
        ("another step", SamplingParams(stop_ids=(2,)), 0, 1),
    ):
        rollout = sampler.generate(
            params, _PROMPTS, group_size=2, seed=seed, step=step, policy=PolicyVersion(step, "ab"), sampling=sampling
        )
        cases[f"draw {name}: tokens"] = rollout.tokens_BT
        cases[f"draw {name}: total length"] = rollout.total_length_B
        cases[f"draw {name}: finish"] = rollout.finish_B
        cases[f"draw {name}: logp"] = rollout.logp_BT
        cases[f"draw {name}: policy_logp"] = rollout.policy_logp_BT
        cases[f"draw {name}: rows"] = np.stack([rollout.group_B, rollout.sample_B, rollout.prompt_id_B])
    return cases


PARTS = {"network": _hidden, "log_probabilities": _log_probabilities, "draws": _draws}
