"""Where the parameters of every supported family live on a mesh with axes dp, fsdp, tp."""

from grpo_mesh import Rules

# Megatron's layout for tp (heads, MLP columns, vocabulary rows), the remaining large dimension over fsdp.
RULES = Rules(
    [
        ("embed|unembed", ("vocabulary", "width")),
        (".*norm", ()),
        ("layers/q", (None, "width", "heads")),
        ("layers/[kv]", (None, "width", "kv_heads")),
        ("layers/q_bias", (None, "heads")),
        ("layers/[kv]_bias", (None, "kv_heads")),
        ("layers/o", (None, "heads", None, "width")),
        ("layers/(gate|up)", (None, "width", "mlp")),
        ("layers/down", (None, "mlp", "width")),
    ],
    axes={"vocabulary": "tp", "width": "fsdp", "heads": "tp", "kv_heads": "tp", "mlp": "tp"},
    pad=("vocabulary",),
)
