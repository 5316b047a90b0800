"""grpo-contracts."""
