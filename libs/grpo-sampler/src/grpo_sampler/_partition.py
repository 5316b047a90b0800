"""How the network's parameters are meant to be split over a mesh with the axes dp, fsdp and tp, as plain data."""

from collections.abc import Mapping

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
