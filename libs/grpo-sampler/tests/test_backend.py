"""The sampler keeps the contract of a rollout backend; `oracles/test_second_backend.py` holds another one to it."""

import jax.numpy as jnp
import pytest
from backend_contract import CONFIG, MAX_NEW, SAMPLINGS, check, policy_params

from grpo_contracts import PolicyVersion
from grpo_sampler import Sampler, SamplerBackend


# Each case compiles a sampler; the filtered one covers most of the code.
@pytest.mark.parametrize(
    "sampling",
    [pytest.param(sampling, marks=() if sampling == "filtered" else pytest.mark.slow) for sampling in SAMPLINGS],
)
def test_the_sampler_keeps_the_contract(sampling):
    def make(sampling):
        return SamplerBackend(
            Sampler(CONFIG, sampling, max_prompt_length=8, max_new_tokens=MAX_NEW, slots=9, sizes=1, unroll=False)
        )

    check(make, SAMPLINGS[sampling], bound=1e-5)


def test_weights_are_kept_in_the_type_that_decodes():
    backend = SamplerBackend(Sampler(CONFIG, max_prompt_length=8, max_new_tokens=MAX_NEW, compute_dtype=jnp.bfloat16))
    backend.update_weights(policy_params(), PolicyVersion(0, "00"))
    assert backend._held is not None
    assert backend._held[0]["embed"].dtype == jnp.bfloat16
