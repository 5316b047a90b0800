"""The contract of every rollout backend; the oracle environment checks the second one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from grpo_contracts import FinishReason, PolicyVersion, Prompts, Rollout, RolloutBackend, SamplingParams, validate
from grpo_sampler import ModelConfig, SamplerError, Transformer, log_probabilities, merge, split

V, MAX_NEW, G = 32, 6, 3
CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=V,
    width=16,
    mlp_width=32,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_size=8,
    tied=True,
    qk_norm=True,
    max_positions=64,
    eos_ids=(7,),  # not among the stop ids, which alone end a completion
)
SAMPLINGS = {
    "plain": SamplingParams(stop_ids=(5, 9)),
    "filtered": SamplingParams(temperature=0.8, top_k=20, top_p=0.95, min_p=0.01, stop_ids=(5, 9)),
    "greedy": SamplingParams(temperature=0.0, stop_ids=(5, 9)),
}
PROMPTS = Prompts(
    np.array([[3, 4, 6, 8, 2], [11, 12, 0, 0, 0], [17, 3, 21, 0, 0]], np.int32),
    np.array([5, 2, 3], np.int32),
    np.array([40, 7, 19], np.int32),
    V,
    0,
)


def policy_params() -> Any:
    """Weights large enough that some tokens are much more likely than others."""
    params = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))[1]
    return jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 2 else leaf, params) | {"embed": params["embed"] * 20}


def scored(params: Any, rollout: Rollout) -> tuple[np.ndarray, np.ndarray]:
    """(logp_BT, policy_logp_BT) of a rollout's tokens, by the training-style forward."""
    graphdef, _ = split(Transformer(CONFIG, rngs=nnx.Rngs(0)))
    model = merge(graphdef, params)
    segment_BT = np.arange(rollout.tokens_BT.shape[1]) < rollout.total_length_B[:, None]
    hidden_BTD = model(jnp.asarray(rollout.tokens_BT), segment_BT=jnp.asarray(segment_BT.astype(np.int32)))
    logits_NV = (hidden_BTD @ model.unembedding.T)[:, :-1].reshape(-1, V)
    policy_NV = jax.nn.log_softmax(logits_NV)
    greedy = rollout.sampling.temperature == 0
    law_NV = jnp.zeros_like(policy_NV) if greedy else log_probabilities(logits_NV, rollout.sampling)

    def taken(logp_NV: jax.Array) -> np.ndarray:
        logp_BTV = np.asarray(logp_NV).reshape(len(rollout.tokens_BT), -1, V)
        logp_BT = np.take_along_axis(logp_BTV, rollout.tokens_BT[:, 1:, None], -1)[..., 0]
        return np.where(rollout.loss_mask_BT, np.pad(logp_BT, ((0, 0), (1, 0))), 0)

    return taken(law_NV), taken(policy_NV)


def check(make: Callable[[SamplingParams], RolloutBackend], sampling: SamplingParams, bound: float) -> None:
    """Checks a backend from start to close.

    Args:
        make: makes a backend with at most MAX_NEW tokens a completion.
        sampling: how it draws tokens.
        bound: largest gap to the scorer's log-probabilities, in nats.
    """
    params, backend = policy_params(), make(sampling)
    assert isinstance(backend, RolloutBackend)
    backend.start()
    with pytest.raises(SamplerError, match="update_weights"):
        backend.generate(PROMPTS, group_size=G, seed=1, step=2)

    given = jax.tree.map(jnp.copy, params)
    backend.update_weights(given, PolicyVersion(2, "0a"))
    jax.tree.map(lambda leaf: leaf.delete(), given)  # a trainer may donate the parameters afterwards
    rollout = backend.generate(PROMPTS, group_size=G, seed=1, step=2)
    validate(rollout, level="values")
    assert (rollout.sampling, rollout.policy) == (sampling, PolicyVersion(2, "0a"))
    np.testing.assert_array_equal(rollout.prompt_id_B, np.repeat(PROMPTS.prompt_id_P, G))
    np.testing.assert_array_equal(rollout.group_B, np.repeat(np.arange(3), G))
    np.testing.assert_array_equal(rollout.sample_B, np.tile(np.arange(G), 3))
    for b, n in enumerate(rollout.prompt_length_B):
        np.testing.assert_array_equal(rollout.tokens_BT[b, :n], PROMPTS.tokens_PT[b // G, :n])

    stopped_B = rollout.finish_B == FinishReason.STOP
    last_B = rollout.tokens_BT[np.arange(3 * G), rollout.total_length_B - 1]
    np.testing.assert_array_equal(stopped_B, np.isin(last_B, sampling.stop_ids))
    inner_BT = rollout.loss_mask_BT & (np.arange(rollout.tokens_BT.shape[1]) < rollout.total_length_B[:, None] - 1)
    assert not np.isin(rollout.tokens_BT[inner_BT], sampling.stop_ids).any()
    assert (rollout.completion_length_B[~stopped_B] == MAX_NEW).all()

    logp_BT, policy_logp_BT = scored(params, rollout)
    gap = max(np.abs(rollout.logp_BT - logp_BT).max(), np.abs(rollout.policy_logp_BT - policy_logp_BT).max())
    print(f"{type(backend).__name__}: gap to the scorer {gap:.2e} nats")
    assert gap <= bound

    # Draws depend on every part of the identity, and not on order or other prompts.
    alone = Prompts(PROMPTS.tokens_PT[1:2], PROMPTS.length_P[1:2], PROMPTS.prompt_id_P[1:2], V, 0)
    np.testing.assert_array_equal(completions(backend, alone, 2), completions(backend, PROMPTS, 2)[G : 2 * G])
    if sampling.temperature > 0:
        assert (completions(backend, PROMPTS, 3) != completions(backend, PROMPTS, 2)).any()
        assert len(np.unique(completions(backend, PROMPTS, 2)[:G], axis=0)) > 1
    backend.update_weights(jax.tree.map(lambda leaf: -leaf, params), PolicyVersion(3, "0b"))
    other = backend.generate(PROMPTS, group_size=G, seed=1, step=2)
    assert other.policy.step == 3
    assert not np.array_equal(other.policy_logp_BT, rollout.policy_logp_BT)
    backend.close()
    backend.close()
    with pytest.raises(SamplerError, match="update_weights"):
        backend.generate(PROMPTS, group_size=G, seed=1, step=2)


def completions(backend: RolloutBackend, prompts: Prompts, step: int) -> np.ndarray:
    """The drawn tokens, -1 past their end."""
    rollout = backend.generate(prompts, group_size=G, seed=1, step=step)
    place_BN = rollout.prompt_length_B[:, None] + np.arange(MAX_NEW)
    width = rollout.tokens_BT.shape[1]
    tokens_BN = np.take_along_axis(rollout.tokens_BT, np.minimum(place_BN, width - 1), 1)
    return np.where(place_BN < rollout.total_length_B[:, None], tokens_BN, -1)
