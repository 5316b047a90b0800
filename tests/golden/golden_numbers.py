"""Numbers that look arbitrary and are the same for ever: no generator whose stream might change."""

from __future__ import annotations

import numpy as np


def wave(*shape: int, phase: float = 0.0) -> np.ndarray:
    """Values in [-1, 1] of a shape, float32."""
    count = int(np.prod(shape))
    return np.sin(np.arange(count) * 12.9898 + phase).astype(np.float32).reshape(shape)


def integers(*shape: int, below: int, phase: int = 0) -> np.ndarray:
    """Integers in [0, below) of a shape, int32."""
    count = int(np.prod(shape))
    return ((np.arange(count) * 7919 + 31 * phase) % 1009 % below).astype(np.int32).reshape(shape)
