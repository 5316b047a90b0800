"""Reads the arrays of a record, checking that each is present and has the right rank, kind and shape."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._arrays import describe, to_numpy
from ._errors import broken
from ._provenance import SamplingParams


class Reader:
    """Reads named arrays of a record, checking the rank, kind and shape of each."""

    def __init__(self, record: Any, name: str) -> None:
        if not isinstance(record, Mapping):
            raise broken(name, None, "type", "a mapping of names to arrays", describe(record))
        self._record = record
        self.name = name

    def __contains__(self, key: str) -> bool:
        return self._record.get(key) is not None

    def array(self, key: str, kinds: str, shape: tuple[int, ...] | None = None, *, rank: int = 2) -> np.ndarray:
        if key not in self:
            raise broken(self.name, key, "present", "in the record", "nothing")
        array = read(self._record[key], self.name, key)
        if array.ndim != rank or 0 in array.shape or (shape is not None and array.shape != shape):
            wanted = "(rows, positions)" if shape is None else str(shape)
            raise broken(self.name, key, "shape", wanted, array.shape, verb="have shape")
        if array.dtype.kind not in kinds:
            raise broken(self.name, key, "dtype", f"of a dtype of kind {' or '.join(kinds)}", array.dtype)
        return array

    def integers(self, key: str, shape: tuple[int, ...] | None = None, *, rank: int = 2) -> np.ndarray:
        array = self.array(key, "iu", shape, rank=rank)
        bad = (array < -(2**31)) | (array >= 2**31)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise broken(self.name, key, "range", "within int32", array[at], index=at)
        return array.astype(np.int32)

    def mask(self, key: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
        array = self.array(key, "biuf", shape)
        bad = (array != 0) & (array != 1)
        if bad.any():
            at = tuple(np.argwhere(bad)[0])
            raise broken(self.name, key, "binary", "0 or 1", array[at], index=at)
        return array != 0

    def logp(self, drawn: str, scored: str, sampling: SamplingParams, shape: tuple[int, ...]) -> np.ndarray:
        """Log-probabilities under the sampling parameters: the sampler's, or the trainer's if nothing was filtered."""
        if drawn in self:
            return self.array(drawn, "f", shape)
        if (sampling.top_k, sampling.top_p, sampling.min_p) != (0, 1.0, 0.0):
            hint = f"{scored!r} ignores filters: record the sampler's own log-probabilities."
            expected = "in the record, because the sampling parameters filter tokens"
            raise broken(self.name, drawn, "present", expected, "nothing", hint=hint)
        if scored not in self:
            raise broken(self.name, drawn, "present", f"in the record, or {scored!r}", "neither")
        return self.array(scored, "f", shape)


def read(value: Any, name: str, key: str) -> np.ndarray:
    # Torch tensors that track gradients or live on an accelerator need both steps before numpy can read them.
    for step in ("detach", "cpu"):
        method = getattr(value, step, None)
        value = method() if callable(method) else value
    return to_numpy(value, name, key)
