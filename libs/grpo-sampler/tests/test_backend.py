"""The sampler keeps the contract of a rollout backend; `oracles/test_second_backend.py` holds another one to it."""

import jax.numpy as jnp
import pytest
from backend_contract import CONFIG, LAWS, MAX_NEW, check, policy_params

from grpo_contracts import PolicyIdentity
from grpo_sampler import Sampler, SamplerBackend


# Each law compiles a sampler of its own; the filtered one runs through most of the code.
@pytest.mark.parametrize(
    "law", [pytest.param(law, marks=() if law == "filtered" else pytest.mark.slow) for law in LAWS]
)
def test_the_sampler_keeps_the_contract(law):
    def make(law):
        return SamplerBackend(
            Sampler(CONFIG, law, max_prompt_length=8, max_new_tokens=MAX_NEW, slots=9, sizes=1, unroll=False)
        )

    check(make, LAWS[law], bound=1e-5)


def test_weights_are_kept_in_the_type_that_decodes():
    backend = SamplerBackend(Sampler(CONFIG, max_prompt_length=8, max_new_tokens=MAX_NEW, compute_dtype=jnp.bfloat16))
    backend.update_weights(policy_params(), PolicyIdentity(0, "00"))
    assert backend._held is not None
    assert backend._held[0]["embed"].dtype == jnp.bfloat16
