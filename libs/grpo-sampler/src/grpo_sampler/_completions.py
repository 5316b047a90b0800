"""The sequences of a batch as they are decoded, and the rollout that they become. numpy only."""

from dataclasses import dataclass

import numpy as np

from grpo_contracts import FinishReason, PolicyVersion, Rollout
from grpo_sampler._engine import Chunk
from grpo_sampler._request import Request


@dataclass(frozen=True)
class FinishedSequence:
    """One finished completion.

    Args:
        group: row of its prompt in the batch.
        sample: its index in the group.
        prompt_id: its prompt's id.
        tokens_T: int32, the completion without its prompt.
        logp_T: float32, log-probability of each token under the sampling parameters, in nats.
        policy_logp_T: float32, the same at temperature 1 without filters.
        finish: why it ended.
    """

    group: int
    sample: int
    prompt_id: int
    tokens_T: np.ndarray
    logp_T: np.ndarray
    policy_logp_T: np.ndarray
    finish: FinishReason


class Completions:
    """Tokens and log-probabilities of all sequences, as far as they are decoded."""

    def __init__(self, request: Request, max_new_tokens: int) -> None:
        self._request = request
        shape = len(request.limit_B), max_new_tokens
        self._token_BT = np.zeros(shape, np.int32)
        self._logp_BT, self._policy_logp_BT = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self._length_B, self._finish_B = np.zeros(shape[0], np.int32), np.zeros(shape[0], np.int8)

    def add(self, chunk: Chunk) -> None:
        """Adds what a chunk emitted."""
        i, row = np.nonzero(chunk.emitted.token_IS >= 0)
        b, t = chunk.request_S[row], chunk.had_S[row] + i
        self._token_BT[b, t] = chunk.emitted.token_IS[i, row]
        self._logp_BT[b, t] = chunk.emitted.logp_IS[i, row]
        self._policy_logp_BT[b, t] = chunk.emitted.policy_logp_IS[i, row]
        self._length_B[chunk.finished.request_F] = chunk.finished.length_F
        self._finish_B[chunk.finished.request_F] = chunk.finished.finish_F

    def finished(self, b: int) -> FinishedSequence:
        """Sequence b, which must have ended."""
        request, n = self._request, self._length_B[b]
        return FinishedSequence(
            group=b // request.group_size,
            sample=b % request.group_size,
            prompt_id=int(request.prompt_id_P[b // request.group_size]),
            tokens_T=self._token_BT[b, :n].copy(),
            logp_T=self._logp_BT[b, :n].copy(),
            policy_logp_T=self._policy_logp_BT[b, :n].copy(),
            finish=FinishReason(int(self._finish_B[b])),
        )

    def rollout(self, policy: PolicyVersion, *, length: int, vocab_size: int, pad_id: int) -> Rollout:
        """All sequences, which must have ended.

        Args:
            policy: version of the parameters.
            length: positions of each row.
            vocab_size: the model's.
            pad_id: token id of the padding.
        """
        request, place_T = self._request, np.arange(length)
        P, G = len(request.length_P), request.group_size
        prompt_length_B = np.repeat(request.length_P, G)
        total_B = prompt_length_B + self._length_B
        prompt_BT = place_T < prompt_length_B[:, None]
        completion_BT = ~prompt_BT & (place_T < total_B[:, None])
        live_BT = np.arange(self._token_BT.shape[1]) < self._length_B[:, None]

        def placed(value_BT: np.ndarray, fill: int = 0) -> np.ndarray:
            out_BT = np.full((P * G, length), fill, value_BT.dtype)
            out_BT[completion_BT] = value_BT[live_BT]
            return out_BT

        tokens_BT = placed(self._token_BT, pad_id)
        given_BT = prompt_BT[:, : request.tokens_PT.shape[1]]
        tokens_BT[:, : given_BT.shape[1]][given_BT] = np.repeat(request.tokens_PT, G, 0)[given_BT]
        return Rollout(
            tokens_BT=tokens_BT,
            prompt_length_B=prompt_length_B,
            total_length_B=total_B,
            loss_mask_BT=completion_BT,
            logp_BT=placed(self._logp_BT),
            policy_logp_BT=placed(self._policy_logp_BT),
            finish_B=self._finish_B.copy(),
            prompt_id_B=np.repeat(request.prompt_id_P, G),
            sample_B=np.tile(np.arange(G, dtype=np.int32), P),
            group_B=np.repeat(np.arange(P, dtype=np.int32), G),
            group_size=G,
            sampling=request.sampling,
            policy=policy,
            vocab_size=vocab_size,
            pad_id=pad_id,
        )
