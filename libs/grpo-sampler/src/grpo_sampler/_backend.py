"""The sampler as a rollout backend."""

from typing import Any

import jax
import jax.numpy as jnp

from grpo_contracts import PolicyVersion, Prompts, Rollout
from grpo_sampler._arguments import brief
from grpo_sampler._errors import SamplerError
from grpo_sampler._layout import check_params
from grpo_sampler._sampler import Sampler


class SamplerBackend:
    """`Sampler` behind `grpo_contracts.RolloutBackend`.

    Args:
        sampler: defines the model, sampling parameters, limits and mesh.
    """

    def __init__(self, sampler: Sampler) -> None:
        if not isinstance(sampler, Sampler):
            raise SamplerError(
                f"sampler must be a Sampler: got a {type(sampler).__name__}. "
                "Make one first: Sampler(config, sampling, max_prompt_length=..., max_new_tokens=...)."
            )
        self._sampler = sampler
        self._held: tuple[Any, PolicyVersion] | None = None

    def start(self) -> None:
        """Does nothing: programs compile when they are first needed, and caches last for one call."""

    def update_weights(self, params: Any, policy: PolicyVersion) -> None:
        """Copies the parameters on their devices, cast to the type that decoding computes in.

        Args:
            params: as for `Sampler.generate`; may be donated afterwards.
            policy: their version.
        Raises:
            SamplerError: parameters of another model, or no policy version.
        """
        check_params(params, self._sampler.config)
        if not isinstance(policy, PolicyVersion):
            raise SamplerError(f"policy must be a grpo_contracts.PolicyVersion: got {brief(policy)}.")
        self._held = None  # first, so that there is never a second copy
        dtype = self._sampler.compute_dtype
        self._held = jax.tree.map(lambda leaf: jnp.array(leaf, dtype, copy=True), params), policy

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        """Draws a group of completions of each prompt, as `Sampler.generate` does.

        Args:
            prompts: P prompts.
            group_size: completions of each, G.
            seed: 0 to 2**64 - 1.
            step: optimizer step.
        Returns:
            P * G rows.
        Raises:
            SamplerError: no weights yet, or a request that does not fit.
        """
        if self._held is None:
            raise SamplerError("a backend must have weights before it generates: call update_weights(params, policy).")
        params, policy = self._held
        return self._sampler.generate(params, prompts, group_size=group_size, seed=seed, step=step, policy=policy)

    def close(self) -> None:
        """Releases the weights."""
        self._held = None
