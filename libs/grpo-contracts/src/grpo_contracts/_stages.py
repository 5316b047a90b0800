"""The stages that a batch passes through: prompts, rollout, scored, train.

Each field declares its dims and dtype once, next to its name. Validation, the file format, the pytree registration and
the printed schema all read them here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NamedTuple, TypeAlias, get_type_hints

import numpy as np

from ._arrays import check_int, describe
from ._errors import broken
from ._provenance import PolicyVersion, SamplingParams, real
from ._ragged import pad_ragged
from ._reader import Reader

# numpy.ndarray or jax.Array. The package never imports jax, and they have no common base that type-checks arithmetic.
Array: TypeAlias = Any


class Spec(NamedTuple):
    """What a field of a stage holds, as part of its annotation."""

    doc: str
    dtype: str = ""
    """numpy name of an array's dtype; empty if the field is not an array."""
    dims: str = ""
    """The shapes an array may have, as axis letters: `"B T"`, or `"B | B T"` if either is allowed."""


class Stage:
    """What the four stages have in common: fields with specs, and a `repr` short enough for a log line."""

    @classmethod
    @cache
    def specs(cls) -> dict[str, Spec]:
        """The stage's fields in order, each with its spec."""
        return {name: hint.__metadata__[0] for name, hint in get_type_hints(cls, include_extras=True).items()}

    def __repr__(self) -> str:
        parts = (f"{name}={_brief(getattr(self, name, '<missing>'))}" for name in self.specs())
        return f"{type(self).__name__}({', '.join(parts)})"


def _brief(value: object) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return repr(value) if shape is None or dtype is None else f"{dtype}{list(shape)}"


@dataclass(frozen=True, eq=False, repr=False)
class Prompts(Stage):
    """Tokenized prompts, right-padded."""

    tokens_PT: Annotated[Array, Spec("token ids: the prompt, then pad_id", "int32", "P T")]
    length_P: Annotated[Array, Spec("tokens of each prompt, at least 1", "int32", "P")]
    prompt_id_P: Annotated[Array, Spec("which problem of the dataset each prompt is", "int32", "P")]
    vocab_size: Annotated[int, Spec("token ids are in [0, vocab_size)")]
    pad_id: Annotated[int, Spec("the token id that fills the padding")]

    @classmethod
    def from_ids(
        cls,
        ids: Sequence[Sequence[int] | np.ndarray],
        *,
        vocab_size: int,
        pad_id: int = 0,
        prompt_id_P: Sequence[int] | np.ndarray | None = None,
        length: int | None = None,
    ) -> Prompts:
        """Prompts from ragged lists of token ids.

        Args:
            ids: the token ids of each of the P prompts.
            vocab_size: size of the vocabulary.
            pad_id: token id that fills the padding.
            prompt_id_P: which problem each prompt is; 0..P-1 if None.
            length: T, in tokens; that of the longest prompt if None.

        Returns:
            Prompts, padded on the right to T tokens.

        Raises:
            ContractError: an empty or overlong prompt, ids outside the vocabulary, or not P prompt ids.
        """
        check_int(vocab_size, "vocab_size", 1)
        check_int(pad_id, "pad_id", 0)
        if length is not None:
            check_int(length, "length", 1)
        tokens_PT, live_PT = pad_ragged(ids, "ids", np.int32, width=length)
        outside = np.argwhere(tokens_PT >= vocab_size)
        if len(outside):
            at = tuple(outside[0])
            raise broken("argument", "ids", "vocabulary", f"in [0, {vocab_size})", tokens_PT[at], index=at)
        if pad_id >= vocab_size:
            raise broken("argument", "pad_id", "vocabulary", f"in [0, {vocab_size})", pad_id)
        rows = len(tokens_PT)
        if prompt_id_P is None:
            prompt_id_P = np.arange(rows, dtype=np.int32)
        return cls(
            tokens_PT=np.where(live_PT, tokens_PT, np.int32(pad_id)),
            length_P=live_PT.sum(1, dtype=np.int32),
            prompt_id_P=Reader({"prompt_id_P": prompt_id_P}, "argument").integers("prompt_id_P", (rows,), rank=1),
            vocab_size=vocab_size,
            pad_id=pad_id,
        )


@dataclass(frozen=True, eq=False, repr=False)
class Rollout(Stage):
    """Sampled completions, with all that is needed to score and learn from them later.

    Rows are right-padded: prompt, completion, padding. `x_BT[b, t]` describes token t of row b.
    """

    tokens_BT: Annotated[Array, Spec("token ids: prompt, completion, then pad_id", "int32", "B T")]
    prompt_length_B: Annotated[Array, Spec("tokens of the prompt, at least 1", "int32", "B")]
    total_length_B: Annotated[Array, Spec("tokens of prompt and completion, the latter at least 1", "int32", "B")]
    loss_mask_BT: Annotated[Array, Spec("tokens in the loss: a row's completion, or nothing", "bool", "B T")]
    logp_BT: Annotated[Array, Spec("log-probability of each sampled token under `sampling`, in nats", "float32", "B T")]
    policy_logp_BT: Annotated[
        Array, Spec("the same under the policy itself (temperature 1, no filter)", "float32", "B T")
    ]
    finish_B: Annotated[Array, Spec("FinishReason of each row", "int8", "B")]
    prompt_id_B: Annotated[Array, Spec("which problem of the data set each row answers", "int32", "B")]
    sample_B: Annotated[Array, Spec("index of the row in its group", "int32", "B")]
    group_B: Annotated[Array, Spec("group of each row, 0..B/group_size-1", "int32", "B")]
    group_size: Annotated[int, Spec("samples of one prompt")]
    sampling: Annotated[SamplingParams, Spec("how the tokens were drawn")]
    policy: Annotated[PolicyVersion, Spec("version of the parameters that drew them")]
    vocab_size: Annotated[int, Spec("token ids are in [0, vocab_size)")]
    pad_id: Annotated[int, Spec("the token id that fills the padding")]

    @property
    def completion_length_B(self) -> Array:
        """Tokens of each completion, int32 [B]."""
        return self.total_length_B - self.prompt_length_B

    @property
    def completion_BT(self) -> Array:
        """Which positions hold completion tokens, bool [B, T], in the loss or not."""
        t = np.arange(self.tokens_BT.shape[1], dtype=np.int32)
        return (t >= self.prompt_length_B[:, None]) & (t < self.total_length_B[:, None])


@dataclass(frozen=True, eq=False, repr=False)
class Scored(Stage):
    """A rollout with its rewards. A reward that could not be computed is unscored, not zero."""

    rollout: Annotated[Rollout, Spec("what was scored")]
    reward_BN: Annotated[Array, Spec("raw reward of each function, unweighted; 0 where unscored", "float32", "B N")]
    scored_BN: Annotated[Array, Spec("whether each function could score the row", "bool", "B N")]
    names: Annotated[tuple[str, ...], Spec("names of the N reward functions")]
    weight_N: Annotated[Array, Spec("weight of each function", "float32", "N")]
    reward_B: Annotated[Array, Spec("weighted sum of the scored rewards; 0 where the row is unscored", "float32", "B")]
    scored_B: Annotated[Array, Spec("whether the row has a reward at all", "bool", "B")]

    @classmethod
    def from_rewards(
        cls,
        rollout: Rollout,
        rewards: Mapping[str, Sequence[float | None]],
        weights: Mapping[str, float] | None = None,
    ) -> Scored:
        """A scored rollout from what reward functions returned.

        Args:
            rollout: what was scored.
            rewards: a reward for each of the B rows by function name; None where it could not be computed.
            weights: a weight by function name; 1 for each if None.

        Returns:
            The scored rollout. A row is scored if every function of nonzero weight could score it: a sum without one
            of its terms would rank the row as if that term were 0.

        Raises:
            ContractError: a name without a weight or a weight without a name, too many or too few rewards, or a reward
                that is not a number.
        """
        weights = _weights(rollout, rewards, weights)
        scored_BN = np.array([[value is not None for value in column] for column in rewards.values()]).T
        reward_BN = np.array([[value or 0.0 for value in column] for column in rewards.values()], np.float32).T
        weight_N = np.array([weights[name] for name in rewards], np.float32)
        scored_B = (scored_BN | (weight_N == 0)).all(1) & scored_BN.any(1)
        reward_B = np.where(scored_B, (reward_BN * scored_BN) @ weight_N, 0).astype(np.float32)
        return cls(rollout, reward_BN, scored_BN, tuple(rewards), weight_N, reward_B, scored_B)


def _weights(rollout: Any, rewards: Any, weights: Any) -> Mapping[str, float]:
    """The weight of each reward function, after checking all arguments."""
    weights = dict.fromkeys(rewards, 1.0) if weights is None and isinstance(rewards, Mapping) else weights
    if type(rollout) is not Rollout:
        raise broken("Scored", "rollout", "type", "a Rollout", describe(rollout))
    for given in (rewards, weights):
        if not isinstance(given, Mapping) or not given:
            raise broken("Scored", "names", "type", "given as a mapping with at least one name", describe(given))
    if set(weights) != set(rewards):
        raise broken("Scored", "names", "weights", f"given weights for exactly {[*rewards]}", [*weights])
    rows = len(rollout.tokens_BT)
    for n, (name, column) in enumerate(rewards.items()):
        if real(weights[name]) is None:
            expected = f"a finite number, for {name!r}"
            raise broken("Scored", "weight_N", "finite", expected, _number(weights[name]), index=(n,))
        listed = isinstance(column, Sequence) or (isinstance(column, np.ndarray) and column.ndim == 1)
        if not listed or len(column) != rows:
            came = len(column) if listed else describe(column)
            raise broken("Scored", "reward_BN", "rows", f"{rows} rewards from {name!r}, one per row", came)
        for b, value in enumerate(column):
            if value is not None and real(value) is None:
                expected = f"a finite number or None, from {name!r}"
                raise broken("Scored", "reward_BN", "finite", expected, _number(value), index=(b, n))
    return weights


def _number(value: object) -> object:
    return value if isinstance(value, float) else describe(value)


@dataclass(frozen=True, eq=False, repr=False)
class TrainBatch(Stage):
    """A scored rollout with advantages: all that an update of the policy reads."""

    scored: Annotated[Scored, Spec("what the advantages were computed from")]
    advantage: Annotated[Array, Spec("advantage of each row, or of each token", "float32", "B | B T")]
    old_logp_BT: Annotated[
        Array | None, Spec("log-probabilities under the policy before the update", "float32", "B T")
    ] = None
    reference_logp_BT: Annotated[
        Array | None, Spec("log-probabilities under the frozen reference", "float32", "B T")
    ] = None


STAGES: tuple[type[Stage], ...] = (Prompts, Rollout, Scored, TrainBatch)

OPTIONAL = frozenset({"old_logp_BT", "reference_logp_BT"})
"""The array fields that may be None."""
