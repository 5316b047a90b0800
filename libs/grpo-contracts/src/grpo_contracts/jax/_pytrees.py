"""The stages and the policy version as pytrees.

The version changes in every step and must not recompile anything, so its step and the bytes of its digest are leaves
(int32 [] and uint8 [digits]). If it were static and ignored, a jitted function would return the version that it was
traced with, and stale weights would go unnoticed.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from .._provenance import PolicyVersion
from .._stages import STAGES, Stage


def _leaves(policy: PolicyVersion) -> tuple[Any, Any]:
    step, digest = policy.step, policy.digest
    if isinstance(step, int):
        step = np.int32(step)
    if isinstance(digest, str):
        digest = np.frombuffer(digest.encode(), np.uint8)
    return step, digest


def _flatten(policy: PolicyVersion) -> tuple[tuple[Any, Any], None]:
    return _leaves(policy), None


def _flatten_with_keys(policy: PolicyVersion) -> tuple[tuple[tuple[Any, Any], tuple[Any, Any]], None]:
    step, digest = _leaves(policy)
    return ((jax.tree_util.GetAttrKey("step"), step), (jax.tree_util.GetAttrKey("digest"), digest)), None


def _unflatten(_: None, leaves: Any) -> PolicyVersion:
    policy = PolicyVersion(*leaves)
    step, digest = leaves
    # Arrays on the host are read at once. Device arrays are not, because reading would wait for them.
    on_host = isinstance(step, np.ndarray | np.integer) and isinstance(digest, np.ndarray)
    whole = on_host and step.ndim == 0 and digest.ndim == 1 and step.dtype.kind == "i" and digest.dtype == np.uint8
    return PolicyVersion(int(step), digest.tobytes().decode("utf-8", "replace")) if whole else policy


def _is_data(stage: type[Stage], field: str) -> bool:
    return bool(stage.specs()[field].dtype) or field in ("rollout", "scored", "policy")


jax.tree_util.register_pytree_with_keys(PolicyVersion, _flatten_with_keys, _unflatten, _flatten)
for _stage in STAGES:
    jax.tree_util.register_dataclass(
        _stage,
        data_fields=[field for field in _stage.specs() if _is_data(_stage, field)],
        meta_fields=[field for field in _stage.specs() if not _is_data(_stage, field)],
    )
