"""How a trainer splits the parameters over `fsdp` and `tp`; norms are small and whole everywhere."""

SPECS = {
    "embed": ("tp", "fsdp"),
    "unembed": ("tp", "fsdp"),
    "q": (None, "fsdp", "tp"),
    "k": (None, "fsdp", "tp"),
    "v": (None, "fsdp", "tp"),
    "o": (None, "tp", None, "fsdp"),
    "gate": (None, "fsdp", "tp"),
    "up": (None, "fsdp", "tp"),
    "down": (None, "tp", "fsdp"),
    "q_a": (None, "fsdp"),
    "q_b": (None, None, "tp"),
    "o_a": (None, "tp"),
    "o_b": (None, None, "fsdp"),
    "down_a": (None, "tp"),
    "down_b": (None, None, "fsdp"),
}
