"""Where a rollout comes from: the sampling parameters, the version of the policy, and why each sequence ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import isfinite
from numbers import Integral, Real
from typing import Any

import numpy as np

from ._arrays import describe, is_array, to_numpy
from ._errors import broken


class FinishReason(IntEnum):
    """Why a sequence ended."""

    STOP = 0
    """A stop id was sampled. It is the completion's last token and counts in the loss."""
    LENGTH = 1
    """The limit on new tokens was reached."""
    STOP_STRING = 2
    """The last token completed a stop string. It counts in the loss."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn from the logits: temperature first, then top-k, top-p and min-p, then one draw.

    Args:
        temperature: divides the logits; 0.0 means greedy.
        top_k: keep the k most likely tokens; 0 = off.
        top_p: keep the smallest set of most likely tokens whose probability reaches it; 1.0 = off.
        min_p: keep tokens at least this fraction as likely as the most likely one; 0.0 = off.
        stop_ids: token ids that end a completion, each as its last token.

    Raises:
        ContractError: no distribution has these parameters.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # Stored as plain Python numbers, so that equal parameters hash, compare and print the same.
        self._set("temperature", real(self.temperature), lambda t: t >= 0, "a finite number >= 0")
        self._set("top_k", _integer(self.top_k), lambda k: k >= 0, "an integer >= 0 (0 = off)")
        self._set("top_p", real(self.top_p), lambda p: 0 < p <= 1, "in (0, 1] (1.0 = off)")
        self._set("min_p", real(self.min_p), lambda p: 0 <= p <= 1, "in [0, 1] (0.0 = off)")
        ids = self.stop_ids
        if isinstance(ids, np.ndarray):
            ids = ids.ravel().tolist()
        integers = tuple(map(_integer, ids)) if isinstance(ids, list | tuple | range | set | frozenset) else (None,)
        valid = all(i is not None and i >= 0 for i in integers)
        self._set("stop_ids", integers if valid else None, lambda _: True, "token ids, integers >= 0")

    def _set(self, name: str, value: Any, holds: Callable[[Any], bool], expected: str) -> None:
        if value is None or not holds(value):
            came = getattr(self, name)
            raise broken("SamplingParams", name, "range", expected, came if type(came) is int else describe(came))
        object.__setattr__(self, name, value)

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the policy itself: temperature 1, no filter."""
        return (self.temperature, self.top_k, self.top_p, self.min_p) == (1.0, 0, 1.0, 0.0)


@dataclass(frozen=True)
class PolicyVersion:
    """Which parameters drew a rollout.

    Args:
        step: optimizer steps taken, from 0.
        digest: hexadecimal digest of the parameters; empty if it was not recorded.
    """

    step: int
    digest: str

    def concrete(self) -> PolicyVersion:
        """The same version with a plain step and digest, read back from the arrays that a jitted function returned.

        Returns:
            A PolicyVersion whose step is an int and whose digest is a str.

        Raises:
            ContractError: they are neither that nor arrays of it, or have no value yet (inside jit).
        """
        step: Any = getattr(self, "step", None)
        digest: Any = getattr(self, "digest", None)
        if is_array(step) and step.ndim == 0 and step.dtype.kind in "iu":
            step = to_numpy(step, "PolicyVersion", "step").item()
        if is_array(digest) and digest.ndim == 1 and digest.dtype == np.uint8:
            digest = to_numpy(digest, "PolicyVersion", "digest").tobytes().decode("ascii", "replace")
        if type(step) is not int:
            raise broken("PolicyVersion", "step", "type", "an int", describe(step))
        if type(digest) is not str:
            raise broken("PolicyVersion", "digest", "type", "a str", describe(digest))
        return PolicyVersion(step, digest)


def real(value: object) -> float | None:
    """A finite number as a float; None for anything else."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return None
    return number if isfinite(number) else None


def _integer(value: object) -> int | None:
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None
