"""grpo-mesh."""
