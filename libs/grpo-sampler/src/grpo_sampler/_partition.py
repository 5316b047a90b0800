"""How the network's parameters are meant to be split over a mesh with the axes dp, fsdp and tp, as plain data."""

import math
import re
from collections.abc import Mapping

from grpo_sampler._config import ModelConfig

BATCH_AXES = ("dp", "fsdp")
"""Mesh axes that rows of a batch are split over."""
TENSOR_AXIS = "tp"
"""Mesh axis that heads, MLP columns and the vocabulary are split over."""

PARTITION_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    ("embed|unembed", ("vocabulary", "width")),
    ("final_norm", (None,)),
    ("layers/(attn|mlp|q|k)_norm", (None, None)),
    ("layers/q", (None, "width", "heads", None)),
    ("layers/[kv]", (None, "width", "kv_heads", None)),
    ("layers/q_bias", (None, "heads", None)),
    ("layers/[kv]_bias", (None, "kv_heads", None)),
    ("layers/o", (None, "heads", None, "width")),
    ("layers/(gate|up)", (None, "width", "mlp")),
    ("layers/down", (None, "mlp", "width")),
    # Adapters: the rank is not split, the other axes are those of the matrix.
    ("layers/(q|k|v|gate|up)_a", (None, "width", None)),
    ("layers/o_a", (None, "heads", None, None)),
    ("layers/down_a", (None, "mlp", None)),
    ("layers/q_b", (None, None, "heads", None)),
    ("layers/[kv]_b", (None, None, "kv_heads", None)),
    ("layers/(gate|up)_b", (None, None, "mlp")),
    ("layers/(o|down)_b", (None, None, "width")),
)
"""For every parameter, a regular expression that matches its whole path ("layers/q") and the axis of each dimension.

Megatron's layout for `tp`, with the remaining large dimension over `fsdp`. Source: arXiv:1909.08053."""
PARTITION_AXES: Mapping[str, str] = {
    "vocabulary": TENSOR_AXIS,
    "width": "fsdp",
    "heads": TENSOR_AXIS,
    "kv_heads": TENSOR_AXIS,
    "mlp": TENSOR_AXIS,
}
"""The mesh axis that each axis named in `PARTITION_RULES` is split over."""
PADDED_AXES: tuple[str, ...] = ("vocabulary",)
"""Axes that may be padded where they do not divide by their mesh axis."""


def decoding_sizes(config: ModelConfig, devices: int) -> tuple[int, ...]:
    """Sizes of a `tp` axis that decoding can be split over.

    A size need not divide the key/value heads, which are repeated until it does; it must leave every device whole query
    heads of equal groups, and equal parts of the MLP and the vocabulary.

    Args:
        config: the model.
        devices: on the mesh; sizes divide it.

    Returns:
        Sizes, ascending from 1.
    """
    return tuple(
        size
        for size in range(1, devices + 1)
        if devices % size == 0
        and config.query_heads % decoding_kv_heads(config, size) == 0
        and config.mlp_width % size == 0
        and config.vocab_size % size == 0
    )


def decoding_kv_heads(config: ModelConfig, tensor: int) -> int:
    """Key/value heads of the cache: those of the model, each repeated as often as `tensor` devices need it."""
    return math.lcm(config.kv_heads, tensor)


def decoding_axes(path: str) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a parameter while decoding: `tp` as in training, nothing over `fsdp`."""
    axes = next(axes for pattern, axes in PARTITION_RULES if re.fullmatch(pattern, path))
    mesh_axes = (None if axis is None else PARTITION_AXES[axis] for axis in axes)
    return tuple(axis if axis == TENSOR_AXIS else None for axis in mesh_axes)
