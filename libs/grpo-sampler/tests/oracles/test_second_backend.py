"""transformers' `generate` keeps the same contract, and its sampled tokens have our scorer's log-probabilities."""

import numpy as np
import pytest
from backend_contract import CONFIG, MAX_NEW, PROMPTS, SAMPLINGS, check, policy_params

from grpo_contracts import PolicyVersion, SamplingParams
from grpo_sampler import Sampler, SamplerBackend, SamplerError
from grpo_sampler.transformers_backend import TransformersBackend


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_transformers_keeps_the_contract(sampling):
    check(
        lambda sampling: TransformersBackend(CONFIG, sampling, max_new_tokens=MAX_NEW), SAMPLINGS[sampling], bound=2e-5
    )


def test_both_backends_agree_on_greedy_completions():
    sampling, rollouts = SAMPLINGS["greedy"], []
    sampler = Sampler(CONFIG, sampling, max_prompt_length=5, max_new_tokens=MAX_NEW, slots=3, sizes=1, unroll=False)
    for backend in (SamplerBackend(sampler), TransformersBackend(CONFIG, sampling, max_new_tokens=MAX_NEW)):
        backend.start()
        backend.update_weights(policy_params(), PolicyVersion(0, "00"))
        rollouts.append(backend.generate(PROMPTS, group_size=1, seed=0, step=0))
        backend.close()
    ours, theirs = rollouts
    np.testing.assert_array_equal(ours.tokens_BT, theirs.tokens_BT)
    np.testing.assert_array_equal(ours.finish_B, theirs.finish_B)
    np.testing.assert_allclose(ours.policy_logp_BT, theirs.policy_logp_BT, atol=2e-5, rtol=0)


def test_sampling_parameters_that_do_not_fit_are_refused():
    with pytest.raises(SamplerError, match="stop_ids must lie in"):
        TransformersBackend(CONFIG, SamplingParams(stop_ids=(32,)), max_new_tokens=4)
    with pytest.raises(SamplerError, match="max_new_tokens must be at least 1"):
        TransformersBackend(CONFIG, max_new_tokens=0)
