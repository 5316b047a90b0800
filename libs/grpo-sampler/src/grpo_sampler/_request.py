"""The request of one call, checked before anything is compiled."""

from typing import NamedTuple

import numpy as np

from grpo_contracts import Prompts, SamplingParams, validate
from grpo_sampler._arguments import check_int
from grpo_sampler._errors import SamplerError
from grpo_sampler._sampling import sampling_arrays


class Request(NamedTuple):
    """A batch: prompts, limits, and the identity of its randomness."""

    tokens_PT: np.ndarray
    length_P: np.ndarray
    prompt_id_P: np.ndarray
    limit_B: np.ndarray
    group_size: int
    sampling: SamplingParams
    min_new: int
    seed: int
    step: int


class Limits(NamedTuple):
    """The limits of a sampler: vocabulary, tokens of a prompt, and fewest and most tokens of a completion."""

    vocabulary: int
    prompt: int
    min_new: int
    max_new: int


def make_request(
    prompts: Prompts,
    max_new_tokens: np.ndarray | None,
    *,
    group_size: int,
    sampling: SamplingParams,
    seed: int,
    step: int,
    limits: Limits,
) -> Request:
    """Checks a call's arguments against the sampler's limits.

    Args:
        prompts: as for `Sampler.generate`.
        max_new_tokens: a limit per prompt [P], per sequence [P, G] or for all; None for the sampler's own.
        group_size: samples of one prompt.
        sampling: how to draw tokens.
        seed: of the run.
        step: optimizer step.
        limits: those of the sampler.
    Returns:
        The request, with tokens cut to the longest prompt.
    Raises:
        SamplerError: prompts, limits or sampling parameters that do not fit.
        ContractError: `prompts` break the contract.
    """
    validate(prompts, level="values")
    length_P = np.asarray(prompts.length_P, np.int32)
    tokens_PT = np.asarray(prompts.tokens_PT, np.int32)
    if not len(length_P):
        raise SamplerError("prompts must hold at least one prompt: got none.")
    group_size = check_int("group_size", group_size, 1)
    seed, step = check_int("seed", seed, 0, 2**64 - 1), check_int("step", step, 0, 2**32 - 1)
    _check_prompts(tokens_PT, length_P, limits)
    if prompts.vocab_size > limits.vocabulary:
        raise SamplerError(
            f"prompts.vocab_size must be at most the model's vocabulary, {limits.vocabulary}: "
            f"got {prompts.vocab_size}. Was the tokenizer made for this model?"
        )
    limit_PG = _limits(max_new_tokens, len(length_P), group_size, limits)
    sampling_arrays(sampling, limits.vocabulary, limits.min_new)
    return Request(
        tokens_PT[:, : length_P.max()],
        length_P,
        np.asarray(prompts.prompt_id_P, np.int32),
        limit_PG.reshape(-1).astype(np.int32),
        group_size,
        sampling,
        limits.min_new,
        seed,
        step,
    )


def _check_prompts(tokens_PT: np.ndarray, length_P: np.ndarray, limits: Limits) -> None:
    if length_P.max() > limits.prompt:
        worst = int(length_P.argmax())
        raise SamplerError(
            f"prompts must have at most max_prompt_length={limits.prompt} tokens: prompt {worst} has "
            f"{length_P[worst]}. Drop it, or make the sampler with a larger max_prompt_length."
        )
    live_PT = np.arange(tokens_PT.shape[1]) < length_P[:, None]
    outside = np.argwhere(live_PT & (tokens_PT >= limits.vocabulary))
    if outside.size:
        p, t = outside[0]
        raise SamplerError(
            f"token ids must lie in [0, {limits.vocabulary}), the model's vocabulary: got {tokens_PT[p, t]} "
            f"at prompt {p}, position {t}. Was the tokenizer made for this model?"
        )


def _limits(max_new_tokens: np.ndarray | None, P: int, group_size: int, limits: Limits) -> np.ndarray:
    limit = np.asarray(limits.max_new if max_new_tokens is None else max_new_tokens)
    if limit.shape not in ((), (P,), (P, group_size)) or not np.issubdtype(limit.dtype, np.integer):
        raise SamplerError(
            f"max_new_tokens must hold integers of shape ({P},) or ({P}, {group_size}): "
            f"got {limit.dtype} of shape {limit.shape}."
        )
    lowest = max(1, limits.min_new)
    if limit.min() < lowest or limit.max() > limits.max_new:
        raise SamplerError(
            f"max_new_tokens must lie in [{lowest}, {limits.max_new}], the sampler's own limits: "
            f"got {limit.min()} to {limit.max()}."
        )
    return np.broadcast_to(limit[:, None] if limit.ndim == 1 else limit, (P, group_size))
