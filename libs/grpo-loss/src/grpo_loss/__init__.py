"""grpo-loss."""
