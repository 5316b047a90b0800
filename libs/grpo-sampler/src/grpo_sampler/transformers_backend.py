"""The `generate` of transformers as a rollout backend: an oracle for `Sampler`, and an alternative without JAX.

Imported on demand; needs `pip install 'grpo-sampler[transformers]'`.
"""

import hashlib
import tempfile
from typing import Any

import numpy as np

from grpo_contracts import PolicyVersion, Prompts, Rollout, SamplingParams, from_completions, validate
from grpo_sampler._config import ModelConfig
from grpo_sampler._errors import SamplerError
from grpo_sampler._sampling import sampling_arrays
from grpo_sampler._weights import save_pretrained

try:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, GenerationConfig
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"grpo_sampler.transformers_backend needs {error.name}: pip install 'grpo-sampler[transformers]'.",
        name=error.name,
    ) from error

__all__ = ["TransformersBackend"]


class TransformersBackend:
    """`grpo_contracts.RolloutBackend` over transformers' `generate`.

    It makes one call per sequence, because torch draws a whole batch from one stream of random numbers and draws must
    depend only on (seed, step, prompt, sample, position). Exact, and slow.

    Args:
        config: the model.
        sampling: how to draw tokens. If several tokens tie at the end of the nucleus, transformers keeps some of them
            and `Sampler` keeps all.
        max_new_tokens: longest completion, in tokens.
        device: torch device to run on.
    Raises:
        SamplerError: invalid sampling parameters or limits.
    """

    def __init__(
        self, config: ModelConfig, sampling: SamplingParams | None = None, *, max_new_tokens: int, device: str = "cpu"
    ) -> None:
        if max_new_tokens < 1:
            raise SamplerError(f"max_new_tokens must be at least 1: got {max_new_tokens}.")
        self._config, self._sampling = config, SamplingParams() if sampling is None else sampling
        sampling_arrays(self._sampling, config.vocab_size)
        self._max_new_tokens, self._device = max_new_tokens, device
        self._held: tuple[Any, PolicyVersion] | None = None

    def start(self) -> None:
        """Does nothing: the model comes with its weights."""

    def update_weights(self, params: Any, policy: PolicyVersion) -> None:
        """Passes the parameters on through a temporary folder in Hugging Face layout.

        Args:
            params: the policy's parameters, a plain nested dictionary; may be donated afterwards.
            policy: their version.
        Raises:
            WeightsError: parameters that do not match the configuration.
        """
        self._held = None
        with tempfile.TemporaryDirectory() as folder:
            save_pretrained(folder, self._config, params)
            model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model.to(self._device).eval()
        model.generation_config = (
            GenerationConfig()
        )  # otherwise the model's own settings, such as stop ids, are mixed in
        self._held = model, policy

    def generate(self, prompts: Prompts, *, group_size: int, seed: int, step: int) -> Rollout:
        """Draws a group of completions of each prompt.

        Args:
            prompts: P prompts.
            group_size: completions of each, G.
            seed: any integer.
            step: optimizer step.
        Returns:
            P * G rows.
        Raises:
            SamplerError: no weights yet.
            ContractError: `prompts` break the contract.
        """
        if self._held is None:
            raise SamplerError("a backend must have weights before it generates: call update_weights(params, policy).")
        validate(prompts, level="values")
        model, policy = self._held
        drawn = []
        with torch.random.fork_rng(), torch.inference_mode():
            for tokens_T, length, prompt_id in zip(
                np.asarray(prompts.tokens_PT), np.asarray(prompts.length_P), np.asarray(prompts.prompt_id_P)
            ):
                prompt_1T = torch.tensor(tokens_T[None, :length], dtype=torch.long, device=self._device)
                for sample in range(group_size):
                    torch.manual_seed(_stream(seed, step, int(prompt_id), sample))
                    drawn.append(self._complete(model, prompt_1T, prompts.pad_id))
        tokens, logp, policy_logp = zip(*drawn)
        return from_completions(
            prompts,
            tokens,
            logp,
            group_size=group_size,
            sampling=self._sampling,
            policy=policy,
            policy_logp=policy_logp,
            max_new_tokens=self._max_new_tokens,
        )

    def close(self) -> None:
        """Releases the model."""
        self._held = None

    def _complete(self, model: Any, prompt_1T: Any, pad_id: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One completion: token ids, log-probabilities under the sampling parameters and under the plain policy."""
        sampling, greedy = self._sampling, self._sampling.temperature == 0
        filters = (
            {} if greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
        )
        out = model.generate(
            prompt_1T,
            attention_mask=torch.ones_like(prompt_1T),
            generation_config=GenerationConfig(
                do_sample=not greedy,
                top_k=0 if greedy else sampling.top_k,  # the default is 50
                **filters,
                max_new_tokens=self._max_new_tokens,
                eos_token_id=list(sampling.stop_ids) or None,
                pad_token_id=pad_id,
                output_scores=True,
                output_logits=True,
                return_dict_in_generate=True,
            ),
        )
        token_T = out.sequences[0, prompt_1T.shape[1] :]

        def taken(scores: tuple[Any, ...]) -> np.ndarray:
            logp_TV = torch.log_softmax(torch.cat(scores).float(), -1)
            return logp_TV.gather(1, token_T[:, None])[:, 0].cpu().numpy()

        policy_logp_T = taken(out.logits)
        return token_T.cpu().numpy(), np.zeros_like(policy_logp_T) if greedy else taken(out.scores), policy_logp_T


def _stream(*identity: int) -> int:
    """A seed for torch that depends on every part of an identity."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # torch's seeds are signed
